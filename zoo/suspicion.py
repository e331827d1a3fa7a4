"""Suspicion: below which agreement of its voters an answer is flagged, what that costs and what it catches.

The voters are the members of an ensemble, or paths of random gates drawn afresh for each image. Agreement is the share
of them whose class is that of the mean probability, so of k voters it takes the values 0, 1/k, ..., 1 and no other. A
threshold lies in the middle between two of them: rounding cannot move an image across it.

The threshold comes from clean images alone: the largest one that flags at most the stated share of them. What it
catches is measured on attacks, and those are of two kinds. Most know nothing of the detector. The adaptive one does: it
looks for a wrong class on which *all* voters agree. Only that one says what a detector is worth against somebody who
read this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from zoo import paths
from zoo.attacks.budget import LinfBudget
from zoo.attacks.checks import (
    Model,
    Seen,
    check_logits,
    check_numbers,
    checked,
    differentiable,
    gradient_of,
    see,
)
from zoo.attacks.gradient import pgd
from zoo.attacks.losses import margin
from zoo.attacks.random_gates import eot_pgd, path_model, path_sampler
from zoo.attacks.square import square
from zoo.bundle.bundle import Bundle
from zoo.bundle.card import Card, Detection, Suspicion
from zoo.data import datasets
from zoo.data.datasets import Images
from zoo.errors import BadInput, ManygatesError
from zoo.evaluation.ledger import Ledger
from zoo.evaluation.protocols.transfer import Surrogate, check_surrogates, open_surrogate
from zoo.evaluation.request import Request
from zoo.evaluation.run import Run, wilson
from zoo.gates.derive import agreement, mean_probability
from zoo.hub.source import open_model
from zoo.weights.models import check_variant

DRAWS = 8
"""Paths that vote on an image where nothing else is asked for."""
SPARED = 1000
"""Images that a calibration takes where a recipe held none out."""
ATTACKED = 300
BATCH = 50
STEPS, RESTARTS = 50, 5
EXPECTED_STEPS, EXPECTED_DRAWS = 20, 20
QUERIES, RANDOM_QUERIES, SQUARE_DRAWS = 500, 200, 10
ADAPTIVE_RESTARTS = 3
CONFIDENCE = 3.0
"""By how much (in log-probability) the adaptive attack wins a vote before it cares for the others only."""


@dataclass(frozen=True, kw_only=True)
class Voters:
    """What answers an image together."""

    size: int
    fresh: bool
    """Whether they are others at every call."""
    models: Callable[[], Sequence[Model]]
    """As an attacker may have them; fresh ones are the same for all images of a batch."""
    logits: Callable[[Tensor], Tensor]
    """images -> (voter, image, class), as they are deployed: fresh ones are others for each image."""

    @torch.no_grad()
    def judge(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the class of each image, int64, and how far the voters agree on it, float32."""
        logits = self.logits(images)
        return logits.softmax(-1).mean(0).argmax(-1), agreement(logits)


@dataclass(frozen=True)
class Attack:
    """One attack on the voters."""

    name: str
    steps: int
    note: str
    run: Callable[[Tensor, Tensor, LinfBudget, int], Tensor]
    """(images, labels, budget, number of the batch) -> adversarial images."""
    adaptive: bool = False


def threshold_of(agreements: Tensor, voters: int, rate: float) -> tuple[float, float]:
    """Return the largest threshold that flags at most a share `rate` of clean images, and the share that it flags.

    Thresholds are the middles (2 j - 1) / (2 voters) between the values j / voters of agreement, or 0, which flags
    nothing. An image is flagged if its agreement is below the threshold.

    Args:
        agreements: of clean images, each a multiple of 1 / voters.
        voters: how many vote on an image.
        rate: the stated false-positive rate, between 0 and 1, both excluded.

    Raises:
        BadInput: no image, fewer than two voters, a rate out of range, or agreements that so many voters cannot have.
    """
    if not 0 < rate < 1:
        raise BadInput(f"the false-positive rate must be between 0 and 1, got {rate}; 0.05 flags one image in twenty")
    if voters < 2:
        raise BadInput(f"{voters} voter always agrees with itself; suspicion needs at least 2")
    if not len(agreements):
        raise BadInput("a threshold needs clean images to be set on, got none")
    votes = counted(agreements, voters)
    threshold, flagged = 0.0, 0.0
    for winning in range(1, voters + 1):
        share = int((votes < winning).sum()) / len(votes)
        if share > rate:
            break
        threshold, flagged = (2 * winning - 1) / (2 * voters), share
    return threshold, flagged


def counted(agreements: Tensor, voters: int) -> Tensor:
    """Return agreements as votes for the winner, int64.

    Raises:
        BadInput: a value that so many voters cannot have.
    """
    votes = (agreements.double() * voters).round().to(torch.int64)
    odd = ((agreements.double() * voters - votes).abs() > 1e-4) | (votes < 0) | (votes > voters)
    if bool(odd.any()):
        value = float(agreements[odd][0])
        raise BadInput(f"an agreement of {value} is no share of {voters} votes; expected 0, 1/{voters}, ..., 1")
    return votes


def detection_of(
    attack: Attack, eps: Fraction, answers: Tensor, agreements: Tensor, labels: Tensor, threshold: float
) -> Detection:
    """Count how much of an attack a threshold flags; at least one image was attacked.

    Args:
        attack: by name.
        eps: its radius.
        answers: int64 (image,), of the attacked images.
        agreements: (image,), likewise.
        labels: int64 (image,), what they were answered with before.
        threshold: below which an agreement is suspicious.
    """
    flagged, broken = agreements.double() < threshold, answers != labels
    successful = int(broken.sum())
    rate = int((flagged & broken).sum()) / successful if successful else 0.0
    return Detection(
        attack=attack.name,
        adaptive=attack.adaptive,
        eps=float(eps),
        eps_fraction=str(eps),
        steps=attack.steps,
        images=len(labels),
        successful=successful,
        rate=round(rate, 6),
        interval=_interval(rate, successful) if successful else (0.0, 1.0),
        rate_of_all=round(int(flagged.sum()) / len(labels), 6),
        note=attack.note,
    )


def unanimous(
    models: Callable[[], Sequence[Model]],
    images: Tensor,
    labels: Tensor,
    budget: LinfBudget,
    *,
    fresh: bool = False,
    confidence: float = CONFIDENCE,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Attack an answer and its agreement at once: PGD towards one wrong class that every voter is to name.

    Maximised is min(margin of the mean, c) + the mean over voters of min(margin of the voter, c), each margin the
    log-probability of the goal over the next best class; a vote that is won by c is left alone. The goal of the first
    attempt is at every step the wrong class that is the most probable on average; of each further attempt the next of
    the wrong classes that were the most probable for the clean image.

    Args:
        models: returns the voters; fresh ones at every call if they are random.
        images: float (batch, channel, height, width) in [0, 1].
        labels: int64 (batch,).
        budget: radius, steps, restarts (attempts).
        fresh: whether the voters are others at every call; then no image is done early, because one lucky draw proves
            nothing.
        confidence: c.
        generator: draws the random starts, on the CPU.

    Returns:
        Of all iterates, for each image one that fools its voters with the highest agreement, else the one with the
        highest loss.
    """
    images, labels, _ = checked(None, images, labels)
    best = images.clone()
    if not len(images):
        return best
    ball = budget.around(images)

    def heard() -> list[Seen]:
        return [see(model, chance="expected", watched=True) for model in models()]

    score = torch.full((len(images),), -torch.inf)
    with torch.no_grad():
        mean = mean_probability(torch.stack([model(images) for model in heard()]))
    check_logits(mean, labels)
    order = mean.scatter(1, labels[:, None], -torch.inf).argsort(1, descending=True)
    for attempt in range(budget.restarts):
        adversarial = budget.start(images, generator) if budget.random_start else images.clone()
        goal = order[:, min(attempt, order.shape[1] - 2)] if attempt else None
        active = torch.arange(len(images)) if fresh else (score < 2).nonzero()[:, 0]
        for step in range(budget.steps + 1):
            if not len(active):
                break
            pixels = differentiable(adversarial[active])
            voices = heard()
            # one voter after the other: the gradient of a sum needs no graph of all voters at once
            logits = torch.stack([model(pixels) for model in voices])
            mean = mean_probability(logits)
            if goal is None:
                wanted = mean.detach().scatter(1, labels[active, None], -torch.inf).argmax(1)
            else:
                wanted = goal[active]
            votes = margin(
                logits.log_softmax(-1).flatten(0, 1), labels[active].repeat(len(logits)), wanted.repeat(len(logits))
            )
            loss = margin(mean, labels[active], wanted, confidence=confidence)
            loss = loss + votes.clamp_max(confidence).reshape(len(logits), -1).mean(0)
            gradient = gradient_of(loss.sum(), pixels)
            check_numbers(mean.detach(), loss.detach(), gradient)
            reached = _reached(logits.detach(), loss.detach(), labels[active])
            better = reached > score[active]
            best[active[better]] = pixels.detach()[better]
            score[active[better]] = reached[better]
            if step == budget.steps:
                break
            moved = adversarial[active] + budget.step * budget.direction(gradient)
            adversarial[active] = ball[active].project(moved)
            if not fresh:
                active = active[score[active] < 2]
    return best


def _reached(logits: Tensor, loss: Tensor, labels: Tensor) -> Tensor:
    """Return how far an attempt got: 1 + agreement where the answer is wrong (2 is all there is), else below 0."""
    wrong = logits.softmax(-1).mean(0).argmax(-1) != labels
    # below 0, and in the order of the losses, where the answer is right
    return torch.where(wrong, 1 + agreement(logits), loss.sigmoid() - 1).cpu()


def calibrate(
    bundle: Bundle,
    variant: str,
    *,
    draws: int | None = None,
    rate: float = 0.05,
    eps: Sequence[Fraction] = (Fraction(1, 100), Fraction(3, 100)),
    images: int | None = None,
    attacked: int | None = None,
    surrogates: Sequence[str] = (),
    seed: int = 0,
    device: str = "cpu",
    command: str = "",
    watch: Callable[[Detection], None] | None = None,
) -> Suspicion:
    """Set a threshold of agreement on clean images, and measure what it costs and catches on others.

    The first half of the images sets the threshold, the second measures it, and those of the second half that are
    answered correctly are attacked.

    Args:
        bundle: its weights answer and are attacked.
        variant: "ensemble" or "gated".
        draws: paths that vote on an image of random gates; 8 by default.
        rate: the stated false-positive rate.
        eps: radii of the attacks.
        images: how many clean images; all that were spared if None.
        attacked: how many are attacked at most; 300 by default.
        surrogates: models (MODEL) on which transfer attacks are made.
        seed: of the gates, starts and squares.
        device: where to compute.
        command: repeats this, for the record.
        watch: called with each attack's detection.

    Raises:
        BadInput: no such variant, one voter only, fewer than two images, none that is answered correctly, or a rate
            outside (0, 1).
    """
    check_variant(bundle, variant)
    if variant not in ("ensemble", "gated"):
        raise BadInput(f"the variant {variant!r} is one network, which agrees with itself; name ensemble or gated")
    if variant == "ensemble" and draws is not None:
        raise BadInput(f"an ensemble's members are fixed, so it takes no draws, got draws={draws}; use --variant gated")
    if attacked is not None and attacked < 1:
        raise BadInput(f"need at least 1 image to attack, got {attacked}")
    threshold_of(torch.ones(1), 2, rate)  # refuse a rate before the long work
    request = Request(protocol="calibrate", variant=variant, eps=tuple(eps), seed=seed, surrogates=tuple(surrogates))
    run = Run(
        bundle=bundle, request=request, device=torch.device(device), ledger=Ledger({"calibrate": "keeps nothing"})
    )
    opened = [open_surrogate(name) for name in surrogates]
    if opened:
        check_surrogates(run, opened)
    voters = voters_of(run, DRAWS if draws is None else draws)
    if voters.size < 2:
        raise BadInput(f"{bundle.card.name} ({variant}) has {voters.size} voter, which agrees with itself; take more")
    clean, origin = spared_images(bundle.card, images)
    clean = clean.to(run.device)
    half = len(clean) // 2
    answers, agreements = _judged(voters, datasets.as_float(clean.pixels))
    threshold, _ = threshold_of(agreements[:half], voters.size, rate)
    flagged, right = agreements.double() < threshold, answers == clean.labels
    false_positives = float(flagged[half:].double().mean())
    chosen = right[half:].nonzero()[:, 0][: ATTACKED if attacked is None else attacked] + half
    if not len(chosen):
        raise BadInput(
            f"{bundle.card.name} ({variant}) answers none of the {len(clean) - half} measuring images correctly, so "
            "there is nothing to attack; take more --images"
        )
    detections = []
    for radius in request.eps:
        for attack in _attacks(run, voters, opened):
            adversarial = torch.cat(list(_attacked(attack, clean[chosen], radius)))
            found = detection_of(
                attack, radius, *_judged(voters, adversarial), labels=clean.labels[chosen], threshold=threshold
            )
            detections.append(found)
            if watch is not None:
                watch(found)
    tally = torch.bincount(counted(agreements, voters.size), minlength=voters.size + 1)
    spread = ", ".join(f"{int(number)} of {votes}" for votes, number in enumerate(tally) if number)
    wrong = ~right[half:]
    return Suspicion(
        variant="random" if variant == "gated" else variant,
        draws=voters.size if variant == "gated" else 0,
        threshold=threshold,
        false_positive_rate=rate,
        calibration_images=half,
        measured_false_positive_rate=round(false_positives, 6),
        interval=_interval(false_positives, len(clean) - half),
        images=len(clean) - half,
        seed=seed,
        source=f"{origin}; the first {half} set the threshold, the other {len(clean) - half} measured it, and of these "
        f"the first {len(chosen)} that are answered correctly were attacked",
        note=f"clean images by votes of {voters.size} for the winner: {spread}; of the {int(wrong.sum())} clean "
        f"measuring images that are answered wrongly {int((wrong & flagged[half:]).sum())} are flagged",
        detection=tuple(detections),
        date=datetime.now(UTC).date().isoformat(),
        command=command,
    )


def spared_images(card: Card, number: int | None = None) -> tuple[Images, str]:
    """Return clean images that neither training nor a robustness measurement used, and which ones they are, in words.

    They are the training images that the recipe held out. Where it held out none, or all training images were used
    since (fine-tuning, re-calibration), they are the last test images in the order of evaluation, of which an
    evaluation takes the first.

    Raises:
        BadInput: fewer than two images wanted, or more than there are.
    """
    recipe: dict[str, Any] = dict(card.training.recipe)
    derived = recipe.get("derived") or {}
    held_out = recipe.get("held_out")
    if (
        type(held_out) is int
        and held_out >= 2
        and not derived.get("finetune_epochs")
        and not derived.get("recalibrated")
    ):
        _, spared = datasets.hold_out(datasets.load(card.dataset, "train"), held_out, datasets.HOLD_OUT_SEED)
        origin = f"{card.dataset} training images that the recipe held out of training{_started(recipe, held_out)}"
        if "best checkpoint" in card.training.summary:
            origin += " (the checkpoint was chosen on them)"
    else:
        test = datasets.load(card.dataset, "test")
        order = datasets.evaluation_order(len(test))
        spared = test[order[-min(SPARED, len(test) // 2) :]]
        origin = f"{card.dataset} test images, the last in the order of which robustness evaluations take the first"
    wanted = len(spared) if number is None else number
    if not 2 <= wanted <= len(spared):
        raise BadInput(f"cannot calibrate on {wanted} images, expected 2 to {len(spared)}: the {origin}")
    return spared[slice(0, wanted)], f"{wanted:,} {origin}"


def _started(recipe: dict[str, Any], held_out: int) -> str:
    """Say whether the model that training started from spared the same images."""
    start = recipe.get("start_from")
    if not start:
        return ""
    try:
        spared = open_model(str(start), only=()).card.training.recipe.get("held_out")
    except ManygatesError:
        return f"; whether {start}, where it started, spared them is not known"
    if spared == held_out:  # the seed of the split is always the same
        return f", as did {start}, where it started"
    return f"; {start}, where it started, did not spare them all"


def voters_of(run: Run, draws: int) -> Voters:
    """Return who votes in the variant that is evaluated."""
    if run.request.variant == "ensemble":
        members = run.members
        return Voters(
            size=len(members),
            fresh=False,
            models=lambda: members,
            logits=lambda images: torch.stack([member(images) for member in members]),
        )
    rgn, rng, judging = run.rgn, run.rng("attackers", 0), run.rng("judges", 0)

    def along(path: paths.Path) -> Model:
        return path_model(rgn, path)

    def logits(images: Tensor) -> Tensor:
        rows = []
        for image in images:
            drawn = [paths.sample(rgn.num_gates, rgn.candidates, judging) for _ in range(draws)]
            rows.append(torch.cat([along(path)(image[None]) for path in drawn]))
        return torch.stack(rows, dim=1)

    return Voters(
        size=draws,
        fresh=True,
        models=lambda: [
            along(paths.sample(rgn.num_gates, rgn.candidates, rng)) for _ in range(max(draws, EXPECTED_DRAWS))
        ],
        logits=logits,
    )


def _attacks(run: Run, voters: Voters, surrogates: Sequence[Surrogate]) -> list[Attack]:
    """Return the attacks of the evaluation protocols on these voters, and the adaptive one last."""
    found = _blind_to_gates(run) if voters.fresh else _on_members(run)
    for surrogate in surrogates:
        deployed = surrogate.deployed(run.device)

        def transferred(
            images: Tensor, labels: Tensor, budget: LinfBudget, batch: int, deployed: Model = deployed
        ) -> Tensor:
            generator = run.generator("transfer", batch)
            return pgd(deployed, images, labels, _with(budget, STEPS), momentum=1.0, generator=generator)

        found.append(Attack(f"transfer from {surrogate.name}", STEPS, "momentum PGD on the surrogate", transferred))

    steps = EXPECTED_STEPS if voters.fresh else STEPS

    def adaptive(images: Tensor, labels: Tensor, budget: LinfBudget, batch: int) -> Tensor:
        generator = run.generator("adaptive", batch)
        more = _with(budget, steps, ADAPTIVE_RESTARTS)
        return unanimous(voters.models, images, labels, more, fresh=voters.fresh, generator=generator)

    how = f"{max(voters.size, EXPECTED_DRAWS)} fresh paths per step" if voters.fresh else "all members"
    note = f"for a wrong answer on which all voters agree; {how}, {ADAPTIVE_RESTARTS} goals"
    found.append(Attack("adaptive PGD", steps, note, adaptive, adaptive=True))
    return found


def _on_members(run: Run) -> list[Attack]:
    """Return the attacks on a deterministic ensemble that know nothing of the detector."""

    def first(images: Tensor, labels: Tensor, budget: LinfBudget, batch: int) -> Tensor:
        chosen = _with(budget, STEPS, RESTARTS)
        return pgd(run.network, images, labels, chosen, keep="first broken", generator=run.generator("first", batch))

    def whole(images: Tensor, labels: Tensor, budget: LinfBudget, batch: int) -> Tensor:
        return pgd(run.network, images, labels, _with(budget, STEPS), generator=run.generator("whole", batch))

    def squares(images: Tensor, labels: Tensor, budget: LinfBudget, batch: int) -> Tensor:
        generator = run.generator("square", batch)
        return square(run.network, images, labels, budget, queries=QUERIES, early_stop=False, generator=generator)

    return [
        Attack("PGD, first success", STEPS, f"whitebox: {RESTARTS} starts, stops where the answer turns", first),
        Attack("PGD, all steps", STEPS, "one start, goes on after the answer has turned", whole),
        Attack("Square", QUERIES, "queries only, goes on after the answer has turned", squares),
    ]


def _blind_to_gates(run: Run) -> list[Attack]:
    """Return the attacks on random gates that know nothing of the detector."""

    def expected(images: Tensor, labels: Tensor, budget: LinfBudget, batch: int) -> Tensor:
        sampler = path_sampler(run.rgn, run.rng("EOT", batch))
        chosen = _with(budget, EXPECTED_STEPS)
        generator = run.generator("EOT", batch)
        return eot_pgd(sampler, images, labels, chosen, draws=EXPECTED_DRAWS, generator=generator)

    def squares(images: Tensor, labels: Tensor, budget: LinfBudget, batch: int) -> Tensor:
        sampler, generator = path_sampler(run.rgn, run.rng("square", batch)), run.generator("square", batch)
        return square(
            lambda pixels: sampler()(pixels),
            images,
            labels,
            budget,
            queries=RANDOM_QUERIES,
            draws=SQUARE_DRAWS,
            early_stop=False,
            generator=generator,
        )

    return [
        Attack(f"EOT-{EXPECTED_DRAWS} PGD", EXPECTED_STEPS, f"{EXPECTED_DRAWS} fresh paths per step", expected),
        Attack("Square", RANDOM_QUERIES, f"queries only, {SQUARE_DRAWS} draws each", squares),
    ]


def _with(budget: LinfBudget, steps: int, restarts: int = 1) -> LinfBudget:
    return LinfBudget(eps=budget.eps, steps=steps, restarts=restarts)


def _attacked(attack: Attack, images: Images, eps: Fraction) -> Iterator[Tensor]:
    for number, (pixels, labels) in enumerate(images.batches(BATCH)):
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        yield attack.run(pixels, labels, LinfBudget(eps=float(eps)), number)


def _judged(voters: Voters, pixels: Tensor) -> tuple[Tensor, Tensor]:
    parts = []
    for start in range(0, max(len(pixels), 1), BATCH):
        parts.append(voters.judge(pixels[start : start + BATCH].contiguous(memory_format=torch.channels_last)))
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def _interval(rate: float, images: int) -> tuple[float, float]:
    low, high = wilson(rate, images)
    return round(min(low, rate), 6), round(max(high, rate), 6)
