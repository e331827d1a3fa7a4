from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.objectives import Adp, Batch, Step
from training.objectives.members import entropy, log_volume
from zoo.errors import BadInput
from zoo.gates.derive import Ensemble
from zoo.gates.rgn import randomly_gate
from zoo.networks import ImageFormat, build

SMALL = ImageFormat(height=16, width=16)
STEP = Step(seed=0, number=3)
OFFSET = 1e-6


def some_batch(size: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(1)
    return Batch(torch.rand(size, 3, 16, 16, generator=generator), torch.randint(0, 10, (size,), generator=generator))


def make_members(number: int = 3) -> Ensemble:
    return Ensemble([build("resnet8", images=SMALL, width=4) for _ in range(number)]).train()


def logits_of(*probabilities: list[float]) -> Tensor:
    """Return the logits (member, 1, class) of members that answer one image so; 0 becomes a logit of -200."""
    return torch.tensor(probabilities, dtype=torch.float64).log().clamp_min(-200)[:, None]


# ---- the determinant -------------------------------------------------------------------------------------------------

TRUE = torch.tensor([0])


def test_the_volume_of_equal_members_is_the_offset() -> None:
    # det [[1 + o, 1], [1, 1 + o]] = 2 o + o^2
    equal = logits_of([0.4, 0.3, 0.2, 0.1], [0.4, 0.3, 0.2, 0.1])
    assert float(log_volume(equal, TRUE, OFFSET)) == pytest.approx(math.log(2 * OFFSET + OFFSET**2))


def test_the_volume_of_members_that_err_on_different_classes_is_1() -> None:
    orthogonal = logits_of([0.7, 0.3, 0.0, 0.0], [0.2, 0.0, 0.8, 0.0])
    assert float(log_volume(orthogonal, TRUE, OFFSET)) == pytest.approx(2 * math.log1p(OFFSET), abs=1e-9)


def test_the_volume_of_two_members_by_hand() -> None:
    # wrong answers (.4, .1, .1) and (.1, .2, .2): cosine .08 / sqrt(.18 * .09) = 0.6285; det = (1 + o)^2 - cos^2
    members = logits_of([0.4, 0.4, 0.1, 0.1], [0.5, 0.1, 0.2, 0.2])
    cosine = 0.08 / math.sqrt(0.18 * 0.09)
    assert float(log_volume(members, TRUE, OFFSET)) == pytest.approx(math.log((1 + OFFSET) ** 2 - cosine**2))


def test_the_volume_does_not_depend_on_how_sure_a_member_is_of_the_true_class() -> None:
    logits = torch.randn(3, 5, 10, dtype=torch.float64)
    labels = torch.randint(0, 10, (5,))
    surer = logits.clone()
    surer[1] += 3 * F.one_hot(labels, 10)
    torch.testing.assert_close(log_volume(logits, labels, OFFSET), log_volume(surer, labels, OFFSET))


def test_the_volume_is_that_of_the_published_formula() -> None:
    logits, labels = torch.randn(4, 5, 10, dtype=torch.float64), torch.randint(0, 10, (5,))
    for image, label in enumerate(labels.tolist()):
        wrong = [index for index in range(10) if index != label]
        rows = logits[:, image].softmax(1)[:, wrong]
        rows = rows / rows.norm(dim=1, keepdim=True)
        expected = torch.det(rows @ rows.T + OFFSET * torch.eye(4, dtype=torch.float64)).log()
        torch.testing.assert_close(log_volume(logits, labels, OFFSET)[image], expected)


def test_a_member_that_is_certain_of_the_true_class_has_a_finite_gradient() -> None:
    logits = torch.zeros(2, 1, 10)
    logits[:, 0, 0] = 300.0  # all other probabilities underflow
    logits[1, 0, 3] = 1.0
    logits.requires_grad_()
    volume = log_volume(logits, TRUE, OFFSET).sum()
    volume.backward()
    assert math.isfinite(float(volume.detach()))
    assert logits.grad is not None
    assert bool(torch.isfinite(logits.grad).all())
    assert float(logits.grad.abs().max()) > 0


# ---- the entropy -----------------------------------------------------------------------------------------------------


def test_the_entropy_is_that_of_the_mean_and_largest_where_certain_members_disagree_on_every_class() -> None:
    certain = 100 * torch.eye(4, dtype=torch.float64)[:, None]  # member i is certain of class i
    assert float(entropy(certain)) == pytest.approx(math.log(4))
    assert float(entropy(certain[:1].expand(4, 1, 4))) == pytest.approx(0, abs=1e-7)
    assert float(entropy(logits_of([0.5, 0.5], [1.0, 0.0]))) == pytest.approx(
        -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    )


def test_both_terms_have_the_gradients_of_finite_differences() -> None:
    logits = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 6, (4,))
    assert torch.autograd.gradcheck(entropy, (logits,))
    assert torch.autograd.gradcheck(lambda values: log_volume(values, labels, OFFSET), (logits,))


# ---- the objective ---------------------------------------------------------------------------------------------------


def test_the_loss_is_made_of_its_terms_and_so_are_its_gradients() -> None:
    model, batch = make_members(), some_batch()
    measured = Adp(alpha=1.5, beta=0.25).accumulate(model, [batch], STEP)
    found = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    logits = torch.stack([member(batch.images) for member in model.members])
    cross_entropy = sum(F.cross_entropy(answer, batch.labels) for answer in logits)
    mean = logits.softmax(2).mean(0)
    spread = -(mean * mean.log()).sum(1).mean()
    loss = cross_entropy - 1.5 * spread - 0.25 * log_volume(logits, batch.labels, 1e-6).mean()
    loss.backward()
    assert float(measured["loss"]) == pytest.approx(float(loss.detach()), rel=1e-5)
    assert float(measured["entropy"]) == pytest.approx(float(spread.detach()), rel=1e-5)
    assert len(found) == len(list(model.parameters()))
    for gradient, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-5)


def test_members_that_are_one_network_span_no_more_than_the_offset() -> None:
    network = build("lenet", images=SMALL)
    measured = Adp().accumulate(Ensemble([network, network]), [some_batch()], STEP)
    assert float(measured["log_volume"]) == pytest.approx(math.log(2 * OFFSET), rel=1e-5)


def test_without_its_terms_it_is_standard_training_of_every_member() -> None:
    model, batch = make_members(), some_batch()
    measured = Adp(alpha=0, beta=0).accumulate(model, [batch], STEP)
    losses = [float(F.cross_entropy(member(batch.images), batch.labels).detach()) for member in model.members]
    assert float(measured["loss"]) == pytest.approx(sum(losses))


def test_training_drives_members_apart() -> None:
    model, batch = make_members(2), some_batch()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    volumes = []
    for number in range(20):
        optimizer.zero_grad()
        volumes.append(float(Adp().accumulate(model, [batch], Step(seed=0, number=number))["log_volume"]))
        optimizer.step()
    assert volumes[-1] > volumes[0] + 1


def test_random_paths_of_a_gated_network_stand_for_members() -> None:
    rgn = randomly_gate(build("resnet8", images=SMALL, width=4), candidates=2).train()
    seen: set[tuple[bool, ...]] = set()
    for number in range(5):
        rgn.zero_grad(set_to_none=True)
        measured = Adp(paths=2).accumulate(rgn, [some_batch()], Step(seed=0, number=number))
        assert float(measured["log_volume"]) > math.log(2 * OFFSET)  # the paths differ
        used = [any(p.grad is not None for p in alternative.parameters()) for gate in rgn.bank for alternative in gate]
        seen.add(tuple(used))
        assert all(used[index] or used[index + 1] for index in range(0, len(used), 2))
    assert len(seen) > 1


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: build("lenet", images=SMALL), "adp trains several networks against each other, got 1"),
        (lambda: Ensemble([build("lenet", images=SMALL)]), "adp trains several networks against each other, got 1"),
        (
            lambda: randomly_gate(build("lenet", images=SMALL), candidates=1),
            "adp draws 3 distinct paths, and 2 gates of 1 candidates have only 1; set paths lower or candidates=2",
        ),
        (lambda: Ensemble([build("small_cnn3", images=SMALL)] * 2), "adp trains networks with one exit"),
    ],
)
def test_a_model_without_several_networks_of_one_exit_is_refused(model: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        Adp().check(model())


def test_members_and_paths_are_accepted() -> None:
    Adp().check(make_members(2))
    Adp().check(randomly_gate(build("lenet", images=SMALL), candidates=2))


def test_more_members_than_wrong_classes_are_refused() -> None:
    model: nn.Module = Ensemble([build("lenet", images=SMALL, classes=3) for _ in range(3)]).train()
    batch = Batch(torch.rand(2, 3, 16, 16), torch.tensor([0, 1]))
    with pytest.raises(BadInput, match="adp spreads members over the wrong classes, and 3 of them cannot differ in 2"):
        Adp().accumulate(model, [batch], STEP)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -1}, "alpha >= 0, got -1"),
        ({"beta": math.inf}, "beta >= 0, got inf"),
        ({"offset": 0}, "0 < offset < 1, got 0"),
        ({"paths": 1}, "at least 2 paths, got 1"),
    ],
)
def test_hyper_parameters_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        Adp(**options)


def test_its_cost_is_a_step_of_every_member_or_path() -> None:
    assert Adp().forwards(networks=5) == 15
    assert Adp(paths=4).forwards(networks=1) == 12
