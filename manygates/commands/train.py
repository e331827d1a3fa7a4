"""Training and what is made of its networks: train, methods, derive."""

from __future__ import annotations

import argparse
import dataclasses
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manygates.arguments import Command, add_json, add_seed, count, usable_device
from manygates.output import DONE, print_json, say
from zoo.errors import BadInput

if TYPE_CHECKING:
    from torch import Tensor, nn

    from manygates.commands.sources import Trained


def _add_train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE")
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="the run's folder")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="as in phases.0.epochs=3")
    parser.add_argument("--resume", action="store_true", help="go on where the run in RUN was stopped")
    parser.add_argument("--device", metavar="DEVICE", help="cpu or cuda; a GPU if there is one by default")


def _train(arguments: argparse.Namespace) -> int:
    from training.loop import train
    from training.recipes import override, recipe

    train(
        override(recipe(arguments.recipe), arguments.set),
        arguments.out,
        resume=arguments.resume,
        device=arguments.device and usable_device(arguments.device),
    )
    if os.environ.get("RANK", "0") == "0":  # under torchrun every rank comes here
        say(f"trained; next: manygates export {arguments.out} --out DIR")
    return DONE


def _methods(arguments: argparse.Namespace) -> int:
    from training.methods import markdown_table, methods

    if arguments.json:
        print_json([dataclasses.asdict(method) for method in methods()])
    else:
        print(markdown_table(methods()), end="")
    return DONE


def _add_derive(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="RUN|MODEL")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder that will hold the bundle")
    parser.add_argument("--paths", type=count(), metavar="K", help="draw K distinct paths")
    parser.add_argument("--path", action="append", metavar="0110…", help="take this path; repeat it for an ensemble")
    parser.add_argument("--member", type=int, action="append", metavar="N", help="likewise a member, from 1 on")
    add_seed(parser)
    parser.add_argument("--recalibrate", action="store_true", help="re-estimate BatchNorm statistics per path")
    parser.add_argument("--finetune", type=count(0), default=0, metavar="EPOCHS", help="epochs on clean images")
    parser.add_argument("--name", metavar="NAME", help="the derived model's name")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Taken:
    """The plain networks that a derivation begins with."""

    networks: list[nn.Module]
    words: str
    """What they are, such as "One path"."""
    choice: dict[str, list[Any]]
    """The same for the card: {"paths": [...]} or {"members": [...]}."""


def _derive(arguments: argparse.Namespace) -> int:
    from manygates.commands.sources import load_source
    from zoo.bundle.bundle import check_target
    from zoo.export.write import Description, export_members

    check_target(arguments.out)
    trained = load_source(arguments.source)
    taken = _take_members(arguments, trained) if trained.members else _take_paths(arguments, trained)
    architecture = trained.architecture.member
    members = [_treated(member, architecture.dataset, arguments, trained) for member in taken.networks]
    steps = [f"derived: {taken.words.lower()}"]
    if "paths" in taken.choice:
        steps = [f"derived along {', '.join(taken.choice['paths'])}"]
    if arguments.finetune:
        steps.append(f"{arguments.finetune} epochs of fine-tuning on clean images")
    if arguments.recalibrate:
        steps.append("BatchNorm re-calibrated on augmented training images")
    summary = "; ".join([trained.training.summary, *steps])
    derived = {
        "from": trained.name,
        **taken.choice,
        "finetune_epochs": arguments.finetune,
        "recalibrated": arguments.recalibrate,
        "seed": arguments.seed,
    }
    recipe = {**trained.training.recipe, "derived": derived}
    description = Description(
        name=arguments.name or f"{trained.name}-derived",
        description=f"{taken.words} of {trained.name}",
        method=trained.method,
        training=dataclasses.replace(trained.training, summary=summary, recipe=recipe),
    )
    bundle = export_members(arguments.out, members, architecture, description)
    say(f"{bundle.card.name}: {summary}; in {arguments.out}")
    return DONE


def _take_paths(arguments: argparse.Namespace, trained: Trained) -> _Taken:
    from zoo import paths
    from zoo.gates.derive import derive
    from zoo.gates.rgn import RandomGatedNetwork

    rgn = trained.network
    assert isinstance(rgn, RandomGatedNetwork)
    if arguments.member:
        raise BadInput(f"{trained.name} is a random gated network and has paths, no members; use --path or --paths")
    if arguments.path and arguments.paths is not None:
        raise BadInput("give --path (which ones) or --paths (how many), not both")
    if arguments.path:
        chosen = [paths.parse(text, rgn.num_gates, rgn.candidates) for text in arguments.path]
    else:
        rng = random.Random(arguments.seed)  # noqa: S311 - repeatable on purpose
        chosen = paths.sample_distinct(arguments.paths or 1, rgn.num_gates, rgn.candidates, rng)
    return _Taken(
        networks=[derive(rgn, path) for path in chosen],
        words="An ensemble of paths" if len(chosen) > 1 else "One path",
        choice={"paths": [paths.format_path(path) for path in chosen]},
    )


def _take_members(arguments: argparse.Namespace, trained: Trained) -> _Taken:
    members = trained.members
    if arguments.path or arguments.paths is not None:
        raise BadInput(
            f"{trained.name} is a plain network without gates, so no path can be derived from it; leave --path and "
            "--paths out" + (f", or choose of its {len(members)} members with --member" if len(members) > 1 else "")
        )
    numbers = arguments.member or list(range(1, len(members) + 1))
    if wrong := [number for number in numbers if not 1 <= number <= len(members)]:
        raise BadInput(f"{trained.name} has no member {wrong[0]}, expected 1 to {len(members)}")
    return _Taken(
        networks=[members[number - 1] for number in numbers],
        words="The network" if len(members) == 1 else f"Members {', '.join(map(str, numbers))}",
        choice={"members": numbers},
    )


def _treated(member: nn.Module, dataset: str, arguments: argparse.Namespace, trained: Trained) -> nn.Module:
    """Return the network after --finetune and --recalibrate."""
    from zoo.gates.derive import recalibrate

    if arguments.finetune:
        from training.finetune import finetune

        member = finetune(member, trained.architecture.member, arguments.finetune, seed=arguments.seed)
    if arguments.recalibrate:
        recalibrate(member, recalibration_batches(dataset, arguments.seed))
    return member


def recalibration_batches(dataset: str, seed: int, batches: int = 32, size: int = 128) -> Iterator[Tensor]:
    """Yield augmented training images (size, channel, height, width) in [0, 1], on which BatchNorm is re-estimated.

    There are fewer than `batches` where the data set has too few images, and at least one.
    """
    import torch

    from zoo.data import datasets

    images = datasets.load(dataset, "train")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    for number in range(max(1, min(batches, len(images) // size))):
        pixels = images.pixels[order[number * size : (number + 1) * size]]
        yield datasets.as_float(datasets.augment(pixels, generator, flip=datasets.source(dataset).flips))


COMMANDS = {
    "train": Command("Train a recipe.", _add_train, _train),
    "methods": Command("The methods that recipes train by: paper, needs, cost, recipes.", add_json, _methods),
    "derive": Command(
        "Derive plain networks: paths of a random gated one, or members of an ensemble.", _add_derive, _derive
    ),
}
