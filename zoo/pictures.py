"""Image files to pixels and back. Nobody vouches for the files.

Only PNG, JPEG and WEBP are decoded, and the size an image claims is checked before any of its pixels are unpacked.
Metadata never reaches Pillow. It walks through a file's parts one by one in Python, which takes minutes for millions of
empty ones, and unpacks every Exif tag, each of which may point to the whole file again. We read one tag: the one that
says which side is up.
"""

import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from zoo.errors import BadImage, BadInput, MissingFile, UnsupportedImage
from zoo.files import write_bytes_atomic
from zoo.input_format import MAX_PIXELS as MAX_PIXELS
from zoo.input_format import InputFormat

MAX_FILE_BYTES: Final = 64 * 2**20
MAX_SCANS: Final = 64
MAX_PARTS: Final = 10_000
FORMATS: Final = ("PNG", "JPEG", "WEBP")

_FILTERS: Final = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
# what Pillow raises on damaged files; UnidentifiedImageError is an OSError, zlib.error has no nearer base of ours
DAMAGE: Final = (
    *(OSError, SyntaxError, ValueError, EOFError, ArithmeticError, LookupError, AttributeError, TypeError),
    *(RuntimeError, AssertionError, MemoryError, struct.error, zlib.error),
)
# what makes pixels
_PNG_PARTS: Final = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_JPEG_START_OF_SCAN: Final = 0xDA
_JPEG_EXIF: Final = 0xE1
_JPEG_METADATA: Final = frozenset((*range(0xE1, 0xEE), 0xEF, 0xFE))  # APP0 and APP14 say how colours are stored
_JPEG_WITHOUT_LENGTH: Final = frozenset((0x01, *range(0xD0, 0xDA)))
# the tag and its values: Exif 2.32, section 4.6.4
_ORIENTATION: Final = 0x0112
_SHORT: Final = 3
_EXIF: Final = b"Exif\0\0"
_TO_UPRIGHT: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(content: bytes, wanted: InputFormat, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.float32]:
    """Decode an image file's bytes into what a model takes.

    The image is turned upright, converted to RGB (or grey, for one channel; transparency is dropped) and squeezed to
    height x width with the filter of the model's card. Of an animation the first frame is taken.

    Returns:
        float32 (1, channel, height, width) in [0, 1].

    Raises:
        UnsupportedImage: if the bytes are not PNG, JPEG or WEBP.
        BadImage: if the file is damaged or cut short, has more than `max_pixels` pixels or `MAX_PARTS` parts, or is a
            JPEG of more than `MAX_SCANS` scans, each of which would pass over all pixels again.
    """
    kind = _format(content)
    if kind is None:
        which = f"{len(content):,} bytes that begin with {content[:8].hex(' ')}" if content else "0 bytes"
        raise UnsupportedImage(f"the {which} are no PNG, JPEG or WEBP file; convert the image first")
    try:
        bare, exif = _without_metadata(content, kind)
        with Image.open(io.BytesIO(bare), formats=FORMATS) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise _too_large(f"{width}x{height}", max_pixels)
            _check_scans(bare, image.format)
            image.load()
            if kind == "WEBP":  # whose metadata Pillow leaves alone
                exif = image.info.get("exif", b"")
            turn = _TO_UPRIGHT.get(_orientation(exif))
            upright = image if turn is None else image.transpose(turn)
            pixels = _resized(_converted(upright, wanted.channels), wanted)
    except BadImage:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large("far more", max_pixels) from error
    except DAMAGE as error:  # its words are Pillow's and mean nothing to whoever sent the file
        raise BadImage(
            f"the {kind} file of {len(content):,} bytes cannot be decoded; it is damaged or cut short, save it again"
        ) from error
    planes = pixels[np.newaxis] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return np.ascontiguousarray(planes[np.newaxis], dtype=np.float32) / np.float32(255)


def read_image(file: Path | str, wanted: InputFormat, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.float32]:
    """Read an image file; returns and raises what `decode_image` does, with the file's name in the message."""
    file = Path(file)
    if not file.is_file():
        raise MissingFile(f"no image file {file}; check the name")
    size = file.stat().st_size
    if size > MAX_FILE_BYTES:
        raise BadImage(f"{file} has {size} bytes, expected at most {MAX_FILE_BYTES}; scale the image down first")
    try:
        return decode_image(file.read_bytes(), wanted, max_pixels=max_pixels)
    except BadImage as error:
        raise type(error)(f"{file}: {error}") from error


def encode_png(image: NDArray[np.floating]) -> bytes:
    """Encode one image as PNG, each pixel rounded to the nearest of 256 levels.

    Args:
        image: (channel, height, width) or (1, channel, height, width) in [0, 1], with 1 or 3 channels.

    Raises:
        BadInput: for another shape, or a pixel that is outside [0, 1] or not a number.
    """
    planes = image[0] if image.ndim == 4 and len(image) == 1 else image
    if planes.ndim != 3 or planes.shape[0] not in (1, 3):
        raise BadInput(f"the image has shape {image.shape}, expected (1 or 3, height, width); pass one image at a time")
    if not (planes.min() >= 0 and planes.max() <= 1):
        raise BadInput(f"pixels reach from {planes.min()} to {planes.max()}, expected [0, 1]; divide by 255")
    levels = np.rint(planes * 255).astype(np.uint8)
    pixels = levels[0] if len(levels) == 1 else np.ascontiguousarray(levels.transpose(1, 2, 0))
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()


def save_png(file: Path | str, image: NDArray[np.floating]) -> None:
    """Write one image as a PNG file in one step; takes and raises what `encode_png` does."""
    write_bytes_atomic(Path(file), encode_png(image))


def _format(content: bytes) -> str | None:
    """Tell the format by its first bytes; None if it is not one that we decode."""
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if content.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "WEBP"
    return None


def _too_large(size: str, max_pixels: int) -> BadImage:
    return BadImage(f"the image has {size} pixels, expected at most {max_pixels:,}; scale it down first")


def _check_scans(content: bytes, kind: str | None) -> None:
    """Refuse a progressive JPEG that takes seconds per hundred bytes; encoders write about ten scans."""
    # "start of scan"; compressed data never holds these two bytes, metadata hardly
    scans = content.count(b"\xff\xda") if kind not in ("PNG", "WEBP") else 0
    if scans > MAX_SCANS:
        raise BadImage(f"the JPEG has {scans} scans, expected at most {MAX_SCANS}; save it again, as a baseline JPEG")


def _without_metadata(content: bytes, kind: str) -> tuple[bytes, bytes]:
    """Return a file without the parts that make no pixels, and its Exif data.

    Where a file is damaged the rest of it is kept or dropped as it comes: decoding says what is wrong.

    Raises:
        BadImage: if it has more than `MAX_PARTS` parts.
    """
    if kind == "WEBP":
        return content, b""
    kept, exif = [], b""
    parts = _png_parts(content) if kind == "PNG" else _jpeg_parts(content)
    for number, (makes_pixels, start, stop, own_exif) in enumerate(parts):
        if number >= MAX_PARTS:
            raise BadImage(f"the image has more than {MAX_PARTS:,} parts; save it again, without metadata")
        if makes_pixels:
            kept.append(content[start:stop])
        exif = exif or own_exif
    return b"".join(kept), exif


def _png_parts(content: bytes) -> Iterator[tuple[bool, int, int, bytes]]:
    """Yield whether a part makes pixels, where it is, and its Exif data."""
    yield True, 0, 8, b""
    start = 8
    while start + 8 <= len(content):
        length, name = struct.unpack_from(">I4s", content, start)
        stop = start + 12 + length
        yield name in _PNG_PARTS, start, stop, content[start + 8 : stop - 4] if name == b"eXIf" else b""
        start = stop


def _jpeg_parts(content: bytes) -> Iterator[tuple[bool, int, int, bytes]]:
    """Yield the same of a JPEG; the first scan and all behind it are one part."""
    start = 0
    while (start := content.find(b"\xff", start)) >= 0 and start + 1 < len(content):
        marker = content[start + 1]
        if marker in (0x00, 0xFF):  # padding: as much of it as there is in one step
            rest = content[start : start + 65536]
            start += max(1, len(rest) - len(rest.lstrip(b"\x00\xff")) - 1)
            yield False, start, start, b""
            continue
        if marker == _JPEG_START_OF_SCAN:
            yield True, start, len(content), b""
            return
        stop = start + 2
        if marker not in _JPEG_WITHOUT_LENGTH:
            stop += int.from_bytes(content[stop : stop + 2], "big")
        is_exif = marker == _JPEG_EXIF and content.startswith(_EXIF, start + 4)
        yield marker not in _JPEG_METADATA, start, stop, content[start + 4 : stop] if is_exif else b""
        start = max(stop, start + 2)


def _orientation(exif: bytes) -> int:
    """Return the one tag of Exif data that we need; 1, upright, where it is not there."""
    exif = exif.removeprefix(_EXIF)
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None or len(exif) < 8:
        return 1
    (start,) = struct.unpack_from(f"{order}I", exif, 4)
    if start + 2 > len(exif):
        return 1
    (number,) = struct.unpack_from(f"{order}H", exif, start)
    number = min(number, (len(exif) - start - 2) // 12)
    for tag, kind, count, value in struct.iter_unpack(f"{order}HHIH2x", exif[start + 2 : start + 2 + 12 * number]):
        if tag == _ORIENTATION and kind == _SHORT and count == 1:
            return int(value)
    return 1


def _converted(image: Image.Image, channels: int) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion would clip, not scale
        levels = np.asarray(image).astype(np.uint32) >> 8
        image = Image.fromarray(levels.astype(np.uint8))
    return image.convert("L" if channels == 1 else "RGB")


def _resized(image: Image.Image, wanted: InputFormat) -> NDArray[np.uint8]:
    size = (wanted.width, wanted.height)
    if image.size != size:
        image = image.resize(size, _FILTERS[wanted.resize])
    return np.asarray(image)
