from __future__ import annotations

import pytest
import torch
from torch import nn

from zoo.errors import BadInput, UnknownName
from zoo.networks import CIFAR_FORMAT, MNIST_FORMAT, NETWORKS, ImageFormat, build, num_exits
from zoo.networks.image_format import Normalise
from zoo.networks.msdnet import Transition

SMALL = ImageFormat(height=16, width=16)

# Published counts; 2,752 more where the shortcuts of a CIFAR ResNet are convolutions (He et al., option B), and 1,024
# more for the BatchNorm behind the last pre-activation block.
PARAMETERS = {
    "resnet20": 269_722 + 2_752,
    "resnet32": 464_154 + 2_752,
    "resnet44": 658_586 + 2_752,
    "resnet56": 853_018 + 2_752,
    "resnet110": 1_727_962 + 2_752,
    "vgg16": 14_728_266,
    "preact_resnet18": 11_171_146 + 1_024,
    "resnet50_cifar": 23_520_842,
    "wide_resnet16_4": 2_748_890,
    "wide_resnet28_10": 36_479_194,
    "wide_resnet34_10": 46_160_474,
}


@pytest.fixture(params=NETWORKS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_every_network_answers_with_one_logit_per_class(name: str) -> None:
    images = CIFAR_FORMAT if name == "vgg16" else SMALL  # VGG-16 halves its input five times
    network = build(name, images=images, classes=7).eval()
    with torch.no_grad():
        answer = network(torch.rand(2, images.channels, images.height, images.width))
    answers = answer if num_exits(network) > 1 else (answer,)
    assert len(answers) == num_exits(network)
    for logits in answers:
        assert logits.shape == (2, 7)
        assert logits.isfinite().all()


def test_every_network_normalises_its_own_input(name: str) -> None:
    with torch.device("meta"):  # only the structure is looked at
        network = build(name, images=ImageFormat(mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6)))
    assert next(child for child, _ in network.named_children()) == "normalise"
    assert sum(isinstance(module, Normalise) for module in network.modules()) == 1


@pytest.mark.parametrize(("name", "expected"), PARAMETERS.items())
def test_published_parameter_counts_are_met(name: str, expected: int) -> None:
    with torch.device("meta"):
        network = build(name)
    assert sum(parameter.numel() for parameter in network.parameters()) == expected


def test_lenet_for_digits_has_the_published_parameter_count() -> None:
    network = build("lenet", images=MNIST_FORMAT)
    assert sum(parameter.numel() for parameter in network.parameters()) == 431_080


def test_normalising_is_the_standard_score_per_channel() -> None:
    images = torch.rand(2, 3, 4, 4)
    scores = Normalise((0.1, 0.2, 0.3), (0.5, 0.25, 1.0))(images)
    for channel, (mean, std) in enumerate([(0.1, 0.5), (0.2, 0.25), (0.3, 1.0)]):
        torch.testing.assert_close(scores[:, channel], (images[:, channel] - mean) / std)


@pytest.mark.parametrize("name", ["resnet20", "vgg16"])
def test_convolutions_start_at_the_published_scale(name: str) -> None:
    network = build(name)
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 1000:
            kernel, _ = module.kernel_size
            expected = (2 / (kernel * kernel * module.out_channels)) ** 0.5
            assert float(module.weight.detach().std()) == pytest.approx(expected, rel=0.1)
            assert module.bias is None or not module.bias.any()


def test_building_is_repeatable_from_the_global_seed() -> None:
    torch.manual_seed(3)
    first = build("resnet8").state_dict()
    torch.manual_seed(3)
    second = build("resnet8").state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_leaky_network_leaks() -> None:
    slopes = {m.negative_slope for m in build("resnet8", negative_slope=0.1).modules() if isinstance(m, nn.LeakyReLU)}
    assert slopes == {0.1}


@pytest.mark.parametrize("name", ["preact_resnet18", "wide_resnet16_4", "resnet8", "resnet50_cifar"])
def test_a_hook_on_a_blocks_shortcut_always_sees_what_the_skip_carries(name: str) -> None:
    options = {} if name == "wide_resnet16_4" else {"width": 2}
    network = build(name, images=SMALL, **options).eval()
    blocks = [module for module in network.modules() if hasattr(module, "shortcut")]
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    for block in blocks:
        block.shortcut.register_forward_hook(lambda _, given, carried: seen.append((given[0], carried)))
    with torch.no_grad():
        network(torch.rand(1, 3, 16, 16))
    assert len(seen) == len(blocks)
    identities = [
        torch.equal(*pair) for block, pair in zip(blocks, seen, strict=True) if not list(block.shortcut.parameters())
    ]
    assert identities
    assert all(identities)


def test_an_identity_shortcut_adds_no_tensor_to_the_weights() -> None:
    names = list(build("preact_resnet18", width=2).state_dict())
    assert [name for name in names if "shortcut" in name] == [
        f"stages.{stage}.0.shortcut.weight" for stage in (1, 2, 3)
    ]  # fmt: skip


def test_a_pre_activation_block_adds_the_raw_features_where_the_shape_stays() -> None:
    network = build("preact_resnet18", images=SMALL, width=2).eval()
    same, changing = network.stages[0][0], network.stages[1][0]
    for block in (same, changing):
        nn.init.zeros_(block.conv2.weight)
    features = torch.randn(1, 2, 8, 8)
    assert torch.equal(same(features), features)
    active = torch.relu(changing.norm1(features))
    assert torch.equal(changing(features), changing.shortcut(active))


def test_the_exits_of_the_small_network_for_digits_are_the_published_ones() -> None:
    network = build("small_cnn3", images=MNIST_FORMAT)
    widths = [[layer.in_features for layer in head if isinstance(layer, nn.Linear)] for head in (
        network.exit1, network.exit2, network.exit3
    )]  # fmt: skip
    assert widths == [[576, 200, 200], [1600, 200, 200], [1024, 200, 200]]
    linear = [layer for layer in network.exit1 if not isinstance(layer, nn.Dropout)]
    assert [type(layer) for layer in linear[-3:]] == [nn.Linear] * 3  # no activation between them
    trunk = [layer.out_channels for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    assert sorted(trunk) == [16, 32, 32, 64, 64]


def test_the_last_exit_of_the_small_network_starts_undecided_and_the_others_do_not() -> None:
    first, second, last = build("small_cnn3", images=MNIST_FORMAT).eval()(torch.rand(2, 1, 28, 28))
    assert not last.any()
    assert first.any()
    assert second.any()


def test_an_earlier_exit_does_not_depend_on_later_layers() -> None:
    network = build("msdnet", images=SMALL, exits=3, base=2, step=1).eval()
    images = torch.rand(2, 3, 16, 16)
    before = network(images)
    for tensor in network.blocks[1].parameters():
        nn.init.normal_(tensor)
    after = network(images)
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])
    assert not torch.equal(before[2], after[2])


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        ({"exits": 3, "base": 4, "step": 2}, [4, 2, 2]),
        ({"exits": 4, "base": 1, "step": 2, "step_mode": "lin_grow"}, [1, 3, 5, 7]),
    ],
)
def test_blocks_of_an_msdnet_have_the_layers_that_were_asked_for(options: dict[str, object], layers: list[int]) -> None:
    with torch.device("meta"):
        network = build("msdnet", **options)
    found = [sum(not isinstance(part, Transition) for part in block) for block in network.blocks]
    assert found == layers
    assert sum(isinstance(part, Transition) for part in network.modules()) == 2  # three scales, dropped one by one


def test_the_three_exit_msdnet_is_the_one_with_two_layers_per_block() -> None:
    torch.manual_seed(0)
    named = build("msdnet3").state_dict()
    torch.manual_seed(0)
    chosen = build("msdnet", exits=3, base=2, step=2).state_dict()
    assert named.keys() == chosen.keys()
    assert all(torch.equal(tensor, chosen[name]) for name, tensor in named.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exits": 1}, "needs exits of at least 2, got 1"),
        ({"base": 0}, "needs base of at least 1, got 0"),
        ({"step_mode": "fast"}, "step_mode must be one of even, lin_grow, got 'fast'"),
    ],
)
def test_an_msdnet_that_makes_no_sense_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        build("msdnet", **options)


def test_each_dropout_mask_of_dropens_network_is_a_model_of_its_own() -> None:
    network = build("two_layer_cnn", width=4)
    images = torch.rand(1, 3, 32, 32)
    first, second = network.train()(images), network(images)
    assert not torch.equal(first, second)
    network.eval()
    assert torch.equal(network(images), network(images))
    assert sum(isinstance(module, nn.Conv2d) for module in network.modules()) == 2
    assert sum(isinstance(module, nn.Linear) for module in network.modules()) == 1


@pytest.mark.parametrize(("name", "expected"), [("lenet", 1), ("wide_resnet16_4", 6)])
def test_dropout_is_there_when_asked_for_and_only_then(name: str, expected: int) -> None:
    def count(network: nn.Module) -> int:
        return sum(isinstance(module, nn.Dropout) for module in network.modules())

    with torch.device("meta"):
        assert count(build(name)) == 0
        assert count(build(name, dropout=0.5)) == expected


def test_an_unknown_network_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UnknownName, match=r"'resnet200'; did you mean 'resnet20'\? \(known: lenet, "):
        build("resnet200")


def test_an_option_that_a_network_lacks_is_refused_by_name() -> None:
    with pytest.raises(BadInput, match=r"resnet8 does not take these options: \{'widen': 2\}"):
        build("resnet8", widen=2)


@pytest.mark.parametrize(("name", "size", "least"), [("lenet", 8, 16), ("small_cnn3", 15, 16), ("two_layer_cnn", 3, 4)])
def test_images_too_small_for_a_network_are_refused_with_their_size(name: str, size: int, least: int) -> None:
    with pytest.raises(BadInput, match=f"at least {least}x{least} pixels, got {size}x{size}"):
        build(name, images=ImageFormat(height=size, width=size))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"mean": (0.5,)}, r"per channel \(3\)"), ({"std": (0.1, 0.0, 0.1)}, "std must be positive")],
)
def test_an_image_format_that_makes_no_sense_is_refused(options: dict[str, tuple[float, ...]], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        ImageFormat(**options)
