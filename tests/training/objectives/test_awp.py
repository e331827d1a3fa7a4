from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.objectives import Awp, Batch, FastAt, FreeAt, Memory, PgdAt, Standard, Step, Trades
from training.objectives.network import Network, networks_of
from training.objectives.single import Loss, NetworkObjective, Wrapper
from zoo.errors import BadInput
from zoo.gates.derive import Ensemble
from zoo.gates.rgn import randomly_gate
from zoo.networks import ImageFormat, build

SMALL = ImageFormat(height=16, width=16)
STEP = Step(seed=0, number=3)
INNER: dict[str, NetworkObjective] = {
    "standard": Standard(),
    "augmix": Standard(consistency=12.0),
    "pgd_at": PgdAt(),
    "fast_at": FastAt(),
    "free_at": FreeAt(),
    "trades": Trades(),
}


@pytest.fixture
def network() -> nn.Module:
    model = build("resnet8", images=SMALL, width=4).train()
    for _ in range(3):
        model(torch.rand(8, 3, 16, 16))
    return model


def some_batch(size: int = 6, views: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(views, size, 3, 16, 16, generator=generator)
    return Batch(images[0], torch.randint(0, 10, (size,), generator=generator), tuple(images[1:]))


def new_step(**options: Any) -> Step:
    return Step(**{"seed": 0, "number": 3, **options})


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@dataclass(frozen=True, kw_only=True)
class Watched(Wrapper):
    """Notes the parameters at which the loss is taken, and what its attack is made on."""

    seen: dict[str, dict[str, Tensor]]

    def __hash__(self) -> int:
        return 0

    def prepare(self, networks: Any, batch: Batch) -> list[Any]:
        self.seen["prepared"] = {name: p.detach().clone() for name, p in networks[0].parameters.items()}
        return super().prepare(networks, batch)

    def backward(self, network: Network, inputs: Any, batch: Batch) -> Loss:
        self.seen["backward"] = {name: p.detach().clone() for name, p in network.parameters.items()}
        return super().backward(network, inputs, batch)


# ---- the perturbation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [0.01, 0.5])
def test_every_weight_tensor_is_moved_by_gamma_times_its_norm_along_its_gradient(
    network: nn.Module, gamma: float
) -> None:
    batch, twin = some_batch(), copy.deepcopy(network)
    (one,) = networks_of(network, STEP)
    found = Awp(inner=Standard(), gamma=gamma).perturbation(one, batch.images, batch)
    F.cross_entropy(twin(batch.images), batch.labels).backward()
    weights = dict(network.named_parameters())
    assert found.keys() == {name for name, weight in weights.items() if weight.ndim > 1}
    assert len(found) > 5
    for name, gradient in gradients(twin).items():
        if name in found:
            weight = weights[name]
            assert found[name].shape == weight.shape
            assert float(found[name].norm()) == pytest.approx(gamma * float(weight.detach().norm()), rel=1e-5), name
            assert float(F.cosine_similarity(found[name].reshape(-1), gradient.reshape(-1), dim=0)) > 0.9999, name


def test_on_a_linear_network_the_moved_weights_are_those_of_the_formula() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 10))
    batch, seen = some_batch(), {}
    weight, bias = (parameter.detach().clone() for parameter in model.parameters())
    pixels = batch.images.flatten(1)
    errors = (pixels @ weight.T + bias).softmax(1) - F.one_hot(batch.labels, 10)
    gradient = errors.T @ pixels / len(pixels)
    Awp(inner=Watched(inner=Standard(), seen=seen), gamma=0.1).accumulate(model, [batch], STEP)
    moved = weight + 0.1 * weight.norm() * gradient / gradient.norm()
    torch.testing.assert_close(seen["backward"]["1.weight"], moved)
    assert torch.equal(seen["backward"]["1.bias"], bias)

    # and what is left in .grad is the gradient there, bias included
    errors = (pixels @ moved.T + bias).softmax(1) - F.one_hot(batch.labels, 10)
    torch.testing.assert_close(gradients(model)["1.weight"], errors.T @ pixels / len(pixels), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradients(model)["1.bias"], errors.mean(0), rtol=1e-4, atol=1e-6)


def test_biases_and_batch_norm_gains_stay(network: nn.Module) -> None:
    seen: dict[str, dict[str, Tensor]] = {}
    before = state(network)
    Awp(inner=Watched(inner=Standard(), seen=seen)).accumulate(network, [some_batch()], STEP)
    for name, weight in seen["backward"].items():
        assert torch.equal(weight, before[name]) == (weight.ndim <= 1), name


def test_examples_are_made_at_the_unmoved_weights(network: nn.Module) -> None:
    seen: dict[str, dict[str, Tensor]] = {}
    before = state(network)
    Awp(inner=Watched(inner=PgdAt(), seen=seen)).accumulate(network, [some_batch()], STEP)
    assert all(torch.equal(weight, before[name]) for name, weight in seen["prepared"].items())


def test_the_direction_leaves_no_gradient_and_no_trace_in_batch_norm(network: nn.Module) -> None:
    batch, before = some_batch(), state(network)
    (one,) = networks_of(network, STEP)
    for inner in (Standard(), Trades()):
        (inputs,) = inner.prepare([one], batch)
        Awp(inner=inner).perturbation(one, inputs, batch)
    assert gradients(network) == {}
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert all(module.training for module in network.modules())


def test_the_direction_sees_batch_statistics_not_running_ones(network: nn.Module) -> None:
    batch = some_batch()
    (one,) = networks_of(network, STEP)
    before = Awp(inner=Standard()).perturbation(one, batch.images, batch)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            module.running_mean.add_(1.0)
    after = Awp(inner=Standard()).perturbation(one, batch.images, batch)
    assert all(torch.equal(after[name], moved) for name, moved in before.items())


def test_a_tensor_that_the_loss_does_not_depend_on_stays() -> None:
    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(768, 10), nn.Linear(4, 4)
            self.silent = nn.Parameter(torch.ones(2, 2))

        def forward(self, images: Tensor) -> Tensor:
            logits: Tensor = self.used(images.flatten(1)) + 0 * self.silent.sum()
            return logits

    model, batch = Dead(), some_batch()
    (one,) = networks_of(model, STEP)
    found = Awp(inner=Standard()).perturbation(one, batch.images, batch)
    assert found.keys() == {"used.weight", "silent"}
    assert torch.equal(found["silent"], torch.zeros(2, 2))


def test_a_gradient_whose_square_underflows_still_gives_the_whole_length() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Faint(Standard):
        def loss(self, network: Network, inputs: Any, batch: Batch) -> Loss:
            loss = super().loss(network, inputs, batch)
            return Loss(1e-25 * loss.value, loss.views)

    model, batch = nn.Sequential(nn.Flatten(), nn.Linear(768, 10)), some_batch()
    (one,) = networks_of(model, STEP)
    found = Awp(inner=Faint()).perturbation(one, batch.images, batch)["1.weight"]
    expected = Awp(inner=Standard()).perturbation(one, batch.images, batch)["1.weight"]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["standard", "pgd_at", "trades"])
def test_the_loss_at_the_moved_weights_is_above_the_one_at_the_weights(network: nn.Module, name: str) -> None:
    inner, batch = INNER[name], some_batch()
    losses = []
    for gamma in (0.0, 0.002, 0.01):
        measured = Awp(inner=inner, gamma=gamma).accumulate(copy.deepcopy(network), [batch], new_step())
        losses.append(float(measured["loss"]))
    assert losses[0] < losses[1] < losses[2]


def test_ranks_that_share_a_batch_move_the_weights_alike(network: nn.Module) -> None:
    whole = some_batch(8)
    network.eval()  # so that halves of the batch are normalised alike

    @dataclass(frozen=True, kw_only=True)
    class Evaluated(Standard):
        def loss(self, network: Network, inputs: Any, batch: Batch) -> Loss:
            with network.statistics("eval"):
                return super().loss(network, inputs, batch)

    awp = Awp(inner=Evaluated())
    halves = [Batch(whole.images[part], whole.labels[part]) for part in (slice(0, 4), slice(4, 8))]
    sent: list[Tensor] = []

    def found(batch: Batch, step: Step) -> dict[str, Tensor]:
        (one,) = networks_of(network, step)
        return awp.perturbation(one, batch.images, batch)

    def keep(value: Tensor) -> Tensor:
        sent.append(value)
        return value

    for half in halves:
        found(half, new_step(average=keep))
    assert len(sent) == 2, "one message per rank"
    mean = (sent[0] + sent[1]) / 2
    alike = [found(half, new_step(average=lambda value: mean)) for half in halves]
    for name, expected in found(whole, new_step()).items():
        torch.testing.assert_close(alike[0][name], expected, rtol=1e-3, atol=1e-6)
        assert torch.equal(alike[0][name], alike[1][name])


# ---- the step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", INNER)
def test_the_weights_come_back_bit_for_bit(network: nn.Module, name: str) -> None:
    inner = INNER[name]
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    for gamma in (0.01, 3.0):
        Awp(inner=inner, gamma=gamma).accumulate(network, [some_batch(views=inner.views)], new_step())
        assert all(torch.equal(p, before[name]) for name, p in network.named_parameters())
    assert gradients(network).keys() == before.keys()


def test_the_weights_come_back_when_the_loss_within_raises(network: nn.Module) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Failing(Standard):
        def backward(self, network: Network, inputs: Any, batch: Batch) -> Loss:
            super().backward(network, inputs, batch)
            raise RuntimeError("out of memory")

    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    with pytest.raises(RuntimeError, match="out of memory"):
        Awp(inner=Failing()).accumulate(network, [some_batch()], STEP)
    assert all(torch.equal(p, before[name]) for name, p in network.named_parameters())


@pytest.mark.parametrize("name", INNER)
def test_at_gamma_0_it_is_what_is_within(network: nn.Module, name: str) -> None:
    inner, twin = INNER[name], copy.deepcopy(network)
    batch, steps = some_batch(views=inner.views), (new_step(), new_step())
    measured = Awp(inner=inner, gamma=0.0).accumulate(network, [batch], steps[0])
    expected = inner.accumulate(twin, [batch], steps[1])
    assert all(torch.equal(measured[key], expected[key]) for key in ("loss", "accuracy"))
    wanted = gradients(twin)
    assert all(torch.equal(gradient, wanted[name]) for name, gradient in gradients(network).items())
    assert all(torch.equal(tensor, state(twin)[name]) for name, tensor in network.state_dict().items())
    kept = steps[0].memory.tensors
    assert kept.keys() == steps[1].memory.tensors.keys()
    assert all(torch.equal(tensor, steps[1].memory.tensors[key]) for key, tensor in kept.items())


@pytest.mark.parametrize("name", INNER)
def test_it_changes_the_gradients_of_everything_it_goes_around(network: nn.Module, name: str) -> None:
    inner, twin = INNER[name], copy.deepcopy(network)
    batch = some_batch(views=inner.views)
    Awp(inner=inner).accumulate(network, [batch], new_step())
    inner.accumulate(twin, [batch], new_step())
    found, plain = gradients(network), gradients(twin)
    assert found.keys() == plain.keys()
    assert not any(torch.equal(found[name], plain[name]) for name in found if name.endswith("weight"))


def test_it_equals_the_step_of_the_paper_up_to_weight_decay(network: nn.Module) -> None:
    decay, rate, batch, twin = 0.01, 0.1, some_batch(), copy.deepcopy(network)
    awp = Awp(inner=Standard(), gamma=0.05)
    optimizer = torch.optim.SGD(network.parameters(), lr=rate, weight_decay=decay)
    awp.accumulate(network, [batch], STEP)
    optimizer.step()

    # the paper's code: move, step there, subtract
    (one,) = networks_of(twin, STEP)
    moves = awp.perturbation(one, batch.images, batch)
    optimizer = torch.optim.SGD(twin.parameters(), lr=rate, weight_decay=decay)
    weights = dict(twin.named_parameters())
    with torch.no_grad():
        for name, move in moves.items():
            weights[name].add_(move)
    F.cross_entropy(twin(batch.images), batch.labels).backward()
    optimizer.step()
    with torch.no_grad():
        for name, move in moves.items():
            weights[name].sub_(move)
    for name, weight in network.named_parameters():
        difference = rate * decay * moves.get(name, torch.zeros(()))
        torch.testing.assert_close(weight, weights[name] + difference, rtol=1e-5, atol=1e-6)


def test_running_statistics_move_as_they_do_without_it(network: nn.Module) -> None:
    def counts(model: nn.Module) -> set[int]:
        return {int(buffer) for name, buffer in model.named_buffers() if name.endswith("num_batches_tracked")}

    (before,) = counts(network)
    Awp(inner=PgdAt()).accumulate(network, [some_batch()], new_step())
    assert counts(network) == {before + 11}
    Awp(inner=Trades()).accumulate(network, [some_batch()], new_step())
    assert counts(network) == {before + 13}


def test_before_the_warm_up_is_over_nothing_is_moved(network: nn.Module) -> None:
    batch = some_batch()
    found = []
    for objective, epoch in ((Standard(), 0), *((Awp(inner=Standard(), warm_up=2), epoch) for epoch in range(3))):
        model = copy.deepcopy(network)
        objective.accumulate(model, [batch], new_step(epoch=epoch))
        found.append(gradients(model))
    plain, *awp = found
    same = [all(torch.equal(one[name], plain[name]) for name in plain) for one in awp]
    assert same == [True, True, False]


def test_within_it_the_perturbation_of_free_training_moves_once_a_step() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 10))
    batch, memory = some_batch(), Memory()
    objective = Awp(inner=FreeAt(step_size=1 / 255))
    largest = []
    for number in range(3):
        objective.accumulate(model, [batch], new_step(number=number, memory=memory))
        largest.append(float(memory.tensors["free_at/delta/0"].abs().max()))
    assert largest == pytest.approx([1 / 255, 2 / 255, 3 / 255], abs=1e-6)


def test_members_of_an_ensemble_are_moved_one_by_one() -> None:
    torch.manual_seed(0)
    model = Ensemble([nn.Sequential(nn.Flatten(), nn.Linear(768, 10)) for _ in range(2)])
    batch = some_batch()
    awp = Awp(inner=Standard(), gamma=0.1)
    awp.accumulate(model, [batch], STEP)
    for member in model.members:
        twin = copy.deepcopy(member)
        twin.zero_grad()
        awp.accumulate(twin, [batch], STEP)
        expected = gradients(twin)
        assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients(member).items())


def test_of_a_gated_network_the_drawn_path_is_moved_and_no_other() -> None:
    model = randomly_gate(build("resnet8", images=SMALL, width=4), candidates=2).train()
    batch, before = some_batch(), {name: p.detach().clone() for name, p in model.named_parameters()}
    (one,) = networks_of(model, STEP)
    moves = Awp(inner=Standard()).perturbation(one, batch.images, batch)
    convolutions = {f"{layer.conv}.weight" for layer in model.layers}
    assert convolutions < moves.keys()
    Awp(inner=Standard(), gamma=0.1).accumulate(model, [batch], STEP)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert one.path is not None
    for layer, gate in enumerate(one.path):
        assert all(parameter.grad is None for parameter in model.bank[layer][1 - gate].parameters())
        assert all(parameter.grad is not None for parameter in model.bank[layer][gate].parameters())


def test_in_bfloat16_the_weights_are_moved_in_full_precision(network: nn.Module) -> None:
    batch = some_batch()
    (one,) = networks_of(network, new_step(precision=torch.bfloat16))
    moves = Awp(inner=Standard()).perturbation(one, batch.images, batch)
    assert all(move.dtype == torch.float32 for move in moves.values())
    measured = [
        float(Awp(inner=Standard(), gamma=gamma).accumulate(network, [batch], one.step)["loss"]) for gamma in (0, 0.02)
    ]
    assert measured[1] > measured[0]


# ---- the wrapper -----------------------------------------------------------------------------------------------------


def test_what_it_leaves_to_the_objective_within_is_the_objective_s() -> None:
    free, augmix = Awp(inner=FreeAt(replays=4)), Awp(inner=Standard(consistency=12.0))
    assert (free.replays, free.views, free.per_image_memory) == (4, 1, True)
    assert (augmix.replays, augmix.views, augmix.per_image_memory) == (1, 3, False)
    assert (Awp().inner, Awp().streams) == (PgdAt(), 1)


def test_its_name_is_built_from_the_inside_out() -> None:
    assert Awp(inner=Trades()).name == "trades+awp"
    assert Awp().name == "pgd_at+awp"


def test_its_cost_is_one_more_evaluation_of_the_loss_and_its_gradient() -> None:
    assert Awp().forwards() == PgdAt().forwards() + 3
    assert Awp(inner=Trades()).forwards(networks=2) == Trades().forwards(networks=2) + 12
    assert Awp(inner=Standard(consistency=12.0)).forwards() == 9 + 9


def test_what_is_within_says_which_networks_it_trains() -> None:
    exits = build("small_cnn3")
    with pytest.raises(BadInput, match="trades trains networks with one exit"):
        Awp(inner=Trades()).check(exits)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Awp(gamma=-0.1), "need a finite gamma >= 0, got -0.1"),
        (lambda: Awp(gamma=float("nan")), "need a finite gamma >= 0, got nan"),
        (lambda: Awp(warm_up=-1), "need warm_up >= 0 epochs, got -1"),
        (lambda: Awp(inner=Awp()), "awp is within awp"),
        (lambda: Awp(inner=Watched(inner=Awp(), seen={})), "awp is within awp"),
        (lambda: Awp(inner="trades"), "Awp goes around the loss of one network, .*, got str"),
    ],
)
def test_what_makes_no_sense_is_refused(make: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        make()
