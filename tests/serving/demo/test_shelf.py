"""The models on offer."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the demo needs torch")

import torch

from serving.demo.attack import Attack, craft
from serving.demo.shelf import EOT_DRAWS, Shelf
from zoo.bundle.bundle import Bundle, write_bundle
from zoo.errors import BadInput, MissingFile, UnknownName
from zoo.weights.models import load_exits


def some_images() -> torch.Tensor:
    return torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_a_plain_model_stands_against_random_gates_by_default(shelf: Shelf) -> None:
    assert shelf.defaults == ("plain/single", "gates/gated")
    assert shelf.choices == ["plain/single", "gates/single", "gates/ensemble", "gates/gated", "digits/single"]


def test_without_random_gates_the_first_choice_stands_against_the_last(models: list[str]) -> None:
    assert Shelf([models[2], models[0]]).defaults == ("digits/single", "plain/single")


def test_classes_are_those_of_all_models_each_once(shelf: Shelf) -> None:
    assert len(shelf.classes) == 20
    assert {"airplane", "7"} < set(shelf.classes)


def test_a_model_is_loaded_once(shelf: Shelf) -> None:
    assert shelf.contestant("gates/ensemble") is shelf.contestant("gates/ensemble")


def test_a_gradient_of_random_gates_averages_over_fresh_paths(shelf: Shelf) -> None:
    gates, images = shelf.contestant("gates/gated"), some_images()

    first, second = (gates.differentiable(random.Random(0))(images) for _ in range(2))
    model = gates.differentiable(random.Random(0))

    assert torch.equal(first, second), "the same generator gives the same paths"
    assert not torch.equal(model(images), model(images)), "each call draws new ones"
    assert torch.allclose(first.exp().sum(), torch.tensor(1.0), atol=1e-5)
    assert gates.passes == EOT_DRAWS


def test_an_ensemble_answers_with_the_mean_of_its_members(shelf: Shelf) -> None:
    ensemble, images = shelf.contestant("gates/ensemble"), some_images()

    (answer,) = ensemble.probabilities(images, random.Random(0))

    with torch.no_grad():
        members = torch.stack([member(images).softmax(1) for member in ensemble.network.members])
    assert ensemble.passes == len(members) == 2
    assert torch.allclose(answer, members.mean(0), atol=1e-6)


def test_a_multi_exit_model_is_attacked_at_its_last_exit(make_bundle: Callable[..., str], tmp_path: Path) -> None:
    shelf = Shelf([make_bundle(tmp_path / "leaver", network="msdnet3", exits=3)])
    contestant = shelf.contestant("leaver/single")
    levels = (some_images()[0] * 255).to(torch.uint8)
    images = levels[None] / 255

    answer = contestant.probabilities(images, random.Random(0))[0, 0]

    with torch.no_grad():
        every_exit = load_exits(Bundle.open(tmp_path / "leaver"))(images)
    assert torch.allclose(answer, every_exit[-1][0].softmax(0), atol=1e-5)
    assert not torch.allclose(answer, every_exit[0][0].softmax(0), atol=1e-3)
    crafted = craft(contestant, levels.numpy(), int(answer.argmax()), Attack(eps_levels=2, steps=2))
    assert abs(crafted.levels.astype(int) - levels.numpy()).max() <= 2


@pytest.mark.parametrize("choice", ["plain/singel", "plain/gated", "plian/single", "plain", ""])
def test_an_unknown_choice_is_refused_with_the_known_ones(shelf: Shelf, choice: str) -> None:
    for asked in (shelf.card, shelf.contestant):
        with pytest.raises(UnknownName) as refused:
            asked(choice)
        assert refused.value.name == choice
        assert set(refused.value.known) == set(shelf.choices)


def test_the_same_name_twice_is_refused(models: list[str]) -> None:
    with pytest.raises(BadInput, match="'plain'"):
        Shelf([models[0], models[0]])


def test_a_bundle_without_weights_is_refused(models: list[str], tmp_path: Path) -> None:
    card = Bundle.open(models[0].removeprefix("local-dir:")).card
    write_bundle(tmp_path / "bare", card, {"single.onnx": b""})

    with pytest.raises(MissingFile, match=r"weights\.safetensors"):
        Shelf([f"local-dir:{tmp_path / 'bare'}"])
