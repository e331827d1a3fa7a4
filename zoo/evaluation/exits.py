"""Multi-exit networks: accuracy at every exit (anytime), at a mean cost (budgeted), clean and under attack.

As in MSDNet (Huang et al. 2018, arXiv:1703.09844) and Triple Wins (Hu et al. 2020, arXiv:2002.10025).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from zoo.attacks.budget import LinfBudget
from zoo.attacks.exits import MultiExit, average_exits, exits_of, max_average_exits, single_exit
from zoo.card import Result
from zoo.errors import BadInput
from zoo.evaluation.run import Run, table

Attack = Callable[..., Tensor]
ATTACKS: dict[str, Attack] = {"average": average_exits, "max-average": max_average_exits}


def exits(run: Run) -> list[Result]:
    """Anytime accuracy of every exit under the single, average and max-average attacks: PGD of 20 steps of eps / 5.

    Row "single" attacks exit i where exit i is judged. The accuracy of the result is the mean over exits under the
    max-average attack.
    """
    images = run.images(1000)
    network = run.network
    first, _ = next(images.batches(2))
    with torch.no_grad():
        outputs = network(first)
    if isinstance(outputs, Tensor) and outputs.dim() == 2:
        raise BadInput(
            f"{run.bundle.card.name} ({run.request.variant}) has one exit; the protocol exits is for multi-exit "
            "networks, use --protocol whitebox"
        )
    number = len(exits_of(network, first))
    steps, restarts = run.request.steps or 20, run.request.restarts or 1
    names = [str(index + 1) for index in range(number)]
    results = []
    for eps in run.request.eps:
        budget = LinfBudget(eps=float(eps), steps=steps, restarts=restarts)
        rows = {"clean": run.judged("clean", images, lambda x, y, _: _right(network, x, y))}
        for name, attack in ATTACKS.items():
            stage = f"{name}, eps {eps}"

            def judge(x: Tensor, y: Tensor, batch: int, stage: str = stage, attack: Attack = attack) -> Tensor:
                return _right(network, attack(network, x, y, budget, generator=run.generator(stage, batch)), y)  # noqa: B023

            rows[name] = run.judged(stage, images, judge)
        singles = []
        for index in range(number):
            stage = f"single attack on exit {index + 1}, eps {eps}"

            def alone(x: Tensor, y: Tensor, batch: int, stage: str = stage, index: int = index) -> Tensor:
                adversarial = single_exit(network, x, y, budget, index, generator=run.generator(stage, batch))  # noqa: B023
                return _right(network, adversarial, y)[:, index]

            singles.append(run.judged(stage, images, alone))
        rows["single"] = torch.stack(singles, dim=1)
        values = torch.stack([right.double().mean(0) for right in rows.values()])
        results.append(
            run.result(
                attack="max-average PGD",
                accuracy=float(rows["max-average"].double().mean()),
                images=len(images),
                eps=eps,
                steps=steps,
                step_size=budget.step,
                restarts=restarts,
                note=f"mean over {number} exits",
                tables=[table("exits", (f"attack, eps {eps}", "exit"), list(rows), names, values)],
            )
        )
    return results


def _right(network: MultiExit, pixels: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.stack([outputs.argmax(1) == labels for outputs in exits_of(network, pixels)], dim=1)


def thresholds(confidence: Tensor, quotas: Sequence[Fraction | float]) -> list[float]:
    """Return the confidence at which an image leaves at each exit, so that exit k takes its quota (MSDNet, section 5).

    Args:
        confidence: largest probability of each validation image at each exit (image, exit).
        quotas: the share of the images that leaves at each exit; they sum to 1, the last exit takes the rest.

    Raises:
        BadInput: quotas that are not one share per exit, or do not sum to 1.
    """
    images, number = confidence.shape
    if len(quotas) != number or any(quota < 0 for quota in quotas) or abs(float(sum(quotas)) - 1) > 1e-6:
        raise BadInput(f"need {number} shares that sum to 1, one per exit, got {[float(quota) for quota in quotas]}")
    waiting = torch.ones(images, dtype=torch.bool)
    found = []
    for index in range(number - 1):
        taken = round(float(quotas[index]) * images)
        candidates = confidence[:, index].masked_fill(~waiting, -1)
        if taken <= 0 or not bool(waiting.any()):
            found.append(float("inf"))
            continue
        threshold = float(candidates.topk(min(taken, int(waiting.sum()))).values[-1])
        found.append(threshold)
        waiting &= confidence[:, index] < threshold
    return [*found, float("-inf")]


def budgeted(
    logits: Sequence[Tensor], labels: Tensor, limits: Sequence[float], costs: Sequence[float]
) -> tuple[float, float]:
    """Return (accuracy, mean cost) when every image leaves at the first exit whose confidence reaches its limit.

    Args:
        logits: per exit (image, class).
        labels: (image,).
        limits: of `thresholds`.
        costs: of running up to each exit, for example in FLOPs.
    """
    confidence = torch.stack([outputs.softmax(1).amax(1) for outputs in logits], dim=1)
    reached = confidence >= torch.tensor(limits, dtype=confidence.dtype)
    reached[:, -1] = True
    leaving = reached.to(torch.int8).argmax(1)
    right = torch.stack([outputs.argmax(1) == labels for outputs in logits], dim=1)
    chosen = right.gather(1, leaving[:, None])[:, 0]
    return float(chosen.double().mean()), float(torch.tensor(costs, dtype=torch.float64)[leaving].mean())
