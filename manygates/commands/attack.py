"""One picture, attacked: attack."""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manygates.arguments import Command, add_json, add_model, add_seed, count
from manygates.output import DONE, print_json
from zoo import vocabulary
from zoo.errors import BadInput, UnknownName

if TYPE_CHECKING:
    from torch import Tensor

    from zoo.attacks import Budget
    from zoo.attacks.registry import Attack, AttackOptions
    from zoo.attacks.remote import RemoteModel
    from zoo.bundle.bundle import Bundle

ATTACK_FILES = ("clean.png", "adversarial.png", "perturbation.png", "report.json")
JUDGING_DRAWS = 20


def _add(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--image", type=Path, required=True, metavar="FILE")
    parser.add_argument("--attack", default="pgd", metavar="NAME", help=f"one of {', '.join(vocabulary.ATTACKS)}")
    parser.add_argument("--variant", choices=vocabulary.VARIANTS, default="single")
    parser.add_argument("--label", metavar="CLASS", help="the true class; what the model says by default")
    parser.add_argument("--target", metavar="CLASS", help="the class to be reached; any wrong one by default")
    parser.add_argument("--targeted", action="store_true", help="insist on a --target")
    parser.add_argument("--norm", choices=("linf", "l2"), default="linf")
    parser.add_argument("--eps", default="8/255", metavar="EPS")
    parser.add_argument("--loss", metavar="LOSS", help="cross_entropy, margin or dlr; the attack's own by default")
    parser.add_argument("--queries", type=count(), default=1000, metavar="N", help="of square and rays")
    parser.add_argument("--draws", type=count(), default=1, metavar="N", help="forwards of random gates per step")
    parser.add_argument("--server", metavar="URL", help="attack MODEL as this server answers, by square or rays")
    allowed = "the server is another machine, and you may attack it"
    parser.add_argument("--allow-remote", action="store_true", help=allowed)
    parser.add_argument("--steps", type=count(), default=20, metavar="N")
    parser.add_argument("--restarts", type=count(), default=1, metavar="N")
    add_seed(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for pictures and report.json")
    add_json(parser)


@dataclass(frozen=True, kw_only=True)
class _Victim:
    """The model that is attacked: a variant of a bundle, or what a server answers."""

    classes: Sequence[str]
    network: Callable[[Tensor], Tensor]
    gated: bool
    remote: RemoteModel | None = None

    def answer(self, image: Tensor) -> Tensor:
        """Return the probabilities (class,); of random gates the share of 20 fresh draws that answer each class."""
        import torch

        from zoo.attacks.outputs import logits_of

        with torch.no_grad():
            if not self.gated:
                return logits_of(self.network, image).softmax(1)[0]
            votes = logits_of(self.network, image.expand(JUDGING_DRAWS, -1, -1, -1)).argmax(1)
        return torch.bincount(votes, minlength=len(self.classes)) / JUDGING_DRAWS


@dataclass(frozen=True, kw_only=True)
class _Attempt:
    """An attack on one picture: the picture before and after, and what the victim answers to both."""

    classes: Sequence[str]
    image: Tensor
    adversarial: Tensor
    before: Tensor
    after: Tensor
    label: int
    target: int | None

    @property
    def outcome(self) -> str:
        """ "broken", "not broken", or "wrong before the attack", which is no merit of the attack."""
        if self._fooled(self.before):
            return "wrong before the attack"
        return "broken" if self._fooled(self.after) else "not broken"

    def told(self) -> str:
        """Return both answers and the outcome in words."""
        said = [f"{self.classes[int(answer.argmax())]} ({answer.max():.1%})" for answer in (self.before, self.after)]
        return f"{' -> '.join(said)}: {self.outcome}"

    def _fooled(self, answer: Tensor) -> bool:
        said = int(answer.argmax())
        return said != self.label if self.target is None else said == self.target


def _attack(arguments: argparse.Namespace) -> int:
    import torch

    from zoo.attacks import L2Budget, LinfBudget
    from zoo.attacks.registry import AttackOptions, attack_named
    from zoo.evaluation import parse_eps
    from zoo.hub.source import resolve
    from zoo.pictures import read_image
    from zoo.weights.models import weights_file

    _check_folder(arguments.out)
    bundle = resolve(arguments.model).open(lambda card: () if arguments.server else (weights_file(card),))
    chosen = attack_named(arguments.attack)
    eps = parse_eps(arguments.eps, arguments.norm)
    image = torch.from_numpy(read_image(arguments.image, bundle.card.input))
    victim = _victim(arguments, bundle, chosen)
    norm = LinfBudget if arguments.norm == "linf" else L2Budget
    budget: Budget = norm(eps=float(eps), steps=arguments.steps, restarts=arguments.restarts)
    if victim.remote is not None:
        from zoo.attacks.budget import linf_of
        from zoo.attacks.remote import eight_bit

        image, budget = eight_bit(image, linf_of(budget, arguments.attack))
    before = victim.answer(image)
    label = int(before.argmax()) if arguments.label is None else _class(arguments.label, victim.classes)
    target = _target(arguments, chosen, victim.classes, label)
    options = AttackOptions(
        budget=budget,
        generator=torch.Generator().manual_seed(arguments.seed),
        loss=arguments.loss,
        targets=None if target is None else torch.tensor([target]),
        queries=arguments.queries,
        draws=arguments.draws,
    )
    options = chosen.with_loss(options, arguments.attack)
    adversarial = chosen.run(victim.network, image, torch.tensor([label]), options) if eps else image
    server = None
    if (remote := victim.remote) is not None:  # counted before the picture is judged
        server = {"url": arguments.server, "queries": remote.queries, "requests": remote.requests}
    adversarial = _as_picture(adversarial, image, budget)
    attempt = _Attempt(
        classes=victim.classes,
        image=image,
        adversarial=adversarial,
        before=before,
        after=victim.answer(adversarial),
        label=label,
        target=target,
    )
    report = _report(arguments, bundle.card.name, options, eps, attempt, server)
    _write(arguments.out, attempt, report)
    if arguments.json:
        print_json(report)
    else:
        print(f"{attempt.told()} at eps {eps}; {arguments.out}")
    return DONE


def _check_folder(out: Path) -> None:
    """Refuse a folder that holds anything but the files of an earlier attack, which would be lost."""
    strangers = {entry.name for entry in out.iterdir()} - set(ATTACK_FILES) if out.is_dir() else set()
    if strangers:
        lost = f"{min(strangers)!r}, which is no result of an attack and would be lost"
        raise BadInput(f"{out} holds {lost}; choose an empty or new folder")


def _victim(arguments: argparse.Namespace, bundle: Bundle, chosen: Attack) -> _Victim:
    """Return the model that is attacked.

    Raises:
        BadInput: the attack needs what this model does not give.
    """
    from zoo.attacks.registry import ATTACKS
    from zoo.attacks.remote import RemoteModel
    from zoo.weights.models import load_variant

    card = bundle.card
    if arguments.server is not None:
        if chosen.needs == "gradients":
            known = ", ".join(name for name, entry in ATTACKS.items() if entry.needs != "gradients")
            raise BadInput(f"{arguments.attack} needs gradients, and a server gives none; use one of {known}")
        labels_only = chosen.needs == "labels"
        remote = RemoteModel(arguments.server, card.name, labels_only=labels_only, allow_remote=arguments.allow_remote)
        return _Victim(classes=card.classes, network=remote, gated=False, remote=remote)
    gated = arguments.variant == "gated"
    if gated and not chosen.random:
        known = ", ".join(name for name, entry in ATTACKS.items() if entry.random)
        raise BadInput(f"{arguments.attack} cannot average over random gates; use one of {known}")
    if gated and arguments.draws == 1:
        raise BadInput(
            "random gates answer differently every time, so one draw per step proves nothing; "
            "average over several with --draws 20"
        )
    network = load_variant(bundle, arguments.variant, rng=random.Random(arguments.seed))  # noqa: S311 - repeatable
    return _Victim(classes=card.classes, network=network, gated=gated)


def _class(name: str, classes: Sequence[str]) -> int:
    """Return the index of a class; UnknownName if there is none of that name."""
    if name not in classes:
        raise UnknownName(name, classes, kind="class")
    return classes.index(name)


def _target(arguments: argparse.Namespace, chosen: Attack, classes: Sequence[str], label: int) -> int | None:
    """Return the index of the class that is to be reached; None if any wrong one will do."""
    if arguments.target is None:
        if arguments.targeted:
            raise BadInput("a targeted attack needs the class to be reached, got none; name it with --target CLASS")
        return None
    if not chosen.targeted:
        raise BadInput(f"{arguments.attack} cannot be asked for a class; leave --target out or use pgd")
    target = _class(arguments.target, classes)
    if target == label:
        said = "" if arguments.label is not None else ", which is what the model answers"
        raise BadInput(f"the target is the label, {arguments.target}{said}; name another class with --target")
    return target


def _as_picture(adversarial: Tensor, image: Tensor, budget: Budget) -> Tensor:
    """Return what leaves as a picture, in levels of 1/255, and is judged.

    In l2 rounding may add up to half a level per pixel, which the report shows.
    """
    from zoo.attacks import LinfBudget, to_grid

    if isinstance(budget, LinfBudget):
        return to_grid(adversarial, image, budget.eps)
    return (adversarial * 255).round() / 255


def _report(
    arguments: argparse.Namespace,
    model: str,
    options: AttackOptions,
    eps: Fraction,
    attempt: _Attempt,
    server: dict[str, Any] | None,
) -> dict[str, Any]:
    """Return the document of report.json."""
    difference = attempt.adversarial - attempt.image
    classes = attempt.classes
    one_step = arguments.attack == "fgsm"
    return {
        "model": model,
        "variant": arguments.variant,
        "attack": arguments.attack,
        "norm": options.budget.norm,
        "loss": options.loss or "none",
        "eps": float(eps),
        "eps_fraction": str(eps),
        "steps": 1 if one_step else arguments.steps,
        "restarts": 1 if one_step else arguments.restarts,
        "seed": arguments.seed,
        "label": classes[attempt.label],
        "linf": float(difference.abs().max()),
        "l2": float(difference.square().sum().sqrt()),
        "target": None if attempt.target is None else classes[attempt.target],
        "outcome": attempt.outcome,
        "succeeded": attempt.outcome == "broken",
        "server": server,
        "before": {name: float(share) for name, share in zip(classes, attempt.before, strict=True)},
        "after": {name: float(share) for name, share in zip(classes, attempt.after, strict=True)},
    }


def _write(out: Path, attempt: _Attempt, report: dict[str, Any]) -> None:
    """Write `ATTACK_FILES` into the folder; the perturbation is drawn around grey, at full contrast."""
    from zoo.files import replace_directory, write_json_atomic
    from zoo.pictures import save_png

    difference = attempt.adversarial - attempt.image
    scale = 0.5 / max(float(difference.abs().max()), 1 / 255)
    with replace_directory(out) as folder:
        save_png(folder / "clean.png", attempt.image.numpy())
        save_png(folder / "adversarial.png", attempt.adversarial.numpy())
        save_png(folder / "perturbation.png", (0.5 + scale * difference).numpy())
        write_json_atomic(folder / "report.json", report)


COMMANDS = {"attack": Command("Attack a model on one picture and keep what came out.", _add, _attack)}
