"""`POST /classify`: an image file in, the classes and their probabilities out."""

import asyncio
import dataclasses
import functools
import re
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from starlette.datastructures import Headers as HeaderMap
from starlette.datastructures import QueryParams, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from serving.answers import Prediction
from serving.engine.exits import read_confidence, read_exit
from serving.errors import RequestError, bad_request, busy, not_ready
from serving.http.bodies import Bodies, ClientGone
from serving.http.documented import Documented
from serving.http.inference import STOPPED, note, predict
from serving.protocol.admission import Admission
from serving.protocol.choices import Asked
from serving.scheduling.scheduler import DeadlineExceeded
from serving.scheduling.service import Served, Service
from zoo.bundle.card import InputFormat
from zoo.errors import BadImage, BadInput, UnsupportedImage
from zoo.pictures import decode_image

_THREADS: Final = 2
_MAX_DECODING: Final = 64
_MAX_TEXT_FIELD: Final = 4096
_BOUNDARY: Final = re.compile(
    r""";\s*boundary=(?:"([^"\\]{1,70})"|([^\s;,"\\]{1,70}))\s*(?:;|$)""", re.ASCII | re.IGNORECASE
)
# what clients send that were not told what the body is; the last is curl's default
_UNTOLD: Final = ("", "application/octet-stream", "application/x-www-form-urlencoded")


class Decoders:
    """A few threads that decode image files beside the event loop: a large JPEG takes longer than many predictions."""

    def __init__(self, max_pixels: int, threads: int = _THREADS) -> None:
        """Start to take work; files may have `max_pixels` pixels."""
        self._decode = functools.partial(decode_image, max_pixels=max_pixels)
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self.work: dict[Future[NDArray[np.float32]], asyncio.Future[NDArray[np.float32]]] = {}
        """What is decoded or waits for a thread, and who waits for it."""
        self._stopped = False

    async def decode(self, content: bytes, wanted: InputFormat) -> NDArray[np.float32]:
        """Return the pixels of an image file, (1, channel, height, width). A cancelled caller gives up its place.

        Raises:
            RequestError: 429 if too many files wait, 503 after the stop.
            BadImage: as `decode_image`.
        """
        if self._stopped:
            raise not_ready()
        if len(self.work) >= _MAX_DECODING:
            raise busy(429, "queue_full", f"{_MAX_DECODING} images are being decoded; try again in a second")
        held = [content]  # what nobody waits for any more is not kept until a thread is free
        del content
        work = self._threads.submit(lambda: self._decode(held.pop(), wanted))
        waiting = self.work[work] = asyncio.wrap_future(work)
        work.add_done_callback(lambda done: self.work.pop(done, None))
        try:
            return await waiting
        finally:
            held.clear()

    def stop(self) -> None:
        """Cancel whoever still waits, and let the threads end after what they are doing; waits for nothing."""
        self._stopped = True
        for waiting in list(self.work.values()):
            waiting.cancel()
        self._threads.shutdown(wait=False, cancel_futures=True)


class Pictures:
    """Classifies image files."""

    def __init__(self, service: Service, admission: Admission, bodies: Bodies) -> None:
        self._service = service
        self._admission = admission
        self._bodies = bodies
        self._decoders: Decoders | None = None

    def start(self) -> None:
        """Take files from now on."""
        self._decoders = Decoders(self._service.settings.max_image_pixels)

    def stop(self) -> None:
        """Take no more files, and cancel whoever waits."""
        if self._decoders is not None:
            self._decoders.stop()

    @property
    def busy(self) -> bool:
        """Whether a file is being decoded, also after the stop."""
        return self._decoders is not None and bool(self._decoders.work)

    @Documented("inference", takes="Picture", answer="Classification", refuses=(404, 408, 413, 415, 429, 500, 504))
    async def classify(self, request: Request) -> Response:
        """Classify an image file.

        PNG, JPEG or WEBP; brought to the model's size by its card's rule.
        `curl -F image=@cat.png http://127.0.0.1:8000/classify`
        """
        query = request.query_params
        served = self._service.find(query.get("model"), query.get("version"))
        # a key for some models only: here the path does not say which one is asked
        self._admission.check(request.url.path, request.headers.raw, served.name)
        request.state.model = served.name  # an error from here on is counted as this model's
        top = _top(query.get("top"), len(served.model.card.classes))
        asked = served.codec.choices.asked(_parameters(query))
        try:
            async with self._bodies.reading(request.scope, request.receive) as body:
                started = time.perf_counter()
                images = await self._decode(served, await _image_file(request.headers, body), asked.timeout)
                if served.latest is not served and served.latest.model.card.input == served.model.card.input:
                    served = served.latest
                    asked = served.codec.choices.asked(_parameters(query))
                if asked.timeout is not None:
                    left = asked.timeout - (time.perf_counter() - started)
                    if left <= 0:
                        raise self._service.failure(served, DeadlineExceeded())
                    asked = dataclasses.replace(asked, timeout=left)
                answer = await predict(self._service, served, images, asked, request.scope, request.receive)
        except ClientGone:
            return Response(status_code=499)
        except asyncio.CancelledError as error:
            if not self._service.draining:
                raise
            raise not_ready(STOPPED) from error
        served.metrics.answered("classify", asked.plan, time.perf_counter() - started)
        note(request.scope, served, asked, 1)
        return JSONResponse(_classification(served, asked, answer, top))

    async def _decode(self, served: Served, content: bytes, timeout: float | None) -> NDArray[np.float32]:
        """Decode within `timeout` seconds."""
        if self._decoders is None:
            raise not_ready()
        try:
            async with asyncio.timeout(timeout):
                return await self._decoders.decode(content, served.model.card.input)
        except TimeoutError as error:
            raise self._service.failure(served, DeadlineExceeded()) from error
        except UnsupportedImage as error:
            raise RequestError(415, "unsupported_image", str(error)) from error
        except BadImage as error:
            raise RequestError(400, "bad_image", str(error)) from error


def _classification(served: Served, asked: Asked, answer: Prediction, top: int) -> dict[str, Any]:
    probabilities = answer.probabilities[0].tolist()
    ranked = sorted(zip(served.model.card.classes, probabilities, strict=True), key=lambda entry: -entry[1])
    told: dict[str, Any] = {} if answer.exits is None else {"exit": int(answer.exits[0])}
    if answer.agreement is not None:
        told["agreement"] = round(float(answer.agreement[0]), 4)
    return {
        "model": served.name,
        "mode": (asked.plan or served.model.plan).mode,
        **told,
        "label": ranked[0][0],
        "probabilities": dict(ranked[:top]),
    }


class _InMemoryParser(MultiPartParser):
    """Starlette's parser, which would write files above a megabyte to the disk; the body is bounded already."""

    spool_max_size = 2**40


async def _image_file(headers: HeaderMap, body: bytes) -> bytes:
    """Take the image file out of a body: the field `image` of a form, or the whole body."""
    if not body:
        raise bad_request("the body is empty; send an image file, or a form with the field 'image'")
    content_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type == "multipart/form-data":
        return await _image_field(headers, body)
    if content_type.startswith("image/") or content_type in _UNTOLD:
        return body
    raise RequestError(
        415,
        "unsupported_media_type",
        f"Content-Type is {content_type[:80]!r}, expected multipart/form-data with the field 'image', or image/png, "
        "image/jpeg or image/webp",
    )


async def _image_field(headers: HeaderMap, body: bytes) -> bytes:
    async def stream() -> Any:
        yield body

    boundary = _BOUNDARY.search(headers["content-type"])
    if boundary is None:
        raise bad_request("the form cannot be read (no boundary); send multipart/form-data with 'image'")
    # not the client's own header: it may name a charset, and some of Python's take minutes
    plain = HeaderMap({"content-type": f'multipart/form-data; boundary="{boundary[1] or boundary[2]}"'})
    parser = _InMemoryParser(plain, stream(), max_files=8, max_fields=8, max_part_size=_MAX_TEXT_FIELD)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise bad_request(
            f"the form cannot be read ({error.message}); send multipart/form-data with 'image'"
        ) from error
    try:
        field = form.get("image")
        if not isinstance(field, UploadFile):
            found = ", ".join(repr(name[:40]) for name in form) or "none"
            raise bad_request(f"the form has the fields {found}, expected a file in the field 'image'")
        return await field.read()
    finally:
        await form.close()


def _top(text: str | None, num_classes: int) -> int:
    if text is None:
        return num_classes
    if not (text.isascii() and text.isdigit() and len(text) < 10 and int(text) >= 1):
        raise bad_request(f"top is {text[:40]!r}, expected a whole number from 1 to {num_classes}")
    return min(int(text), num_classes)


def _parameters(query: QueryParams) -> dict[str, Any]:
    """Take what a request may choose out of a URL, in the types that it has in a request's JSON."""
    parameters: dict[str, Any] = {name: query[name] for name in ("mode",) if name in query}
    for name in ("draws", "timeout", "priority"):
        if name in query:
            text = query[name]
            if not (text.isascii() and text.isdigit() and len(text) < 16):
                raise bad_request(f"{name} is {text[:40]!r}, expected a whole number")
            parameters[name] = int(text)
    try:
        if "exit" in query:
            parameters["exit"] = read_exit(query["exit"])
        if "confidence" in query:
            parameters["confidence"] = read_confidence(query["confidence"])
    except BadInput as error:
        raise bad_request(str(error)) from error
    return parameters
