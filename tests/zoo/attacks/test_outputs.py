"""What a model returns: logits are found and checked, anything else is refused in one sentence."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.attacks import (
    L2Budget,
    LinfBudget,
    apgd,
    apgd_eot,
    apgd_targeted,
    eot_pgd,
    fgsm,
    pgd,
    square,
)
from zoo.attacks.outputs import logits_of
from zoo.errors import BadInput, UnknownName

EPS = 8 / 255
LINF = LinfBudget(eps=EPS, steps=3)
Attack = Callable[..., Tensor]


def test_a_gradient_that_is_nan_is_refused(
    gradient_attack: Attack, model: nn.Module, images: Tensor, labels: Tensor
) -> None:
    def rooted(pixels: Tensor) -> Tensor:
        largest = pixels.amax((1, 2, 3))
        return model(pixels) + 0 * (largest - largest.detach()).abs().sqrt()[:, None]

    with pytest.raises(BadInput, match="gradient of 6 of 6 images is NaN"):
        gradient_attack(rooted, images, labels, LINF)


def test_a_gradient_that_is_nan_makes_no_euclidean_image_of_nan(
    model: nn.Module, images: Tensor, labels: Tensor
) -> None:
    def rooted(pixels: Tensor) -> Tensor:
        return model(pixels) + 0 * (pixels - pixels.detach()).abs().sqrt().sum((1, 2, 3))[:, None]

    for attack in (pgd, fgsm):
        with pytest.raises(BadInput, match="NaN"):
            attack(rooted, images, labels, L2Budget(steps=2))


def test_nan_is_no_class_0(every_attack: Attack, model: nn.Module, images: Tensor) -> None:
    model.linear.weight.data[0, 0] = torch.nan
    zeros = torch.zeros(6, dtype=torch.int64)
    with pytest.raises(BadInput, match="NaN"):
        every_attack(model, images, zeros, LINF)
    with pytest.raises(BadInput, match="NaN"):
        logits_of(model, images)


@pytest.mark.parametrize("attack", ["pgd", "apgd", "square", "rays"], indirect=True)
def test_nan_that_comes_later_is_refused_as_well(
    attack: Attack, model: nn.Module, images: Tensor, labels: Tensor
) -> None:
    calls: list[int] = []

    def tiring(pixels: Tensor) -> Tensor:
        calls.append(len(pixels))
        return model(pixels) * (torch.nan if len(calls) > 3 else 1.0)

    with pytest.raises(BadInput, match="NaN"):
        attack(tiring, images, labels, LinfBudget(eps=1e-4, steps=5))


@dataclass
class Answer:
    logits: Tensor
    hidden: Tensor | None = None


RETURNED: dict[str, Callable[[Tensor], Any]] = {
    "a dict": lambda logits: {"logits": logits},
    "a tuple": lambda logits: (logits, 1),
    "a list": lambda logits: [logits],
    "an object": Answer,
    "classes": lambda logits: logits.argmax(1),
    "whole numbers": lambda logits: (100 * logits).long(),
    "numpy": lambda logits: logits.detach().numpy(),
    "nothing": lambda logits: None,
    "a row less": lambda logits: logits[1:],
    "a row more": lambda logits: torch.cat([logits, logits[:1]]),
    "one column": lambda logits: logits[:, :1],
    "no classes": lambda logits: logits[:, 0],
    "a map": lambda logits: logits[:, :, None, None],
    "the wrong way": lambda logits: logits.T,
    "complex": lambda logits: logits.to(torch.complex64),
    "text": lambda logits: "cat",
    "an error": lambda logits: logits[:, 99],
}


@pytest.mark.parametrize("kind", RETURNED)
def test_what_is_no_tensor_of_logits_is_refused_in_a_sentence(
    kind: str, model: nn.Module, images: Tensor, labels: Tensor
) -> None:
    with pytest.raises(BadInput):
        pgd(lambda pixels: RETURNED[kind](model(pixels)), images, labels, LINF)


def test_output_picks_the_logits(attack: Attack, model: nn.Module, images: Tensor, labels: Tensor) -> None:
    def run(given: Any, **options: Any) -> Tensor:
        torch.manual_seed(5)
        return attack(given, images, labels, LINF, **options)

    assert torch.equal(run(lambda pixels: RETURNED["a dict"](model(pixels)), output="logits"), run(model))


@pytest.mark.parametrize(
    ("kind", "output"),
    [("a tuple", 0), ("a list", -1), ("an object", "logits"), ("a dict", lambda raw: raw["logits"])],
)
def test_output_is_a_position_an_attribute_a_key_or_a_function(
    kind: str, output: Any, model: nn.Module, images: Tensor, labels: Tensor
) -> None:
    found = fgsm(lambda pixels: RETURNED[kind](model(pixels)), images, labels, LINF, output=output)
    assert torch.equal(found, fgsm(model, images, labels, LINF))


@pytest.mark.parametrize("output", ["logit", 7, lambda raw: raw["logit"], lambda raw: raw])
def test_output_that_is_not_there_is_refused(output: Any, model: nn.Module, images: Tensor, labels: Tensor) -> None:
    with pytest.raises(BadInput):
        pgd(lambda pixels: {"logits": model(pixels)}, images, labels, LINF, output=output)


def test_a_model_that_squeezes_one_image_away_is_refused_in_a_sentence(
    model: nn.Module, images: Tensor, labels: Tensor
) -> None:
    def outside(pixels: Tensor) -> Tensor:
        return model(pixels).squeeze()  # type: ignore[no-any-return]

    def inside(pixels: Tensor) -> Tensor:
        return model.linear(model.conv(pixels).mean((2, 3), keepdim=True).squeeze().unflatten(1, (4, 1)).sum(2))  # type: ignore[no-any-return]

    for squeezing in (outside, inside):
        right = squeezing(images).argmax(1)
        assert pgd(squeezing, images, right, LINF).shape == images.shape
        with pytest.raises(BadInput, match="batch"):
            pgd(squeezing, images[:1], right[:1], LINF)


def test_a_forward_that_is_detached_is_refused_in_a_sentence(
    gradient_attack: Attack, model: nn.Module, images: Tensor, labels: Tensor
) -> None:
    for detached in (lambda pixels: model(pixels.detach()), torch.no_grad()(model.forward)):
        with pytest.raises(BadInput, match="no gradient"):
            gradient_attack(detached, images, labels, LINF)


@pytest.mark.parametrize("layout", ["sparse", "meta"])
def test_logits_without_dense_values_are_refused(layout: str, model: nn.Module, images: Tensor, labels: Tensor) -> None:
    def answer(pixels: Tensor) -> Tensor:
        logits: Tensor = model(pixels)
        return logits.to_sparse() if layout == "sparse" else logits.to("meta")

    with pytest.raises(BadInput, match="dense"):
        pgd(answer, images, labels, LINF)


class TheirError(Exception):
    pass


@pytest.mark.parametrize("error", [AssertionError, ZeroDivisionError, OSError, StopIteration, TheirError])
def test_whatever_a_model_raises_is_said_in_a_sentence(error: type[Exception], images: Tensor, labels: Tensor) -> None:
    def failing(pixels: Tensor) -> Tensor:
        raise error("no")

    with pytest.raises(BadInput, match=f"the model fails on images .*{error.__name__}"):
        pgd(failing, images, labels, LINF)


class FailsBackwards(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, hidden: Tensor) -> Tensor:
        return hidden.clone()

    @staticmethod
    def backward(context: Any, *gradients: Any) -> Tensor:
        raise TheirError("no")


def test_what_fails_backwards_is_said_in_a_sentence(
    gradient_attack: Attack, model: nn.Module, images: Tensor, labels: Tensor
) -> None:
    with pytest.raises(BadInput, match="TheirError"):
        gradient_attack(lambda pixels: model(FailsBackwards.apply(pixels)), images, labels, LINF)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, UnknownName, KeyboardInterrupt])
def test_what_is_not_the_models_fault_passes(error: Any, images: Tensor, labels: Tensor) -> None:
    raised = error("a", ["b"]) if error is UnknownName else error("no")

    def failing(pixels: Tensor) -> Tensor:
        raise raised

    with pytest.raises(error):
        pgd(failing, images, labels, LINF)


@pytest.mark.parametrize(
    "attack",
    [
        functools.partial(pgd, loss="dlr"),
        functools.partial(apgd, loss="dlr"),
        apgd_targeted,
        functools.partial(square, loss="dlr", queries=5),
        lambda model, *rest: eot_pgd(lambda: model, *rest, draws=2, loss="dlr"),
        lambda model, *rest: apgd_eot(lambda: model, *rest, draws=2, loss="dlr"),
    ],
)
def test_dlr_among_two_possible_classes_is_refused(attack: Attack, images: Tensor) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(192, 2))
    labels = plain(images).argmax(1)
    for classes in (2, 5):
        mask = torch.tensor([0.0, 0.0, -torch.inf, -torch.inf, -torch.inf])[:classes]

        def masked(pixels: Tensor, classes: int = classes, mask: Tensor = mask) -> Tensor:
            return F.pad(plain(pixels), (0, classes - 2)) + mask

        with pytest.raises(BadInput, match="margin"):
            attack(masked, images, labels, LINF)


@pytest.mark.parametrize(
    "loss",
    [
        F.cross_entropy,
        lambda logits, labels, targets=None: F.cross_entropy(logits, labels, reduction="none")[:, None],
        lambda logits, labels, targets=None: 1.0,
        lambda logits, labels: -logits[:, 0],
        lambda logits, labels, targets=None: 1 / 0,
        3,
    ],
)
def test_a_loss_is_one_number_for_each_image(loss: Any, model: nn.Module, images: Tensor, labels: Tensor) -> None:
    with pytest.raises(BadInput, match="loss"):
        pgd(model, images, labels, LINF, loss=loss)
