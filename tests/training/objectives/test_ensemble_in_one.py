from __future__ import annotations

import copy
import dataclasses
import random
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.objectives import Batch, EnsembleInOne, Step, TrainingAttack
from training.objectives.distilled import PREFIX_SHARE
from training.objectives.network import Network
from training.randomness import tensor_generator
from zoo import paths
from zoo.errors import BadInput
from zoo.gates.derive import Ensemble, derive
from zoo.gates.rgn import RandomGatedNetwork, randomly_gate
from zoo.networks import ImageFormat, build

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


def make_batches(size: int = 6) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        Batch(torch.rand(size, 3, 16, 16, generator=generator), torch.randint(0, 10, (size,), generator=generator))
        for _ in range(2)
    ]


def some_path(rgn: RandomGatedNetwork) -> paths.Path:
    return paths.sample(rgn.num_gates, rgn.candidates, random.Random(0))


def along(rgn: RandomGatedNetwork, path: paths.Path, step: Step = STEP, number: int = 0) -> Network:
    return Network(rgn.template, step, number, rgn, path)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


# ---- distillation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_distilled_images_stay_near_their_source_and_in_the_pixel_range(
    preset: EnsembleInOne, rgn: RandomGatedNetwork
) -> None:
    source, target = (batch.images for batch in make_batches())
    source[0], source[1] = 0, 1
    before = source.clone(), target.clone()
    for layer in range(1, rgn.num_features + 1):
        distilled = preset.distil(along(rgn, some_path(rgn)), layer, source, target)
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
    source, target = (batch.images for batch in make_batches())
    path = some_path(rgn)
    for layer in range(1, rgn.num_features + 1):
        model = copy.deepcopy(rgn)
        distilled = preset.distil(along(model, path), layer, source, target)
        model.train(preset.batch_norm == "train")

        def feature(images: Tensor, model: RandomGatedNetwork = model, layer: int = layer) -> Tensor:
            with torch.no_grad():
                return model.runner(layer, model.select(path), activated=preset.activated)(images)

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
    source, target = (batch.images for batch in make_batches())
    path, number = some_path(rgn), 1
    start = source
    if random_start:
        noise = torch.rand(
            source.shape, generator=tensor_generator(STEP.seed, "distil", STEP.number, number, STEP.rank)
        )
        start = (source + 0.07 * (2 * noise - 1)).clamp(0, 1)
    for layer in range(1, rgn.num_features + 1):
        distilled = objective.distil(along(rgn, path, STEP, number), layer, source, target)
        expected = naive_distil(rgn, path, layer, source, target, start, activated=activated)
        # Rounding decides the sign of a gradient that is almost 0, and that pixel then goes another way.
        differing = ((distilled - expected).abs() > 1e-5).float().mean()
        assert float(differing) < 0.01, layer


@pytest.mark.filterwarnings("ignore:.*single gated layer:zoo.errors.GatingWarning")
def test_momentum_adds_up_normalised_gradients() -> None:
    # One convolution that copies a channel: the distance's gradient is 2 (x - t) wherever it is not clipped.
    template: Any = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.Flatten(), nn.Linear(4, 2))
    template.image_shape = (1, 2, 2)
    nn.init.ones_(template[0].weight)
    rgn = randomly_gate(template, candidates=1)
    source, target = torch.full((1, 1, 2, 2), 0.5), torch.full((1, 1, 2, 2), 0.54)
    step = Step(seed=0, number=0)

    def end(momentum: float) -> float:
        objective = EnsembleInOne(eps=0.5, distillation_steps=5, step_size=0.03, momentum=momentum)
        return float(objective.distil(along(rgn, (0,), step), 1, source, target).mean())

    # Every normalised gradient is -1 below the target and 1 above it. Without momentum the image goes 0.53, 0.56, 0.53,
    # 0.56, 0.53; with it the velocities are -1, -2, -1, 0, 1, and the image goes 0.53, 0.56, 0.59, 0.59, 0.56.
    assert end(0.0) == pytest.approx(0.53, abs=1e-6)
    assert end(1.0) == pytest.approx(0.56, abs=1e-6)


def test_in_eval_mode_distillation_moves_no_statistics(rgn: RandomGatedNetwork) -> None:
    rgn.train()
    before = buffers(rgn)
    source, target = (batch.images for batch in make_batches())
    for layer in (1, 4, rgn.num_features):
        EnsembleInOne.release().distil(along(rgn, some_path(rgn)), layer, source, target)
    assert all(torch.equal(buffer, before[name]) for name, buffer in rgn.named_buffers())
    assert all(module.training for module in rgn.modules())


def test_in_train_mode_distillation_moves_the_statistics_of_its_prefix_twice_a_step(rgn: RandomGatedNetwork) -> None:
    rgn.eval()
    before = buffers(rgn)
    source, target = (batch.images for batch in make_batches())
    path, layer = some_path(rgn), 4
    EnsembleInOne.paper().distil(along(rgn, path), layer, source, target)
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
    source, target = (batch.images for batch in make_batches())
    preset.distil(along(rgn, some_path(rgn)), rgn.num_features, source, target)
    assert gradients(rgn) == {}
    assert all(parameter.requires_grad for parameter in rgn.parameters())


def test_random_starts_differ_between_paths_ranks_and_steps(rgn: RandomGatedNetwork) -> None:
    objective = EnsembleInOne.release()
    source, target = (batch.images for batch in make_batches())
    positions = [
        (STEP, 0),
        (STEP, 1),
        (dataclasses.replace(STEP, rank=1), 0),
        (dataclasses.replace(STEP, number=4), 0),
    ]
    distilled = [
        objective.distil(along(rgn, some_path(rgn), step, number), 1, source, target) for step, number in positions
    ]
    assert not any(torch.equal(distilled[i], distilled[j]) for i in range(4) for j in range(i))


# ---- the loss --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recorded(EnsembleInOne):
    """Ensemble-in-One that keeps what it distilled; without distilling it where only the paths matter."""

    asked: ClassVar[list[tuple[paths.Path, int, Tensor]]] = []
    really: bool = True

    def distil(self, network: Network, layer: int, source: Tensor, target: Tensor) -> Tensor:
        images = super().distil(network, layer, source, target) if self.really else source
        assert network.path is not None
        self.asked.append((network.path, layer, images))
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
    source, target = make_batches()
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


def test_the_loss_is_divided_by_the_paths_that_there_were(
    rgn: RandomGatedNetwork, asked: list[tuple[paths.Path, int, Tensor]]
) -> None:
    source, target = make_batches()
    number = next(n for n in range(100) if EnsembleInOne().drawn(rgn, Step(seed=0, number=n))[0] == 1)
    Recorded().accumulate(rgn.train(), [source, target], Step(seed=0, number=number))
    found = gradients(rgn)
    (first, _, first_images), (second, _, second_images) = asked  # two prefixes at layer 1, though three were wanted
    rgn.zero_grad(set_to_none=True)
    loss = F.cross_entropy(rgn(second_images, first), source.labels)
    loss = loss + F.cross_entropy(rgn(first_images, second), source.labels)
    (loss / 2).backward()
    for name, gradient in gradients(rgn).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-4)


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
        objective.accumulate(rgn, make_batches(size=2), Step(seed=0, number=number))
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
        def distil(self, network: Network, layer: int, source: Tensor, target: Tensor) -> Tensor:
            events.append(f"distil {network.path}")
            return torch.full_like(source, len([event for event in events if event.startswith("distil")]) / 8)

    rgn.__class__ = Watched
    Marked().accumulate(rgn.train(), make_batches(), Step(seed=0, number=1))
    chosen = [event.removeprefix("distil ") for event in events[:3]]
    assert events[3:] == [
        f"train {path} {(other + 1) / 8}" for number, path in enumerate(chosen) for other in range(3) if other != number
    ]


def test_one_path_alone_trains_on_its_own_distillation(
    rgn: RandomGatedNetwork, asked: list[tuple[paths.Path, int, Tensor]]
) -> None:
    source, target = make_batches()
    measured = Recorded(paths=1).accumulate(rgn.train(), [source, target], STEP)
    ((path, _, images),) = asked
    assert float(measured["loss"]) == pytest.approx(float(F.cross_entropy(rgn(images, path), source.labels).detach()))


def test_a_plain_network_is_refused() -> None:
    with pytest.raises(BadInput, match="trains a random gated network, got a plain CifarResNet"):
        EnsembleInOne().accumulate(build("resnet8", images=SMALL), make_batches(), STEP)


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
        ({"step_size": 7}, "need 0 < step_size <= 1, got 7"),
        ({"momentum": -1.0}, "momentum >= 0, got -1"),
        ({"layer_drawn": "step"}, "layer_drawn must be one of batch, epoch, got 'step'"),
        ({"batch_norm": "frozen"}, "batch_norm must be one of eval, train, got 'frozen'"),
    ],
)
def test_hyper_parameters_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        EnsembleInOne(**options)


def test_bfloat16_distillation_agrees_with_full_precision_on_most_pixels(rgn: RandomGatedNetwork) -> None:
    source, target = (batch.images for batch in make_batches())
    objective = EnsembleInOne(distillation_steps=1)
    full, half = (
        objective.distil(along(rgn, some_path(rgn), Step(seed=0, number=0, precision=precision)), 3, source, target)
        for precision in (torch.float32, torch.bfloat16)
    )
    assert half.dtype == torch.float32
    assert float((full == half).float().mean()) > 0.9


# ---- with adversarial training ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("divide_by_paths", [True, False])
def test_with_an_attack_each_path_also_learns_examples_against_itself(
    divide_by_paths: bool, rgn: RandomGatedNetwork, asked: list[tuple[paths.Path, int, Tensor]]
) -> None:
    source, target = make_batches()
    attack = TrainingAttack(steps=2)
    objective = Recorded(divide_by_paths=divide_by_paths, adversarial=attack)
    step = Step(seed=0, number=1)
    measured = objective.accumulate(rgn.train(), [source, target], step)
    found = gradients(rgn)
    assert len(asked) == 3

    rgn.zero_grad(set_to_none=True)
    distilled, adversarial = [], []
    for i, (path, _, _) in enumerate(asked):
        examples = attack.on(along(rgn, path, step, i), source.images, source.labels)
        assert 0 < float((examples - source.images).abs().max()) <= 8 / 255 + 1e-6
        adversarial.append(F.cross_entropy(rgn(examples, path), source.labels))
        distilled += [F.cross_entropy(rgn(asked[j][2], path), source.labels) for j in range(3) if j != i]
    loss = torch.stack(distilled).sum() + torch.stack(adversarial).sum()
    (loss / 3 if divide_by_paths else loss).backward()
    expected = gradients(rgn)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-4)
    assert float(measured["loss"]) == pytest.approx(float(torch.stack(distilled).mean().detach()), rel=1e-4)
    assert float(measured["adversarial_loss"]) == pytest.approx(
        float(torch.stack(adversarial).mean().detach()), rel=1e-4
    )


def test_the_attack_of_the_released_code_is_the_default_one() -> None:
    attack = TrainingAttack()
    assert (attack.eps, attack.step_size, attack.steps) == (8 / 255, 2 / 255, 10)
    assert attack.random_start
    assert attack.batch_norm == "train"


# ---- what it says of itself ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adversarial", [None, TrainingAttack(steps=4)])
@pytest.mark.parametrize("batch_norm", ["eval", "train"])
def test_the_predicted_cost_is_what_runs(
    batch_norm: str, adversarial: TrainingAttack | None, rgn: RandomGatedNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes = {True: 0, False: 0}  # by whether gradients are for weights, too

    def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
        passes[rgn_is_learning] += 1

    rgn_is_learning = False
    real = Network.__call__

    def learning(network: Network, images: Tensor) -> Tensor:
        nonlocal rgn_is_learning
        rgn_is_learning = torch.is_grad_enabled() and not images.requires_grad
        logits = real(network, images)
        rgn_is_learning = False
        return logits

    monkeypatch.setattr(Network, "__call__", learning)
    rgn.template.get_submodule("conv1").register_forward_hook(count)
    objective = EnsembleInOne(batch_norm=batch_norm, adversarial=adversarial, distillation_steps=6)
    number = next(n for n in range(100) if objective.drawn(rgn, Step(seed=0, number=n))[0] == rgn.num_features)
    objective.accumulate(rgn.train(), make_batches(), Step(seed=0, number=number))

    # At the last layer the prefix is the whole network. A pass for images alone costs 1 and its backward 1, a pass that
    # learns 1 and its backward 2; the target's passes have no backward.
    targets = 3 * (1 if batch_norm == "eval" else 6)
    attacked = 0 if adversarial is None else 3 * 4
    assert passes == {True: 3 * 2 + (0 if adversarial is None else 3), False: 3 * 6 + targets + attacked}
    in_full = 3 * passes[True] + 2 * (passes[False] - targets) + targets
    distillation = 2 * 3 * 6 + targets
    assert objective.forwards() == pytest.approx(in_full - (1 - PREFIX_SHARE) * distillation)


def test_at_the_published_scale_a_step_costs_about_what_the_literature_says() -> None:
    # 78 with target features computed at every step and gradients of the weights along the way, 26 standard steps
    assert EnsembleInOne.release().forwards() == pytest.approx(52, abs=2)
    assert EnsembleInOne.paper().forwards() == pytest.approx(65, abs=2)
    assert EnsembleInOne(adversarial=TrainingAttack()).forwards() == EnsembleInOne().forwards() + 3 * 23


def test_only_a_random_gated_network_passes_the_check(rgn: RandomGatedNetwork) -> None:
    assert EnsembleInOne.needs == "gates"
    EnsembleInOne().check(rgn)
    with pytest.raises(BadInput, match=r"got a plain Ensemble; set candidates=2 in the recipe, or .* with dverge"):
        EnsembleInOne().check(Ensemble([build("resnet8", images=SMALL, width=4) for _ in range(2)]))


def test_a_layer_may_be_kept_for_an_epoch(rgn: RandomGatedNetwork) -> None:
    objective = EnsembleInOne(layer_drawn="epoch")
    layers = {objective.drawn(rgn, Step(seed=0, number=number, epoch=1))[0] for number in range(20)}
    assert len(layers) == 1
