"""Random gates under attack: every attack that is known to matter for a randomised defence, judged on fresh draws.

What an attacker is given is everything but the gates of the answer. No single attack is the right one: averaging over
gates may chase a compromise that fools no path, a single path may transfer better, and ARC picks members off one by one
(Dbouk and Shanbhag 2022). So the reported number takes, for every image, the attack that served it worst.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zoo import paths
from zoo.attacks.apgd import apgd_eot
from zoo.attacks.autoattack import CLASSES_NEEDED, autoattack
from zoo.attacks.budget import LinfBudget
from zoo.attacks.gradient import fgsm, pgd
from zoo.attacks.losses import ascent
from zoo.attacks.outputs import logits_of
from zoo.attacks.random_gates import Sampler, arc, eot_pgd, path_model, path_sampler, relaxed_model
from zoo.attacks.square import square
from zoo.bundle.card import Check, Result
from zoo.data.datasets import Images
from zoo.errors import BadInput
from zoo.evaluation.protocols.transfer import STEPS, adversarial_set, open_surrogate
from zoo.evaluation.run import GROUP, Run, share, table
from zoo.gates.derive import mean_probability
from zoo.gates.rgn import RandomGatedNetwork

JUDGING_DRAWS = 100
FIXED_PATHS = 3
ARC_PATHS = 8
AVERAGED = 10
SQUARE_QUERIES, SQUARE_DRAWS = 200, 10


def random_gates(run: Run) -> list[Result]:
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
    steps = run.request.steps or 20
    restarts = run.request.restarts or 1
    images = run.images(1000)
    results = []
    few = min(AVERAGED, draws)
    metrics = ("mean", "standard error", f"worst of {few}", "worst of all", f"average of {few}")
    clean = run.judged(
        "clean", images, lambda pixels, labels, batch: _on_draws(run, pixels, labels, batch, draws), size=GROUP
    )
    for eps in run.request.eps:
        budget = LinfBudget(eps=float(eps), steps=steps, restarts=restarts)
        names = ["none", "random noise"]
        judged = [clean, run.judged(f"random noise, eps {eps}", images, _noise(run, eps, draws), size=GROUP)]
        for name, attack in _attacks(run).items():
            stage = f"{name}, eps {eps}"

            def judge(
                pixels: Tensor,
                labels: Tensor,
                batch: int,
                stage: str = stage,
                attack: GateAttack = attack,
                budget: LinfBudget = budget,
            ) -> Tensor:
                sampler = path_sampler(run.rgn, run.rng(f"gates of {stage}", batch))
                asked = run.fresh_paths(run.rng(f"gates of {stage}", batch)) if run.rounds else sampler
                attempt = Attempt(run.rgn, sampler, asked, run.generator(stage, batch), pixels, labels, budget)
                return _on_draws(run, attack(attempt), labels, batch, draws)

            names.append(name)
            judged.append(run.judged(stage, images, judge, size=GROUP))
        if run.request.surrogates:
            names.append("transfer")
            judged.append(_transferred(run, images, eps, draws))
        left_out = (
            [] if "AutoAttack on a fixed path" in names else ["AutoAttack (not installed, or fewer than 4 classes)"]
        )
        left_out += [] if run.request.surrogates else ["transfer (no surrogates named)"]
        counts = torch.stack(judged)  # (attack, image, metric inputs): correct draws, correct average
        right = counts[..., :draws]
        per_image = right.double().mean(2)
        minimum = per_image.min(0).values
        persistent = right.bool().all(2).all(0)
        values = torch.stack([_metrics(rows, draws) for rows in counts])
        results.append(
            run.result(
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
                + ("; made on the float32 weights, Square by asking the int8 graph" if run.rounds else "")
                + (f"; left out: {', '.join(left_out)}" if left_out else ""),
                checks=[*_checks(names, per_image, len(images)), *_masking(run, images)],
                tables=[table("attacks", (f"attack, eps {eps}", "accuracy over draws"), names, metrics, values)],
            )
        )
    return results


@dataclass(frozen=True)
class Attempt:
    """What an attack on random gates may use: the network, samplers of fresh paths and a generator of its own."""

    rgn: RandomGatedNetwork
    sampler: Sampler
    """Of the weights."""
    asked: Sampler
    """Of what is deployed, which is another where that is an int8 graph; it has no gradients."""
    generator: torch.Generator
    images: Tensor
    labels: Tensor
    budget: LinfBudget

    def with_steps(self, steps: int) -> LinfBudget:
        """Return the budget of an attack that has a number of steps of its own."""
        return LinfBudget(eps=self.budget.eps, steps=steps)


GateAttack = Callable[[Attempt], Tensor]


def _one_step(on: Attempt) -> Tensor:
    return fgsm(relaxed_model(on.rgn), on.images, on.labels, on.budget)


def _relaxed(on: Attempt) -> Tensor:
    return pgd(relaxed_model(on.rgn), on.images, on.labels, on.budget, generator=on.generator)


def _fixed(on: Attempt, *, path: paths.Path) -> Tensor:
    return pgd(path_model(on.rgn, path), on.images, on.labels, on.budget, generator=on.generator)


def _expected(on: Attempt, **options: Any) -> Tensor:
    return eot_pgd(on.sampler, on.images, on.labels, on.budget, generator=on.generator, **options)


def _auto_pgd(on: Attempt, *, loss: str) -> Tensor:
    budget = on.with_steps(50)
    return apgd_eot(on.sampler, on.images, on.labels, budget, draws=20, loss=loss, generator=on.generator)


def _members(on: Attempt) -> Tensor:
    models = [on.sampler() for _ in range(ARC_PATHS)]
    return arc(models, on.images, on.labels, on.with_steps(10), generator=on.generator)


def _square(on: Attempt) -> Tensor:
    return square(
        lambda pixels: on.asked()(pixels),
        on.images,
        on.labels,
        on.budget,
        queries=SQUARE_QUERIES,
        draws=SQUARE_DRAWS,
        early_stop=False,
        generator=on.generator,
    )


def _standard(on: Attempt, *, path: paths.Path) -> Tensor:
    seed = on.generator.initial_seed() % 2**31
    found = autoattack(path_model(on.rgn, path), on.images, on.labels, on.budget, seed=seed)
    return found.adversarial


def _attacks(run: Run) -> dict[str, GateAttack]:
    """Return the attacks by name, in the order of methods that average ever more."""
    rng = run.rng("fixed paths", 0)
    fixed = [paths.sample(run.rgn.num_gates, run.rgn.candidates, rng) for _ in range(FIXED_PATHS)]
    found: dict[str, GateAttack] = {"FGSM on the relaxed gates": _one_step}
    for number, path in enumerate(fixed):
        found[f"PGD on fixed path {number + 1}"] = partial(_fixed, path=path)
    found["PGD, fresh gates per step"] = partial(_expected, draws=1)
    for draws in (5, 20, 50):
        found[f"EOT-{draws}"] = partial(_expected, draws=draws)
    found["EOT-5, loss of the mean probability"] = partial(_expected, draws=5, average="probability")
    found["EOT-20, margin, momentum"] = partial(_expected, draws=20, loss="margin", momentum=0.75)
    found["PGD on the relaxed gates"] = _relaxed
    found[f"ARC on {ARC_PATHS} paths"] = _members
    found["APGD-CE, EOT-20"] = partial(_auto_pgd, loss="cross_entropy")
    if len(run.bundle.card.classes) >= 3:
        found["APGD-DLR, EOT-20"] = partial(_auto_pgd, loss="dlr")
    found[f"Square, {SQUARE_QUERIES} queries of {SQUARE_DRAWS} draws"] = _square
    if (
        importlib.util.find_spec("pyautoattack") is not None
        and len(run.bundle.card.classes) >= CLASSES_NEEDED["standard"]
    ):
        found["AutoAttack on a fixed path"] = partial(_standard, path=fixed[0])
    return found


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


def _noise(run: Run, eps: Fraction, draws: int) -> Callable[[Tensor, Tensor, int], Tensor]:
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
    """Return the columns `METRICS` of one attack from (image, draws + 1)."""
    right = judged[:, :draws].bool()
    per_draw = right.double().mean(0)
    counts = right.sum(1).tolist()
    # the chance that `few` of the draws, taken at random without replacement, are all answered correctly
    few = min(10, draws)
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
        Check(name="gradients are not zero", held=silent <= 0.05, detail=f"{silent:.3f} of {len(labels)} have none"),
        Check(
            name="a large eps reaches zero",
            held=kept <= 0.02,
            detail=f"eps 0.5: EOT-2 of 50 steps leaves {kept:.3f} of {len(labels)} images",
        ),
    ]


def _checks(names: list[str], per_image: Tensor, images: int) -> list[Check]:
    """Check what must hold of random gates: more draws do not help the defender, noise is weaker than any attack."""
    means = dict(zip(names, per_image.mean(1).tolist(), strict=True))
    expected = [means[f"EOT-{draws}"] for draws in (5, 20, 50)]
    blind = [name for name in names if name.startswith("Square") or name in ("random noise", "transfer")]
    seeing = torch.tensor([name not in blind for name in names])
    alone = float((per_image[seeing].min(0).values - per_image.min(0).values).mean())
    return [
        Check(
            name="EOT is flat",
            held=expected[2] >= expected[1] - 0.02,
            detail=f"EOT-5, 20, 50 leave {expected[0]:.3f}, {expected[1]:.3f}, {expected[2]:.3f} of {images} images",
        ),
        Check(
            name="iterative is at least as strong as one step",
            held=min(expected) <= means["FGSM on the relaxed gates"] + 0.02,
            detail=f"FGSM leaves {means['FGSM on the relaxed gates']:.3f}, EOT {min(expected):.3f}",
        ),
        Check(
            name="gradients find what guessing finds",
            held=alone <= 0.02,
            detail=f"{', '.join(blind)} lower the mean by {alone:.3f} beyond the gradient attacks, image by image",
        ),
        Check(
            name="random noise is weaker than the gradient",
            held=means["random noise"] >= min(expected) - 0.02,
            detail=f"noise leaves {means['random noise']:.3f}, EOT {min(expected):.3f}",
        ),
    ]
