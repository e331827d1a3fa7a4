from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from zoo.attacks import LOSSES, LinfBudget, pgd
from zoo.attacks.losses import ascent, cross_entropy, dlr, margin
from zoo.errors import BadInput, UnknownName
from zoo.gates.derive import mean_probability


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3


@pytest.fixture
def labels() -> Tensor:
    return torch.randint(0, 6, (40,), generator=torch.Generator().manual_seed(1))


def test_the_margin_is_positive_exactly_where_the_answer_is_wrong(logits: Tensor, labels: Tensor) -> None:
    wrong = logits.argmax(1) != labels
    assert torch.equal(margin(logits, labels) > 0, wrong)
    assert torch.equal(dlr(logits, labels) > 0, wrong)


@pytest.mark.parametrize("name", LOSSES)
def test_a_constant_added_to_the_logits_changes_no_loss(name: str, logits: Tensor, labels: Tensor) -> None:
    """The published margin loss does change: it takes the true class for a logit of 0."""
    for shift in (-20.0, 20.0):
        torch.testing.assert_close(LOSSES[name](logits + shift, labels), LOSSES[name](logits, labels))
        if name in ("margin", "dlr"):
            targets = (labels + 1) % 6
            shifted = LOSSES[name](logits + shift, labels, targets)
            torch.testing.assert_close(shifted, LOSSES[name](logits, labels, targets))


def test_a_factor_on_the_logits_changes_the_ratio_of_differences_not_at_all(logits: Tensor, labels: Tensor) -> None:
    torch.testing.assert_close(dlr(logits * 1000, labels), dlr(logits, labels))


def test_the_losses_are_what_their_formulas_say() -> None:
    logits, labels = torch.tensor([[3.0, 1.0, -1.0, 0.5]]), torch.tensor([0])
    targets = torch.tensor([2])
    assert float(margin(logits, labels)) == pytest.approx(1 - 3)
    assert float(margin(logits, labels, targets)) == pytest.approx(-1 - 3)
    assert float(margin(torch.tensor([[0.0, 5.0, 0.0, 0.0]]), labels, confidence=0.1)) == pytest.approx(0.1)
    assert float(dlr(logits, labels)) == pytest.approx(-(3 - 1) / (3 - 0.5))
    assert float(dlr(logits, labels, targets)) == pytest.approx(-(3 + 1) / (3 - (0.5 - 1) / 2))
    assert float(cross_entropy(logits, labels)) == pytest.approx(-math.log(math.exp(3) / logits.exp().sum()))
    assert float(cross_entropy(logits, labels, targets)) == pytest.approx(math.log(math.exp(-1) / logits.exp().sum()))


def test_the_margin_keeps_its_gradient_on_log_probabilities_of_an_ensemble_and_the_published_one_does_not() -> None:
    """Log-probabilities are all negative; with the true class multiplied by zero the best wrong "logit" is 0."""
    members = torch.randn(3, 8, 10, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    labels = torch.arange(8) % 10
    confidence = 0.1

    def gradient_of(loss: object) -> Tensor:
        logits = mean_probability(members).requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss(logits).sum(), logits)  # type: ignore[operator]
        return gradient

    def published(logits: Tensor) -> Tensor:
        chosen = torch.nn.functional.one_hot(labels, 10)
        other = ((1 - chosen) * logits).amax(1)
        return -torch.relu((chosen * logits).sum(1) - other + confidence)

    assert bool((gradient_of(lambda logits: margin(logits, labels)).abs().amax(1) > 0).all())
    assert bool((gradient_of(lambda logits: margin(logits, labels, confidence=confidence)).abs().amax(1) > 0).any())
    assert float(gradient_of(published).abs().max()) == 0


def test_saturated_logits_hide_the_gradient_of_the_cross_entropy_only() -> None:
    images, labels = torch.full((1, 3, 2, 2), 0.5), torch.tensor([0])

    def model(pixels: Tensor) -> Tensor:
        score = pixels.mean((1, 2, 3)) - 0.49
        return torch.stack([score, -score, score - 1, score - 2], 1) * 1e5

    size = {name: float(ascent(model, name)(images, labels, None)[0].abs().sum()) for name in LOSSES}
    assert size["cross_entropy"] == 0
    assert min(size["margin"], size["dlr"]) > 0
    budget = LinfBudget(eps=0.05, random_start=False)
    assert int(model(pgd(model, images, labels, budget)).argmax()) == 0, "the attack is blind, the model is not robust"
    assert int(model(pgd(model, images, labels, budget, loss="margin")).argmax()) == 1


def test_a_targeted_attack_reaches_its_target_or_nothing() -> None:
    """Three colours: the class is the strongest; green is near, blue is out of reach."""
    images = torch.zeros(2, 3, 4, 4)
    images[:, 0], images[:, 1] = 0.5, 0.45
    labels, targets = torch.tensor([0, 0]), torch.tensor([1, 2])

    def model(pixels: Tensor) -> Tensor:
        return pixels.mean((2, 3)) * 10

    for loss in ("cross_entropy", "margin"):
        adversarial = pgd(model, images, labels, LinfBudget(eps=0.05), loss=loss, targets=targets)
        assert model(adversarial).argmax(1).tolist() == [1, 0], loss


def test_too_few_classes_for_a_ratio_of_differences_are_refused() -> None:
    with pytest.raises(BadInput, match="at least 3 classes, got 2; use the margin loss"):
        dlr(torch.zeros(1, 2), torch.tensor([0]))
    with pytest.raises(BadInput, match="at least 4 classes, got 3"):
        dlr(torch.zeros(1, 3), torch.tensor([0]), torch.tensor([1]))


IMAGES = torch.full((2, 3, 4, 4), 0.5)


def colours(pixels: Tensor) -> Tensor:
    return pixels.mean((2, 3))


@pytest.mark.parametrize(
    ("labels", "targets", "message"),
    [
        ([0, 3], None, r"label 3 is out of range, expected 0 to 2: the model has 3 classes"),
        ([0, -1], None, r"labels must be classes from 0 on, got -1"),
        ([0], None, r"labels must be int64 of shape \(2,\), one per image, got torch.int64 of shape \(1,\)"),
        ([0.0, 1.0], None, "labels must be int64"),
        ([0, 1], [1, 3], "target 3 is out of range"),
        ([0, 1], [1, 1], "the target of image 1 is its label, 1; a targeted attack needs another"),
        ([0, 1], [1], r"targets must be int64 of shape \(2,\)"),
    ],
)
def test_labels_and_targets_that_fit_nothing_are_refused(
    labels: list[float], targets: list[int] | None, message: str
) -> None:
    wanted = None if targets is None else torch.tensor(targets)
    with pytest.raises(BadInput, match=message):
        pgd(colours, IMAGES, torch.tensor(labels), LinfBudget(), targets=wanted)


def test_a_model_that_returns_probabilities_is_refused_with_its_reason() -> None:
    with pytest.raises(
        BadInput, match=r"returns probabilities .*expected logits: a softmax in the way hides gradients"
    ):
        pgd(lambda pixels: colours(pixels).softmax(1), IMAGES, torch.tensor([0, 1]), LinfBudget())


def test_log_probabilities_are_taken() -> None:
    result = pgd(lambda pixels: colours(pixels).log_softmax(1), IMAGES, torch.tensor([0, 1]), LinfBudget())
    assert result.shape == IMAGES.shape


def test_an_unknown_loss_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UnknownName, match="loss 'margn'; did you mean 'margin'"):
        pgd(colours, IMAGES, torch.tensor([0, 1]), LinfBudget(), loss="margn")
