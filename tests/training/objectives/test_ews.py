from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.objectives import (
    OBJECTIVES,
    Awp,
    Batch,
    Ews,
    FastAt,
    FreeAt,
    Memory,
    Objective,
    PgdAt,
    Standard,
    Step,
    Trades,
    TrainingAttack,
)
from training.objectives.ews import Controller, answers
from training.objectives.network import Network, networks_of
from training.objectives.single import NetworkObjective, View
from training.objectives.subnets import Choice, applied, space_of
from zoo.errors import BadInput
from zoo.gates.derive import Ensemble
from zoo.gates.rgn import randomly_gate
from zoo.networks import ImageFormat, build
from zoo.networks.wide_resnet import WideResNet

SMALL = ImageFormat(height=16, width=16)
ATTACK = TrainingAttack(eps=0.03, steps=2, step_size=0.02, batch_norm="eval")
TRADES = Trades(attack=TrainingAttack(eps=0.03, steps=2, step_size=0.02, random_start=False, batch_norm="eval"))


def make(seed: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    network = build("resnet8", images=SMALL, **{"width": 4, **options})
    for _ in range(3):
        network.train()(torch.rand(16, 3, 16, 16))
    return network


def batch(views: int = 0, size: int = 6) -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = [torch.rand(size, 3, 16, 16, generator=generator) for _ in range(views + 1)]
    return Batch(images[0], torch.randint(0, 10, (size,), generator=generator), tuple(images[1:]))


def step(number: int = 3, memory: Memory | None = None, **fields: Any) -> Step:
    return Step(seed=0, number=number, memory=memory or Memory(), **fields)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def run(objective: Objective, model: nn.Module, at: Step, one: Batch | None = None) -> dict[str, Tensor]:
    """Return the gradients of one step, and leave none."""
    model.zero_grad(set_to_none=True)
    objective.accumulate(model, [one or batch()], at)
    found = gradients(model)
    model.zero_grad(set_to_none=True)
    return found


def the_choice(objective: Ews, model: nn.Module, at: Step) -> Choice:
    (network,) = networks_of(model, at)
    return objective.choose(network, space_of(network.module, objective.keep, objective.paths))


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name, **(tolerance or {"rtol": 1e-4, "atol": 1e-6}))


# ---- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("search", ["controller", "random", "l1"])
@pytest.mark.parametrize("reduction", ["batchmean", "mean"])
def test_the_loss_is_the_inner_one_and_the_divergence_of_the_subnet(search: Any, reduction: Any) -> None:
    objective = Ews(search=search, keep=0.5, weight=2.0, kl_reduction=reduction)
    model, twin, one = make(), make(), batch()
    choice = the_choice(objective, model, step())
    measured = objective.accumulate(model, [one], step())

    # by hand, on a copy, with probabilities written out
    teacher = twin(one.images)
    for norm in twin.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 0.0
    with applied(twin, choice):
        student = twin(one.images)
    p, q = teacher.detach().softmax(1), student.softmax(1)
    divergence = (p * (p / q).log()).sum(1).mean() / (10 if reduction == "mean" else 1)
    loss = F.cross_entropy(teacher, one.labels) + 2.0 * divergence
    loss.backward()
    assert float(divergence.detach()) > 1e-4
    assert float(measured["loss"]) == pytest.approx(float(loss.detach()), rel=1e-5)
    assert float(measured["accuracy"]) == float((teacher.argmax(1) == one.labels).float().mean())
    assert_same(gradients(model), gradients(twin))


@pytest.mark.parametrize("inner", [Standard(), Standard(consistency=12.0), PgdAt(attack=ATTACK), TRADES])
def test_a_subnet_that_keeps_everything_adds_nothing(inner: NetworkObjective) -> None:
    one = batch(views=inner.views - 1)
    plain, whole = make(), make()
    expected = inner.accumulate(plain, [one], step(10))
    found = Ews(inner=inner, keep=1.0, weight=3.0).accumulate(whole, [one], step(10))
    assert float(found["loss"]) == pytest.approx(float(expected["loss"]), abs=1e-6)
    assert_same(gradients(whole), gradients(plain), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("inner", [Standard(), PgdAt(attack=ATTACK), TRADES])
def test_weight_zero_is_the_inner_objective(inner: NetworkObjective) -> None:
    plain, wrapped = make(), make()
    found = run(Ews(inner=inner, weight=0.0), wrapped, step())
    assert_same(found, run(inner, plain, step()))
    assert all(torch.equal(buffer, buffers(plain)[name]) for name, buffer in wrapped.named_buffers())


def test_trades_has_its_terms_on_clean_and_on_adversarial_images() -> None:
    objective = Ews.adversarial(TRADES, keep=0.5)
    model, twin, one = make(), make(), batch()
    choice = the_choice(objective, model, step())
    (inputs,) = objective.prepare(networks_of(twin, step()), one)
    loss = objective.accumulate(model, [one], step())["loss"]

    def divergence(teacher: Tensor, student: Tensor) -> Tensor:
        p, q = teacher.softmax(1), student.softmax(1)
        return (p * (p / q).log()).sum(1).mean()

    with torch.no_grad():
        clean, moved = twin(one.images), twin(inputs)
        with applied(twin, choice):
            weak_clean, weak_moved = twin(one.images), twin(inputs)
        near = F.cross_entropy(clean, one.labels) + 0.1 * divergence(clean, weak_clean)
        far = divergence(clean, moved) + 0.1 * divergence(moved, weak_moved)
    assert float(divergence(moved, weak_moved)) > 1e-4
    assert float(loss) == pytest.approx(float(near + 6 * far), rel=1e-5)


def test_augmix_views_share_statistics_in_the_subnet_and_count_a_third_each() -> None:
    objective = Ews(inner=Standard(consistency=12.0), keep=0.5)
    model, twin, one = make(), make(), batch(views=2)
    choice = the_choice(objective, model, step())
    with_term = objective.accumulate(model, [one], step())["loss"]
    without = Standard(consistency=12.0).accumulate(make(), [one], step())["loss"]
    with torch.no_grad():
        stacked = torch.cat([one.images, *one.views])
        teacher = twin(stacked).softmax(1)
        with applied(twin, choice):
            student = twin(stacked).softmax(1)
    divergence = (teacher * (teacher / student).log()).sum(1).mean()  # over all three views
    assert float(with_term - without) == pytest.approx(float(divergence), rel=1e-3)


def test_views_of_separate_passes_stay_separate() -> None:
    model, at = make(), step()
    (network,) = networks_of(model, at)
    first, second = batch().images, batch(views=1).views[0]
    views = [View(first, network(first)), View(second, network(second))]
    choice = the_choice(Ews(keep=0.5), model, at)
    said = answers(network, choice, views)
    with applied(model, choice):
        assert torch.equal(said[0], model(first))
        assert torch.equal(said[1], model(second))


@pytest.mark.parametrize("inner", [FastAt(), FreeAt(), Standard(label_smoothing=0.1)])
def test_it_goes_around_any_loss_of_one_network(inner: NetworkObjective) -> None:
    model = make()
    memory = Memory()
    for number in range(2):
        found = run(Ews(inner=inner, keep=0.5), model, step(number, memory))
        assert all(bool(gradient.isfinite().all()) for gradient in found.values())
    plain = run(inner, make(), step(0))
    assert any(not torch.allclose(gradient, plain[name]) for name, gradient in found.items())


def test_the_perturbation_of_free_training_does_not_feel_the_subnet() -> None:
    plain, wrapped = Memory(), Memory()
    run(FreeAt(), make(), step(1, plain))
    run(Ews(inner=FreeAt(), keep=0.5), make(), step(1, wrapped))
    assert torch.equal(plain.tensors["free_at/delta/0"], wrapped.tensors["free_at/delta/0"])


# ---- the subnet ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 3])  # with an update of the controller, and without
def test_the_subnet_differs_from_the_network_and_leaves_its_running_statistics_alone(number: int) -> None:
    model, plain, one = make(), make(), batch()
    objective = Ews()
    choice = the_choice(objective, model, step(number))
    view = View(one.images, plain(one.images).detach())
    (student,) = answers(networks_of(make(), step(number))[0], choice, [view])
    assert float((student - view.logits).abs().max().detach()) > 1e-2
    objective.accumulate(model, [one], step(number))
    assert all(torch.equal(buffer, buffers(plain)[name]) for name, buffer in model.named_buffers())
    assert all(part.training for part in model.modules())
    assert all(norm.track_running_stats for norm in model.modules() if isinstance(norm, nn.BatchNorm2d))


def test_dropout_is_off_in_the_subnet() -> None:
    torch.manual_seed(0)
    model = WideResNet(10, 1, SMALL, dropout=0.5).train()
    at = step()
    (network,) = networks_of(model, at)
    view = View(batch().images, network(batch().images))
    choice = the_choice(Ews(), model, at)
    assert torch.equal(*(answers(network, choice, [view])[0] for _ in range(2)))


def test_each_step_has_a_subnet_of_its_own_and_all_ranks_the_same() -> None:
    model = make(width=8)
    for search in ("controller", "random"):
        objective = Ews(search=search)
        chosen = [the_choice(objective, model, step(number)) for number in range(6)]
        assert len(set(chosen)) == 6
        assert the_choice(objective, model, step(2, rank=5)) == chosen[2]


def test_of_a_gated_network_the_subnet_is_one_of_the_drawn_path() -> None:
    rgn = randomly_gate(make(), candidates=2).train()
    objective = Ews(keep=0.5, paths="round")
    found = run(objective, rgn, step())
    plain = run(Standard(), copy.deepcopy(rgn), step())
    assert found.keys() == plain.keys()
    assert any(not torch.allclose(gradient, plain[name]) for name, gradient in found.items())


def test_members_of_an_ensemble_have_controllers_of_their_own() -> None:
    memory = Memory()
    ensemble = Ensemble([make(0), make(1)]).train()
    run(Ews(), ensemble, step(0, memory))
    assert {key.split("/")[1] for key in memory.state()} == {"controller0", "controller1"}
    networks = networks_of(ensemble, step(1, memory))
    space = space_of(ensemble.members[0], 0.7)
    assert Ews().choose(networks[0], space) != Ews().choose(networks[1], space)


def test_an_exception_in_the_subnet_leaves_the_network_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = make(), []
    whole = Network.__call__

    def second_fails(network: Network, images: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return whole(network, images)

    monkeypatch.setattr(Network, "__call__", second_fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        Ews().accumulate(model, [batch()], step())
    assert sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules()) == 0
    assert all(part.training for part in model.modules())


# ---- the controller --------------------------------------------------------------------------------------------------


def test_only_every_tenth_step_teaches_the_controller() -> None:
    memory, model, taught = Memory(), make(), []
    before: dict[str, Tensor] = {}
    for number in range(22):
        run(Ews(), model, step(number, memory))
        after = memory.state()
        if any(not torch.equal(tensor, before[key]) for key, tensor in after.items() if key in before) or not before:
            taught.append(number)
        before = after
    assert taught == [0, 10, 20]


@pytest.mark.parametrize("search", ["random", "l1"])
def test_the_ablations_keep_no_controller(search: Any) -> None:
    memory = Memory()
    run(Ews(search=search), make(), step(0, memory))
    assert memory.state() == {}


def test_the_reward_is_the_subnets_error_averaged_over_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[float] = []
    averaged: list[Tensor] = []
    sampled: list[Choice] = []
    original = Controller.update

    def update(controller: Controller, sample: Any, accuracy: float) -> float:
        told.append(accuracy)
        sampled.append(sample.choice)
        return original(controller, sample, accuracy)

    def average(value: Tensor) -> Tensor:
        averaged.append(value)
        return value / 2 + 0.25

    monkeypatch.setattr(Controller, "update", update)
    model, one = make(), batch(size=32)
    twin = copy.deepcopy(model)
    Ews(inner=TRADES, keep=0.5).accumulate(model, [one], step(0, average=average))
    (inputs,) = TRADES.prepare(networks_of(twin, step(0)), one)
    with torch.no_grad(), applied(twin, sampled[0]):
        right = [(twin(images).argmax(1) == one.labels).float().mean() for images in (one.images, inputs)]
    expected = (right[0] + 6 * right[1]) / 7
    assert float(averaged[0]) == pytest.approx(float(expected), abs=1e-6)
    assert told == [pytest.approx(float(expected) / 2 + 0.25, abs=1e-6)]


def test_training_resumes_bit_for_bit_through_memory() -> None:
    objective = Ews(controller_every=2)
    straight, kept = Memory(), Memory()
    model = make()

    def train(model: nn.Module, memory: Memory, numbers: range) -> list[dict[str, Tensor]]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        found = []
        for number in numbers:
            model.zero_grad(set_to_none=True)
            objective.accumulate(model, [batch()], step(number, memory))
            optimizer.step()
            found.append(gradients(model))
        return found

    train(model, straight, range(5))
    kept, twin = Memory(straight.state()), copy.deepcopy(model)
    first, second = train(model, straight, range(5, 11)), train(twin, kept, range(5, 11))
    assert all(torch.equal(one[name], other[name]) for one, other in zip(first, second, strict=True) for name in one)
    assert all(torch.equal(tensor, kept.state()[name]) for name, tensor in straight.state().items())


def test_a_memory_that_was_not_asked_yet_still_holds_the_controller() -> None:
    memory = Memory()
    run(Ews(), make(), step(0, memory))
    again = Memory(memory.state())
    assert again.state().keys() == memory.state().keys()


@pytest.mark.slow
@pytest.mark.parametrize(("paths", "steps", "bound"), [("round", 150, 0.6), ("ceil", 400, 0.8)])
def test_the_controller_proposes_weaker_subnets_than_chance_of_a_network_that_stays_as_it_is(
    paths: Any, steps: int, bound: float
) -> None:
    model, one, memory = make(), batch(size=64), Memory()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for number in range(80):
        optimizer.zero_grad()
        Standard().accumulate(model, [one], step(number))
        optimizer.step()
    objective = Ews(keep=0.6, paths=paths, controller_every=1, controller_learning_rate=0.01)
    for number in range(steps):
        run(objective, model, step(number, memory), one)

    @torch.no_grad()
    def accuracy(objective: Ews) -> float:
        right = []
        for number in range(500, 540):
            (network,) = networks_of(model, step(number, memory))
            choice = objective.choose(network, space_of(model, 0.6, paths))
            (said,) = answers(network, choice, [View(one.images, network(one.images))])
            right.append(float((said.argmax(1) == one.labels).float().mean()))
        return sum(right) / len(right)

    chance, found = accuracy(dataclasses.replace(objective, search="random")), accuracy(objective)
    assert found < bound * chance, (found, chance)


# ---- with weight perturbation ----------------------------------------------------------------------------------------


def test_the_perturbation_of_awp_is_that_of_the_whole_network() -> None:
    one = batch()
    inner = PgdAt(attack=ATTACK)
    found = []
    for objective in (inner, Ews(inner=inner, keep=0.5)):
        model = make()
        awp = Awp(inner=objective)
        networks = networks_of(model, step())
        (inputs,) = awp.prepare(networks, one)
        found.append(awp.perturbation(networks[0], inputs, one))
    assert_same(found[1], found[0], rtol=0, atol=0)


def test_awp_around_it_restores_the_weights() -> None:
    model, memory = make(), Memory()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    objective = Awp(inner=Ews.adversarial(PgdAt(attack=ATTACK)))
    run(objective, model, step(0, memory))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert any(key.startswith("ews/controller0/") for key in memory.state())


# ---- names, costs, bad input -----------------------------------------------------------------------------------------


def test_names_say_what_is_within_and_how_subnets_are_searched_for() -> None:
    assert OBJECTIVES["ews"] is Ews
    assert Ews().name == "standard+ews"
    assert Ews(search="random").name == "standard+ews-random"
    assert Ews(inner=Trades(), search="l1").name == "trades+ews-l1"
    assert Awp(inner=Ews(inner=PgdAt())).name == "pgd_at+ews+awp"


def test_the_cost_is_that_of_the_inner_objective_and_of_a_pass_per_view() -> None:
    assert Ews().forwards() == pytest.approx(3 + 3 + 0.1)
    assert Ews(search="random").forwards(networks=3) == pytest.approx(3 * 6)
    assert Ews(inner=PgdAt()).forwards() == pytest.approx(PgdAt().forwards() + 3.1)
    assert Ews(inner=Trades()).forwards() == pytest.approx(Trades().forwards() + 6.2)
    assert Ews(inner=Standard(consistency=12.0)).forwards() == pytest.approx(9 + 9.3)


def test_the_cost_is_what_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images, passes = make(), [], 20
    model.register_forward_hook(lambda _, inputs, output: images.append(len(inputs[0])))
    memory = Memory()
    for number in range(passes):
        run(Ews(), model, step(number, memory))
    assert sum(images) == pytest.approx(6 * passes * (1 + 1 + 0.1))


def test_the_adversarial_numbers_are_the_papers() -> None:
    objective = Ews.adversarial(PgdAt())
    assert (objective.keep, objective.weight, objective.entropy_weight) == (0.9, 0.1, 0.01)
    assert Ews.adversarial(PgdAt(), keep=0.8).keep == 0.8


def test_ews_in_ews_and_around_awp_are_refused() -> None:
    with pytest.raises(BadInput, match="ews cannot go around ews"):
        Ews(inner=Ews())
    with pytest.raises(BadInput, match="put awp around ews"):
        Ews(inner=Awp(inner=PgdAt()))
    with pytest.raises(BadInput, match="ews cannot go around ews"):
        Awp(inner=Ews(inner=Ews()))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"search": "best"}, "search must be one of controller, random, l1, got 'best'"),
        ({"paths": "floor"}, "paths must be one of ceil, round, got 'floor'"),
        ({"kl_reduction": "sum"}, "kl_reduction must be one of batchmean, mean, got 'sum'"),
        ({"log_prob": "exact"}, "log_prob must be one of plackett_luce, sum, got 'exact'"),
        ({"keep": 0.0}, "need 0 < keep <= 1, got 0.0"),
        ({"keep": 70}, "need 0 < keep <= 1, got 70"),
        ({"weight": -1.0}, "finite weight >= 0, got -1.0"),
        ({"weight": float("nan")}, "finite weight >= 0, got nan"),
        ({"entropy_weight": -0.1}, "finite entropy_weight >= 0, got -0.1"),
        ({"controller_every": 0}, "need controller_every >= 1, got 0"),
        ({"controller_learning_rate": 0.0}, "controller_learning_rate > 0, got 0.0"),
        ({"controller_clip": -3.0}, "controller_clip > 0, got -3.0"),
        ({"controller_betas": (0.5, 1.0)}, r"controller_betas must be two numbers, 0 <= beta < 1, got \(0.5, 1.0\)"),
        ({"controller_betas": (0.5,)}, "controller_betas must be two numbers"),
    ],
)
def test_nonsense_is_refused_by_field(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        Ews(**fields)


def test_an_objective_that_is_no_loss_of_one_network_is_refused() -> None:
    with pytest.raises(BadInput, match="goes around the loss of one network"):
        Ews(inner=OBJECTIVES["ensemble_in_one"]())  # type: ignore[arg-type]


def test_networks_without_residual_blocks_are_refused_before_the_first_step() -> None:
    for model in (build("lenet"), build("vgg16"), Ensemble([make(), build("lenet")]), randomly_gate(build("lenet"))):
        with pytest.raises(BadInput, match=r"ews takes subnets of residual blocks, and .* has none"):
            Ews().check(model)
    for fine in (make(), Ensemble([make()]), randomly_gate(make())):
        Ews().check(fine)


def test_what_the_inner_objective_refuses_is_refused() -> None:
    with pytest.raises(BadInput, match="one exit"):
        Ews().check(build("small_cnn3"))


def test_it_is_frozen_and_hashable() -> None:
    assert hash(Ews()) == hash(dataclasses.replace(Ews()))
