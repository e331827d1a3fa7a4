"""The robustness linter: questions whose wrong answers show that a robust accuracy is an artefact of its measurement.

A model that looks robust is robust, or its attack failed. Every check here looks for one way in which attacks fail and
answers "ok", "alarm" or "skipped". No alarm is no proof: the list is neither necessary nor sufficient, as its sources
say of theirs, and every "ok" is worth the budget printed beside it.

    Carlini et al. 2019, arXiv:1902.06705        the checklist (S1 to S5, W1, E1)
    Athalye et al. 2018, arXiv:1802.00420        the signs of obfuscated gradients (S2, S5, W1, E1)
    Croce and Hein 2020, arXiv:2003.01690        scale-free losses (G2) and the flags of AutoAttack (O1, R1, G1, W1, D1)
    Pintor et al. 2022, arXiv:2106.09947         indicators of attack failure (S3, S6, T1)
    Zimmermann et al. 2022, arXiv:2206.13991     planted adversarial examples (X1)

Three questions are our own: whether some kinds of direction have no gradient although the answer depends on them (G4),
and two for int8 graphs, where rounding can look like robustness (Q1, Q2).

The checks share their attacks: `Evidence` runs each one when the first check asks for it. A share of images is compared
with its threshold by the lower end of its 95 % Wilson interval, so that one image among few raises no alarm. A model
gets a copy of the images in the type they came in; everything else is computed in float32 or better.
"""

from __future__ import annotations

import math
import random
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from zoo.attacks.apgd import apgd_targeted
from zoo.attacks.budget import LinfBudget, number, whole
from zoo.attacks.gradient import fgsm, pgd
from zoo.attacks.images import check_batch, full_precision
from zoo.attacks.losses import Loss, ascent, margin
from zoo.attacks.models import CheckedModel, Randomness, checked_model
from zoo.attacks.outputs import Model, Output, are_probabilities
from zoo.attacks.pixel_grid import to_grid
from zoo.attacks.random_gates import Sampler, eot_pgd
from zoo.attacks.square import square
from zoo.attacks.training_mode import check_mode, unchecked
from zoo.bundle.card import Finding
from zoo.errors import BadInput
from zoo.evaluation.int8_graph import Rounded, shown
from zoo.evaluation.run import wilson

Served = Callable[[np.ndarray], "np.ndarray | Tensor"]
"""pixels float32 (batch, channel, height, width) in [0, 1] -> logits or probabilities (batch, class)."""

# --- what is spent; every figure names its share of it ---

BATCH = 128
STEPS, LONG_STEPS = 20, 40
"""Steps of the usual attack, each eps / 8 long (2.5 eps in all), and of the longer one, whose first half it is."""
CURVE_STEPS = 10
QUERIES = 300
NOISES = 16
"""Pairs of random corners of the ball, x + eps u and x - eps u."""
REPEATED_IMAGES, REPEATS = 8, 8
"""R1 asks so often, because a model of two paths answers alike half the time."""
SLOPE_IMAGES, SLOPE_POINTS = 50, 12
COVER_IMAGES, FEWEST_COVER_IMAGES = 24, 8
COVER_POINTS, CERTAIN_POINTS = 3, 16
"""G4 takes so many gradients along each direction, and the second number before it alarms."""
MOST_GROUPS = 4
"""G4 looks at so many groups of channels."""
NEAREST = 3
"""G2 goes towards so many classes, in the order of their logits."""
PLANTED_IMAGES, INNER_POINTS = 32, 32
EOT_IMAGES, EOT_STEPS, EOT_DRAWS, FRESH_DRAWS = 50, 10, 16, 20

# --- thresholds: shares of images unless said otherwise ---

ONE_STEP_ALONE = 0.03
"""S2: broken by one step and not by twenty (Carlini et al. 2019: none should be; a few are luck)."""
LATE_GAIN = 0.02
"""S3: broken only by twice the steps or by a second start."""
STILL_RISING = 0.2
"""S3: part of the loss gained by the last ten of forty steps; a line that rises evenly has 0.25 there."""
CURVE_RISE = 0.03
"""S4: more answered correctly at a larger eps."""
LEFT_OVER = 0.05
"""S4, S5: what attacks without bounds may leave, whatever the number of classes: none should be, a few are luck."""
SILENT = 0.02
"""S6: fooled on the way and right again at the end (Pintor et al. 2022, "silent success")."""
OUTSIDE = 1e-6
"""S7: how far beyond eps a pixel may be, in pixel units: rounding in float32."""
FEWEST_FINITE = 3
"""O1: finite outputs of an image (all of them where there are fewer classes), which scale-free losses need."""
NO_GRADIENT = 0.01
"""G1: images with a gradient of zero; none may have NaN."""
BLACK_BOX_ALONE = 0.01
"""W1: broken by queries, noise or transfer and by no gradient (AutoAttack's flag allows none)."""
LOSS_GAP = 0.05
"""G2: broken by a scale-free loss, or towards another class, and not by cross-entropy; honest models show 1 to 4
points by another loss, and up to 10 towards the nearest classes (the zoo's TRADES: 7 of 71)."""
EXPLAINED, UNEXPLAINED_IMAGES = 0.1, 0.5
"""G3: part of a true change that gradients must account for, and the share of images where they may fail to."""
COVERED = 0.8
"""G4: part of the change along directions of one kind that gradients must account for. It is 1 for every function that
its gradient is the slope of; the bundled models show 0.94 or more."""
NOTABLE = 1e-3
"""G3, G4, X1: the smallest change that is judged, as part of the mean margin: below it is rounding."""
ROUNDING_STEPS = 8
"""And the same in steps of the number type of the model, of the size of its largest logits."""
REPEATED = 1e-4
"""R1: difference between answers to the same images, as part of the mean size of a logit (GPU sums vary by 1e-6)."""
COUPLED = 1e-3
"""B1: the same between a batch and its images one by one; other kernels sum in another order. In half precision the
limit is `ROUNDING_STEPS` steps of the number type, if that is more."""
EOT_GAIN, SELF_REPORT_GAP, FIXED_GAP = 0.02, 0.05, 0.05
"""E1, E2, E3: accuracies that differ by more, and by two standard errors."""
SURROGATE_SUCCESS = 0.9
"""T1: of the surrogate's own images (Pintor et al. 2022)."""
SERVED_DISAGREEMENT = 0.001
"""P1: of the answers; plain count, since the two should be the same function."""
PLANTED_MISSED = 0.05
"""X1: of the planted examples."""
ROUNDED_AWAY = 0.03
"""Q1: broken on the weights and not on the graph that rounds them."""

Answer = tuple["bool | None", str]
"""Whether a check raises its alarm (None: it does not apply) and its figure or, if it does not apply, the reason."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One question to a model."""

    code: str
    name: str
    meaning: str
    """What an alarm usually means, and what to do."""
    ask: Callable[[Evidence], Answer]


def lint_model(
    model: Model,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float = 8 / 255,
    sampler: Sampler | None = None,
    surrogate: Model | None = None,
    served: Served | None = None,
    seed: int = 0,
    queries: int = QUERIES,
    watch: Callable[[Finding], None] | None = None,
    output: Output | None = None,
) -> tuple[Finding, ...]:
    """Ask a model every question of `CHECKS`.

    Attacks are judged on the images that the model answers correctly. The global random states of torch, Python and
    numpy are set to `seed` for the duration, for models that draw from them, and given back.

    Args:
        model: images -> logits, deterministic; or a random model itself, of which every call is a draw, with `sampler`.
        images: float (batch, channel, height, width) in [0, 1], of 8-bit origin if replay on the 8-bit grid is to be
            checked; 50 to 200 of them.
        labels: int64 (batch,).
        eps: radius of the l_inf ball; a `Fraction` or a text such as "8/255" is taken as well.
        sampler: fresh deterministic draws of a random model. The questions about gradients are then asked of one draw,
            as a path that became known, and three more of the whole.
        surrogate: another deterministic model of the task, for transfer (W1, T1) and a direction from outside (G3).
        served: what is deployed, from float32 arrays of pixels, such as a session on the exported graph (P1).
        seed: of starts, noise and squares.
        queries: of the Square attack, for each image that no gradient broke.
        watch: called with each finding as soon as it is there.
        output: where the logits are in what the model and its draws return; a surrogate that needs it is given as
            `models.checked_model(surrogate, output)`.

    Returns:
        One finding per check, in the order of `CHECKS`.

    Raises:
        BadInput: no image is answered correctly, eps is outside (0, 1], fewer than 1 query, a model that fails, returns
            no logits or NaN, or is partly in training mode; see `images.check_batch` and `models.checked_model`.
    """
    eps, queries, seed = number(eps, "eps"), whole(queries, "queries"), whole(seed, "seed")
    if not 0 < eps <= 1:
        raise BadInput(f"need 0 < eps <= 1, got {eps}; pixels are in [0, 1], so write 8/255, not 8")
    if queries < 1:
        raise BadInput(f"the Square attack needs at least 1 query per image, got {queries}")
    findings = []
    with _own_randomness(seed, images.device):
        evidence = Evidence(
            model,
            images,
            labels,
            eps=eps,
            sampler=sampler,
            surrogate=surrogate,
            served=served,
            seed=seed,
            queries=queries,
            output=output,
        )
        for check in CHECKS:
            alarm, figure = check.ask(evidence)
            verdict = "skipped" if alarm is None else "alarm" if alarm else "ok"
            finding = Finding(code=check.code, name=check.name, verdict=verdict, figure=figure, meaning=check.meaning)
            findings.append(finding)
            if watch is not None:
                watch(finding)
    return tuple(findings)


def passed(findings: Sequence[Finding]) -> bool:
    """Whether no check raised an alarm; skipped checks say nothing."""
    return all(finding.verdict != "alarm" for finding in findings)


# --- evidence: every attack runs once, when the first check asks for it ---


@dataclass(frozen=True, kw_only=True)
class Trace:
    """One PGD attempt, step by step, on every image to the end."""

    wrong: Tensor
    """Which iterates were answered wrongly, bool (step, image)."""
    losses: Tensor
    """Cross-entropy of the iterates (step, image)."""
    first: Tensor
    """The first adversarial iterate of each image, the last iterate where there was none."""
    last: Tensor

    def broken(self, steps: int) -> Tensor:
        """Return which images were fooled by one of the first `steps` iterates (image,) bool."""
        return self.wrong[:steps].any(0)


class Evidence:
    """What is known of a model so far; the images are those it answers correctly."""

    def __init__(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        *,
        eps: float,
        sampler: Sampler | None,
        surrogate: Model | None,
        served: Served | None,
        seed: int,
        queries: int,
        output: Output | None = None,
    ) -> None:
        check_mode(model)
        check_mode(surrogate)
        images, labels, _ = check_batch(images, labels)
        self.sampler, self.served, self.output = sampler, served, output
        self.model = model
        self.seen = checked_model(model, output, randomness=self._randomness, may_move_buffers=True)  # M1 says it
        self.half: torch.dtype | None = None
        self.eps, self.seed, self.queries = eps, seed, queries
        self.type, images = images.dtype, full_precision(images)
        self.state = _state(model, images.device)  # before anything is asked of the model
        with _backward_calls() as calls, torch.enable_grad():
            raw = self.seen.answer(images[:REPEATED_IMAGES].to(self.type)).detach()
            if not calls[0]:  # it may differentiate only where nobody else does
                with torch.no_grad():
                    self.seen.answer(images[:REPEATED_IMAGES].to(self.type))
        self.calls = calls[0]
        if int(labels.max()) >= raw.shape[1]:
            raise BadInput(
                f"label {int(labels.max())} is out of range, expected 0 to {raw.shape[1] - 1}: "
                f"the model has {raw.shape[1]} classes"
            )
        self.outputs, self.half = raw, _half(raw, self.type)
        drawn = model if sampler is None else sampler()
        self.net = self._drawn(drawn)
        self.weights = self._net(checked_model(drawn.weights)) if isinstance(drawn, Rounded) else None
        self.surrogate = None if surrogate is None else self._net(checked_model(surrogate, randomness="allow"))
        with torch.no_grad():
            right = torch.cat([self.net(part).argmax(1) for part in _parts(images)]) == labels
        if not bool(right.any()):
            raise BadInput(
                f"the model answers none of the {len(images)} images correctly, so there is nothing to attack; are the "
                "labels those of the images, and is the normalisation inside the model?"
            )
        self.asked = len(images)
        self.images, self.labels = images[right], labels[right]
        self.number = len(self.images)

    @property
    def _randomness(self) -> Randomness:
        """What a draw may do at random; R1 is there to say it."""
        return "allow" if self.sampler is None else "expect"

    def _drawn(self, model: Model) -> Model:
        """Return the model, or a draw of it, as attacks need it; the whole was asked before."""
        return self._net(checked_model(model, self.output, randomness=self._randomness, operations_checked=True))

    def _net(self, seen: CheckedModel) -> Model:
        """Return a model as attacks need it: logits in full precision, in form differentiable in the images."""

        def net(images: Tensor) -> Tensor:
            ask = seen if bool(images.isfinite().all()) else seen.answer  # NaN from an attack is not the model's
            if self.calls and not torch.is_grad_enabled():
                with torch.enable_grad():  # it differentiates in its forward
                    logits = ask(images.to(self.type)).detach()
            elif self.half is not None and torch.is_grad_enabled() and images.requires_grad:
                sizes: list[Tensor] = []
                # torch has no annotations for these
                logits = ask(_Rescaled.apply(images, sizes).to(self.type))  # type: ignore[no-untyped-call]
                logits = _Scaled.apply(logits, sizes)  # type: ignore[no-untyped-call]
            else:
                logits = ask(images.to(self.type))
            if self.probabilities:
                logits = logits.clamp_min(torch.finfo(logits.dtype).tiny).log()
            if torch.is_grad_enabled() and images.requires_grad:
                # without a path from the logits to the pixels: a gradient of zero, for G1 to find, and no error
                logits = logits + (0 * images).flatten(1).sum(1, keepdim=True)
            return logits

        return unchecked(net)

    # what the figures say of the setting

    @property
    def ball(self) -> str:
        """Name the radius, in 255ths where it is a whole number of them."""
        whole = round(self.eps * 255)
        return f"eps {whole}/255" if math.isclose(self.eps * 255, whole, rel_tol=1e-6) else f"eps {self.eps:.4g}"

    @property
    def classes(self) -> int:
        """How many classes the model knows."""
        return int(self.outputs.shape[1])

    @property
    def probabilities(self) -> bool:
        """Whether the model returns probabilities; their logarithm is attacked then."""
        return are_probabilities(self.outputs)

    def generator(self, name: str) -> torch.Generator:
        """Return the source of random numbers of one attack."""
        return torch.Generator().manual_seed(zlib.crc32(f"{self.seed}/{name}".encode()))

    # attacks

    def wrong(self, adversarial: Tensor, labels: Tensor | None = None, net: Model | None = None) -> Tensor:
        """Return which images are answered wrongly (batch,) bool; an image with a NaN counts as answered."""
        labels, net = self.labels if labels is None else labels, net or self.net
        with torch.no_grad():
            answers = [net(part).argmax(1) for part in _parts(adversarial)]
        found: Tensor = torch.cat([*answers, labels[:0]]) != labels
        return found & adversarial.flatten(1).isfinite().all(1)

    def attacked(
        self,
        name: str,
        rows: Tensor,
        *,
        eps: float | None = None,
        steps: int = STEPS,
        loss: str | Loss = "cross_entropy",
    ) -> Tensor:
        """Return which of the images `rows` PGD breaks, at any of its iterates (row,) bool."""
        eps = self.eps if eps is None else eps
        budget = LinfBudget(eps=eps, steps=steps, step_size=2.5 * eps / steps)
        generator = self.generator(name)
        parts = [
            pgd(
                self.net,
                self.images[part],
                self.labels[part],
                budget,
                loss=loss,
                keep="first broken",
                generator=generator,
            )
            for part in _parts(rows)
            if len(part)
        ]
        return self.wrong(torch.cat([*parts, self.images[:0]]), self.labels[rows])

    @cached_property
    def one_step(self) -> Tensor:
        """FGSM."""
        budget = LinfBudget(eps=self.eps)
        parts = zip(_parts(self.images), _parts(self.labels), strict=True)
        return torch.cat([fgsm(self.net, *part, budget) for part in parts])

    @cached_property
    def trace(self) -> Trace:
        """PGD on cross-entropy for `LONG_STEPS`."""
        generator = self.generator("trace")
        parts = [
            self._traced(self.net, pixels, labels, generator)
            for pixels, labels in zip(_parts(self.images), _parts(self.labels), strict=True)
        ]
        return Trace(
            wrong=torch.cat([part.wrong for part in parts], 1),
            losses=torch.cat([part.losses for part in parts], 1),
            first=torch.cat([part.first for part in parts]),
            last=torch.cat([part.last for part in parts]),
        )

    def _traced(self, net: Model, pixels: Tensor, labels: Tensor, generator: torch.Generator) -> Trace:
        wrong: list[Tensor] = []
        losses: list[Tensor] = []
        first, before = pixels.clone(), pixels

        def judge(iterate: Tensor, logits: Tensor) -> None:
            nonlocal first
            found = (logits.argmax(1) != labels) & iterate.flatten(1).isfinite().all(1)
            seen = torch.stack(wrong).any(0) if wrong else torch.zeros_like(found)
            first = torch.where((found & ~seen)[:, None, None, None], iterate, first)
            wrong.append(found)
            losses.append(F.cross_entropy(logits, labels, reduction="none"))

        def watch(step: int, iterate: Tensor, logits: Tensor) -> None:
            nonlocal before
            if step:  # the logits are those of the iterate before, and the random start is none
                judge(before, logits)
            before = iterate

        budget = LinfBudget(eps=self.eps, steps=LONG_STEPS, step_size=2.5 * self.eps / STEPS)
        last = pgd(net, pixels, labels, budget, generator=generator, watch=watch)
        with torch.no_grad():
            judge(last, net(last))
        any_wrong = torch.stack(wrong).any(0)[:, None, None, None]
        first = torch.where(any_wrong, first, last)
        return Trace(wrong=torch.stack(wrong), losses=torch.stack(losses), first=first, last=last)

    @cached_property
    def second_start(self) -> Tensor:
        """Return which images a second start breaks that 20 steps from the first did not (image,) bool."""
        return self._spread("second start", ~self.trace.broken(STEPS))

    def _spread(self, name: str, mask: Tensor, loss: str | Loss = "cross_entropy") -> Tensor:
        """Attack the images of a mask; return which are broken, for all images."""
        result = torch.zeros_like(mask)
        rows = mask.nonzero()[:, 0]
        result[rows] = self.attacked(name, rows, loss=loss)
        return result

    @cached_property
    def cross_entropy(self) -> Tensor:
        """Return which images the attacks on cross-entropy break, of 40 steps and from a second start."""
        return self.trace.broken(LONG_STEPS) | self.second_start

    @cached_property
    def scale(self) -> float:
        """The mean clean margin between the two largest logits; at least a tiny number."""
        with torch.no_grad():
            top = torch.cat([self.net(part).topk(2, dim=1).values for part in _parts(self.images)])
        margins = (top[:, 0] - top[:, 1]).nan_to_num(0, posinf=1e4)
        return max(float(margins.mean()), 1e-12)

    @cached_property
    def notable(self) -> float:
        """The smallest change of a margin that is no rounding."""
        rounding = 0.0
        if self.half is not None:
            largest = float(self.outputs.nan_to_num(0, 0, 0).abs().amax(1).mean())
            rounding = ROUNDING_STEPS * torch.finfo(self.half).eps * largest
        return max(NOTABLE * self.scale, rounding)

    @cached_property
    def other_losses(self) -> dict[str, Tensor]:
        """Return, by loss, which of the images that cross-entropy left are broken (image,) bool."""
        left = ~self.cross_entropy

        def rescaled(logits: Tensor, labels: Tensor, targets: Tensor | None = None) -> Tensor:
            return F.cross_entropy(logits / self.scale, labels, reduction="none")

        losses: dict[str, str | Loss] = {"margin": "margin", f"cross-entropy of logits / {self.scale:.3g}": rescaled}
        if self.classes > 2:
            losses["DLR"] = "dlr"
        found = {name: self._spread(name, left, loss) for name, loss in losses.items()}
        if self.classes > 2:
            found[f"margin to each of {min(NEAREST, self.classes - 1)} classes"] = self._towards_each(left)
        return found

    def _towards_each(self, mask: Tensor) -> Tensor:
        """Attack the images of a mask towards each of the nearest classes in turn; return which are broken."""
        result, rows = torch.zeros_like(mask), mask.nonzero()[:, 0]
        budget, generator = LinfBudget(eps=self.eps, steps=STEPS), self.generator("towards each")
        for part in _parts(rows):
            if len(part):
                images, labels = self.images[part], self.labels[part]
                found = apgd_targeted(
                    self.net, images, labels, budget, loss="margin", num_targets=NEAREST, generator=generator
                )
                result[part] = self.wrong(found, labels)
        return result

    @cached_property
    def white_box(self) -> Tensor:
        """Return which images any gradient attack breaks at eps (image,) bool."""
        return torch.stack([self.cross_entropy, self.wrong(self.one_step), *self.other_losses.values()]).any(0)

    @cached_property
    def squares(self) -> Tensor:
        """The Square attack's answer to the images that no gradient attack breaks; the others unchanged."""
        rows = (~self.white_box).nonzero()[:, 0]
        result, generator = self.images.clone(), self.generator("square")
        for part in _parts(rows):
            if len(part):
                result[part] = square(
                    self.net,
                    self.images[part],
                    self.labels[part],
                    LinfBudget(eps=self.eps),
                    queries=self.queries,
                    generator=generator,
                )
        return result

    def corner(self, number: int) -> Tensor:
        """Return random signs, shaped like the images; an even and the odd number after it are opposites."""
        shape = self.images.shape
        signs = torch.randint(0, 2, shape, generator=self.generator(f"corner {number // 2}")) * 2 - 1
        return signs.to(self.images) * (1 - 2 * (number % 2))

    def at_corner(self, number: int, images: Tensor | None = None) -> Tensor:
        """Return the images moved to a random corner of their balls, within [0, 1]."""
        images = self.images if images is None else images
        return (images + self.eps * self.corner(number)[: len(images)]).clamp(0, 1)

    @cached_property
    def corner_logits(self) -> Tensor:
        """The logits at all random corners (corner, image, class)."""
        with torch.no_grad():
            return torch.stack(
                [torch.cat([self.net(part) for part in _parts(self.at_corner(number))]) for number in range(2 * NOISES)]
            )

    @cached_property
    def on_surrogate(self) -> tuple[Tensor, Tensor, Tensor]:
        """PGD on the surrogate: the images found, and which images the surrogate knew and which it lost."""
        assert self.surrogate is not None
        budget = LinfBudget(eps=self.eps, steps=STEPS, step_size=2.5 * self.eps / STEPS)
        generator = self.generator("surrogate")
        known = ~self.wrong(self.images, net=self.surrogate)
        parts = zip(_parts(self.images), _parts(self.labels), strict=True)
        adversarial = torch.cat([pgd(self.surrogate, *part, budget, generator=generator) for part in parts])
        return adversarial, known, self.wrong(adversarial, net=self.surrogate) & known

    @cached_property
    def on_weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """PGD on the weights, two starts: which images they keep, which the graph that rounds them keeps; and after it.

        The last are images as the first start leaves them. An image counts as kept if every iterate is answered right.
        """
        assert self.weights is not None
        budget = LinfBudget(eps=self.eps, steps=LONG_STEPS, step_size=2.5 * self.eps / STEPS, restarts=2)
        generator = self.generator("weights")
        parts = [
            shown(self.weights, self.net, pixels, labels, budget, generator)
            for pixels, labels in zip(_parts(self.images), _parts(self.labels), strict=True)
        ]
        theirs, ours, last = (torch.cat(part) for part in zip(*parts, strict=True))
        return theirs, ours, last

    @cached_property
    def curve(self) -> list[tuple[float, float]]:
        """The accuracy after PGD-10 at growing eps, that of the trace's first 10 steps among them."""
        everything = torch.arange(self.number, device=self.images.device)
        points = {self.eps: int((~self.trace.broken(CURVE_STEPS)).sum())}
        for eps in (self.eps / 2, 2 * self.eps, 4 * self.eps, 0.5):
            if eps <= 0.5 and eps not in points:
                broken = self.attacked(f"curve {eps}", everything, eps=eps, steps=CURVE_STEPS)
                points[eps] = int((~broken).sum())
        return [(eps, points[eps] / self.number) for eps in sorted(points)]

    @cached_property
    def repeated_difference(self) -> float:
        """The largest difference between answers to the same images, as part of the mean size of a logit."""
        images = self.images[:REPEATED_IMAGES]
        answers = [self._plain(images) for _ in range(REPEATS)]
        return max(_relative(answers[0], other) for other in answers[1:])

    def _plain(self, images: Tensor) -> Tensor:
        with torch.set_grad_enabled(bool(self.calls)):
            return self.seen.answer(images.to(self.type)).detach()

    # random models

    @cached_property
    def averaged(self) -> dict[int, tuple[Tensor, Tensor]]:
        """EOT with 1 and 16 draws: each image's accuracy on fresh draws, and whether it survived the attack's own."""
        return {draws: self._eot(draws) for draws in (1, EOT_DRAWS)}

    def _eot(self, draws: int) -> tuple[Tensor, Tensor]:
        assert self.sampler is not None
        sampler = self.sampler
        images, labels = self.images[:EOT_IMAGES], self.labels[:EOT_IMAGES]
        fooled = torch.zeros_like(labels, dtype=torch.bool)

        def recorded() -> Model:
            net = self._drawn(sampler())

            def answer(pixels: Tensor) -> Tensor:
                logits = net(pixels)
                fooled.logical_or_(logits.detach().argmax(1) != labels)
                return logits

            return answer

        budget = LinfBudget(eps=self.eps, steps=EOT_STEPS, step_size=2.5 * self.eps / EOT_STEPS)
        found = eot_pgd(recorded, images, labels, budget, draws=draws, generator=self.generator(f"eot {draws}"))
        reported = (~fooled).double()
        fresh = [self.wrong(found, labels, self._drawn(sampler())) for _ in range(FRESH_DRAWS)]
        return 1 - torch.stack(fresh).double().mean(0), reported


# --- the checks ---


def _s1(evidence: Evidence) -> Answer:
    still = pgd(evidence.net, evidence.images, evidence.labels, LinfBudget(eps=0.0, steps=1, random_start=False))
    changed = int(evidence.wrong(still).sum())
    moved = int((still != evidence.images).flatten(1).any(1).sum())
    return bool(changed or moved), (
        f"{changed} of {evidence.number} answers changed and {moved} images moved at eps 0, 1 step "
        f"({evidence.number} of the {evidence.asked} images given are answered correctly and judged)"
    )


def _s2(evidence: Evidence) -> Answer:
    one, many = evidence.wrong(evidence.one_step), evidence.trace.broken(STEPS)
    alone = _count(one & ~many)
    return _exceeds(alone, evidence.number, ONE_STEP_ALONE), (
        f"{alone} of {evidence.number} broken by FGSM alone (FGSM breaks {_count(one)}, PGD-{STEPS} {_count(many)}; "
        f"{evidence.ball})"
    )


def _s3(evidence: Evidence) -> Answer:
    usual = evidence.trace.broken(STEPS)
    steps = _count(evidence.trace.broken(LONG_STEPS) & ~usual)
    start = _count(evidence.second_start)
    late = evidence.trace.losses[:, ~evidence.cross_entropy].mean(1)
    rising = 0.0
    if late.isfinite().all() and float(late[-1]) > float(late.min()):
        rising = float((late[-1] - late[-11]) / (late[-1] - late.min()))
    few = not _exceeds(_count(~evidence.cross_entropy), evidence.number, 0.05)
    alarm = (
        _exceeds(steps, evidence.number, LATE_GAIN)
        or _exceeds(start, evidence.number, LATE_GAIN)
        or (rising > STILL_RISING and not few)
    )
    return alarm, (
        f"PGD-{STEPS} breaks {_count(usual)} of {evidence.number}, {LONG_STEPS} steps {steps} more, a second start "
        f"{start} more; the last 10 steps gained {rising:.0%} of the loss of those left ({evidence.ball})"
    )


def _s4(evidence: Evidence) -> Answer:
    lefts = [accuracy for _, accuracy in evidence.curve]
    stays = _exceeds(round(lefts[-1] * evidence.number), evidence.number, LEFT_OVER)
    rise = max((after - before for before, after in pairwise(lefts)), default=0.0)
    rises = _exceeds(round(max(rise, 0.0) * evidence.number), evidence.number, CURVE_RISE)
    shown = ", ".join(f"{eps:.3g}: {accuracy:.2f}" for eps, accuracy in evidence.curve)
    return rises or stays, (
        f"accuracy by eps {shown} (PGD-{CURVE_STEPS}, n = {evidence.number}; the last may be {LEFT_OVER} within its "
        "interval)"
    )


def _s5(evidence: Evidence) -> Answer:
    everything = torch.arange(evidence.number, device=evidence.images.device)
    left = evidence.number - _count(evidence.attacked("unbounded", everything, eps=1.0))
    return _exceeds(left, evidence.number, LEFT_OVER), (
        f"PGD-{STEPS} at eps 1 leaves {left} of {evidence.number} (it may leave {LEFT_OVER:.0%} within the interval)"
    )


def _s6(evidence: Evidence) -> Answer:
    found = evidence.trace.broken(LONG_STEPS)
    silent = _count(found & ~evidence.trace.wrong[-1])
    lost = _count(found & ~evidence.wrong(evidence.trace.first))
    alarm = _exceeds(silent, evidence.number, SILENT) or _exceeds(lost, evidence.number, SILENT)
    return alarm, (
        f"{silent} of {evidence.number} images adversarial on the way but not at the end of PGD-{LONG_STEPS}, "
        f"{lost} not adversarial when asked again ({evidence.ball})"
    )


def _s7(evidence: Evidence) -> Answer:
    budget = LinfBudget(eps=evidence.eps)
    images = evidence.images
    produced = [evidence.one_step, evidence.trace.first, evidence.trace.last, evidence.squares]
    unusable = _count(torch.stack([~found.flatten(1).isfinite().all(1) for found in produced]).any(0))
    finite = [found.nan_to_num() for found in produced]
    furthest = max(float(budget.distance(found, images).max()) for found in finite)
    low, high = min(float(found.min()) for found in finite), max(float(found.max()) for found in finite)
    on_grid = float((images * 255 - (images * 255).round()).abs().max()) < 1e-3
    replay = "images not of 8-bit origin, no replay"
    if on_grid:
        broken = evidence.trace.broken(LONG_STEPS)
        rounded = to_grid(evidence.trace.first.nan_to_num(), images, evidence.eps)
        furthest = max(furthest, float(budget.distance(rounded, images).max()))
        replay = f"{_count(broken & evidence.wrong(rounded))} of {_count(broken)} still adversarial in 8 bits"
    alarm = bool(unusable) or furthest > evidence.eps + OUTSIDE or low < 0 or high > 1
    return alarm, (
        f"largest change {furthest:.6f} for {evidence.ball}, pixels in [{low:g}, {high:g}], {unusable} of "
        f"{evidence.number} images with NaN; {replay}"
    )


def _w1(evidence: Evidence) -> Answer:
    left = ~evidence.white_box
    found = {
        f"Square ({evidence.queries} queries)": evidence.wrong(evidence.squares) & left,
        f"random noise ({2 * NOISES} draws)": (evidence.corner_logits.argmax(2) != evidence.labels).any(0) & left,
    }
    if evidence.surrogate is not None:
        found[f"transfer (PGD-{STEPS})"] = evidence.wrong(evidence.on_surrogate[0]) & left
    alone = _count(torch.stack(list(found.values())).any(0))
    each = ", ".join(f"{name} {_count(broken)}" for name, broken in found.items())
    return _exceeds(alone, evidence.number, BLACK_BOX_ALONE), (
        f"gradients break {_count(~left)} of {evidence.number}; {alone} more broken without them: {each} "
        f"({evidence.ball})"
    )


def _g1(evidence: Evidence) -> Answer:
    shown, alarm = [], False
    for loss in ("cross_entropy", "margin"):
        rise = ascent(evidence.net, loss)
        pairs = zip(_parts(evidence.images), _parts(evidence.labels), strict=True)
        gradient = torch.cat([rise(*pair, None)[0] for pair in pairs]).flatten(1)
        zero, bad = _count((gradient == 0).all(1)), _count(~gradient.isfinite().all(1))
        alarm = alarm or bad > 0 or _exceeds(zero, len(gradient), NO_GRADIENT)
        shown.append(f"{loss.replace('_', '-')}: {zero} zero, {bad} with NaN")
    return alarm, f"gradients of {evidence.number} images, {'; '.join(shown)}"


def _g2(evidence: Evidence) -> Answer:
    left = _count(~evidence.cross_entropy)
    most = max(_count(broken) for broken in evidence.other_losses.values())
    each = ", ".join(f"{name} {_count(broken)}" for name, broken in evidence.other_losses.items())
    return _exceeds(most, evidence.number, LOSS_GAP), (
        f"cross-entropy leaves {left} of {evidence.number}; of these {STEPS} steps break by {each} ({evidence.ball})"
    )


def _g3(evidence: Evidence) -> Answer:
    """The change of the margin along a segment is the integral of its gradient, for every honest function.

    f(b) - f(a) = integral over t from 0 to 1 of <grad f(a + t (b - a)), b - a>

    The segment's direction is found without the model's gradients: by the surrogate's, or by the differences between
    random corners (SPSA). The own gradient would be blind where it is zero, which is where it matters; a difference
    quotient against a single gradient would alarm wherever the function is merely curved.
    """
    images, labels = evidence.images[:SLOPE_IMAGES], evidence.labels[:SLOPE_IMAGES]
    number = len(images)
    directions = {"random corners": _corner_direction(evidence, number)}
    if evidence.surrogate is not None:
        gradient, _, _ = ascent(evidence.surrogate, "margin")(images, labels, None)
        directions["surrogate"] = gradient.nan_to_num().sign()

    def margins(pixels: Tensor) -> Tensor:
        with torch.no_grad():
            return margin(evidence.net(pixels), labels)

    change = torch.zeros(number, device=images.device, dtype=images.dtype)
    low, high = images, images
    for direction in directions.values():
        below = (images - evidence.eps * direction).clamp(0, 1)
        above = (images + evidence.eps * direction).clamp(0, 1)
        difference = (margins(above) - margins(below)).nan_to_num().to(change)
        larger = difference.abs() > change.abs()
        change = torch.where(larger, difference, change)
        low = torch.where(larger[:, None, None, None], below, low)
        high = torch.where(larger[:, None, None, None], above, high)
    slope = _slope(evidence, low, high, labels, SLOPE_POINTS)
    judged = change.abs() > evidence.notable
    if not bool(judged.any()):
        return None, f"the margin of none of {number} images changes along {' or '.join(directions)} ({evidence.ball})"
    explained = slope[judged] / change[judged]
    poor, total = _count(explained < EXPLAINED), len(explained)
    return _exceeds(poor, total, UNEXPLAINED_IMAGES), (
        f"gradients account for less than {EXPLAINED:.0%} of the change along {' or '.join(directions)} on {poor} of "
        f"{total} images, the median is {float(explained.median()):.0%} ({SLOPE_POINTS} gradients each; "
        f"{evidence.ball})"
    )


def _corner_direction(evidence: Evidence, number: int) -> Tensor:
    """Return the signs of the gradient of the margin as estimated from random corners alone (SPSA)."""
    labels = evidence.labels[:number]
    values = torch.stack([margin(logits[:number], labels) for logits in evidence.corner_logits])
    total = torch.zeros_like(evidence.images[:number])
    for pair in range(NOISES):
        weight = (values[2 * pair] - values[2 * pair + 1]).nan_to_num().to(total)
        total += weight[:, None, None, None] * evidence.corner(2 * pair)[:number]
    return total.sign()


def _g4(evidence: Evidence) -> Answer:
    """The same for each kind of direction, so that none without a gradient hides behind the others.

    G3's direction is a mixture, of which the gradient may account for enough while all its fine detail, or a channel,
    has none. Each image's change c along its direction of a kind, and the integral s of its gradient along it, are
    equal for an honest function; over images, sum(s c) / sum(c c) is the part that gradients account for.
    """
    number = min(COVER_IMAGES, evidence.number)
    if evidence.weights is not None:
        return None, "the gradients of an int8 graph are those of its weights, which leave rounding out: see Q1 and Q2"
    if number < FEWEST_COVER_IMAGES:
        return None, f"{number} images are too few, needs {FEWEST_COVER_IMAGES}"
    if evidence.sampler is None and not evidence.repeated_difference <= REPEATED:
        return None, "answers differ from call to call anyway, see R1"
    images, labels = evidence.images[:number], evidence.labels[:number]
    parts: dict[str, tuple[float, float]] = {}
    for name, direction in _kinds_of_direction(images.shape, evidence.generator("kinds of direction")):
        signs = direction.to(images)
        low, high = ((images + way * evidence.eps * signs).clamp(0, 1) for way in (-1, 1))
        with torch.no_grad():
            change = (margin(evidence.net(high), labels) - margin(evidence.net(low), labels)).nan_to_num().double()
        if float(change.square().mean().sqrt()) <= evidence.notable:
            continue
        part, error = _accounted(evidence, low, high, labels, change, COVER_POINTS)
        if part < 1 - (1 - COVERED) / 2:  # few gradients are a coarse integral
            part, error = _accounted(evidence, low, high, labels, change, CERTAIN_POINTS)
        parts[name] = part, error
    if not parts:
        return None, f"the margin of {number} images changes along no kind of direction ({evidence.ball})"
    least = min(parts, key=lambda name: sum(parts[name]))
    part, error = parts[least]
    lacking = sum(part + error < COVERED for part, error in parts.values())
    return lacking > 0, (
        f"gradients account for {part:.0%} ± {error:.0%} of the change along {least}, and for less than {COVERED:.0%} "
        f"along {lacking} of {len(parts)} kinds of direction (n = {number}; {evidence.ball})"
    )


def _accounted(
    evidence: Evidence, low: Tensor, high: Tensor, labels: Tensor, change: Tensor, points: int
) -> tuple[float, float]:
    """Return the part of the change from `low` to `high` that gradients account for, and two standard errors of it."""
    slope = _slope(evidence, low, high, labels, points).double()
    size = change.square().sum()
    part = (slope * change).sum() / size
    error = ((slope - part * change) * change).square().sum().sqrt() / size
    return float(part), 2 * float(error)


def _slope(evidence: Evidence, low: Tensor, high: Tensor, labels: Tensor, points: int) -> Tensor:
    """Return the integral of the margin's gradient from `low` to `high` (image,), by the midpoint rule."""
    slope, rise = torch.zeros(len(low), device=low.device, dtype=low.dtype), ascent(evidence.net, "margin")
    for point in range(points):
        gradient, _, _ = rise(low + (point + 0.5) / points * (high - low), labels, None)
        slope += (gradient * (high - low)).flatten(1).sum(1).nan_to_num() / points
    return slope


def _kinds_of_direction(shape: torch.Size, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    """Yield names and signs (image, channel, height, width) of random directions, from fine to coarse, and by channel.

    A pattern of a size is a Haar wavelet: it has no mean over squares twice that size, and is constant in squares of
    that size. The patterns, and the squares behind the last, are a basis of all images.
    """
    channels, side = shape[1], min(shape[2:])
    size = 1
    while 8 * size <= side:
        yield f"patterns of {size} pixel{'s' if size > 1 else ''}", _patterns(shape, size, generator)
        size *= 2
    if size > 1 or channels == 1:
        yield f"squares of {size} pixel{'s' if size > 1 else ''}", _squares(shape, size, generator)
    yield "whole channels", _squares(shape, max(shape[2:]), generator)
    groups = min(channels, MOST_GROUPS)
    for group in range(groups if channels > 1 else 0):
        signs = torch.zeros(shape)
        signs[:, group::groups] = _squares(signs[:, group::groups].shape, 1, generator)
        yield f"channel {group}" if groups == channels else f"every {groups}th channel from {group}", signs


def _squares(shape: torch.Size, size: int, generator: torch.Generator) -> Tensor:
    images, channels, height, width = shape
    signs = torch.randint(0, 2, (images, channels, -(-height // size), -(-width // size)), generator=generator) * 2 - 1
    return F.interpolate(signs.float(), scale_factor=size)[..., :height, :width]


def _patterns(shape: torch.Size, size: int, generator: torch.Generator) -> Tensor:
    images, channels, height, width = shape
    rows, columns = -(-height // (2 * size)), -(-width // (2 * size))
    wavelets = torch.tensor([[[1, 1], [-1, -1]], [[1, -1], [1, -1]], [[1, -1], [-1, 1]]])
    chosen = torch.randint(0, 3, (images, channels, rows, columns), generator=generator)
    signs = torch.randint(0, 2, (images, channels, rows, columns, 1, 1), generator=generator) * 2 - 1
    tiles = (wavelets[chosen] * signs).transpose(3, 4).reshape(images, channels, 2 * rows, 2 * columns)
    return F.interpolate(tiles.float(), scale_factor=size)[..., :height, :width]


def _o1(evidence: Evidence) -> Answer:
    outputs = evidence.outputs
    # -inf is the logit of a class that is masked, an honest one as long as others are left to be told apart
    left = outputs.isfinite().sum(1) >= min(FEWEST_FINITE, evidence.classes)
    infinite = _count(outputs.isnan().any(1) | (outputs == torch.inf).any(1) | ~left)
    figure = (
        f"rows of {len(outputs)} outputs in [{float(outputs.min()):.3g}, {float(outputs.max()):.3g}], {infinite} with "
        f"NaN, +inf or fewer than {FEWEST_FINITE} finite values"
    )
    if evidence.probabilities:
        figure += "; non-negative and summing to 1: probabilities (the other checks attack their logarithm)"
    return evidence.probabilities or infinite > 0, figure


def _r1(evidence: Evidence) -> Answer:
    number = min(REPEATED_IMAGES, evidence.number)
    difference = evidence.repeated_difference
    differs = not difference <= REPEATED
    figure = f"{REPEATS} answers to the same {number} images differ by at most {difference:.2g} of a mean logit"
    if evidence.sampler is not None:
        return False, figure + ("; random, and given with a sampler: see E1 to E3" if differs else "; not random")
    return differs, figure


def _e1(evidence: Evidence) -> Answer:
    if evidence.sampler is None:
        return None, "no sampler given: the model is deterministic, or R1 alarms"
    one, many = evidence.averaged[1][0], evidence.averaged[EOT_DRAWS][0]
    return _more(one - many, EOT_GAIN), (
        f"accuracy on {FRESH_DRAWS} fresh draws {_mean(one):.3f} after attacks with 1 draw per step, {_mean(many):.3f} "
        f"with {EOT_DRAWS} ({_spent(evidence, one)})"
    )


def _e2(evidence: Evidence) -> Answer:
    if evidence.sampler is None:
        return None, "no sampler given: the model is deterministic, or R1 alarms"
    fresh, reported = evidence.averaged[1]
    gap = fresh - reported
    return _more(gap, SELF_REPORT_GAP) or _more(-gap, SELF_REPORT_GAP), (
        f"an attack that stops at the first draw it fools reports {_mean(reported):.3f}, {FRESH_DRAWS} fresh draws of "
        f"what it returns {_mean(fresh):.3f} ({_spent(evidence, fresh)})"
    )


def _e3(evidence: Evidence) -> Answer:
    if evidence.sampler is None:
        return None, "no sampler given: the model is deterministic, or R1 alarms"
    fixed = (~evidence.trace.broken(STEPS))[:EOT_IMAGES].double()
    fresh = evidence.averaged[EOT_DRAWS][0]
    return _more(fixed - fresh, FIXED_GAP), (
        f"PGD-{STEPS} on one known draw leaves {_mean(fixed):.3f}, EOT over unknown draws {_mean(fresh):.3f} "
        f"({_spent(evidence, fresh)})"
    )


def _spent(evidence: Evidence, values: Tensor) -> str:
    return f"EOT of {EOT_STEPS} steps, n = {len(values)}, {evidence.ball}"


def _b1(evidence: Evidence) -> Answer:
    if evidence.sampler is None and not evidence.repeated_difference <= REPEATED:
        return None, "answers differ from call to call anyway, see R1"
    images = evidence.images[:REPEATED_IMAGES]
    if evidence.asked < 2:
        return None, "a single image has no batch to depend on"
    with torch.no_grad():
        together = evidence.net(evidence.images[:BATCH])[: len(images)]
        alone = torch.cat([evidence.net(image[None]) for image in images])
        among = evidence.net(torch.cat([images, 1 - images, images.flip(3)]))[: len(images)]
    difference = max(_relative(together, alone), _relative(together, among))
    changed = _count((together.argmax(1) != alone.argmax(1)) | (together.argmax(1) != among.argmax(1)))
    limit = COUPLED if evidence.half is None else max(COUPLED, ROUNDING_STEPS * torch.finfo(evidence.half).eps)
    return not difference <= limit, (
        f"logits of {len(images)} images alone and among others differ by {difference:.2g} of a mean logit, {changed} "
        "answers change"
    )


def _m1(evidence: Evidence) -> Answer:
    before, after = evidence.state, _state(evidence.model, evidence.images.device)
    changed = [name for name in before.tensors | after.tensors if not _same(name, before, after)]
    parts = [
        ("weights and buffers", changed),
        ("gradients", [] if before.gradients == after.gradients else ["left on parameters"]),
        ("modes", [name for name in after.modes if after.modes[name] != before.modes.get(name)]),
    ]
    if evidence.sampler is None:  # a random model may draw from them
        parts.append(("global random states", [key for key in after.random if after.random[key] != before.random[key]]))
    found = [f"{kind}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}" for kind, names in parts if names]
    looked = (
        f"{len(before.tensors)} tensors, {len(before.modes)} modules" if before.modes else "a function, random states"
    )
    return bool(found), (f"changed by the attacks: {'; '.join(found)}" if found else "nothing changed") + f" ({looked})"


def _d1(evidence: Evidence) -> Answer:
    return evidence.calls > 0, f"{evidence.calls} backward passes in one forward of {len(evidence.outputs)} images"


def _t1(evidence: Evidence) -> Answer:
    if evidence.surrogate is None:
        return None, "no surrogate given"
    _, known, lost = evidence.on_surrogate
    if not bool(known.any()):
        return True, f"the surrogate answers none of {evidence.number} images correctly"
    return _exceeds(_count(known & ~lost), _count(known), 1 - SURROGATE_SUCCESS), (
        f"PGD-{STEPS} on the surrogate fools it on {_count(lost)} of its {_count(known)} images ({evidence.ball})"
    )


def _p1(evidence: Evidence) -> Answer:
    if evidence.served is None:
        return None, "nothing served was given"
    if evidence.sampler is not None or not evidence.repeated_difference <= REPEATED:
        return None, "a random model has no answer to be compared with; compare fixed paths"
    counted, disagreeing, furthest = 0, 0, 0.0
    for pixels in (evidence.images, evidence.one_step, evidence.trace.first):
        pixels = pixels.nan_to_num().float()
        for part in _parts(pixels):
            with torch.no_grad():
                attacked = evidence.net(part)
            served = torch.as_tensor(evidence.served(part.cpu().numpy())).to(attacked)
            if served.shape != attacked.shape:
                raise BadInput(
                    f"served returned shape {tuple(served.shape)} for {len(part)} images, expected "
                    f"{tuple(attacked.shape)}, like the model; pass one output of a session, not all"
                )
            probabilities = served if are_probabilities(served) else served.softmax(1)
            furthest = max(furthest, float((probabilities - attacked.softmax(1)).abs().max()))
            top = attacked.topk(2, dim=1).values
            clear = top[:, 0] - top[:, 1] > evidence.notable  # a tie may fall either way
            disagreeing += _count((served.argmax(1) != attacked.argmax(1)) & clear)
            counted += len(part)
    return disagreeing > SERVED_DISAGREEMENT * counted, (
        f"{disagreeing} of {counted} answers to clean and adversarial images differ (ties aside), probabilities by at "
        f"most {furthest:.2g} ({evidence.ball})"
    )


def _x1(evidence: Evidence) -> Answer:
    """Plant a class where only one random corner of the ball is known to lie, and let PGD look for it.

    After Zimmermann et al. 2022, with logits in the place of features: the new class begins half-way, along the change
    of the logits at that corner, between the corner and the furthest of random points in the ball. Guessing will not
    find it, following the model's gradient will.
    """
    images, labels = evidence.images[:PLANTED_IMAGES], evidence.labels[:PLANTED_IMAGES]
    budget = LinfBudget(eps=evidence.eps, steps=STEPS, step_size=2.5 * evidence.eps / STEPS)
    generator = evidence.generator("planted")
    with torch.no_grad():
        base = evidence.net(images)
        moves = evidence.corner_logits[:, : len(images)] - base
        best = moves.norm(dim=2).nan_to_num().argmax(0)
        towards = moves[best, torch.arange(len(images), device=best.device)]
        length = towards.square().sum(1)

        def progress(logits: Tensor) -> Tensor:
            return ((logits - base) * towards).sum(1) / length  # 1 at the corner, 0 at the image

        inner = torch.stack(
            [progress(evidence.net(budget.start(images, generator))) for _ in range(INNER_POINTS)]
        ).amax(0)
    border = (1 + inner.clamp_min(0)) / 2
    planted = (length.sqrt() > evidence.notable) & (inner < 0.9)
    if not bool(planted.any()):
        return None, f"in none of {len(images)} balls do the logits tell a corner from inner points ({evidence.ball})"
    found = torch.zeros_like(planted)

    def binary(pixels: Tensor) -> Tensor:
        beyond = (progress(evidence.net(pixels)) - border) / (1 - border)
        found.logical_or_(beyond.detach() > 0)
        return torch.stack([torch.zeros_like(beyond), beyond], 1)

    pgd(unchecked(binary), images, torch.zeros_like(labels), budget, generator=generator)
    missed, total = _count(planted & ~found), _count(planted)
    return _exceeds(missed, total, PLANTED_MISSED), (
        f"PGD-{STEPS} misses {missed} of {total} planted adversarial examples ({INNER_POINTS} inner points; "
        f"{evidence.ball})"
    )


def _q1(evidence: Evidence) -> Answer:
    if evidence.weights is None:
        return None, "the model is no int8 graph"
    theirs, ours, last = evidence.on_weights
    alone = _count(~theirs & ours)
    with torch.no_grad():
        same = torch.cat([evidence.net(part).argmax(1) == evidence.weights(part).argmax(1) for part in _parts(last)])
    return _exceeds(alone, evidence.number, ROUNDED_AWAY), (
        f"PGD-{LONG_STEPS} on the weights, 2 starts, breaks {_count(~theirs)} of {evidence.number} on the weights and "
        f"{_count(~ours)} on the graph, {alone} on the weights alone; both say the same of {_count(same)} "
        f"({evidence.ball})"
    )


def _q2(evidence: Evidence) -> Answer:
    """Ask the graph about the images that no attack on the weights broke on it; other gradients do not count here."""
    if evidence.weights is None:
        return None, "the model is no int8 graph"
    _, ours, _ = evidence.on_weights
    rows = ours.nonzero()[:, 0]
    generator = evidence.generator("square on the graph")
    broken = torch.zeros_like(ours)
    for part in _parts(rows):
        if len(part):
            budget = LinfBudget(eps=evidence.eps)
            pixels, labels = evidence.images[part], evidence.labels[part]
            found = square(evidence.net, pixels, labels, budget, queries=evidence.queries, generator=generator)
            broken[part] = evidence.wrong(found, labels)
    noise = (evidence.corner_logits.argmax(2) != evidence.labels).any(0) & ours
    alone = _count(broken | noise)
    return _exceeds(alone, evidence.number, BLACK_BOX_ALONE), (
        f"what breaks the weights breaks {_count(~ours)} of {evidence.number} on the graph; {alone} more broken by "
        f"asking it: Square ({evidence.queries} queries) {_count(broken)}, random noise ({2 * NOISES} draws) "
        f"{_count(noise)} ({evidence.ball})"
    )


CHECKS: tuple[Check, ...] = (
    Check(
        code="S1",
        name="eps 0 equals clean accuracy",
        meaning="The attack or its evaluation is broken: without a budget nothing may change; compare the "
        "preprocessing of the two.",
        ask=_s1,
    ),
    Check(
        code="S2",
        name="many steps beat one step",
        meaning="The loss surface is rugged or the steps are wrong, so gradients lead astray; try other step sizes, "
        "smoothed gradients and attacks without gradients.",
        ask=_s2,
    ),
    Check(
        code="S3",
        name="more steps and starts change nothing",
        meaning="The attack had not converged, so the accuracy it reports is too high; spend more steps and restarts "
        "until nothing changes.",
        ask=_s3,
    ),
    Check(
        code="S4",
        name="accuracy falls with eps to chance",
        meaning="A larger ball holds the smaller one, and at 0.5 every ball holds plain grey: an attack that does not "
        "gain from room is failing; look at G1 to G4.",
        ask=_s4,
    ),
    Check(
        code="S5",
        name="an unbounded attack succeeds",
        meaning="With every image allowed no model can be right, so the attack does not see the model's gradients; "
        "look at G1 to G4 and use attacks without gradients.",
        ask=_s5,
    ),
    Check(
        code="S6",
        name="what was adversarial stays so",
        meaning="The attack found adversarial images and lost them again; keep the first broken or the best iterate, "
        "and see R1 and B1 if they are not adversarial when asked again.",
        ask=_s6,
    ),
    Check(
        code="S7",
        name="images stay in the ball and in range",
        meaning="Images outside the ball, outside [0, 1] or with NaN are no adversarial examples, and numbers from "
        "them count for nothing; see G1 for NaN.",
        ask=_s7,
    ),
    Check(
        code="W1",
        name="gradients beat guessing",
        meaning="An attack that knows less did better, the classic sign of masked gradients; report the black-box "
        "number and attack through the masking (BPDA).",
        ask=_w1,
    ),
    Check(
        code="G1",
        name="gradients are neither zero nor NaN",
        meaning="The model blocks its gradient: rounding, detaching, saturation (if cross-entropy alone is zero); "
        "replace the blocking part by the identity on the way back, or attack logits before it.",
        ask=_g1,
    ),
    Check(
        code="G2",
        name="losses agree at every scale of logits",
        meaning="Logits so large, or so shaped, that cross-entropy has no useful gradient, or one that leads to a "
        "class that cannot be reached; report the margin or DLR loss, towards each class in turn (AutoAttack).",
        ask=_g2,
    ),
    Check(
        code="G3",
        name="gradients explain finite differences",
        meaning="The gradient is not the slope of the model: a step function or a false backward pass lies in "
        "between; use BPDA or attacks without gradients.",
        ask=_g3,
    ),
    Check(
        code="G4",
        name="gradients cover every kind of direction",
        meaning="The answer depends on something that gradients do not see, such as fine detail, one channel or a "
        "detached branch: a step function lies in the way of a part of the image; use BPDA there, or attacks without "
        "gradients.",
        ask=_g4,
    ),
    Check(
        code="O1",
        name="outputs are logits",
        meaning="A softmax in the way flattens gradients, and infinities end them; attack what stands before it.",
        ask=_o1,
    ),
    Check(
        code="R1",
        name="the same images get the same answer",
        meaning="Randomness is mistaken for robustness: a deterministic attack on a random model fails by chance; "
        "give a sampler and report attacks that average over draws.",
        ask=_r1,
    ),
    Check(
        code="E1",
        name="averaging over draws changes nothing",
        meaning="Attacks with one draw per step are too weak for this random model; report EOT with draws until flat.",
        ask=_e1,
    ),
    Check(
        code="E2",
        name="self-reported equals fresh-draw accuracy",
        meaning="An attack that judges itself by its own draws reports luck; judge what it returns on fresh draws.",
        ask=_e2,
    ),
    Check(
        code="E3",
        name="a known draw is attacked like a plain network",
        meaning="A path that is known should be the easiest prey: if it is not, its own gradients are masked, and "
        "randomness only covers that; lint one fixed draw as a plain network.",
        ask=_e3,
    ),
    Check(
        code="B1",
        name="an answer does not depend on the batch",
        meaning="Batch statistics or another coupling at test time: the attack sees another function than a user who "
        "sends one image; freeze the statistics.",
        ask=_b1,
    ),
    Check(
        code="M1",
        name="attacks leave the model as it was",
        meaning="A forward changes weights, buffers, modes, gradients or global random states, so that the model "
        "measured is not the one that was given; make the forward free of side effects.",
        ask=_m1,
    ),
    Check(
        code="D1",
        name="no gradients inside the forward",
        meaning="The model optimises at test time, and plain gradients do not see through that; attack through the "
        "optimisation, and report the static model beside it (Croce et al. 2022).",
        ask=_d1,
    ),
    Check(
        code="T1",
        name="the surrogate fools itself",
        meaning="Examples that do not even fool the surrogate say nothing about transfer; take a plain surrogate or a "
        "stronger attack on it.",
        ask=_t1,
    ),
    Check(
        code="P1",
        name="what is served is what was attacked",
        meaning="The deployed graph is another function than the attacked one, so its robustness was not measured; "
        "export again and compare the preprocessing.",
        ask=_p1,
    ),
    Check(
        code="X1",
        name="a planted adversarial example is found",
        meaning="The attack misses examples that are known to exist, so that it finds none proves nothing; strengthen "
        "it until it finds these.",
        ask=_x1,
    ),
    Check(
        code="Q1",
        name="what fools the weights fools their rounding",
        meaning="Rounding moved the border and took nothing from the attacker, who has only to aim at the graph: its "
        "transferred accuracy flatters it; attack through the rounding, and calibrate on more images.",
        ask=_q1,
    ),
    Check(
        code="Q2",
        name="asking the graph finds no more than its weights",
        meaning="An attacker who knows less did better: attacks on the weights miss what the rounded graph does; "
        "report the black-box number and attack through the rounding.",
        ask=_q2,
    ),
)


# --- helpers ---


class _Scaled(torch.autograd.Function):
    """The identity; on the way back each image's gradient is divided by its largest entry, which `sizes` gets.

    A model in half precision would lose it otherwise: a wrong class of probability 1e-8 has no gradient in float16.
    """

    @staticmethod
    def forward(context: Any, logits: Tensor, sizes: list[Tensor]) -> Tensor:
        context.sizes = sizes
        return logits.view_as(logits)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        size = gradient.abs().amax(1).clamp_min(torch.finfo(gradient.dtype).tiny)
        context.sizes[:] = [size]
        return gradient / size[:, None], None


class _Rescaled(torch.autograd.Function):
    """The identity; on the way back the gradient is multiplied by what `_Scaled` divided it by."""

    @staticmethod
    def forward(context: Any, images: Tensor, sizes: list[Tensor]) -> Tensor:
        context.sizes = sizes
        return images.view_as(images)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (size,) = context.sizes
        return gradient * size.to(gradient)[:, None, None, None], None


def _half(outputs: Tensor, images: torch.dtype) -> torch.dtype | None:
    """Return the type of half precision in which a model computes, as its images or its answers tell; or None."""
    for dtype in (torch.bfloat16, torch.float16):
        same = outputs.to(dtype).to(outputs) == outputs
        if images == dtype or bool(same[outputs.isfinite()].all()):
            return dtype
    return None


def _count(mask: Tensor) -> int:
    return int(mask.sum())


def _parts(tensor: Tensor) -> list[Tensor]:
    return [tensor[start : start + BATCH] for start in range(0, len(tensor), BATCH)]


def _mean(values: Tensor) -> float:
    return float(values.mean())


def _exceeds(count: int, total: int, threshold: float) -> bool:
    """Whether a share lies above a threshold with its whole 95 % Wilson interval."""
    return total > 0 and wilson(count / total, total)[0] > threshold


def _more(differences: Tensor, threshold: float) -> bool:
    """Whether paired differences are larger than a threshold on average, and than two standard errors."""
    error = float(differences.std()) / math.sqrt(len(differences)) if len(differences) > 1 else math.inf
    return _mean(differences) > max(threshold, 2 * error)


def _relative(one: Tensor, other: Tensor) -> float:
    """Return the largest difference as part of the mean size, NaN if there is one; of small logits, as it is."""
    finite = one[one.isfinite()].abs()
    size = max(1.0, float(finite.mean())) if len(finite) else 1.0
    same = one == other  # infinities too
    return float(torch.where(same, torch.zeros_like(one), one - other).abs().max()) / size


@dataclass(frozen=True, kw_only=True)
class _State:
    """What an attack may not change."""

    tensors: dict[str, Tensor]
    gradients: dict[str, float]
    modes: dict[str, bool]
    random: dict[str, object]


def _state(model: object, device: torch.device) -> _State:
    module = model if isinstance(model, nn.Module) else getattr(model, "__self__", None)
    states: dict[str, object] = {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "python": random.getstate(),
        "numpy": repr(np.random.get_state()),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device).numpy().tobytes()
    if not isinstance(module, nn.Module):
        return _State(tensors={}, gradients={}, modes={}, random=states)
    named = [*module.named_parameters(), *module.named_buffers()]
    return _State(
        tensors={name: tensor.detach().clone() for name, tensor in named},
        gradients={name: float(p.grad.double().sum()) for name, p in module.named_parameters() if p.grad is not None},
        modes={name: part.training for name, part in module.named_modules()},
        random=states,
    )


def _same(name: str, before: _State, after: _State) -> bool:
    one, other = before.tensors.get(name), after.tensors.get(name)
    return one is not None and other is not None and torch.equal(one.nan_to_num(), other.nan_to_num())


@contextmanager
def _own_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """Set the global random states from a seed and put back what was there."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


_BACKWARD = "_engine_run_backward"


@contextmanager
def _backward_calls() -> Iterator[list[int]]:
    """Count backward passes of this thread.

    All of torch's ways there (backward, autograd.grad, torch.func) end in one private function, which is watched
    because a forward may hold the public ones under names of its own.
    """
    calls, thread = [0], threading.get_ident()
    original = getattr(torch.autograd, _BACKWARD)

    def counted(*arguments: Any, **options: Any) -> Any:
        if threading.get_ident() == thread:
            calls[0] += 1
        return original(*arguments, **options)

    setattr(torch.autograd, _BACKWARD, counted)
    try:
        yield calls
    finally:
        setattr(torch.autograd, _BACKWARD, original)
