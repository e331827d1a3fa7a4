"""manygates: adversarially robust image classifiers, from training to serving.

The command line (`manygates --help`) and the short public API:

    network = manygates.load("eio-resnet20-cifar10")            # an nn.Module on images in [0, 1]
    rgn = manygates.randomly_gate(network, candidates=2)        # any traceable CNN
    single = manygates.derive(rgn, path)
    adversarial = manygates.attacks.pgd(single, images, labels, manygates.attacks.LinfBudget(eps=8 / 255))

Nothing heavy is imported before it is needed: `manygates serve` never loads torch.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import importlib.util
import json
import os
import random
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

    from serving.operations.settings import Settings
    from zoo.bundle.card import Card, Finding, Result, Table, Training
    from zoo.gates.rgn import RandomGatedNetwork
    from zoo.weights.checkpoint import Architecture

__version__ = "0.1.0"
__all__ = ["attacks", "derive", "evaluate", "load", "main", "randomly_gate"]

DONE, NOT_HELD, WRONG = 0, 1, 2
VARIANTS = ("single", "ensemble", "gated")
ATTACK_NAMES = ("fgsm", "pgd", "mi-fgsm", "m-di2-fgsm", "apgd", "apgd-t", "square", "rays")
PROTOCOLS = (
    "clean",
    "whitebox",
    "blackbox",
    "transfer-matrix",
    "diversity",
    "autoattack",
    "random-gates",
    "corruptions",
    "exits",
    "queries",
)
PRECISIONS = ("fp32", "int8")
JUDGING_DRAWS = 20
COUNTS = {
    **dict.fromkeys(("calibration_images", "images", "queries", "draws", "steps", "restarts", "paths"), 1),
    "finetune": 0,
    "evaluate paths": 2,  # a matrix compares them
}
"""Options that count something, of every command or of one -> the least they may be."""
MOST_COUNTED = 10**9  # as in a card
SEEDS = ("seed", "calibration_seed")
MOST_SEED = 2**63 - 1  # what every generator of random numbers here takes
ATTACK_FILES = ("clean.png", "adversarial.png", "perturbation.png", "report.json")

# name -> (module, attribute); resolved on first use
_API = {
    "attacks": ("zoo.attacks", None),
    "derive": ("zoo.gates.derive", "derive"),
    "evaluate": ("zoo.evaluation", "evaluate"),
    "randomly_gate": ("zoo.gates.rgn", "randomly_gate"),
}


def __getattr__(name: str) -> Any:
    if name not in _API:
        raise AttributeError(f"module 'manygates' has no attribute {name!r}; it has {', '.join(__all__)}")
    module, attribute = _API[name]
    loaded = importlib.import_module(module)
    return loaded if attribute is None else getattr(loaded, attribute)


def load(model: str, variant: str = "single") -> nn.Module:
    """Return what a variant deploys, in evaluation mode, on images (batch, channel, height, width) in [0, 1].

    Args:
        model: a catalogue name, `local-dir:FOLDER` or `hf-hub:ORGANISATION/NAME[@REVISION]`.
        variant: "single" (one derived path), "ensemble" (k paths averaged) or "gated" (a fresh path per image).

    Raises:
        ManygatesError: no such model or variant, or a bundle that is not what its card says.
    """
    from zoo.hub.source import open_model, pin
    from zoo.weights.models import load_variant, weights_file

    source, card = pin(model)
    return load_variant(open_model(source, only=(weights_file(card),)), variant)


# --- commands: each takes the parsed arguments and returns an exit code ---


def _list(arguments: argparse.Namespace) -> int:
    from zoo.errors import BadInput
    from zoo.hub.catalog import load, on_the_hub
    from zoo.hub.listing import documents, select, tables

    if arguments.author is not None and not arguments.hub:
        raise BadInput(f"--author {arguments.author} is for --hub, which asks the hub; `list` alone needs no network")
    entries = on_the_hub(arguments.author) if arguments.hub else load(_say)
    found = select(entries, dataset=arguments.dataset, method=arguments.method, sort=arguments.sort)
    if arguments.json:
        _print_json(documents(found))
    else:
        print(tables(found), end="")
    return DONE


def _catalog_build(arguments: argparse.Namespace) -> int:
    from zoo.hub.catalog import CATALOG_FILE, build, package_dir, write

    file = arguments.out or package_dir() / CATALOG_FILE
    entries = build(_recipes())
    write(entries, file)
    bundled = sum(entry.where.bundled for entry in entries)
    _say(f"{file} has what the cards say (models: {len(entries)}, bundled: {bundled})")
    return DONE


def _catalog_refresh(arguments: argparse.Namespace) -> int:
    from zoo.hub.catalog import refresh

    file, entries = refresh(arguments.author)
    _say(f"{file} has what the hub's cards say now (models: {len(entries)}); `manygates list` shows them")
    return DONE


def _recipes() -> dict[str, dict[str, Any]]:
    from training.recipes import RECIPES, recipe, resolved

    return {name: resolved(recipe(name)) for name in RECIPES}


def _show(arguments: argparse.Namespace) -> int:
    from zoo.bundle.readme import model_card
    from zoo.errors import BadInput
    from zoo.hub import catalog
    from zoo.hub.source import HUB_PREFIX, LOCAL_PREFIX, pin, resolve
    from zoo.report.wording import printable

    unbundled = None
    try:
        resolve(arguments.model)
    except BadInput:  # perhaps a model whose card alone comes with manygates
        known = catalog.entry(arguments.model)
        unbundled = known if known is not None and not known.where.bundled else None
    filed = catalog.card_of(arguments.model) if unbundled is not None else None
    source, card = (f"{LOCAL_PREFIX}models/{filed.name}", filed) if filed is not None else pin(arguments.model)
    on_hub = source.startswith(HUB_PREFIX)
    if arguments.json and on_hub:
        _print_json({"source": source, **json.loads(card.to_json())})
    elif arguments.json:
        sys.stdout.write(card.to_json())
    else:
        text = model_card(card, source if on_hub or filed is not None else None)
        print(printable(text.split("---\n", 2)[-1].strip()))
        if on_hub:
            print(f"\nThis is {source}")
        if filed is not None and unbundled is not None:
            print(f"\nIt does not come with manygates: {unbundled.how_to_get()}")
    return DONE


def _pull(arguments: argparse.Namespace) -> int:
    from zoo.hub.fetch import pull

    found = pull(arguments.model, variants=arguments.variant, precision=arguments.precision, out=arguments.out)
    if arguments.json:
        files = {
            name: {"sha256": found.card.files[name].sha256, "size": found.card.files[name].size} for name in found.files
        }
        document = {"name": found.card.name, "source": found.source, "folder": str(found.folder), "files": files}
        _print_json(document)
    elif arguments.out is None:
        print(found.folder)
    if arguments.out is not None:
        _say(f"{found.card.name} is in {found.folder}, checked; it came from {found.source}")
    return DONE


def _push(arguments: argparse.Namespace) -> int:
    from zoo.errors import BadInput
    from zoo.hub.hub import plan_push, push
    from zoo.hub.source import HUB_PREFIX, open_model, resolve

    if resolve(arguments.bundle).kind == "hub":
        raise BadInput(
            f"{arguments.bundle} is on the hub already; to publish a copy, first "
            f"`manygates pull {arguments.bundle} --out DIR`, then push DIR"
        )
    plan = plan_push(
        open_model(arguments.bundle),
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
        _say(f"{plan.bundle.card.name} is {pushed.source}")
    else:
        _say(f"{plan.repository} holds the very same files already, as {pushed.source}; nothing was pushed")
    return DONE


def _verify(arguments: argparse.Namespace) -> int:
    from zoo.bundle.card import Check
    from zoo.errors import ChecksumMismatch, MissingFile
    from zoo.hub.source import open_model, pin

    source, card = pin(arguments.model)  # no bundle at all is bad input, not a failed check
    skipped = ""
    try:
        bundle = open_model(source, only=card.files)
    except (ChecksumMismatch, MissingFile) as error:
        checks = [Check(name="checksums", held=False, detail=str(error))]
    else:
        checks = [Check(name="checksums", held=True, detail=f"{len(card.files)} files are what the card says")]
        lacking = ""
        if not any(name.endswith(".safetensors") for name in card.files):
            lacking = "the bundle holds none (`pull --variant` leaves them)"
        elif importlib.util.find_spec("torch") is None:
            lacking = "torch is not installed; pip install 'manygates[train]'"
        if lacking:
            skipped = f"the graphs are not compared with the weights: {lacking}"
        else:
            from zoo.export.write import verify_graphs

            checks += verify_graphs(bundle)
    held = all(check.held for check in checks)
    if arguments.json:
        rows = [{"name": check.name, "held": check.held, "detail": check.detail} for check in checks]
        _print_json({"model": source, "held": held, "checks": rows, "skipped": skipped})
    else:
        for check in checks:
            print(f"{'ok  ' if check.held else 'FAIL'}  {check.name}: {check.detail}")
        if skipped:
            print(f"skip  {skipped}")
        if source != arguments.model:
            print(f"\nThis is {source}")
    return DONE if held else NOT_HELD


def _train(arguments: argparse.Namespace) -> int:
    from training.loop import train
    from training.recipes import override, recipe

    train(
        override(recipe(arguments.recipe), arguments.set),
        arguments.out,
        resume=arguments.resume,
        device=arguments.device and _device(arguments.device),
    )
    if os.environ.get("RANK", "0") == "0":  # under torchrun every rank comes here
        _say(f"trained; next: manygates export {arguments.out} --out DIR")
    return DONE


def _methods(arguments: argparse.Namespace) -> int:
    from training.methods import markdown_table, methods

    if arguments.json:
        import dataclasses

        _print_json([dataclasses.asdict(method) for method in methods()])
    else:
        print(markdown_table(methods()), end="")
    return DONE


def _derive(arguments: argparse.Namespace) -> int:
    import dataclasses

    from zoo.bundle.bundle import check_target
    from zoo.export.write import Description, export_members
    from zoo.gates.derive import recalibrate

    check_target(arguments.out)
    chosen, architecture, training, name, what, choice = _derivable(arguments)
    steps = [f"derived along {', '.join(choice['paths'])}"] if "paths" in choice else [f"derived: {what.lower()}"]
    members: list[nn.Module] = []
    for member in chosen:
        if arguments.finetune:
            from training.finetune import finetune

            member = finetune(member, architecture, arguments.finetune, seed=arguments.seed)
        if arguments.recalibrate:
            recalibrate(member, _augmented_batches(architecture.dataset, arguments.seed))
        members.append(member)
    if arguments.finetune:
        steps.append(f"{arguments.finetune} epochs of fine-tuning on clean images")
    if arguments.recalibrate:
        steps.append("BatchNorm re-calibrated on augmented training images")
    summary = "; ".join([training.summary, *steps])
    derived = {
        "from": name,
        **choice,
        "finetune_epochs": arguments.finetune,
        "recalibrated": arguments.recalibrate,
        "seed": arguments.seed,
    }
    description = Description(
        name=arguments.name or f"{name}-derived",
        description=f"{what} of {name}",
        method=_method(training),
        training=dataclasses.replace(training, summary=summary, recipe={**training.recipe, "derived": derived}),
    )
    bundle = export_members(arguments.out, members, architecture, description)
    _say(f"{bundle.card.name}: {summary}; in {arguments.out}")
    return DONE


def _derivable(
    arguments: argparse.Namespace,
) -> tuple[list[nn.Module], Architecture, Training, str, str, dict[str, Any]]:
    """Load the plain networks that a derivation begins with: paths of a random gated network, or members as trained.

    Returns the networks, their architecture, training and name, what was done in words, and the same for the card.
    """
    from zoo.errors import BadInput
    from zoo.gates.derive import derive
    from zoo.gates.rgn import RandomGatedNetwork

    network, architecture, training, name, members = _derivation_source(arguments.source)
    if isinstance(network, RandomGatedNetwork):
        if arguments.member:
            raise BadInput(f"{name} is a random gated network, which has paths and no members; use --path or --paths")
        chosen = _chosen_paths(arguments, network)
        texts = [_path_text(path) for path in chosen]
        what = "An ensemble of paths" if len(chosen) > 1 else "One path"
        return [derive(network, path) for path in chosen], architecture.member, training, name, what, {"paths": texts}
    if arguments.path or arguments.paths is not None:
        raise BadInput(
            f"{name} is a plain network without gates, so no path can be derived from it; leave --path and --paths out"
            + (f", or choose of its {len(members)} members with --member" if len(members) > 1 else "")
        )
    numbers = arguments.member or list(range(1, len(members) + 1))
    if wrong := [number for number in numbers if not 1 <= number <= len(members)]:
        raise BadInput(f"{name} has no member {wrong[0]}, expected 1 to {len(members)}")
    what = "The network" if len(members) == 1 else f"Members {', '.join(map(str, numbers))}"
    taken = [members[number - 1] for number in numbers]
    return taken, architecture.member, training, name, what, {"members": numbers}


def _together(arguments: argparse.Namespace) -> int:
    """Export the plain networks of several runs as one ensemble."""
    import dataclasses

    from zoo.bundle.bundle import check_target
    from zoo.errors import BadInput
    from zoo.export.write import Description, export_members
    from zoo.gates.rgn import RandomGatedNetwork

    check_target(arguments.out)
    members: list[nn.Module] = []
    logs: list[Table] = []
    first = None
    for source in (arguments.source, *arguments.members):
        if not _is_run(source):
            raise BadInput(f"{source!r} is no training run (a folder with a recipe.json); an ensemble is made of runs")
        network, architecture, training, name, _, _ = _run_source(source, arguments.checkpoint)
        if isinstance(network, RandomGatedNetwork) or architecture.members > 1:
            kind = "a random gated network" if architecture.members == 1 else "an ensemble already"
            raise BadInput(f"{source} is {kind}; its ensemble is made of its own paths or members, export it alone")
        if first is None:
            first = (architecture, training, name, [training.seed])
        elif architecture != first[0]:
            raise BadInput(f"{source} holds {architecture}, expected {first[0]} like {arguments.source}")
        else:
            first[3].append(training.seed)
        members.append(network)
        logs += training.logs
    assert first is not None
    architecture, training, name, seeds = first
    summary = (
        f"{len(members)} networks trained separately (seeds {', '.join(map(str, seeds))}); each: {training.summary}"
    )
    training = dataclasses.replace(
        training, summary=summary, recipe={**training.recipe, "seeds": seeds}, logs=tuple(logs)
    )
    description = Description(
        name=arguments.name or f"{name}-ensemble",
        description=arguments.description or f"{len(members)} separately trained {architecture.network}, averaged",
        method=_method(training),
        training=training,
    )
    bundle = export_members(arguments.out, members, architecture, description)
    _say(f"{bundle.card.name}: {', '.join(bundle.card.variants)} in {arguments.out}, checked against the weights")
    if arguments.int8:
        _add_int8(arguments, arguments.out, None)
    return DONE


def _export(arguments: argparse.Namespace) -> int:
    from zoo.bundle.bundle import check_target
    from zoo.export.write import Description, export_members, export_rgn, without_int8
    from zoo.gates.rgn import RandomGatedNetwork

    if arguments.out is None:
        return _export_beside(arguments)
    if arguments.members:
        return _together(arguments)
    check_target(arguments.out)
    network, architecture, training, name, chosen, members = _export_source(arguments)
    card = None if _is_run(arguments.source) else _card_of(arguments.source)
    said = training.recipe.get("description", f"{name}, exported") if card is None else card.description
    description = Description(
        name=arguments.name or name,
        description=arguments.description or said,
        method=_method(training),
        training=training,
        results=() if card is None else without_int8(card).results,  # the same weights and paths, so the same numbers
        lint=() if card is None else without_int8(card).lint,
    )
    if isinstance(network, RandomGatedNetwork):
        bundle = export_rgn(arguments.out, network, architecture, description, single=chosen[0], ensemble=chosen[1:])
    else:
        bundle = export_members(arguments.out, members, architecture, description)
    _say(f"{bundle.card.name}: {', '.join(bundle.card.variants)} in {arguments.out}, checked against the weights")
    if arguments.int8:
        _add_int8(arguments, arguments.out, card)
    elif card is not None and card.int8 is not None:
        _say("its int8 graphs, and what was measured on them, are left out; --int8 makes them again")
    return DONE


def _export_beside(arguments: argparse.Namespace) -> int:
    """Add int8 graphs to a bundle of the user's, its other files as they are."""
    from zoo.errors import BadInput
    from zoo.hub.source import resolve

    if not arguments.int8 or arguments.members or _is_run(arguments.source):
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
    _say(
        f"int8 graphs of {', '.join(bundle.card.int8.variants)} added to {folder}, calibrated on "
        f"{bundle.card.int8.calibration.images} training images, checked against the weights"
    )


def _evaluate(arguments: argparse.Namespace) -> int:
    from zoo.bundle.bundle import int8_file
    from zoo.evaluation import Request, evaluate, parse_eps, resumable
    from zoo.hub.source import open_model
    from zoo.weights.models import weights_file

    _check_recordable(arguments)
    card = open_model(arguments.model, only=()).card
    files = [weights_file(card), int8_file(arguments.variant)]
    bundle = open_model(arguments.model, only=[name for name in files if name == files[0] or _rounds(arguments, card)])
    request = Request(
        protocol=arguments.protocol,
        variant=arguments.variant,
        eps=tuple(parse_eps(text) for text in arguments.eps),
        images=arguments.images,
        steps=arguments.steps,
        restarts=arguments.restarts,
        draws=arguments.draws,
        paths=arguments.paths,
        surrogates=tuple(arguments.surrogates),
        adversarial_set=arguments.set,
        corrupted=arguments.corrupted,
        precision=arguments.precision,
        queries=arguments.queries,
        seed=arguments.seed,
        command=_command_of(arguments, card.name),
    )
    device = _device(arguments.device)
    if not arguments.fresh and (done := resumable(bundle, request, device=device)):
        _say(f"going on with an interrupted evaluation: {done} batches are done (--fresh begins again)")
    try:
        results = evaluate(bundle, request, device=device, fresh=arguments.fresh)
    except KeyboardInterrupt:
        _say(
            f"interrupted; {resumable(bundle, request, device=device)} batches are kept, the same command goes on there"
        )
        raise
    document = [_plain_json(result) for result in results]
    if arguments.json:
        _print_json(document if len(results) > 1 else document[0])
    else:
        for result in results:
            _print_result(result)
    failed = [check for result in results for check in result.checks if not check.held]
    for check in failed:
        _say(f"ALARM: {check.name} does not hold ({check.detail}); this number may flatter the model")
    if arguments.record and failed:
        _say("not recorded: a result whose checks do not hold enters no card")
    elif arguments.record:
        from zoo.bundle.bundle import record_results

        record_results(bundle.folder, results)
        _say(f"recorded in {bundle.folder / 'card.json'}")
    return NOT_HELD if failed else DONE


def _lint(arguments: argparse.Namespace) -> int:
    from zoo.bundle.bundle import int8_file, record_lint
    from zoo.errors import BadInput
    from zoo.evaluation import parse_eps
    from zoo.evaluation.linter.bundle import lint_bundle
    from zoo.hub.source import open_model
    from zoo.weights.models import weights_file

    _check_recordable(arguments)
    eps, device = parse_eps(arguments.eps), _device(arguments.device)
    card = open_model(arguments.model, only=()).card
    rounded = arguments.precision == "int8"
    known = card.variants if not rounded else () if card.int8 is None else card.int8.variants
    variants = [arguments.variant] if arguments.variant else list(known)
    if not variants:
        raise BadInput(
            f"{card.name} has no int8 graphs; `manygates export MODEL --int8` adds some to a bundle of yours"
        )
    graphs = [int8_file(name) if rounded else f"{name}.onnx" for name in variants if name in known]
    bundle = open_model(arguments.model, only=(weights_file(card), *graphs))
    found = []
    for variant in variants:
        parts = [
            "manygates",
            "lint",
            _repeatable_name(arguments, card.name),
            "--variant",
            variant,
            *(["--precision", "int8"] if rounded else []),
            "--eps",
            arguments.eps,
        ]
        parts += ["--images", str(arguments.images)] if arguments.images is not None else []
        parts += ["--queries", str(arguments.queries)] if arguments.queries is not None else []
        parts += ["--surrogate", arguments.surrogate] if arguments.surrogate else []
        options = {} if arguments.queries is None else {"queries": arguments.queries}
        if not arguments.json:
            print(f"{card.name} {variant}{' int8' if rounded else ''}", flush=True)
        lint = lint_bundle(
            bundle,
            variant,
            eps=eps,
            images=arguments.images,
            seed=arguments.seed,
            surrogate=arguments.surrogate,
            device=device,
            precision=arguments.precision,
            command=shlex.join([*parts, "--seed", str(arguments.seed)]),
            watch=None if arguments.json else _print_finding,
            **options,
        )
        found.append(lint)
        if arguments.record:
            record_lint(bundle.folder, lint)
            _say(f"recorded in {bundle.folder / 'card.json'}")
    alarms = [finding for lint in found for finding in lint.alarms]
    if arguments.json:
        import dataclasses

        _print_json([{**dataclasses.asdict(lint), "passed": not lint.alarms} for lint in found])
    else:
        print(f"{len(alarms)} alarm{'' if len(alarms) == 1 else 's'}" if alarms else "no alarm")
    return NOT_HELD if alarms else DONE


def _print_finding(finding: Finding) -> None:
    verdict = "ALARM" if finding.verdict == "alarm" else finding.verdict
    print(f"  {verdict:<8}{finding.code:<4}{finding.name}: {finding.figure}", flush=True)
    if finding.verdict == "alarm":
        print(f"{'':<14}{finding.meaning}", flush=True)


def _report(arguments: argparse.Namespace) -> int:
    from zoo.errors import BadInput
    from zoo.hub.source import open_model
    from zoo.report import write_report

    if arguments.zoo:
        if arguments.models:
            raise BadInput(f"--zoo draws every model, so leave {arguments.models[0]!r} out; or leave --zoo out")
        from zoo.hub.catalog import cards, load
        from zoo.report.leaderboard import write_leaderboard

        trained = {entry.name: entry.trained for entry in load(_say)}
        figures = write_leaderboard(cards(), arguments.out, trained=trained)
        _say(f"the leaderboard is in {arguments.out}; figures: {', '.join(map(str, figures)) or 'none'}")
        return DONE
    if not arguments.models:
        raise BadInput("report got no model; name one or more, or write --zoo for all of them")
    page = write_report([open_model(model, only=()).card for model in arguments.models], arguments.out)
    _say(f"the report is in {page}; its figures and a Markdown version are beside it")
    return DONE


def _attack(arguments: argparse.Namespace) -> int:
    import torch

    from zoo.attacks import Budget, L2Budget, LinfBudget, to_grid
    from zoo.attacks.checks import asked
    from zoo.attacks.registry import ATTACKS, Settings, attack_named, linf_of
    from zoo.attacks.remote import RemoteModel, eight_bit
    from zoo.errors import BadInput
    from zoo.evaluation import parse_eps
    from zoo.files import replace_directory, write_json_atomic
    from zoo.hub.source import open_model
    from zoo.pictures import read_image, save_png
    from zoo.weights.models import load_variant, weights_file

    strangers = {entry.name for entry in arguments.out.iterdir()} if arguments.out.is_dir() else set()
    strangers -= set(ATTACK_FILES)
    if strangers:
        raise BadInput(
            f"{arguments.out} holds {min(strangers)!r}, which is no result of an attack and would be lost; "
            "choose an empty or new folder"
        )
    card = open_model(arguments.model, only=()).card
    chosen = attack_named(arguments.attack)
    eps = parse_eps(arguments.eps, arguments.norm)
    if arguments.norm == "linf":
        budget: Budget = LinfBudget(eps=float(eps), steps=arguments.steps, restarts=arguments.restarts)
    else:
        budget = L2Budget(eps=float(eps), steps=arguments.steps, restarts=arguments.restarts)
    image = torch.from_numpy(read_image(arguments.image, card.input))
    remote = None
    network: Callable[[torch.Tensor], torch.Tensor]
    if arguments.server is not None:
        if chosen.needs == "gradients":
            known = ", ".join(name for name, entry in ATTACKS.items() if entry.needs != "gradients")
            raise BadInput(f"{arguments.attack} needs gradients, and a server gives none; use one of {known}")
        network = remote = RemoteModel(
            arguments.server, card.name, labels_only=chosen.needs == "labels", allow_remote=arguments.allow_remote
        )
        image, budget = eight_bit(image, linf_of(budget, arguments.attack))
    else:
        bundle = open_model(arguments.model, only=(weights_file(card),))
        network = load_variant(bundle, arguments.variant, rng=random.Random(arguments.seed))  # noqa: S311 - repeatable
    draws = arguments.draws
    gated = arguments.variant == "gated" and remote is None
    if gated and not chosen.random:
        known = ", ".join(name for name, entry in ATTACKS.items() if entry.random)
        raise BadInput(f"{arguments.attack} cannot average over random gates; use one of {known}")
    if gated and draws == 1:
        raise BadInput(
            "random gates answer differently every time, so one draw per step proves nothing; "
            "average over several with --draws 20"
        )

    def answer(pixels: torch.Tensor) -> torch.Tensor:
        """Return the probabilities; of random gates the share of 20 fresh draws that answers with each class."""
        with torch.no_grad():
            if not gated:
                return asked(network, pixels).softmax(1)[0]
            votes = asked(network, pixels.expand(JUDGING_DRAWS, -1, -1, -1)).argmax(1)
        return torch.bincount(votes, minlength=len(card.classes)) / JUDGING_DRAWS

    before = answer(image)
    label = _label(arguments.label, card.classes, int(before.argmax()))
    targets = None
    if arguments.target is not None:
        if not chosen.targeted:
            raise BadInput(f"{arguments.attack} cannot be asked for a class; leave --target out or use pgd")
        wrong = _label(arguments.target, card.classes, label)
        if wrong == label:
            said = "" if arguments.label is not None else ", which is what the model answers"
            raise BadInput(f"the target is the label, {arguments.target}{said}; name another class with --target")
        targets = torch.tensor([wrong])
    elif arguments.targeted:
        raise BadInput("a targeted attack needs the class to be reached, got none; name it with --target CLASS")
    settings = chosen.settled(
        Settings(
            budget=budget,
            generator=torch.Generator().manual_seed(arguments.seed),
            loss=arguments.loss,
            targets=targets,
            queries=arguments.queries,
            draws=draws,
        ),
        arguments.attack,
    )
    adversarial = chosen.run(network, image, torch.tensor([label]), settings) if eps else image
    # judged is what leaves as a picture; in l2 rounding may add up to half a level per pixel, which the report shows
    rounded = (adversarial * 255).round() / 255
    adversarial = to_grid(adversarial, image, budget.eps) if isinstance(budget, LinfBudget) else rounded
    queried = (
        None if remote is None else {"url": arguments.server, "queries": remote.queries, "requests": remote.requests}
    )
    after = answer(adversarial)
    wanted = None if targets is None else int(targets[0])

    def fooled(answered: torch.Tensor) -> bool:
        return int(answered.argmax()) != label if wanted is None else int(answered.argmax()) == wanted

    outcome = "broken" if fooled(after) else "not broken"
    if fooled(before):  # no merit of the attack
        outcome = "wrong before the attack"
    difference = adversarial - image
    report = {
        "model": card.name,
        "variant": arguments.variant,
        "attack": arguments.attack,
        "norm": budget.norm,
        "loss": settings.loss or "none",
        "eps": float(eps),
        "eps_fraction": str(eps),
        "steps": 1 if arguments.attack == "fgsm" else arguments.steps,
        "restarts": 1 if arguments.attack == "fgsm" else arguments.restarts,
        "seed": arguments.seed,
        "label": card.classes[label],
        "linf": float(difference.abs().max()),
        "l2": float(difference.square().sum().sqrt()),
        "target": None if wanted is None else card.classes[wanted],
        "outcome": outcome,
        "succeeded": outcome == "broken",
        "server": queried,
        "before": {name: float(share) for name, share in zip(card.classes, before, strict=True)},
        "after": {name: float(share) for name, share in zip(card.classes, after, strict=True)},
    }
    with replace_directory(arguments.out) as folder:
        save_png(folder / "clean.png", image.numpy())
        save_png(folder / "adversarial.png", adversarial.numpy())
        scale = 0.5 / max(float(difference.abs().max()), 1 / 255)
        save_png(folder / "perturbation.png", (0.5 + scale * difference).numpy())
        write_json_atomic(folder / "report.json", report)
    if arguments.json:
        _print_json(report)
    else:
        names = [card.classes[int(share.argmax())] for share in (before, after)]
        print(
            f"{names[0]} ({before.max():.1%}) -> {names[1]} ({after.max():.1%}): "
            f"{outcome} at eps {eps}; {arguments.out}"
        )
    return DONE


def _serve(arguments: argparse.Namespace) -> int:
    from serving.operations.settings import Settings, flags_in

    settings = Settings.resolve(flags_in(arguments), os.environ, arguments.config)
    if arguments.print_config:
        sys.stdout.write(settings.to_toml())
        return DONE
    from serving.server import serve

    if settings.demo:
        _require("gradio", "demo")
    serve(settings if settings.model_settings or settings.model_repository else _with_bundled(settings))
    return DONE


def _with_bundled(settings: Settings) -> Settings:
    """Return the settings with all bundled models that can be served so."""
    import dataclasses

    from zoo.hub.source import list_bundled

    variant = "gated" if settings.mode == "random" else settings.mode or "single"
    cards = list_bundled()
    if settings.exit or settings.confidence:
        cards = [card for card in cards if card.exits]
        _some([card.name for card in cards], "no bundled model has several exits; name one, such as local-dir:FOLDER")
    able = [card.name for card in cards if variant in _variants_of(card, settings.precision)]
    if left_out := [card.name for card in cards if card.name not in able]:
        graphs = f"{variant!r}" if settings.precision == "fp32" else f"{variant!r} in {settings.precision}"
        _say(f"not served, because without the variant {graphs}: {', '.join(left_out)}")
    return dataclasses.replace(settings, models=tuple(_some(able)))


def _variants_of(card: Card, precision: str) -> tuple[str, ...]:
    if precision == "fp32":
        return tuple(card.variants)
    return () if card.int8 is None else tuple(card.int8.variants)


def _demo(arguments: argparse.Namespace) -> int:
    from zoo.hub.source import list_bundled

    _require("gradio", "demo")
    from serving.demo import page as demo

    demo.launch(_some(arguments.models or [card.name for card in list_bundled()]), arguments.host, arguments.port)
    return DONE


# --- what the commands share ---


def _check_recordable(arguments: argparse.Namespace) -> None:
    from zoo.errors import BadInput
    from zoo.files import check_writable
    from zoo.hub.source import resolve

    if arguments.record and resolve(arguments.model).kind != "local":
        raise BadInput(
            f"--record writes into a bundle of yours, and {arguments.model} is the package's or the hub's; "
            f"first manygates pull {arguments.model} --to DIR, then {arguments.command} local-dir:DIR"
        )
    if arguments.record and (folder := resolve(arguments.model).folder) is not None:
        check_writable(folder)  # before the work, which may take hours


def _rounds(arguments: argparse.Namespace, card: Card) -> bool:
    """Whether the variant's int8 graph is asked for and there."""
    return arguments.precision == "int8" and card.int8 is not None and arguments.variant in card.int8.variants


def _repeatable_name(arguments: argparse.Namespace, name: str) -> str:
    """Return how to name the model in a command that repeats this: a bundle of the catalogue by its name."""
    from zoo.hub.source import bundled_dir, resolve

    folder = resolve(arguments.model).folder
    elsewhere = folder is not None and folder.resolve() != (bundled_dir() / name).resolve()
    return str(arguments.model) if elsewhere else name


def _some(
    models: list[str], none: str = "no model is bundled with this installation; name one, such as local-dir:FOLDER"
) -> list[str]:
    from zoo.errors import BadInput

    if not models:
        raise BadInput(none)
    return models


def _require(package: str, extra: str) -> None:
    from zoo.errors import BadInput

    if importlib.util.find_spec(package) is None:
        raise BadInput(f"{package} is not installed; pip install 'manygates[{extra}]'")


def _is_run(source: str) -> bool:
    return (Path(source) / "recipe.json").is_file()


def _card_of(source: str) -> Card:
    """Return the card of a model where a run would have done as well."""
    from zoo.errors import BadInput, UnknownName
    from zoo.hub.source import open_model

    try:
        return open_model(source, only=()).card
    except (BadInput, UnknownName) as error:
        raise BadInput(
            f"{source!r} is neither a training run (a folder with a recipe.json) nor a model: {error}"
        ) from error


def _device(name: str) -> str:
    """Return the name of a device if torch can use it here."""
    import torch

    from zoo.errors import BadInput

    try:
        torch.empty(0, device=name).cpu()  # out of meta, which holds no numbers, nothing comes back
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise BadInput(
            f"device {name[:40]!r} cannot be used here (GPUs that torch finds: {torch.cuda.device_count() or 'none'}); "
            "write cpu, or cuda where a GPU is, cuda:0 for the first of several"
        ) from error
    return name


def _run_source(source: str, which: str) -> tuple[nn.Module, Architecture, Training, str, int, int]:
    """Load a training run: network, architecture, its training as the card tells it, name, ensemble size, seed."""
    from training.recipes import resolved
    from training.run import epochs_done, load_run, log, provenance
    from zoo.bundle.card import Training

    run_dir = Path(source)
    network, architecture, recipe = load_run(run_dir, which=which)
    starts = provenance(run_dir)["starts"]
    phases = " + ".join(str(phase.epochs) for phase in recipe.phases)
    if (done := epochs_done(run_dir)) < recipe.epochs:
        phases = f"{done} of {phases}"
    places = ", then ".join(dict.fromkeys(start["hardware"] for start in starts))
    origin = f", from {recipe.start_from}" if recipe.start_from else ""
    training = Training(
        recipe={**resolved(recipe), "method": recipe.method, "starts": starts},
        seed=recipe.seed,
        commit=", ".join(dict.fromkeys(start["commit"] for start in starts)),
        versions=starts[-1]["versions"],
        date=starts[-1]["date"],
        summary=f"{phases} epochs{origin} on {places} ({which} checkpoint)",
        logs=log(run_dir),
    )
    return network, architecture, training, recipe.name, recipe.ensemble_paths, recipe.seed


def _derivation_source(source: str) -> tuple[nn.Module, Architecture, Training, str, list[nn.Module]]:
    """Load a run or a bundle: network, architecture, training, name, and its members if it is not gated."""
    from zoo.hub.source import open_model
    from zoo.weights.checkpoint import load_network
    from zoo.weights.models import load_members, weights_file

    if _is_run(source):
        network, architecture, training, name, _, _ = _run_source(source, "last")
        return network, architecture, training, name, _members_of(network)
    card = _card_of(source)
    file = open_model(source, only=(weights_file(card),)).file(weights_file(card))
    if card.architecture.gated_layers:
        network, architecture = load_network(file)
        return network, architecture, card.training, card.name, []
    members, architecture = load_members(file)
    return members[0], architecture, card.training, card.name, members


def _export_source(
    arguments: argparse.Namespace,
) -> tuple[nn.Module, Architecture, Training, str, list[tuple[int, ...]], list[nn.Module]]:
    """Load what to export: network, architecture, training, name, paths (single first), plain members."""
    from zoo import paths
    from zoo.errors import BadInput
    from zoo.gates.rgn import RandomGatedNetwork
    from zoo.hub.source import open_model
    from zoo.weights.checkpoint import load_network
    from zoo.weights.models import load_members, weights_file

    if _is_run(arguments.source):
        network, architecture, training, name, number, seed = _run_source(arguments.source, arguments.checkpoint)
        chosen: list[tuple[int, ...]] = []
        if isinstance(network, RandomGatedNetwork):
            rng = random.Random(seed)  # noqa: S311 - which paths are published is no secret
            chosen = paths.sample_distinct(number, network.num_gates, network.candidates, rng)
            chosen = [chosen[0], *chosen]
        return network, architecture, training, name, chosen, _members_of(network)
    card = _card_of(arguments.source)
    bundle = open_model(arguments.source, only=(weights_file(card),))
    file = bundle.file(weights_file(card))
    if not card.architecture.gated_layers:
        members, architecture = load_members(file)
        return members[0], architecture, card.training, card.name, [], members
    network, architecture = load_network(file)
    assert isinstance(network, RandomGatedNetwork)
    if card.paths.single is None and not card.paths.ensemble:
        raise BadInput(f"{card.name} publishes no path to export; choose some with manygates derive {arguments.source}")
    texts = [card.paths.single or card.paths.ensemble[0], *card.paths.ensemble]
    chosen = [paths.parse(text, network.num_gates, network.candidates) for text in texts]
    return network, architecture, card.training, card.name, chosen, []


def _members_of(network: nn.Module) -> list[nn.Module]:
    """Return the plain networks of an ensemble, or the network itself."""
    from zoo.gates.derive import Ensemble

    return list(network.members) if isinstance(network, Ensemble) else [network]


def _chosen_paths(arguments: argparse.Namespace, rgn: RandomGatedNetwork) -> list[tuple[int, ...]]:
    from zoo import paths
    from zoo.errors import BadInput

    if arguments.path and arguments.paths is not None:
        raise BadInput("give --path (which ones) or --paths (how many), not both")
    if arguments.path:
        return [paths.parse(text, rgn.num_gates, rgn.candidates) for text in arguments.path]
    number = 1 if arguments.paths is None else arguments.paths
    rng = random.Random(arguments.seed)  # noqa: S311 - repeatable on purpose
    return paths.sample_distinct(number, rgn.num_gates, rgn.candidates, rng)


def _path_text(path: tuple[int, ...]) -> str:
    from zoo.paths import format_path

    return format_path(path)


def _method(training: Training) -> str:
    if "method" in training.recipe:
        return str(training.recipe["method"])
    phases = training.recipe.get("phases")
    return phases[-1]["objective"]["method"] if phases else "unknown"


def _augmented_batches(dataset: str, seed: int, batches: int = 32, size: int = 128) -> Any:
    import torch

    from zoo.data import datasets

    images = datasets.load(dataset, "train")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    for number in range(max(1, min(batches, len(images) // size))):
        pixels = images.pixels[order[number * size : (number + 1) * size]]
        yield datasets.as_float(datasets.augment(pixels, generator, flip=datasets.source(dataset).flips))


def _label(text: str | None, classes: Sequence[str], predicted: int) -> int:
    from zoo.errors import UnknownName

    if text is None:
        return predicted
    if text in classes:
        return list(classes).index(text)
    raise UnknownName(text, classes, kind="class")


def _command_of(arguments: argparse.Namespace, name: str) -> str:
    name = _repeatable_name(arguments, name)
    parts = ["manygates", "evaluate", name, "--protocol", arguments.protocol, "--variant", arguments.variant]
    if arguments.eps:
        parts += ["--eps", *arguments.eps]
    if arguments.precision != "fp32":
        parts += ["--precision", arguments.precision]
    for option in ("images", "steps", "restarts", "draws", "queries"):
        if getattr(arguments, option) is not None:
            parts += [f"--{option}", str(getattr(arguments, option))]
    if arguments.paths != 5:
        parts += ["--paths", str(arguments.paths)]
    if arguments.corrupted is not None:
        parts += ["--corrupted", str(arguments.corrupted)]
    if arguments.surrogates:
        parts += ["--surrogates", *arguments.surrogates]
    return shlex.join([*parts, "--seed", str(arguments.seed)])


def _plain_json(result: Result) -> dict[str, Any]:
    import dataclasses

    document: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(result)))
    return document


def _print_result(result: Result) -> None:
    low, high = result.interval
    attack = "clean" if result.attack == "none" else result.attack
    attack += f", {result.steps} x {result.restarts}" if result.attack.startswith("PGD") else ""
    print(
        f"{result.protocol} {result.variant}: {result.accuracy:.2%} [{low:.2%}, {high:.2%}]  {attack}, "
        f"eps {result.eps_fraction}, {result.images} images, seed {result.seed}"
        + (f"; {result.note}" if result.note else "")
    )
    for check in result.checks:
        print(f"  {'ok  ' if check.held else 'FAIL'}  {check.name}: {check.detail}")


def _print_json(document: object) -> None:
    print(json.dumps(document, indent=2))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- the parser ---


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    from serving.operations.settings import CONFIG_VARIABLE, add_flags

    root = argparse.ArgumentParser(
        prog="manygates",
        description="Adversarially robust image classifiers built on random gated networks.",
        epilog="MODEL: a catalogue name, local-dir:PATH or hf-hub:org/name[@revision]. RUN: a training run's folder.",
    )
    root.add_argument("--version", action="version", version=f"manygates {__version__}")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], summary: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=summary, description=summary)
        added.set_defaults(run=run)
        return added

    def json_flag(to: argparse.ArgumentParser) -> None:
        to.add_argument("--json", action="store_true", help="print one JSON document and nothing else")

    added = command("list", _list, "The models of the zoo with their measured numbers; needs no network.")
    added.add_argument("--dataset", metavar="NAME", help="only models of this data set, such as cifar10")
    added.add_argument("--method", metavar="NAME", help="only models trained by this method, such as trades")
    added.add_argument(
        "--sort",
        metavar="BY",
        help="name (the default), method, clean, whitebox, transfer or autoattack; whitebox:8/255 names the radius",
    )
    added.add_argument("--hub", action="store_true", help="what is published on the hub now, instead")
    added.add_argument("--author", metavar="ORG", help="with --hub: whose models")
    json_flag(added)

    added = command("catalog", _catalog_build, "Write what `list` reads: from the package's cards, or from the hub.")
    actions = added.add_subparsers(dest="action", required=True, metavar="ACTION")
    action = actions.add_parser("build", help="write zoo/catalog.json from the cards in zoo/bundles and zoo/cards")
    action.add_argument("--out", type=Path, metavar="FILE", help="another file than the package's")
    action.set_defaults(run=_catalog_build)
    action = actions.add_parser("refresh", help="keep what the hub's cards say in the cache, where `list` finds it")
    action.add_argument("--author", metavar="ORG", help="whose models")
    action.set_defaults(run=_catalog_refresh)

    added = command("show", _show, "One model's card.")
    added.add_argument("model", metavar="MODEL")
    json_flag(added)

    added = command("pull", _pull, "Fetch a model, verify it and say where it is, or copy it to a folder.")
    added.add_argument("model", metavar="MODEL")
    added.add_argument(
        "--variant",
        nargs="+",
        action="extend",
        default=[],
        metavar="V",
        help="only the graphs of these variants, and no weights: what the server needs",
    )
    added.add_argument("--precision", choices=PRECISIONS, help="only the graphs of this precision")
    added.add_argument("--out", "--to", type=Path, metavar="DIR", help="folder that will hold the bundle")
    json_flag(added)

    added = command("push", _push, "Publish a bundle on the Hugging Face hub, in one commit; needs `hf auth login`.")
    added.add_argument("bundle", metavar="BUNDLE", help="a bundle's folder, or a bundled model")
    added.add_argument("repository", metavar="ORGANISATION/NAME", help="created if there is none")
    added.add_argument("--create-pr", action="store_true", help="propose the change in a pull request")
    added.add_argument("--private", action="store_true", help="if the repository is created: only you may read it")
    added.add_argument("--branch", metavar="BRANCH", help="main by default; created if there is none")
    added.add_argument("--message", metavar="TEXT", help="of the commit")
    added.add_argument("--dry-run", action="store_true", help="check everything, say what would be done, write nothing")

    added = command("verify", _verify, "Checksums, and every graph against the weights.")
    added.add_argument("model", metavar="MODEL")
    json_flag(added)

    added = command("train", _train, "Train a recipe.")
    added.add_argument("recipe", metavar="RECIPE")
    added.add_argument("--out", type=Path, required=True, metavar="RUN", help="the run's folder")
    added.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="change a field, e.g. phases.0.epochs=3"
    )
    added.add_argument("--resume", action="store_true", help="go on where the run in RUN was stopped")
    added.add_argument("--device", metavar="DEVICE", help="cpu or cuda; a GPU if there is one by default")

    added = command("methods", _methods, "The methods that recipes train by: paper, needs, cost, recipes.")
    json_flag(added)

    added = command("derive", _derive, "Derive plain networks: paths of a random gated one, or members of an ensemble.")
    added.add_argument("source", metavar="RUN|MODEL")
    added.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder that will hold the bundle")
    added.add_argument("--paths", type=int, metavar="K", help="draw K distinct paths")
    added.add_argument("--path", action="append", metavar="0110…", help="take this path; repeat it for an ensemble")
    added.add_argument(
        "--member", type=int, action="append", metavar="N", help="take this member of an ensemble, from 1 on; repeat it"
    )
    added.add_argument("--seed", type=int, default=0, metavar="S")
    added.add_argument("--recalibrate", action="store_true", help="re-estimate BatchNorm statistics per path")
    added.add_argument("--finetune", type=int, default=0, metavar="EPOCHS", help="epochs on clean images")
    added.add_argument("--name", metavar="NAME", help="the derived model's name")

    added = command("export", _export, "Write the bundle of a run or a model, its graphs checked against the weights.")
    added.add_argument("source", metavar="RUN|MODEL")
    added.add_argument("members", nargs="*", metavar="RUN", help="further runs: all of them become one ensemble")
    added.add_argument(
        "--out", type=Path, metavar="DIR", help="folder that will hold the bundle; --int8 alone adds to MODEL's own"
    )
    added.add_argument("--int8", action="store_true", help="add int8 graphs, calibrated on training images")
    added.add_argument("--calibration-images", type=int, default=1024, metavar="N", help="how many; 1,024 by default")
    added.add_argument("--calibration-seed", type=int, default=0, metavar="S", help="which ones")
    added.add_argument("--checkpoint", choices=("last", "best"), default="last", help="which of a run's checkpoints")
    added.add_argument("--name", metavar="NAME", help="the model's name; the recipe's by default")
    added.add_argument("--description", metavar="TEXT", help="one sentence for the card")

    added = command("evaluate", _evaluate, "Measure a model by a protocol.")
    added.add_argument("model", metavar="MODEL")
    added.add_argument("--protocol", required=True, metavar="P", help=f"one of {', '.join(PROTOCOLS)}")
    added.add_argument("--variant", choices=VARIANTS, default="single")
    added.add_argument("--precision", choices=PRECISIONS, default="fp32", help="int8: judge the variant's int8 graph")
    added.add_argument(
        "--eps",
        nargs="+",
        default=[],
        metavar="EPS",
        help="radii such as 8/255; by default 0.01 0.03, blackbox 0.01 to 0.07",
    )
    added.add_argument(
        "--images", type=int, metavar="N", help="test images; 10,000 clean and 1,000 attacked by default"
    )
    added.add_argument("--steps", type=int, metavar="N", help="gradient steps; the protocol's own number by default")
    added.add_argument("--restarts", type=int, metavar="N", help="random starts; the protocol's own number by default")
    added.add_argument("--draws", type=int, metavar="N", help="draws of the gates on which a random model is judged")
    added.add_argument("--queries", type=int, metavar="N", help="of the protocol queries, per image; 1,000 by default")
    added.add_argument("--paths", type=int, default=5, metavar="K", help="paths that a transfer matrix compares")
    added.add_argument(
        "--surrogates", nargs="+", default=[], metavar="MODEL", help="models on which transfer attacks are made"
    )
    added.add_argument(
        "--set", type=Path, metavar="DIR", help="stored adversarial set: reused, or made if DIR is empty"
    )
    added.add_argument("--corrupted", type=Path, metavar="DIR", help="folder with the official CIFAR-10-C files")
    added.add_argument("--seed", type=int, default=0, metavar="S")
    added.add_argument("--device", default="cpu", metavar="DEVICE")
    added.add_argument("--fresh", action="store_true", help="begin again instead of going on with an interrupted run")
    added.add_argument("--record", action="store_true", help="write the results into the card of a local bundle")
    json_flag(added)

    added = command("lint", _lint, "Ask whether a model's robustness is real: the sanity checks of honest evaluation.")
    added.add_argument("model", metavar="MODEL")
    added.add_argument("--variant", choices=VARIANTS, help="one variant; all of the model's by default")
    added.add_argument("--precision", choices=PRECISIONS, default="fp32", help="int8: ask the int8 graphs")
    added.add_argument("--eps", default="8/255", metavar="EPS")
    added.add_argument("--images", type=int, metavar="N", help="test images; 100 by default")
    added.add_argument("--queries", type=int, metavar="N", help="of the Square attack, per image")
    added.add_argument("--surrogate", metavar="MODEL", help="another model for transfer attacks")
    added.add_argument("--seed", type=int, default=0, metavar="S")
    added.add_argument("--device", default="cpu", metavar="DEVICE")
    added.add_argument("--record", action="store_true", help="write the findings into the card of a local bundle")
    json_flag(added)

    added = command("report", _report, "Draw what the cards of models say, side by side: HTML, Markdown and figures.")
    added.add_argument("models", nargs="*", metavar="MODEL")
    added.add_argument("--zoo", action="store_true", help="the leaderboard of all models, as a page of Markdown")
    added.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for report.html and the rest; --zoo: a .md file"
    )

    added = command("attack", _attack, "Attack a model on one picture and keep what came out.")
    added.add_argument("model", metavar="MODEL")
    added.add_argument("--image", type=Path, required=True, metavar="FILE")
    added.add_argument("--attack", default="pgd", metavar="NAME", help=f"one of {', '.join(ATTACK_NAMES)}")
    added.add_argument("--variant", choices=VARIANTS, default="single")
    added.add_argument("--label", metavar="CLASS", help="the true class; what the model says by default")
    added.add_argument("--target", metavar="CLASS", help="the class to be reached; any wrong one by default")
    added.add_argument("--targeted", action="store_true", help="insist on a --target")
    added.add_argument("--norm", choices=("linf", "l2"), default="linf")
    added.add_argument("--eps", default="8/255", metavar="EPS")
    added.add_argument("--loss", metavar="LOSS", help="cross_entropy, margin or dlr; the attack's own by default")
    added.add_argument("--queries", type=int, default=1000, metavar="N", help="of square and rays")
    added.add_argument("--draws", type=int, default=1, metavar="N", help="forwards of random gates per step")
    added.add_argument("--server", metavar="URL", help="attack MODEL as this server answers, by square or rays")
    added.add_argument(
        "--allow-remote", action="store_true", help="the server is another machine, and you may attack it"
    )
    added.add_argument("--steps", type=int, default=20, metavar="N")
    added.add_argument("--restarts", type=int, default=1, metavar="N")
    added.add_argument("--seed", type=int, default=0, metavar="S")
    added.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for pictures and report.json")
    json_flag(added)

    added = command("serve", _serve, "Serve models over HTTP (Open Inference Protocol and POST /classify).")
    added.add_argument(
        "--config", type=Path, metavar="FILE", help=f"settings in TOML; {CONFIG_VARIABLE} by default; flags go first"
    )
    added.add_argument("--print-config", action="store_true", help="print the settings as such a file, and stop")
    add_flags(added)
    added.usage = "manygates serve [MODEL ...] [--config FILE] [--print-config] [--SETTING VALUE ...]"

    added = command("demo", _demo, "The page on which one attacks models.")
    added.add_argument("models", nargs="*", metavar="MODEL", help="all bundled models by default")
    added.add_argument("--host", default="127.0.0.1", metavar="H")
    added.add_argument("--port", type=int, default=7860, metavar="P")
    return root


def _foreign_package() -> str | None:
    """Say so in one sentence if a package of ours is not ours: another `training` in the way, say."""
    here = Path(__file__).resolve().parents[1]
    for name in ("zoo", "training", "serving"):
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None or Path(spec.origin).resolve().parent != here / name:
            found = "nothing" if spec is None else spec.origin
            return (
                f"manygates needs its own package {name!r} beside {__file__}, but Python finds {found}; "
                "run it from another folder, or reinstall manygates in a virtual environment of its own"
            )
    return None


def _negative_number(words: Sequence[str]) -> str | None:
    """Say in one sentence that -1/255 is no value; the parser would take it for an option and say there is none."""
    options = words[: words.index("--")] if "--" in words else words
    option = ""
    for word in options:
        if option and re.fullmatch(r"-[0-9]*\.?[0-9]+(/[0-9.]+|e[+-]?[0-9]+)", word.lower()):
            return f"{option} is {word[:40]}, expected a number that is not negative"
        if word.startswith("--"):
            option = word
    return None


def _check_numbers(arguments: argparse.Namespace) -> None:
    """Refuse counts and seeds that nothing takes.

    Raises:
        BadInput: it names the option.
    """
    from zoo.errors import check_count

    for name, number in vars(arguments).items():
        if type(number) is not int:  # the server's settings are texts here
            continue
        option = f"--{name.replace('_', '-')}"
        if name in SEEDS:
            check_count(option, number, 0, MOST_SEED)
        elif name in COUNTS:
            lowest = COUNTS.get(f"{arguments.command} {name}", COUNTS[name])
            check_count(option, number, lowest, MOST_COUNTED)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 1 a check did not hold, 2 wrong usage or bad input."""
    words = sys.argv[1:] if argv is None else list(argv)
    # before the parser, which takes flags from a package of ours
    if (problem := _foreign_package() or _negative_number(words)) is not None:
        _say(f"manygates: {problem}")
        return WRONG
    arguments = parser().parse_args(words)
    from zoo.errors import ManygatesError
    from zoo.files import check_writable

    try:
        _check_numbers(arguments)
        if getattr(arguments, "out", None) is not None and not getattr(arguments, "resume", False):
            check_writable(arguments.out)  # before the work, which may take hours
        code = int(arguments.run(arguments))
        if sys.stdout is not None:  # it may be closed
            sys.stdout.flush()  # here, where a full disk is an error like any other
        return code
    except ManygatesError as error:
        _say(f"manygates: {error}")
        return WRONG
    except ModuleNotFoundError as error:
        extras = {"torch": "train", "onnx": "train", "safetensors": "train", "pyarrow": "train", "tqdm": "train"}
        extra = extras.get(error.name or "", "serve")
        if (error.name or "").split(".")[0] in ("zoo", "training", "serving"):
            raise
        _say(f"manygates: {error.name} is not installed; pip install 'manygates[{extra}]'")
        return WRONG
    except BrokenPipeError:  # the reader of our output went away: `manygates list | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except OSError as error:  # a place that cannot be written or read: by its rights, or because a disk is full
        told = _told(error, arguments)
        if told is None:
            raise
        _say(f"manygates: {told}")
        return WRONG
    except KeyboardInterrupt:
        return 130


def _told(error: OSError, arguments: argparse.Namespace) -> str | None:
    """Say in a sentence which place cannot be used, and what puts it elsewhere; None of errors that have no place."""
    place = error.filename2 or error.filename
    if place is None and error.errno == errno.ENOENT:  # of tempfile, which has tried them all
        return f"{error.strerror}; set TMPDIR to a folder that can be written"
    if place is None and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
        return None
    if place is None:  # `zoo.files` names every other place
        with contextlib.suppress(OSError, ValueError, AttributeError):  # it may be closed, or no file
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains at its end
        return f"standard output: {error.strerror}; send it to another place, or make room"
    return f"{place}: {error.strerror}; {_elsewhere(Path(str(place)), arguments)}"


def _elsewhere(place: Path, arguments: argparse.Namespace) -> str:
    """Say which setting makes a command use another place than this one."""
    import tempfile

    from zoo.cache import CACHE_VARIABLE, cache_dir

    def within(folder: object) -> bool:
        """Whether the place is in a folder, or is what that folder was to be made in."""
        if not folder:
            return False
        ours, theirs = place.absolute(), Path(str(folder)).absolute()
        return ours.is_relative_to(theirs) or (theirs.is_relative_to(ours) and not ours.is_dir())

    out, stored = getattr(arguments, "out", None), getattr(arguments, "set", None)
    beside = getattr(arguments, "zoo", False) and isinstance(out, Path) and within(out.parent / "figures")
    if within(out) or beside:
        return "choose another place with --out"
    models = [getattr(arguments, name, None) for name in ("model", "source")]
    if any(isinstance(model, str) and within(model.removeprefix("local-dir:")) for model in models):
        return "the bundle cannot be changed there; change a copy, made by `manygates pull MODEL --out DIR`"
    if isinstance(stored, Path) and within(stored):
        return "choose another place with --set"
    if within(cache_dir()):
        return f"set {CACHE_VARIABLE} to a folder that can be written"
    if within(os.environ.get("TMPDIR")) or within(tempfile.tempdir):
        return "set TMPDIR to a folder that can be written"
    return "choose another place"


if __name__ == "__main__":
    sys.exit(main())
