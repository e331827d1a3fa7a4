"""What we derive from a network is compared with the network itself, on images made for it, before anyone uses it.

A tracer that took another branch than the forward, a hook that it did not see, a weight that no path changes: each
gives a network that runs and answers wrongly. So graphs are compared with the eager network at several batch sizes,
and every candidate of a gated layer must be able to change the answer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.nn import functional as F

from zoo.errors import BadInput
from zoo.gates import graphs
from zoo.gates.graphs import evaluating

TOLERANCE = 1e-4
"""Largest difference of two answers that count as equal, in parts of what the answers differ by among the images."""
ROUNDING = 1e-5
"""The same in parts of the largest answer: about what float32 rounds away in a deep network."""
TRACED = (
    "The usual reasons are a hook, a forward that looks at the type or the shape of its images, and one that was "
    "replaced on the object"
)
NUDGE, AMPLIFIED, MOST_NUDGED = 2.0**-20, 16, 100
"""Where a network answers images that are this much brighter very differently, as with variances near zero in its
BatchNorms, it amplifies rounding. Differences of so many times that one are then taken for rounding too, and nothing
can be compared where that one alone is so many times what is allowed."""
BATCH_SIZES = (1, 2, 5)
IMAGE_SIZES = (32, 224, 64, 28, 16, 8, 48, 96, 128, 192, 256, 299, 384, 512, 24, 20, 12, 10, 6, 4)
"""Heights and widths that are tried, in this order, on a network that does not say the shape of its images."""

Answer = Callable[[Tensor], Any]


def probes(network: nn.Module, number: int = max(BATCH_SIZES), *, run: Answer | None = None) -> Tensor:
    """Return random images (image, channel, height, width) in [0, 1] that `network` takes, in its type, on its device.

    Half of what they show is coarse, so that they differ behind a pooling as well. They are the same at every call, and
    no generator moves.

    Args:
        network: says the shape of its images by the attribute `image_shape` of itself or of a module inside, or is
            asked with images of the usual sizes.
        number: how many.
        run: asks the network, where calling it takes more than images.

    Raises:
        BadInput: the network takes images of none of these sizes.
    """
    first = like(network)
    shape = declared_shape(network) or _found_shape(network, first, network if run is None else run)
    return images((number, *shape)).to(first.device, first.dtype)


def like(network: nn.Module) -> Tensor:
    """Return a tensor of the type and on the device of a network's weights."""
    return next((tensor for tensor in network.parameters() if tensor.is_floating_point()), torch.empty(0))


def declared_shape(network: nn.Module) -> tuple[int, int, int] | None:
    """Return (channel, height, width) of the images that a network, or a module inside, says it takes, or None.

    Raises:
        BadInput: it says something else.
    """
    owner = next((module for module in network.modules() if hasattr(module, "image_shape")), None)
    if owner is None:
        return None
    said: Any = owner.image_shape
    try:
        channels, height, width = said
        fits = all(type(number) is int and number > 0 for number in (channels, height, width))
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise BadInput(
            f"image_shape of {type(owner).__name__} is {said!r}; expected (channel, height, width) in whole numbers"
        )
    return channels, height, width


def images(shape: Sequence[int]) -> Tensor:
    """Return float32 images of this shape (image, channel, height, width) in [0, 1], half of it coarse, half noise."""
    number, channels, height, width = shape
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(number, channels, 3, 3, generator=generator)
    smooth = F.interpolate(coarse, (height, width), mode="bilinear", align_corners=True)
    return (smooth + torch.rand(*shape, generator=generator)) / 2


@torch.no_grad()
def _found_shape(network: nn.Module, like: Tensor, run: Answer) -> tuple[int, int, int]:
    channels = next((module.in_channels for module in network.modules() if isinstance(module, nn.Conv2d)), 3)
    reason: Exception | None = None
    with evaluating(network):
        for size in IMAGE_SIZES:
            try:
                run(images((2, channels, size, size)).to(like.device, like.dtype))
            except Exception as error:  # noqa: BLE001 - any error of a stranger's forward
                reason = reason or error
            else:
                return (channels, size, size)
    raise BadInput(
        f"{type(network).__name__} takes {channels}-channel images of none of the usual sizes ({_first_line(reason)}); "
        "set network.image_shape = (channel, height, width)"
    )


def trace(network: nn.Module) -> fx.GraphModule:
    """Return the graph of a network, as `zoo.gates.graphs.trace` does, if it answers as the network does.

    Raises:
        BadInput: it cannot be traced, or answers otherwise.
    """
    graph = graphs.trace(network)
    check_same(network, network, {f"the torch.fx graph of {type(network).__name__}": graph}, probes(network))
    return graph


def difference(expected: Tensor, found: Tensor) -> float:
    """Return the largest difference of two answers (image, ...) in parts of what is allowed: above 1 they are unequal.

    Allowed is `TOLERANCE` of what the expected answers differ by among the images, and at least `ROUNDING` of their
    size; more where they are of lower precision than float32.
    """
    if expected.shape != found.shape or not (torch.isfinite(expected).all() and torch.isfinite(found).all()):
        return float("inf")
    rounding = max(ROUNDING, 16 * torch.finfo(expected.dtype).eps)
    expected, found = expected.double().cpu(), found.double().cpu()
    if not expected.numel():
        return 0.0
    size = float(expected.abs().max())
    spread = float((expected - expected.mean(0)).abs().max())
    allowed = max(TOLERANCE * min(size, spread), rounding * size)
    largest = float((expected - found).abs().max())
    return largest / allowed if largest else 0.0


@torch.no_grad()
def check_same(
    network: nn.Module, expected: Answer, ways: Mapping[str, Answer], images: Tensor, reason: str = TRACED
) -> None:
    """Compare a network with what was made of it, all in evaluation mode, at each of `BATCH_SIZES`.

    Args:
        network: the network, which is put into evaluation mode for the time; it names the error.
        expected: the network itself, as a function of images.
        ways: what was made of it, as functions of images, by what they are in words: the subject of the error.
        images: as many as the largest batch.
        reason: why they usually differ, in a sentence.

    Raises:
        BadInput: they differ, the answers are not finite, or are no tensors.
    """
    name = type(network).__name__
    with evaluating(network):
        for size in BATCH_SIZES:
            batch = images[:size]
            right = _answers(name, expected, batch)
            if not all(torch.isfinite(answer).all() for answer in right):
                raise BadInput(
                    f"{name} answers images in [0, 1] with numbers that are not finite, so nothing made of it can be "
                    "compared with it; check its weights"
                )
            for what, found in ways.items():
                worst = _worst(right, _answers(what, found, batch))
                if not worst <= 1 and not _amplified(name, expected, batch, right, worst):
                    raise BadInput(
                        f"{what} does not answer as {name} does: on {size} random images the answers differ by "
                        f"{worst:.2g} times what rounding explains. {reason}"
                    )


def _worst(right: Sequence[Tensor], made: Sequence[Tensor]) -> float:
    """Return the largest `difference` at any exit."""
    return max(map(difference, right, made)) if len(right) == len(made) else float("inf")


def _amplified(name: str, expected: Answer, batch: Tensor, right: Sequence[Tensor], worst: float) -> bool:
    """Whether the network makes that much of rounding alone, as it shows on slightly brighter images.

    Raises:
        BadInput: nothing can be compared with it: it answers differently at each call, or amplifies too much.
    """
    if _worst(right, _answers(name, expected, batch)) > 1:
        raise BadInput(
            f"{name} answers the same images differently at each call although it is in evaluation mode; "
            "expected a fixed function, so look for dropout or noise that ignores the mode"
        )
    nudged = _worst(right, _answers(name, expected, batch * (1 + NUDGE)))
    if nudged > MOST_NUDGED:
        raise BadInput(
            f"{name} answers very differently when its images are a millionth brighter, so nothing made of it can be "
            "compared with it; look for a variance near zero in a BatchNorm, or very large weights"
        )
    return worst <= AMPLIFIED * nudged


def _answers(name: str, run: Answer, batch: Tensor) -> tuple[Tensor, ...]:
    try:
        answer = run(batch.clone())  # a network may change its input in place
    except BadInput:
        raise
    except Exception as error:
        raise BadInput(
            f"{name} fails on a batch of {len(batch)} images of shape {tuple(batch.shape[1:])}: {_first_line(error)}"
        ) from error
    several = tuple(answer) if isinstance(answer, (tuple, list)) else (answer,)
    for each in several:
        if not (isinstance(each, Tensor) and each.shape[:1] == batch.shape[:1] and each.is_floating_point()):
            shape = f"{each.dtype} of shape {tuple(each.shape)}" if isinstance(each, Tensor) else type(each).__name__
            raise BadInput(
                f"{name} answers a batch of {len(batch)} images with {shape}; expected logits (batch, class), or a "
                "tuple of them for a network with exits"
            )
    return several


def _first_line(error: Exception | None) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def check_reach(
    network: nn.Module, tensors: dict[str, Tensor], parts: Sequence[str], images: Tensor, candidate: int
) -> None:
    """Check that each part of each gated layer can change the answer: its weight gets a gradient, or a change shows.

    Tensors are shaken first, so that a part behind a weight that starts at zero counts as well.

    Args:
        network: the template; in evaluation mode for the time.
        tensors: of the path that takes this candidate everywhere, under their names in the template.
        parts: the names of the convolutions and norms that have candidates.
        images: some that the network takes.
        candidate: its number, for the error.

    Raises:
        BadInput: a part that changes nothing.
    """
    generator = torch.Generator().manual_seed(0)

    def shaken(tensor: Tensor, by: float) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        size = by * (tensor.detach().abs().mean().nan_to_num() + 1e-2)
        more = torch.rand(tensor.shape, generator=generator).to(tensor.device, tensor.dtype)  # variances stay positive
        return (tensor.detach() + size * more).requires_grad_(isinstance(tensor, nn.Parameter))

    own = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    zero = {name: tensor for name, tensor in own.items() if not tensor.any()}

    def run(replaced: dict[str, Tensor]) -> Tensor:
        answer = functional_call(network, replaced, (images.clone(),))
        return answer if isinstance(answer, Tensor) else torch.cat(tuple(answer))

    every = {part: [name for name in tensors if name.startswith(f"{part}.")] for part in parts}
    learnt = {name for name, tensor in tensors.items() if isinstance(tensor, nn.Parameter) and tensor.dim() > 1}
    # a bias alone is no candidate where there is a weight
    waiting = {part: [name for name in names if name in learnt] or names for part, names in every.items()}
    with evaluating(network):
        for strength in (0.2, 4.0):  # small inputs may leave a layer silent that large ones do not
            used = {name: shaken(tensor, strength) for name, tensor in {**zero, **tensors}.items()}
            with torch.enable_grad():
                logits = run(used)
                weights = torch.rand(logits.shape, generator=generator).to(logits.device, logits.dtype)
                wanted = {name: used[name] for name in tensors if used[name].requires_grad}
                gradients: tuple[Tensor | None, ...] = (None,) * len(wanted)
                with contextlib.suppress(RuntimeError):  # a forward that autograd cannot follow can still be watched
                    gradients = torch.autograd.grad((logits * weights).sum(), list(wanted.values()), allow_unused=True)
            found = zip(wanted, gradients, strict=True)
            reached = {name for name, gradient in found if gradient is not None and gradient.any()}
            waiting = {part: names for part, names in waiting.items() if not reached & set(names)}
            for part, names in list(waiting.items()):
                with torch.no_grad():
                    changed = {name: shaken(used[name], 2.0) for name in names}
                    if not torch.equal(run({**used, **changed}), logits):
                        del waiting[part]
            if not waiting:
                return
    part, names = next(iter(waiting.items()))
    listed = ", ".join(names) or "none"
    raise BadInput(
        f"{part} cannot be gated: the tensors of its candidate {candidate} ({listed}) get no gradient, and changing "
        "them does not change the answer; its forward takes its weights from elsewhere, or nothing uses its output"
    )
