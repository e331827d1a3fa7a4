"""What the linter knows of a model: every attack runs once, when the first check asks for it.

A model gets a copy of the images in the type they came in; everything else is computed in float32 or better.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.attacks.apgd import apgd_targeted
from zoo.attacks.budget import LinfBudget
from zoo.attacks.gradient import fgsm, pgd
from zoo.attacks.images import check_batch, full_precision
from zoo.attacks.losses import Loss
from zoo.attacks.models import Randomness, checked_model
from zoo.attacks.outputs import Model, Output
from zoo.attacks.random_gates import Sampler, eot_pgd
from zoo.attacks.square import square
from zoo.attacks.training_mode import check_mode
from zoo.errors import BadInput
from zoo.evaluation.int8_graph import Int8Network, attack_weights
from zoo.evaluation.linter.differentiable import Form, differentiable
from zoo.evaluation.linter.side_effects import backward_passes, state_of
from zoo.evaluation.linter.trace import Trace, trace_pgd
from zoo.evaluation.thresholds import NOTABLE, REPEATED, ROUNDING_STEPS

Served = Callable[[np.ndarray], "np.ndarray | Tensor"]
"""pixels float32 (batch, channel, height, width) in [0, 1] -> logits or probabilities (batch, class)."""

# --- what is spent; every figure names its share of it ---

BATCH = 128
STEPS, LONG_STEPS = 20, 40
"""Steps of the usual attack, each eps / 8 long (2.5 eps in all), and of the longer one, whose first half it is."""
CURVE_STEPS = 10
QUERIES = 300
"""Of the Square attack, per image."""
NOISES = 16
"""Pairs of random corners of the ball, x + eps u and x - eps u."""
REPEATED_IMAGES, REPEATS = 8, 8
"""R1 asks so often because a model of two paths gives the same answer half the time."""
NEAREST = 3
"""G2 goes towards so many classes, in the order of their logits."""
EOT_IMAGES, EOT_STEPS, EOT_DRAWS, FRESH_DRAWS = 50, 10, 16, 20


def count(mask: Tensor) -> int:
    """Return how many entries of a mask are true."""
    return int(mask.sum())


def parts(tensor: Tensor) -> list[Tensor]:
    """Return batches of at most `BATCH` rows."""
    return [tensor[start : start + BATCH] for start in range(0, len(tensor), BATCH)]


@torch.no_grad()
def answers_of(model: Model, images: Tensor) -> Tensor:
    """Return a model's answers (image, class), asked in batches."""
    return torch.cat([model(part) for part in parts(images)])


def relative(one: Tensor, other: Tensor) -> float:
    """Return the largest difference as part of the mean size, NaN if there is one; of small logits, as it is."""
    finite = one[one.isfinite()].abs()
    size = max(1.0, float(finite.mean())) if len(finite) else 1.0
    same = one == other  # infinities too
    return float(torch.where(same, torch.zeros_like(one), one - other).abs().max()) / size


class Evidence:
    """What is known of a model so far.

    Attributes:
        model: as it was given.
        net: as attacks need it (`differentiable`); of a random model one draw, as a path that became known.
        weights: of an int8 graph, the weights that it rounds, as attacks need them; else None.
        surrogate: as attacks need it, or None.
        given: how many images were given.
        images: those that the model answers correctly, in full precision; `labels` are theirs, `number` their number.
        outputs: the first answers (image, class) of the model itself.
        passes: how many backward passes it made for them.
        state: of the model before it was asked anything.
    """

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
        self.model, self.sampler, self.served = model, sampler, served
        self.eps, self.seed, self.queries = eps, seed, queries
        self._output = output
        self._whole = checked_model(
            model, output, randomness=self._randomness, may_move_buffers=True
        )  # M1 reports what moves
        dtype, images = images.dtype, full_precision(images)
        self.state = state_of(model, images.device)
        self.outputs, self.passes = self._first_answers(images[:REPEATED_IMAGES].to(dtype))
        classes = self.outputs.shape[1]
        if int(labels.max()) >= classes:
            raise BadInput(
                f"label {int(labels.max())} is out of range, expected 0 to {classes - 1}: "
                f"the model has {classes} classes"
            )
        self.form = Form.of(self.outputs, dtype, differentiates=self.passes > 0)
        drawn = model if sampler is None else sampler()
        self.net = self._draw(drawn)
        self.weights = (
            differentiable(checked_model(drawn.weights), self.form) if isinstance(drawn, Int8Network) else None
        )
        self.surrogate = (
            None if surrogate is None else differentiable(checked_model(surrogate, randomness="allow"), self.form)
        )
        right = answers_of(self.net, images).argmax(1) == labels
        if not bool(right.any()):
            raise BadInput(
                f"the model answers none of the {len(images)} images correctly, so there is nothing to attack; are the "
                "labels those of the images, and is the normalisation inside the model?"
            )
        self.given = len(images)
        self.images, self.labels = images[right], labels[right]
        self.number = len(self.images)

    def _first_answers(self, images: Tensor) -> tuple[Tensor, int]:
        """Return the model's answers, and how many backward passes it made for them."""
        with backward_passes() as passes, torch.enable_grad():
            outputs = self._whole.answer(images).detach()
            if not passes[0]:  # it may differentiate only where nobody else does
                with torch.no_grad():
                    self._whole.answer(images)
        return outputs, passes[0]

    @property
    def _randomness(self) -> Randomness:
        """What a draw may do at random; R1 is there to say it."""
        return "allow" if self.sampler is None else "expect"

    def _draw(self, model: Model) -> Model:
        """Return the model, or a draw of it, as attacks need it; the whole was asked before."""
        return differentiable(
            checked_model(model, self._output, randomness=self._randomness, operations_checked=True), self.form
        )

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

    def generator(self, name: str) -> torch.Generator:
        """Return the source of random numbers of one attack."""
        return torch.Generator().manual_seed(zlib.crc32(f"{self.seed}/{name}".encode()))

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the images and labels in batches."""
        return zip(parts(self.images), parts(self.labels), strict=True)

    def _usual(self, steps: int = STEPS, restarts: int = 1) -> LinfBudget:
        """Return the budget of attacks whose steps are those of the usual one."""
        return LinfBudget(eps=self.eps, steps=steps, step_size=2.5 * self.eps / STEPS, restarts=restarts)

    # attacks

    def wrong(self, adversarial: Tensor, labels: Tensor | None = None, net: Model | None = None) -> Tensor:
        """Return which images are answered wrongly (batch,) bool; an image with a NaN counts as answered."""
        labels, net = self.labels if labels is None else labels, net or self.net
        with torch.no_grad():
            answers = [net(part).argmax(1) for part in parts(adversarial)]
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
        found = [self.images[:0]]
        for part in parts(rows):
            images, labels = self.images[part], self.labels[part]
            found.append(pgd(self.net, images, labels, budget, loss=loss, keep="first broken", generator=generator))
        return self.wrong(torch.cat(found), self.labels[rows])

    @cached_property
    def one_step(self) -> Tensor:
        """FGSM."""
        budget = LinfBudget(eps=self.eps)
        return torch.cat([fgsm(self.net, *batch, budget) for batch in self.batches()])

    @cached_property
    def trace(self) -> Trace:
        """PGD on cross-entropy for `LONG_STEPS`."""
        generator = self.generator("trace")
        return Trace.joined(
            [
                trace_pgd(self.net, images, labels, self._usual(LONG_STEPS), generator)
                for images, labels in self.batches()
            ]
        )

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
    def mean_margin(self) -> float:
        """The mean clean margin between the two largest logits; at least a tiny number."""
        top = answers_of(self.net, self.images).topk(2, dim=1).values
        margins = (top[:, 0] - top[:, 1]).nan_to_num(0, posinf=1e4)
        return max(float(margins.mean()), 1e-12)

    @cached_property
    def notable(self) -> float:
        """The smallest change of a margin that is no rounding."""
        rounding = 0.0
        if self.form.half is not None:
            largest = float(self.outputs.nan_to_num(0, 0, 0).abs().amax(1).mean())
            rounding = ROUNDING_STEPS * torch.finfo(self.form.half).eps * largest
        return max(NOTABLE * self.mean_margin, rounding)

    @cached_property
    def other_losses(self) -> dict[str, Tensor]:
        """Return, by loss, which of the images that cross-entropy left are broken (image,) bool."""
        left = ~self.cross_entropy

        def rescaled(logits: Tensor, labels: Tensor, targets: Tensor | None = None) -> Tensor:
            return F.cross_entropy(logits / self.mean_margin, labels, reduction="none")

        losses: dict[str, str | Loss] = {
            "margin": "margin",
            f"cross-entropy of logits / {self.mean_margin:.3g}": rescaled,
        }
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
        for part in parts(rows):
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
        return self.attacked_by_square(~self.white_box, "square")

    def attacked_by_square(self, mask: Tensor, name: str) -> Tensor:
        """Return what the Square attack makes of the images of a mask; the others unchanged."""
        result, budget, generator = self.images.clone(), LinfBudget(eps=self.eps), self.generator(name)
        for part in parts(mask.nonzero()[:, 0]):
            images, labels = self.images[part], self.labels[part]
            result[part] = square(self.net, images, labels, budget, queries=self.queries, generator=generator)
        return result

    def corner(self, number: int) -> Tensor:
        """Return random signs, shaped like the images; an even and the odd number after it are opposites."""
        shape = self.images.shape
        signs = torch.randint(0, 2, shape, generator=self.generator(f"corner {number // 2}")) * 2 - 1
        return signs.to(self.images) * (1 - 2 * (number % 2))

    @cached_property
    def corner_logits(self) -> Tensor:
        """The logits at all random corners (corner, image, class)."""
        moved = ((self.images + self.eps * self.corner(number)).clamp(0, 1) for number in range(2 * NOISES))
        return torch.stack([answers_of(self.net, images) for images in moved])

    @cached_property
    def on_surrogate(self) -> tuple[Tensor, Tensor, Tensor]:
        """PGD on the surrogate: the images found, and which images the surrogate knew and which it lost."""
        assert self.surrogate is not None
        generator = self.generator("surrogate")
        known = ~self.wrong(self.images, net=self.surrogate)
        adversarial = torch.cat(
            [pgd(self.surrogate, *batch, self._usual(), generator=generator) for batch in self.batches()]
        )
        return adversarial, known, self.wrong(adversarial, net=self.surrogate) & known

    @cached_property
    def on_weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """PGD on the weights, two starts: which images they keep, which the graph that rounds them keeps; and after it.

        The last are images as the first start leaves them. An image counts as kept if every iterate is answered right.
        """
        assert self.weights is not None
        budget, generator = self._usual(LONG_STEPS, restarts=2), self.generator("weights")
        found = [attack_weights(self.weights, self.net, *batch, budget, generator) for batch in self.batches()]
        weights_kept, graph_kept, last = (torch.cat(each) for each in zip(*found, strict=True))
        return weights_kept, graph_kept, last

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
        return max(relative(answers[0], other) for other in answers[1:])

    @property
    def repeats(self) -> bool:
        """Whether the same images get the same answer."""
        return self.repeated_difference <= REPEATED  # False of NaN

    def _plain(self, images: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.form.differentiates):
            return self._whole.answer(images.to(self.form.dtype)).detach()

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
            net = self._draw(sampler())

            def answer(pixels: Tensor) -> Tensor:
                logits = net(pixels)
                fooled.logical_or_(logits.detach().argmax(1) != labels)
                return logits

            return answer

        budget = LinfBudget(eps=self.eps, steps=EOT_STEPS, step_size=2.5 * self.eps / EOT_STEPS)
        found = eot_pgd(recorded, images, labels, budget, draws=draws, generator=self.generator(f"eot {draws}"))
        reported = (~fooled).double()
        fresh = [self.wrong(found, labels, self._draw(sampler())) for _ in range(FRESH_DRAWS)]
        return 1 - torch.stack(fresh).double().mean(0), reported
