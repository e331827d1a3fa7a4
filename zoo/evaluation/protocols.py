"""Clean accuracy and white-box robust accuracy, as DVERGE and Ensemble-in-One measure them (their sections 4).

The deployed thing is measured: a derived path deterministically, an ensemble through its averaged probabilities, random
gates along fresh paths per image. Robust accuracy is all-or-nothing: an image counts if it is answered correctly on
*every* restart. Sanity checks that tell an honest number from gradient masking run with every white-box evaluation.
"""

from __future__ import annotations

import math
import random
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from fractions import Fraction
from typing import cast

import torch
from torch import Tensor, nn
from tqdm import tqdm

from zoo import data, paths
from zoo.attacks import LinfBudget, fgsm, pgd
from zoo.bundle import Bundle
from zoo.card import Check, Result
from zoo.data import Images
from zoo.derive import Ensemble, folded_copy
from zoo.errors import BadInput, UnknownName
from zoo.models import check_variant, load_rgn, member_networks
from zoo.rgn import RandomGatedNetwork

BATCH = 250
CHECKED_IMAGES = 100
GATED_DRAWS = 10
GATED_GROUP = 50


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to measure."""

    protocol: str
    variant: str = "single"
    eps: tuple[Fraction, ...] = (Fraction(1, 100), Fraction(3, 100))
    """Radii of the l_inf ball, exact, in pixel units."""
    images: int | None = None
    """Test images; all 10,000 for clean accuracy and 1,000 under attack if None."""
    steps: int = 50
    restarts: int = 5
    seed: int = 0
    command: str = ""
    """The command that repeats this, for the record."""


def evaluate(bundle: Bundle, request: Request, *, device: str = "cpu") -> list[Result]:
    """Measure one protocol; one result per eps.

    Raises:
        UnknownName: no such protocol.
        BadInput: the bundle has no such variant, the protocol does not fit it, or a number makes no sense.
        DataMissing: the model's data set is not there.
    """
    if request.protocol not in PROTOCOLS:
        raise UnknownName(request.protocol, PROTOCOLS, kind="protocol")
    check_variant(bundle, request.variant)
    return PROTOCOLS[request.protocol](bundle, request, torch.device(device))


def clean(bundle: Bundle, request: Request, device: torch.device) -> list[Result]:
    """Accuracy on unperturbed test images; for random gates the mean over ten draws of a path per image."""
    images = _test_images(bundle, request, default=None).to(device)
    if request.variant == "gated":
        rgn = load_rgn(bundle).to(device)
        rng = random.Random(request.seed)  # noqa: S311 - repeatable, unlike a deployed model's gates
        accuracy = _gated_accuracy(rgn, images, rng)
        note = f"mean over {GATED_DRAWS} draws, each with a fresh random path per {GATED_GROUP} images"
        return [_result(request, "none", Fraction(0), len(images), accuracy, note=note, steps=0, restarts=0, step=0.0)]
    network = _deployed(bundle, request.variant).to(device)
    accuracy = float(_correct(network, images).float().mean())
    return [_result(request, "none", Fraction(0), len(images), accuracy, steps=0, restarts=0, step=0.0)]


def whitebox(bundle: Bundle, request: Request, device: torch.device) -> list[Result]:
    """PGD on the deployed network: cross-entropy, steps of eps / 5, random starts, all-or-nothing over the restarts."""
    if request.variant == "gated":
        raise BadInput(
            "white-box PGD on one path says nothing about random gates; measure the variants single and ensemble "
            "(attacks that average over gates belong to a protocol of their own)"
        )
    budgets = [LinfBudget(eps=float(eps), steps=request.steps, restarts=request.restarts) for eps in request.eps]
    images = _test_images(bundle, request, default=1000).to(device)
    network = _deployed(bundle, request.variant).to(device)
    checks = _sanity(network, images[slice(0, CHECKED_IMAGES)], request)
    results = []
    for eps, budget in zip(request.eps, budgets, strict=True):
        generator = torch.Generator().manual_seed(request.seed)
        survived = []
        label = f"PGD-{request.steps} x {request.restarts}, eps {eps}"
        for pixels, labels in _progress(list(images.batches(BATCH)), label):
            pixels = pixels.contiguous(memory_format=torch.channels_last)
            adversarial = pgd(network, pixels, labels, budget, generator=generator) if eps else pixels
            with torch.no_grad():
                survived.append(network(adversarial).argmax(1) == labels)
        accuracy = float(torch.cat(survived).float().mean())
        results.append(
            _result(
                request,
                "PGD",
                eps,
                len(images),
                accuracy,
                steps=request.steps,
                restarts=request.restarts,
                step=budget.step,
                checks=checks,
            )
        )
    return results


PROTOCOLS: dict[str, Callable[[Bundle, Request, torch.device], list[Result]]] = {
    "clean": clean,
    "whitebox": whitebox,
}


def parse_eps(text: str) -> Fraction:
    """Read eps exactly, written as `8/255` or `0.03`.

    Raises:
        BadInput: not a number, or outside [0, 1].
    """
    try:
        # the exponent first: Fraction would spend minutes on "1e300000000"
        eps = Fraction("none" if re.search(r"e[+-]?\d{3}", text.lower()) else text[:64])
    except (ValueError, ZeroDivisionError) as error:
        raise BadInput(f"eps {text[:40]!r} is not a number; write 8/255 or 0.03") from error
    if eps.denominator >= 10**9:
        raise BadInput(f"eps {text} has too many digits; write it as a fraction, such as 8/255")
    if not 0 <= eps <= 1:
        raise BadInput(f"eps {text} is outside [0, 1]; pixels are in [0, 1], so write 8/255, not 8")
    return eps


def wilson(accuracy: float, images: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a share measured on `images` images."""
    z = 1.959964
    centre = (accuracy + z * z / (2 * images)) / (1 + z * z / images)
    half = z / (1 + z * z / images) * math.sqrt(accuracy * (1 - accuracy) / images + z * z / (4 * images**2))
    return max(0.0, centre - half), min(1.0, centre + half)


def _deployed(bundle: Bundle, variant: str) -> nn.Module:
    """The deployed network with its BatchNorms folded, as in its ONNX graph, laid out for the fastest convolutions."""
    members: list[nn.Module] = [folded_copy(member) for member in member_networks(bundle, variant)]
    network = members[0] if variant == "single" else Ensemble(members).eval()
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network.requires_grad_(False)


def _test_images(bundle: Bundle, request: Request, default: int | None) -> Images:
    images = data.load(bundle.card.dataset, "test")
    number = request.images if request.images is not None else default or len(images)
    return data.evaluation_subset(images, number)


@torch.no_grad()
def _correct(network: nn.Module, images: Images) -> Tensor:
    return torch.cat([network(pixels).argmax(1) == labels for pixels, labels in images.batches(BATCH)])


@torch.no_grad()
def _gated_accuracy(rgn: RandomGatedNetwork, images: Images, rng: random.Random) -> float:
    """Mean accuracy over draws; a group of images shares a path, which leaves the mean as it is and saves time."""
    correct = 0
    groups = list(images.batches(GATED_GROUP))
    for draw in range(GATED_DRAWS):
        for pixels, labels in _progress(groups, f"random gates, draw {draw + 1} of {GATED_DRAWS}"):
            path = paths.sample(rgn.num_gates, rgn.candidates, rng)
            correct += int((rgn(pixels, path).argmax(1) == labels).sum())
    return correct / (GATED_DRAWS * len(images))


def _sanity(network: nn.Module, images: Images, request: Request) -> tuple[Check, ...]:
    """Check on a few images what must hold of an honest number (Carlini et al. 2019, arXiv:1902.06705)."""
    pixels, labels = data.as_float(images.pixels), images.labels

    def survivors(adversarial: Tensor) -> Tensor:
        with torch.no_grad():
            return cast(Tensor, network(adversarial).argmax(1) == labels)

    def attacked(eps: float, steps: int, step_size: float | None = None) -> Tensor:
        budget = LinfBudget(eps=eps, steps=steps, step_size=step_size)
        return survivors(pgd(network, pixels, labels, budget, generator=torch.Generator().manual_seed(request.seed)))

    eps = float(max(request.eps)) or 8 / 255
    unharmed = survivors(pixels)
    still = LinfBudget(eps=0.0, steps=1, step_size=1 / 255)
    none = survivors(pgd(network, pixels, labels, still))
    one_step = survivors(fgsm(network, pixels, labels, LinfBudget(eps=eps)))
    few, many = attacked(eps, 10), attacked(eps, 50)
    huge = attacked(0.5, 50, 0.05)
    noise = torch.rand(pixels.shape, generator=torch.Generator().manual_seed(request.seed)).to(pixels.device)
    noisy = survivors((pixels + eps * (2 * noise - 1).sign()).clamp(0, 1))
    with torch.enable_grad():
        probe = pixels.clone().requires_grad_(True)
        loss = nn.functional.cross_entropy(network(probe), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, probe)
    silent = float((gradient.flatten(1).abs().amax(1) == 0).float().mean())
    number = len(images)

    def share(kept: Tensor) -> float:
        return float(kept.float().mean())

    return (
        Check(name="eps 0 equals clean", held=bool((none == unharmed).all()), detail=f"{number} images"),
        Check(
            name="PGD is at least as strong as one step",
            held=int((~one_step & many).sum()) <= 0.03 * number,
            detail=f"eps {eps:g}: FGSM leaves {share(one_step):.3f}, PGD-50 {share(many):.3f} of {number} images",
        ),
        Check(
            name="more steps do not help the defender",
            held=share(many) <= share(few) + 0.03,
            detail=f"eps {eps:g}: PGD-10 leaves {share(few):.3f}, PGD-50 {share(many):.3f}",
        ),
        Check(
            name="a large eps reaches zero",
            held=share(huge) <= 0.02,
            detail=f"eps 0.5: PGD-50 leaves {share(huge):.3f}",
        ),
        Check(
            name="random noise is weaker than the gradient",
            held=share(noisy) >= share(many) - 0.03,
            detail=f"eps {eps:g}: random signs leave {share(noisy):.3f}, PGD-50 {share(many):.3f}",
        ),
        Check(name="gradients are not zero", held=silent <= 0.05, detail=f"{silent:.3f} of the images have none"),
    )


def _result(
    request: Request,
    attack: str,
    eps: Fraction,
    images: int,
    accuracy: float,
    *,
    steps: int,
    restarts: int,
    step: float,
    note: str = "",
    checks: Sequence[Check] = (),
) -> Result:
    low, high = wilson(accuracy, images)
    return Result(
        protocol=request.protocol,
        variant=request.variant,
        attack=attack,
        eps=float(eps),
        eps_fraction=str(eps),
        steps=steps,
        step_size=round(step, 9),
        restarts=restarts,
        images=images,
        seed=request.seed,
        accuracy=round(accuracy, 6),
        interval=(round(min(low, accuracy), 6), round(max(high, accuracy), 6)),
        note=note,
        checks=tuple(checks),
        date=datetime.now(UTC).date().isoformat(),
        command=request.command,
    )


def _progress(items: list[tuple[Tensor, Tensor]], label: str) -> Iterable[tuple[Tensor, Tensor]]:
    return tqdm(items, desc=label, disable=not sys.stderr.isatty(), leave=False)  # type: ignore[no-any-return]
