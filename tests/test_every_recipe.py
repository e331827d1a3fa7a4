"""Every recipe of the registry, from real images to an answer of the server, by the command line's own functions.

Every recipe is trained. Graphs and answers depend on the network alone, so one recipe of each architecture is exported
and served, and one of each kind derived.

A recipe is shortened by what `--set` takes: few images, one epoch per phase, two steps per attack or distillation. Its
network keeps its kind and loses width, and depth where it has a choice: the published PreAct-ResNet-18, ResNet-50 and
WRN-34-10 take minutes per epoch where these tests run, and nothing asked here depends on how large they are. A wide
ResNet has no option for its width, so the smallest of the family stands in.
"""

from __future__ import annotations

import asyncio
import csv
import dataclasses
import functools
import gc
import io
import itertools
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from torch import Tensor, nn

import manygates
from serving.engine.engine import Engine
from serving.engine.graphs import modes_of
from serving.http.app import Application
from serving.operations.settings import Settings
from serving.scheduling.service import Model
from training.recipes import RECIPES, Recipe, override, recipe
from zoo import paths
from zoo.bundle.bundle import Bundle
from zoo.data import datasets
from zoo.gates.derive import derive
from zoo.hub.source import list_bundled
from zoo.vocabulary import VARIANT_OF_MODE
from zoo.weights.models import PLAIN_WEIGHTS, AtExit, load_exits, load_members, load_rgn, load_variant

pytestmark = [pytest.mark.data, pytest.mark.slow]

ROOT = Path(__file__).parents[1]
SPLITS = {"train": 200, "test": 64}
# in float32: a processor without bfloat16 takes a hundred times as long for it
SHORT = ("train_images=36", "held_out=12", "batch_size=12", "precision=fp32")
SMALLER = {
    "resnet8": ("network_options.width=4",),
    "resnet20": ("network=resnet8", "network_options.width=4"),
    "preact_resnet18": ("network_options.width=8",),
    "resnet50_cifar": ("network_options.width=8",),
    "wide_resnet34_10": ("network=wide_resnet16_4",),
    "msdnet3": (
        "network=msdnet",
        *(f"network_options.{name}" for name in ("exits=3", "base=1", "step=1", "channels=4", "growth=2")),
    ),
}
PUBLISHED = {"lenet", "two_layer_cnn", "small_cnn3"}
"""Networks that are small as they are."""
STARTS = "standard-resnet20-cifar10"
"""The recipe of the bundled model that another one starts from; here it starts from a short run of it."""
SEVERAL_EXITS = ("msdnet3", "small_cnn3")
TOLERANCE = 1e-4
MEMBER = 2


def shortened(run: Recipe) -> list[str]:
    """Return the settings that make a run of seconds out of a recipe and leave everything else as it is."""
    settings = [*SHORT, *SMALLER.get(run.network, ())]
    for number, phase in enumerate(run.phases):
        settings += [f"phases.{number}.epochs=1", *_cheaper(phase.objective, f"phases.{number}.objective")]
    return settings


def _cheaper(holder: Any, place: str) -> list[str]:
    """Return the settings for an objective, its attack and the objective within it: two steps, no warm-up."""
    settings = []
    for field in dataclasses.fields(holder):
        value, name = getattr(holder, field.name), f"{place}.{field.name}"
        if dataclasses.is_dataclass(value):
            settings += _cheaper(value, name)
        elif field.name in ("steps", "distillation_steps") and value > 2:
            settings.append(f"{name}=2")
        elif field.name == "warm_up" and value:  # in epochs, and there is only one
            settings.append(f"{name}=0")
    return settings


def settings_of(holder: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every setting of a recipe or objective by the name that `--set` gives it."""
    for field in dataclasses.fields(holder):
        value, name = getattr(holder, field.name), f"{place}{field.name}"
        if dataclasses.is_dataclass(value):
            yield f"{name}.method", type(value)
            yield from settings_of(value, f"{name}.")
        elif field.name == "phases":
            for number, phase in enumerate(value):
                yield from settings_of(phase, f"{name}.{number}.")
        else:
            yield name, value


@pytest.mark.parametrize("name", RECIPES)
def test_a_shortened_recipe_differs_in_size_number_and_precision_alone(name: str) -> None:
    whole = dict(settings_of(recipe(name)))
    short = dict(settings_of(override(recipe(name), shortened(recipe(name)))))
    changed = {setting for setting in whole if short[setting] != whole[setting]}
    sizes = {"train_images", "held_out", "batch_size", "network", "network_options", "precision"}
    assert {setting.rpartition(".")[2] for setting in changed - sizes} <= {
        "epochs",
        "steps",
        "distillation_steps",
        "warm_up",
    }
    for setting, value in short.items():
        if setting.endswith("epochs"):
            assert value == 1
        if setting.endswith("steps"):
            assert value <= 2
    if recipe(name).network not in PUBLISHED:
        assert short["network_options"] != whole["network_options"] or short["network"] != whole["network"]


def test_the_model_that_a_recipe_starts_from_is_bundled() -> None:
    starts = {recipe(name).start_from for name in RECIPES} - {None}
    assert STARTS in starts
    assert starts <= {card.name for card in list_bundled()}


def done(*words: str | Path) -> str:
    """Run a command that must succeed; returns what it printed."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = manygates.main([str(word) for word in words])
    assert code == 0, f"{words}: {out.getvalue()}{err.getvalue()}"
    return out.getvalue()


# --- a few real images, in the hub's layout ---


def real_folder(name: str) -> Path:
    """Return where a data set's parquet files are on this machine."""
    dataset = datasets.DATASETS[name]
    return Path(os.environ.get(datasets.DATA_VARIABLE) or "../shared/data") / dataset.repository / dataset.folder


@pytest.fixture(scope="module", autouse=True)
def few_real_images(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Put the first images of each real data set where the commands look: to decode all of them takes a while."""
    folder = tmp_path_factory.mktemp("hub")
    smaller = {}
    for name, dataset in datasets.DATASETS.items():
        place = folder / dataset.repository / dataset.folder
        place.mkdir(parents=True)
        for split, number in SPLITS.items():
            first = min(real_folder(name).glob(f"{split}-*.parquet"))
            rows = next(parquet.ParquetFile(first).iter_batches(number))
            parquet.write_table(pyarrow.Table.from_batches([rows]), place / f"{split}-00000-of-00001.parquet")
        smaller[name] = dataclasses.replace(dataset, sizes=SPLITS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "DATASETS", smaller)
        patch.setenv(datasets.DATA_VARIABLE, str(folder))
        yield


def real_image(dataset: str) -> tuple[Tensor, bytes]:
    """Return a real test image, float32 (1, channel, height, width), and the very same as a PNG file."""
    pixels = datasets.load(dataset, "test").pixels[7]
    stream = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).squeeze(2).numpy()).save(stream, "PNG")
    return datasets.as_float(pixels[None]), stream.getvalue()


# --- what the commands made of a recipe, once for all tests ---


@dataclasses.dataclass(frozen=True, kw_only=True)
class Made:
    """What the commands made of one recipe."""

    recipe: Recipe
    run: Path
    model: Path

    @property
    def bundle(self) -> Bundle:
        return Bundle.open(self.model)


def architecture_of(name: str) -> str:
    """Return what decides which network is exported."""
    return repr(override(recipe(name), shortened(recipe(name))).architecture)


def kind_of(name: str) -> tuple[object, ...]:
    """Return what decides how graphs are put together: gates and how they share, members, exits."""
    run = recipe(name)
    return run.candidates > 1, run.sharing, run.members > 1, run.network in SEVERAL_EXITS


def one_of_each(kind: Callable[[str], Hashable]) -> list[str]:
    """Return the first recipe of each kind."""
    return list({kind(name): name for name in reversed(RECIPES)}.values())


@dataclasses.dataclass(frozen=True)
class Commands:
    """What is made of a recipe by its name, once for all tests."""

    train: Callable[[str], Path]
    export: Callable[[str], Made]


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    @functools.cache
    def train(name: str) -> Path:
        run, folder = recipe(name), tmp_path_factory.mktemp(name) / "run"
        settings = shortened(run)
        if run.start_from is not None:
            settings.append(f"start_from=local-dir:{export(STARTS).model}")
        done("train", name, "--out", folder, "--device", "cpu", *(w for text in settings for w in ("--set", text)))
        return folder

    @functools.cache
    def export(name: str) -> Made:
        made = Made(recipe=recipe(name), run=train(name), model=train(name).with_name("model"))
        done("export", made.run, "--out", made.model)
        gc.freeze()  # all that was imported by now is looked through by no later collection: a tenth of the time
        return made

    yield Commands(train, export)
    gc.unfreeze()


@pytest.fixture(params=one_of_each(architecture_of))
def made(request: pytest.FixtureRequest, commands: Commands) -> Made:
    return commands.export(request.param)


# --- claims about every recipe ---


@pytest.mark.parametrize("name", RECIPES)
def test_a_short_run_trains_every_phase_with_its_own_objective(name: str, commands: Commands) -> None:
    with (commands.train(name) / "log.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["objective"] for row in rows] == [phase.objective.name for phase in recipe(name).phases]
    assert all(math.isfinite(float(row["loss"])) for row in rows)
    assert 0 <= float(rows[-1]["held_out_robust"]) <= 1


def test_the_exported_bundle_has_the_variants_and_exits_of_its_kind(made: Made) -> None:
    run, card = made.recipe, made.bundle.card
    gated = run.candidates > 1
    several = gated or run.members > 1
    assert card.variants == ("single", *["ensemble"] * several, *["gated"] * gated)
    assert (card.name, card.method, card.dataset) == (run.name, run.method, run.dataset)
    assert len(card.exits) == (3 if run.network in SEVERAL_EXITS else 0)
    assert len(card.paths.ensemble) == (run.ensemble_paths if gated else 0)


@pytest.mark.parametrize("name", one_of_each(kind_of))
def test_what_is_derived_is_a_part_of_what_was_trained(name: str, commands: Commands, tmp_path: Path) -> None:
    made, folder = commands.export(name), tmp_path / "derived"
    choice = ["--paths", "2"] * (made.recipe.candidates > 1) + ["--member", str(MEMBER)] * (made.recipe.members > 1)
    done("derive", made.run, "--out", folder, *choice)
    found, _ = load_members(folder / PLAIN_WEIGHTS)
    if made.recipe.candidates > 1:
        rgn = load_rgn(made.bundle)
        texts = Bundle.open(folder).card.training.recipe["derived"]["paths"]
        assert len({*texts}) == 2
        expected = [derive(rgn, paths.parse(text, rgn.num_gates, rgn.candidates)) for text in texts]
    else:
        trained, _ = load_members(made.bundle.file(PLAIN_WEIGHTS))
        assert len(trained) == made.recipe.members
        expected = trained[MEMBER - 1 : MEMBER] if len(trained) > 1 else trained
    for member, wanted in zip(found, expected, strict=True):
        state = wanted.state_dict()
        assert member.state_dict().keys() == state.keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in member.state_dict().items())
    check_graphs(folder)


def check_graphs(folder: Path) -> None:
    """Check that every graph of a bundle answers as its weights do."""
    document = json.loads(done("verify", folder, "--json"))
    names = [check["name"] for check in document["checks"]]
    card = Bundle.open(folder).card
    assert document["held"]
    assert {f"{variant}.onnx answers as its weights" for variant in card.variants} <= {*names}
    assert ("early_exit.onnx answers as its weights" in names) == bool(card.exits)


def test_every_graph_is_verified_against_the_weights(made: Made) -> None:
    check_graphs(made.model)


def served(bundle: Bundle, mode: Any, picture: bytes, query: str = "") -> dict[str, Any]:
    """Return what the server answers to `POST /classify`; gates come from a generator seeded with 0."""
    rng, card = random.Random(0), bundle.card

    def gates(number: int) -> Any:
        length, candidates = len(card.architecture.gated_layers), card.architecture.candidates
        return np.array([paths.sample(length, candidates, rng) for _ in range(number)])

    engine = Engine(bundle, mode, gate_source=gates, any_exit=bool(card.exits))
    model = Model(card=card, mode=engine.mode, predictor=engine, limits=engine.limits)

    async def ask() -> httpx.Response:
        application = Application([model], Settings(threads=1))
        transport = httpx.ASGITransport(application)
        async with application.running(), httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.post(f"/classify{query}", content=picture)

    response = asyncio.run(ask())
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


@torch.no_grad()
def said_by(network: nn.Module, images: Tensor) -> Tensor:
    """Return a torch network's probabilities (class,) of the one image."""
    probabilities: Tensor = network(images).softmax(1)[0]
    return probabilities


def same(answer: dict[str, Any], expected: Tensor, classes: Sequence[str]) -> bool:
    """Whether a server's answer is that of a torch network, its probabilities to `TOLERANCE`."""
    found = torch.tensor([answer["probabilities"][name] for name in classes])
    return answer["label"] == classes[int(expected.argmax())] and bool((found - expected).abs().max() <= TOLERANCE)


def test_the_server_answers_a_real_image_as_the_weights_do_in_every_mode_and_at_every_exit(made: Made) -> None:
    bundle = made.bundle
    card = bundle.card
    images, picture = real_image(card.dataset)
    modes = modes_of(card)
    assert [VARIANT_OF_MODE[mode] for mode in modes] == [*card.variants]
    expected = []
    for mode in modes:
        network = load_variant(bundle, VARIANT_OF_MODE[mode], rng=random.Random(0))
        expected.append(said_by(network, images))
        assert same(served(bundle, mode, picture), expected[-1], card.classes), mode
    for exit_index in range(len(card.exits)):
        last = exit_index == len(card.exits) - 1
        answer = served(bundle, "single", picture, f"?exit={exit_index + 1}")
        assert answer["exit"] == exit_index + 1
        probabilities = said_by(AtExit(load_exits(bundle), exit_index), images)
        assert same(answer, probabilities, card.classes)
        assert torch.equal(probabilities, expected[0]) == last  # the default
        expected += [] if last else [probabilities]
    for one, other in itertools.combinations(expected, 2):
        assert (one - other).abs().max() > 10 * TOLERANCE, "the image does not tell the modes apart"


# --- once over real HTTP per kind of model ---


@contextmanager
def server_process(*words: str | Path) -> Iterator[str]:
    """Run `manygates serve` in a process of its own on a free port; yields its URL."""
    process = subprocess.Popen(
        [sys.executable, "-m", "manygates", "serve", *map(str, words), "--port", "0"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "MANYGATES_SERVE_THREADS": "1"},
    )
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        assert "manygates serves" in line, line + process.stderr.read()
        yield next(word for word in line.split() if word.startswith("http://"))
    finally:
        process.kill()
        process.communicate()


def test_an_ensemble_of_trained_members_answers_over_http(commands: Commands) -> None:
    bundle = commands.export("baseline3-resnet20-cifar10").bundle
    images, picture = real_image("cifar10")
    with server_process(f"local-dir:{bundle.folder}", "--mode", "ensemble") as url:
        answer = httpx.post(f"{url}/classify", content=picture).json()
    assert (answer["model"], answer["mode"]) == (bundle.card.name, "ensemble")
    assert same(answer, said_by(load_variant(bundle, "ensemble"), images), bundle.card.classes)


def test_a_multi_exit_network_answers_over_http_at_the_exit_that_its_operator_chose(
    commands: Commands,
) -> None:
    bundle = commands.export("neo-kd-msdnet3-cifar10-cpu").bundle
    images, picture = real_image("cifar10")
    first = float(said_by(AtExit(load_exits(bundle), 0), images).max())
    for words, expected in (
        (("--exit", "2"), 2),
        (("--confidence", f"{first / 2},1"), 1),
        (("--confidence", f"{(1 + first) / 2},1"), 3),
    ):
        with server_process(bundle.folder, *words) as url:
            answer = httpx.post(f"{url}/classify", content=picture).json()
        assert answer["exit"] == expected
        network = AtExit(load_exits(bundle), expected - 1)
        assert same(answer, said_by(network, images), bundle.card.classes)
