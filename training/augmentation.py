"""Augmentations of training images in batches: crop and flip, AutoAugment, AugMix.

AutoAugment (Cubuk et al. 2019, arXiv:1805.09501) and AugMix (Hendrycks et al. 2020, arXiv:1912.02781) follow
torchvision's `v2.AutoAugment` and `v2.AugMix` in distribution, but draw anew for every image of a batch. Images that
drew the same operation at the same magnitude go through torchvision's own function together, which is two to three
times as fast as image by image (`benchmarks/augmentation.py`). All draws come from the generator given, on the CPU: the
same on every device, and repeated when training resumes.

One difference to the script of AugMix's authors is torchvision's: a magnitude is one of `severity` levels out of ten,
where theirs is uniform between 0.1 and `severity` tenths of the largest.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.data import datasets
from zoo.data.vision import transforms
from zoo.errors import BadInput, UnknownName

AUGMENTATIONS: dict[str, tuple[int, ...]] = {"none": (1,), "crop_flip": (1,), "autoaugment": (1,), "augmix": (1, 3)}
"""By name, how many views of an image each can make. Three of augmix are the crop and two mixtures of it, for the
Jensen-Shannon loss; autoaugment and augmix start from the crop of crop_flip."""

NUM_LEVELS = 10  # of an operation's magnitude, 0 the weakest
EWS_SEVERITY = 5  # AugMix's own default is 3

# One of the two steps of a sub-policy: operation, probability, level.
Choice = tuple[str, float, int]

# AutoAugment, table 7: one sub-policy is drawn for each image. Level 0 where an operation has no magnitude.
CIFAR10_POLICY: tuple[tuple[Choice, Choice], ...] = (
    (("Invert", 0.1, 0), ("Contrast", 0.2, 6)),
    (("Rotate", 0.7, 2), ("TranslateX", 0.3, 9)),
    (("Sharpness", 0.8, 1), ("Sharpness", 0.9, 3)),
    (("ShearY", 0.5, 8), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.5, 0), ("Equalize", 0.9, 0)),
    (("ShearY", 0.2, 7), ("Posterize", 0.3, 7)),
    (("Color", 0.4, 3), ("Brightness", 0.6, 7)),
    (("Sharpness", 0.3, 9), ("Brightness", 0.7, 9)),
    (("Equalize", 0.6, 0), ("Equalize", 0.5, 0)),
    (("Contrast", 0.6, 7), ("Sharpness", 0.6, 5)),
    (("Color", 0.7, 7), ("TranslateX", 0.5, 8)),
    (("Equalize", 0.3, 0), ("AutoContrast", 0.4, 0)),
    (("TranslateY", 0.4, 3), ("Sharpness", 0.2, 6)),
    (("Brightness", 0.9, 6), ("Color", 0.2, 8)),
    (("Solarize", 0.5, 2), ("Invert", 0.0, 0)),
    (("Equalize", 0.2, 0), ("AutoContrast", 0.6, 0)),
    (("Equalize", 0.2, 0), ("Equalize", 0.6, 0)),
    (("Color", 0.9, 9), ("Equalize", 0.6, 0)),
    (("AutoContrast", 0.8, 0), ("Solarize", 0.2, 8)),
    (("Brightness", 0.1, 3), ("Color", 0.7, 0)),
    (("Solarize", 0.4, 5), ("AutoContrast", 0.9, 0)),
    (("TranslateY", 0.9, 9), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.9, 0), ("Solarize", 0.8, 3)),
    (("Equalize", 0.8, 0), ("Invert", 0.1, 0)),
    (("TranslateY", 0.7, 9), ("AutoContrast", 0.9, 0)),
)

_GEOMETRIC = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")

# AugMix, section 3, less the operations that common corruptions consist of: no colour, contrast, brightness, sharpness.
AUGMIX_OPERATIONS = (*_GEOMETRIC, "Posterize", "Solarize", "AutoContrast", "Equalize")
AUGMIX_WIDTH = 3  # chains that are mixed
AUGMIX_DEPTH = 3  # the most operations in a chain; 1 to as many are drawn

# What torchvision calls the operations that change a factor; the saturation of a grey image stays as it is.
_ADJUSTED = {"Brightness": "brightness", "Color": "saturation", "Contrast": "contrast", "Sharpness": "sharpness"}
_MAXIMA = {"ShearX": 0.3, "ShearY": 0.3, "Rotate": 30.0} | dict.fromkeys(_ADJUSTED, 0.9)
_WITHOUT_MAGNITUDE = ("AutoContrast", "Equalize", "Invert")


@dataclass(frozen=True, kw_only=True)
class Reach:
    """Where AutoAugment and AugMix differ in how they apply the same operations."""

    translation: float  # the furthest, as a share of the image's side
    bits: int  # that posterising leaves at level 0; 4 fewer at level 9
    interpolation: str


AUTOAUGMENT_REACH = Reach(translation=150 / 331, bits=8, interpolation="nearest")
AUGMIX_REACH = Reach(translation=1 / 3, bits=4, interpolation="bilinear")


@dataclass(frozen=True)
class Operation:
    """An operation and its magnitude: a slope, pixels, degrees, a change of factor, bits or a share of white."""

    name: str
    magnitude: float = 0.0
    interpolation: str = "nearest"

    def __call__(self, images: Tensor) -> Tensor:
        """Return images uint8 (n, 1 or 3, height, width), each changed by itself; perhaps the given tensor."""
        functional, magnitude = transforms().functional, self.magnitude
        match self.name:
            case "Identity":
                changed = images
            case "ShearX" | "ShearY":  # about the upper left corner; a slope, where torchvision expects degrees
                changed = self._affine(images, shear=math.degrees(math.atan(magnitude)))
            case "TranslateX" | "TranslateY":
                changed = self._affine(images, translate=int(magnitude))
            case "Rotate":
                changed = functional.rotate(images, angle=magnitude, interpolation=self.interpolation)
            case "Posterize":
                changed = functional.posterize(images, bits=int(magnitude))
            case "Solarize":
                changed = functional.solarize(images, threshold=255 * magnitude)
            case name if name in _ADJUSTED:
                changed = getattr(functional, f"adjust_{_ADJUSTED[name]}")(images, 1 + magnitude)
            case name:
                changed = getattr(functional, name.lower())(images)
        assert isinstance(changed, Tensor)
        return changed

    def _affine(self, images: Tensor, *, shear: float = 0.0, translate: int = 0) -> Tensor:
        along = self.name[-1] == "X"
        changed = transforms().functional.affine(
            images,
            angle=0.0,
            translate=[translate, 0] if along else [0, translate],
            scale=1.0,
            shear=[shear, 0.0] if along else [0.0, shear],
            interpolation=self.interpolation,
            center=[0, 0] if shear else None,
        )
        assert isinstance(changed, Tensor)
        return changed


IDENTITY = Operation("Identity")


def at_level(name: str, level: int, negative: bool, reach: Reach, height: int, width: int) -> Operation:
    """Return an operation at one of `NUM_LEVELS` levels, for images of this size."""
    if name in _WITHOUT_MAGNITUDE:
        return Operation(name)
    if name == "Posterize":
        return Operation(name, reach.bits - round(level * 4 / (NUM_LEVELS - 1)))
    if name == "Solarize":
        return Operation(name, _levels(1.0, 0.0)[level])
    if name in ("TranslateX", "TranslateY"):
        magnitude: float = int(_levels(0.0, reach.translation * (width if name == "TranslateX" else height))[level])
    else:
        magnitude = _levels(0.0, _MAXIMA[name])[level]
    if magnitude == 0:
        return IDENTITY
    interpolation = reach.interpolation if name in _GEOMETRIC else "nearest"
    return Operation(name, -magnitude if negative else magnitude, interpolation)


def _levels(first: float, last: float) -> list[float]:
    """Return the magnitudes of all levels, with torchvision's rounding to single precision."""
    return torch.linspace(first, last, NUM_LEVELS).tolist()


Table = tuple[tuple[Operation, ...], Tensor]
"""Distinct operations and, for what was drawn, the position among them (int64)."""


def _table(drawn: list[Operation], shape: tuple[int, ...]) -> Table:
    distinct = tuple(dict.fromkeys([IDENTITY, *drawn]))
    return distinct, torch.tensor([distinct.index(each) for each in drawn]).view(shape)


@lru_cache(maxsize=8)
def _autoaugment_table(height: int, width: int) -> Table:
    """Return what (sub-policy, step, negative or not) stands for in images of this size."""
    drawn = [
        at_level(name, level, negative, AUTOAUGMENT_REACH, height, width)
        for subpolicy in CIFAR10_POLICY
        for name, _, level in subpolicy
        for negative in (False, True)
    ]
    return _table(drawn, (len(CIFAR10_POLICY), 2, 2))


@lru_cache(maxsize=8)
def _augmix_table(height: int, width: int) -> Table:
    """Return what (name, level, negative or not) stands for in images of this size."""
    each = itertools.product(AUGMIX_OPERATIONS, range(NUM_LEVELS), (False, True))
    drawn = [at_level(*one, AUGMIX_REACH, height, width) for one in each]
    return _table(drawn, (len(AUGMIX_OPERATIONS), NUM_LEVELS, 2))


def apply_each(images: Tensor, operations: tuple[Operation, ...], numbers: Tensor) -> Tensor:
    """Send each image through its own operation; those that share one go together.

    Args:
        images: uint8 (n, 1 or 3, height, width), any device; not changed.
        numbers: int64 (n,) on the CPU, positions in `operations`.
    """
    order = numbers.argsort(stable=True).to(images.device)
    ordered, changed = images.index_select(0, order), torch.empty_like(images)
    start = 0
    for operation, count in zip(operations, numbers.bincount(minlength=len(operations)).tolist(), strict=True):
        if count:
            group = slice(start, start + count)
            changed.index_copy_(0, order[group], operation(ordered[group]))
            start += count
    return changed


@dataclass(frozen=True)
class AutoAugmentDraws:
    """One batch's draws of AutoAugment."""

    subpolicy: Tensor  # int64 (batch,)
    applied: Tensor  # bool (2, batch): whether each of the two steps is taken
    negative: Tensor  # bool (2, batch)


def draw_autoaugment(batch: int, generator: torch.Generator) -> AutoAugmentDraws:
    """Draw a sub-policy for each image, which of its steps are taken, and the signs of their magnitudes."""
    subpolicy = torch.randint(len(CIFAR10_POLICY), (batch,), generator=generator)
    probabilities = torch.tensor([[probability for _, probability, _ in steps] for steps in CIFAR10_POLICY])
    applied = torch.rand(2, batch, generator=generator) < probabilities[subpolicy].T
    return AutoAugmentDraws(subpolicy, applied, torch.rand(2, batch, generator=generator) < 0.5)


def autoaugment(images: Tensor, draws: AutoAugmentDraws) -> Tensor:
    """Send each image through the sub-policy that was drawn for it.

    Args:
        images: uint8 (batch, 1 or 3, height, width).
    """
    operations, positions = _autoaugment_table(*images.shape[-2:])
    for step in range(2):
        numbers = positions[draws.subpolicy, step, draws.negative[step].long()]
        images = apply_each(images, operations, numbers.where(draws.applied[step], torch.tensor(0)))
    return images


@dataclass(frozen=True)
class AugMixDraws:
    """One batch's draws of AugMix; `width` and `depth` are the most chains and operations in a chain."""

    depth: Tensor  # int64 (width, batch), 1 to the most
    kind: Tensor  # int64 (depth, width, batch), positions in AUGMIX_OPERATIONS
    level: Tensor  # int64 (depth, width, batch)
    negative: Tensor  # bool (depth, width, batch)
    weight: Tensor  # float (width, batch), of each chain among the chains; sums to 1
    original: Tensor  # float (batch,), the weight of the image itself against all chains


def draw_augmix(batch: int, generator: torch.Generator, *, severity: int = EWS_SEVERITY) -> AugMixDraws:
    """Draw chains of operations for each image, and how they are mixed: Dirichlet(1, 1, 1), then Beta(1, 1)."""
    chains, steps = (AUGMIX_WIDTH, batch), (AUGMIX_DEPTH, AUGMIX_WIDTH, batch)
    depth = torch.randint(1, AUGMIX_DEPTH + 1, chains, generator=generator)
    kind = torch.randint(len(AUGMIX_OPERATIONS), steps, generator=generator)
    level = torch.randint(severity, steps, generator=generator)
    negative = torch.rand(steps, generator=generator) < 0.5
    # The gaps that uniform draws leave in [0, 1] are a Dirichlet draw, all parameters 1, and Beta(1, 1) is uniform.
    cuts = torch.rand(AUGMIX_WIDTH - 1, batch, generator=generator).sort(0).values
    weight = F.pad(cuts, (0, 0, 0, 1), value=1.0) - F.pad(cuts, (0, 0, 1, 0), value=0.0)
    return AugMixDraws(depth, kind, level, negative, weight, torch.rand(batch, generator=generator))


def augmix(images: Tensor, draws: AugMixDraws) -> Tensor:
    """Mix each image with what the chains of operations that were drawn for it make of it.

    Args:
        images: uint8 (batch, 1 or 3, height, width).
    """
    operations, positions = _augmix_table(*images.shape[-2:])
    width, batch = draws.depth.shape
    chains = images.repeat(width, 1, 1, 1)
    for step in range(len(draws.kind)):
        numbers = positions[draws.kind[step], draws.level[step], draws.negative[step].long()]
        numbers = numbers.where(step < draws.depth, torch.tensor(0))
        chains = apply_each(chains, operations, numbers.flatten())
    original = draws.original.to(images.device).view(-1, 1, 1, 1)
    weights = (draws.weight * (1 - draws.original)).to(images.device).view(width, batch, 1, 1, 1)
    mixed = original * images
    for weight, chain in zip(weights, chains.view(width, *images.shape), strict=True):
        mixed += weight * chain
    return mixed.to(torch.uint8)


def check_augmentation(name: str, *, views: int = 1, severity: int = EWS_SEVERITY) -> None:
    """Check settings that `augmented` would refuse for any images.

    Raises:
        UnknownName: There is no such augmentation.
        BadInput: The augmentation cannot make so many views, or the severity is out of range.
    """
    if name not in AUGMENTATIONS:
        raise UnknownName(name, AUGMENTATIONS, kind="augmentation")
    if views not in AUGMENTATIONS[name]:
        able = [other for other, known in AUGMENTATIONS.items() if views in known]
        expected = " or ".join(str(number) for number in AUGMENTATIONS[name])
        hint = f"; {views} views come from {', '.join(able)}" if able else ""
        raise BadInput(f"augmentation {name} makes {expected} views of an image, not {views}{hint}")
    if not 1 <= severity <= NUM_LEVELS:
        raise BadInput(f"AugMix's severity is 1 to {NUM_LEVELS}, got {severity}; its authors take 3, EWS takes 5")


def augmented(
    name: str, pixels: Tensor, generator: torch.Generator, *, flip: bool, views: int = 1, severity: int = EWS_SEVERITY
) -> list[Tensor]:
    """Return `views` augmented batches of the same images, a function of `generator` alone.

    Args:
        name: One of `AUGMENTATIONS`.
        pixels: uint8 (batch, channel, height, width), any device; not changed. autoaugment and augmix need 1 or 3
            channels; on one, AutoAugment's operation Color does nothing.
        generator: On the CPU, so that the draws are the same on every device.
        flip: Whether a mirrored image is still of its class.
        views: 1, or 3 of augmix: the cropped images and two mixtures of them.
        severity: Of augmix, 1 to 10; operations draw their magnitude from as many of the lowest levels.

    Raises:
        UnknownName: There is no such augmentation.
        BadInput: It cannot take these images, views or severity.
    """
    check_augmentation(name, views=views, severity=severity)
    if pixels.dtype != torch.uint8 or pixels.dim() != 4:
        raise BadInput(
            f"augmentation takes uint8 pixels (batch, channel, height, width), got {pixels.dtype} of shape "
            f"{tuple(pixels.shape)}; scale to [0, 1] afterwards"
        )
    if name == "none":
        return [pixels]
    if name == "crop_flip":
        return [datasets.augment(pixels, generator, flip=flip)]
    if pixels.shape[1] not in (1, 3):
        raise BadInput(
            f"augmentation {name} takes grey or colour images of 1 or 3 channels, got {pixels.shape[1]}; "
            "crop_flip takes any"
        )
    cropped = datasets.augment(pixels, generator, flip=flip).contiguous()
    if name == "autoaugment":
        return [autoaugment(cropped, draw_autoaugment(len(pixels), generator))]
    mixtures = max(views - 1, 1)
    draws = draw_augmix(mixtures * len(pixels), generator, severity=severity)
    mixed = list(augmix(cropped.repeat(mixtures, 1, 1, 1), draws).chunk(mixtures))
    return mixed if views == 1 else [cropped, *mixed]
