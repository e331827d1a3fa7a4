"""Numbers for the card: evaluate, lint."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manygates.arguments import Command, add_json, add_model, add_seed, count, repeating, usable_device
from manygates.output import DONE, NOT_HELD, print_finding, print_json, print_result, say
from zoo.errors import BadInput
from zoo.files import check_writable
from zoo.vocabulary import PRECISIONS, PROTOCOLS, VARIANTS

if TYPE_CHECKING:
    from zoo.bundle.bundle import Bundle
    from zoo.bundle.card import Card, Lint
    from zoo.evaluation import Request
    from zoo.hub.source import Source

PATHS_COMPARED = 5
UNSAID = {"precision": "fp32", "paths": PATHS_COMPARED}
"""Defaults that the command which repeats a measurement leaves out."""
ASKED = (
    *("protocol", "variant", "eps", "precision", "images", "steps", "restarts"),
    *("draws", "queries", "paths", "corrupted", "surrogates", "seed"),
)
"""Options of `evaluate` that a `Request` holds."""


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--protocol", required=True, metavar="P", help=f"one of {', '.join(PROTOCOLS)}")
    parser.add_argument("--variant", choices=VARIANTS, default="single")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="int8: judge the variant's int8 graph")
    radii = "radii such as 8/255; by default 0.01 0.03, blackbox 0.01 to 0.07"
    parser.add_argument("--eps", nargs="+", default=[], metavar="EPS", help=radii)
    for option, text in (
        ("--images", "test images; 10,000 clean and 1,000 attacked by default"),
        ("--steps", "gradient steps; the protocol's own number by default"),
        ("--restarts", "random starts; the protocol's own number by default"),
        ("--draws", "draws of the gates on which a random model is judged"),
        ("--queries", "of the protocol queries, per image; 1,000 by default"),
    ):
        parser.add_argument(option, type=count(), metavar="N", help=text)
    parser.add_argument("--paths", type=count(2), default=PATHS_COMPARED, metavar="K", help="of a transfer matrix")
    parser.add_argument("--surrogates", nargs="+", default=[], metavar="MODEL", help="what transfer attacks start from")
    parser.add_argument("--set", type=Path, metavar="DIR", help="adversarial set: reused, or made if DIR is empty")
    parser.add_argument("--corrupted", type=Path, metavar="DIR", help="folder with the official CIFAR-10-C files")
    add_seed(parser)
    parser.add_argument("--device", default="cpu", metavar="DEVICE")
    parser.add_argument("--fresh", action="store_true", help="begin again instead of going on with an interrupted run")
    parser.add_argument("--record", action="store_true", help="write the results into the card of a local bundle")
    add_json(parser)


def _evaluate(arguments: argparse.Namespace) -> int:
    from zoo.evaluation import evaluate, ledger_of
    from zoo.hub.source import resolve

    source = resolve(arguments.model)
    if arguments.record:
        _check_recordable(source, arguments)
    bundle = source.open(lambda card: _files(card, [arguments.variant], arguments.precision))
    request = _request(arguments, _repeatable_name(source, arguments.model, bundle.card.name))
    device = usable_device(arguments.device)
    ledger = ledger_of(bundle, request, device=device)
    if not arguments.fresh and len(ledger):
        say(f"going on with an interrupted evaluation: {len(ledger)} batches are done (--fresh begins again)")
    try:
        results = evaluate(bundle, request, device=device, fresh=arguments.fresh, ledger=ledger)
    except KeyboardInterrupt:
        say(f"interrupted; {len(ledger)} batches are kept, the same command goes on there")
        raise
    if arguments.json:
        told = [{key: value for key, value in dataclasses.asdict(one).items() if value is not None} for one in results]
        print_json(told if len(told) > 1 else told[0])
    else:
        for result in results:
            print_result(result)
    failed = [check for result in results for check in result.checks if not check.held]
    for check in failed:
        say(f"ALARM: {check.name} does not hold ({check.detail}); this number may flatter the model")
    if arguments.record and failed:
        say("not recorded: a result whose checks do not hold enters no card")
    elif arguments.record:
        from zoo.bundle.record import record_results

        record_results(bundle.folder, results)
        say(f"recorded in {bundle.folder / 'card.json'}")
    return NOT_HELD if failed else DONE


def _request(arguments: argparse.Namespace, name: str) -> Request:
    """Return what the arguments ask for; `name` is how the command that repeats it names the model."""
    from zoo.evaluation import Request, parse_eps

    asked = {option: getattr(arguments, option) for option in ASKED}
    parsed = {"eps": tuple(map(parse_eps, arguments.eps)), "surrogates": tuple(arguments.surrogates)}
    command = _repeating(arguments, name, asked)
    return Request(**{**asked, **parsed}, adversarial_set=arguments.set, command=command)


def _repeating(arguments: argparse.Namespace, name: str, asked: dict[str, Any]) -> str:
    """Return the command that repeats this, without what is as it is by default."""
    told = {option: value for option, value in asked.items() if value != UNSAID.get(option)}
    return repeating(arguments.command, name, **told)


def _add_lint(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument("--variant", choices=VARIANTS, help="one variant; all of the model's by default")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="int8: ask the int8 graphs")
    parser.add_argument("--eps", default="8/255", metavar="EPS")
    parser.add_argument("--images", type=count(), metavar="N", help="test images; 100 by default")
    parser.add_argument("--queries", type=count(), metavar="N", help="of the Square attack, per image")
    parser.add_argument("--surrogate", metavar="MODEL", help="another model for transfer attacks")
    add_seed(parser)
    parser.add_argument("--device", default="cpu", metavar="DEVICE")
    parser.add_argument("--record", action="store_true", help="write the findings into the card of a local bundle")
    add_json(parser)


def _lint(arguments: argparse.Namespace) -> int:
    from zoo.bundle.record import record_lint
    from zoo.evaluation import parse_eps
    from zoo.hub.source import resolve

    source = resolve(arguments.model)
    if arguments.record:
        _check_recordable(source, arguments)
    eps, device = parse_eps(arguments.eps), usable_device(arguments.device)
    bundle = source.open(lambda card: _files(card, _variants(arguments, card), arguments.precision, graphs=True))
    name = _repeatable_name(source, arguments.model, bundle.card.name)
    found = []
    for variant in _variants(arguments, bundle.card):
        lint = _lint_variant(arguments, bundle, variant, name, eps, device)
        found.append(lint)
        if arguments.record:
            record_lint(bundle.folder, lint)
            say(f"recorded in {bundle.folder / 'card.json'}")
    alarms = [finding for lint in found for finding in lint.alarms]
    if arguments.json:
        print_json([{**dataclasses.asdict(lint), "passed": not lint.alarms} for lint in found])
    else:
        print(f"{len(alarms)} alarm{'' if len(alarms) == 1 else 's'}" if alarms else "no alarm")
    return NOT_HELD if alarms else DONE


def _variants(arguments: argparse.Namespace, card: Card) -> list[str]:
    """Return the variants that are linted: the named one, or all that have a graph in the precision.

    Raises:
        BadInput: none is named, and no variant has an int8 graph.
    """
    from zoo.bundle.bundle import variants_in

    variants = [arguments.variant] if arguments.variant else list(variants_in(card, arguments.precision))
    if not variants:
        raise BadInput(f"{card.name} has no int8 graphs; `manygates export MODEL --int8` adds some to your bundle")
    return variants


def _lint_variant(
    arguments: argparse.Namespace, bundle: Bundle, variant: str, name: str, eps: Fraction, device: str
) -> Lint:
    from zoo.evaluation.linter.bundle import lint_bundle

    asked = {option: getattr(arguments, option) for option in ("precision", "images", "queries", "surrogate", "seed")}
    told = {"variant": variant, "precision": arguments.precision, "eps": arguments.eps}
    command = _repeating(arguments, name, told | asked)
    if not arguments.json:
        precision = "" if arguments.precision == "fp32" else f" {arguments.precision}"
        print(f"{bundle.card.name} {variant}{precision}", flush=True)
    if arguments.queries is None:
        del asked["queries"]
    watch = None if arguments.json else print_finding
    return lint_bundle(bundle, variant, eps=eps, device=device, command=command, watch=watch, **asked)


def _files(card: Card, variants: Sequence[str], precision: str, *, graphs: bool = False) -> list[str]:
    """Return the files that are judged: the weights, and the int8 graphs of the variants, or their graphs at all."""
    from zoo.bundle.bundle import int8_file, variants_in
    from zoo.weights.models import weights_file

    there = [variant for variant in variants if variant in variants_in(card, precision)]
    if precision == "int8":
        return [weights_file(card), *map(int8_file, there)]
    return [weights_file(card), *(f"{variant}.onnx" for variant in there if graphs)]


def _check_recordable(source: Source, arguments: argparse.Namespace) -> None:
    if source.kind != "local" or source.folder is None:
        raise BadInput(
            f"--record writes into a bundle of yours, and {arguments.model} is the package's or the hub's; "
            f"first manygates pull {arguments.model} --to DIR, then {arguments.command} local-dir:DIR"
        )
    check_writable(source.folder)  # before the work, which may take hours


def _repeatable_name(source: Source, model: str, name: str) -> str:
    """Return how to name the model in a command that repeats this: a bundle of the catalogue by its name."""
    from zoo.hub.source import bundled_dir

    elsewhere = source.folder is not None and source.folder.resolve() != (bundled_dir() / name).resolve()
    return model if elsewhere else name


COMMANDS = {
    "evaluate": Command("Measure a model by a protocol.", _add_evaluate, _evaluate),
    "lint": Command(
        "Ask whether a model's robustness is real: the sanity checks of honest evaluation.", _add_lint, _lint
    ),
}
