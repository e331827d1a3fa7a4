"""Plain networks, the templates that random gated networks are made of. Each normalises its own input.

Every network takes float images (batch, channel, height, width) in [0, 1] and returns logits (batch, class). A network
with several exits returns a tuple of them, first exit first, and says how many in its attribute `num_exits`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from zoo.errors import BadInput, UnknownName
from zoo.networks.image_format import CIFAR_FORMAT as CIFAR_FORMAT
from zoo.networks.image_format import MNIST_FORMAT as MNIST_FORMAT
from zoo.networks.image_format import ImageFormat as ImageFormat
from zoo.networks.lenet import LeNet
from zoo.networks.msdnet import MSDNet
from zoo.networks.resnet import CifarResNet, CifarResNet50
from zoo.networks.small_cnn import SmallCNN
from zoo.networks.two_layer import TwoLayerCNN
from zoo.networks.vgg import VGG16
from zoo.networks.wide_resnet import PreActResNet18, WideResNet

# name -> builder(image format, classes, **options)
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    **{f"resnet{depth}": partial(CifarResNet, depth) for depth in (8, 14, 20, 32, 44, 56, 110)},
    "resnet50_cifar": CifarResNet50,
    "vgg16": VGG16,
    "preact_resnet18": PreActResNet18,
    "wide_resnet16_4": partial(WideResNet, 16, 4),
    "wide_resnet28_10": partial(WideResNet, 28, 10),
    "wide_resnet34_10": partial(WideResNet, 34, 10),
    "lenet": LeNet,
    "two_layer_cnn": TwoLayerCNN,
    "small_cnn3": SmallCNN,
    "msdnet": MSDNet,
    "msdnet3": lambda images, classes, **options: MSDNet(images, classes, exits=3, base=2, step=2, **options),
}


def build(name: str, *, images: ImageFormat = CIFAR_FORMAT, classes: int = 10, **options: Any) -> nn.Module:
    """Build a network by name, freshly initialised from torch's global generator.

    Its attribute `image_shape` is (channel, height, width); the exporter reads it.

    Raises:
        UnknownName: no such network; the message lists the known ones.
        BadInput: an option that the network does not have, or a value that no network can be built with.
    """
    if name not in NETWORKS:
        raise UnknownName(name, NETWORKS, kind="network")
    try:
        network = NETWORKS[name](images, classes, **options)
    except BadInput:
        raise
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:  # of torch: a negative width, say
        raise BadInput(f"network {name} does not take these options: {options} ({error})") from error
    network.image_shape = (images.channels, images.height, images.width)  # type: ignore[assignment]
    return network


def num_exits(network: nn.Module) -> int:
    """Return at how many exits a network answers; one that returns a tuple of logits says so in `num_exits`."""
    return int(getattr(network, "num_exits", 1))
