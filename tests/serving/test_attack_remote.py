"""Attacks on a server over HTTP: what is sent is counted, rounded to 8 bits, and classified as the attack says."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import numpy as np
import onnxruntime
import pytest

torch = pytest.importorskip("torch", reason="attacks need torch, which the server does without")

from zoo.attacks import LinfBudget, to_grid  # noqa: E402
from zoo.attacks.rays import rays  # noqa: E402
from zoo.attacks.remote import RemoteModel, eight_bit  # noqa: E402
from zoo.attacks.square import square  # noqa: E402
from zoo.errors import BadInput, ManygatesError, UnknownName  # noqa: E402

pytestmark = pytest.mark.integration  # its fixtures start servers in ways that the code does not show

SHAPE = (3, 4, 4)


@pytest.fixture
def levels() -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (20, *SHAPE), np.uint8)


@pytest.fixture
def images(levels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(levels).float() / 255


@pytest.fixture
def server(tiny_application, serve_in_a_thread) -> Iterator[str]:
    with serve_in_a_thread(tiny_application("single")) as url:
        yield url


@pytest.fixture
def local_logits(bundle_dir) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what the served graph answers, without a server."""
    session = onnxruntime.InferenceSession(bundle_dir / "single.onnx", providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def answered_images(url: str) -> int:
    """Return how many images the server says it has answered."""
    found = re.findall(
        r'^manygates_images_total\{.*model="tiny".*\} (\S+)$', httpx.get(f"{url}/metrics").text, re.MULTILINE
    )
    assert len(found) == 1
    return int(float(found[0]))


def test_a_remote_model_gives_the_served_logits_of_the_rounded_images(server: str, local_logits, levels) -> None:
    exact = torch.from_numpy(levels).float() / 255
    off_grid = (exact + 0.4 / 255).clamp(0, 1)
    with RemoteModel(server, "tiny", keep_ledger=True) as remote:
        torch.testing.assert_close(remote(off_grid), local_logits(exact), rtol=0, atol=1e-6)
        assert remote.image_shape == SHAPE
        assert remote.num_classes == 3
        assert remote(exact[:0]).shape == (0, 3)
        assert remote(exact.double()).dtype == torch.float32
        assert np.array_equal(remote.ledger[0].levels.numpy(), levels)


def test_the_transport_counts_what_the_server_counts(server: str, images: torch.Tensor) -> None:
    with RemoteModel(server, "tiny", max_images=8, keep_ledger=True) as remote:
        remote(images)
        remote(images[:3])
        assert (remote.queries, remote.requests) == (23, 4)
        assert [len(exchange.levels) for exchange in remote.ledger] == [8, 8, 4, 3]
        assert answered_images(server) == 23


def test_labels_alone_hide_the_scores_and_do_not_pass_for_probabilities(
    server: str, local_logits, images: torch.Tensor
) -> None:
    with RemoteModel(server, "tiny", labels_only=True) as remote:
        scores = remote(images)
    assert set(scores.unique().tolist()) == {-1.0, 0.0}
    assert torch.equal(scores.argmax(1), local_logits(images).argmax(1))


def test_square_over_http_breaks_images_that_the_server_then_answers_wrongly_as_bytes(
    server: str, images: torch.Tensor
) -> None:
    wanted = LinfBudget(eps=0.21)  # 53.55/255: not a whole number of steps
    queries = 40
    with RemoteModel(server, "tiny", keep_ledger=True) as remote:
        labels = remote(images).argmax(1)
        clean, budget = eight_bit(images, wanted)
        before = remote.queries, remote.requests
        found = square(remote, clean, labels, budget, queries=queries, generator=generator())
        adversarial = to_grid(found, clean, budget.eps)
        asked, requests = remote.queries - before[0], remote.requests - before[1]
        assert answered_images(server) == remote.queries
        claimed = {exchange.levels[row].numpy().tobytes(): int(exchange.scores[row].argmax())
                   for exchange in remote.ledger for row in range(len(exchange.levels))}  # fmt: skip
    assert requests <= queries
    assert asked < queries * len(images), "no image was broken, or broken images were asked about further"

    assert float((adversarial - images).abs().max()) <= 53 / 255 + 1e-6
    payload = (adversarial * 255).round().to(torch.uint8).numpy()
    tensor = {"name": "images", "shape": list(payload.shape), "datatype": "UINT8", "data": payload.ravel().tolist()}
    answer = httpx.post(f"{server}/v2/models/tiny/infer", json={"inputs": [tensor], "outputs": [{"name": "logits"}]})
    answered = np.array(answer.json()["outputs"][0]["data"]).reshape(-1, 3).argmax(1)
    broken = answered != labels.numpy()
    assert broken.sum() > 0
    for row in range(len(images)):
        if broken[row]:
            assert claimed[payload[row].tobytes()] == answered[row], "the attack never saw this image broken"


def test_square_over_http_is_square_on_the_rounding_model(server: str, local_logits, images: torch.Tensor) -> None:
    labels = local_logits(images).argmax(1)
    clean, budget = eight_bit(images, LinfBudget(eps=8 / 255))

    def rounding(pixels: torch.Tensor) -> torch.Tensor:
        return local_logits((pixels * 255).round() / 255)

    with RemoteModel(server, "tiny") as remote:
        served = square(remote, clean, labels, budget, queries=30, generator=generator())
    local = square(rounding, clean, labels, budget, queries=30, generator=generator())
    assert torch.equal(served, local)


def test_rays_needs_only_the_labels_of_a_server(server: str, local_logits, images: torch.Tensor) -> None:
    labels = local_logits(images).argmax(1)
    clean, budget = eight_bit(images, LinfBudget(eps=64 / 255))
    with RemoteModel(server, "tiny", labels_only=True) as remote:
        found = rays(remote, clean, labels, budget, queries=400)
        assert remote.queries <= 400 * len(images)
    adversarial = to_grid(found, clean, budget.eps)
    assert float((adversarial - images).abs().max()) <= 64 / 255 + 1e-6
    assert (local_logits(adversarial).argmax(1) != labels).float().mean() > 0.5


@pytest.mark.parametrize("eps", [1 / 255, 0.031, 0.1, 8 / 255, 1.0])
def test_in_eight_bits_rounding_leaves_no_ball(images: torch.Tensor, eps: float) -> None:
    clean, budget = eight_bit((images + 0.3 / 255).clamp(0, 1), LinfBudget(eps=eps))
    assert torch.equal(clean, (clean * 255).round() / 255)
    assert eps - 1 / 255 < budget.eps <= eps + 1e-9
    tried = budget.start(clean, generator())
    rounded = (tried * 255).round() / 255
    assert torch.equal(rounded, to_grid(tried, clean, budget.eps))
    assert float((rounded - clean).abs().max()) <= eps + 1e-6


def test_a_ball_without_another_eight_bit_image_is_refused(images: torch.Tensor) -> None:
    with pytest.raises(BadInput, match=r"less than 1/255"):
        eight_bit(images, LinfBudget(eps=0.003))
    assert eight_bit(images, LinfBudget(eps=0))[1].eps == 0


# --- limits of a server ---


def test_a_server_that_takes_few_images_gets_few(tiny_application, serve_in_a_thread, local_logits, images) -> None:
    with serve_in_a_thread(tiny_application("single", max_queue=8)) as url, RemoteModel(url, "tiny") as remote:
        torch.testing.assert_close(remote(images), local_logits(images), rtol=0, atol=1e-6)
        assert remote.queries == 20
        remote.requests = 0
        remote(images)
        assert remote.requests == 4  # of five images; nothing is refused again


def test_a_server_that_takes_small_bodies_gets_small_ones(
    tiny_application, serve_in_a_thread, local_logits, images
) -> None:
    with serve_in_a_thread(tiny_application("single", max_body_bytes=600)) as url, RemoteModel(url, "tiny") as remote:
        torch.testing.assert_close(remote(images), local_logits(images), rtol=0, atol=1e-6)


def test_a_connection_that_was_closed_meanwhile_is_opened_again(
    tiny_application, serve_in_a_thread, local_logits, images
) -> None:
    with (
        serve_in_a_thread(tiny_application("single", keep_alive_timeout=0.1)) as url,
        RemoteModel(url, "tiny") as remote,
    ):
        remote(images)
        time.sleep(0.5)
        torch.testing.assert_close(remote(images), local_logits(images), rtol=0, atol=1e-6)
        remote.close()
        assert len(remote(images[:2])) == 2


def test_random_gates_answer_a_remote_model_anew_each_time(tiny_application, serve_in_a_thread, images) -> None:
    with serve_in_a_thread(tiny_application("random")) as url, RemoteModel(url, "tiny") as remote:
        answers = torch.stack([remote(images) for _ in range(4)])
        assert float((answers - answers[0]).abs().max()) > 0.5
        labels = answers.mean(0).argmax(1)
        clean, budget = eight_bit(images, LinfBudget(eps=16 / 255))
        before = remote.queries
        square(remote, clean, labels, budget, queries=10, draws=2, generator=generator())
        assert 8 * 2 * 20 <= remote.queries - before <= 10 * 2 * 20


# --- what is refused ---


@pytest.mark.parametrize(
    "url", ["http://example.org:8000", "http://10.0.0.1", "https://localhost.example.org", "http://0.0.0.0:8000"]
)
def test_another_machine_is_refused_without_being_asked(url: str) -> None:
    with pytest.raises(BadInput, match=r"is not this machine.*allow_remote=True"):
        RemoteModel(url, "tiny")


@pytest.mark.parametrize(
    "url",
    ["", "127.0.0.1:8000", "ftp://127.0.0.1", "http://", "http://127.0.0.1:port", "http://me@127.0.0.1:8000",
     "http://127.0.0.1:8000/v2", "http://[::1"],
)  # fmt: skip
def test_what_is_no_url_of_a_server_is_refused(url: str) -> None:
    with pytest.raises(BadInput, match=r"http://127\.0\.0\.1:8000"):
        RemoteModel(url, "tiny")


def test_an_unknown_model_is_refused_with_those_there_are(server: str) -> None:
    with pytest.raises(UnknownName, match=r"'tinny'; did you mean 'tiny'\?"):
        RemoteModel(server, "tinny")


def test_images_that_the_server_would_refuse_are_not_sent(server: str, images: torch.Tensor) -> None:
    with RemoteModel(server, "tiny") as remote:
        with pytest.raises(BadInput, match=r"\(3, 4, 4\)"):
            remote(images[:, :, :3])
        with pytest.raises(BadInput, match="pixels must be in"):
            remote(images * 255)
        with pytest.raises(BadInput, match="no gradient"):
            remote(images.clone().requires_grad_(True))
        assert remote.requests == 0


def test_a_server_that_is_not_there_is_named() -> None:
    with scripted([]) as url:
        pass
    with pytest.raises(ManygatesError, match=rf"{url} cannot be reached.*see whether the server runs"):
        RemoteModel(url, "tiny")


# --- servers that misbehave ---

METADATA = {
    "name": "tiny",
    "inputs": [{"name": "images", "datatype": "FP32", "shape": [-1, *SHAPE]}],
    "outputs": [{"name": "probabilities", "datatype": "FP32", "shape": [-1, 3]}],
}
Reply = tuple[int, dict[str, str], object]
"""Status, headers, body; a body that is a number of seconds is one that takes so long and never comes."""


def answer(rows: int, values: tuple[float, ...] = (0.7, 0.2, 0.1)) -> Reply:
    output = {"name": "probabilities", "datatype": "FP32", "shape": [rows, 3], "data": list(values) * rows}
    return 200, {}, {"outputs": [output]}


@contextmanager
def scripted(replies: list[Reply], metadata: object = METADATA) -> Iterator[str]:
    """Serve these answers, one after the other, the metadata before them."""
    script = iter([(200, {}, metadata), *replies])

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def reply(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, headers, body = next(script)
            if isinstance(body, float):
                time.sleep(body)
                self.close_connection = True
                return
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = reply

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the waits asked for, none of which takes place."""
    waits: list[float] = []
    monkeypatch.setattr("zoo.attacks.remote.time.sleep", waits.append)
    return waits


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again_when_it_says(status: int, waits: list[float], images: torch.Tensor) -> None:
    busy = (status, {"Retry-After": "2"}, {"error": "the queue is full"})
    with scripted([busy, busy, answer(1)]) as url, RemoteModel(url, "tiny") as remote:
        scores = remote(images[:1])
        assert (remote.queries, remote.requests) == (1, 3)
    assert waits == [2.0, 2.0]
    assert scores.exp().tolist()[0] == pytest.approx([0.7, 0.2, 0.1])


def test_a_busy_server_that_does_not_say_when_is_asked_ever_more_rarely_and_not_for_ever(
    waits: list[float], images: torch.Tensor
) -> None:
    with scripted([(503, {}, {"error": "draining"})] * 20) as url, RemoteModel(url, "tiny") as remote:
        with pytest.raises(ManygatesError, match=r"too busy: 503 to 9 attempts.*draining"):
            remote(images)
        assert remote.queries == 0
    assert waits == [0.1 * 2**attempt for attempt in range(8)]


def test_a_server_that_asks_for_too_long_a_wait_is_given_up(waits: list[float], images: torch.Tensor) -> None:
    with (
        scripted([(429, {"Retry-After": "3600"}, b"")]) as url,
        RemoteModel(url, "tiny") as remote,
        pytest.raises(ManygatesError, match=r"due after 3600 s \(no reason given\)"),
    ):
        remote(images)
    assert waits == []


def test_a_server_without_a_sign_of_life_is_given_up_after_the_timeout(images: torch.Tensor) -> None:
    with scripted([(200, {}, 0.4)]) as url, RemoteModel(url, "tiny", timeout=0.1) as remote:
        with pytest.raises(ManygatesError, match=r"did not answer within 0\.1 s"):
            remote(images)
        assert (remote.queries, remote.requests) == (0, 1)


def test_a_server_that_breaks_off_twice_is_given_up(images: torch.Tensor) -> None:
    with scripted([(200, {}, 0.0), (200, {}, 0.0)]) as url, RemoteModel(url, "tiny") as remote:
        with pytest.raises(ManygatesError, match="broke off"):
            remote(images)
        assert (remote.queries, remote.requests) == (0, 2)  # the first was on a connection that might have been stale


@pytest.mark.parametrize(
    ("reply", "complaint"),
    [
        ((500, {}, {"error": "the model failed"}), "answered 500: the model failed"),
        ((400, {}, b"<html>  no\n such  thing"), "answered 400: <html> no such thing"),
        ((302, {"Location": "http://example.org/"}, b""), "answered 302: no reason given"),
        ((200, {}, b"hello"), "answered something else"),
        ((200, {}, {"outputs": []}), "answered something else"),
        ((200, {"Inference-Header-Content-Length": "many"}, {"outputs": []}), "answered something else"),
        (answer(2), "probabilities of 1 images and 3 classes"),
        (answer(1, (0.5, float("nan"), 0.5)), "answered NaN"),
        ((413, {}, {"error": "too large"}), "answered 413: too large"),
    ],
)
def test_an_answer_that_is_none_is_told_in_one_line(reply: Reply, complaint: str, images: torch.Tensor) -> None:
    with scripted([reply]) as url, RemoteModel(url, "tiny") as remote:
        with pytest.raises(ManygatesError, match=re.escape(complaint)) as caught:
            remote(images[:1])
        assert "\n" not in str(caught.value)
        assert remote.queries == 0


@pytest.mark.parametrize(
    "metadata", [{}, [], {"inputs": 1, "outputs": []}, {**METADATA, "inputs": []}, {**METADATA, "outputs": []}]
)
def test_a_server_of_something_else_is_refused(metadata: object) -> None:
    with scripted([], metadata) as url, pytest.raises(ManygatesError, match="manygates serve"):
        RemoteModel(url, "tiny")


@pytest.mark.parametrize("options", [{"max_images": 0}, {"timeout": 0.0}, {"timeout": float("inf")}])
def test_limits_that_make_no_sense_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(BadInput, match="max_images"):
        RemoteModel("http://127.0.0.1:1", "tiny", **options)
