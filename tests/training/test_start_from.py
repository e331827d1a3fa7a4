"""`start_from`: a random gated network whose candidates begin as noisy copies of a trained plain one."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor, nn

from training.loop import train
from training.recipes import Recipe
from training.run import load_run
from zoo.bundle.bundle import write_bundle
from zoo.bundle.card import Card, InputFormat, NetworkSummary, Paths, Training
from zoo.data.datasets import source
from zoo.errors import BadInput, MissingFile, UnknownName
from zoo.gates.derive import Ensemble
from zoo.gates.rgn import RandomGatedNetwork
from zoo.weights.checkpoint import Architecture, network_state
from zoo.weights.models import PLAIN_WEIGHTS, RGN_WEIGHTS, save_members

MakeRecipe = Callable[..., Recipe]
PLAIN = Architecture(network="resnet8", options={"width": 4}, dataset="tiny")

# a step so small that weights stay where they started
STILL = (
    "phases.0.epochs=1", "phases.0.learning_rate=1e-12", "phases.1.epochs=1", "phases.1.learning_rate=1e-12",
    "phases.1.objective.distillation_steps=1", "batch_size=100",
)  # fmt: skip


def card(architecture: Architecture, gated_layers: tuple[str, ...] = ()) -> Card:
    known = source(architecture.dataset)
    image = known.format
    return Card(
        name="start",
        description="made by a test",
        method="standard",
        license="apache-2.0",
        dataset=architecture.dataset,
        architecture=NetworkSummary(
            name=architecture.network,
            options=architecture.options,
            gated_layers=gated_layers,
            candidates=architecture.candidates,
            sharing=architecture.sharing,
            parameters=1,
            single_path_parameters=1,
        ),
        input=InputFormat(
            channels=3,
            height=image.height,
            width=image.width,
            range=(0.0, 1.0),
            mean=image.mean,
            std=image.std,
            resize="bicubic",
        ),
        classes=known.classes,
        paths=Paths(single=None, ensemble=()),
        variants=(),
        training=Training(recipe={}, seed=0, commit="abc", versions={}, date="2026-11-21", summary="none"),
        results=(),
        files={},
    )


def plain_bundle(folder: Path, *, members: int = 1) -> tuple[str, list[dict[str, Tensor]]]:
    """Write a bundle of plain networks; returns how to name it, and the tensors of each."""
    torch.manual_seed(7)
    folder.mkdir()
    networks = [PLAIN.build() for _ in range(members)]
    for network in networks:
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(cast(Tensor, module.weight), 0.5, 1.5)
    save_members(folder / "weights", networks, PLAIN)
    write_bundle(folder / "bundle", card(PLAIN), {PLAIN_WEIGHTS: folder / "weights"})
    return f"local-dir:{folder / 'bundle'}", [network_state(network) for network in networks]


@pytest.fixture
def start(tiny_dataset: str, tmp_path: Path) -> tuple[str, dict[str, Tensor]]:
    model, (state,) = plain_bundle(tmp_path / "start")
    return model, state


def weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name.endswith(("weight", "bias"))}


def test_without_noise_every_candidate_starts_as_the_trained_network(
    start: tuple[str, dict[str, Tensor]], make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    model, state = start
    made = make_recipe("smoke", f"start_from={model}", "start_noise=0", *STILL)
    network = train(made, tmp_path / "run", device="cpu")
    assert isinstance(network, RandomGatedNetwork)
    gated = {name for layer in network.layers for name in (f"{layer.conv}.weight", f"{layer.norm}.weight")}
    for name, tensor in weights(network_state(network)).items():
        candidates = tensor if name in gated or name.removesuffix("bias") + "weight" in gated else tensor[None]
        assert len(candidates) in (1, 2)
        for candidate in candidates:
            torch.testing.assert_close(candidate, state[name], atol=1e-6, rtol=1e-5)


def test_noise_is_relative_and_tells_the_candidates_apart(
    start: tuple[str, dict[str, Tensor]], make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    model, state = start
    made = make_recipe("smoke", f"start_from={model}", "start_noise=0.1", *STILL)
    network = train(made, tmp_path / "run", device="cpu")
    assert isinstance(network, RandomGatedNetwork)
    found = network_state(network)
    relative = torch.cat(
        [(found[f"{layer.conv}.weight"] / state[f"{layer.conv}.weight"] - 1).flatten(1) for layer in network.layers], 1
    )
    assert relative.shape[0] == 2
    torch.testing.assert_close(relative.std(1), torch.full((2,), 0.1), atol=0.01, rtol=0)
    torch.testing.assert_close(relative.mean(1), torch.zeros(2), atol=0.01, rtol=0)
    assert abs(float(torch.corrcoef(relative)[0, 1])) < 0.1  # each candidate has noise of its own
    torch.testing.assert_close(found["classifier.weight"], state["classifier.weight"], atol=1e-6, rtol=1e-5)


def test_a_plain_recipe_goes_on_from_the_very_network(
    start: tuple[str, dict[str, Tensor]], make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    model, state = start
    made = make_recipe("standard-resnet20-cifar10-cpu", f"start_from={model}", *STILL[:2], "batch_size=100")
    network = train(made, tmp_path / "run", device="cpu")
    for name, tensor in weights(network_state(network)).items():
        torch.testing.assert_close(tensor, state[name], atol=1e-6, rtol=1e-5)


def test_the_start_is_part_of_the_run_and_of_its_seed(
    start: tuple[str, dict[str, Tensor]], make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    model, _ = start
    states = []
    for number, seed in enumerate((0, 0, 1)):
        made = make_recipe("smoke", f"start_from={model}", "start_noise=0.1", f"seed={seed}", *STILL)
        states.append(network_state(train(made, tmp_path / f"run{number}", device="cpu")))
    _, _, read = load_run(tmp_path / "run0")
    assert read.start_from == model
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())
    assert not torch.equal(states[0]["conv1.weight"], states[2]["conv1.weight"])


def test_an_ensemble_goes_on_from_an_ensemble_of_as_many(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    model, states = plain_bundle(tmp_path / "start", members=2)
    settings = (*STILL[:2], "batch_size=100", "members=2", f"start_from={model}")
    network = train(make_recipe("standard-resnet20-cifar10-cpu", *settings), tmp_path / "run", device="cpu")
    assert isinstance(network, Ensemble)
    for member, state in zip(network.members, states, strict=True):
        for name, tensor in weights(network_state(member)).items():
            torch.testing.assert_close(tensor, state[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("there", "members"), [(1, 2), (2, 1), (2, 3)])
def test_a_start_of_another_number_of_members_is_refused(
    there: int, members: int, make_recipe: MakeRecipe, tmp_path: Path
) -> None:
    model, _ = plain_bundle(tmp_path / "start", members=there)
    made = make_recipe("standard-resnet20-cifar10-cpu", f"start_from={model}", f"members={members}", *STILL[:2])
    with pytest.raises(BadInput, match=f"has {there} members, expected members={members}; copies of one"):
        train(made, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("network_options={\"width\": 5}",), r"is Architecture\(.*'width': 4.*, expected Architecture\(.*'width': 5"),
        (("network=resnet14",), r"network='resnet8'.*expected .*network='resnet14'"),
    ],
)  # fmt: skip
def test_a_start_of_another_network_is_refused_with_both(
    settings: tuple[str, ...],
    message: str,
    start: tuple[str, dict[str, Tensor]],
    make_recipe: MakeRecipe,
    tmp_path: Path,
) -> None:
    with pytest.raises(BadInput, match=message):
        train(make_recipe("smoke", f"start_from={start[0]}", *settings, *STILL), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_a_random_gated_start_is_refused(tiny_dataset: str, make_recipe: MakeRecipe, tmp_path: Path) -> None:
    gated = Architecture(network="resnet8", dataset=tiny_dataset, candidates=2, sharing="independent")
    write_bundle(tmp_path / "bundle", card(gated, ("conv1",)), {RGN_WEIGHTS: b"weights"})
    model = f"local-dir:{tmp_path / 'bundle'}"
    with pytest.raises(BadInput, match=re.escape(f"start_from={model!r} is a random gated network, expected a plain")):
        train(make_recipe("smoke", f"start_from={model}", *STILL), tmp_path / "run", device="cpu")


def test_a_start_that_is_not_there_is_refused(make_recipe: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="unknown model 'nowhere'"):
        train(make_recipe("smoke", "start_from=nowhere", *STILL), tmp_path / "run", device="cpu")
    with pytest.raises(MissingFile, match="no folder"):
        train(make_recipe("smoke", f"start_from=local-dir:{tmp_path}/none", *STILL), tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()
