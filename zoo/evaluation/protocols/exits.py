"""Multi-exit networks: accuracy at every exit (anytime), at a mean cost (budgeted), clean and under attack.

As in MSDNet (Huang et al. 2018, arXiv:1703.09844), Triple Wins (Hu et al. 2020, arXiv:2002.10025) and NEO-KD (Ham et
al. 2023, arXiv:2311.00428).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.attacks.budget import LinfBudget
from zoo.attacks.exits import MultiExit, average_exits, exits_of, single_exit
from zoo.bundle.card import Check, Result, Table
from zoo.data import datasets
from zoo.data.datasets import Images
from zoo.errors import BadInput
from zoo.evaluation.run import Run, ready, table
from zoo.evaluation.thresholds import OTHER_EXIT_GAP
from zoo.gates.early_exit import geometric_quotas, leaving, thresholds
from zoo.weights.models import load_exits

RATIOS = tuple(number / 20 for number in range(1, 40))
"""Each exit's quota relative to the one before, for the 39 budgets of MSDNet."""
UNREACHABLE = 2.0
"""Stands for an infinite limit, which a card cannot hold; confidences are at most 1."""
LIMIT_IMAGES = 1000
"""Training images that limits are chosen on where the training held none out."""
MILLION = 1e6


def measure(run: Run) -> list[Result]:
    """Accuracy of every exit under the single, average and max-average attacks: PGD of 20 steps of eps / 5.

    Row "single" of the table "exits" attacks exit i where exit i is judged; the table "transfer" is where each of these
    attacks takes every other exit. The max-average attack keeps, per image, the single attack with the largest loss
    summed over the exits. The accuracy of the result is the mean over exits under it.

    In the table "budgeted" an image leaves at the first exit that is sure enough (`zoo.gates.early_exit`), and what
    an answer costs is the mean over images. Limits are chosen on clean held-out training images, for clean and for
    attacked test images alike: a server does not know which of them come.
    """
    network = _network(run)
    images = run.images(1000)
    held_out, source = _held_out(run)
    limits = _limits(run.judged("held-out images", held_out, lambda x, _, __: _confidence(_answers(network, x))))
    clean = run.judged("clean", images, lambda x, _, __: _answers(network, x))
    measured = Measured(run, network, images, clean, limits, source)
    return [_measure_at(measured, eps) for eps in run.request.eps]


@dataclass(frozen=True)
class Measured:
    """What holds at every eps."""

    run: Run
    network: MultiExit
    images: Images
    clean: Tensor
    """Logits (image, exit, class) without an attack."""
    limits: dict[float, list[float]]
    """Of every budget, by the ratio of its quotas."""
    limits_source: str
    """What the limits were chosen on."""


def _network(run: Run) -> MultiExit:
    card = run.bundle.card
    try:
        network = ready(load_exits(run.bundle), run.device)
    except BadInput as error:
        raise BadInput(
            f"{card.name} ({run.request.variant}) has one exit; the protocol exits is for multi-exit networks, use "
            "--protocol whitebox"
        ) from error
    if not card.exits:
        raise BadInput(f"the card of {card.name} does not say what its exits cost; export the bundle again")
    return network


def _measure_at(measured: Measured, eps: Fraction) -> Result:
    run, images, labels = measured.run, measured.images, measured.images.labels.cpu()
    number, names = len(run.bundle.card.exits), [str(index + 1) for index in range(len(run.bundle.card.exits))]
    budget = LinfBudget(eps=float(eps), steps=run.request.steps or 20, restarts=run.request.restarts or 1)
    averaged, single = _averaged(measured, eps, budget), _single(measured, eps, budget)
    moved = _right(single, labels).double().mean(0)  # (attacked exit, exit)
    rows = {
        "clean": _right(measured.clean, labels).double().mean(0),
        "average": _right(averaged, labels).double().mean(0),
        "max-average": _right(strongest(single, labels), labels).double().mean(0),
        "single": moved.diagonal(),
    }
    return run.result(
        attack="max-average PGD",
        accuracy=float(rows["max-average"].mean()),
        images=len(images),
        eps=eps,
        steps=budget.steps,
        step_size=budget.step,
        restarts=budget.restarts,
        note=f"mean over {number} exits; limits of the table budgeted chosen on clean images, {measured.limits_source}",
        checks=[_own_exit_suffers(moved)] if eps else [],
        tables=[
            table("exits", (f"attack, eps {eps}", "exit"), list(rows), names, torch.stack(list(rows.values()))),
            table("transfer", ("made on exit", "judged on exit"), names, names, moved),
            _budgets({"clean": measured.clean, "average attack": averaged}, labels, measured.limits, run),
            _confidences(measured.limits, names[:-1]),
        ],
    )


def _averaged(measured: Measured, eps: Fraction, budget: LinfBudget) -> Tensor:
    """Return the logits after the average attack (image, exit, class)."""
    run, network, stage = measured.run, measured.network, f"average attack, eps {eps}"

    def judge(pixels: Tensor, labels: Tensor, batch: int) -> Tensor:
        adversarial = average_exits(network, pixels, labels, budget, generator=run.generator(stage, batch))
        return _answers(network, adversarial)

    return run.judged(stage, measured.images, judge)


def _single(measured: Measured, eps: Fraction, budget: LinfBudget) -> Tensor:
    """Return the logits after the attack on each exit (image, attacked exit, exit, class)."""
    run, network, stage = measured.run, measured.network, f"single attacks, eps {eps}"
    exits = range(len(run.bundle.card.exits))

    def judge(pixels: Tensor, labels: Tensor, batch: int) -> Tensor:
        generator = run.generator(stage, batch)
        made = [single_exit(network, pixels, labels, budget, index, generator=generator) for index in exits]
        return torch.stack([_answers(network, adversarial) for adversarial in made], dim=1)

    return run.judged(stage, measured.images, judge)


def strongest(answers: Tensor, labels: Tensor) -> Tensor:
    """Return, per image, the answers to the attack whose cross-entropy summed over exits is largest (max-average).

    Args:
        answers: logits (image, attack, exit, class).
        labels: (image,).

    Returns:
        Logits (image, exit, class).
    """
    images, attacks, number, _ = answers.shape
    wanted = labels[:, None, None].expand(images, attacks, number)
    harm = F.cross_entropy(answers.flatten(0, 2).float(), wanted.flatten(), reduction="none").view(wanted.shape).sum(2)
    return answers[torch.arange(images), harm.argmax(1)]


def budgeted(
    answers: Tensor, labels: Tensor, limits: Sequence[float], costs: Sequence[float]
) -> tuple[float, float]:  # fmt: skip
    """Return (accuracy, mean cost) when every image leaves at the first exit whose confidence reaches its limit.

    Args:
        answers: logits (image, exit, class).
        labels: (image,).
        limits: one per exit but the last; see `zoo.gates.early_exit`.
        costs: of running up to each exit.
    """
    left_at = leaving(_confidence(answers), limits)
    right = _right(answers, labels).gather(1, left_at[:, None])
    return float(right.double().mean()), float(torch.tensor(costs, dtype=torch.float64)[left_at].mean())


def _answers(network: MultiExit, pixels: Tensor) -> Tensor:
    """Return the logits of every exit (image, exit, class)."""
    with torch.no_grad():
        answers = torch.stack(exits_of(network, pixels), dim=1)
    if bool(answers.isnan().any()):
        raise BadInput("the network answers NaN at some exit, which is no class; look for a weight that is NaN")
    return answers


def _right(answers: Tensor, labels: Tensor) -> Tensor:
    """Return which answers (image, …, class) are the image's label."""
    found = answers.argmax(-1)
    return found == labels.view(-1, *[1] * (found.dim() - 1))


def _confidence(answers: Tensor) -> Tensor:
    return answers.softmax(-1).amax(-1)


def _held_out(run: Run) -> tuple[Images, str]:
    """Return the images that limits are chosen on, and what they are."""
    training = run.bundle.card.training
    images = datasets.load(run.bundle.card.dataset, "train")
    only, kept_back = (training.recipe.get(key) for key in ("train_images", "held_out"))
    if isinstance(only, int):  # a trial on fewer images held back some of those
        images = datasets.drawn(images, only, training.seed)
    if isinstance(kept_back, int) and 0 < kept_back < len(images):
        number, said = kept_back, "held out of training"
    else:
        number, said = min(LIMIT_IMAGES, len(images) - 1), "of the training, which the model has seen"
    _, chosen = datasets.hold_out(images, number, datasets.HOLD_OUT_SEED)
    return chosen.to(run.device), f"{number} {said}"


def _limits(confidence: Tensor) -> dict[float, list[float]]:
    """Return the limits of every budget, by the ratio of its quotas."""
    number = confidence.shape[1]
    return {ratio: thresholds(confidence, geometric_quotas(ratio, number)) for ratio in RATIOS}


def _budgets(measured: dict[str, Tensor], labels: Tensor, limits: dict[float, list[float]], run: Run) -> Table:
    """Accuracy and mean cost of every budget, in million multiply-accumulates."""
    costs = [found.macs / MILLION for found in run.bundle.card.exits]
    columns = [f"{what}, {name}" for name in measured for what in ("million MACs", "accuracy")]
    rows = []
    for chosen in limits.values():
        row = []
        for answers in measured.values():
            accuracy, cost = budgeted(answers, labels, chosen, costs)
            row += [cost, accuracy]
        rows.append(row)
    names = [f"{ratio:g}" for ratio in limits]
    return table("budgeted", ("ratio of quotas", "measured"), names, columns, torch.tensor(rows, dtype=torch.float64))


def _confidences(limits: dict[float, list[float]], names: list[str]) -> Table:
    """The limits themselves, for `manygates serve --confidence`; an exit without a quota answers no image."""
    values = torch.tensor(list(limits.values()), dtype=torch.float64).clamp(max=UNREACHABLE)
    axes = ("ratio of quotas", f"confidence needed at exit ({UNREACHABLE:g}: never)")
    return table("limits", axes, [f"{ratio:g}" for ratio in limits], names, values)


def _own_exit_suffers(moved: Tensor) -> Check:
    """Check that an attack on an exit harms it at least as much as the attacks on others do."""
    gaps = moved.diagonal() - moved.amin(0)
    return Check(
        name="an exit suffers most from the attack on itself",
        held=float(gaps.max()) <= OTHER_EXIT_GAP,
        detail=f"an attack made on another exit leaves up to {float(gaps.max()):.3f} less of it",
    )
