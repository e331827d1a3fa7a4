from __future__ import annotations

import itertools
import random
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import manygates
from zoo.bundle.bundle import Bundle, write_bundle
from zoo.bundle.card import Card, Exit, InputFormat, NetworkSummary, Paths, Training
from zoo.errors import BadInput, CheckpointError
from zoo.gates.derive import Ensemble
from zoo.gates.rgn import RandomGatedNetwork
from zoo.networks import MNIST_FORMAT, build
from zoo.weights import models
from zoo.weights.checkpoint import Architecture, network_state, save_network
from zoo.weights.models import (
    PLAIN_WEIGHTS,
    RGN_WEIGHTS,
    AtExit,
    RandomGates,
    load_exits,
    load_members,
    load_rgn,
    load_variant,
    member_networks,
    save_members,
    weights_file,
)

GATED = Architecture(network="lenet", dataset="mnist", candidates=2, sharing="independent")
PLAIN = Architecture(network="lenet", dataset="mnist")
CHOSEN = [(0, 1), (1, 1)]
IMAGES = torch.rand(5, 1, 28, 28, generator=torch.Generator().manual_seed(0))


def card(architecture: Architecture, variants: tuple[str, ...], gated_layers: tuple[str, ...] = ()) -> Card:
    training = Training(recipe={}, seed=0, commit="abc", versions={}, date="2026-11-21", summary="none")
    return Card(
        name="digits",
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
            channels=1,
            height=28,
            width=28,
            range=(0.0, 1.0),
            mean=MNIST_FORMAT.mean,
            std=MNIST_FORMAT.std,
            resize="bicubic",
        ),
        classes=tuple("0123456789"),
        paths=Paths(single="01", ensemble=("01", "11")) if gated_layers else Paths(single=None, ensemble=()),
        variants=variants,
        training=training,
        results=(),
        files={},
    )


@pytest.fixture(scope="module")
def rgn() -> RandomGatedNetwork:
    """Two gates, four paths."""
    torch.manual_seed(0)
    network = GATED.build().eval()
    assert isinstance(network, RandomGatedNetwork)
    return network


@pytest.fixture(scope="module")
def gated(rgn: RandomGatedNetwork, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("gated")
    save_network(folder / "weights", rgn, GATED)
    files = {f"{variant}.onnx": b"graph" for variant in ("single", "ensemble", "gated")}
    described = card(GATED, ("single", "ensemble", "gated"), ("conv1", "conv2"))
    return write_bundle(folder / "bundle", described, {RGN_WEIGHTS: folder / "weights", **files})


def plain_members(number: int) -> list[nn.Module]:
    torch.manual_seed(1)
    return [PLAIN.build().eval() for _ in range(number)]


def plain_bundle(folder: Path, members: list[nn.Module]) -> Bundle:
    save_members(folder / "weights", members, PLAIN)
    variants = ("single", "ensemble") if len(members) > 1 else ("single",)
    graphs = {f"{variant}.onnx": b"graph" for variant in variants}
    return write_bundle(folder / "bundle", card(PLAIN, variants), {PLAIN_WEIGHTS: folder / "weights", **graphs})


@torch.no_grad()
def test_the_single_variant_is_the_path_that_the_card_names(gated: Bundle, rgn: RandomGatedNetwork) -> None:
    network = load_variant(gated, "single")
    assert not network.training
    assert torch.equal(network(IMAGES), rgn(IMAGES, (0, 1)))


@torch.no_grad()
def test_the_ensemble_is_the_mean_probability_of_the_paths_that_the_card_names(
    gated: Bundle, rgn: RandomGatedNetwork
) -> None:
    network = load_variant(gated, "ensemble")
    assert isinstance(network, Ensemble)
    assert not any(module.training for module in network.modules())
    mean = torch.stack([rgn(IMAGES, path).softmax(1) for path in CHOSEN]).mean(0)
    torch.testing.assert_close(network(IMAGES).exp(), mean)


@torch.no_grad()
def test_random_gates_answer_each_image_along_some_path_and_differ_between_calls(
    gated: Bundle, rgn: RandomGatedNetwork
) -> None:
    network = load_variant(gated, "gated")
    possible = torch.stack([rgn(IMAGES, path) for path in itertools.product(range(2), repeat=2)])  # path, image, class
    answers = torch.stack([network(IMAGES) for _ in range(30)])
    nearest = (answers[:, None] - possible).abs().amax(3).argmin(1)  # call, image -> path
    distance = (answers[:, None] - possible).abs().amax(3).amin(1)
    assert float(distance.max()) < 1e-4
    assert all(set(column.tolist()) == {0, 1, 2, 3} for column in nearest.T)  # 4 * 0.75^30 < 1e-3 per image
    assert len({tuple(row.tolist()) for row in nearest}) > 20  # images draw on their own


@torch.no_grad()
def test_the_mean_of_random_gates_approaches_the_mean_over_all_paths(gated: Bundle, rgn: RandomGatedNetwork) -> None:
    image = IMAGES[:1]
    network = load_variant(gated, "gated", rng=random.Random(0))
    possible = torch.stack([rgn(image, path).softmax(1)[0] for path in itertools.product(range(2), repeat=2)])
    draws = network(image.expand(2000, -1, -1, -1)).softmax(1)
    error = possible.std(0, correction=0) / 2000**0.5
    assert bool(((draws.mean(0) - possible.mean(0)).abs() <= 5 * error + 1e-6).all())


@torch.no_grad()
def test_random_gates_repeat_themselves_with_a_generator_and_only_then(gated: Bundle) -> None:
    first, second = (load_variant(gated, "gated", rng=random.Random(3))(IMAGES) for _ in range(2))
    assert torch.equal(first, second)
    assert isinstance(load_variant(gated, "gated").rng, random.SystemRandom)


@torch.no_grad()
def test_the_public_load_takes_a_folder(gated: Bundle, rgn: RandomGatedNetwork) -> None:
    assert torch.equal(manygates.load(f"local-dir:{gated.folder}")(IMAGES), rgn(IMAGES, (0, 1)))
    assert isinstance(manygates.load(str(gated.folder), variant="gated"), RandomGates)


def test_a_variant_that_is_not_there_is_refused_with_those_that_are(gated: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"digits has no variant 'double'; it has single, ensemble, gated"):
        load_variant(gated, "double")
    one = plain_bundle(tmp_path, plain_members(1))
    for variant in ("ensemble", "gated"):
        with pytest.raises(BadInput, match=rf"digits has no variant '{variant}'; it has single$"):
            load_variant(one, variant)
        with pytest.raises(BadInput, match=r"it has single$"):
            member_networks(one, variant)


def test_a_plain_network_has_no_gates_to_load(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"digits is a plain network without gates; expected a random gated one"):
        load_rgn(plain_bundle(tmp_path, plain_members(1)))


def test_a_card_with_gates_over_plain_weights_is_refused(tmp_path: Path) -> None:
    save_network(tmp_path / "weights", plain_members(1)[0], PLAIN)
    described = card(GATED, ("single",), ("conv1", "conv2"))
    files = {RGN_WEIGHTS: tmp_path / "weights", "single.onnx": b"graph"}
    bundle = write_bundle(tmp_path / "bundle", described, files)
    with pytest.raises(CheckpointError, match=r"rgn\.safetensors holds a plain network, and its card a gated one"):
        load_variant(bundle, "single")


def test_the_weights_file_is_named_after_what_it_holds(gated: Bundle) -> None:
    assert weights_file(gated.card) == "rgn.safetensors"
    assert weights_file(card(PLAIN, ())) == "weights.safetensors"


@pytest.mark.parametrize("number", [1, 2, 3])
def test_members_survive_being_written_and_read(number: int, tmp_path: Path) -> None:
    members = plain_members(number)
    save_members(tmp_path / "weights", members, PLAIN)
    loaded, architecture = load_members(tmp_path / "weights")
    assert architecture == PLAIN
    assert len(loaded) == number
    for member, original in zip(loaded, members, strict=True):
        assert not member.training
        expected = network_state(original)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in network_state(member).items())


def test_several_members_are_stacked_and_one_is_not(tmp_path: Path) -> None:
    shapes: dict[int, dict[str, Tensor]] = {}
    for number in (1, 3):
        save_members(tmp_path / "weights", plain_members(number), PLAIN)
        shapes[number] = safetensors.torch.load_file(tmp_path / "weights")
    for name, tensor in shapes[1].items():
        assert shapes[3][name].shape == (3, *tensor.shape)
        assert torch.equal(shapes[3][name][0], tensor)


@torch.no_grad()
def test_an_ensemble_of_plain_networks_answers_by_its_members(tmp_path: Path) -> None:
    members = plain_members(3)
    bundle = plain_bundle(tmp_path, members)
    assert torch.equal(load_variant(bundle, "single")(IMAGES), members[0](IMAGES))
    mean = torch.stack([member(IMAGES).softmax(1) for member in members]).mean(0)
    torch.testing.assert_close(load_variant(bundle, "ensemble")(IMAGES).exp(), mean)
    assert len(models.member_networks(bundle, "ensemble")) == 3


EARLY = Architecture(network="small_cnn3", dataset="mnist")


@pytest.fixture(scope="module")
def early(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Three exits; the last is moved from its start at zero."""
    folder = tmp_path_factory.mktemp("early")
    torch.manual_seed(0)
    network = EARLY.build().eval()
    nn.init.normal_(network.exit3[-1].weight)
    save_members(folder / "weights", [network], EARLY)
    files = dict.fromkeys(("single.onnx", "early_exit.onnx"), b"graph")
    described = replace(card(EARLY, ("single",)), exits=(Exit(macs=1), Exit(macs=2), Exit(macs=3)))
    return write_bundle(folder / "bundle", described, {PLAIN_WEIGHTS: folder / "weights", **files})


@torch.no_grad()
def test_a_network_with_exits_answers_with_all_of_them_with_the_last_or_with_the_one_that_is_named(
    early: Bundle,
) -> None:
    every = load_exits(early)(IMAGES)
    assert len(every) == 3
    assert torch.equal(load_variant(early, "single")(IMAGES), every[2])
    assert torch.equal(manygates.load(str(early.folder))(IMAGES), every[2])
    for index in range(3):
        network = AtExit(load_exits(early), index)
        assert not any(module.training for module in network.modules())
        assert torch.equal(network(IMAGES), every[index])
    (member,) = member_networks(early, "single")
    assert torch.equal(member(IMAGES), every[2])


def test_an_exit_keeps_the_mode_and_the_image_shape_of_its_network() -> None:
    network = build("msdnet", exits=2, base=1, step=1).train()
    assert AtExit(network).training
    assert not AtExit(network.eval()).training
    assert AtExit(network).image_shape == (3, 32, 32)
    assert AtExit(network).exit_index == 1


def test_exits_that_are_not_there_are_refused(early: Bundle, gated: Bundle, tmp_path: Path) -> None:
    for index in (3, -4):
        with pytest.raises(BadInput, match=rf"exit {index} is out of range, expected 0 to 2, or -3 to -1"):
            AtExit(load_exits(early), index)
    for bundle in (gated, plain_bundle(tmp_path, plain_members(1))):
        with pytest.raises(BadInput, match="digits has one exit; expected a network with several, such as msdnet3"):
            load_exits(bundle)
        with pytest.raises(BadInput, match="digits has one exit"):
            AtExit(load_exits(bundle), 0)
    with pytest.raises(BadInput, match="LeNet has one exit, so there is none to choose"):
        AtExit(plain_members(1)[0])
