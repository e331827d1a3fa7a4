"""Random gates under attack: every attack that is known to matter for a randomised defence, judged on fresh draws.

The attacker knows everything but the gates of the answer. No single attack is the right one: averaging over gates may
find a compromise that fools no path, a single path may transfer better, and ARC fools members one by one (Dbouk and
Shanbhag 2022). So the reported number takes, for every image, the attack that left it the lowest accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

from zoo import paths
from zoo.attacks.budget import LinfBudget
from zoo.attacks.losses import ascent
from zoo.attacks.outputs import logits_of
from zoo.attacks.random_gates import eot_pgd, path_sampler
from zoo.bundle.card import Check, Result
from zoo.data.datasets import Images
from zoo.errors import BadInput
from zoo.evaluation.adversarial_set import STEPS, adversarial_set
from zoo.evaluation.intervals import share
from zoo.evaluation.protocols.gate_attacks import AUTOATTACK, EOT, ONE_STEP, Attempt, GateAttack, attacks_on
from zoo.evaluation.run import GROUP, Judge, Run, table
from zoo.evaluation.surrogates import open_surrogate
from zoo.evaluation.thresholds import DRAWS_GAP, LEFT_AT_HALF, SILENT_GRADIENTS
from zoo.gates.derive import mean_probability

JUDGING_DRAWS = 100
AVERAGED = 10
"""Draws whose mean probability is judged, and which an attacker who retries must all get past."""
NOISE, TRANSFER = "random noise", "transfer"


def measure(run: Run) -> list[Result]:
    """Every attack of the list on random gates: 20 steps of eps / 5, judged on 100 fresh draws, 1,000 images.

    The table "attacks" has for each attack the mean accuracy over draws with its standard error over draws, the share
    answered correctly on each of 10 and of all draws (an attacker who retries), and the accuracy of the mean
    probability of 10 draws. The accuracy of the result is the pointwise minimum: for every image the lowest mean over
    draws that any attack reached, averaged over the images.
    """
    if run.request.variant != "gated":
        raise BadInput(
            f"the protocol random-gates measures the variant gated, got {run.request.variant!r}; a fixed path or "
            "ensemble is deterministic, use --protocol whitebox or autoattack"
        )
    draws = run.request.draws or JUDGING_DRAWS
    images = run.images(1000)
    clean = run.judged(
        "clean", images, lambda pixels, labels, batch: _on_draws(run, pixels, labels, batch, draws), size=GROUP
    )
    return [_measure_at(run, eps, images, clean, draws) for eps in run.request.eps]


def _measure_at(run: Run, eps: Fraction, images: Images, clean: Tensor, draws: int) -> Result:
    steps, restarts = run.request.steps or 20, run.request.restarts or 1
    budget = LinfBudget(eps=float(eps), steps=steps, restarts=restarts)
    judged = {"none": clean, NOISE: run.judged(f"random noise, eps {eps}", images, _noise(run, eps, draws), size=GROUP)}
    for name, attack in attacks_on(run).items():
        stage = f"{name}, eps {eps}"
        judged[name] = run.judged(stage, images, _attacked(run, stage, attack, budget, draws), size=GROUP)
    if run.request.surrogates:
        judged[TRANSFER] = _transferred(run, images, eps, draws)
    names = list(judged)
    counts = torch.stack(list(judged.values()))  # (attack, image, metric inputs): correct draws, correct average
    right = counts[..., :draws]
    per_image = right.double().mean(2)
    minimum = per_image.min(0).values
    persistent = right.bool().all(2).all(0)
    values = torch.stack([_metrics(rows, draws) for rows in counts])
    left_out = _left_out(names)
    return run.result(
        attack=f"minimum of {len(names) - 1} attacks",
        accuracy=share(minimum),
        images=len(images),
        eps=eps,
        steps=steps,
        step_size=budget.step,
        restarts=restarts,
        draws=draws,
        note=f"pointwise; {share(persistent):.4f} against an attacker who tries them "
        f"all on every one of {draws} draws; gates drawn per {GROUP} images"
        + ("; made on the float32 weights, Square by asking the int8 graph" if run.int8 else "")
        + (f"; left out: {', '.join(left_out)}" if left_out else ""),
        checks=[*_checks(names, per_image, len(images)), *_masking(run, images)],
        tables=[table("attacks", (f"attack, eps {eps}", "accuracy over draws"), names, _columns(draws), values)],
    )


def _attacked(run: Run, stage: str, attack: GateAttack, budget: LinfBudget, draws: int) -> Judge:
    def judge(pixels: Tensor, labels: Tensor, batch: int) -> Tensor:
        weights = path_sampler(run.rgn, run.rng(f"gates of {stage}", batch))
        deployed = run.fresh_paths(run.rng(f"gates of {stage}", batch)) if run.int8 else weights
        attempt = Attempt(run.rgn, weights, deployed, run.generator(stage, batch), pixels, labels, budget)
        return _on_draws(run, attack(attempt), labels, batch, draws)

    return judge


def _left_out(names: Sequence[str]) -> list[str]:
    reasons = {
        AUTOATTACK: "AutoAttack (not installed, or fewer than 4 classes)",
        TRANSFER: "transfer (no surrogates named)",
    }
    return [reason for name, reason in reasons.items() if name not in names]


def _columns(draws: int) -> tuple[str, ...]:
    few = min(AVERAGED, draws)
    return "mean", "standard error", f"worst of {few}", "worst of all", f"average of {few}"


def _on_draws(run: Run, pixels: Tensor, labels: Tensor, batch: int, draws: int) -> Tensor:
    """Judge images on fresh draws: (image, draws) correct, and in a last column the average of the first ten."""
    rng = run.rng("judging", batch)
    right, logits = [], []
    with torch.no_grad():
        for draw in range(draws):
            path = paths.sample(run.rgn.num_gates, run.rgn.candidates, rng)
            answer = logits_of(run.along(path), pixels)
            right.append(answer.argmax(1) == labels)
            if draw < AVERAGED:
                logits.append(answer)
        averaged = mean_probability(torch.stack(logits)).argmax(1) == labels
    return torch.stack([*right, averaged], dim=1)


def _noise(run: Run, eps: Fraction, draws: int) -> Judge:
    def judge(pixels: Tensor, labels: Tensor, batch: int) -> Tensor:
        noise = torch.rand(pixels.shape, generator=run.generator(f"noise {eps}", batch)).to(pixels.device)
        noisy = (pixels + float(eps) * (2 * noise - 1).sign()).clamp(0, 1)
        return _on_draws(run, noisy, labels, batch, draws)

    return judge


def _transferred(run: Run, images: Images, eps: Fraction, draws: int) -> Tensor:
    """Judge all versions of a transfer set; of each image the version with the lowest mean over draws."""
    surrogates = [open_surrogate(name) for name in run.request.surrogates]
    adversarial = adversarial_set(run, images, surrogates, STEPS)
    worst: Tensor | None = None
    for surrogate in surrogates:
        for pixels in adversarial.versions(surrogate, eps, run.device):
            groups = zip(torch.split(pixels, GROUP), torch.split(images.labels, GROUP), strict=True)
            judged = torch.cat(
                [_on_draws(run, part, labels, number, draws) for number, (part, labels) in enumerate(groups)]
            )
            if worst is None:
                worst = judged
            else:
                lower = judged[:, :draws].sum(1) < worst[:, :draws].sum(1)
                worst = torch.where(lower[:, None], judged, worst)
    assert worst is not None
    return worst.cpu()


def _metrics(judged: Tensor, draws: int) -> Tensor:
    """Return the columns of one attack, as `_columns` names them, from (image, draws + 1)."""
    right = judged[:, :draws].bool()
    per_draw = right.double().mean(0)
    counts = right.sum(1).tolist()
    # the chance that `few` of the draws, taken at random without replacement, are all answered correctly
    few = min(AVERAGED, draws)
    all_of_few = sum(math.comb(count, few) / math.comb(draws, few) for count in counts) / len(counts)
    error = float(per_draw.std()) / math.sqrt(draws) if draws > 1 else 0.0
    return torch.tensor(
        [share(right), error, all_of_few, share(right.all(1)), share(judged[:, draws].bool())], dtype=torch.float64
    )


def _masking(run: Run, images: Images) -> list[Check]:
    """Check on the first images that gradients exist along fresh paths, and that a large eps reaches zero."""
    pixels, labels = next(images.batches(GROUP))
    sampler = path_sampler(run.rgn, run.rng("masking", 0))
    gradient, _, _ = ascent(sampler())(pixels, labels, None)
    silent = float((gradient.flatten(1).abs().amax(1) == 0).double().mean())
    huge = LinfBudget(eps=0.5, steps=50, step_size=0.05)
    moved = eot_pgd(sampler, pixels, labels, huge, draws=2, generator=run.generator("masking", 0))
    kept = share(_on_draws(run, moved, labels, 0, AVERAGED)[:, :AVERAGED])
    return [
        Check(
            name="gradients are not zero",
            held=silent <= SILENT_GRADIENTS,
            detail=f"{silent:.3f} of {len(labels)} have none",
        ),
        Check(
            name="a large eps reaches zero",
            held=kept <= LEFT_AT_HALF,
            detail=f"eps 0.5: EOT-2 of 50 steps leaves {kept:.3f} of {len(labels)} images",
        ),
    ]


def _checks(names: list[str], per_image: Tensor, images: int) -> list[Check]:
    """Check what must hold of random gates: more draws do not help the defender, noise is weaker than any attack."""
    means = dict(zip(names, per_image.mean(1).tolist(), strict=True))
    expected = [means[name] for name in EOT.values()]
    blind = [name for name in names if name.startswith("Square") or name in (NOISE, TRANSFER)]
    seeing = torch.tensor([name not in blind for name in names])
    alone = float((per_image[seeing].min(0).values - per_image.min(0).values).mean())
    return [
        Check(
            name="EOT is flat",
            held=expected[2] >= expected[1] - DRAWS_GAP,
            detail=f"EOT-5, 20, 50 leave {expected[0]:.3f}, {expected[1]:.3f}, {expected[2]:.3f} of {images} images",
        ),
        Check(
            name="iterative is at least as strong as one step",
            held=min(expected) <= means[ONE_STEP] + DRAWS_GAP,
            detail=f"FGSM leaves {means[ONE_STEP]:.3f}, EOT {min(expected):.3f}",
        ),
        Check(
            name="gradients find what guessing finds",
            held=alone <= DRAWS_GAP,
            detail=f"{', '.join(blind)} lower the mean by {alone:.3f} beyond the gradient attacks, image by image",
        ),
        Check(
            name="random noise is weaker than the gradient",
            held=means[NOISE] >= min(expected) - DRAWS_GAP,
            detail=f"noise leaves {means[NOISE]:.3f}, EOT {min(expected):.3f}",
        ),
    ]
