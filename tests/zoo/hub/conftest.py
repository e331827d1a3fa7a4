"""A hub in memory behind the client's own transport, a bundle to put on it, and the command line in this process."""

import contextlib
import importlib.util
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import constants, set_client_factory
from huggingface_hub.utils import close_session

import manygates
from zoo.bundle.bundle import Bundle, write_bundle
from zoo.bundle.card import Card

FILES = {
    "rgn.safetensors": b"weights",
    "single.onnx": b"one",
    "ensemble.onnx": b"many",
    "gated.onnx": b"all",
    "single.int8.onnx": b"i",
}


@dataclass
class Said:
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that a user error consists of."""
        assert self.code == 2, self
        assert self.err.splitlines()[-1].startswith("manygates: "), self.err
        assert "Traceback" not in self.err
        return self.err.splitlines()[-1]


@pytest.fixture(scope="session")
def fake_hub() -> ModuleType:
    """The module of a Hugging Face hub in memory: `FakeHub`, `Answer`, `serve`."""
    spec = importlib.util.spec_from_file_location("fake_hub", Path(__file__).with_name("fake_hub.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fake_hub"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def hub(fake_hub: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A hub behind the client's own transport: whatever host is asked, it answers, and no socket is opened."""
    hub = fake_hub.FakeHub()
    hub.url = "https://huggingface.co"

    def handle(request: httpx2.Request) -> httpx2.Response:
        headers = {key.lower(): value for key, value in request.headers.items()}
        answer = hub.answer(request.method, request.url.raw_path.decode(), headers, request.read())
        length = {"Content-Length": str(len(answer.body))}
        content = b"" if request.method == "HEAD" else answer.body
        return httpx2.Response(answer.status, content=content, headers=answer.headers | length)

    def no_socket(*_: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", no_socket)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("MANYGATES_CACHE", str(tmp_path / "manygates"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    hub.client = lambda: httpx2.Client(transport=httpx2.MockTransport(handle))
    set_client_factory(hub.client)
    yield hub
    set_client_factory(huggingface_hub.utils._http.default_client_factory)
    close_session()


@pytest.fixture
def offline(hub: Any) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Return a context as with HF_HUB_OFFLINE=1, which the client reads when it is imported."""

    @contextlib.contextmanager
    def without() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(constants, "HF_HUB_OFFLINE", True)
            set_client_factory(huggingface_hub.utils._http.default_client_factory)
            yield
        set_client_factory(hub.client)

    return without


@pytest.fixture
def cli(
    offline: Callable[[], contextlib.AbstractContextManager[None]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Callable[..., Said]:
    """Return a function that runs `manygates` in a folder of its own, in this process; keywords are its environment."""
    monkeypatch.chdir(tmp_path)

    def run(*words: object, **more: str) -> Said:
        capsys.readouterr()
        without = offline() if more.pop("HF_HUB_OFFLINE", None) else contextlib.nullcontext()
        with pytest.MonkeyPatch.context() as patch, without:
            for name, value in more.items():
                patch.setenv(name, value)
            code = manygates.main([str(word) for word in words])
        said = capsys.readouterr()
        return Said(code, said.out, said.err)

    return run


@pytest.fixture
def card() -> Card:
    golden = Card.from_json((Path(__file__).parents[1] / "golden_card.json").read_text(encoding="utf-8"))
    return replace(golden, description="A bundle.")


@pytest.fixture
def bundle(tmp_path: Path, card: Card) -> Bundle:
    """A bundle of a random gated network; its graphs are no graphs, which nothing here looks at."""
    return write_bundle(tmp_path / "bundle", card, FILES)


@pytest.fixture
def published(hub: Any, bundle: Bundle) -> Any:
    """The repository org/name, which holds the bundle."""
    return hub.put("org/name", {place.name: place.read_bytes() for place in bundle.folder.iterdir()})


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "models--org--name"
