from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from training.objectives import Batch, MultiExit, NeoKd, Step, TrainingAttack
from training.objectives.exits import EVAL_ATTACK, TRUE_CLASS, dealt_classes, neighbour_targets, orthogonal_targets
from zoo.attacks import LinfBudget, apgd, apgd_targeted, average_exits, max_average_exits, pgd, square
from zoo.errors import BadInput
from zoo.networks import build
from zoo.weights.models import AtExit

STEP = Step(seed=0, number=3)
ATTACK = TrainingAttack(eps=0.1, steps=2, step_size=0.06, batch_norm="eval")


def deal(classes: int, exits: int, seed: int = 0) -> Tensor:
    return dealt_classes(classes, exits, torch.Generator().manual_seed(seed))


def entropy(probabilities: Tensor) -> float:
    return float(-(probabilities * probabilities.log()).sum(1).mean())


# ---- the classes of each exit ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("classes", "exits"), [(10, 3), (7, 3), (10, 2), (4, 3), (100, 7), (200, 5)])
def test_each_exit_gets_its_share_of_the_wrong_classes_and_never_the_true_one(classes: int, exits: int) -> None:
    owners = deal(classes, exits)
    size = (classes - 1) // exits
    assert owners.shape == (classes, classes)
    for true_class, row in enumerate(owners):
        assert [int((row == index).sum()) for index in range(exits)] == [size] * exits
        assert int((row == exits).sum()) == classes - 1 - exits * size  # nobody's
        assert (row == TRUE_CLASS).nonzero().flatten().tolist() == [true_class]


def test_every_class_is_dealt_to_every_exit_equally_often() -> None:
    number, classes, exits = 3000, 8, 3
    owners = torch.stack([deal(classes, exits, seed) for seed in range(number)])
    wrong = ~torch.eye(classes, dtype=torch.bool)
    for index, share in [(0, 2 / 7), (1, 2 / 7), (2, 2 / 7), (3, 1 / 7)]:  # of 7 wrong classes one is left over
        found = (owners == index).double().mean(0)[wrong]
        assert float((found - share).abs().max()) < 5 * math.sqrt(share * (1 - share) / number)


def test_true_classes_are_dealt_for_independently() -> None:
    # in the deal for class 0 and in that for class 1, classes 2 and 3 go to the same exit independently
    owners = torch.stack([deal(10, 3, seed) for seed in range(3000)])
    together = (owners[:, 0, 2] == owners[:, 1, 2]).double().mean()
    assert float(together) == pytest.approx(1 / 3, abs=0.05)


def test_exits_learn_from_disjoint_classes_beside_the_true_one() -> None:
    generator = torch.Generator().manual_seed(1)
    clean = [torch.randn(40, 10, generator=generator) for _ in range(3)]
    labels = torch.randint(0, 10, (40,), generator=generator)
    targets = torch.stack(orthogonal_targets(clean, labels, deal(10, 3)))
    torch.testing.assert_close(targets.sum(2), torch.ones(3, 40))
    kept = targets > 0
    assert bool((kept.sum(2) == 4).all())
    true = nn.functional.one_hot(labels, 10).bool()
    assert bool(kept[:, true].all())
    assert bool((kept[:, ~true].sum(0) <= 1).all())


# ---- by hand: three exits, seven classes, true class 0 ---------------------------------------------------------------

CLEAN = [
    torch.tensor([[0.4, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]]).log(),
    torch.tensor([[0.1, 0.4, 0.1, 0.1, 0.1, 0.1, 0.1]]).log(),
    torch.tensor([[0.1, 0.1, 0.4, 0.1, 0.1, 0.1, 0.1]]).log(),
]
ADVERSARIAL = [torch.tensor([[0.7, 0.05, 0.05, 0.05, 0.05, 0.05, 0.05]]).log()] * 3
LOG_TRUE, LOG_WRONG = math.log(0.7), math.log(0.05)
ONE = Batch(torch.zeros(1, 1, 1, 1), torch.tensor([0]))


def test_each_exit_is_taught_by_the_mean_of_its_neighbours_and_itself() -> None:
    first, middle, last = neighbour_targets(CLEAN)
    torch.testing.assert_close(first, torch.tensor([[0.25, 0.25, 0.1, 0.1, 0.1, 0.1, 0.1]]))
    torch.testing.assert_close(middle, torch.tensor([[0.2, 0.2, 0.2, 0.1, 0.1, 0.1, 0.1]]))
    torch.testing.assert_close(last, torch.tensor([[0.1, 0.25, 0.25, 0.1, 0.1, 0.1, 0.1]]))


def test_without_its_own_answer_an_exit_is_taught_by_its_neighbours_alone() -> None:
    first, middle, last = neighbour_targets(CLEAN, own_exit=False)
    torch.testing.assert_close(first, CLEAN[1].exp())
    torch.testing.assert_close(middle, torch.tensor([[0.25, 0.1, 0.25, 0.1, 0.1, 0.1, 0.1]]))
    torch.testing.assert_close(last, CLEAN[1].exp())
    of_two = neighbour_targets(CLEAN[:2], own_exit=False)
    torch.testing.assert_close(of_two, [CLEAN[1].exp(), CLEAN[0].exp()])


def test_the_inner_exits_of_a_deep_network_have_two_neighbours() -> None:
    # exit i is certain of class i
    clean = [(100.0 * nn.functional.one_hot(torch.tensor([index]), 7)).float() for index in range(5)]
    supports = [
        target[0].nonzero().flatten().tolist() for target in (t.round(decimals=3) for t in neighbour_targets(clean))
    ]
    assert supports == [[0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4], [3, 4]]


def test_the_neighbour_loss_by_hand() -> None:
    # the true class has 0.25, 0.2 and 0.1 of the three targets
    expected = -sum(share * LOG_TRUE + (1 - share) * LOG_WRONG for share in (0.25, 0.2, 0.1))
    found = NeoKd(alpha=1.0, beta=0.0).adversarial_term(ADVERSARIAL, CLEAN, ONE, STEP)
    assert float(found) == pytest.approx(expected, rel=1e-6)
    assert expected == pytest.approx(7.5357153, abs=1e-6)


def test_the_orthogonal_targets_by_hand() -> None:
    owners = torch.full((7, 7), 3)
    owners[0] = torch.tensor([TRUE_CLASS, 0, 0, 1, 1, 2, 2])
    first, middle, last = orthogonal_targets(CLEAN, torch.tensor([0]), owners)
    torch.testing.assert_close(first, torch.tensor([[4, 1, 1, 0, 0, 0, 0]]) / 6)
    torch.testing.assert_close(middle, torch.tensor([[1, 0, 0, 1, 1, 0, 0]]) / 3)
    torch.testing.assert_close(last, torch.tensor([[1, 0, 0, 0, 0, 1, 1]]) / 3)


def test_an_exit_that_is_certain_of_a_class_it_may_not_keep_still_has_a_target() -> None:
    # probabilities of what it keeps are all 0 in float32, and their quotient would be 0 / 0
    certain = 500.0 * nn.functional.one_hot(torch.tensor([5]), 7)
    owners = torch.tensor([[TRUE_CLASS, 0, 0, 1, 1, 2, 2]])
    (target,) = orthogonal_targets([certain], torch.tensor([0]), owners)
    torch.testing.assert_close(target, torch.tensor([[1, 1, 1, 0, 0, 0, 0]]) / 3)


def test_the_orthogonal_loss_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    owners = torch.full((7, 7), 3)
    owners[0] = torch.tensor([TRUE_CLASS, 0, 0, 1, 1, 2, 2])
    monkeypatch.setattr("training.objectives.exits.dealt_classes", lambda *_: owners)
    expected = -sum(share * LOG_TRUE + (1 - share) * LOG_WRONG for share in (2 / 3, 1 / 3, 1 / 3))
    found = NeoKd(alpha=0.0, beta=1.0).adversarial_term(ADVERSARIAL, CLEAN, ONE, STEP)
    assert float(found) == pytest.approx(expected, rel=1e-6)
    assert expected == pytest.approx(5.4684537, abs=1e-6)


def test_both_losses_are_weighted_and_each_exit_by_its_gamma() -> None:
    # all wrong classes are alike, so that every deal gives the same: the true class has 0.4 of the neighbours' target
    # and 0.4 / (0.4 + 2 * 0.1) of the orthogonal one
    clean = [CLEAN[0]] * 3
    neighbour = -(0.4 * LOG_TRUE + 0.6 * LOG_WRONG)
    orthogonal = -(2 / 3 * LOG_TRUE + 1 / 3 * LOG_WRONG)

    def found(**fields: Any) -> float:
        return float(NeoKd(**fields).adversarial_term(ADVERSARIAL, clean, ONE, STEP))

    assert found() == pytest.approx(3 * (3 * neighbour + orthogonal), rel=1e-6)
    assert found(gamma=2.0) == pytest.approx(6 * (3 * neighbour + orthogonal), rel=1e-6)
    assert found(alpha=0.5, beta=4.0, gamma=(1.0, 1.5, 0.0)) == pytest.approx(
        2.5 * (0.5 * neighbour + 4 * orthogonal), rel=1e-6
    )


def test_a_temperature_softens_teacher_and_student_and_scales_the_loss_back() -> None:
    clean, adversarial = [4 * logits for logits in CLEAN], [4 * logits for logits in ADVERSARIAL]
    warm = NeoKd(temperature=4.0).adversarial_term(adversarial, clean, ONE, STEP)
    assert float(warm) == pytest.approx(16 * float(NeoKd().adversarial_term(ADVERSARIAL, CLEAN, ONE, STEP)), rel=1e-5)


def test_an_answer_that_already_is_its_target_costs_its_entropy() -> None:
    # it is a cross-entropy, not a divergence, which would add nothing
    same = [torch.randn(5, 7, generator=torch.Generator().manual_seed(0))] * 3
    batch = Batch(torch.zeros(5, 1, 1, 1), torch.tensor([0, 1, 2, 3, 4]))
    found = NeoKd(alpha=1.0, beta=0.0).adversarial_term(same, same, batch, STEP)
    assert float(found) == pytest.approx(3 * entropy(same[0].softmax(1)), rel=1e-5)


# ---- gradients -------------------------------------------------------------------------------------------------------


def test_no_gradient_flows_through_what_teaches() -> None:
    clean, adversarial = ([torch.randn(4, 7, requires_grad=True) for _ in range(3)] for _ in range(2))
    labels = torch.tensor([0, 1, 2, 3])
    assert not any(target.requires_grad for target in neighbour_targets(clean))
    assert not any(target.requires_grad for target in orthogonal_targets(clean, labels, deal(7, 3)))
    loss = NeoKd().adversarial_term(adversarial, clean, Batch(torch.zeros(4, 1, 1, 1), labels), STEP)
    found = torch.autograd.grad(loss, [*clean, *adversarial], allow_unused=True)
    assert found[:3] == (None, None, None)
    assert all(bool(gradient.any()) for gradient in found[3:])


def test_an_exit_is_drawn_to_the_weighted_mean_of_its_two_targets() -> None:
    # d/dz of the soft cross-entropies is (alpha + beta) softmax(z) - alpha T - beta O, per image
    generator = torch.Generator().manual_seed(2)
    clean = [torch.randn(4, 7, generator=generator) for _ in range(3)]
    adversarial = [torch.randn(4, 7, generator=generator).requires_grad_() for _ in range(3)]
    labels = torch.tensor([6, 1, 2, 0])
    loss = NeoKd(gamma=(1.0, 2.0, 0.5)).adversarial_term(
        adversarial, clean, Batch(torch.zeros(4, 1, 1, 1), labels), STEP
    )
    found = torch.autograd.grad(loss, adversarial)
    owners = dealt_classes(7, 3, torch.Generator().manual_seed(STEP.rng("classes").getrandbits(63)))
    neighbours, orthogonal = neighbour_targets(clean), orthogonal_targets(clean, labels, owners)
    for index, gamma in enumerate((1.0, 2.0, 0.5)):
        expected = gamma * (4 * adversarial[index].softmax(1) - 3 * neighbours[index] - orthogonal[index]) / 4
        torch.testing.assert_close(found[index], expected.detach())


class Exits(nn.Module):
    """A convolution with BatchNorm, then exits that see it through ever more linear layers."""

    def __init__(self, exits: int = 3, classes: int = 7) -> None:
        super().__init__()
        self.num_exits = exits
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
        self.trunk = nn.ModuleList(nn.Sequential(nn.Linear(36, 36), nn.ReLU()) for _ in range(exits))
        self.heads = nn.ModuleList(nn.Linear(36, classes) for _ in range(exits))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features, answers = self.stem(images), []
        for layer, head in zip(self.trunk, self.heads, strict=True):
            features = layer(features)
            answers.append(head(features))
        return tuple(answers)


@pytest.fixture
def network() -> Exits:
    torch.manual_seed(0)
    return Exits().train()


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    return Batch(torch.rand(6, 1, 5, 5, generator=generator), torch.tensor([0, 1, 2, 3, 4, 6]))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def naive_loss(network: Exits, batch: Batch, examples: Tensor, owners: Tensor) -> Tensor:
    """NEO-KD by the text: image for image, exit for exit, class for class."""
    clean, adversarial = network(batch.images), network(examples)
    p = [logits.detach().softmax(1) for logits in clean]
    loss = torch.zeros(())
    for row, label in enumerate(batch.labels.tolist()):
        for exit_index in range(3):
            q = adversarial[exit_index][row].softmax(0)
            loss = loss - clean[exit_index][row].softmax(0)[label].log() - q[label].log()
            neighbours = [p[other][row] for other in range(3) if abs(other - exit_index) <= 1]
            own = [other for other in range(7) if other == label or int(owners[label, other]) == exit_index]
            kept = sum(float(p[exit_index][row, other]) for other in own)
            for other in range(7):
                target = float(sum(neighbour[other] for neighbour in neighbours)) / len(neighbours)
                loss = loss - 3 * target * q[other].log()
                if other in own:
                    loss = loss - float(p[exit_index][row, other]) / kept * q[other].log()
    return loss / len(batch.labels)


def test_a_step_is_the_method_as_written(network: Exits, batch: Batch) -> None:
    twin = copy.deepcopy(network)
    measured = NeoKd(attack=ATTACK).accumulate(network, [batch], STEP)
    examples = max_average_exits(
        copy.deepcopy(twin).eval(),
        batch.images,
        batch.labels,
        LinfBudget(eps=0.1, steps=2, step_size=0.06),
        generator=STEP.generator("attack", 0),
    )
    owners = dealt_classes(7, 3, torch.Generator().manual_seed(STEP.rng("classes").getrandbits(63)))
    loss = naive_loss(twin, batch, examples, owners)
    loss.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(measured["loss"], loss.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients(network), gradients(twin), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("nothing", [{"alpha": 0.0, "beta": 0.0}, {"gamma": 0.0}])
@pytest.mark.parametrize("halved", [False, True])
def test_without_its_two_terms_it_is_adversarial_training_of_all_exits(
    halved: bool, nothing: dict[str, float], network: Exits, batch: Batch
) -> None:
    twin = copy.deepcopy(network)
    found = NeoKd(attack=ATTACK, halved=halved, **nothing).accumulate(network, [batch], STEP)  # type: ignore[arg-type]
    expected = MultiExit(attack=ATTACK, halved=halved).accumulate(twin, [batch], STEP)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert all(torch.equal(gradient, gradients(twin)[name]) for name, gradient in gradients(network).items())


def test_halving_leaves_the_distillation_whole(network: Exits, batch: Batch) -> None:
    whole, half = (
        NeoKd(attack=ATTACK, halved=halved).accumulate(copy.deepcopy(network), [batch], STEP)
        for halved in (False, True)
    )
    assert torch.equal(whole["distillation"], half["distillation"])
    base = float(whole["loss"] - whole["distillation"])
    assert float(half["loss"] - half["distillation"]) == pytest.approx(base / 2, rel=1e-4)


def test_statistics_see_two_batches_a_step(network: Exits, batch: Batch) -> None:
    NeoKd().accumulate(network, [batch], STEP)
    assert int(network.stem[1].num_batches_tracked) == 2


# ---- the step --------------------------------------------------------------------------------------------------------


def test_classes_are_dealt_anew_at_every_step_and_alike_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    dealt: list[Tensor] = []

    def record(*others: Any) -> Tensor:
        dealt.append(dealt_classes(*others))
        return dealt[-1]

    monkeypatch.setattr("training.objectives.exits.dealt_classes", record)
    steps = [STEP, STEP, dataclasses.replace(STEP, number=4), dataclasses.replace(STEP, rank=1)]
    for step in steps:
        NeoKd().adversarial_term(ADVERSARIAL, CLEAN, ONE, step)
    first, again, next_step, other_rank = dealt
    assert torch.equal(first, again)
    assert torch.equal(first, other_rank)
    assert not torch.equal(first, next_step)


def test_an_image_may_come_alone_and_at_any_batch_size(network: Exits, batch: Batch) -> None:
    objective = NeoKd()
    labels = batch.labels
    clean = list(network.eval()(batch.images))
    together = objective.adversarial_term(clean, clean, batch, STEP)
    alone = [
        objective.adversarial_term(
            [logits[row : row + 1] for logits in clean],
            [logits[row : row + 1] for logits in clean],
            Batch(batch.images[row : row + 1], labels[row : row + 1]),
            STEP,
        )
        for row in range(len(labels))
    ]
    torch.testing.assert_close(torch.stack(alone).mean(), together)


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_gamma_must_fit_the_exits(network: Exits) -> None:
    NeoKd(gamma=(1.0, 1.0, 1.5)).check(network)
    with pytest.raises(BadInput, match="gamma has 2 numbers, expected one, or 3: one per exit of the network"):
        NeoKd(gamma=(1.0, 1.5)).check(network)


def test_every_exit_needs_a_class_of_its_own(batch: Batch) -> None:
    NeoKd().check(build("small_cnn3", classes=4))
    with pytest.raises(BadInput, match=r"needs at least 4 classes, got 3; use multi_exit"):
        NeoKd().check(build("small_cnn3", classes=3))
    # a network that does not say the shape of its images is found out in its first step
    few = Exits(classes=3)
    NeoKd().check(few)
    with pytest.raises(BadInput, match="needs at least 4 classes, got 3"):
        NeoKd(attack=ATTACK).accumulate(few, [Batch(batch.images, batch.labels.clamp_max(2))], STEP)


def test_asking_for_the_classes_moves_nothing() -> None:
    network = build("msdnet3").train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    NeoKd().check(network)
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(module.training for module in network.modules())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alpha": -1.0}, "need a finite alpha >= 0, got -1.0"),
        ({"beta": math.inf}, "need a finite beta >= 0, got inf"),
        ({"gamma": -0.5}, "need a finite gamma >= 0, got -0.5"),
        ({"gamma": (1.0, math.nan)}, "need a finite gamma >= 0, got nan"),
        ({"temperature": -1.0}, "need a finite temperature > 0, got -1.0"),
        ({"attack": None}, "neo_kd teaches adversarial examples and needs an attack, got none"),
        ({"attacked": "worst"}, "attacked must be one of"),
    ],
)
def test_fields_that_make_no_sense_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        NeoKd(**fields)


def test_the_defaults_are_those_of_the_page() -> None:
    default = NeoKd()
    assert (default.alpha, default.beta, default.gamma) == (3.0, 1.0, 1.0)
    assert (default.attacked, default.halved, default.own_exit, default.temperature) == (
        "max-average",
        False,
        True,
        1.0,
    )
    assert default.attack == EVAL_ATTACK == TrainingAttack(eps=8 / 255, steps=10, step_size=2 / 255, batch_norm="eval")


# ---- gradient masking, as the page says to look for it ---------------------------------------------------------------


class Columns(nn.Module):
    """Exit i answers the class whose pixel column is brightest; its logits are `scales[i]` times the brightness."""

    def __init__(self, *scales: float) -> None:
        super().__init__()
        self.num_exits = len(scales)
        self.scales = scales

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(scale * images.mean((1, 2)) for scale in self.scales)


def test_an_exit_whose_gradients_vanish_withstands_pgd_and_falls_to_dlr_and_square() -> None:
    images = torch.full((3, 1, 2, 5), 0.4)
    labels = torch.tensor([0, 2, 4])
    images[torch.arange(3), :, :, labels] = 0.5  # 0.1 above the others: eps 0.06 is enough to change the answer
    budget = LinfBudget(eps=0.06, steps=20, random_start=False)
    masked = Columns(10.0, 1e5)

    def accuracy(exit_index: int, name: str) -> float:
        exit_alone = AtExit(masked, exit_index).eval()
        generator = torch.Generator().manual_seed(0)
        attacks: dict[str, Callable[..., Tensor]] = {
            "pgd": pgd,
            "apgd-dlr": partial(apgd, loss="dlr"),
            "apgd-t": apgd_targeted,
            "square": partial(square, queries=300),
        }
        adversarial = attacks[name](exit_alone, images, labels, budget, generator=generator)
        assert float((adversarial - images).abs().max()) <= 0.06 + 1e-6
        return float((exit_alone(adversarial).argmax(1) == labels).double().mean())

    assert [accuracy(index, "pgd") for index in range(2)] == [0.0, 1.0]
    for name in ("apgd-dlr", "apgd-t", "square"):
        assert [accuracy(index, name) for index in range(2)] == [0.0, 0.0], name


@pytest.mark.parametrize("several", [average_exits, max_average_exits])
def test_the_attacks_on_all_exits_take_a_loss_that_does_not_vanish(several: Callable[..., Tensor]) -> None:
    images = torch.full((1, 1, 2, 5), 0.4)
    images[..., 1] = 0.5
    labels, network = torch.tensor([1]), Columns(1e5, 1e6)
    budget = LinfBudget(eps=0.06, steps=20, random_start=False)
    assert torch.equal(several(network, images, labels, budget), images)
    broken = several(network, images, labels, budget, loss="dlr")
    assert not any(bool((logits.argmax(1) == labels).any()) for logits in network(broken))
