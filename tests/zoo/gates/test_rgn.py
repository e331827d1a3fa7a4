from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from unsettled import unsettle

from zoo import paths
from zoo.errors import BadInput, BadPath
from zoo.gates.derive import derive
from zoo.gates.rgn import RandomGatedNetwork, Sharing, randomly_gate
from zoo.networks import ImageFormat, build

SMALL = ImageFormat(height=16, width=16)
SHARINGS = get_args(Sharing)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def small_rgn(**options: object) -> RandomGatedNetwork:
    rgn = randomly_gate(build("resnet8", images=SMALL, width=4), **options)  # type: ignore[arg-type]
    unsettle(rgn)
    return rgn


def random_path(rgn: RandomGatedNetwork, seed: int = 0) -> paths.Path:
    return paths.sample(rgn.num_gates, rgn.candidates, random.Random(seed))


def statistics(rgn: RandomGatedNetwork) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in rgn.named_buffers()}


@pytest.mark.parametrize(("sharing", "expected"), [("independent", 541_546), ("shared_conv", 273_850)])
def test_a_gated_resnet20_has_19_gates_and_the_published_number_of_parameters(sharing: Sharing, expected: int) -> None:
    plain = build("resnet20")
    rgn = randomly_gate(plain, candidates=2, sharing=sharing)
    assert count(plain) == 272_474
    assert rgn.num_gates == 19
    assert rgn.num_features == 20
    assert count(rgn) == expected


@pytest.mark.parametrize(("name", "width", "gates"), [("vgg16", 0.1, 13), ("preact_resnet18", 4, 17)])
def test_every_convolution_of_the_main_branch_is_gated(name: str, width: float, gates: int) -> None:
    assert randomly_gate(build(name, width=width)).num_gates == gates


def test_neither_projections_nor_the_classifier_are_gated() -> None:
    rgn = randomly_gate(build("resnet20"))
    gated = {layer.conv for layer in rgn.layers} | {layer.norm for layer in rgn.layers}
    kept = {name.rpartition(".")[0] for name, _ in rgn.template.named_parameters()}
    assert kept == {"classifier", *(f"stages.{stage}.0.shortcut.{part}" for stage in (1, 2) for part in (0, 1))}
    assert not gated & kept


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("name", ["resnet8", "vgg16", "preact_resnet18", "wide_resnet16_4", "lenet"])
def test_a_derived_path_equals_its_rgn_bit_for_bit(name: str, sharing: Sharing) -> None:
    options = {"vgg16": {"width": 0.1}, "preact_resnet18": {"width": 4}}.get(name, {})
    template = build(name, images=ImageFormat() if name == "vgg16" else SMALL, **options)
    if name == "lenet" and sharing == "shared_conv":
        with pytest.raises(BadInput, match="no 2-d convolution with a BatchNorm of its own"):
            randomly_gate(template, sharing=sharing)
        return
    rgn = randomly_gate(template, candidates=3, sharing=sharing).eval()
    unsettle(rgn)
    images = torch.rand(2, *template.image_shape)
    path = random_path(rgn)
    with torch.no_grad():
        assert torch.equal(rgn(images, path), derive(rgn, path)(images))


@pytest.mark.parametrize("sharing", SHARINGS)
def test_copied_candidates_give_the_plain_network_along_every_path(sharing: Sharing) -> None:
    plain = unsettle(build("resnet8", images=SMALL, width=4)).eval()
    rgn = randomly_gate(plain, sharing=sharing, start="copy").eval()
    images = torch.rand(3, 3, 16, 16)
    for path in itertools.product(range(2), repeat=rgn.num_gates):
        assert torch.equal(rgn(images, path), plain(images))


def test_gating_leaves_the_network_untouched() -> None:
    plain = build("resnet8", images=SMALL, width=4).eval()
    images = torch.rand(2, 3, 16, 16)
    before = plain(images)
    rgn = randomly_gate(plain)
    for parameter in rgn.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(plain(images), before)


def test_redrawn_candidates_differ_from_each_other() -> None:
    rgn = small_rgn(candidates=3).eval()
    images = torch.rand(2, 3, 16, 16)
    outputs = [rgn(images, [gate] * rgn.num_gates) for gate in range(3)]
    assert not any(torch.allclose(outputs[i], outputs[j]) for i in range(3) for j in range(i))


def test_every_gate_matters() -> None:
    rgn = small_rgn().eval()
    images = torch.rand(2, 3, 16, 16)
    base = rgn(images, [0] * rgn.num_gates)
    for position in range(rgn.num_gates):
        path = [int(gate == position) for gate in range(rgn.num_gates)]
        assert not torch.allclose(rgn(images, path), base)


def test_redrawn_candidates_have_their_layers_standard_deviation() -> None:
    template = build("resnet20")
    rgn = randomly_gate(template, candidates=3)
    own = template.state_dict()
    for layer in rgn.layers:
        weight = own[f"{layer.conv}.weight"]
        drawn = [rgn.select([gate] * 19)[f"{layer.conv}.weight"].detach() for gate in range(3)]
        assert torch.equal(drawn[0], weight)
        for redraw in drawn[1:]:
            bound = 5 / (2 * weight.numel()) ** 0.5  # five standard deviations of an estimated standard deviation
            assert float(redraw.std()) == pytest.approx(float(weight.std()), rel=bound)
            assert abs(float(redraw.mean())) < 5 * float(weight.std()) / weight.numel() ** 0.5


def test_noise_is_relative_and_spares_nobody() -> None:
    plain = build("resnet8", images=SMALL, width=8)
    rgn = randomly_gate(plain, start="copy", noise=0.1, generator=torch.Generator().manual_seed(0))
    weight = plain.get_submodule("stages.2.0.conv2").weight.detach()
    for gate in range(2):
        noisy = rgn.select([gate] * rgn.num_gates)["stages.2.0.conv2.weight"].detach()
        assert float((noisy / weight - 1).std()) == pytest.approx(0.1, rel=0.1)


def test_draws_come_from_the_generator_alone() -> None:
    plain = build("resnet8", images=SMALL, width=4)
    first, second = (randomly_gate(plain, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_in_training_only_active_candidates_statistics_move() -> None:
    rgn = small_rgn(candidates=3).train()
    path = random_path(rgn)
    before = statistics(rgn)
    rgn(torch.rand(4, 3, 16, 16), path)
    moved = {name for name, buffer in rgn.named_buffers() if not torch.equal(buffer, before[name])}
    active = {
        f"bank.{layer}.{gate}.norm.{buffer}"
        for layer, gate in enumerate(path)
        for buffer in ("running_mean", "running_var", "num_batches_tracked")
    }
    assert {name for name in moved if name.startswith("bank.")} == active
    assert {name.rpartition(".")[0] for name in moved - active} == {
        f"template.stages.{stage}.0.shortcut.1" for stage in (1, 2)
    }


def test_in_evaluation_no_statistics_move() -> None:
    rgn = small_rgn().eval()
    before = statistics(rgn)
    rgn(torch.rand(4, 3, 16, 16), random_path(rgn))
    assert all(torch.equal(buffer, before[name]) for name, buffer in rgn.named_buffers())


def test_an_optimiser_step_leaves_inactive_candidates_bit_identical() -> None:
    rgn = small_rgn().train()
    optimizer = torch.optim.SGD(rgn.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    images, labels = torch.rand(4, 3, 16, 16), torch.tensor([0, 1, 2, 3])

    def step(path: paths.Path) -> dict[str, Tensor]:
        before = {name: parameter.detach().clone() for name, parameter in rgn.named_parameters()}
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(rgn(images, path), labels).backward()
        optimizer.step()
        return before

    step((0,) * rgn.num_gates)  # candidate 0 now has momentum, which must not move it either
    before = step((1,) * rgn.num_gates)
    for name, parameter in rgn.named_parameters():
        inactive = name.startswith("bank.") and name.split(".")[2] == "0"
        assert torch.equal(parameter, before[name]) == inactive, name


def test_selecting_hands_out_the_banks_own_tensors() -> None:
    rgn = small_rgn()
    selected = rgn.select([1] * rgn.num_gates)
    own = {id(tensor) for tensor in [*rgn.bank.parameters(), *rgn.bank.buffers()]}
    assert len(selected) == 6 * rgn.num_gates  # a weight, and a norm's two parameters and three buffers
    assert {id(tensor) for tensor in selected.values()} <= own


def hooked(network: nn.Module, images: Tensor, *, activated: bool) -> list[Tensor]:
    """Return what enters or leaves each ReLU of a ResNet, then the logits, by hooks alone."""
    seen: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _, inputs, output: seen.append(output if activated else inputs[0]))
        for module in network.modules()
        if isinstance(module, nn.ReLU)
    ]
    logits = network(images)
    for hook in hooks:
        hook.remove()
    return [*seen, logits]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("activated", [False, True])
def test_every_prefix_computes_what_a_hook_sees_in_the_derived_network(activated: bool, training: bool) -> None:
    rgn = randomly_gate(build("resnet20", images=SMALL, width=4))
    unsettle(rgn)
    path = random_path(rgn)
    rgn.train(training)
    images = torch.rand(3, 3, 16, 16)
    with torch.no_grad():
        expected = hooked(derive(rgn, path).train(training), images, activated=activated)
        assert len(expected) == rgn.num_features == 20
        for layer in range(1, 21):
            feature = rgn.runner(layer, rgn.select(path), activated=activated)(images)
            assert torch.equal(feature, expected[layer - 1]), layer


@pytest.mark.parametrize("sharing", SHARINGS)
@pytest.mark.parametrize("name", ["resnet20", "vgg16", "preact_resnet18"])
def test_folded_prefixes_equal_unfolded_ones(name: str, sharing: Sharing) -> None:
    width = {"resnet20": 2, "vgg16": 0.05, "preact_resnet18": 2}[name]
    template = build(name, images=ImageFormat() if name == "vgg16" else SMALL, width=width)
    rgn = randomly_gate(template, sharing=sharing).eval()
    unsettle(rgn)
    path = random_path(rgn)
    folded = rgn.folded(path)
    images = torch.rand(2, *template.image_shape)
    with torch.no_grad():
        for layer in range(1, rgn.num_features + 1):
            for activated in (False, True):
                expected = rgn.runner(layer, rgn.select(path), activated=activated)(images)
                feature = rgn.runner(layer, folded, activated=activated, folded=True)(images)
                torch.testing.assert_close(feature, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_the_last_feature_is_the_logits() -> None:
    rgn = small_rgn().eval()
    path, images = random_path(rgn), torch.rand(2, 3, 16, 16)
    assert torch.equal(rgn.runner(rgn.num_features, rgn.select(path))(images), rgn(images, path))


def test_a_prefix_depends_on_its_own_gates_only() -> None:
    rgn = small_rgn().eval()
    images, zeros = torch.rand(2, 3, 16, 16), [0] * rgn.num_gates
    for layer in range(1, rgn.num_gates):
        beyond = zeros[:layer] + [1] * (rgn.num_gates - layer)
        assert torch.equal(rgn.runner(layer, rgn.select(zeros))(images), rgn.runner(layer, rgn.select(beyond))(images))


def test_folded_weights_are_detached_and_can_be_cast() -> None:
    rgn = small_rgn().eval()
    folded = rgn.folded(random_path(rgn), dtype=torch.bfloat16)
    assert not any(tensor.requires_grad for tensor in folded.values())
    assert {tensor.dtype for tensor in folded.values()} == {torch.bfloat16}


def test_a_copy_of_an_rgn_lives_on_its_own() -> None:
    rgn = small_rgn().eval()
    path, images = random_path(rgn), torch.rand(2, 3, 16, 16)
    rgn.runner(3, rgn.select(path))(images)  # a cached prefix must not tie the copy to the original
    twin = copy.deepcopy(rgn)
    expected = rgn(images, path)
    for parameter in rgn.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(twin(images, path), expected)
    assert torch.equal(twin.runner(twin.num_features, twin.select(path))(images), expected)
    twin.train()
    norms = [module for module in twin.prefix(3).modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms
    assert all(module.training for module in norms)


def test_prefixes_follow_their_network_to_another_type() -> None:
    rgn = small_rgn().eval()
    path, images = random_path(rgn), torch.rand(2, 3, 16, 16)
    feature = rgn.runner(3, rgn.select(path))(images)
    rgn.double()
    torch.testing.assert_close(rgn.runner(3, rgn.select(path))(images.double()).float(), feature, rtol=1e-4, atol=1e-5)


def test_gradients_reach_the_images_and_the_active_candidates_alone() -> None:
    rgn = small_rgn()
    images = torch.rand(2, 3, 16, 16, requires_grad=True)
    path = random_path(rgn)
    rgn(images, path).sum().backward()
    assert images.grad is not None
    for layer, gate in enumerate(path):
        for index in range(2):
            grads = [parameter.grad for parameter in rgn.bank[layer][index].parameters()]
            assert all((grad is not None) == (index == gate) for grad in grads)


def test_a_single_candidate_makes_a_plain_network_of_an_rgn() -> None:
    plain = build("resnet8", images=SMALL, width=4).eval()
    rgn = randomly_gate(plain, candidates=1).eval()
    images = torch.rand(2, 3, 16, 16)
    assert count(rgn) == count(plain)
    assert torch.equal(rgn(images, [0] * rgn.num_gates), plain(images))


@pytest.mark.filterwarnings("ignore:Sequential has a single gated layer:zoo.errors.GatingWarning")
def test_norms_without_an_affine_map_can_be_gated_and_folded() -> None:
    plain = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2)
    )
    images = torch.rand(2, 3, 6, 6)
    plain(images)
    rgn = randomly_gate(plain).eval()
    expected = rgn(images, (1,))
    assert torch.equal(derive(rgn, (1,))(images), expected)
    folded = rgn.runner(rgn.num_features, rgn.folded((1,)), folded=True)(images)
    torch.testing.assert_close(folded, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda plain: randomly_gate(plain, candidates=0), "candidates is 0"),
        (
            lambda plain: randomly_gate(plain, sharing="both"),
            "sharing must be one of independent, shared_conv, got 'both'",
        ),
        (lambda plain: randomly_gate(plain, start="zero"), "start must be one of redraw, copy, got 'zero'"),
        (lambda _: randomly_gate(nn.Sequential(nn.Flatten(), nn.Linear(12, 2))), "Sequential has no 2-d convolution"),
        (
            lambda _: randomly_gate(build("msdnet", images=SMALL, exits=2, base=1, step=1)),
            "MSDNet answers at 2 exits; gates and exits are not combined, so gate a network with one answer",
        ),
        (lambda plain: randomly_gate(plain).prefix(0), "layer 0 is out of range, expected 1 to 8"),
        (lambda plain: randomly_gate(plain).prefix(9), "layer 9 is out of range, expected 1 to 8"),
    ],
)
def test_what_cannot_be_gated_is_refused_with_the_reason(make: Callable[[nn.Module], object], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        make(build("resnet8", images=SMALL, width=4))


def test_a_path_that_does_not_fit_is_refused() -> None:
    rgn = small_rgn()
    with pytest.raises(BadPath, match="has 2 gates, expected 7"):
        rgn(torch.rand(1, 3, 16, 16), (0, 1))
    with pytest.raises(BadPath, match="gate 2 at position 6"):
        rgn(torch.rand(1, 3, 16, 16), (0,) * 6 + (2,))


def test_an_rgn_says_how_large_it_is() -> None:
    assert "gates=7, candidates=2, sharing='independent'" in repr(small_rgn())
