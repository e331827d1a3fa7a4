"""What every white-box result is checked for: an attack that works, and has converged."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from zoo.attacks.budget import LinfBudget
from zoo.attacks.gradient import fgsm, pgd
from zoo.bundle.card import Check
from zoo.data import datasets
from zoo.data.datasets import Images
from zoo.evaluation.intervals import share
from zoo.evaluation.run import Run, correct
from zoo.evaluation.thresholds import LATE_GAIN, LEFT_AT_HALF, LOSS_GAP, NOISE_GAP, ONE_STEP_ALONE, SILENT_GRADIENTS


def sanity(run: Run, images: Images) -> tuple[Check, ...]:
    """Check on a few images what must hold of an honest number (Carlini et al. 2019, arXiv:1902.06705).

    The linter (`zoo.evaluation.linter`) asks more; these few run with every evaluation.
    """
    network, request = run.network, run.request
    pixels, labels = datasets.as_float(images.pixels), images.labels
    eps = float(max(request.eps)) or 8 / 255

    def attacked(eps: float, steps: int, step_size: float | None = None) -> Tensor:
        budget = LinfBudget(eps=eps, steps=steps, step_size=step_size)
        adversarial = pgd(
            network, pixels, labels, budget, keep="first broken", generator=run.generator(f"sanity {eps}", steps)
        )
        return correct(network, adversarial, labels)

    unharmed = correct(network, pixels, labels)
    none = correct(network, pgd(network, pixels, labels, LinfBudget(eps=0.0, steps=1)), labels)
    one_step = correct(network, fgsm(network, pixels, labels, LinfBudget(eps=eps)), labels)
    many = attacked(eps, 50)
    huge = attacked(0.5, 50, 0.05)
    noise = torch.rand(pixels.shape, generator=run.generator("sanity noise", 0)).to(pixels.device)
    noisy = correct(network, (pixels + eps * (2 * noise - 1).sign()).clamp(0, 1), labels)
    number = len(images)
    return (
        Check(name="eps 0 equals clean", held=bool((none == unharmed).all()), detail=f"{number} images"),
        Check(
            name="PGD is at least as strong as one step",
            held=int((~one_step & many).sum()) <= ONE_STEP_ALONE * number,
            detail=f"eps {eps:g}: FGSM leaves {share(one_step):.3f}, PGD-50 {share(many):.3f} of {number} images",
        ),
        Check(
            name="a large eps reaches zero",
            held=share(huge) <= LEFT_AT_HALF,
            detail=f"eps 0.5: PGD-50 leaves {share(huge):.3f}",
        ),
        Check(
            name="random noise is weaker than the gradient",
            held=share(noisy) >= share(many) - NOISE_GAP,
            detail=f"eps {eps:g}: random signs leave {share(noisy):.3f}, PGD-50 {share(many):.3f}",
        ),
        _gradients_exist(network, pixels, labels),
    )


def _gradients_exist(network: nn.Module, pixels: Tensor, labels: Tensor) -> Check:
    with torch.enable_grad():
        probe = pixels.clone().requires_grad_(True)
        loss = nn.functional.cross_entropy(network(probe), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, probe)
    silent = float((gradient.flatten(1).abs().amax(1) == 0).float().mean())
    return Check(
        name="gradients are not zero",
        held=silent <= SILENT_GRADIENTS,
        detail=f"{silent:.3f} of the images have none",
    )


def converged(run: Run, images: Images, right: Tensor, budget: LinfBudget) -> tuple[Check, ...]:
    """Attack the first images that the recorded attack left, harder and by another loss: neither may find much more."""
    right = right.to(images.labels.device)
    rows = right.nonzero()[:, 0]
    pixels, labels = datasets.as_float(images.pixels[rows]), images.labels[rows]
    harder = replace(budget, steps=2 * budget.steps)
    once = replace(budget, restarts=1)

    def broken(budget: LinfBudget, loss: str) -> float:
        if not budget.eps or not len(rows):
            return 0.0
        generator = run.generator(f"converged, eps {budget.eps}, {loss}", budget.steps)
        adversarial = pgd(run.network, pixels, labels, budget, loss=loss, keep="first broken", generator=generator)
        return float((~correct(run.network, adversarial, labels)).sum()) / len(images)

    gained, other = broken(harder, "cross_entropy"), broken(once, "margin")
    return (
        Check(
            name="twice the steps do not help the attacker",
            held=gained <= LATE_GAIN,
            detail=f"eps {budget.eps:g}: PGD-{harder.steps} x {harder.restarts} from other starts breaks {gained:.3f} "
            f"of {len(images)} images beyond PGD-{budget.steps} x {budget.restarts}",
        ),
        Check(
            name="a loss that does not saturate finds no more",
            held=other <= LOSS_GAP,
            detail=f"eps {budget.eps:g}: PGD-{once.steps} on the margin breaks {other:.3f} of {len(images)} images "
            "that the cross-entropy leaves",
        ),
    )
