"""Bundles: export."""

from __future__ import annotations

import argparse
import dataclasses
import random
from pathlib import Path
from typing import TYPE_CHECKING

from manygates.arguments import Command, add_seed, count, is_run
from manygates.output import DONE, say
from zoo.errors import BadInput

if TYPE_CHECKING:
    from manygates.commands.sources import Trained
    from zoo.bundle.bundle import Bundle
    from zoo.bundle.card import Card
    from zoo.gates.rgn import RandomGatedNetwork


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="RUN|MODEL")
    parser.add_argument("members", nargs="*", metavar="RUN", help="further runs: all of them become one ensemble")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder that will hold the bundle; --int8 alone adds to MODEL's own"
    )
    parser.add_argument("--int8", action="store_true", help="add int8 graphs, calibrated on training images")
    parser.add_argument("--calibration-images", type=count(), default=1024, metavar="N", help="1,024 by default")
    add_seed(parser, "--calibration-seed", help="which ones")
    parser.add_argument("--checkpoint", choices=("last", "best"), default="last", help="which of a run's checkpoints")
    parser.add_argument("--name", metavar="NAME", help="the model's name; the recipe's by default")
    parser.add_argument("--description", metavar="TEXT", help="one sentence for the card")


def _export(arguments: argparse.Namespace) -> int:
    from zoo.bundle.bundle import check_target

    if arguments.out is None:
        return _add_to_own(arguments)
    check_target(arguments.out)
    bundle, card = _export_together(arguments) if arguments.members else _export_one(arguments)
    say(f"{bundle.card.name}: {', '.join(bundle.card.variants)} in {arguments.out}, checked against the weights")
    if arguments.int8:
        _add_int8(arguments, arguments.out, card)
    elif card is not None and card.int8 is not None:
        say("its int8 graphs, and what was measured on them, are left out; --int8 makes them again")
    return DONE


def _export_one(arguments: argparse.Namespace) -> tuple[Bundle, Card | None]:
    """Export a run or a model; returns the bundle and the model's earlier card."""
    from manygates.commands.sources import load_source
    from zoo.export.write import Description, export_members, export_rgn, without_int8
    from zoo.gates.rgn import RandomGatedNetwork

    trained = load_source(arguments.source, arguments.checkpoint)
    card = trained.card
    said = trained.training.recipe.get("description", f"{trained.name}, exported")
    description = Description(
        name=arguments.name or trained.name,
        description=arguments.description or (said if card is None else card.description),
        method=trained.method,
        training=trained.training,
        results=() if card is None else without_int8(card).results,  # the same weights and paths, so the same numbers
        lint=() if card is None else without_int8(card).lint,
    )
    if isinstance(trained.network, RandomGatedNetwork):
        single, *ensemble = _published_paths(trained, trained.network, arguments.source)
        bundle = export_rgn(
            arguments.out, trained.network, trained.architecture, description, single=single, ensemble=ensemble
        )
    else:
        bundle = export_members(arguments.out, trained.members, trained.architecture, description)
    return bundle, card


def _published_paths(trained: Trained, rgn: RandomGatedNetwork, source: str) -> list[tuple[int, ...]]:
    """Return the paths that are exported: that of the variant single, then those of the ensemble."""
    from zoo import paths

    card = trained.card
    if card is None:
        rng = random.Random(trained.training.seed)  # noqa: S311 - which paths are published is no secret
        number = trained.training.recipe["ensemble_paths"]
        chosen = paths.sample_distinct(number, rgn.num_gates, rgn.candidates, rng)
        return [chosen[0], *chosen]
    if card.paths.single is None and not card.paths.ensemble:
        raise BadInput(f"{card.name} publishes no path to export; choose some with manygates derive {source}")
    texts = [card.paths.single or card.paths.ensemble[0], *card.paths.ensemble]
    return [paths.parse(text, rgn.num_gates, rgn.candidates) for text in texts]


def _export_together(arguments: argparse.Namespace) -> tuple[Bundle, None]:
    """Export the plain networks of several runs as one ensemble."""
    from manygates.commands.sources import load_source
    from zoo.export.write import Description, export_members

    runs: list[Trained] = []
    for source in (arguments.source, *arguments.members):
        if not is_run(source):
            raise BadInput(f"{source!r} is no training run (a folder with a recipe.json); an ensemble is made of runs")
        run = load_source(source, arguments.checkpoint)
        if len(run.members) != 1:
            kind = "an ensemble already" if run.members else "a random gated network"
            raise BadInput(f"{source} is {kind}; its ensemble is made of its own paths or members, export it alone")
        if runs and run.architecture != runs[0].architecture:
            expected = f"{runs[0].architecture} like {arguments.source}"
            raise BadInput(f"{source} holds {run.architecture}, expected {expected}")
        runs.append(run)
    first = runs[0]
    seeds = [run.training.seed for run in runs]
    training = dataclasses.replace(
        first.training,
        summary=f"{len(runs)} networks trained separately (seeds {', '.join(map(str, seeds))}); "
        f"each: {first.training.summary}",
        recipe={**first.training.recipe, "seeds": seeds},
        logs=tuple(log for run in runs for log in run.training.logs),
    )
    description = Description(
        name=arguments.name or f"{first.name}-ensemble",
        description=arguments.description or f"{len(runs)} separately trained {first.architecture.network}, averaged",
        method=first.method,
        training=training,
    )
    members = [run.network for run in runs]
    return export_members(arguments.out, members, first.architecture, description), None


def _add_to_own(arguments: argparse.Namespace) -> int:
    """Add int8 graphs to a bundle of the user's, its other files as they are."""
    from zoo.hub.source import resolve

    if not arguments.int8 or arguments.members or is_run(arguments.source):
        raise BadInput(
            "export needs --out DIR, the folder that will hold the bundle; only --int8 on a bundle of yours, which "
            "adds files to it, can do without"
        )
    source = resolve(arguments.source)
    if source.kind != "local" or source.folder is None:
        raise BadInput(
            f"--int8 without --out writes into a bundle of yours, and {arguments.source} is the package's or the "
            "hub's; name another folder with --out DIR"
        )
    _add_int8(arguments, source.folder, None)
    return DONE


def _add_int8(arguments: argparse.Namespace, folder: Path, earlier: Card | None) -> None:
    from zoo.export.write import add_int8

    bundle = add_int8(folder, images=arguments.calibration_images, seed=arguments.calibration_seed, earlier=earlier)
    assert bundle.card.int8 is not None
    say(
        f"int8 graphs of {', '.join(bundle.card.int8.variants)} added to {folder}, calibrated on "
        f"{bundle.card.int8.calibration.images} training images, checked against the weights"
    )


COMMANDS = {
    "export": Command("Write the bundle of a run or a model, its graphs checked against the weights.", _add, _export)
}
