import contextlib
import io
import struct
import tracemalloc
import warnings
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps, PngImagePlugin

from zoo.bundle.card import Card, InputFormat
from zoo.errors import BadImage, BadInput, MissingFile, UnsupportedImage
from zoo.pictures import decode_image, encode_png, read_image, save_png


@pytest.fixture
def wanted() -> InputFormat:
    return Card.from_json((Path(__file__).parent / "golden_card.json").read_text(encoding="utf-8")).input


def encoded(pixels: np.ndarray | Image.Image, kind: str = "PNG", **options: object) -> bytes:
    image = Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels
    stream = io.BytesIO()
    image.save(stream, format=kind, **options)
    return stream.getvalue()


def png_that_claims(width: int, height: int) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_a_file_of_the_right_size_is_its_pixels_over_255(wanted: InputFormat, kind: str, options: dict) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    images = decode_image(encoded(pixels, kind, **options), wanted)
    assert images.shape == (1, 3, 32, 32)
    assert images.dtype == np.float32
    assert np.array_equal(images[0], pixels.transpose(2, 0, 1).astype(np.float32) / np.float32(255))


def test_a_jpeg_is_near_its_pixels(wanted: InputFormat) -> None:
    pixels = np.full((32, 32, 3), (10, 120, 250), dtype=np.uint8)
    images = decode_image(encoded(pixels, "JPEG", quality=95), wanted)
    assert np.abs(images[0, :, 5, 5] * 255 - [10, 120, 250]).max() < 4


@pytest.mark.parametrize("resize", ["nearest", "bilinear", "bicubic", "lanczos"])
def test_another_size_is_brought_to_the_models_by_the_cards_filter(wanted: InputFormat, resize: str) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (100, 60, 3), dtype=np.uint8)
    images = decode_image(encoded(pixels), replace(wanted, resize=resize))
    filters = {name.lower(): value for name, value in Image.Resampling.__members__.items()}
    expected = np.asarray(Image.fromarray(pixels).resize((32, 32), filters[resize]))
    assert np.array_equal(images[0], expected.transpose(2, 0, 1).astype(np.float32) / np.float32(255))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_every_kind_of_pixel_becomes_rgb_within_0_and_1(wanted: InputFormat, mode: str) -> None:
    image = Image.new(mode, (32, 32), 40_000) if mode == "I;16" else Image.new("RGB", (32, 32), "white").convert(mode)
    images = decode_image(encoded(image, "JPEG" if mode == "CMYK" else "PNG"), wanted)
    assert images.shape == (1, 3, 32, 32)
    expected = (40_000 >> 8) / 255 if mode == "I;16" else 1.0
    assert images == pytest.approx(np.full_like(images, expected))


def test_a_model_of_one_channel_gets_grey(wanted: InputFormat) -> None:
    grey = replace(wanted, channels=1, mean=(0.1,), std=(0.3,))
    images = decode_image(encoded(np.full((32, 32, 3), 51, dtype=np.uint8)), grey)
    assert images.shape == (1, 1, 32, 32)
    assert images == pytest.approx(np.full_like(images, 0.2))


@pytest.mark.parametrize("orientation", [*range(10), 65_535])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_every_orientation_is_turned_as_pillow_turns_it(wanted: InputFormat, orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encoded(np.random.default_rng(4).integers(0, 256, (20, 40, 3), dtype=np.uint8), kind, exif=exif)
    with Image.open(io.BytesIO(content)) as image:
        turned = encoded(ImageOps.exif_transpose(image).convert("RGB"))
    assert np.array_equal(decode_image(content, wanted), decode_image(turned, wanted))


def exif_entry(tag: int, kind: int, count: int, value: int) -> bytes:
    return struct.pack(">HHII", tag, kind, count, value)


@pytest.mark.parametrize("tag", [0x010E, 0x8769, 0x8825, 0x0112])
@pytest.mark.parametrize("kind", [0, 2, 5, 12, 255])
@pytest.mark.parametrize("count", [0, 1, 3, 2**31])
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_malformed_exif_is_read_past_or_refused_but_never_crashes(
    wanted: InputFormat, tag: int, kind: int, count: int
) -> None:
    entries = [exif_entry(0x0112, 3, 1, 6 << 16), exif_entry(tag, kind, count, 8)]
    exif = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, len(entries)) + b"".join(entries) + bytes(20)
    for image_kind in ("PNG", "JPEG", "WEBP"):
        content = encoded(np.zeros((20, 40, 3), dtype=np.uint8), image_kind, exif=exif)
        with contextlib.suppress(BadImage):
            assert decode_image(content, wanted).shape == (1, 3, 32, 32)


def test_exif_of_another_type_than_its_tag_says_does_not_hide_the_orientation(wanted: InputFormat) -> None:
    # the letter of the latitude as three rationals: Pillow reads them, and cannot write them again
    gps = struct.pack(">H", 1) + exif_entry(1, 5, 3, 56) + struct.pack(">I6I", 0, 1, 1, 2, 1, 3, 1)
    entries = exif_entry(0x0112, 3, 1, 3 << 16) + exif_entry(0x8825, 4, 1, 38)
    exif = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 2) + entries + struct.pack(">I", 0) + gps
    pixels = np.zeros((32, 32, 3), dtype=np.uint8)
    pixels[:16] = 255
    images = decode_image(encoded(pixels, "PNG", exif=exif), wanted)
    assert images[0, :, :16].max() == 0


def jpeg_of_scans(number: int) -> bytes:
    """A progressive JPEG whose last scan is repeated, `number` scans in all."""
    whole = encoded(np.zeros((64, 64, 3), dtype=np.uint8), "JPEG", progressive=True)
    last = whole[whole.rindex(b"\xff\xda") : -2]
    return whole[:-2] + last * (number - whole.count(b"\xff\xda")) + b"\xff\xd9"


def test_a_jpeg_of_many_scans_is_refused_before_it_is_unpacked(
    wanted: InputFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert decode_image(jpeg_of_scans(64), wanted).shape == (1, 3, 32, 32)
    bomb = jpeg_of_scans(65)
    monkeypatch.setattr(ImageFile.ImageFile, "load", must_not_load)
    with pytest.raises(BadImage, match="the JPEG has 65 scans, expected at most 64"):
        decode_image(bomb, wanted)


def must_not_load(image: Image.Image) -> None:
    pytest.fail("unpacked its pixels")


def with_parts(content: bytes, number: int, kind: str) -> bytes:
    """Put so many empty parts behind the first."""
    if kind == "PNG":
        return (
            content[:33]
            + (struct.pack(">I", 0) + b"teXt" + struct.pack(">I", zlib.crc32(b"teXt"))) * number
            + content[33:]
        )
    return content[:2] + b"\xff\xfe\x00\x02" * number + content[2:]


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_file_of_very_many_parts_is_refused_before_pillow_walks_through_them(
    wanted: InputFormat, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = encoded(np.random.default_rng(3).integers(0, 256, (32, 32, 3), dtype=np.uint8), kind)
    assert np.array_equal(decode_image(with_parts(whole, 9_900, kind), wanted), decode_image(whole, wanted))
    bomb = with_parts(whole, 10_000, kind)
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(BadImage, match="more than 10,000 parts"):
        decode_image(bomb, wanted)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_metadata_and_padding_of_a_jpeg_change_no_pixel(wanted: InputFormat, mode: str) -> None:
    image = Image.fromarray(np.random.default_rng(4).integers(0, 256, (32, 32, 3), dtype=np.uint8)).convert(mode)
    exif = Image.Exif()
    exif[0x010E] = "a description"
    bare = encoded(image, "JPEG")
    full = encoded(image, "JPEG", comment=b"\xff\xda" * 50, exif=exif, icc_profile=bytes(100_000), dpi=(300, 300))
    padded = full[:2] + b"\xff" * 200_000 + full[2:]
    assert np.array_equal(decode_image(full, wanted), decode_image(bare, wanted))
    assert np.array_equal(decode_image(padded, wanted), decode_image(bare, wanted))


def test_metadata_of_a_png_changes_no_pixel(wanted: InputFormat) -> None:
    pixels = np.random.default_rng(5).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    text = PngImagePlugin.PngInfo()
    text.add_text("a", "b" * 100_000, zip=True)
    for image in (Image.fromarray(pixels), Image.fromarray(pixels).quantize(200)):
        for options in ({}, {"transparency": 3 if image.mode == "P" else (1, 2, 3)}):
            bare = encoded(image, "PNG", **options)
            full = encoded(image, "PNG", pnginfo=text, icc_profile=bytes(1000), dpi=(9, 9), **options)
            assert np.array_equal(decode_image(full, wanted), decode_image(bare, wanted))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_tags_that_each_point_to_the_whole_file_are_not_unpacked(wanted: InputFormat, kind: str) -> None:
    entries = b"".join(struct.pack(">HHII", 0x9000 + place, 7, 60_000, 8) for place in range(4_900))
    upside_down = struct.pack(">HHIHH", 0x0112, 3, 1, 3, 0)
    exif = b"MM\0*" + struct.pack(">IH", 8, 4_901) + entries + upside_down + bytes(4)
    pixels = np.zeros((32, 32, 3), dtype=np.uint8)
    pixels[:16] = 255
    content = encoded(pixels, kind, exif=b"Exif\0\0" + exif.ljust(60_008, b"\0"))
    tracemalloc.start()
    try:
        images = decode_image(content, wanted)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 5 * 2**20  # unpacked they are 294 MB
    assert images[0, :, :14].max() < 0.1
    assert images[0, :, 18:].min() > 0.9


def test_a_photograph_is_turned_upright(wanted: InputFormat) -> None:
    pixels = np.zeros((32, 32, 3), dtype=np.uint8)
    pixels[:16] = 255
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    images = decode_image(encoded(pixels, "PNG", exif=exif), wanted)
    assert images[0, :, :16].max() == 0
    assert images[0, :, 16:].min() == 1


@pytest.mark.parametrize(
    "content", [b"", b"GIF89a" + bytes(50), b"BM" + bytes(50), b"<svg/>", b"%PDF-1.4", b"II*\0" + bytes(50)]
)
def test_other_formats_are_not_even_tried(wanted: InputFormat, content: bytes) -> None:
    with pytest.raises(UnsupportedImage, match="no PNG, JPEG or WEBP"):
        decode_image(content, wanted)


HEADS = {"PNG": b"\x89PNG\r\n\x1a\n", "JPEG": b"\xff\xd8\xff", "WEBP": b"RIFF\x10\0\0\0WEBP"}


@pytest.mark.parametrize(
    "content",
    [
        *(head + rest for head in HEADS.values() for rest in (b"", b"\0", b"VP8 ", bytes(40), b"text" * 20)),
        *(encoded(np.zeros((16, 16, 3), np.uint8), kind)[:size] for kind in HEADS for size in (12, 20, 30, 36)),
        *(encoded(np.zeros((16, 16, 3), np.uint8), kind) for kind in ("GIF", "TIFF", "BMP", "ICO")),
        b"",
        b"a",
        b"\xff\xd8",
        b"plain text",
    ],
)
def test_what_is_wrong_with_a_picture_is_said_in_our_own_words(
    wanted: InputFormat, tmp_path: Path, content: bytes
) -> None:
    with pytest.raises(BadImage) as told:
        decode_image(content, wanted)
    (tmp_path / "picture").write_bytes(content)
    with pytest.raises(BadImage) as of_file:
        read_image(tmp_path / "picture", wanted)
    for text in (str(told.value), str(of_file.value).removeprefix(str(tmp_path))):
        for foreign in ("<", ">", "0x", "object", "BytesIO", "b'", "Error", "buffer", "None", "unpack"):
            assert foreign not in text


@pytest.mark.parametrize(("width", "height"), [(2001, 2000), (10_000, 9_500), (60_000, 60_000)])
@pytest.mark.parametrize("strict", [False, True])
def test_an_image_that_claims_too_many_pixels_is_refused_before_it_is_unpacked(
    wanted: InputFormat, monkeypatch: pytest.MonkeyPatch, width: int, height: int, strict: bool
) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", must_not_load)
    with warnings.catch_warnings():
        warnings.simplefilter("error" if strict else "ignore")
        with pytest.raises(BadImage, match="expected at most 4,000,000"):
            decode_image(png_that_claims(width, height), wanted)


def test_the_pixel_cap_is_inclusive(wanted: InputFormat) -> None:
    pixels = np.zeros((40, 50, 3), dtype=np.uint8)
    assert decode_image(encoded(pixels), wanted, max_pixels=2000).shape == (1, 3, 32, 32)
    with pytest.raises(BadImage, match="50x40 pixels, expected at most 1,999"):
        decode_image(encoded(pixels), wanted, max_pixels=1999)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_file_cut_short_or_damaged_is_refused_or_decoded_but_never_crashes(wanted: InputFormat, kind: str) -> None:
    rng = np.random.default_rng(0)
    whole = encoded(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8), kind)
    for share in (0.1, 0.5, 0.9):
        with pytest.raises(BadImage, match="cut short"):
            decode_image(whole[: int(len(whole) * share)], wanted)
    for _ in range(100):
        damaged = bytearray(whole)
        for position in rng.integers(12, min(len(whole), 600), size=4):
            damaged[position] = rng.integers(0, 256)
        try:
            images = decode_image(bytes(damaged), wanted)
        except BadImage:
            continue
        assert images.shape == (1, 3, 32, 32)


def test_a_file_is_named_in_its_error(wanted: InputFormat, tmp_path: Path) -> None:
    with pytest.raises(MissingFile, match=r"no image file .*cat\.png"):
        read_image(tmp_path / "cat.png", wanted)
    (tmp_path / "cat.png").write_bytes(b"meow")
    with pytest.raises(UnsupportedImage, match=r"cat\.png: the 4 bytes"):
        read_image(tmp_path / "cat.png", wanted)


def test_saving_and_reading_gives_the_nearest_of_256_levels(wanted: InputFormat, tmp_path: Path) -> None:
    image = np.random.default_rng(0).random((1, 3, 32, 32), dtype=np.float32)
    save_png(tmp_path / "image.png", image)
    again = read_image(tmp_path / "image.png", wanted)
    assert np.abs(again - image).max() <= 0.5 / 255 + 1e-6
    assert encode_png(again) == (tmp_path / "image.png").read_bytes()
    assert Image.open(io.BytesIO(encode_png(image[0, :1]))).mode == "L"


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (np.zeros((2, 3, 4, 4)), "pass one image at a time"),
        (np.zeros((4, 4)), "expected .1 or 3, height, width"),
        (np.zeros((4, 4, 3)), "expected .1 or 3, height, width"),
        (np.full((3, 4, 4), 255.0), "divide by 255"),
        (np.full((3, 4, 4), np.nan), "expected"),
    ],
)
def test_what_is_no_image_is_not_saved(image: np.ndarray, said: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=said):
        save_png(tmp_path / "image.png", image)
    assert list(tmp_path.iterdir()) == []
