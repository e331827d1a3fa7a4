"""Which models there are to serve, and loading them: at the start, on request, and after a change.

A source is a bundle, or a folder of numbered versions of it (`NAME/1`, `NAME/2`), of which the latest is served. A
model is loaded, its checksums checked and warmed up on a thread beside the event loop, and takes the place of the one
before only when all of that has succeeded: a bundle that is damaged or half copied never stops a model that works, and
neither does a repository that cannot be read for a while.
"""

import asyncio
import contextlib
import dataclasses
import hashlib
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from serving.cores import usable_cores
from serving.engine.engine import Engine
from serving.engine.exits import ExitChoice
from serving.engine.graphs import choose_mode, graph_files, modes_of
from serving.errors import RequestError
from serving.operations.log import logger
from serving.operations.settings import ModelSettings, Settings
from serving.protocol.open_inference import VERSION
from serving.scheduling.service import Model, Service
from zoo.bundle.bundle import CARD_FILE
from zoo.errors import BadInput, BundleError, ManygatesError
from zoo.hub.source import LOCAL_PREFIX, find, resolve
from zoo.vocabulary import NAME

_VERSION: Final = re.compile(r"[1-9][0-9]{0,17}")
_MOMENT: Final = 0.1  # seconds; a bundle is replaced by two renames


@dataclasses.dataclass
class Entry:
    """A model of the index."""

    settings: ModelSettings
    name: str = ""
    version: str = VERSION
    state: str = "UNAVAILABLE"
    reason: str = ""
    fingerprint: str = ""
    """Of the card that is served; empty where changes cannot be seen."""
    of_folder: bool = False
    """Whether it was found in the repository's folder, and goes when its folder goes."""
    unloaded: bool = False
    """Whether a client asked not to serve it."""
    missing: bool = False
    """Whether its card was not there at the last look; while a bundle is replaced it is away for a moment."""
    late: bool = False
    """Whether it was found when all else was served; it costs no readiness if it cannot be loaded."""

    @property
    def shown(self) -> str:
        """Its name, or its source while no card has said its name."""
        return self.name or self.settings.source

    @property
    def folder(self) -> Path:
        """Where its bundle lies, if that is on this machine."""
        return Path(self.settings.source.removeprefix(LOCAL_PREFIX))


class Repository:
    """The models that are served or could be."""

    def __init__(self, settings: Settings) -> None:
        """Look for the models of `settings`; `load_all` loads them. BadInput if the repository is no folder."""
        self._settings = settings
        self._entries: list[Entry] = [Entry(settings=model) for model in settings.model_settings]
        # not resolved: a link is followed at every look, because a release may be made by changing it
        self._folder = Path(settings.model_repository).absolute() if settings.model_repository else None
        if self._folder is not None and not self._folder.is_dir():
            raise BadInput(f"model_repository is {settings.model_repository!r}, expected a folder of bundles")
        self._seen: tuple[int, int] | None = None
        """Device and inode of the folder when it was last read."""
        self._away = ""
        """Why the folder cannot be read; empty if it can."""
        self._lock = asyncio.Lock()
        self._loading: set[asyncio.Future[list[str]]] = set()
        self._find()

    def load_all(self) -> list[Model]:
        """Load every model.

        Raises:
            ManygatesError: if a model that the settings name cannot be served; one of the repository's folder is left
                out, with its reason in the log and the index.
        """
        models: list[Model] = []
        for entry in self._entries:
            try:
                model, fingerprint = self._load(entry)
                self._loaded(entry, model, fingerprint)
            except ManygatesError as error:
                if not entry.of_folder:
                    raise
                self._failed(entry, error)
                continue
            models.append(model)
        return models

    @property
    def complete(self) -> bool:
        """Whether all is served that should be: what the settings name and what the repository's folder holds.

        A model that a client unloaded on purpose is not missing, and neither is one that came when all else was served
        and cannot be loaded: that must not stop the others. With the setting `allow_empty` nothing is ever missing.
        """
        wanted = [entry for entry in self._entries if not entry.late]
        return self._settings.allow_empty or (
            bool(wanted) and all(entry.state == "READY" or entry.unloaded for entry in wanted)
        )

    def missing(self) -> str:
        """Say what should be served and is not, and what can be done; empty if nothing is missing."""
        if self.complete:
            return ""
        lacking = [entry.shown for entry in self._entries if entry.state != "READY"]
        what = f"{', '.join(lacking)} cannot be loaded" if lacking else "the model repository is empty"
        if self._settings.reload_seconds or self._settings.allow_repository_changes:
            return f"{what}; the server is ready when that is mended, or at once with --allow-empty"
        return f"{what}, and nobody looks again; set --reload-seconds, or --allow-empty to be ready all the same"

    def index(self) -> list[dict[str, str]]:
        """Return what the protocol calls the repository's index."""
        return [
            {"name": entry.shown, "version": entry.version, "state": entry.state, "reason": entry.reason}
            for entry in self._entries
        ]

    async def load(self, service: Service, name: str) -> list[str]:
        """Load a model of the index, all of its versions, again if they are served already.

        A version that has gone from the repository is served no longer; returns those. What can be loaded is, whatever
        else fails.

        Raises:
            RequestError: 404 if there is none of this name, 400 if a version cannot be loaded; it says which.
        """
        # a client that gives up stops nothing in the middle: what is served and what the index says stay the same
        task = asyncio.ensure_future(self._load_named(service, name))
        self._loading.add(task)
        task.add_done_callback(self._ended)
        return await asyncio.shield(task)

    def _ended(self, task: asyncio.Future[list[str]]) -> None:
        self._loading.discard(task)
        if not task.cancelled():
            task.exception()  # told whoever still waits, and in the log and the index

    async def _load_named(self, service: Service, name: str) -> list[str]:
        async with self._lock:
            readable = await asyncio.to_thread(self._find)
            gone: list[str] = []
            loaded: list[str] = []
            failures: list[tuple[str, str]] = []
            for entry in self._entries_of(name):
                if readable and entry.of_folder and await _has_gone(entry):
                    gone.append(entry.version)
                    self._forget(service, entry)
                    continue
                try:
                    await self._renew(service, entry)
                    loaded.append(entry.version)
                except ManygatesError as error:
                    failures.append((entry.version, self._without_paths(error)))
            if failures:
                told = _told(name, failures, loaded, gone, service.versions(name))
                raise RequestError(400, "load_failed", told)
            if not loaded:
                told = f"{name} has gone from the repository ({_listed(gone)}), and is served no longer"
                raise RequestError(404, "unknown_model", told)
            return gone

    async def unload(self, service: Service, name: str) -> None:
        """Serve a model no longer; it can be loaded again. 404 if it is not served."""
        async with self._lock:
            service.drop(name)
            service.metrics.loaded(name, "unloaded")
            for entry in self._entries:
                if entry.name == name:
                    entry.state, entry.reason, entry.fingerprint, entry.unloaded = "UNAVAILABLE", "unloaded", "", True

    async def watch(self, service: Service, seconds: float) -> None:
        """Load again whatever has changed, every few seconds, for ever."""
        while True:
            await asyncio.sleep(seconds)
            try:
                await self.refresh(service)
            except Exception:
                logger.exception("looking for changed bundles failed")

    async def refresh(self, service: Service) -> None:
        """Load again whatever has changed, and what is new in the repository's folder; drop what has gone from it.

        While the folder cannot be read, nothing has gone from it.
        """
        async with self._lock:
            readable = await asyncio.to_thread(self._find)
            for entry in list(self._entries):
                if entry.of_folder and not readable:
                    continue
                if entry.of_folder and await asyncio.to_thread(_is_file, entry.folder / CARD_FILE) is False:
                    if entry.missing:
                        self._forget(service, entry)
                    entry.missing = True
                elif not entry.unloaded:
                    await self._look_again(service, entry)

    async def _look_again(self, service: Service, entry: Entry) -> None:
        """Load a bundle again if it has changed; whatever is wrong with it is in the log and the index."""
        try:
            found = await asyncio.to_thread(self._fingerprint, entry)
        except ManygatesError as error:
            if entry.missing or entry.of_folder:  # of a bundle that is named: not while it is being replaced
                self._failed(entry, error)
            entry.missing = True
            return
        entry.missing = False
        if found == entry.fingerprint:
            entry.reason = ""  # what could not be loaded has been taken back
        elif found:
            with contextlib.suppress(ManygatesError):
                await self._renew(service, entry)

    def _forget(self, service: Service, entry: Entry) -> None:
        """Serve no longer what has gone from the repository's folder."""
        self._entries.remove(entry)
        if entry.state == "READY":
            service.drop(entry.name, entry.version)
            service.metrics.loaded(entry.name, "unloaded")
            logger.info("%s version %s has gone from the repository", entry.name, entry.version)

    async def _renew(self, service: Service, entry: Entry) -> None:
        before = (entry.name, entry.version) if entry.state == "READY" else None
        try:
            model, fingerprint = await asyncio.to_thread(self._load, entry)
            self._loaded(entry, model, fingerprint)
        except ManygatesError as error:
            cause = error
            if entry.of_folder and self._away:  # then nothing can be said of the bundle
                cause = BundleError(f"{self._told_away}; what was loaded goes on answering")
            service.metrics.loaded(entry.shown, "failed")
            self._failed(entry, cause)
            raise cause from error.__cause__
        service.put(model)
        if before is not None and before != (entry.name, entry.version):
            service.drop(*before)
        service.metrics.loaded(model.card.name, "loaded")
        logger.info("loaded %s", described(model))

    def _load(self, entry: Entry) -> tuple[Model, str]:
        """Load a model, perhaps on a thread beside the event loop; returns it and its card's fingerprint."""
        try:
            self._check_inside(entry)
            return load(entry.settings, self._settings, version=entry.version)
        except OSError as error:  # it is being written, or may not be read
            raise _unreadable(entry.folder, error) from error

    def _loaded(self, entry: Entry, model: Model, fingerprint: str) -> None:
        """Note that a model is about to be served."""
        for other in self._entries:
            names = (other.name, other.version) == (model.card.name, model.version)
            if other is not entry and other.state == "READY" and names:
                raise BadInput(f"{model.card.name!r} is to be served twice; name each model once, or give it a name")
        entry.name, entry.version = model.card.name, model.version
        entry.state, entry.reason, entry.unloaded, entry.late = "READY", "", False, False
        entry.fingerprint = fingerprint

    def _failed(self, entry: Entry, error: ManygatesError) -> None:
        reason = self._without_paths(error)
        if entry.reason != reason:  # once, not at every look
            kept = "; the version before is still served" if entry.state == "READY" else ""
            logger.error("%s cannot be loaded%s: %s", entry.shown, kept, error)
        entry.reason = reason

    def _entries_of(self, name: str) -> list[Entry]:
        found = [entry for entry in self._entries if entry.name == name]
        if not found:
            known = ", ".join(sorted({entry.name for entry in self._entries if entry.name})) or "none"
            away = f"; {self._told_away}, so what is new in it is not seen" if self._away else ""
            raise RequestError(404, "unknown_model", f"the repository has no model {name[:128]!r}, only {known}{away}")
        return found

    def _without_paths(self, error: ManygatesError) -> str:
        """Return what an error says, without where the files lie: clients need not know."""
        text = str(error)
        folders = {str(entry.folder) for entry in self._entries if entry.folder.is_absolute()}
        for folder in sorted(folders, key=len, reverse=True):
            text = text.replace(folder, "…")
        return re.sub(r"(?:/[^\s/:;,()'\"]+){2,}", "…", text)

    def _fingerprint(self, entry: Entry) -> str:
        """Return what changes when the bundle of an entry does; empty where that cannot be seen."""
        try:
            self._check_inside(entry)
            source, _ = _versioned(entry.settings.source) if not entry.of_folder else (entry.settings.source, "")
            return _fingerprint(source)
        except OSError as error:
            raise _unreadable(entry.folder, error) from error

    def _check_inside(self, entry: Entry) -> None:
        """Refuse a bundle of the repository that is a link to somewhere else by now."""
        if entry.of_folder and not self._is_inside(entry.folder):
            raise BundleError(f"{entry.folder} is a link that leads out of the model repository; copy the bundle")

    def _is_inside(self, folder: Path) -> bool:
        assert self._folder is not None
        try:
            return (folder / CARD_FILE).resolve().is_relative_to(self._folder.resolve())
        except RuntimeError:  # a link that leads to itself
            return False

    def _find(self) -> bool:
        """Add what is new in the repository's folder; returns False if the folder cannot be read now."""
        if self._folder is None:
            return True
        try:
            identity = self._folder.stat()
            places = [place for place in sorted(self._folder.iterdir()) if NAME.fullmatch(place.name)]
        except OSError as error:
            return self._note_away(error.strerror or str(error))
        known = {entry.settings.source for entry in self._entries}
        found = [(place, *bundle) for place in places for bundle in self._bundles_of(place)]
        seen = (identity.st_dev, identity.st_ino)
        if not found and self._seen not in (None, seen) and any(entry.of_folder for entry in self._entries):
            # what is left of a mount that has gone is an empty folder, and not the one that was there before
            return self._note_away("another folder is there, and it is empty")
        if self._away:
            logger.info("the model repository can be read again")
        self._seen, self._away = seen, ""
        late = self.complete
        for place, folder, version in found:
            source = f"{LOCAL_PREFIX}{folder}"
            if source not in known and self._is_inside(folder):  # no link to somewhere else
                own = self._settings.settings_of({"source": source, "name": place.name})
                entry = Entry(settings=own, name=place.name, version=version, of_folder=True, late=late)
                self._entries.append(entry)
        return True

    def _bundles_of(self, place: Path) -> list[tuple[Path, str]]:
        """Return the bundles in one folder of the repository; of one that cannot be read, the folder itself."""
        try:
            return _bundles_in(place)
        except OSError:  # loading it says why
            loaded = any(place in (entry.folder, entry.folder.parent) for entry in self._entries)
            return [] if loaded else [(place, VERSION)]

    def _note_away(self, reason: str) -> bool:
        before, self._away = self._away, reason
        if before != reason:  # once, not at every look
            logger.error("%s; what was loaded is still served", self._told_away)
        return False

    @property
    def _told_away(self) -> str:
        return f"the model repository cannot be read ({self._away})"


def _told(
    name: str, failures: list[tuple[str, str]], loaded: list[str], gone: list[str], answering: Sequence[str]
) -> str:
    """Say what failed of a load (version and reason), and what it has changed all the same.

    A reason that several versions share is said once.
    """
    versions_by_reason: dict[str, list[str]] = {}
    for version, reason in failures:
        versions_by_reason.setdefault(reason, []).append(version)
    if len(versions_by_reason) == 1 and not loaded and not gone:
        problem = next(iter(versions_by_reason))
    else:
        problem = "; ".join(f"{_listed(versions)}: {reason}" for reason, versions in versions_by_reason.items())
    sentences = [f"{name} was not loaded in full: {problem}" if loaded else f"{name} was not loaded: {problem}"]
    if loaded:
        sentences.append(f"Loaded: {_listed(loaded)}")
    if gone:
        sentences.append(f"Gone from the repository and served no longer: {_listed(gone)}")
    sentences.append(f"Answering now: {_listed(answering) if answering else 'no version'}")
    return ". ".join(sentences)


def _listed(versions: Sequence[str]) -> str:
    return f"version{'s' if len(versions) > 1 else ''} {', '.join(versions)}"


def described(model: Model) -> str:
    """Say in a line what is served and how."""
    details = ", ".join(f"{name} {value}" for name, value in model.details if value)
    return f"{model.card.name} version {model.version}: mode {model.mode}, {details}"


def load(model: ModelSettings, settings: Settings, *, version: str = VERSION) -> tuple[Model, str]:
    """Load a model's graphs, run them once at every batch size, and return it with the fingerprint of its card.

    Raises:
        ManygatesError: of many kinds; see `serving.server.serve`.
    """
    source, found = _versioned(model.source)
    version = found or version
    fingerprint = _fingerprint(source)
    place = find(source)  # of the hub: card and graphs from one commit
    card = place.card
    chosen = choose_mode(card, model.mode or None)
    more = [choose_mode(card, mode) for mode in modes_of(card)] if model.allow_mode_choice else []
    if model.precision == "int8":
        more = [mode for mode in more if graph_files(card, [mode])[0].replace(".onnx", ".int8.onnx") in card.files]
    any_exit = settings.allow_exit_choice
    confidence = model.confidence[0] if len(model.confidence) == 1 else model.confidence or None
    choice = ExitChoice(exit=model.exit or None, confidence=confidence)
    needed = graph_files(card, (chosen, *more), choice, any_exit=any_exit, precision=model.precision)
    engine = Engine(
        place.open(needed),
        chosen,
        more_modes=more,
        draws=model.draws,
        gate_scope=model.gate_scope,
        precision=model.precision,
        intra_op=settings.intra_op,
        wide=usable_cores() if settings.intra_op == 1 and settings.workers > 1 else 1,
        device=settings.device,
        allow_cpu_fallback=settings.allow_cpu_fallback,
        allow_spinning=settings.allow_spinning,
        exit_choice=choice,
        any_exit=any_exit,
    )
    engine.warm_up(settings.max_batch)
    card = engine.card
    if model.name:
        card = dataclasses.replace(card, name=model.name)
    details = {"precision": model.precision, "provider": engine.provider}
    if "random" in engine.modes:
        details["gated"] = next(iter(engine.forms.values()), "")
        details["gate_scope"] = model.gate_scope
    loaded = Model(
        card=card,
        mode=engine.mode,
        predictor=engine,
        draws=model.draws,
        limits=engine.limits if any_exit else None,
        modes=engine.modes if model.allow_mode_choice else (),
        voting=engine.agreement_modes,
        gate_scope=model.gate_scope,
        version=version,
        weight=model.weight,
        details=tuple(details.items()),
    )
    return loaded, fingerprint


def _versioned(source: str) -> tuple[str, str]:
    """Return the source of a bundle and its version; the latest of a folder of versions, else the source itself."""
    folder = Path(source.removeprefix(LOCAL_PREFIX))
    if folder.is_dir() and not (folder / CARD_FILE).exists():
        found = [(place, version) for place, version in _bundles_in(folder) if version]
        if found:
            place, version = max(found, key=lambda entry: int(entry[1]))
            return f"{LOCAL_PREFIX}{place}", version
    return source, ""


def _bundles_in(folder: Path) -> list[tuple[Path, str]]:
    """Return the bundle that a folder is, or those in its numbered folders, with their versions."""
    if (folder / CARD_FILE).is_file():
        return [(folder, VERSION)]
    if not folder.is_dir():
        return []
    numbered = (place for place in folder.iterdir() if _VERSION.fullmatch(place.name) and (place / CARD_FILE).is_file())
    return [(place, place.name) for place in sorted(numbered, key=lambda place: int(place.name))]


def _fingerprint(source: str) -> str:
    """Return what changes when a bundle on this machine does; empty for others."""
    place = resolve(source).folder
    if place is None:
        return ""
    try:
        return hashlib.sha256((place / CARD_FILE).read_bytes()).hexdigest()
    except OSError as error:
        raise _unreadable(place / CARD_FILE, error) from error


def _unreadable(folder: Path, error: OSError) -> BundleError:
    return BundleError(f"{folder} cannot be read ({error.strerror or error}); expected a bundle")


def _is_file(place: Path) -> bool | None:
    """Whether there is a file of this name; None if that cannot be told, for lack of a permission or a mount."""
    try:
        return stat.S_ISREG(place.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return None


async def _has_gone(entry: Entry) -> bool:
    """Whether the bundle of an entry is not there, at two looks: while it is replaced it is away for a moment."""
    for wait in (0.0, _MOMENT):
        await asyncio.sleep(wait)
        if await asyncio.to_thread(_is_file, entry.folder / CARD_FILE) is not False:
            return False
    return True
