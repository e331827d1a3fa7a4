from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.objectives import OBJECTIVES, Batch, MultiExit, NeoKd, Objective, Step, TrainingAttack
from training.objectives.exits import EVAL_ATTACK, ExitsObjective
from training.objectives.network import Network
from zoo.attacks import LinfBudget, average_exits, max_average_exits, single_exit
from zoo.errors import BadInput
from zoo.gates.derive import Ensemble
from zoo.gates.rgn import randomly_gate
from zoo.networks import MNIST_FORMAT, build

CLASSES = 7
STEP = Step(seed=0, number=3)
ATTACK = TrainingAttack(eps=0.1, steps=3, step_size=0.04, batch_norm="eval")
ZOO = {
    "single": lambda network, *others, generator: single_exit(network, *others, 2, generator=generator),
    "average": average_exits,
    "max-average": max_average_exits,
}


class ThreeExits(nn.Module):
    """Three blocks of a convolution with BatchNorm, a linear exit behind each."""

    def __init__(self, exits: int = 3, classes: int = CLASSES) -> None:
        super().__init__()
        self.num_exits = exits
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(4 if index else 1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
            for index in range(exits)
        )
        self.heads = nn.ModuleList(nn.Linear(4 * 5 * 5, classes) for _ in range(exits))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        answers = []
        for block, head in zip(self.blocks, self.heads, strict=True):
            images = block(images)
            answers.append(head(images.flatten(1)))
        return tuple(answers)


@pytest.fixture
def network() -> ThreeExits:
    torch.manual_seed(0)
    network = ThreeExits()
    for _ in range(3):
        network(torch.rand(8, 1, 5, 5))
    return network.train()


@pytest.fixture
def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    return Batch(torch.rand(6, 1, 5, 5, generator=generator), torch.randint(0, CLASSES, (6,), generator=generator))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def batches_tracked(model: nn.Module) -> list[int]:
    return [int(b) for name, b in model.named_buffers() if name.endswith("num_batches_tracked")]


def attacked(network: nn.Module, batch: Batch, kind: str, attack: TrainingAttack = ATTACK) -> Tensor:
    """Make the examples of a step by the attacks of the zoo, on a copy in evaluation mode."""
    budget = LinfBudget(eps=attack.eps, steps=attack.steps, step_size=attack.step_size)
    return ZOO[kind](
        copy.deepcopy(network).eval(), batch.images, batch.labels, budget, generator=STEP.generator("attack", 0)
    )


# ---- the loss --------------------------------------------------------------------------------------------------------


def test_clean_training_is_the_sum_of_the_exits_cross_entropies(network: ThreeExits, batch: Batch) -> None:
    twin = copy.deepcopy(network)
    measured = MultiExit().accumulate(network, [batch], STEP)
    answers = twin(batch.images)
    loss = sum(F.cross_entropy(logits, batch.labels) for logits in answers)
    loss.backward()
    torch.testing.assert_close(measured["loss"], loss.detach())
    assert float(measured["distillation"]) == 0
    right = [float((logits.argmax(1) == batch.labels).float().mean()) for logits in answers]
    assert float(measured["accuracy"]) == pytest.approx(sum(right) / 3)
    assert "adversarial_accuracy" not in measured
    torch.testing.assert_close(gradients(network), gradients(twin))


@pytest.mark.parametrize("halved", [False, True])
@pytest.mark.parametrize("kind", ZOO)
def test_adversarial_training_adds_the_same_sum_on_examples_of_the_network_as_it_was(
    kind: str, halved: bool, network: ThreeExits, batch: Batch
) -> None:
    twin = copy.deepcopy(network)
    objective = MultiExit(attack=ATTACK, attacked=kind, halved=halved)  # type: ignore[arg-type]
    measured = objective.accumulate(network, [batch], STEP)
    examples = attacked(twin, batch, kind)
    loss = torch.zeros(())
    for images in (batch.images, examples):  # each with its own statistics
        for logits in twin(images):
            loss = loss + (0.5 if halved else 1.0) * F.cross_entropy(logits, batch.labels)
    loss.backward()
    torch.testing.assert_close(measured["loss"], loss.detach())
    torch.testing.assert_close(gradients(network), gradients(twin))
    torch.testing.assert_close(buffers(network), buffers(twin))


def test_gradients_are_added_to_those_already_there(network: ThreeExits, batch: Batch) -> None:
    twin = copy.deepcopy(network)
    objective = MultiExit(attack=ATTACK, distillation="self")
    objective.accumulate(network, [batch], STEP)
    for parameter in twin.parameters():
        parameter.grad = torch.ones_like(parameter)
    objective.accumulate(twin, [batch], STEP)
    torch.testing.assert_close(gradients(twin), {name: g + 1 for name, g in gradients(network).items()})


# ---- distillation ----------------------------------------------------------------------------------------------------

# Two classes. The teacher says (3/4, 1/4) and the student (1/2, 1/2): KL = 3/4 log(3/2) + 1/4 log(1/2).
TEACHER = torch.tensor([[3.0, 1.0]]).log()
STUDENT = torch.zeros(1, 2)
KL = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
PAIR = Batch(torch.zeros(1, 1, 1, 1), torch.tensor([0]))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_self_distillation_is_the_divergence_from_the_last_exit_times_weight_and_squared_temperature(
    temperature: float,
) -> None:
    objective = MultiExit(distillation="self", weight=0.5, temperature=temperature)
    answers = [temperature * STUDENT, temperature * STUDENT, temperature * TEACHER]
    expected = 0.5 * temperature**2 * 2 * KL
    assert float(objective.clean_term(answers)) == pytest.approx(expected, rel=1e-5)
    nonsense = [torch.full((1, 2), 9.0)] * 3
    assert float(objective.adversarial_term(answers, nonsense, PAIR, STEP)) == pytest.approx(expected, rel=1e-5)


def test_self_distillation_of_exits_that_agree_adds_nothing() -> None:
    # it is a divergence, not a cross-entropy, which would add the entropy of the answer
    answers = [torch.randn(5, CLASSES, generator=torch.Generator().manual_seed(0))] * 3
    assert float(MultiExit(distillation="self").clean_term(answers)) == pytest.approx(0, abs=1e-6)


def test_ard_teaches_every_exits_adversarial_answer_the_last_exits_clean_one() -> None:
    objective = MultiExit(attack=ATTACK, distillation="ard", weight=2.0)
    clean = [torch.full((1, 2), 9.0), torch.full((1, 2), -9.0), TEACHER]
    assert float(objective.clean_term(clean)) == 0
    found = objective.adversarial_term([STUDENT, TEACHER, STUDENT], clean, PAIR, STEP)
    assert float(found) == pytest.approx(2.0 * 2 * KL, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_a_student_moves_towards_the_teacher_and_the_teacher_stays(temperature: float) -> None:
    objective = MultiExit(distillation="self", temperature=temperature)
    student, teacher = (torch.randn(1, 4, requires_grad=True) for _ in range(2))
    learnt, taught = torch.autograd.grad(
        objective.clean_term([student, teacher]), (student, teacher), allow_unused=True
    )
    assert taught is None
    # d/dz T^2 KL(p || softmax(z / T)) = T (softmax(z / T) - p)
    expected = temperature * ((student / temperature).softmax(1) - (teacher / temperature).softmax(1))
    torch.testing.assert_close(learnt, expected.detach())


@pytest.mark.parametrize("distillation", ["self", "ard"])
def test_distillation_of_weight_0_is_adversarial_training(distillation: str, network: ThreeExits, batch: Batch) -> None:
    twin = copy.deepcopy(network)
    plain = MultiExit(attack=ATTACK)
    dataclasses.replace(plain, distillation=distillation, weight=0.0).accumulate(network, [batch], STEP)
    plain.accumulate(twin, [batch], STEP)
    assert all(torch.equal(gradient, gradients(twin)[name]) for name, gradient in gradients(network).items())


# ---- the attack ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ZOO)
def test_examples_stay_in_the_ball_and_leave_the_network_as_it_was(
    kind: str, network: ThreeExits, batch: Batch
) -> None:
    batch.images[0], batch.images[1] = 0, 1
    before = buffers(network)
    objective = MultiExit(attack=ATTACK, attacked=kind)  # type: ignore[arg-type]
    examples = objective.examples(Network(network, STEP), batch, ATTACK)
    distance = (examples - batch.images).abs().flatten(1).amax(1)
    assert float(distance.max()) <= 0.1 + 1e-6
    assert float(distance.min()) > 0
    assert 0 <= float(examples.min()) <= float(examples.max()) <= 1
    assert not examples.requires_grad
    assert all(torch.equal(buffer, before[name]) for name, buffer in network.named_buffers())
    assert all(module.training for module in network.modules())
    assert gradients(network) == {}


def test_the_single_attack_is_on_the_exit_asked_for_and_else_on_the_last(network: ThreeExits, batch: Batch) -> None:
    frozen = copy.deepcopy(network).eval()
    budget = LinfBudget(eps=0.1, steps=3, step_size=0.04)
    for asked, index in ((None, 2), (1, 0), (2, 1), (3, 2)):
        objective = MultiExit(attack=ATTACK, attacked="single", attacked_exit=asked)
        found = objective.examples(Network(network, STEP), batch, ATTACK)
        generator = STEP.generator("attack", 0)
        expected = single_exit(frozen, batch.images, batch.labels, budget, index, generator=generator)
        assert torch.equal(found, expected)


def test_examples_follow_from_the_step_and_the_rank(network: ThreeExits, batch: Batch) -> None:
    def made(step: Step) -> Tensor:
        return MultiExit.adversarial().examples(Network(network, step), batch, EVAL_ATTACK)

    assert torch.equal(made(STEP), made(STEP))
    assert not torch.equal(made(STEP), made(dataclasses.replace(STEP, number=4)))
    assert not torch.equal(made(STEP), made(dataclasses.replace(STEP, rank=1)))


@pytest.mark.parametrize("kind", ZOO)
def test_a_step_costs_the_forwards_that_were_predicted(kind: str, network: ThreeExits, batch: Batch) -> None:
    forwards = 0

    def count(*_: object) -> None:
        nonlocal forwards
        forwards += 1

    network.register_forward_hook(count)
    objective = MultiExit(attack=ATTACK, attacked=kind)  # type: ignore[arg-type]
    objective.accumulate(network, [batch], STEP)
    runs = 3 if kind == "max-average" else 1
    of_images, of_weights = runs * ATTACK.steps, 2  # backward passes, which cost 1 and 2
    assert objective.forwards(exits=3) == forwards + of_images + 2 * of_weights


def test_predicted_costs_are_those_of_the_page() -> None:
    assert MultiExit().forwards(exits=3) == 3
    assert MultiExit.adversarial(attacked="average").forwards(exits=3) == 26
    assert MultiExit.adversarial().forwards(exits=3) == 70
    assert NeoKd().forwards(exits=3) == 70
    assert NeoKd().forwards(exits=7) == 154


def test_statistics_see_clean_and_adversarial_images_once_each_or_the_attack_too(
    network: ThreeExits, batch: Batch
) -> None:
    for mode, forwards in (("eval", 2), ("train_frozen", 2), ("train", 2 + 1 + 3 * (3 + 1))):
        twin = copy.deepcopy(network)
        before = batches_tracked(twin)
        attack = dataclasses.replace(ATTACK, batch_norm=mode)
        MultiExit(attack=attack).accumulate(twin, [batch], STEP)
        assert batches_tracked(twin) == [count + forwards for count in before], mode


# ---- networks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", [MultiExit.adversarial(attack=ATTACK, distillation="ard"), NeoKd(attack=ATTACK)])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_every_exit_of_the_zoos_networks_learns(objective: ExitsObjective, precision: torch.dtype) -> None:
    network = build("small_cnn3", images=dataclasses.replace(MNIST_FORMAT, height=16, width=16)).train()
    objective.check(network)
    torch.manual_seed(0)
    batch = Batch(torch.rand(4, 1, 16, 16), torch.tensor([1, 2, 3, 4]))
    measured = objective.accumulate(network, [batch], Step(seed=0, number=0, precision=precision))
    assert all(math.isfinite(float(value)) and not value.requires_grad for value in measured.values())
    for name in ("exit1", "exit2", "exit3", "stage1", "stage2"):
        assert any(bool(gradient.any()) for key, gradient in gradients(network).items() if key.startswith(name)), name


@pytest.mark.parametrize("objective", [MultiExit(), NeoKd()])
def test_a_network_of_one_exit_an_ensemble_and_random_gates_are_refused(objective: Objective) -> None:
    name = next(name for name, kind in OBJECTIVES.items() if type(objective) is kind)
    plain = build("resnet8", width=4)
    with pytest.raises(BadInput, match=rf"{name} trains networks with several exits, and CifarResNet has one; use"):
        objective.check(plain)
    with pytest.raises(BadInput, match=rf"{name} trains one plain network .* got Ensemble; set members=1"):
        objective.check(Ensemble([ThreeExits(), ThreeExits()]))
    with pytest.raises(BadInput, match=rf"{name} trains one plain network .* got RandomGatedNetwork; set candidates=1"):
        objective.check(randomly_gate(plain, candidates=2))
    objective.check(ThreeExits())


def test_a_single_attack_on_an_exit_that_is_not_there_is_refused() -> None:
    with pytest.raises(BadInput, match="attacked_exit is 4, expected 1 to 3, the exits of ThreeExits"):
        MultiExit.adversarial(attacked="single", attacked_exit=4).check(ThreeExits())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attacked": "both"}, "attacked must be one of max-average, average, single, got 'both'"),
        ({"attacked_exit": 1}, "attacked_exit=1 is for attacked='single', got attacked='max-average'"),
        ({"attacked": "single", "attacked_exit": 0}, "attacked_exit must be at least 1, the first exit, got 0"),
        ({"halved": True}, "needs an attack, got none"),
        ({"distillation": "born-again"}, "distillation must be one of none, self, ard, got 'born-again'"),
        ({"distillation": "ard"}, "needs an attack, got none"),
        ({"weight": -1.0}, "need a finite weight >= 0, got -1.0"),
        ({"weight": math.nan}, "need a finite weight >= 0, got nan"),
        ({"temperature": 0.0}, "need a finite temperature > 0, got 0.0"),
    ],
)
def test_fields_that_make_no_sense_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        MultiExit(**fields)  # type: ignore[arg-type]
