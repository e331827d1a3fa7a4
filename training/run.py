"""A run on disk. A run is a folder:

    recipe.json        the resolved recipe
    provenance.json    seed, commit, library versions, hardware, date
    log.csv            a line per epoch; the same numbers as TensorBoard events under events/
    last.safetensors   weights, their moving average, optimiser, the objective's memory and position, to resume from
    best.safetensors   weights that were best on the held-out training images

Each file is written in one rename, so a killed process leaves the last whole one.
"""

from __future__ import annotations

import csv
import importlib.metadata
import io
import json
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from training.recipes import Recipe, from_resolved, resolved
from zoo.bundle.card import Table
from zoo.errors import BadInput, CheckpointError, UnknownName
from zoo.files import replace_directory, write_json_atomic, write_text_atomic
from zoo.weights.checkpoint import Architecture, assembled, load, read_architecture, save

LAST, BEST = "last.safetensors", "best.safetensors"
RECIPE, PROVENANCE, LOG = "recipe.json", "provenance.json", "log.csv"
LABELS = ("epoch", "objective")
NUMBERS = ("steps", "learning_rate", "loss", "accuracy", "held_out_clean", "held_out_robust", "seconds")
COLUMNS = (*LABELS, *NUMBERS)
"""Of the log."""

PARTS = {"model": "model", "ema": "average", "optimizer": "optimizer", "memory": "memory"}
"""By the prefix of its tensors' names in the file, the field of a `Checkpoint`."""

Row = dict[str, float | int | str]
"""A line of the log, by column."""


@dataclass
class Position:
    """How far a run is; saved with every checkpoint."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    best: float = -1.0
    best_robust: float = -1.0
    stale: int = 0
    """Validations since the best one."""
    stopped: bool = False
    """Whether the run ended before its last epoch."""
    seconds: float = 0.0
    sums: dict[str, float] = field(default_factory=dict)
    """Of what the steps of this epoch measured so far."""
    rows: list[Row] = field(default_factory=list)
    """The log so far."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Everything that a run goes on from; all tensors by name."""

    architecture: Architecture
    position: Position
    model: Mapping[str, Tensor]
    average: Mapping[str, Tensor] = field(default_factory=dict)
    """The moving average of the weights; empty where the recipe keeps none."""
    optimizer: Mapping[str, Tensor] = field(default_factory=dict)
    """By `SLOT/PARAMETER`."""
    memory: Mapping[str, Tensor] = field(default_factory=dict)
    """The objective's `Memory.state()`."""

    @property
    def deployed(self) -> Mapping[str, Tensor]:
        """What is validated and exported: the average if there is one."""
        return self.average or self.model

    def write(self, file: Path) -> None:
        """Write it in one rename."""
        tensors = {
            f"{part}/{name}": tensor for part, field in PARTS.items() for name, tensor in getattr(self, field).items()
        }
        save(file, tensors, {"architecture": self.architecture.described(), "position": asdict(self.position)})

    @classmethod
    def read(cls, file: Path) -> Checkpoint:
        """Read what `write` wrote.

        Raises:
            CheckpointError: The file is damaged, or does not say how far the run is.
        """
        tensors, header = load(file)
        parts: dict[str, dict[str, Tensor]] = {part: {} for part in PARTS}
        for key, tensor in tensors.items():
            part, _, name = key.partition("/")
            parts.setdefault(part, {})[name] = tensor
        return cls(
            architecture=read_architecture(header, file),
            position=_position(header, file),
            **{field: parts[part] for part, field in PARTS.items()},
        )


def _position(header: Mapping[str, Any], file: Path) -> Position:
    try:
        return Position(**header["position"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{file} does not say how far the run is ({error}); train again") from error


# --- before and while it is trained ---


def check_folder(recipe: Recipe, run_dir: Path, *, resume: bool) -> None:
    """Check that `recipe` may be trained into a folder.

    Raises:
        BadInput: The folder holds something else, another run, or a run that `resume` was not asked to go on with.
    """
    document = resolved(recipe)
    if (run_dir / RECIPE).exists():
        stored = _read_json(run_dir / RECIPE, "name")
        if not resume:
            name = stored.get("name")
            raise BadInput(f"{run_dir} already holds a run of {name!r}; add --resume, or choose another folder")
        if stored != document and _meaning(stored) != recipe:
            differing = sorted(key for key in {*stored, *document} if stored.get(key) != document.get(key))
            raise BadInput(
                f"{run_dir} was started with another recipe (different: {', '.join(differing)}); "
                "resume with the same recipe and settings, or choose another folder"
            )
        return
    if run_dir.exists() and any(run_dir.iterdir()):
        raise BadInput(f"{run_dir} is not empty and holds no run; choose an empty or new folder")


def _meaning(stored: dict[str, Any]) -> Recipe | None:
    """Return the recipe of a document, its missing fields at their defaults; None if this version cannot read it."""
    try:
        return from_resolved(stored)
    except (BadInput, UnknownName):
        return None


def prepare_folder(recipe: Recipe, run_dir: Path) -> None:
    """Make the folder of a run in one rename, or clear what a killed process left half written in it."""
    if not (run_dir / RECIPE).exists():
        with replace_directory(run_dir) as new_dir:
            write_json_atomic(new_dir / PROVENANCE, {"seed": recipe.seed, "starts": []})
            write_json_atomic(new_dir / RECIPE, resolved(recipe))
    for name in (LAST, BEST, LOG):
        for half_written in run_dir.glob(f".{name}.*"):
            half_written.unlink()


def record_start(run_dir: Path, *, step: int, ranks: int, start_from: str | None = None) -> None:
    """Add a start to the provenance: other code on another machine may resume a run.

    It goes on at `step`, on so many `ranks` (processes that train together); `start_from` is the SHA-256 of the weights
    that the run began with, if they were trained before.
    """
    versions = {"python": platform.python_version()}
    for package in ("torch", "numpy", "safetensors", "manygates"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    threads = f"{torch.get_num_threads()} CPU threads"
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else threads
    start: dict[str, Any] = {
        "step": step,
        "commit": _commit(),
        "versions": versions,
        "hardware": hardware if ranks == 1 else f"{ranks} x {hardware}",
        "date": datetime.now(UTC).date().isoformat(),
    }
    if start_from is not None:
        start["start_from"] = start_from
    document = provenance(run_dir)
    write_json_atomic(run_dir / PROVENANCE, {**document, "starts": [*document["starts"], start]})


def _commit() -> str:
    """Return the commit of this project's checkout, marked if it was changed; "unknown" outside one."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(  # noqa: S603 - fixed arguments
            ["git", *arguments],  # noqa: S607 - the user's git
            cwd=here,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != here.parent:
            return "unknown"  # installed inside somebody else's repository
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "zoo", "training", "manygates")
        return git("rev-parse", "HEAD") + ("-changed" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def write_log(run_dir: Path, rows: list[Row]) -> None:
    """Write the log anew; what a row lacks stays empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, restval="", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    write_text_atomic(run_dir / LOG, text.getvalue())


# --- afterwards ---


def load_run(run_dir: Path, *, which: str = "last") -> tuple[nn.Module, Architecture, Recipe]:
    """Load what `train` left in a folder, in evaluation mode, with its architecture and recipe; "last" or "best".

    Raises:
        CheckpointError: Not a run, or one without such a checkpoint yet.
    """
    if which not in ("last", "best"):
        raise BadInput(f"which must be 'last' or 'best', got {which!r}")
    if not (run_dir / RECIPE).is_file():
        raise CheckpointError(f"{run_dir} is not a training run: it holds no {RECIPE}")
    file = run_dir / (LAST if which == "last" else BEST)
    if not file.is_file():
        raise CheckpointError(f"{run_dir} has no {file.name} yet; train for longer, or pick another checkpoint")
    stored = Checkpoint.read(file)
    network = assembled(stored.architecture, dict(stored.deployed))
    return network, stored.architecture, from_resolved(_read_json(run_dir / RECIPE, "name"))


def epochs_done(run_dir: Path) -> int:
    """Return how many epochs of all phases together a run has ended; fewer than its recipe's while it goes on.

    Raises:
        CheckpointError: The run has no checkpoint, or one that does not say it.
    """
    _, header = load(run_dir / LAST)
    return _position(header, run_dir / LAST).epoch


def provenance(run_dir: Path) -> dict[str, Any]:
    """Read where a run comes from: its seed, and per start the step, commit, versions, hardware and date.

    Raises:
        CheckpointError: The file is damaged.
    """
    return _read_json(run_dir / PROVENANCE, "seed", "starts")


def log(run_dir: Path) -> tuple[Table, ...]:
    """Return what a run wrote per epoch, as a card keeps it; nothing if it has ended no epoch.

    Returns:
        One table "log": a row `EPOCH METHOD` per epoch, a column per number with six digits, None where the epoch has
        none, as for held-out accuracy (shares of 1) between validations; `seconds` counts from the beginning.

    Raises:
        CheckpointError: The log cannot be read.
    """
    try:
        lines = list(csv.DictReader(io.StringIO((run_dir / LOG).read_text(encoding="utf-8"))))
    except FileNotFoundError:
        return ()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{run_dir / LOG} cannot be read ({error}); put it back, or take it away") from error
    columns = tuple(column for column in NUMBERS if any(line.get(column) for line in lines))
    try:
        rows = tuple(f"{line['epoch']} {line['objective']}" for line in lines)
        values = tuple(
            tuple(float(f"{float(line[column]):.6g}") if line[column] else None for column in columns) for line in lines
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{run_dir / LOG} is not what a run writes ({error!r}), expected columns {', '.join(COLUMNS)}; "
            "put it back, or take it away"
        ) from error
    if not rows:
        return ()
    return (Table(name="log", row_axis="epoch", column_axis="", rows=rows, columns=columns, values=values),)


def _read_json(file: Path, *keys: str) -> dict[str, Any]:
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        message = f"{file.parent} holds no readable {file.name} ({error}); put it back, or train again"
        raise CheckpointError(message) from error
    if not isinstance(document, dict) or any(key not in document for key in keys):
        raise CheckpointError(f"{file} is not what a run writes, expected an object with {', '.join(keys)}")
    return document
