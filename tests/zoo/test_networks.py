from __future__ import annotations

import pytest
import torch
from torch import nn

from zoo.errors import BadInput, UnknownName
from zoo.networks import CIFAR_FORMAT, MNIST_FORMAT, NETWORKS, ImageFormat, build
from zoo.networks.normalise import Normalise

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
        logits = network(torch.rand(2, images.channels, images.height, images.width))
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


def test_images_too_small_for_lenet_are_refused_with_their_size() -> None:
    with pytest.raises(BadInput, match="at least 16x16 pixels, got 8x8"):
        build("lenet", images=ImageFormat(height=8, width=8))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"mean": (0.5,)}, r"per channel \(3\)"), ({"std": (0.1, 0.0, 0.1)}, "std must be positive")],
)
def test_an_image_format_that_makes_no_sense_is_refused(options: dict[str, tuple[float, ...]], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        ImageFormat(**options)
