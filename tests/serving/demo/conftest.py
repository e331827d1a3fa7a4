"""Models for the demo that were not trained, and a server of its page."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import io
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from serving.listener import bind, url_of
from zoo.bundle.bundle import EARLY_EXIT_FILE, write_bundle
from zoo.bundle.card import Card, Check, Exit, InputFormat, NetworkSummary, Paths, Result, Training

if TYPE_CHECKING:
    from serving.demo.shelf import Shelf

GATES = 7  # of ResNet-8


def result(variant: str = "single", *, protocol: str = "clean", eps: str = "0", **values: object) -> Result:
    """Return an accuracy of 0.8765 on clean images, of 0.25 under PGD; `values` replace fields."""
    number = {"0": 0.0, "1/100": 0.01}[eps]
    usual = Result(
        protocol=protocol,
        variant=variant,
        attack="PGD" if number else "none",
        eps=number,
        eps_fraction=eps,
        steps=50 if number else 0,
        step_size=number / 5,
        restarts=5 if number else 0,
        images=1000,
        seed=0,
        accuracy=0.25 if number else 0.8765,
        interval=(0.2, 0.3) if number else (0.86, 0.89),
        note="",
        checks=(Check(name="gradients are not zero", held=True, detail=""),),
        date="2026-11-21",
        command="manygates evaluate",
    )
    return dataclasses.replace(usual, **values)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def make_result() -> Callable[..., Result]:
    return result


@pytest.fixture(scope="session")
def make_bundle() -> Callable[..., str]:
    """Return a function that writes a bundle of a network that was not trained, and returns its source.

    Its graphs are empty, because the demo opens none.
    """
    import torch

    from zoo import networks
    from zoo.data.datasets import DATASETS
    from zoo.gates.rgn import randomly_gate
    from zoo.weights.checkpoint import Architecture, save_network
    from zoo.weights.models import PLAIN_WEIGHTS, RGN_WEIGHTS

    def made(
        folder: Path, *, gated: bool = False, dataset: str = "cifar10", network: str = "resnet8", exits: int = 1
    ) -> str:
        source, candidates, sharing = DATASETS[dataset], 2 if gated else 1, "independent" if gated else None
        torch.manual_seed(3)
        template = networks.build(network, images=source.format, classes=10)
        with torch.no_grad():  # not trained, so all answers are nearly equal: spread them
            last = list(template.modules())[-1]
            assert isinstance(last, torch.nn.Linear)
            last.weight.mul_(10)
        rgn = randomly_gate(template, candidates=2) if gated else None
        card = Card(
            name=folder.name,
            description="Not trained",
            method="standard",
            license="apache-2.0",
            dataset=dataset,
            architecture=NetworkSummary(
                name=network,
                options={},
                gated_layers=tuple(layer.conv for layer in rgn.layers) if rgn else (),
                candidates=candidates,
                sharing=sharing,
                parameters=2,
                single_path_parameters=1,
            ),
            input=InputFormat(
                channels=source.format.channels,
                height=source.format.height,
                width=source.format.width,
                range=(0.0, 1.0),
                mean=source.format.mean,
                std=source.format.std,
                resize="bicubic",
            ),
            classes=source.classes,
            exits=tuple(Exit(macs=index + 1) for index in range(exits)) if exits > 1 else (),
            paths=Paths(single="0" * GATES, ensemble=("0" * GATES, "1" * GATES))
            if gated
            else Paths(single=None, ensemble=()),
            variants=("single", "ensemble", "gated") if gated else ("single",),
            training=Training(recipe={}, seed=0, commit="abc", versions={}, date="2026-11-21", summary="Not trained"),
            results=(result(), result(protocol="whitebox", eps="1/100")),
            files={},
        )
        weights_file = folder.parent / f"{folder.name}.safetensors"
        architecture = Architecture(network=network, dataset=dataset, candidates=candidates, sharing=sharing)
        save_network(weights_file, rgn or template, architecture)
        files: dict[str, bytes | Path | str] = {f"{variant}.onnx": b"" for variant in card.variants}
        if exits > 1:
            files[EARLY_EXIT_FILE] = b""
        write_bundle(folder, card, {**files, RGN_WEIGHTS if gated else PLAIN_WEIGHTS: weights_file})
        return f"local-dir:{folder}"

    return made


@pytest.fixture(scope="session")
def models(make_bundle: Callable[..., str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A plain model, one with gates, and one of another data set."""
    folder = tmp_path_factory.mktemp("models")
    return [
        make_bundle(folder / "plain"),
        make_bundle(folder / "gates", gated=True),
        make_bundle(folder / "digits", dataset="mnist", network="lenet"),
    ]


@pytest.fixture(scope="session")
def shelf(models: list[str]) -> Shelf:
    from serving.demo.shelf import Shelf

    return Shelf(models)


@pytest.fixture(scope="session")
def image_png() -> bytes:
    """A picture of 32x32 pixels whose levels reach 0 and 255, where the ball is cut off."""
    smooth = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
    smooth[:4], smooth[-4:] = 0, 255
    file = io.BytesIO()
    Image.fromarray(smooth).save(file, "png")
    return file.getvalue()


@pytest.fixture(scope="session")
def serve_page(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[Sequence[str]], AbstractContextManager[str]]:
    """Return a context that mounts the page under /demo of another application, and gives that one's URL."""
    import uvicorn
    from starlette.applications import Starlette
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route

    from serving.demo.page import mount

    @contextlib.contextmanager
    def served(models: Sequence[str]) -> Iterator[str]:
        app = Starlette(routes=[Route("/", lambda request: PlainTextResponse("the index"))])
        servers: list[uvicorn.Server] = []

        async def serve() -> None:
            # mounted where a loop runs: where none does, gradio makes eight and never closes them
            config = uvicorn.Config(mount(app, "/demo", models), log_level="error", ws="none")
            config.timeout_graceful_shutdown = 1
            servers.append(uvicorn.Server(config))
            await servers[0].serve([listener])

        with pytest.MonkeyPatch.context() as patch, bind("127.0.0.1", 0) as listener:
            patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
            thread = threading.Thread(target=lambda: asyncio.run(serve()))
            thread.start()
            try:
                while thread.is_alive() and not (servers and servers[0].started):
                    time.sleep(0.02)
                assert thread.is_alive()
                yield url_of(listener)
            finally:
                for server in servers:
                    server.should_exit = True
                thread.join(timeout=10)

    return served
