"""The models that there are: list, show, pull, push, verify."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from manygates.arguments import Command, add_json, add_model
from manygates.output import DONE, NOT_HELD, print_check, print_foreign, print_json, say
from zoo.errors import BadInput, ChecksumMismatch, MissingFile
from zoo.vocabulary import PRECISIONS

if TYPE_CHECKING:
    from zoo.bundle.card import Check
    from zoo.hub.source import Found


def _add_list(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dataset", metavar="NAME", help="only models of this data set, such as cifar10")
    parser.add_argument("--method", metavar="NAME", help="only models trained by this method, such as trades")
    parser.add_argument(
        "--sort",
        metavar="BY",
        help="name (the default), method, clean, whitebox, transfer or autoattack; whitebox:8/255 names the radius",
    )
    parser.add_argument("--hub", action="store_true", help="what the hub has now; `list` shows it too from then on")
    parser.add_argument("--author", metavar="ORG", help="with --hub: whose models")
    add_json(parser)


def _list(arguments: argparse.Namespace) -> int:
    from zoo.hub.listing import documents, on_the_hub, select, tables
    from zoo.hub.source import keep_seen, known_models

    if arguments.author is not None and not arguments.hub:
        raise BadInput(f"--author {arguments.author} is for --hub, which asks the hub; `list` alone needs no network")
    models = on_the_hub(arguments.author) if arguments.hub else known_models(say)
    if arguments.hub:
        keep_seen(models, arguments.author)
    found = select(models, dataset=arguments.dataset, method=arguments.method, sort=arguments.sort)
    if arguments.json:
        print_json(documents(found))
    else:
        print(tables(found), end="")
    return DONE


def _add_show(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    add_json(parser)


def _show(arguments: argparse.Namespace) -> int:
    from zoo.bundle.readme import model_card
    from zoo.hub.source import HUB_PREFIX, LOCAL_PREFIX, find, known_model, resolve

    filed = None
    try:
        resolve(arguments.model)
    except BadInput:  # perhaps a model whose card alone comes with manygates
        known = known_model(arguments.model)
        filed = known if known is not None and not known.stranger else None
    if filed is None:
        found = find(arguments.model)
        source, card = found.name, found.card
    else:
        source, card = f"{LOCAL_PREFIX}models/{filed.card.name}", filed.card
    on_hub = source.startswith(HUB_PREFIX)
    if arguments.json and on_hub:
        print_json({"source": source, **json.loads(card.to_json())})
    elif arguments.json:
        sys.stdout.write(card.to_json())
    else:
        text = model_card(card, source if on_hub or filed is not None else None)
        print_foreign(text.split("---\n", 2)[-1].strip())
        if on_hub:
            print(f"\nThis is {source}")
        if filed is not None:
            print(f"\nIt does not come with manygates: {filed.how_to_get()}")
    return DONE


def _add_pull(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        "--variant",
        nargs="+",
        action="extend",
        default=[],
        metavar="V",
        help="only the graphs of these variants, and no weights: what the server needs",
    )
    parser.add_argument("--precision", choices=PRECISIONS, help="only the graphs of this precision")
    parser.add_argument("--out", "--to", type=Path, metavar="DIR", help="folder that will hold the bundle")
    add_json(parser)


def _pull(arguments: argparse.Namespace) -> int:
    from zoo.hub.pull import pull

    found = pull(arguments.model, variants=arguments.variant, precision=arguments.precision, out=arguments.out)
    if arguments.json:
        files = {name: dataclasses.asdict(found.card.files[name]) for name in found.files}
        print_json({"name": found.card.name, "source": found.source, "folder": str(found.folder), "files": files})
    elif arguments.out is None:
        print(found.folder)
    if arguments.out is not None:
        say(f"{found.card.name} is in {found.folder}, checked; it came from {found.source}")
    return DONE


def _add_push(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", metavar="BUNDLE", help="a bundle's folder, or a bundled model")
    parser.add_argument("repository", metavar="ORGANISATION/NAME", help="created if there is none")
    parser.add_argument("--create-pr", action="store_true", help="propose the change in a pull request")
    parser.add_argument("--private", action="store_true", help="if the repository is created: only you may read it")
    parser.add_argument("--branch", metavar="BRANCH", help="main by default; created if there is none")
    parser.add_argument("--message", metavar="TEXT", help="of the commit")
    parser.add_argument("--dry-run", action="store_true", help="check everything and say what would be done")


def _push(arguments: argparse.Namespace) -> int:
    from zoo.hub.push import plan_push, push
    from zoo.hub.source import HUB_PREFIX, resolve

    source = resolve(arguments.bundle)
    if source.kind == "hub":
        raise BadInput(
            f"{arguments.bundle} is on the hub already; to publish a copy, first "
            f"`manygates pull {arguments.bundle} --out DIR`, then push DIR"
        )
    plan = plan_push(
        source.open(),
        arguments.repository.removeprefix(HUB_PREFIX),
        branch=arguments.branch,
        pull_request=arguments.create_pr,
        private=arguments.private,
        message=arguments.message,
    )
    if arguments.dry_run:
        for line in plan.described():
            print(line)
        return DONE
    pushed = push(plan)
    if pushed.changed:
        print(pushed.url)
        say(f"{plan.bundle.card.name} is {pushed.source}")
    else:
        say(f"{plan.repository} holds the very same files already, as {pushed.source}; nothing was pushed")
    return DONE


def _verify(arguments: argparse.Namespace) -> int:
    from zoo.hub.source import find

    found = find(arguments.model)  # no bundle at all is bad input, not a failed check
    checks, skipped = _checks(found)
    held = all(check.held for check in checks)
    if arguments.json:
        rows = [dataclasses.asdict(check) for check in checks]
        print_json({"model": found.name, "held": held, "checks": rows, "skipped": skipped})
    else:
        for check in checks:
            print_check(check)
        if skipped:
            print(f"skip  {skipped}")
        if found.name != arguments.model:
            print(f"\nThis is {found.name}")
    return DONE if held else NOT_HELD


def _checks(found: Found) -> tuple[list[Check], str]:
    """Check a bundle's files, and its graphs against its weights; also say why the graphs were not checked."""
    from zoo.bundle.card import Check

    card = found.card
    try:
        bundle = found.open()
    except (ChecksumMismatch, MissingFile) as error:
        return [Check(name="checksums", held=False, detail=str(error))], ""
    checks = [Check(name="checksums", held=True, detail=f"{len(card.files)} files are what the card says")]
    lacking = ""
    if not any(name.endswith(".safetensors") for name in card.files):
        lacking = "the bundle holds none (`pull --variant` leaves them)"
    elif importlib.util.find_spec("torch") is None:
        lacking = "torch is not installed; pip install 'manygates[train]'"
    if lacking:
        return checks, f"the graphs are not compared with the weights: {lacking}"
    from zoo.export.verify import verify_graphs

    return [*checks, *verify_graphs(bundle)], ""


COMMANDS = {
    "list": Command("The models of the zoo with their measured numbers; needs no network.", _add_list, _list),
    "show": Command("One model's card.", _add_show, _show),
    "pull": Command("Fetch a model, verify it and say where it is, or copy it to a folder.", _add_pull, _pull),
    "push": Command(
        "Publish a bundle on the Hugging Face hub, in one commit; needs `hf auth login`.", _add_push, _push
    ),
    "verify": Command("Checksums, and every graph against the weights.", _add_show, _verify),
}
