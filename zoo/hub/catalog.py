"""The catalogue's numbers: what every model of the zoo is, where it is to be had and what was measured of it.

`catalog.json` is made from cards alone, those of the bundled models (`bundles/NAME/card.json`) and those of models that
are too large or too many to be bundled (`cards/NAME.json`), so that listing the zoo needs neither weights nor network.
`refresh` adds what is published on the hub, in a file of the same form in the user's cache. `zoo.hub.source` finds and
opens models; this module only knows about them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
import types
import typing
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import zoo.hub.source
from zoo.bundle.bundle import CARD_FILE
from zoo.bundle.card import Card, Result
from zoo.cache import cache_dir
from zoo.errors import BadInput, BundleError
from zoo.files import write_text_atomic

SCHEMA = 1
CATALOG_FILE = "catalog.json"
CARDS_DIR = "cards"
PASSED, FAILED, NOT_LINTED = "passed", "failed", "not linted"

USUAL_EPS = (Fraction(1, 100), Fraction(3, 100), Fraction(8, 255))
"""The radii at which models are compared, where they were measured."""
SHOWN_EPS = 3
"""So many radii are shown of a data set whose models were measured at none of the usual ones."""
WHITEBOX = ("whitebox", "random-gates")
"""The protocols of an attacker who has the weights; what stands against random gates is the minimum of many attacks."""
TRANSFER = ("blackbox",)
AUTOATTACK = ("autoattack",)

Recipes = Mapping[str, Mapping[str, Any]]
"""Recipes by name, each as JSON values, as `training.recipes.resolved` returns them."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One measured accuracy, in short; the card has its tables, its checks and its command."""

    variant: str
    protocol: str
    attack: str
    norm: str
    eps: float
    eps_fraction: str
    steps: int
    restarts: int
    draws: int
    images: int
    seed: int
    accuracy: float
    """Between 0 and 1."""
    interval: tuple[float, float]
    """95 % confidence interval of `accuracy`."""
    held: bool
    """Whether every check of this measurement held."""
    linter: str
    """What the linter says of the variant: "passed", "failed" or "not linted"."""
    date: str


@dataclass(frozen=True, kw_only=True)
class Linted:
    """What the linter found on one variant, in short."""

    variant: str
    alarms: tuple[str, ...]
    """Codes of the findings that raise an alarm."""
    images: int
    date: str


@dataclass(frozen=True, kw_only=True)
class Published:
    """The scale at which the method was published."""

    recipe: str
    network: str
    epochs: tuple[int, ...]
    """Of each phase."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """How long a model was trained, and how long the published one."""

    summary: str
    recipe: str
    epochs: tuple[int, ...]
    """Of each phase."""
    published: Published | None
    """None where no recipe of the published scale is known."""
    seed: int
    date: str


@dataclass(frozen=True, kw_only=True)
class Where:
    """Where a model is to be had; all three at once is possible."""

    bundled: bool
    repository: str | None = None
    """`organisation/name` on the hub."""
    commit: str | None = None
    """Of the repository when its card was read."""
    commands: tuple[str, ...] = ()
    """What makes it from nothing, one after the other; empty where no known recipe does."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One model of the catalogue."""

    name: str
    description: str
    method: str
    license: str
    architecture: str
    dataset: str
    classes: tuple[str, ...]
    gates: int
    candidates: int
    sharing: str | None
    parameters: int
    single_path_parameters: int
    variants: tuple[str, ...]
    main: str
    """The variant that stands for the model: one path, all members of an ensemble, or the network."""
    files: Mapping[str, int]
    """Bytes of each file."""
    bytes: int
    """Of all files."""
    weights: str
    """SHA-256 of the weights; empty if the card lists none."""
    where: Where
    trained: Trained
    results: tuple[Measured, ...]
    lint: tuple[Linted, ...]
    date: str
    """Of the newest thing in the card."""
    card: str
    """SHA-256 of the card."""

    @property
    def suspect(self) -> tuple[str, ...]:
        """The variants that failed the linter."""
        return tuple(lint.variant for lint in self.lint if lint.alarms)

    @property
    def source(self) -> str:
        """What to write where a model is taken, if it can be taken from somewhere; else its name."""
        if self.where.bundled or self.where.repository is None:
            return self.name
        return f"{zoo.hub.source.HUB_PREFIX}{self.where.repository}"

    def how_to_get(self) -> str:
        """Say in commands how to get a model that is not bundled."""
        ways = []
        if self.where.repository is not None:
            at = f"@{self.where.commit}" if self.where.commit else ""
            ways.append(f"`manygates pull {zoo.hub.source.HUB_PREFIX}{self.where.repository}{at}` fetches it")
        if self.where.commands:
            ways.append(f"`{' && '.join(self.where.commands)}` trains it and writes its bundle")
        return ", or ".join(ways) or "no recipe of this version makes it"

    def linter(self, variant: str) -> str:
        """Return what the linter says of a variant: "passed", "failed" or "not linted"."""
        return _linter(variant, self.lint)

    def measured(self, protocols: Sequence[str], eps: Fraction, variant: str | None = None) -> Measured | None:
        """Return an l_inf accuracy of a variant (the main one by default): on most images, and then the lowest."""
        found = [
            result
            for result in self.results
            if result.variant == (variant or self.main)
            and result.protocol in protocols
            and result.norm == "linf"
            and Fraction(result.eps_fraction) == eps
        ]
        return min(found, key=lambda result: (-result.images, result.accuracy), default=None)


# --- from cards to entries ---


def build(recipes: Recipes, folder: Path | None = None) -> tuple[Entry, ...]:
    """Return the entries of all cards of the package, sorted by name.

    Args:
        recipes: the known ones; they say what command makes a model, and what the published scale is.
        folder: that of the package; what tests use another for.

    Raises:
        BundleError: a card cannot be read, is not called as its model, or two have one name.
    """
    entries: dict[str, Entry] = {}
    for file, bundled in card_files(folder):
        name = file.parent.name if bundled else file.stem
        card, digest = _read_card(file, name)
        if name in entries:
            raise BundleError(f"{file} is the card of {name!r}, which is bundled already; delete one of them")
        entries[name] = entry_of(card, digest, recipes, bundled=bundled)
    return tuple(entries[name] for name in sorted(entries))


def entry_of(
    card: Card,
    digest: str,
    recipes: Recipes,
    *,
    bundled: bool,
    repository: str | None = None,
    commit: str | None = None,
) -> Entry:
    """Return what the catalogue says of a card; `digest` is the SHA-256 of its bytes."""
    linted = tuple(
        Linted(
            variant=lint.variant,
            alarms=tuple(finding.code for finding in lint.alarms),
            images=lint.images,
            date=lint.date,
        )
        for lint in card.lint
    )
    weights = [entry.sha256 for name, entry in card.files.items() if name.endswith(".safetensors")]
    return Entry(
        name=card.name,
        description=card.description,
        method=card.method,
        license=card.license,
        architecture=card.architecture.name,
        dataset=card.dataset,
        classes=card.classes,
        gates=len(card.architecture.gated_layers),
        candidates=card.architecture.candidates,
        sharing=card.architecture.sharing,
        parameters=card.architecture.parameters,
        single_path_parameters=card.architecture.single_path_parameters,
        variants=card.variants,
        main=main_variant(card),
        files={name: entry.size for name, entry in sorted(card.files.items())},
        bytes=sum(entry.size for entry in card.files.values()),
        weights=weights[0] if weights else "",
        where=Where(bundled=bundled, repository=repository, commit=commit, commands=commands_of(card, recipes)),
        trained=Trained(
            summary=card.training.summary,
            recipe=str(card.training.recipe.get("name", "")),
            epochs=epochs_of(card.training.recipe),
            published=published_scale(card.training.recipe, recipes),
            seed=card.training.seed,
            date=card.training.date,
        ),
        results=tuple(_measured(result, linted) for result in card.results),
        lint=linted,
        date=max([card.training.date, *(result.date for result in card.results), *(lint.date for lint in card.lint)]),
        card=digest,
    )


def main_variant(card: Card) -> str:
    """Return the variant that stands for a model: one path, all members of an ensemble, or the network."""
    order = ("single", "ensemble", "gated") if card.architecture.gated_layers else ("ensemble", "single")
    return next((variant for variant in order if variant in card.variants), order[0])


def epochs_of(recipe: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the epochs of each phase of a recipe, as JSON values; empty if it does not say."""
    phases = recipe.get("phases")
    found = [phase.get("epochs") for phase in phases if isinstance(phase, dict)] if isinstance(phases, list) else []
    return tuple(epochs for epochs in found if isinstance(epochs, int))


def published_scale(recipe: Mapping[str, Any], recipes: Recipes) -> Published | None:
    """Return the scale at which a recipe's method was published: that of the nearest recipe that is not for a CPU.

    Nearest is the one of the same name without `-cpu`, else one of the same method (with the same method inside it, and
    on the same data set) whose members, candidates, sharing and network agree best.
    """
    name = str(recipe.get("name", ""))
    full = {known: values for known, values in recipes.items() if not known.endswith("-cpu") and known != "smoke"}
    nearest = name.removesuffix("-cpu")
    if nearest not in full:
        alike = [
            known
            for known, values in full.items()
            if _methods(values) == _methods(recipe) and values.get("dataset") == recipe.get("dataset")
        ]
        if not alike:
            return None
        keys = ("members", "candidates", "sharing", "network")
        nearest = max(alike, key=lambda known: [full[known].get(key) == recipe.get(key) for key in keys])
    found = full[nearest]
    return Published(recipe=nearest, network=str(found.get("network", "")), epochs=epochs_of(found))


def commands_of(card: Card, recipes: Recipes) -> tuple[str, ...]:
    """Return the commands that train a model and write its bundle; none where no known recipe makes it.

    What the card's recipe has otherwise than the recipe of that name becomes `--set`.
    """
    recipe = card.training.recipe
    name = str(recipe.get("name", ""))
    changes = _changes(recipes[name], recipe) if name in recipes else None
    if changes is None:
        return ()
    seeds = recipe.get("seeds")
    several = isinstance(seeds, list) and len(seeds) > 1
    runs, commands = [], []
    for seed in seeds if isinstance(seeds, list) and several else [None]:
        run = f"runs/{card.name}" + ("" if seed is None else f"-{seed}")
        settings = [text for text in changes if seed is None or not text.startswith("seed=")]
        settings += [] if seed is None else [f"seed={seed}"]
        words = ["manygates", "train", name, "--out", run]
        for text in settings:
            words += ["--set", text]
        runs.append(run)
        commands.append(shlex.join(words))
    commands.append(shlex.join(_last_step(card, runs)))
    if card.int8 is not None and isinstance(recipe.get("derived"), dict):  # which adds none of its own
        commands.append(f"manygates export {zoo.hub.source.LOCAL_PREFIX}models/{card.name} --int8")
    return tuple(commands)


def _last_step(card: Card, runs: Sequence[str]) -> list[str]:
    """Return the words of the command that writes the bundle of trained runs."""
    derived = card.training.recipe.get("derived")
    target = ["--out", f"models/{card.name}", "--name", card.name]
    if not isinstance(derived, dict):
        best = ["--checkpoint", "best"] if "(best checkpoint)" in card.training.summary else []
        return ["manygates", "export", *runs, *target, *best, *(["--int8"] if card.int8 else [])]
    words = ["manygates", "derive", *runs, *target]
    for option, key in (("--path", "paths"), ("--member", "members")):
        for value in derived.get(key) or []:
            words += [option, str(value)]
    words += ["--recalibrate"] if derived.get("recalibrated") else []
    words += ["--finetune", str(derived["finetune_epochs"])] if derived.get("finetune_epochs") else []
    return [*words, "--seed", str(derived["seed"])] if derived.get("seed") else words


def _changes(base: Mapping[str, Any], recipe: Mapping[str, Any]) -> list[str] | None:
    """Return what differs as texts for `--set`; None if it cannot be said so. What a recipe lacks is as in `base`."""
    texts: list[str] = []

    def compare(there: Any, here: Any, name: str) -> bool:
        if isinstance(there, dict) and isinstance(here, dict) and there.get("method") == here.get("method"):
            return all(compare(there[key], here[key], f"{name}.{key}" if name else key) for key in there if key in here)
        if isinstance(there, list) and isinstance(here, list) and any(isinstance(entry, dict) for entry in there):
            pairs = enumerate(zip(there, here, strict=False))
            same = len(there) == len(here)
            return same and all(compare(old, new, f"{name}.{index}") for index, (old, new) in pairs)
        if there != here:
            texts.append(f"{name}={_setting(here)}")
        return True

    said = {key: value for key, value in base.items() if key not in ("name", "description")}
    # a method's name on the outside is that of the last phase, which says it itself
    compared = {key: value for key, value in recipe.items() if key != "method"}
    return texts if compare(said, compared, "") else None


def _setting(value: Any) -> str:
    """Write a value as `--set` reads it."""
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def _methods(recipe: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the method of a recipe's last phase, and those inside it."""
    phases = recipe.get("phases")
    holder = phases[-1].get("objective") if isinstance(phases, list) and phases else None
    found = []
    while isinstance(holder, dict):
        found.append(str(holder.get("method", "")))
        holder = holder.get("inner")
    return tuple(found)


def _measured(result: Result, linted: Sequence[Linted]) -> Measured:
    taken = {field.name for field in dataclasses.fields(Measured)} - {"held", "linter"}
    return Measured(
        **{name: getattr(result, name) for name in sorted(taken)},
        held=all(check.held for check in result.checks),
        linter=_linter(result.variant, linted),
    )


def _linter(variant: str, linted: Sequence[Linted]) -> str:
    found = next((lint for lint in linted if lint.variant == variant), None)
    return NOT_LINTED if found is None else FAILED if found.alarms else PASSED


# --- the files ---


def package_dir() -> Path:
    """Return the folder of the package: it holds `bundles/`, `cards/` and `catalog.json`."""
    return zoo.hub.source.bundled_dir().parent


def cached_file() -> Path:
    """Return the file in the user's cache that holds what was found on the hub; it need not exist."""
    return cache_dir() / CATALOG_FILE


def card_files(folder: Path | None = None) -> list[tuple[Path, bool]]:
    """Return the cards of the package, and of each whether its model is bundled; sorted, bundled ones first."""
    bundles = zoo.hub.source.bundled_dir() if folder is None else folder / "bundles"
    cards = (folder or package_dir()) / CARDS_DIR
    # a name with a dot in front is a bundle that is being written
    bundled = sorted(bundles.glob(f"[!.]*/{CARD_FILE}")) if bundles.is_dir() else []
    others = sorted(cards.glob("[!.]*.json")) if cards.is_dir() else []
    return [*((file, True) for file in bundled), *((file, False) for file in others)]


def cards() -> list[Card]:
    """Return all cards of the package, bundled or not, sorted by name.

    Raises:
        BundleError: a card cannot be read, or is not called as its model.
    """
    found = (_read_card(file, file.parent.name if bundled else file.stem)[0] for file, bundled in card_files())
    return sorted(found, key=lambda card: card.name)


def card_of(name: str) -> Card | None:
    """Return the card of a model of the package, bundled or not; None if there is none of that name.

    Raises:
        BundleError: the card cannot be read, or is not called as its model.
    """
    for file, bundled in card_files():
        if name == (file.parent.name if bundled else file.stem):
            return _read_card(file, name)[0]
    return None


def _read_card(file: Path, name: str) -> tuple[Card, str]:
    content = file.read_bytes()
    try:
        card = Card.from_json(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BundleError(f"{file} is not UTF-8 ({error}); fetch or export the bundle again") from error
    except BundleError as error:
        raise type(error)(f"{file}: {error}") from error
    if card.name != name:
        raise BundleError(f"{file} holds the card of {card.name!r}, expected {name!r}; rename one of them")
    return card, hashlib.sha256(content).hexdigest()


def to_json(entries: Iterable[Entry]) -> str:
    """Return `catalog.json`: the same entries give the same text, a line per result."""
    document = {"schema": SCHEMA, "models": [dataclasses.asdict(entry) for entry in entries]}
    return _written(_lists(document)) + "\n"


def from_json(text: str) -> tuple[Entry, ...]:
    """Read what `to_json` wrote.

    Raises:
        BundleError: it is not JSON, has an unknown schema, lacks a key, or a value has the wrong type.
    """
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"the catalogue is not JSON ({error})") from error
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema != SCHEMA:
        raise BundleError(f"the catalogue has schema {schema!r}, this version reads {SCHEMA}")
    entries: tuple[Entry, ...] = _loaded(tuple[Entry, ...], document.get("models"), "models")
    return entries


def write(entries: Iterable[Entry], file: Path) -> None:
    """Write a catalogue in one step; its folder must exist."""
    write_text_atomic(file, to_json(entries))


def load(warn: Callable[[str], None] | None = None) -> tuple[Entry, ...]:
    """Return what is known of all models, by name: the package's catalogue with what `refresh` found on the hub.

    A bundled model's numbers are those of the card that stands beside it, whatever the catalogue says. A model on the
    hub is one of the package if its card is, byte for byte: a card has the digest of every file, so it does not matter
    who published it. Any other is a further model, called by its repository; a stranger's numbers never stand beside a
    name of the package.

    Args:
        warn: is told, in one sentence, of a file that cannot be used; the list is then without it.
    """
    entries = {entry.name: entry for entry in _bundled_now(_filed(package_dir() / CATALOG_FILE, warn))}
    others = []
    try:
        cached = _filed(cached_file(), warn)
    except BadInput:  # a user without a home, who has no cache either
        cached = ()
    for found in cached:
        known = entries.get(found.name)
        if known is None or known.card != found.card:
            others.append(found)
        else:
            where = replace(known.where, repository=found.where.repository, commit=found.where.commit)
            entries[found.name] = replace(known, where=where)
    return tuple(sorted([*entries.values(), *others], key=lambda entry: (entry.name, entry.source)))


def entry(name: str) -> Entry | None:
    """Return what is known of the model of this name; None if nothing is. The package's goes before the hub's."""
    found = [entry for entry in load() if entry.name == name]
    return min(found, key=lambda entry: entry.where.repository is not None and not entry.where.commands, default=None)


def on_the_hub(author: str | None = None) -> tuple[Entry, ...]:
    """Return what the cards on the hub say now, sorted by name.

    Args:
        author: an organisation or user; None is everybody.

    Raises:
        BadInput: the hub cannot be reached.
    """
    from zoo.hub.hub import hub_cards  # lazily: what is in the package needs no HTTP client

    entries = []
    for repository, commit, card in hub_cards(author):
        digest = hashlib.sha256(card.to_json().encode()).hexdigest()
        entries.append(entry_of(card, digest, {}, bundled=False, repository=repository, commit=commit))
    return tuple(sorted(entries, key=lambda entry: (entry.name, entry.source)))


def refresh(author: str | None = None) -> tuple[Path, tuple[Entry, ...]]:
    """Read the cards that are published on the hub and keep what they say in the user's cache.

    Args:
        author: an organisation or user; None is everybody.

    Returns:
        The file, and the entries in it.

    Raises:
        BadInput: the hub cannot be reached; the file of the last time stays.
    """
    entries = on_the_hub(author)
    file = cached_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    write(entries, file)
    return file, entries


def eps_shown(eps: Iterable[Fraction]) -> list[Fraction]:
    """Return which radii to compare at, ascending: the usual ones that occur, else those that occur most often.

    Args:
        eps: the radius of each measurement.
    """
    counted = Counter(place for place in eps if place)
    usual = [place for place in USUAL_EPS if place in counted]
    return sorted(usual or sorted(counted, key=lambda place: (-counted[place], place))[:SHOWN_EPS])


def _filed(file: Path, warn: Callable[[str], None] | None) -> tuple[Entry, ...]:
    if not file.is_file():
        return ()
    try:
        return from_json(file.read_text(encoding="utf-8"))
    except (BundleError, OSError, UnicodeDecodeError) as error:
        if warn is not None:
            again = "refresh" if file == cached_file() else "build"
            warn(f"{file} is left out: {error}; `manygates catalog {again}` writes it again")
        return ()


def _bundled_now(filed: Iterable[Entry]) -> list[Entry]:
    """Return the filed entries with those of bundled models as their cards are now, and without those that are gone."""
    known = {entry.name: entry for entry in filed}
    now = []
    for file, bundled in card_files():
        if not bundled:
            continue
        earlier = known.pop(file.parent.name, None)
        if earlier is not None and earlier.where.bundled and earlier.card == _digest(file):
            now.append(earlier)
            continue
        card, digest = _read_card(file, file.parent.name)
        fresh = entry_of(card, digest, {}, bundled=True)
        if earlier is not None:  # measured again or moved into the package: what was trained stays
            commands = earlier.where.commands
            fresh = replace(fresh, where=replace(fresh.where, commands=commands), trained=earlier.trained)
        now.append(fresh)
    return [*now, *(entry for entry in known.values() if not entry.where.bundled)]


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _written(value: Any, depth: int = 0) -> str:
    """Return JSON with a line per field of a model and per result, so that a changed number is a changed line."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    if not inner or depth > 3 or (depth == 3 and not any(isinstance(entry, dict) for entry in inner)):
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    pad, end = " " * (depth + 1), " " * depth
    if isinstance(value, dict):
        rows = (f"{pad}{json.dumps(key)}: {_written(entry, depth + 1)}" for key, entry in value.items())
        return "{\n" + ",\n".join(rows) + f"\n{end}}}"
    return "[\n" + ",\n".join(f"{pad}{_written(entry, depth + 1)}" for entry in value) + f"\n{end}]"


def _lists(value: Any) -> Any:
    """Turn tuples into lists, so that all of it is JSON's own types."""
    if isinstance(value, dict):
        return {key: _lists(entry) for key, entry in value.items()}
    return [_lists(entry) for entry in value] if isinstance(value, (tuple, list)) else value


def _loaded(kind: Any, value: Any, key: str) -> Any:
    """Turn JSON into a dataclass, tuple[…], Mapping[str, …], X | None or scalar, or say what does not fit."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        if not isinstance(value, dict) or value.keys() != hints.keys():
            raise BundleError(f"the catalogue has {key} = {value!r}, expected the keys {', '.join(hints)}"[:300])
        made: Callable[..., Any] = typing.cast("Callable[..., Any]", kind)
        return made(**{name: _loaded(hints[name], value[name], f"{key}.{name}") for name in hints})
    if origin is types.UnionType:
        return None if value is None else _loaded(arguments[0], value, key)
    if origin is tuple and isinstance(value, list):
        return tuple(_loaded(arguments[0], entry, f"{key}[{index}]") for index, entry in enumerate(value))
    if isinstance(value, dict) and isinstance(origin, type) and issubclass(origin, Mapping):
        return {name: _loaded(arguments[1], entry, f"{key}.{name}") for name, entry in value.items()}
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise BundleError(f"the catalogue has {key} = {value!r}, expected {getattr(kind, '__name__', kind)}"[:300])
    return value
