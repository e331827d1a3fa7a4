"""Images, labels and targets as an attack takes them: tensors of its own, or refused in one sentence."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from zoo.errors import BadInput


def check_batch(images: object, labels: object, targets: object = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Check images, labels and targets, and return them as tensors that an attack can begin with.

    Images may be numpy's. Labels and targets may be lists, or numpy's of any integer type.

    Raises:
        BadInput: pixels outside [0, 1], labels or targets that do not fit the images or are negative, a target that is
            the label.
    """
    pixels = check_images(images)
    right = _check_classes(labels, pixels, "labels")
    wanted = None if targets is None else _check_classes(targets, pixels, "targets")
    if wanted is not None and bool((wanted == right).any()):
        position = int((wanted == right).nonzero()[0, 0])
        raise BadInput(
            f"the target of image {position} is its label, {int(right[position])}; a targeted attack needs another"
        )
    return pixels, right, wanted


def _check_classes(classes: object, images: Tensor, name: str) -> Tensor:
    if not isinstance(classes, Tensor):
        try:
            array = np.asarray(classes)
        except ValueError as error:
            raise BadInput(f"{name} must be one class per image, got {classes!r:.80}") from error
        kinds = "iuf" if array.size == 0 else "iu"  # numpy takes an empty list for floats
        if array.dtype.kind not in kinds:
            raise BadInput(f"{name} must be whole numbers, one class per image, got {classes!r:.80}")
        classes = torch.tensor(array.astype(np.int64))
    if classes.shape != images.shape[:1] or classes.dtype != torch.int64:
        raise BadInput(
            f"{name} must be int64 of shape ({len(images)},), one per image, got {classes.dtype} of shape "
            f"{tuple(classes.shape)}"
        )
    classes = _own(classes).to(images.device)
    if len(classes) and int(classes.min()) < 0:
        raise BadInput(f"{name} must be classes from 0 on, got {int(classes.min())}")
    return classes


def check_images(images: object) -> Tensor:
    """Return images, detached, if all pixels are in [0, 1]; NaN is not. A numpy array becomes a tensor."""
    if isinstance(images, np.ndarray):
        images = torch.tensor(images)
    if not isinstance(images, Tensor):
        raise BadInput(f"images must be a tensor (batch, channel, height, width), got {type(images).__name__}")
    if not images.is_floating_point() or images.dim() != 4:
        raise BadInput(
            f"images must be float (batch, channel, height, width), got {images.dtype} of shape {tuple(images.shape)}; "
            "divide bytes by 255"
        )
    if len(images) and not images.numel():
        raise BadInput(f"images of shape {tuple(images.shape)} have no pixels")
    images = _own(images.detach())
    low, high = (float(bound) for bound in images.aminmax()) if images.numel() else (0.0, 0.0)
    if not (low >= 0 and high <= 1):
        raise BadInput(f"pixels must be in [0, 1], got [{low:g}, {high:g}]; divide bytes by 255 and do not normalise")
    return images


def _own(tensor: Tensor) -> Tensor:
    """Return a tensor that gradients can be asked of, also where the caller made it in inference mode."""
    return tensor.clone() if tensor.is_inference() and not torch.is_inference_mode_enabled() else tensor


def differentiable(images: Tensor) -> Tensor:
    """Return images that collect a gradient, without the history of `images`.

    Raises:
        BadInput: inside `torch.inference_mode()`, where nothing does.
    """
    if torch.is_inference_mode_enabled():
        raise BadInput(
            "an attack by gradients cannot run inside torch.inference_mode(), where nothing has a gradient; call it "
            "outside, or use torch.no_grad(), which attacks lift where they need to"
        )
    return images.detach().requires_grad_(True)


def full_precision(tensor: Tensor) -> Tensor:
    """Return half precision as float32, others as they are: losses, comparisons and steps need the digits."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
