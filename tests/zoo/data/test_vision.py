from __future__ import annotations

import torch

from zoo.data.vision import torchvision


def test_torchvision_can_be_imported_whatever_build_it_is() -> None:
    package = torchvision()
    assert package.__name__ == "torchvision"
    assert "resnet18" in package.models.list_models()


def test_the_door_can_be_passed_twice() -> None:
    assert torchvision() is torchvision()


def test_the_operators_that_torchvision_expects_are_declared() -> None:
    torchvision()
    assert hasattr(torch.ops.torchvision, "nms")
