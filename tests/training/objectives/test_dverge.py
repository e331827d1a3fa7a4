from __future__ import annotations

import copy
import dataclasses
import gc
import weakref
from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.objectives import Batch, Dverge, EnsembleInOne, PgdAt, Step, TrainingAttack
from training.objectives.distilled import Prefixes, num_features
from training.objectives.network import Network
from zoo.errors import BadInput
from zoo.gates.derive import Ensemble
from zoo.gates.rgn import RandomGatedNetwork, randomly_gate
from zoo.networks import ImageFormat, build

SMALL = ImageFormat(height=16, width=16)
STEP = Step(seed=0, number=3)
LAYERS = 8  # of a ResNet-8: seven convolutions off the shortcuts, and the logits


def make_member(**options: Any) -> nn.Module:
    member = build("resnet8", images=SMALL, width=4, **options)
    for _ in range(3):  # statistics that belong to images
        member.train()(torch.rand(8, 3, 16, 16))
    return member


def make_ensemble(members: int = 3) -> Ensemble:
    return Ensemble([make_member() for _ in range(members)]).train()


def make_rgn(candidates: int = 2) -> RandomGatedNetwork:
    return randomly_gate(build("resnet8", images=SMALL, width=4), candidates=candidates).train()


def make_batches(size: int = 6) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        Batch(torch.rand(size, 3, 16, 16, generator=generator), torch.randint(0, 10, (size,), generator=generator))
        for _ in range(2)
    ]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recorded(Dverge):
    """DVERGE that keeps what it distilled."""

    asked: ClassVar[list[tuple[int, int, Tensor]]] = []

    def distil(self, network: Network, layer: int, source: Tensor, target: Tensor) -> Tensor:
        images = super().distil(network, layer, source, target)
        self.asked.append((network.index, layer, images))
        return images


@pytest.fixture
def asked() -> list[tuple[int, int, Tensor]]:
    Recorded.asked.clear()
    return Recorded.asked


# ---- the layer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [make_ensemble(2), make_rgn()], ids=["members", "paths"])
def test_the_layer_is_constant_in_an_epoch_and_all_are_drawn_over_epochs(model: nn.Module) -> None:
    def layer(seed: int, epoch: int, number: int) -> int:
        return Dverge().drawn(model, Step(seed=seed, number=number, epoch=epoch))[0]

    drawn = []
    for epoch in range(60):
        (kept,) = {layer(0, epoch, 60 * epoch + number) for number in range(5)}
        drawn.append(kept)
    assert set(drawn) == set(range(1, LAYERS + 1))
    assert drawn != [layer(1, epoch, 0) for epoch in range(60)], "it depends on the seed"


def test_on_request_a_layer_is_drawn_per_batch() -> None:
    model = make_ensemble(2)
    layers = {Dverge(layer_drawn="batch").drawn(model, Step(seed=0, number=n, epoch=0))[0] for n in range(60)}
    assert layers == set(range(1, LAYERS + 1))


def test_the_layers_are_those_of_a_random_gated_network_of_the_same_template() -> None:
    for name, expected in (("resnet20", 20), ("vgg16", 14)):
        network = build(name)
        assert num_features(network) == randomly_gate(network).num_features == expected


# ---- distillation ----------------------------------------------------------------------------------------------------


def feature_by_hook(network: nn.Module, layer: int, images: Tensor) -> Tensor:
    """Run the whole network and catch what goes into an activation."""
    caught: list[Tensor] = []
    relus = [module for module in network.modules() if isinstance(module, nn.ReLU)]
    if layer > len(relus):
        logits: Tensor = network(images)
        return logits
    hook = relus[layer - 1].register_forward_hook(lambda _, inputs, __: caught.append(inputs[0].clone()))
    network(images)
    hook.remove()
    return caught[0]


def naive_distil(network: nn.Module, layer: int, source: Tensor, target: Tensor) -> Tensor:
    """DVERGE's distillation by the text: batch statistics, momentum 1, from the source, before the activation."""
    images, velocity = source, torch.zeros_like(source)
    for _ in range(10):
        images = images.detach().requires_grad_(True)
        wanted = feature_by_hook(network, layer, target).detach()
        distance = F.mse_loss(feature_by_hook(network, layer, images), wanted)
        (gradient,) = torch.autograd.grad(distance, images)
        velocity = velocity + gradient / gradient.abs().flatten(1).sum(1).reshape(-1, 1, 1, 1)
        images = images.detach() - 0.007 * velocity.sign()
        images = (source + (images - source).clamp(-0.07, 0.07)).clamp(0, 1)
    return images


def test_distillation_equals_a_naive_one_by_the_papers_text_for_every_layer() -> None:
    source, target = (batch.images for batch in make_batches())
    member = make_member()
    for layer in range(1, LAYERS + 1):
        ours, naive = copy.deepcopy(member).train(), copy.deepcopy(member).train()
        distilled = Dverge().distil(Network(ours, STEP), layer, source, target)
        expected = naive_distil(naive, layer, source, target)
        # Rounding decides the sign of a gradient that is almost 0, and that pixel then goes another way.
        assert float(((distilled - expected).abs() > 1e-5).float().mean()) < 0.02, layer
        if layer == LAYERS:
            moved = dict(ours.named_buffers())
            for name, buffer in naive.named_buffers():
                torch.testing.assert_close(moved[name], buffer, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    "objective",
    [Dverge(), Dverge(batch_norm="eval"), Dverge(random_start=True), Dverge(activated=True, momentum=0.0)],
    ids=["default", "eval", "random start", "activated"],
)
def test_distilled_images_stay_near_their_source_and_in_the_pixel_range_and_leave_no_gradient(
    objective: Dverge,
) -> None:
    source, target = (batch.images for batch in make_batches())
    source[0], source[1] = 0, 1
    before = source.clone(), target.clone()
    member = make_member()
    for layer in range(1, LAYERS + 1):
        distilled = objective.distil(Network(member, STEP), layer, source, target)
        assert distilled.shape == source.shape
        assert not distilled.requires_grad
        assert 0 < float((distilled - source).abs().max()) <= 0.07 + 1e-6
        assert 0 <= float(distilled.min()) <= float(distilled.max()) <= 1
    assert gradients(member) == {}
    assert all(parameter.requires_grad for parameter in member.parameters())
    assert all(module.training for module in member.modules())
    assert torch.equal(source, before[0])
    assert torch.equal(target, before[1])


def test_in_train_mode_distillation_moves_the_statistics_of_its_prefix_twice_a_step_and_in_eval_mode_none() -> None:
    source, target = (batch.images for batch in make_batches())
    member = make_member().eval()
    norms = [name for name, module in member.named_modules() if isinstance(module, nn.BatchNorm2d)]

    def counted(objective: Dverge, layer: int) -> dict[str, int]:
        network = copy.deepcopy(member)
        before = buffers(network)
        objective.distil(Network(network, STEP), layer, source, target)
        assert not any(module.training for module in network.modules())
        after = buffers(network)
        for name in norms:
            same = torch.equal(before[f"{name}.running_mean"], after[f"{name}.running_mean"])
            assert same == (after[f"{name}.num_batches_tracked"] == before[f"{name}.num_batches_tracked"])
        count = "num_batches_tracked"
        return {name: int(after[f"{name}.{count}"] - before[f"{name}.{count}"]) for name in norms}

    assert counted(Dverge(), 1) == {name: 20 if name == norms[0] else 0 for name in norms}
    assert counted(Dverge(), LAYERS) == dict.fromkeys(norms, 20)
    assert counted(Dverge(batch_norm="eval"), LAYERS) == dict.fromkeys(norms, 0)


# ---- prefixes of plain networks --------------------------------------------------------------------------------------


def test_prefixes_are_kept_as_long_as_the_network_they_belong_to() -> None:
    member = make_member()
    kept = weakref.ref(Prefixes.of(member))
    assert Prefixes.of(member) is kept()
    Dverge(distillation_steps=1).accumulate(Ensemble([member, make_member()]), make_batches(), STEP)
    del member
    gc.collect()
    assert kept() is None


def test_a_copy_of_a_network_has_prefixes_of_its_own() -> None:
    source, target = (batch.images for batch in make_batches())
    member = make_member()
    distilled = Dverge().distil(Network(copy.deepcopy(member), STEP), 4, source, target)
    Dverge().distil(Network(member, STEP), 4, source, target)
    twin = copy.deepcopy(member)  # after the prefixes of the original were traced
    with torch.no_grad():
        for parameter in member.parameters():
            parameter.zero_()
    assert torch.equal(Dverge().distil(Network(twin, STEP), 4, source, target), distilled)


@pytest.mark.parametrize("batch_norm", ["train", "eval"])
def test_prefixes_follow_a_network_to_another_type_and_to_loaded_weights(batch_norm: str) -> None:
    objective = Dverge(batch_norm=batch_norm)
    source, target = (batch.images for batch in make_batches())
    member, fresh = make_member(), make_member()
    objective.distil(Network(member, STEP), 4, source, target)
    member.load_state_dict(fresh.state_dict())
    expected = objective.distil(Network(copy.deepcopy(fresh), STEP), 4, source, target)
    assert torch.equal(objective.distil(Network(copy.deepcopy(member), STEP), 4, source, target), expected)
    member.load_state_dict(fresh.state_dict())
    assert torch.equal(objective.distil(Network(member, STEP), 4, source, target), expected)
    member.load_state_dict(fresh.state_dict())
    half = dataclasses.replace(STEP, precision=torch.bfloat16)  # folded weights are cast, not the network's
    objective.distil(Network(member, half), 4, source, target)
    member.to(torch.bfloat16)
    moved = objective.distil(Network(member, half), 4, source, target)
    assert float((moved - source).abs().max()) == pytest.approx(0.07, abs=1e-6)
    assert {tensor.dtype for tensor in member.parameters()} == {torch.bfloat16}


# ---- the loss --------------------------------------------------------------------------------------------------------


def test_two_equal_members_learn_what_one_network_confuses_itself(asked: list[tuple[int, int, Tensor]]) -> None:
    source, target = make_batches()
    member = make_member()
    ensemble = Ensemble([copy.deepcopy(member), copy.deepcopy(member)]).train()
    measured = Recorded().accumulate(ensemble, [source, target], STEP)
    (first, layer, images), (second, same_layer, twins) = asked
    assert (first, second) == (0, 1)
    assert layer == same_layer
    assert torch.equal(images, twins)

    loss = F.cross_entropy(member.train()(images), source.labels)
    loss.backward()
    assert float(measured["loss"]) == pytest.approx(float(loss.detach()), rel=1e-6)
    assert float(measured["layer"]) == layer
    of_first, of_second = (gradients(part) for part in ensemble.members)
    for name, gradient in gradients(member).items():
        assert torch.equal(of_first[name], of_second[name])
        torch.testing.assert_close(of_first[name], gradient)


@pytest.mark.parametrize("coefficient", [1.0, 0.25])
def test_the_accumulated_gradient_is_that_of_the_summed_loss(
    coefficient: float, asked: list[tuple[int, int, Tensor]]
) -> None:
    source, target = make_batches()
    ensemble = make_ensemble()
    measured = Recorded(coefficient=coefficient).accumulate(ensemble, [source, target], STEP)
    found = gradients(ensemble)
    assert [index for index, _, _ in asked] == [0, 1, 2]

    ensemble.zero_grad(set_to_none=True)
    loss = torch.stack(
        [
            F.cross_entropy(member(images), source.labels)
            for i, member in enumerate(ensemble.members)
            for j, (_, _, images) in enumerate(asked)
            if i != j
        ]
    ).sum()
    (coefficient * loss).backward()
    for name, gradient in gradients(ensemble).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5)
    assert found.keys() == dict(ensemble.named_parameters()).keys()
    assert float(measured["loss"]) == pytest.approx(float(loss.detach()) / 6, rel=1e-5)


def test_every_member_trains_on_what_the_others_distilled_and_all_is_made_before_any_gradient() -> None:
    events: list[str] = []

    class Marked(Dverge):
        def distil(self, network: Network, layer: int, source: Tensor, target: Tensor) -> Tensor:
            events.append(f"distil {network.index} {any(p.grad is not None for p in ensemble.parameters())}")
            return torch.full_like(source, (network.index + 1) / 8)

    class MarkedAttack(TrainingAttack):
        def on(self, networks: Network | Sequence[Network], images: Tensor, labels: Tensor) -> Tensor:
            assert isinstance(networks, Network)
            events.append(f"attack {networks.index} {any(p.grad is not None for p in ensemble.parameters())}")
            return torch.full_like(images, (networks.index + 5) / 8)

    ensemble = make_ensemble()
    for index, member in enumerate(ensemble.members):
        num_features(member)  # traced, and the trace compared with it, before anyone listens
        member.register_forward_pre_hook(
            lambda _, inputs, index=index: events.append(f"train {index} {float(inputs[0][0, 0, 0, 0]) * 8:g}")
        )
    Marked(adversarial=MarkedAttack()).accumulate(ensemble, make_batches(), STEP)
    assert events == [
        *(f"distil {index} False" for index in range(3)),
        *(f"attack {index} False" for index in range(3)),
        *("train 0 2", "train 0 3", "train 0 5"),
        *("train 1 1", "train 1 3", "train 1 6"),
        *("train 2 1", "train 2 2", "train 2 7"),
    ]


def test_with_coefficient_0_it_is_adversarial_training_of_each_member() -> None:
    source, target = make_batches()
    attack = TrainingAttack(steps=3)
    ensemble = make_ensemble()
    twin = copy.deepcopy(ensemble)
    measured = Dverge(coefficient=0, adversarial=attack).accumulate(ensemble, [source, target], STEP)
    expected = PgdAt(attack=attack, attacked="member").accumulate(twin, [source], STEP)
    assert float(measured["adversarial_loss"]) == float(expected["loss"])
    found = gradients(ensemble)
    for name, gradient in gradients(twin).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7)


def test_the_adversarial_loss_is_added_to_the_weighted_one() -> None:
    def found(**options: Any) -> dict[str, Tensor]:
        model = copy.deepcopy(ensemble)
        Dverge(**options).accumulate(model, make_batches(), STEP)
        return gradients(model)

    ensemble, attack = make_ensemble(2), TrainingAttack(steps=2)
    diverse, adversarial = found(), found(coefficient=0, adversarial=attack)
    for name, gradient in found(coefficient=0.5, adversarial=attack).items():
        torch.testing.assert_close(gradient, 0.5 * diverse[name] + adversarial[name], rtol=1e-4, atol=1e-5)


# ---- paths of a random gated network ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("candidates", "wanted"), [(2, 3), (2, 6), (3, 4)])
def test_paths_differ_within_the_layer_and_are_as_many_as_it_allows(candidates: int, wanted: int) -> None:
    rgn = make_rgn(candidates)
    counts = set()
    for number in range(60):
        layer, networks = Dverge(paths=wanted).drawn(rgn, Step(seed=0, number=number, epoch=number))
        chosen = [network.path for network in networks]
        assert len(chosen) == min(wanted, candidates ** min(layer, rgn.num_gates))
        assert len({path[:layer] for path in chosen if path is not None}) == len(chosen)
        assert [network.index for network in networks] == list(range(len(chosen)))
        counts.add(len(chosen))
    assert min(counts) == candidates
    assert max(counts) == wanted


def test_on_paths_it_differs_from_ensemble_in_one_only_where_its_fields_say() -> None:
    rgn = make_rgn()
    twin = copy.deepcopy(rgn)
    dverge = Dverge(layer_drawn="batch", momentum=0.0, batch_norm="eval")
    measured = dverge.accumulate(rgn, make_batches(), STEP)
    expected = EnsembleInOne(divide_by_paths=False).accumulate(twin, make_batches(), STEP)
    assert measured.keys() == expected.keys()
    assert all(torch.equal(measured[name], expected[name]) for name in expected)
    found, wanted = gradients(rgn), gradients(twin)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], gradient) for name, gradient in wanted.items())


# ---- what it says of itself ------------------------------------------------------------------------------------------


def test_the_defaults_are_dverges() -> None:
    fields = dataclasses.asdict(Dverge())
    assert fields == {
        "label_smoothing": 0.0,
        "paths": 3,
        "eps": 0.07,
        "distillation_steps": 10,
        "step_size": None,
        "random_start": False,
        "momentum": 1.0,
        "batch_norm": "train",
        "activated": False,
        "layer_drawn": "epoch",
        "adversarial": None,
        "coefficient": 1.0,
    }
    assert Dverge.streams == 2


def test_the_predicted_cost_counts_members() -> None:
    # full recomputation costs 78 and 328 passes; gradients for images alone save a third of the distillation
    assert Dverge().forwards(3) == Dverge().forwards() == pytest.approx(65, abs=1)
    assert Dverge().forwards(8) == pytest.approx(293, abs=1)
    assert Dverge(adversarial=TrainingAttack()).forwards(8) == Dverge().forwards(8) + 8 * 23
    assert Dverge(batch_norm="eval").forwards(3) < Dverge().forwards(3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_member, r"dverge trains several networks against each other, got 1; set members=3 in the recipe"),
        (lambda: Ensemble([make_member()]), r"dverge trains several networks against each other, got 1"),
        (lambda: make_rgn(candidates=1), r"dverge needs candidates >= 2 per gated layer, got 1: there is one path"),
        (
            lambda: Ensemble([make_member(), build("resnet14", images=SMALL, width=4)]),
            r"compares one layer of every member, and they have \[8, 14\] layers; use members of one architecture",
        ),
        (lambda: Ensemble([build("msdnet3"), build("msdnet3")]), r"one exit, and MSDNet has 3"),
    ],
)
def test_what_it_cannot_train_is_refused_in_one_sentence(make: Any, message: str) -> None:
    model = make()
    with pytest.raises(BadInput, match=message) as refused:
        Dverge().check(model)
    assert "\n" not in str(refused.value)
    with pytest.raises(BadInput, match=message):
        Dverge().accumulate(model, make_batches(), STEP)


@pytest.mark.parametrize("model", [make_ensemble(2), make_rgn()], ids=["members", "paths"])
def test_what_it_can_train_passes_the_check(model: nn.Module) -> None:
    Dverge().check(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"paths": 1}, "need at least 2 paths to train against each other, got 1"),
        ({"coefficient": -1.0}, "need a finite coefficient >= 0, got -1"),
        ({"coefficient": float("inf")}, "need a finite coefficient >= 0, got inf"),
        ({"coefficient": 0.0}, "nothing to learn"),
        ({"eps": 18}, "need 0 <= eps <= 1, got 18"),
        ({"layer_drawn": "run"}, "layer_drawn must be one of batch, epoch, got 'run'"),
    ],
)
def test_hyper_parameters_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        Dverge(**options)
