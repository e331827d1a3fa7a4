"""The page as a program sees it, through gradio_client."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the demo needs torch")
pytest.importorskip("gradio", reason="the demo needs gradio")

import httpx
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

from serving.demo.page import launch
from serving.demo.words import TITLE
from serving.listener import bind
from zoo.errors import BadInput

# gradio's queue uses what pandas 3 is about to drop
pytestmark = pytest.mark.filterwarnings("ignore::pandas.errors.Pandas4Warning")

PLAIN, GATED = "plain/single", "gates/gated"
SIDE = ("clean", "adversarial", "change", "clean_answer", "adversarial_answer", "summary", "scale", "details", "file")


@pytest.fixture(scope="module")
def server(models: list[str], serve_page: Callable[[Sequence[str]], AbstractContextManager[str]]) -> Iterator[str]:
    with serve_page(models) as url:
        yield url


@pytest.fixture(scope="module")
def client(server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    opened = Client(f"{server}/demo/", verbose=False, download_files=tmp_path_factory.mktemp("client"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def image_file(image_png: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("images") / "picture.png"
    file.write_bytes(image_png)
    return file


def ask(client: Client, image: Any, **settings: Any) -> list[Any]:
    defaults = {"label": "automatic", "model_a": PLAIN, "model_b": GATED, "steps": 1, "eps_levels": 8}
    return list(client.predict(image=image, api_name="/attack", **{**defaults, **settings}))


def pixels(file: str | Path) -> np.ndarray:
    with Image.open(file) as image:
        assert image.format == "PNG"
        return np.asarray(image).astype(int)


def test_the_endpoint_is_typed(client: Client) -> None:
    endpoints = client.view_api(return_format="dict", print_info=False)["named_endpoints"]

    assert list(endpoints) == ["/attack"]
    parameters = {entry["parameter_name"]: entry for entry in endpoints["/attack"]["parameters"]}
    assert list(parameters) == [
        *("image", "label", "model_a", "model_b", "method", "crafted"),
        *("eps_levels", "steps", "restarts", "seed", "amplification"),
    ]
    assert parameters["method"]["type"]["enum"] == ["PGD", "FGSM"]
    assert parameters["eps_levels"]["type"]["type"] == "number"


def test_the_application_around_the_page_still_answers(server: str) -> None:
    assert httpx.get(server).text == "the index"
    assert httpx.get(f"{server}/demo/").status_code == 200


def test_an_attack_returns_pictures_answers_texts_and_a_report(client: Client, image_file: Path) -> None:
    answer = ask(client, handle_file(image_file), eps_levels=6, amplification=10)

    report, status = answer[-2:]
    assert len(answer) == 2 * len(SIDE) + 2
    for letter, values in (("a", answer[: len(SIDE)]), ("b", answer[len(SIDE) : -2])):
        side = dict(zip(SIDE, values, strict=True))
        difference = pixels(side["adversarial"]) - pixels(side["clean"])
        assert 0 < np.abs(difference).max() == report[letter]["measured_linf_levels"] <= 6
        assert (pixels(side["change"]) == (128 + 10 * difference)).all()
        assert (pixels(side["clean"]) == pixels(image_file)).all()
        assert (pixels(side["file"]) == pixels(side["adversarial"])).all()
        assert len(side["clean_answer"]["confidences"]) == 3
        assert "<dl>" in side["summary"]
        assert side["details"]
    assert report["attack"]["eps_levels"] == 6
    assert (report["b"]["model"], report["b"]["variant"]) == ("gates", "gated")
    assert "Model A" in status


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"label": None}, "true label"),
        ({"eps_levels": 33}, "32"),
        ({"steps": 51}, "50"),
        ({"seed": None}, "seed is None"),
        ({"model_a": "plain/gated"}, "not in the list of choices"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused_in_words(
    client: Client, image_file: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(AppError, match=message):
        ask(client, handle_file(image_file), **settings)


def test_a_file_that_is_no_image_is_refused_in_words(client: Client, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_bytes(b"<script>")

    with pytest.raises(AppError, match=re.escape(b"<script>".hex(" "))):
        ask(client, handle_file(tmp_path / "text.png"))


def test_no_image_is_refused_in_words(client: Client) -> None:
    with pytest.raises(AppError, match="no image"):
        ask(client, None)


def test_a_file_over_the_limit_is_refused(client: Client, tmp_path: Path) -> None:
    (tmp_path / "fat.png").write_bytes(bytes(9 * 2**20))

    with pytest.raises(ValueError, match="maximum file size"):
        ask(client, handle_file(tmp_path / "fat.png"))


def test_a_file_of_the_server_cannot_be_named_as_an_upload(server: str, image_file: Path) -> None:
    upload = {"path": str(image_file), "meta": {"_type": "gradio.FileData"}}
    data = [upload, "automatic", PLAIN, PLAIN, "FGSM", "own", 1, 1, 1, 0, 1]

    call = httpx.post(f"{server}/demo/gradio_api/call/attack", json={"data": data})
    answer = httpx.get(f"{server}/demo/gradio_api/call/attack/{call.json()['event_id']}")

    assert answer.text.startswith("event: error")
    assert "was not uploaded by a user" in answer.text


def test_the_queue_cannot_be_passed_by(server: str) -> None:
    assert httpx.post(f"{server}/demo/gradio_api/run/attack", json={"data": []}).status_code == 404


def test_a_port_in_use_is_refused_before_any_model_is_opened() -> None:
    with bind("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(BadInput, match=str(port)):
            launch(["no such model"], "127.0.0.1", port)


@pytest.mark.slow
def test_the_page_alone_serves_until_it_is_told_to_stop(models: list[str], tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    code = f"from serving.demo import page; page.launch({models[:1]!r}, '127.0.0.1', {port})"
    environment = {**os.environ, "GRADIO_TEMP_DIR": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stderr is not None
            for line in process.stderr:
                if line.startswith("attack demo on"):
                    break
            assert TITLE in page_of(f"http://127.0.0.1:{port}/")
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=15) == 0
        finally:
            process.kill()


def page_of(url: str) -> str:
    deadline = time.monotonic() + 20
    while True:
        try:
            return httpx.get(url).text
        except httpx.ConnectError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
