from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.objectives import Batch, Dropen, Memory, Step
from training.objectives.input_gradients import Smoothness
from training.objectives.network import Network
from zoo.errors import BadInput
from zoo.gates.derive import Ensemble
from zoo.networks import ImageFormat, build

SMALL = ImageFormat(height=16, width=16)
CLEAN = Smoothness(perturbed="none")
EARLIER = Dropen(memory="previous_batches", smoothness=CLEAN)


def make_network(name: str = "lenet") -> nn.Module:
    return build(name, images=SMALL, dropout=0.5).train()


def some_batch(seed: int = 1, size: int = 6, classes: int = 10, side: int = 16) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(size, 3, side, side, generator=generator)
    return Batch(images, torch.randint(0, classes, (size,), generator=generator))


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def absolute_cosine(first: Tensor, second: Tensor) -> Tensor:
    return ((first * second).sum(1) / (first.norm(dim=1) * second.norm(dim=1))).abs()


class Linear(nn.Module):
    """Logits of two classes: 0 and `direction` times the first pixels."""

    def __init__(self, *direction: float) -> None:
        super().__init__()
        weight = torch.zeros(2, 48)
        weight[1, : len(direction)] = torch.tensor(direction)
        self.weight = nn.Parameter(weight)

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) @ self.weight.T


# ---- the terms -------------------------------------------------------------------------------------------------------


def test_the_loss_of_a_linear_model_by_hand() -> None:
    # no dropout, so that all masks are one: S = 1. pixels 0: p_wrong = 1/2, CE = log 2 and ||g|| = 5/2
    batch = Batch(torch.zeros(4, 3, 4, 4), torch.tensor([0, 1, 0, 1]))
    measured = Dropen(smoothness=CLEAN).accumulate(Linear(3, 4), [batch], Step(seed=0, number=0))
    assert float(measured["similarity"]) == pytest.approx(1)
    assert float(measured["smoothness"]) == pytest.approx(2 * 2.5**2)
    assert float(measured["loss"]) == pytest.approx(math.log(2) + 10 * 1 + 0.1 * 2 * 2.5**2)


def test_the_default_weight_is_the_released_one_on_batch_mean_gradients_of_1000_images() -> None:
    model, batch = Linear(3, 4), some_batch(size=1000, classes=2, side=4)
    measured = Dropen(smoothness=CLEAN).accumulate(model, [batch], Step(seed=0, number=0))
    images = batch.images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(model(images), batch.labels), images)
    released = 5 * 2 * 1e4 * 2 * float(gradient.flatten(1).square().sum(1).mean())
    assert Dropen().lambda_b * float(measured["smoothness"]) == pytest.approx(released, rel=1e-4)


@pytest.mark.parametrize("perturbed", ["none", "half", "all"])
@pytest.mark.parametrize("memory", ["masks", "previous_batches"])
def test_the_loss_reported_is_the_sum_of_the_terms_reported(memory: Any, perturbed: Any) -> None:
    objective, step = Dropen(memory=memory, smoothness=Smoothness(perturbed=perturbed)), Step(seed=0, number=0)
    objective.accumulate(make_network(), [some_batch()], step)
    measured = objective.accumulate(make_network(), [some_batch(2)], step)
    expected = measured["cross_entropy"] + 10 * measured["similarity"] + 0.1 * measured["smoothness"]
    assert float(measured["loss"]) == pytest.approx(float(expected), rel=1e-5)


def test_the_penalty_does_not_depend_on_the_size_of_the_batch() -> None:
    model, batch = build("lenet", images=SMALL).train(), some_batch()  # without dropout, to be comparable
    thrice = Batch(batch.images.repeat(3, 1, 1, 1), batch.labels.repeat(3))
    once, again = (Dropen(smoothness=CLEAN).accumulate(model, [one], Step(seed=0, number=0)) for one in (batch, thrice))
    assert all(float(once[name]) == pytest.approx(float(again[name]), rel=1e-4) for name in once)


@pytest.mark.parametrize(
    ("network", "objective", "precision"),
    [
        ("lenet", Dropen(), torch.bfloat16),
        ("lenet", Dropen.release(), torch.bfloat16),
        ("two_layer_cnn", Dropen(), torch.float32),
    ],
    ids=["default", "release", "two layers"],
)
def test_every_parameter_gets_a_finite_gradient(network: str, objective: Dropen, precision: torch.dtype) -> None:
    model, memory = make_network(network), Memory()
    for number in range(2):
        step = Step(seed=0, number=number, batch=number, precision=precision, memory=memory)
        objective.accumulate(model, [some_batch(number)], step)
    assert len(gradients(model)) == len(list(model.parameters()))
    assert all(bool(torch.isfinite(gradient).all()) for gradient in gradients(model))


# ---- memory of masks -------------------------------------------------------------------------------------------------


def test_every_mask_is_another_one_on_the_same_images_and_only_the_first_is_trained() -> None:
    network, batch = Network(make_network(), Step(seed=0, number=0)), some_batch()
    others = Dropen().others(network, batch, torch.zeros(6, 3 * 16 * 16), network.step)
    assert len(others) == 4
    assert not any(other.requires_grad for other in others)
    for index, other in enumerate(others):
        for later in others[:index]:
            assert 0 < float(absolute_cosine(other, later).max()) < 0.999
    assert network.step.memory.state() == {}


def test_its_similarity_is_the_mean_over_the_other_masks() -> None:
    """The same draws of dropout, by hand: one forward per mask, in the order trained, others."""
    model, batch = make_network(), some_batch()
    torch.manual_seed(7)
    measured = Dropen(smoothness=CLEAN, masks=3).accumulate(model, [batch], Step(seed=0, number=0))
    found = gradients(model)
    model.zero_grad()
    torch.manual_seed(7)
    images = batch.images.clone().requires_grad_()
    drawn = []
    for _ in range(3):
        losses = F.cross_entropy(model(images), batch.labels, reduction="none")
        drawn.append((losses.mean(), torch.autograd.grad(losses.sum(), images, create_graph=True)[0].flatten(1)))
    (loss, first), *others = drawn
    similarity = torch.stack([absolute_cosine(first, other.detach()).mean() for _, other in others]).mean()
    assert float(measured["similarity"]) == pytest.approx(float(similarity.detach()), rel=1e-4)
    (loss + 10 * similarity + 0.1 * 2 * first.square().sum(1).mean()).backward()
    for gradient, parameter in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-4)


def test_masks_cost_a_forward_each() -> None:
    model, calls = make_network(), []
    model.register_forward_hook(lambda _, inputs, __: calls.append(len(inputs[0])))
    Dropen(masks=4).accumulate(model, [some_batch()], Step(seed=0, number=0))
    assert calls == [3] * 6 + [6] * 4 + [6]  # perturbation, masks, penalty
    assert Dropen(masks=4).forwards() == 6 + 3 * 2 + (6 * 2 + 6)
    assert Dropen.release().forwards(networks=2) == 2 * (6 + 6 * 2 + 6)


# ---- memory of earlier batches ---------------------------------------------------------------------------------------


def test_the_first_batch_of_an_epoch_has_nothing_to_be_compared_with() -> None:
    model, memory = make_network(), Memory()
    similarity = [
        float(EARLIER.accumulate(model, [some_batch(batch)], step)["similarity"])
        for batch, step in enumerate(Step(seed=0, number=k, batch=k, memory=memory) for k in range(3))
    ]
    assert similarity[0] == 0
    assert min(similarity[1:]) > 0


def test_a_batch_is_compared_row_by_row_with_at_most_five_before_it() -> None:
    network, kept = make_network(), []
    memory, objective = Memory(), EARLIER
    generator = torch.Generator().manual_seed(0)
    for batch in range(8):
        step = Step(seed=0, number=batch, batch=batch, memory=memory)
        drawn = torch.randn(6, 10, generator=generator)
        others = objective.others(Network(network, step), some_batch(), drawn, step)
        expected = kept[-5:]
        assert len(others) == len(expected)
        assert all(any(torch.equal(other, wanted) for other in others) for wanted in expected)
        if expected:
            mean = torch.stack([absolute_cosine(drawn, other).mean() for other in expected]).mean()
            assert float(objective.similarity(drawn, others)) == pytest.approx(float(mean), rel=1e-5)
        kept.append(drawn)


def test_a_new_epoch_forgets_the_batches_before() -> None:
    model, memory = make_network(), Memory()
    for number, (epoch, batch) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        step = Step(seed=0, number=number, epoch=epoch, batch=batch, memory=memory)
        measured = EARLIER.accumulate(model, [some_batch(number)], step)
        assert (float(measured["similarity"]) == 0) == (batch == 0)
        stored = [name for name in memory.tensors if "gradients" in name]
        assert len(stored) == batch + 1


def test_what_is_remembered_carries_no_graph() -> None:
    memory = Memory()
    EARLIER.accumulate(make_network(), [some_batch()], Step(seed=0, number=0, memory=memory))
    assert memory.tensors
    assert not any(tensor.requires_grad for tensor in memory.tensors.values())


def test_the_memory_survives_its_round_trip_bit_for_bit() -> None:
    model, memory = make_network(), Memory()
    for batch in range(3):
        EARLIER.accumulate(model, [some_batch(batch)], Step(seed=0, number=batch, batch=batch, memory=memory))
    stored = {name: tensor.clone() for name, tensor in sorted(memory.state().items())}  # as a file would order them
    runs = []
    for one in (memory, Memory(stored)):
        model.zero_grad()
        torch.manual_seed(5)
        measured = EARLIER.accumulate(model, [some_batch(3)], Step(seed=0, number=3, batch=3, memory=one))
        runs.append((float(measured["loss"]), gradients(model), one.state()))
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(first, second) for first, second in zip(runs[0][1], runs[1][1], strict=True))
    assert runs[0][2].keys() == runs[1][2].keys()
    assert all(torch.equal(tensor, runs[1][2][name]) for name, tensor in runs[0][2].items())


def test_the_members_of_an_ensemble_remember_their_own_gradients() -> None:
    model, memory = Ensemble([make_network(), make_network()]).train(), Memory()
    measured = EARLIER.accumulate(model, [some_batch()], Step(seed=0, number=0, memory=memory))
    assert float(measured["similarity"]) == 0
    first, second = (memory.tensors[f"dropen/gradients/{index}/0"] for index in (0, 1))
    assert not torch.equal(first, second)


def test_only_earlier_batches_tie_it_to_one_process() -> None:
    assert not Dropen().per_image_memory
    assert Dropen.release().per_image_memory


# ---- presets and bad input -------------------------------------------------------------------------------------------


def test_the_released_reading_differs_in_the_memory_and_in_the_sum_of_gradients() -> None:
    release = Dropen.release(lambda_a=3)
    assert (release.memory, release.smoothness.accumulate_gradients, release.lambda_a) == ("previous_batches", True, 3)
    assert (Dropen().memory, Dropen().smoothness.accumulate_gradients) == ("masks", False)
    for objective in (release, Dropen()):
        assert (objective.smoothness.eps_start, objective.smoothness.eps_end) == (0.1, 0.2)


@pytest.mark.parametrize(
    "model",
    [
        lambda: build("lenet", images=SMALL),
        lambda: build("resnet8", images=SMALL),
        lambda: nn.Sequential(nn.Dropout(0.0), nn.Flatten(), nn.Linear(48, 10)),
    ],
)
def test_a_network_without_dropout_is_refused(model: Any) -> None:
    with pytest.raises(BadInput, match=r"dropen makes its members of dropout masks, and \w+ has no dropout; train"):
        Dropen().check(model())


@pytest.mark.parametrize("network", ["lenet", "two_layer_cnn"])
def test_a_network_with_dropout_is_accepted(network: str) -> None:
    Dropen().check(make_network(network))
    Dropen().check(Ensemble([make_network(network)]))


def test_several_exits_are_refused() -> None:
    with pytest.raises(BadInput, match="dropen trains networks with one exit"):
        Dropen().check(build("small_cnn3", images=SMALL))


def test_earlier_batches_must_have_the_size_of_this_one() -> None:
    model, memory = make_network(), Memory()
    EARLIER.accumulate(model, [some_batch(size=6)], Step(seed=0, number=0, memory=memory))
    with pytest.raises(BadInput, match=r"dropen .* pairs images by their row in the batch, got 4 after 6"):
        EARLIER.accumulate(model, [some_batch(size=4)], Step(seed=0, number=1, batch=1, memory=memory))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "batches"}, "one of masks, previous_batches, got 'batches'"),
        ({"masks": 1}, "at least 2 masks and 1 batch, got 1 and 5"),
        ({"batches": 0}, "at least 2 masks and 1 batch, got 5 and 0"),
        ({"lambda_a": -1}, "finite lambda_a >= 0, got -1"),
        ({"lambda_b": math.inf}, "finite lambda_b >= 0, got inf"),
    ],
)
def test_hyper_parameters_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        Dropen(**options)
