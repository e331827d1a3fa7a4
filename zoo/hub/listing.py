"""What `manygates list` prints: the known models as a table per data set, or as one JSON document."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from fractions import Fraction
from typing import Any

from zoo.bundle import headline
from zoo.bundle.card import Card, Lint, Result
from zoo.bundle.wording import eps_text, plain
from zoo.errors import BadInput, UnknownName
from zoo.hub.source import KnownModel

KINDS = {"whitebox": headline.WHITEBOX, "transfer": headline.TRANSFER, "autoattack": headline.AUTOATTACK}
"""What `sort` can name beside "name", "method" and "clean"; each may be followed by ":EPS"."""
SORTS = ("name", "method", "clean", *KINDS)
MANY_IMAGES = 1000
PASSED, FAILED, NOT_LINTED = "passed", "failed", "not linted"
_HEADS = {"whitebox": "white-box", "transfer": "transfer", "autoattack": "AutoAttack"}
_NUMBERS = 4
"""So many columns stand before those of attacks."""
_LINTER = {PASSED: "ok", FAILED: "ALARM", NOT_LINTED: "-"}


def on_the_hub(author: str | None = None) -> tuple[KnownModel, ...]:
    """Return the models that are published on the hub now, sorted by name; takes and raises what `hub_cards` does."""
    from zoo.hub.fetch import hub_cards

    models = (
        KnownModel(card=card, stranger=True, repository=repository, commit=commit)
        for repository, commit, card in hub_cards(author)
    )
    return tuple(sorted(models, key=lambda model: (model.card.name, model.source)))


def select(
    models: Sequence[KnownModel], *, dataset: str | None = None, method: str | None = None, sort: str | None = None
) -> list[KnownModel]:
    """Return the models of a data set and a method, in the order asked for: numbers from high to low, missing last.

    `sort` is "name" (the default), "method", "clean", or "whitebox", "transfer" or "autoattack" at the lowest radius
    that is shown, or at the radius that stands behind a colon: "whitebox:8/255".

    Raises:
        UnknownName: no model has such a data set or method.
        BadInput: there is no such order.
    """
    for kind, wanted in (("dataset", dataset), ("method", method)):
        known = {getattr(model.card, kind) for model in models}
        if wanted is not None and wanted not in known:
            raise UnknownName(wanted, known, kind="data set" if kind == "dataset" else kind)
    found = [model for model in models if dataset in (None, model.card.dataset) and method in (None, model.card.method)]
    return sorted(found, key=_order(found, sort or "name"))


def _order(models: Sequence[KnownModel], sort: str) -> Callable[[KnownModel], tuple[Any, ...]]:
    name, _, radius = sort.partition(":")
    if name not in SORTS or (radius and name not in KINDS):
        raise BadInput(
            f"--sort is {sort!r}, expected one of {', '.join(SORTS)}; the last three may name a radius: whitebox:8/255"
        )
    if name == "name":
        return lambda model: (model.card.name, model.source)
    if name == "method":
        return lambda model: (model.card.method, model.card.name, model.source)
    try:
        eps = Fraction(radius) if radius else None
    except (ValueError, ZeroDivisionError) as error:
        raise BadInput(f"--sort is {sort!r}, expected a radius such as 0.01 or 8/255 behind the colon") from error

    def key(model: KnownModel) -> tuple[Any, ...]:
        if name == "clean":
            found = headline.accuracy_of(model.card, headline.CLEAN, Fraction(0))
        else:
            cards = [other.card for other in models if other.card.dataset == model.card.dataset]
            places = [eps] if eps is not None else _shown(cards, KINDS[name])[:1]
            found = headline.accuracy_of(model.card, KINDS[name], places[0]) if places else None
        return (found is None, 0.0 if found is None else -found.accuracy, model.card.name, model.source)

    return key


def documents(models: Iterable[KnownModel]) -> list[dict[str, Any]]:
    """Return the models as JSON values: what each is, where it is to be had, and every number of its card, in short."""
    return [_document(model) for model in models]


def _document(model: KnownModel) -> dict[str, Any]:
    card, network, training = model.card, model.card.architecture, model.card.training
    weights = [entry.sha256 for name, entry in card.files.items() if name.endswith(".safetensors")]
    dates = [training.date, *(result.date for result in card.results), *(lint.date for lint in card.lint)]
    document = {
        **{name: getattr(card, name) for name in ("name", "description", "method", "license")},
        "architecture": network.name,
        "dataset": card.dataset,
        "classes": card.classes,
        "gates": len(network.gated_layers),
        **{name: getattr(network, name) for name in ("candidates", "sharing", "parameters", "single_path_parameters")},
        "variants": card.variants,
        "main": headline.main_variant(card),
        "files": {name: entry.size for name, entry in sorted(card.files.items())},
        "bytes": sum(entry.size for entry in card.files.values()),
        "weights": weights[0] if weights else "",
        "where": {name: getattr(model, name) for name in ("bundled", "repository", "commit", "commands")},
        "trained": {
            "summary": training.summary,
            "recipe": str(training.recipe.get("name", "")),
            "epochs": training.epochs,
            "published": None if training.published is None else asdict(training.published),
            "seed": training.seed,
            "date": training.date,
        },
        "results": [_result(card, result) for result in card.results],
        "lint": [_lint(lint) for lint in card.lint],
        "date": max(dates),
        "card": hashlib.sha256(card.to_json().encode()).hexdigest(),
        "suspect": card.suspect,
        "source": model.source,
    }
    return dict(json.loads(json.dumps(document)))


_IN_SHORT = (
    *("variant", "protocol", "attack", "norm", "eps", "eps_fraction", "steps", "restarts", "draws"),
    *("images", "seed", "accuracy", "interval", "date"),
)


def _result(card: Card, result: Result) -> dict[str, Any]:
    return {
        **{name: getattr(result, name) for name in _IN_SHORT},
        "held": all(check.held for check in result.checks),
        "linter": _linter(card, result.variant),
    }


def _lint(lint: Lint) -> dict[str, Any]:
    alarms = [finding.code for finding in lint.alarms]
    return {"variant": lint.variant, "alarms": alarms, "images": lint.images, "date": lint.date}


def _linter(card: Card, variant: str) -> str:
    """Return what the linter says of a variant: "passed", "failed" or "not linted"."""
    lint = next((lint for lint in card.lint if lint.variant == variant), None)
    return NOT_LINTED if lint is None else FAILED if lint.alarms else PASSED


def tables(models: Sequence[KnownModel]) -> str:
    """Return a table per data set, with what its marks mean below; ends in a newline."""
    if not models:
        return "no model is known here; `manygates list --hub` asks the hub\n"
    blocks = []
    for dataset in sorted({model.card.dataset for model in models}):
        blocks.append("\n".join(_table(dataset, [model for model in models if model.card.dataset == dataset])))
    said = [
        "Accuracy in per cent of the variant named: as the images are (clean), and after an l_inf attack of that "
        "radius.\nwhite-box: PGD by one who has the weights (random gates: the minimum of many attacks); "
        "transfer: attacks made on\nsurrogates."
    ]
    if any("*" in block for block in blocks):
        said.append(f"* measured on fewer than {MANY_IMAGES:,} images.")
    if any(model.card.suspect for model in models):
        said.append("ALARM: the robustness linter found that the numbers of these variants may flatter them.")
    if any(not model.bundled for model in models):
        said.append("What does not come with manygates: `manygates show NAME` says how to get it.")
    return "\n\n".join([*blocks, "\n".join(said)]) + "\n"


def _table(dataset: str, models: Sequence[KnownModel]) -> list[str]:
    cards = [model.card for model in models]
    columns = [(kind, eps) for kind, protocols in KINDS.items() for eps in _shown(cards, protocols)]
    head = (plain(dataset), "network", "variant", "clean", *(eps_text(eps) for _, eps in columns), "lint", "from")
    rows = [head, *(_row(model, columns) for model in models)]
    # the names of attacks stand over their radii, which are given the room for it
    widths = [max(len(row[index]) for row in rows) for index in range(len(head))]
    above = " " * sum(width + 2 for width in widths[:_NUMBERS])
    place = _NUMBERS
    for kind in dict.fromkeys(kind for kind, _ in columns):
        span = sum(other == kind for other, _ in columns)
        room = sum(width + 2 for width in widths[place : place + span]) - 2
        missing = max(0, len(_HEADS[kind]) + 2 - room)
        widths[place] += missing
        room += missing
        above += f" {_HEADS[kind]} ".center(room, "-") + "  "
        place += span
    lines = [above] if columns else []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        numbers = slice(_NUMBERS - 1, len(row) - 2)
        cells[numbers] = [cell.rjust(width) for cell, width in zip(row[numbers], widths[numbers], strict=True)]
        lines.append("  ".join(cells))
    return [line.rstrip() for line in lines]


def _row(model: KnownModel, columns: Sequence[tuple[str, Fraction]]) -> tuple[str, ...]:
    card, variant = model.card, headline.main_variant(model.card)
    alarms = f"ALARM: {', '.join(card.suspect)}" if card.suspect else _LINTER[_linter(card, variant)]
    return (
        plain(card.name if model.commands else model.source),
        plain(card.architecture.name),
        variant,
        _number(headline.accuracy_of(card, headline.CLEAN, Fraction(0)), 2),
        *(_number(headline.accuracy_of(card, KINDS[kind], eps), 1) for kind, eps in columns),
        alarms,
        _origin(model),
    )


def _shown(cards: Iterable[Card], protocols: Sequence[str]) -> list[Fraction]:
    """Return the radii at which the main variants of these models are compared."""
    return headline.eps_shown(eps for card in cards for eps in headline.measured_eps(card, protocols))


def _number(found: Result | None, digits: int) -> str:
    if found is None:
        return "-"
    return f"{100 * found.accuracy:.{digits}f}" + ("*" if found.images < MANY_IMAGES else "")


def _origin(model: KnownModel) -> str:
    if model.bundled:
        return "bundled"
    if model.repository is not None:
        return "hub"
    return f"train {plain(str(model.card.training.recipe['name']))}" if model.commands else "-"
