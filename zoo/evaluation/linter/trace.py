"""One PGD attempt of the linter, step by step."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.attacks.budget import LinfBudget
from zoo.attacks.gradient import pgd
from zoo.attacks.outputs import Model


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

    @classmethod
    def joined(cls, parts: list[Trace]) -> Trace:
        """Return the traces of several batches as one."""
        return cls(
            wrong=torch.cat([part.wrong for part in parts], 1),
            losses=torch.cat([part.losses for part in parts], 1),
            first=torch.cat([part.first for part in parts]),
            last=torch.cat([part.last for part in parts]),
        )


def trace_pgd(model: Model, images: Tensor, labels: Tensor, budget: LinfBudget, generator: torch.Generator) -> Trace:
    """Run PGD on cross-entropy and keep what it went through."""
    wrong: list[Tensor] = []
    losses: list[Tensor] = []
    first, before = images.clone(), images

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

    last = pgd(model, images, labels, budget, generator=generator, watch=watch)
    with torch.no_grad():
        judge(last, model(last))
    any_wrong = torch.stack(wrong).any(0)[:, None, None, None]
    first = torch.where(any_wrong, first, last)
    return Trace(wrong=torch.stack(wrong), losses=torch.stack(losses), first=first, last=last)
