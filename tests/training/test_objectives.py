from __future__ import annotations

import copy
import dataclasses
import random
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.objectives import OBJECTIVES, Batch, EnsembleInOne, Objective, Standard, Step
from training.randomness import tensor_generator
from zoo import paths
from zoo.derive import derive
from zoo.errors import BadInput
from zoo.networks import ImageFormat, build
from zoo.rgn import RandomGatedNetwork, randomly_gate

SMALL = ImageFormat(height=16, width=16)
STEP = Step(seed=0, number=3)
PRESETS = {"default": EnsembleInOne(), "paper": EnsembleInOne.paper(), "release": EnsembleInOne.release()}


def make_rgn(width: int = 4, candidates: int = 2) -> RandomGatedNetwork:
    rgn = randomly_gate(build("resnet8", images=SMALL, width=width), candidates=candidates)
    for _ in range(3):  # statistics that belong to images, for every candidate
        for gate in range(candidates):
            rgn.train()(torch.rand(8, 3, 16, 16), [gate] * rgn.num_gates)
    return rgn


@pytest.fixture
def rgn() -> RandomGatedNetwork:
    return make_rgn()


def make_batches(streams: int, size: int = 6) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        Batch(torch.rand(size, 3, 16, 16, generator=generator), torch.randint(0, 10, (size,), generator=generator))
        for _ in range(streams)
    ]


def some_path(rgn: RandomGatedNetwork) -> paths.Path:
    return paths.sample(rgn.num_gates, rgn.candidates, random.Random(0))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


@pytest.fixture(params=OBJECTIVES)
def objective(request: pytest.FixtureRequest) -> Objective:
    return OBJECTIVES[request.param]()


# ---- every objective -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_batch_that_comes_again_and_again_is_learnt(objective: Objective, precision: torch.dtype) -> None:
    model = make_rgn(width=8).train()
    batches = make_batches(objective.streams)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for number in range(40):
        optimizer.zero_grad(set_to_none=True)
        measured = objective.accumulate(model, batches, Step(seed=0, number=number, precision=precision))
        optimizer.step()
        losses.append(float(measured["loss"]))
    first, last = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
    assert last < 0.6 * first, losses


def test_an_objective_is_a_function_of_its_step(objective: Objective, rgn: RandomGatedNetwork) -> None:
    def run(step: Step) -> tuple[dict[str, Tensor], float]:
        model = copy.deepcopy(rgn).train()
        loss = objective.accumulate(model, make_batches(objective.streams), step)["loss"]
        return gradients(model), float(loss)

    (first, first_loss), (again, again_loss) = run(STEP), run(STEP)
    assert first_loss == again_loss
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(run(Step(seed=0, number=number))[0].keys() != first.keys() for number in range(4, 7))


def test_gates_do_not_depend_on_the_rank(objective: Objective, rgn: RandomGatedNetwork) -> None:
    touched = []
    for rank in (0, 1):
        model = copy.deepcopy(rgn).train()
        objective.accumulate(model, make_batches(objective.streams), Step(seed=0, number=3, rank=rank))
        touched.append(gradients(model).keys())
    assert touched[0] == touched[1]


def test_gradients_are_added_to_those_already_there(objective: Objective, rgn: RandomGatedNetwork) -> None:
    model = copy.deepcopy(rgn).train()
    batches = make_batches(objective.streams)
    objective.accumulate(model, batches, STEP)
    once, weights = gradients(model), {name: p.detach().clone() for name, p in model.named_parameters()}
    twin = copy.deepcopy(rgn).train()
    for parameter in twin.parameters():
        parameter.grad = torch.ones_like(parameter)
    objective.accumulate(twin, batches, STEP)
    for name, gradient in gradients(twin).items():
        torch.testing.assert_close(gradient, once.get(name, torch.zeros_like(gradient)) + 1, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(p, weights[name]) for name, p in twin.named_parameters()), "only the loop steps"


def test_measurements_are_detached_scalars_and_the_mode_is_kept(objective: Objective, rgn: RandomGatedNetwork) -> None:
    measured = objective.accumulate(rgn.train(), make_batches(objective.streams), STEP)
    assert "loss" in measured
    assert all(value.ndim == 0 and not value.requires_grad for value in measured.values())
    assert all(module.training for module in rgn.modules())


def test_an_objective_is_frozen_and_hashable(objective: Objective) -> None:
    assert hash(objective) == hash(dataclasses.replace(objective))
    field = dataclasses.fields(objective)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(objective, field, None)


# ---- standard --------------------------------------------------------------------------------------------------------


def test_standard_on_a_plain_network_is_its_cross_entropy() -> None:
    network = build("lenet", images=SMALL)
    (batch,) = make_batches(1)
    measured = Standard(label_smoothing=0.1).accumulate(network, [batch], STEP)
    found = gradients(network)
    network.zero_grad()
    logits = network(batch.images)
    loss = F.cross_entropy(logits, batch.labels, label_smoothing=0.1)
    loss.backward()
    assert float(measured["loss"]) == float(loss.detach())
    assert float(measured["accuracy"]) == float((logits.argmax(1) == batch.labels).float().mean())
    assert all(torch.equal(gradient, found[name]) for name, gradient in gradients(network).items())


def test_standard_on_an_rgn_trains_one_path_per_step(rgn: RandomGatedNetwork) -> None:
    seen = set()
    for number in range(20):
        rgn.zero_grad(set_to_none=True)
        Standard().accumulate(rgn, make_batches(1), Step(seed=0, number=number))
        active = [[gate for gate in range(2) if _has_gradient(rgn.bank[layer][gate])] for layer in range(rgn.num_gates)]
        assert all(len(gates) == 1 for gates in active)
        seen.add(tuple(gates[0] for gates in active))
    assert len(seen) > 15


def _has_gradient(module: nn.Module) -> bool:
    return any(parameter.grad is not None for parameter in module.parameters())


# ---- Ensemble-in-One: distillation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_distilled_images_stay_near_their_source_and_in_the_pixel_range(
    preset: EnsembleInOne, rgn: RandomGatedNetwork
) -> None:
    source, target = (batch.images for batch in make_batches(2))
    source[0], source[1] = 0, 1
    before = source.clone(), target.clone()
    for layer in range(1, rgn.num_features + 1):
        distilled = preset.distil(rgn, some_path(rgn), layer, source, target, STEP)
        assert distilled.shape == source.shape
        assert not distilled.requires_grad
        assert float((distilled - source).abs().max()) <= preset.eps + 1e-6
        assert float((distilled - source).abs().max()) > 0
        assert float(distilled.min()) >= 0
        assert float(distilled.max()) <= 1
    assert torch.equal(source, before[0])
    assert torch.equal(target, before[1])


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_distillation_brings_the_feature_nearer_to_the_targets(preset: EnsembleInOne, rgn: RandomGatedNetwork) -> None:
    source, target = (batch.images for batch in make_batches(2))
    path = some_path(rgn)
    for layer in range(1, rgn.num_features + 1):
        model = copy.deepcopy(rgn)
        distilled = preset.distil(model, path, layer, source, target, STEP)
        model.train(preset.batch_norm == "train")

        def feature(images: Tensor, model: RandomGatedNetwork = model, layer: int = layer) -> Tensor:
            with torch.no_grad():
                return model.features(images, layer, model.select(path), activated=preset.activated)

        wanted = feature(target)
        assert (feature(distilled) - wanted).square().sum() < 0.95 * (feature(source) - wanted).square().sum(), layer


def naive_distil(
    rgn: RandomGatedNetwork,
    path: paths.Path,
    layer: int,
    source: Tensor,
    target: Tensor,
    start: Tensor,
    *,
    activated: bool,
) -> Tensor:
    """Distil by the text of the algorithm: the whole derived network at every step, features caught by a hook."""
    network = derive(rgn, path)
    relus = [module for module in network.modules() if isinstance(module, nn.ReLU)]

    def feature(images: Tensor) -> Tensor:
        caught: list[Tensor] = []
        relu = relus[min(layer, len(relus)) - 1]
        hook = relu.register_forward_hook(lambda _, inputs, output: caught.append(output if activated else inputs[0]))
        logits = network(images)
        hook.remove()
        return logits if layer > len(relus) else caught[0]

    images = start
    for _ in range(10):
        images = images.detach().requires_grad_(True)
        distance = F.mse_loss(feature(images), feature(target))
        distance.backward()
        assert images.grad is not None
        images = images.detach() - 0.007 * images.grad.sign()
        images = (source + (images - source).clamp(-0.07, 0.07)).clamp(0, 1)
    return images


@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize("activated", [False, True])
def test_folded_distillation_equals_a_naive_one_on_the_derived_network(
    activated: bool, random_start: bool, rgn: RandomGatedNetwork
) -> None:
    objective = EnsembleInOne(activated=activated, random_start=random_start)
    source, target = (batch.images for batch in make_batches(2))
    path, number = some_path(rgn), 1
    start = source
    if random_start:
        noise = torch.rand(
            source.shape, generator=tensor_generator(STEP.seed, "distil", STEP.number, number, STEP.rank)
        )
        start = (source + 0.07 * (2 * noise - 1)).clamp(0, 1)
    for layer in range(1, rgn.num_features + 1):
        distilled = objective.distil(rgn, path, layer, source, target, STEP, number)
        expected = naive_distil(rgn, path, layer, source, target, start, activated=activated)
        # Rounding decides the sign of a gradient that is almost 0, and that pixel then goes another way.
        differing = ((distilled - expected).abs() > 1e-5).float().mean()
        assert float(differing) < 0.01, layer


def test_momentum_adds_up_normalised_gradients() -> None:
    # One convolution that copies a channel: the distance's gradient is 2 (x - t) wherever it is not clipped.
    template = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.Flatten(), nn.Linear(4, 2))
    nn.init.ones_(template[0].weight)
    rgn = randomly_gate(template, candidates=1)
    source, target = torch.full((1, 1, 2, 2), 0.5), torch.full((1, 1, 2, 2), 0.54)
    step = Step(seed=0, number=0)

    def end(momentum: float) -> float:
        objective = EnsembleInOne(eps=0.5, distillation_steps=5, step_size=0.03, momentum=momentum)
        return float(objective.distil(rgn, (0,), 1, source, target, step).mean())

    # Every normalised gradient is -1 below the target and 1 above it. Without momentum the image goes 0.53, 0.56, 0.53,
    # 0.56, 0.53; with it the velocities are -1, -2, -1, 0, 1, and the image goes 0.53, 0.56, 0.59, 0.59, 0.56.
    assert end(0.0) == pytest.approx(0.53, abs=1e-6)
    assert end(1.0) == pytest.approx(0.56, abs=1e-6)


def test_in_eval_mode_distillation_moves_no_statistics(rgn: RandomGatedNetwork) -> None:
    rgn.train()
    before = buffers(rgn)
    source, target = (batch.images for batch in make_batches(2))
    for layer in (1, 4, rgn.num_features):
        EnsembleInOne.release().distil(rgn, some_path(rgn), layer, source, target, STEP)
    assert all(torch.equal(buffer, before[name]) for name, buffer in rgn.named_buffers())
    assert all(module.training for module in rgn.modules())


def test_in_train_mode_distillation_moves_the_statistics_of_its_prefix_twice_a_step(rgn: RandomGatedNetwork) -> None:
    rgn.eval()
    before = buffers(rgn)
    source, target = (batch.images for batch in make_batches(2))
    path, layer = some_path(rgn), 4
    EnsembleInOne.paper().distil(rgn, path, layer, source, target, STEP)
    for name, buffer in rgn.named_buffers():
        if name.startswith("bank."):
            _, position, gate, _, kind = name.split(".")
            active = int(position) < layer and path[int(position)] == int(gate)
            if kind == "num_batches_tracked":
                assert int(buffer - before[name]) == (20 if active else 0), name
            else:
                assert torch.equal(buffer, before[name]) != active, name
    assert not any(module.training for module in rgn.modules())


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_distillation_leaves_no_gradient_on_the_parameters(preset: EnsembleInOne, rgn: RandomGatedNetwork) -> None:
    source, target = (batch.images for batch in make_batches(2))
    preset.distil(rgn, some_path(rgn), rgn.num_features, source, target, STEP)
    assert gradients(rgn) == {}
    assert all(parameter.requires_grad for parameter in rgn.parameters())


def test_random_starts_differ_between_paths_ranks_and_steps(rgn: RandomGatedNetwork) -> None:
    objective = EnsembleInOne.release()
    source, target = (batch.images for batch in make_batches(2))
    positions = [
        (STEP, 0),
        (STEP, 1),
        (dataclasses.replace(STEP, rank=1), 0),
        (dataclasses.replace(STEP, number=4), 0),
    ]
    distilled = [objective.distil(rgn, some_path(rgn), 1, source, target, step, number) for step, number in positions]
    assert not any(torch.equal(distilled[i], distilled[j]) for i in range(4) for j in range(i))


# ---- Ensemble-in-One: the loss ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recorded(EnsembleInOne):
    """Ensemble-in-One that keeps what it distilled; without distilling it where only the paths matter."""

    asked: ClassVar[list[tuple[paths.Path, int, Tensor]]] = []
    really: bool = True

    def distil(self, model: RandomGatedNetwork, path: paths.Path, layer: int, source: Tensor, *others: Any) -> Tensor:
        images = super().distil(model, path, layer, source, *others) if self.really else source
        self.asked.append((path, layer, images))
        return images


@pytest.fixture
def asked() -> list[tuple[paths.Path, int, Tensor]]:
    Recorded.asked.clear()
    return Recorded.asked


@pytest.mark.parametrize("divide_by_paths", [True, False])
@pytest.mark.parametrize("batch_norm", ["eval", "train"])
def test_the_accumulated_gradient_is_that_of_the_summed_loss(
    batch_norm: str, divide_by_paths: bool, rgn: RandomGatedNetwork, asked: list[tuple[paths.Path, int, Tensor]]
) -> None:
    source, target = make_batches(2)
    objective = Recorded(batch_norm=batch_norm, divide_by_paths=divide_by_paths, random_start=True)
    measured = objective.accumulate(rgn.train(), [source, target], Step(seed=0, number=1))
    found = gradients(rgn)
    assert len(asked) == 3

    rgn.zero_grad(set_to_none=True)
    loss = torch.stack(
        [
            F.cross_entropy(rgn(images, path), source.labels)
            for i, (path, _, _) in enumerate(asked)
            for j, (_, _, images) in enumerate(asked)
            if i != j
        ]
    ).sum()
    (loss / 3 if divide_by_paths else loss).backward()
    expected = gradients(rgn)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-4)
    assert float(measured["loss"]) == pytest.approx(float(loss.detach()) / 6, rel=1e-4)


@pytest.mark.parametrize(("candidates", "wanted"), [(2, 3), (2, 6), (3, 4), (1, 3)])
def test_paths_differ_within_the_layer_for_every_layer(
    candidates: int, wanted: int, asked: list[tuple[paths.Path, int, Tensor]]
) -> None:
    class Mute(RandomGatedNetwork):
        def forward(self, images: Tensor, path: Any) -> Tensor:
            return next(self.parameters()).sum().expand(len(images), 10)  # only the choice of paths matters here

    rgn = make_rgn(candidates=candidates).train()
    rgn.__class__ = Mute
    layers = set()
    for number in range(60):
        asked.clear()
        objective = Recorded(paths=wanted, really=False)
        objective.accumulate(rgn, make_batches(2, size=2), Step(seed=0, number=number))
        (layer,) = {layer for _, layer, _ in asked}
        within = min(layer, rgn.num_gates)
        assert len(asked) == min(wanted, candidates**within)
        assert len({path[:within] for path, _, _ in asked}) == len(asked)
        layers.add(layer)
    assert layers == set(range(1, rgn.num_features + 1))


def test_every_path_trains_on_what_the_others_distilled_and_all_is_distilled_first(rgn: RandomGatedNetwork) -> None:
    events: list[str] = []

    class Watched(RandomGatedNetwork):
        def forward(self, images: Tensor, path: Any) -> Tensor:
            events.append(f"train {tuple(path)} {float(images[0, 0, 0, 0])}")
            return super().forward(images, path)

    class Marked(EnsembleInOne):
        def distil(
            self, model: RandomGatedNetwork, path: paths.Path, layer: int, source: Tensor, *others: Any
        ) -> Tensor:
            events.append(f"distil {path}")
            return torch.full_like(source, len([event for event in events if event.startswith("distil")]) / 8)

    rgn.__class__ = Watched
    Marked().accumulate(rgn.train(), make_batches(2), Step(seed=0, number=1))
    chosen = [event.removeprefix("distil ") for event in events[:3]]
    assert events[3:] == [
        f"train {path} {(other + 1) / 8}" for number, path in enumerate(chosen) for other in range(3) if other != number
    ]


def test_one_path_alone_trains_on_its_own_distillation(
    rgn: RandomGatedNetwork, asked: list[tuple[paths.Path, int, Tensor]]
) -> None:
    source, target = make_batches(2)
    measured = Recorded(paths=1).accumulate(rgn.train(), [source, target], STEP)
    ((path, _, images),) = asked
    assert float(measured["loss"]) == pytest.approx(float(F.cross_entropy(rgn(images, path), source.labels).detach()))


def test_a_plain_network_is_refused() -> None:
    with pytest.raises(BadInput, match="trains a random gated network, got a plain CifarResNet"):
        EnsembleInOne().accumulate(build("resnet8", images=SMALL), make_batches(2), STEP)


def test_the_two_readings_differ_exactly_where_the_sources_do() -> None:
    paper, release = (dataclasses.asdict(preset) for preset in (EnsembleInOne.paper(), EnsembleInOne.release()))
    assert {field: (paper[field], release[field]) for field in paper if paper[field] != release[field]} == {
        "random_start": (False, True),
        "momentum": (1.0, 0.0),
        "batch_norm": ("train", "eval"),
        "activated": (False, True),
        "divide_by_paths": (False, True),
    }
    assert (paper["paths"], paper["eps"], paper["distillation_steps"]) == (3, 0.07, 10)
    assert EnsembleInOne.paper(eps=0.03) == dataclasses.replace(EnsembleInOne.paper(), eps=0.03)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"paths": 0}, "at least 1 path and 1 step, got 0 and 10"),
        ({"distillation_steps": 0}, "at least 1 path and 1 step, got 3 and 0"),
        ({"eps": 18}, "need 0 <= eps <= 1, got 18; .*write 0.07, not 18"),
        ({"batch_norm": "frozen"}, "must be 'eval' or 'train', got 'frozen'"),
    ],
)
def test_hyper_parameters_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        EnsembleInOne(**options)


def test_bfloat16_distillation_agrees_with_full_precision_on_most_pixels(rgn: RandomGatedNetwork) -> None:
    source, target = (batch.images for batch in make_batches(2))
    objective = EnsembleInOne(distillation_steps=1)
    full, half = (
        objective.distil(rgn, some_path(rgn), 3, source, target, Step(seed=0, number=0, precision=precision))
        for precision in (torch.float32, torch.bfloat16)
    )
    assert half.dtype == torch.float32
    assert float((full == half).float().mean()) > 0.9
