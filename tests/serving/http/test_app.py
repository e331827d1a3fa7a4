import asyncio
import io
import json
import logging
import threading
import time
import weakref
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image, ImageFile
from starlette import formparsers

from serving.answers import Prediction, Predictor
from serving.engine import gate_compiler
from serving.engine.engine import Engine
from serving.http.app import Application
from serving.http.pictures import Decoders
from serving.protocol.choices import Asked
from serving.scheduling.service import Model
from zoo.bundle.bundle import Bundle
from zoo.errors import BadInput


class Fixed(Predictor):
    """Answers every image alike."""

    def predict(self, images: np.ndarray, *_: Any, **__: Any) -> Prediction:
        row = np.array([[0.125, 0.625, 0.25]], dtype=np.float32)
        return Prediction(np.repeat(row, len(images), axis=0), np.log(np.repeat(row, len(images), axis=0)))


class Broken(Predictor):
    def predict(self, images: np.ndarray, *_: Any, **__: Any) -> Prediction:
        raise RuntimeError("secret detail")


class Gate(Fixed):
    def __init__(self) -> None:
        self.opened = threading.Event()

    def predict(self, images: np.ndarray, *_: Any, **__: Any) -> Prediction:
        assert self.opened.wait(10)
        return super().predict(images)


def ask(application: Application, body: Callable[[httpx.AsyncClient], Awaitable[None]], *, start: bool = True) -> None:
    async def main() -> None:
        transport = httpx.ASGITransport(application)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            if not start:
                return await body(client)
            async with application.running():
                await body(client)

    asyncio.run(main())


def infer_document(value: float = 0.5, rows: int = 1, **fields: Any) -> dict[str, Any]:
    shape = [rows, 3, 4, 4]
    return {"inputs": [{"name": "images", "shape": shape, "datatype": "FP32", "data": [value] * 48 * rows}], **fields}


def png(size: tuple[int, int] = (4, 4), colour: tuple[int, int, int] = (10, 200, 30), kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, format=kind)
    return stream.getvalue()


def test_the_calls_of_the_protocol_answer_in_its_form(application_of) -> None:
    async def body(client: httpx.AsyncClient) -> None:
        assert (await client.get("/v2/health/live")).json() == {"live": True}
        assert (await client.get("/v2/health/ready")).json() == {"ready": True}
        server = (await client.get("/v2")).json()
        assert server["name"] == "manygates"
        assert "binary_tensor_data" in server["extensions"]
        for path in ("/v2/models/tiny", "/v2/models/tiny/versions/1"):
            assert (await client.get(path)).json() == {
                "name": "tiny",
                "versions": ["1"],
                "platform": "onnxruntime_onnx",
                "inputs": [{"name": "images", "datatype": "FP32", "shape": [-1, 3, 4, 4]}],
                "outputs": [
                    {"name": "probabilities", "datatype": "FP32", "shape": [-1, 3]},
                    {"name": "logits", "datatype": "FP32", "shape": [-1, 3]},
                ],
                "parameters": {"mode": "single"},
            }
            assert (await client.get(f"{path}/ready")).json() == {"name": "tiny", "ready": True}
            answer = (await client.post(f"{path}/infer", json=infer_document(id="7"))).json()
            assert answer["id"] == "7"
            assert answer["outputs"][0]["data"] == [0.125, 0.625, 0.25]
        index = (await client.get("/")).json()
        assert index["models"][0]["name"] == "tiny"
        assert index["models"][0]["modes"] == ["single", "ensemble", "random"]

    ask(application_of(Fixed()), body)


def test_an_image_file_is_classified_as_a_form_field_or_a_raw_body(application_of) -> None:
    expected = {
        "model": "tiny",
        "mode": "single",
        "label": "dog",
        "probabilities": {"dog": 0.625, "frog": 0.25, "cat": 0.125},
    }

    async def body(client: httpx.AsyncClient) -> None:
        form = await client.post("/classify", files={"image": ("cat.png", png(), "image/png")})
        assert form.json() == expected
        assert list(form.json()["probabilities"]) == ["dog", "frog", "cat"]
        for kind in ("PNG", "JPEG", "WEBP"):
            raw = await client.post(
                "/classify", content=png((40, 30), kind=kind), headers={"content-type": "image/png"}
            )
            assert raw.json() == expected
        curls_default = {"content-type": "application/x-www-form-urlencoded"}
        for headers in ({}, curls_default, {"content-type": "application/octet-stream"}):
            bare = await client.post("/classify?model=tiny&top=1", content=png(), headers=headers)
            assert bare.json() == {**expected, "probabilities": {"dog": 0.625}}

    ask(application_of(Fixed()), body)


def test_classify_gives_the_model_exactly_the_pixels_of_the_file(tiny_application) -> None:
    pixels = np.random.default_rng(3).integers(0, 256, size=(4, 4, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    data = (pixels.transpose(2, 0, 1).astype(np.float32) / 255).ravel().tolist()

    async def body(client: httpx.AsyncClient) -> None:
        classified = (await client.post("/classify", content=stream.getvalue())).json()["probabilities"]
        document = infer_document()
        document["inputs"][0]["data"] = data
        inferred = (await client.post("/v2/models/tiny/infer", json=document)).json()["outputs"][0]["data"]
        assert [classified[label] for label in ("cat", "dog", "frog")] == pytest.approx(inferred, abs=1e-6)

    ask(tiny_application("single"), body)


@pytest.mark.parametrize(
    "content", [b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n\0", b"RIFF\x04\0\0\0WEBP", b"GIF89a", b"text"]
)
def test_the_answer_to_a_picture_that_is_none_holds_nothing_of_the_interpreters(
    application_of, serve_in_a_thread, content: bytes
) -> None:
    with serve_in_a_thread(application_of(Fixed())) as url:
        answers = [
            httpx.post(f"{url}/classify", content=content),
            httpx.post(f"{url}/classify", files={"image": ("cat.jpg", content)}),
        ]
    for answer in answers:
        assert answer.status_code in (400, 415)
        for foreign in ("<", "0x", "object", "BytesIO", "b'", "Error"):
            assert foreign not in answer.json()["error"]


def test_the_operator_says_how_large_a_picture_may_be(application_of, serve_in_a_thread) -> None:
    picture = io.BytesIO()
    Image.effect_noise((4000, 3000), 20).convert("RGB").save(picture, "JPEG", quality=30)

    def asked(**settings: object) -> httpx.Response:
        with serve_in_a_thread(application_of(Fixed(), **settings)) as url:
            return httpx.post(f"{url}/classify", content=picture.getvalue(), timeout=60)

    refused = asked()
    assert refused.status_code == 400
    assert "4000x3000 pixels, expected at most 4,000,000" in refused.json()["error"]
    assert asked(max_image_pixels=11_999_999).status_code == 400
    answer = asked(max_image_pixels=12_000_000)
    assert (answer.status_code, answer.json()["label"]) == (200, "dog")


@pytest.mark.parametrize(
    ("send", "status", "said"),
    [
        ({"content": b""}, 400, "the body is empty"),
        ({"content": b"GIF89a-and-more"}, 415, "no PNG, JPEG or WEBP"),
        (
            {"content": b"%PDF-1.7", "headers": {"content-type": "application/pdf"}},
            415,
            "Content-Type is 'application/pdf'",
        ),
        ({"content": png()[:40]}, 400, "damaged or cut short"),
        ({"content": png((64, 64), kind="JPEG")[:-200]}, 400, "damaged or cut short"),
        ({"files": {"picture": ("a.png", png())}}, 400, "fields 'picture', expected a file in the field 'image'"),
        ({"data": {"image": "text"}, "files": {"b": ("b.png", b"x")}}, 400, "expected a file in the field 'image'"),
        ({"content": b"--x", "headers": {"content-type": "multipart/form-data"}}, 400, "form cannot be read"),
        ({"content": b"zzz", "headers": {"content-type": "multipart/form-data; boundary=x"}}, 400, "form"),
        ({"content": png(), "params": {"top": "0"}}, 400, "top is '0'"),
        ({"content": png(), "params": {"top": "many"}}, 400, "top is 'many'"),
        ({"content": png(), "params": {"model": "tin"}}, 404, "did you mean 'tiny'"),
        ({"content": png(), "headers": {"content-encoding": "gzip"}}, 415, "Content-Encoding"),
    ],
)
def test_a_bad_image_request_is_refused_with_its_reason(application_of, send: dict, status: int, said: str) -> None:
    async def body(client: httpx.AsyncClient) -> None:
        answer = await client.post("/classify", **send)
        assert answer.status_code == status
        assert said in answer.json()["error"]

    ask(application_of(Fixed()), body)


def test_an_image_of_too_many_pixels_is_refused_before_it_is_unpacked(
    application_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    # more than we allow and less than Pillow would refuse by itself
    content = png((2500, 2000))
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda image: pytest.fail("unpacked its pixels"))

    async def body(client: httpx.AsyncClient) -> None:
        answer = await client.post("/classify", content=content)
        assert answer.status_code == 400
        assert "2500x2000 pixels, expected at most 4,000,000" in answer.json()["error"]

    ask(application_of(Fixed()), body)


def form(text: bytes, charset: str) -> dict[str, Any]:
    """A form with one text field, in a charset of the client's choice."""
    content = b'--x\r\nContent-Disposition: form-data; name="note"\r\n\r\n' + text + b"\r\n"
    content += b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n' + png() + b"\r\n"
    headers = {"content-type": f"multipart/form-data; boundary=x; charset={charset}"}
    return {"content": content + b"--x--\r\n", "headers": headers}


@pytest.mark.parametrize("charset", ["utf-8", "undefined", "punycode", "idna", "utf-7", "rot13", "no-such"])
def test_the_charset_that_a_form_names_is_never_used(
    application_of, monkeypatch: pytest.MonkeyPatch, charset: str
) -> None:
    async def body(client: httpx.AsyncClient) -> None:
        assert (await client.post("/classify", **form(b"\xff \xc3\xa4", charset))).status_code == 200

    looked_up: list[str] = []
    real = formparsers.codecs.lookup
    monkeypatch.setattr(formparsers.codecs, "lookup", lambda name: looked_up.append(name) or real(name))
    ask(application_of(Fixed()), body)
    assert set(looked_up) <= {"utf-8"}


def test_a_text_field_of_more_than_a_few_kilobytes_is_refused(application_of) -> None:
    async def body(client: httpx.AsyncClient) -> None:
        assert (await client.post("/classify", **form(b"a" * 4096, "utf-8"))).status_code == 200
        answer = await client.post("/classify", **form(b"a" * 4097, "utf-8"))
        assert answer.status_code == 400
        assert "form cannot be read (Part exceeded maximum size of 4KB.)" in answer.json()["error"]

    ask(application_of(Fixed()), body)


@pytest.mark.parametrize("boundary", ['"a b"', '"a:b;c"', "----WebKitFormBoundary7MA4YWxkTrZu0gW"])
def test_a_boundary_may_be_quoted(application_of, boundary: str) -> None:
    async def body(client: httpx.AsyncClient) -> None:
        mark = boundary.strip('"').encode()
        content = b'--%s\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n%s\r\n--%s--\r\n'
        headers = {"content-type": f"multipart/form-data; Boundary={boundary}"}
        answer = await client.post("/classify", content=content % (mark, png(), mark), headers=headers)
        assert answer.status_code == 200

    ask(application_of(Fixed()), body)


def test_a_file_that_takes_for_ever_to_decode_holds_up_neither_the_stop_nor_the_exit(
    application_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, opened = threading.Event(), threading.Event()

    def decode_image(content: bytes, wanted: object, **limits: int) -> np.ndarray:
        entered.set()
        assert opened.wait(60)
        return np.zeros((1, 3, 4, 4), np.float32)

    monkeypatch.setattr("serving.http.pictures.decode_image", decode_image)
    application = application_of(Fixed())

    async def main() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(application), base_url="http://server") as client:
            async with application.running():
                waiting = [asyncio.create_task(client.post("/classify", content=png())) for _ in range(5)]
                while not entered.is_set():
                    await asyncio.sleep(0.001)
            for task in waiting:
                assert (await task).status_code == 503

    try:
        asyncio.run(main())
        assert not opened.is_set()
        assert application.stuck  # so the process does not wait for the interpreter, which waits for the threads
    finally:
        opened.set()
    for thread in threading.enumerate():
        if thread.name.startswith("decode"):
            thread.join(10)
    assert not application.stuck


def test_a_file_that_takes_longer_to_decode_than_its_request_has_is_answered_with_504(
    application_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = threading.Event()

    def decode_image(content: bytes, wanted: object, **limits: int) -> np.ndarray:
        assert opened.wait(10)
        return np.zeros((1, 3, 4, 4), np.float32)

    async def body(client: httpx.AsyncClient) -> None:
        answer = await client.post("/classify?timeout=20000", content=png())
        assert not opened.is_set()
        assert answer.status_code == 504
        assert "the request's own timeout is over" in answer.json()["error"]
        opened.set()
        assert (await client.post("/classify?timeout=5000000", content=png())).status_code == 200
        assert (await client.post("/classify?timeout=0", content=png())).status_code == 200

    monkeypatch.setattr("serving.http.pictures.decode_image", decode_image)
    application = application_of(Fixed())
    try:
        ask(application, body)
    finally:
        opened.set()
    assert application.budget.held == 0
    assert b'reason="deadline"' in application.metrics.text()


def test_the_time_that_decoding_took_is_no_longer_there_in_the_queue(
    application_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    application, left = application_of(Fixed()), []

    def decode_image(content: bytes, wanted: object, **limits: int) -> np.ndarray:
        time.sleep(0.1)
        return np.zeros((1, 3, 4, 4), np.float32)

    async def predict(served: Any, images: np.ndarray, asked: Asked, timings: object) -> Prediction:
        left.append(asked.timeout)
        return served.model.predictor.predict(images)

    async def body(client: httpx.AsyncClient) -> None:
        for query in ("?timeout=60000000", ""):
            assert (await client.post(f"/classify{query}", content=png())).status_code == 200

    monkeypatch.setattr("serving.http.pictures.decode_image", decode_image)
    monkeypatch.setattr(application.service, "predict", predict)
    ask(application, body)
    assert 0 < left[0] <= 59.9
    assert left[1] is None


def test_a_file_that_nobody_waits_for_any_more_is_not_held_until_a_thread_is_free(
    card, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, opened = threading.Event(), threading.Event()

    class File(bytearray):
        """Which, unlike bytes, tells whether somebody holds it."""

    def decode_image(content: bytes, wanted: object, **limits: int) -> np.ndarray:
        entered.set()
        assert opened.wait(10)
        return np.zeros((1, 3, 4, 4), np.float32)

    async def main() -> None:
        decoders = Decoders(1000, threads=1)
        first = asyncio.create_task(decoders.decode(File(), card.input))  # type: ignore[arg-type]
        await asyncio.to_thread(entered.wait, 10)
        file = File()
        gone = weakref.ref(file)
        waiting = asyncio.create_task(decoders.decode(file, card.input))  # type: ignore[arg-type]
        del file
        await asyncio.sleep(0)
        assert gone() is not None
        waiting.cancel()
        await asyncio.wait([waiting])
        del waiting
        assert gone() is None
        opened.set()
        await first
        decoders.stop()

    monkeypatch.setattr("serving.http.pictures.decode_image", decode_image)
    asyncio.run(main())


def test_an_oversized_body_is_refused_whether_announced_or_not(application_of) -> None:
    async def chunks() -> Any:
        for _ in range(20):
            yield b"x" * 100

    async def body(client: httpx.AsyncClient) -> None:
        for path in ("/v2/models/tiny/infer", "/classify"):
            for content in (b"x" * 1001, chunks()):
                answer = await client.post(path, content=content)
                assert answer.status_code == 413
                assert "expected at most 1000" in answer.json()["error"]

    ask(application_of(Fixed(), max_body_bytes=1000), body)


@pytest.mark.parametrize("path", ["index", "models/tiny/load", "models/tiny/unload"])
def test_a_few_words_of_json_may_be_no_megabytes_because_they_are_parsed_beside_everything_else(
    tiny_application, path: str
) -> None:
    async def chunks(content: bytes) -> Any:
        for start in range(0, len(content), 10_000):
            yield content[start : start + 10_000]

    async def body(client: httpx.AsyncClient) -> None:
        largest = b"{" + b" " * (2**16 - 2) + b"}"
        for content in (largest + b" ", chunks(largest + b" ")):
            answer = await client.post(f"/v2/repository/{path}", content=content)
            assert answer.status_code == 413
            assert "expected at most 65536; send a few words of JSON, or nothing" in answer.json()["error"]
        for content in (largest, chunks(largest)):
            assert (await client.post("/v2/repository/models/tiny/load", content=content)).status_code == 200

    ask(tiny_application("single", allow_repository_changes=True), body)


def test_a_body_that_never_ends_is_given_up(application_of) -> None:
    async def main() -> None:
        application = application_of(Fixed(), body_timeout=0.05)
        sent: list[dict] = []
        started = False

        async def receive() -> dict:
            nonlocal started
            if started:
                await asyncio.Event().wait()
            started = True
            return {"type": "http.request", "body": b"{", "more_body": True}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v2/models/tiny/infer", "headers": []}
        async with application.running():
            await application(scope, receive, send)
        assert sent[0]["status"] == 408
        assert b"only 1 bytes came" in sent[1]["body"]

    asyncio.run(main())


def test_a_client_that_hangs_up_early_is_not_answered(application_of) -> None:
    async def main() -> None:
        application = application_of(Fixed())
        messages = iter([{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}])
        sent: list[Any] = []

        async def receive() -> dict:
            return next(messages)

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v2/models/tiny/infer", "headers": []}
        async with application.running():
            await application(scope, receive, send)
        assert sent == []
        assert next(messages, None) is None, "the request was read to its end"

    asyncio.run(main())


@pytest.mark.parametrize(
    ("method", "path", "status", "said"),
    [
        ("POST", "/v2/models/tinny/infer", 404, "unknown model 'tinny'; did you mean 'tiny'? (known: tiny)"),
        ("GET", "/v2/models/other", 404, "known: tiny"),
        ("GET", "/v2/models/other/ready", 404, "known: tiny"),
        ("GET", "/v2/models/..%2f..%2fetc%2fpasswd", 404, "no such path"),
        ("GET", "/v2/models/tiny/versions/2", 404, "no version '2', only '1'"),
        ("POST", "/v2/models/tiny/versions/2/infer", 404, "no version '2', only '1'"),
        ("GET", "/nowhere", 404, "no such path '/nowhere'"),
        ("GET", "/v2/models/tiny/infer", 405, "GET is not offered"),
        ("GET", "/classify", 405, "GET is not offered"),
        ("GET", "/v2/", 404, "no such path '/v2/'"),
        ("GET", "/v2/models/tiny/", 404, "no such path '/v2/models/tiny/'"),
        ("POST", "/v2/models/tiny/infer/", 404, "no such path '/v2/models/tiny/infer/'"),
    ],
)
def test_a_wrong_address_is_answered_with_the_known_ones(application_of, method, path, status, said) -> None:
    async def body(client: httpx.AsyncClient) -> None:
        answer = await client.request(method, path)
        assert answer.status_code == status
        assert said in answer.json()["error"]

    ask(application_of(Fixed()), body)


def test_only_the_demo_which_is_below_its_path_is_found_without_the_last_slash(application_of) -> None:
    async def body(client: httpx.AsyncClient) -> None:
        answer = await client.get("/demo?__theme=dark")
        assert (answer.status_code, answer.headers["location"]) == (307, "http://server/demo/?__theme=dark")

    ask(application_of(Fixed(), demo=True), body)


def test_a_full_queue_answers_429_and_says_when_to_try_again(application_of) -> None:
    gate = Gate()

    async def body(client: httpx.AsyncClient) -> None:
        first = asyncio.create_task(client.post("/v2/models/tiny/infer", json=infer_document()))
        await asyncio.sleep(0.05)
        waiting = asyncio.create_task(client.post("/v2/models/tiny/infer", json=infer_document(rows=2)))
        await asyncio.sleep(0.05)
        refused = await client.post("/v2/models/tiny/infer", json=infer_document())
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        assert "the queue is full (2 images)" in refused.json()["error"]
        gate.opened.set()
        assert (await first).status_code == 200
        assert (await waiting).status_code == 200

    ask(application_of(gate, threads=1, max_queue=2), body)


def test_a_failing_model_answers_500_without_its_details(application_of, caplog: pytest.LogCaptureFixture) -> None:
    async def body(client: httpx.AsyncClient) -> None:
        for send in (
            {"url": "/v2/models/tiny/infer", "json": infer_document()},
            {"url": "/classify", "content": png()},
        ):
            answer = await client.post(**send)
            assert answer.status_code == 500
            assert "secret" not in answer.text
        failures = (await client.get("/metrics")).text
        assert 'manygates_request_failures_total{model="tiny",reason="model_failed"} 2.0' in failures

    with caplog.at_level(logging.ERROR, logger="manygates.serving"):
        ask(application_of(Broken()), body)
    assert "secret detail" in caplog.text


def test_errors_that_the_router_answers_and_defects_are_counted(
    application_of, monkeypatch: pytest.MonkeyPatch
) -> None:
    def defective(*_: object, **__: object) -> None:
        raise KeyError("a defect of ours")

    monkeypatch.setattr("serving.http.pictures.decode_image", defective)
    application = application_of(Fixed())
    monkeypatch.setattr(application.service.find("tiny").codec, "metadata", defective)
    monkeypatch.setattr(application.service.find("tiny").codec, "encode", defective)

    async def main() -> None:
        transport = httpx.ASGITransport(application, raise_app_exceptions=False)
        async with application.running(), httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            assert (await client.get("/nowhere")).status_code == 404
            assert (await client.get("/classify")).status_code == 405
            assert (await client.post("/classify", content=png())).status_code == 500
            assert (await client.get("/v2/models/tiny")).status_code == 500
            assert (await client.post("/v2/models/tiny/infer", json=infer_document())).status_code == 500
            text = (await client.get("/metrics")).text
        for model, reason, times in (
            ("", "not_found", 1),
            ("", "method_not_allowed", 1),
            ("tiny", "defect", 3),
        ):
            assert f'manygates_request_failures_total{{model="{model}",reason="{reason}"}} {times}.0' in text

    asyncio.run(main())


def test_before_its_start_and_while_draining_the_server_says_503(application_of) -> None:
    async def unready(client: httpx.AsyncClient) -> None:
        for answer in (
            await client.post("/v2/models/tiny/infer", json=infer_document()),
            await client.post("/classify", content=png()),
            await client.get("/v2/health/ready"),
            await client.get("/v2/models/tiny/ready"),
        ):
            assert answer.status_code == 503
            assert answer.headers["retry-after"] == "1"
        assert (await client.get("/v2/health/live")).status_code == 200

    ask(application_of(Fixed()), unready, start=False)

    application = application_of(Fixed())

    async def draining(client: httpx.AsyncClient) -> None:
        application.service.begin_drain()
        assert (await client.get("/v2/health/ready")).status_code == 503
        # requests that are still sent here are answered until the server really stops
        assert (await client.post("/v2/models/tiny/infer", json=infer_document())).status_code == 200

    ask(application, draining)
    ask(application, unready, start=False)


def test_the_metrics_count_requests_images_batches_failures_and_draws(tiny_application) -> None:
    async def body(client: httpx.AsyncClient) -> None:
        for rows in (1, 3):
            await client.post("/v2/models/tiny/infer", json=infer_document(rows=rows))
        await client.post("/v2/models/tiny/infer", json=infer_document(2.0))
        await client.post("/classify", content=png())
        await client.get("/v2/models/none")
        answer = await client.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain")
        model, random = 'model="tiny",version="1"', 'mode="random",model="tiny",version="1"'
        for line in (
            f'manygates_requests_total{{endpoint="infer",{random}}} 2.0',
            f'manygates_requests_total{{endpoint="classify",{random}}} 1.0',
            'manygates_request_failures_total{model="tiny",reason="bad_request"} 1.0',
            'manygates_request_failures_total{model="",reason="unknown_model"} 1.0',
            f"manygates_images_total{{{random}}} 5.0",
            f"manygates_path_draws_total{{{model}}} 5.0",
            f"manygates_queue_images{{{model}}} 0.0",
            f"manygates_model_ready{{{model}}} 1.0",
            f"manygates_request_seconds_count{{{model}}} 3.0",
            f"manygates_queue_seconds_count{{{model}}} 3.0",
            f"manygates_batch_images_sum{{{random}}} 5.0",
        ):
            assert line in answer.text
        assert "process_resident_memory_bytes" in answer.text

    ask(tiny_application("random"), body)


def test_random_answers_differ_between_identical_requests_and_never_show_their_gates(tiny_application) -> None:
    async def body(client: httpx.AsyncClient) -> None:
        answers = [await client.post("/v2/models/tiny/infer", json=infer_document()) for _ in range(40)]
        assert len({answer.text for answer in answers}) > 1
        for answer in answers:
            assert answer.json().keys() == {"model_name", "model_version", "outputs"}
            assert {output["name"] for output in answer.json()["outputs"]} == {"probabilities", "logits"}
            assert "gate" not in answer.text
            assert not any("gate" in name for name in answer.headers)
        classified = (await client.post("/classify", content=png())).json()
        assert classified.keys() == {"model", "mode", "label", "probabilities"}
        chosen = infer_document(parameters={"gates": [0, 0], "gate_seed": 1})
        assert len({(await client.post("/v2/models/tiny/infer", json=chosen)).text for _ in range(40)}) > 1

    ask(tiny_application("random"), body)


def test_random_requests_leave_no_gates_in_the_log(tiny_application, caplog: pytest.LogCaptureFixture) -> None:
    async def body(client: httpx.AsyncClient) -> None:
        await client.post("/v2/models/tiny/infer", json=infer_document())

    application = tiny_application("random")
    with caplog.at_level(logging.DEBUG, logger="manygates"):
        ask(application, body)
    assert caplog.text == ""


def test_a_failing_random_batch_leaves_no_gates_in_the_log_either(
    bundle_dir: Path,
    card,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def cannot(*_: object, **__: object) -> None:
        raise gate_compiler.CannotCompileError("not today")

    # gates beyond the candidates: with the portable form ONNX Runtime fails, and says which
    monkeypatch.setattr(gate_compiler, "compile_gates", cannot)
    gates = np.array([[1, 7_654_321]])
    engine = Engine(Bundle.open(bundle_dir), "random", gate_source=lambda num_images: gates)
    application = Application([Model(card=card, mode="random", predictor=engine)])

    async def body(client: httpx.AsyncClient) -> None:
        answer = await client.post("/v2/models/tiny/infer", json=infer_document())
        assert answer.status_code == 500
        assert "7654321" not in answer.text + (await client.get("/metrics")).text

    with caplog.at_level(logging.DEBUG):
        ask(application, body)
    logged = caplog.text + "".join(capfd.readouterr())
    assert "the gated graph failed" in logged
    assert "out of data bounds, idx=#" in logged
    assert "7654321" not in logged


def test_several_models_are_served_side_by_side(card) -> None:
    class Other(Fixed):
        def predict(self, images: np.ndarray, *_: Any, **__: Any) -> Prediction:
            answer = super().predict(images)
            return Prediction(answer.probabilities[:, ::-1].copy(), answer.logits)

    other = replace(card, name="other", classes=("x", "y", "z"))
    application = Application(
        [Model(card=card, mode="single", predictor=Fixed()), Model(card=other, mode="ensemble", predictor=Other())]
    )

    async def body(client: httpx.AsyncClient) -> None:
        assert (await client.post("/classify", content=png())).json()["model"] == "tiny"
        answer = (await client.post("/classify?model=other", content=png())).json()
        assert (answer["mode"], answer["label"]) == ("ensemble", "y")
        for name, first in (("tiny", 0.125), ("other", 0.25)):
            document = (await client.post(f"/v2/models/{name}/infer", json=infer_document())).json()
            assert (document["model_name"], document["outputs"][0]["data"][0]) == (name, first)

    ask(application, body)


def test_no_model_or_the_same_twice_is_refused(card) -> None:
    model = Model(card=card, mode="single", predictor=Fixed())
    with pytest.raises(BadInput, match="'tiny' is to be served twice"):
        Application([model, model])
    with pytest.raises(BadInput, match="no model to serve"):
        Application([])


def test_concurrent_http_requests_each_get_their_own_answer(tiny_application) -> None:
    rng = np.random.default_rng(0)
    images = rng.random((60, 3, 4, 4), dtype=np.float32)

    async def body(client: httpx.AsyncClient) -> None:
        whole = json.loads((await client.post("/v2/models/tiny/infer", content=document(images))).text)
        expected = np.array(whole["outputs"][0]["data"]).reshape(60, 3)
        answers = await asyncio.gather(
            *(client.post("/v2/models/tiny/infer", content=document(images[row : row + 1])) for row in range(60))
        )
        for row, answer in enumerate(answers):
            assert answer.json()["outputs"][0]["data"] == pytest.approx(expected[row], abs=1e-5)

    def document(rows: np.ndarray) -> bytes:
        tensor = {"name": "images", "shape": list(rows.shape), "datatype": "FP32", "data": rows.ravel().tolist()}
        return json.dumps({"inputs": [tensor]}).encode()

    ask(tiny_application("single"), body)


def test_classify_tells_how_far_the_votes_agree_and_lets_the_url_choose_where_that_is_allowed(tiny_application) -> None:
    async def body(client: httpx.AsyncClient) -> None:
        voted = (await client.post("/classify", content=png())).json()
        assert list(voted) == ["model", "mode", "agreement", "label", "probabilities"]
        assert voted["mode"] == "random"
        assert voted["agreement"] * 8 == int(voted["agreement"] * 8), "a share of eight draws"
        alone = (await client.post("/classify?mode=single", content=png())).json()
        assert list(alone) == ["model", "mode", "label", "probabilities"]
        assert alone["mode"] == "single"
        assert "agreement" not in (await client.post("/classify?draws=1", content=png())).json()
        for query, said in (
            ("mode=fast", "mode is 'fast', expected one of random, single, ensemble"),
            ("draws=x", "draws is 'x', expected a whole number"),
            ("draws=65", "draws is 65, expected a whole number from 1 to 64"),
            ("mode=single&draws=2", "draws no paths"),
            ("timeout=-1", "timeout is '-1', expected a whole number"),
            ("priority=3", "priority is 3, expected"),
        ):
            refused = await client.post(f"/classify?{query}", content=png())
            assert (refused.status_code, said in refused.json()["error"]) == (400, True), refused.text
        document = infer_document(outputs=[{"name": "agreement"}])
        (agreement,) = (await client.post("/v2/models/tiny/infer", json=document)).json()["outputs"]
        assert agreement["data"][0] * 8 == int(agreement["data"][0] * 8), "a share of eight draws"

    ask(tiny_application("random", draws=8, allow_mode_choice=True), body)


@pytest.mark.parametrize("query", ["mode=single", "draws=2"])
def test_classify_refuses_a_choice_of_mode_that_the_operator_did_not_allow(tiny_application, query: str) -> None:
    async def body(client: httpx.AsyncClient) -> None:
        refused = await client.post(f"/classify?{query}", content=png())
        assert refused.status_code == 400
        assert "MANYGATES_SERVE_ALLOW_MODE_CHOICE=true" in refused.json()["error"]

    ask(tiny_application("random", draws=4), body)
