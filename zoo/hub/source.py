"""Where models are found: bundled with the package, in a folder, or on the Hugging Face hub; and which ones are known.

One spelling everywhere: a catalogue name (`eio-resnet20-cifar10`), `local-dir:FOLDER` (or just a folder that holds a
card.json), or `hf-hub:ORGANISATION/NAME[@REVISION]`.

A command resolves a source once and hands on what it opened. `resolve` says where a model is, `find` settles on one
version and reads its card, `open` fetches and checks files.

The catalogue is the cards themselves: of the bundled models (`bundles/NAME/card.json`), of models that are too large or
too many to be bundled (`cards/NAME.json`), and of what was seen on the hub (in the user's cache). Listing needs neither
weights nor a network.
"""

from __future__ import annotations

import importlib.resources
import shlex
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from zoo.bundle.bundle import CARD_FILE, Bundle
from zoo.bundle.card import Card
from zoo.errors import BadInput, BundleError, ManygatesError, UnknownName
from zoo.files import cache_dir, replace_directory
from zoo.hub.client import HUB_PREFIX as HUB_PREFIX
from zoo.hub.client import named, parse_repository
from zoo.hub.fetch import fetch_card, fetch_files

LOCAL_PREFIX = "local-dir:"
HUB_CARDS_DIR = "hub-cards"
"""In the user's cache: ORGANISATION--NAME--COMMIT.json; no name on the hub holds two hyphens in a row."""

# --- where a model is ---


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a model's bundle is: in a folder (bundled or local), or in a repository on the hub."""

    kind: Literal["bundled", "local", "hub"]
    folder: Path | None = None
    repository: str | None = None
    """`organisation/name` on the hub."""
    revision: str | None = None
    """A branch, tag or commit of the repository; None is its main branch."""

    written: str = field(default="", compare=False)
    """How the user named it."""

    def find(self) -> Found:
        """Settle on one very version, of the hub the present commit, and read its card.

        What is opened later is of the same version, and asks the hub for nothing that is in the cache.

        Raises:
            BadInput: the hub has no such repository or cannot be reached.
            BundleError: as `Bundle.open`.
        """
        if self.repository is not None:
            bundle = fetch_card(self.repository, self.revision)
            return Found(name=named(self.repository, bundle.folder.name), source=self, bundle=bundle)
        assert self.folder is not None
        return Found(name=self.written, source=self, bundle=Bundle.open(self.folder, only=()))

    def open(self, only: Iterable[str] | Callable[[Card], Iterable[str]] | None = None) -> Bundle:
        """Find the model and open it: `find` and `Found.open` at once; `only` may also name the files for a card."""
        found = self.find()
        return found.open(only(found.card) if callable(only) else only)


@dataclass(frozen=True, kw_only=True)
class Found:
    """A model of one very version, its card read. Nothing else was fetched or checked yet."""

    name: str
    """The source that names this version: as the user wrote it, on the hub with the commit."""
    source: Source
    bundle: Bundle
    """Its card is checked; `open` fetches and checks files."""

    @property
    def card(self) -> Card:
        """The model's card."""
        return self.bundle.card

    def open(self, only: Iterable[str] | None = None) -> Bundle:
        """Return the bundle with the files named in `only`, or all, here and checked; others are not fetched.

        Raises:
            BadInput: the hub cannot be reached.
            BundleError: as `Bundle.open`.
        """
        wanted = tuple(self.card.files if only is None else only)
        if self.source.repository is not None:
            fetch_files(self.source.repository, self.bundle, wanted)
        for name in wanted:
            self.bundle.file(name)
        return self.bundle


def resolve(model: str) -> Source:
    """Say where `model` is to be found, without fetching or opening it.

    Raises:
        BadInput: if it is empty, a malformed repository, or looks like a folder that holds no card.
        UnknownName: if it is no name in the catalogue; the message lists those.

    A model that is in the catalogue and not bundled is no name either: BadInput says how to pull or train it. It is not
    fetched by that name, because anybody may publish a model under any name; a repository says whose it is.
    """
    if model.startswith(LOCAL_PREFIX):
        place = model.removeprefix(LOCAL_PREFIX)
        if not place:
            raise BadInput(f"{model!r} names no folder, expected {LOCAL_PREFIX}FOLDER")
        return Source(kind="local", folder=_at_home(place), written=model)
    if model.startswith(HUB_PREFIX):
        repository, revision = parse_repository(model.removeprefix(HUB_PREFIX))
        return Source(kind="hub", repository=repository, revision=revision, written=model)
    if model in _bundled_names():
        return Source(kind="bundled", folder=bundled_dir() / model, written=model)
    if model and ((folder := _at_home(model)) / CARD_FILE).is_file():
        return Source(kind="local", folder=folder, written=model)
    if not model or model.startswith((".", "~")) or "/" in model or "\\" in model or Path(model).exists():
        raise BadInput(
            f"{model!r} is no name in the catalogue and no folder with a {CARD_FILE}; write {LOCAL_PREFIX}FOLDER for a "
            f"bundle on this machine or {HUB_PREFIX}ORGANISATION/NAME for one on the hub"
        )
    raise _not_here(model)


def find(model: str) -> Found:
    """Find a model by name and read its card: `resolve` and `Source.find` at once; raises as these two."""
    return resolve(model).find()


def open_model(model: str, *, only: Iterable[str] | Callable[[Card], Iterable[str]] | None = None) -> Bundle:
    """Open the bundle of a model by name, checksums checked: `resolve` and `Source.open` at once; raises as these."""
    return resolve(model).open(only)


def _at_home(place: str) -> Path:
    try:
        return Path(place).expanduser()
    except RuntimeError as error:
        raise BadInput(f"{place!r} is below a home folder that nobody knows here; write the whole path") from error


def _not_here(model: str) -> ManygatesError:
    """Say how to get a model that the catalogue knows, or which ones there are."""
    models = known_models()
    known = _of_name(models, model)
    if known is not None:
        return BadInput(f"{model!r} is in the catalogue and does not come with manygates: {known.how_to_get()}")
    return UnknownName(model, {known.card.name for known in models}, kind="model")


# --- which models are known ---


@dataclass(frozen=True, kw_only=True)
class KnownModel:
    """A model of the catalogue: its card, and where it is to be had; all places at once are possible."""

    card: Card
    bundled: bool = False
    stranger: bool = False
    """Whether its card comes from the hub alone, so that anybody may have written it."""
    repository: str | None = None
    """`organisation/name` on the hub."""
    commit: str | None = None
    """Of the repository when its card was read."""

    @property
    def source(self) -> str:
        """What to write where a model is taken, if it can be taken from somewhere; else its name."""
        if self.bundled or self.repository is None:
            return self.card.name
        return named(self.repository, None)

    @property
    def commands(self) -> tuple[str, ...]:
        """What makes it from nothing, one command after the other; a stranger's are not passed on."""
        return () if self.stranger else commands_of(self.card)

    def how_to_get(self) -> str:
        """Say in commands how to get a model that is not bundled."""
        ways = []
        if self.repository is not None:
            ways.append(f"`manygates pull {named(self.repository, self.commit)}` fetches it")
        if self.commands:
            ways.append(f"`{' && '.join(self.commands)}` trains it and writes its bundle")
        return ", or ".join(ways) or "no recipe of this version makes it"


def commands_of(card: Card) -> tuple[str, ...]:
    """Return the commands that make a model from nothing, as its card tells; none where no recipe here makes it."""
    recipe, overrides = card.training.recipe, card.training.overrides
    if overrides is None:
        return ()
    seeds = recipe.get("seeds")
    several = seeds if isinstance(seeds, list) and len(seeds) > 1 else [None]  # networks trained apart
    runs, commands = [], []
    for seed in several:
        run = f"runs/{card.name}" + ("" if seed is None else f"-{seed}")
        changes = [text for text in overrides if seed is None or not text.startswith("seed=")]
        changes += [] if seed is None else [f"seed={seed}"]
        words = ["manygates", "train", str(recipe.get("name", "")), "--out", run]
        for text in changes:
            words += ["--set", text]
        runs.append(run)
        commands.append(shlex.join(words))
    commands.append(shlex.join(_last_step(card, runs)))
    if card.int8 is not None and isinstance(recipe.get("derived"), dict):  # `derive` writes no int8 graphs
        commands.append(f"manygates export {LOCAL_PREFIX}models/{card.name} --int8")
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


def bundled_dir() -> Path:
    """Return the folder inside the package that holds one bundle per model; it need not exist."""
    return Path(str(importlib.resources.files("zoo") / "bundles"))


def list_bundled() -> list[Card]:
    """Return the cards of the models that come with the package, sorted by name; their files are not checked.

    Raises:
        BundleError: a card cannot be read, or is not called as its model.
    """
    return [_read_card(bundled_dir() / name / CARD_FILE, name) for name in _bundled_names()]


def package_models() -> tuple[KnownModel, ...]:
    """Return the models whose cards come with the package, bundled or not, sorted by name.

    Raises:
        BundleError: a card cannot be read, is not called as its model, or two have one name.
    """
    models = {card.name: KnownModel(card=card, bundled=True) for card in list_bundled()}
    for file in sorted((bundled_dir().parent / "cards").glob("[!.]*.json")):
        if file.stem in models:
            raise BundleError(f"{file} is the card of {file.stem!r}, which is bundled already; delete one of them")
        models[file.stem] = KnownModel(card=_read_card(file, file.stem))
    return tuple(models[name] for name in sorted(models))


def known_models(warn: Callable[[str], None] | None = None) -> tuple[KnownModel, ...]:
    """Return every model that is known here, by name: those of the package, and what was seen on the hub.

    A model on the hub is one of the package if its card is the same: a card has the digest of every file, so it does
    not matter who published it. Any other is a further model, called by its repository; a stranger's numbers never
    stand beside a name of the package. A card in the cache that cannot be used is left out, and `warn` is told.

    Raises:
        BundleError: as `package_models`.
    """
    models = {model.card.name: model for model in package_models()}
    others = []
    for found in _seen_on_hub(warn):
        ours = models.get(found.card.name)
        if ours is None or ours.card != found.card:
            others.append(found)
        else:
            models[ours.card.name] = replace(ours, repository=found.repository, commit=found.commit)
    return tuple(sorted([*models.values(), *others], key=lambda model: (model.card.name, model.source)))


def known_model(name: str) -> KnownModel | None:
    """Return what is known of the model of this name; None if nothing is. The package's goes before the hub's."""
    return _of_name(known_models(), name)


def keep_seen(models: Sequence[KnownModel], author: str | None = None) -> Path:
    """Keep the cards of models that are on the hub now, in the place of those that were seen before.

    Where they are those of one `author`, cards of others stay. Returns the folder in the user's cache.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    folder = _hub_cards_dir()
    with replace_directory(folder) as new_dir:
        for file in folder.glob("*.json") if author is not None else ():
            if not file.name.startswith(f"{author}--"):
                shutil.copyfile(file, new_dir / file.name)
        for model in models:
            stem = "--".join([*str(model.repository).split("/"), str(model.commit)])
            (new_dir / f"{stem}.json").write_text(model.card.to_json(), encoding="utf-8", newline="\n")
    return folder


def _of_name(models: Iterable[KnownModel], name: str) -> KnownModel | None:
    return min((model for model in models if model.card.name == name), key=lambda model: model.stranger, default=None)


def _hub_cards_dir() -> Path:
    return cache_dir() / HUB_CARDS_DIR


def _seen_on_hub(warn: Callable[[str], None] | None) -> list[KnownModel]:
    """Return the models whose cards `keep_seen` kept."""
    try:
        files = sorted(_hub_cards_dir().glob("*.json"))
    except BadInput:  # a user without a home, who has no cache either
        return []
    models = []
    for file in files:
        try:
            organisation, name, commit = file.stem.split("--")
            card = _read_card(file)
        except (BundleError, OSError, ValueError) as error:
            if warn is not None:
                warn(f"{file} is left out: {error}; `manygates list --hub` writes it again")
            continue
        models.append(KnownModel(card=card, stranger=True, repository=f"{organisation}/{name}", commit=commit))
    return models


def _bundled_names() -> list[str]:
    # a name with a dot in front is a bundle that is being written
    return sorted(file.parent.name for file in bundled_dir().glob(f"[!.]*/{CARD_FILE}"))


def _read_card(file: Path, name: str | None = None) -> Card:
    """Read a card of the catalogue, which must be called `name` unless that is None."""
    try:
        card = Card.from_json(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise BundleError(f"{file} is not UTF-8 ({error}); fetch or export the bundle again") from error
    except BundleError as error:
        raise type(error)(f"{file}: {error}") from error
    if name not in (None, card.name):
        raise BundleError(f"{file} holds the card of {card.name!r}, expected {name!r}; rename one of them")
    return card
