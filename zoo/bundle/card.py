"""The card: everything that is known about a model, in one strict JSON document (`card.json`).

A card is read as strictly as it is written: an unknown or missing key, a wrong type or a number out of range is refused
with the key, the value and what was expected. The same card always gives the same bytes.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Annotated, Any

from msgspec import Meta

import zoo.paths
from zoo.bundle import strict_json
from zoo.bundle.strict_json import matching, one_of
from zoo.errors import BadInput, BadPath, BundleError
from zoo.input_format import InputFormat as InputFormat
from zoo.vocabulary import INT8, MEASURED_VARIANTS, NAME, NAME_MEANING, VARIANTS

SCHEMA = 6
NORMS = ("linf", "l2")
VERDICTS = ("ok", "alarm", "skipped")
SHARINGS = ("independent", "shared_conv")
MAX_GATES, MAX_CANDIDATES, MAX_CLASSES, MAX_EXITS, MAX_PATHS, MAX_FILES = 4096, 1024, 65_536, 1024, 1024, 1024
"""An order of magnitude above the largest there are: 110 layers, ImageNet-21k's 21,841 classes, a path per draw."""
MAX_PARAMETERS, MAX_MACS, MAX_COUNT, MAX_BYTES = 10**12, 10**15, 10**9, 2**40
"""Of a network, of an image, of images or steps, of a file: what no machine here holds or does."""
MAX_SEED = 2**63 - 1

_FRACTION = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?|[0-9]{1,9}/[0-9]{1,9}")
_PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")

Text = Annotated[str, Meta(min_length=1)]
Count = Annotated[int, Meta(ge=0, le=MAX_COUNT)]
Images = Annotated[int, Meta(ge=1, le=MAX_COUNT)]
Parameters = Annotated[int, Meta(ge=1, le=MAX_PARAMETERS)]
Seed = Annotated[int, Meta(ge=0, le=MAX_SEED)]
Share = Annotated[float, Meta(ge=0, le=1)]
Length = Annotated[float, Meta(ge=0)]
Date = Annotated[str, matching(r"\d{4}-\d{2}-\d{2}", 'a date like "2026-11-21"')]
Variant = Annotated[str, one_of(VARIANTS)]
MeasuredVariant = Annotated[str, one_of(MEASURED_VARIANTS)]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class NetworkSummary:
    """The network: a template by name, the layers that have several candidates, and how large it is."""

    name: Text
    options: Mapping[str, Any]
    """Keyword arguments of the template, free-form JSON."""
    gated_layers: Annotated[tuple[str, ...], Meta(max_length=MAX_GATES)]
    """Names of the gated convolutions in the order of the gates; empty for a plain network."""
    candidates: Annotated[int, Meta(ge=1, le=MAX_CANDIDATES)]
    """n, how many candidates each gated layer has; 1 for a plain network."""
    sharing: Annotated[str, one_of(SHARINGS)] | None
    """`independent` (the paper), `shared_conv` (the authors' code), or None for a plain network."""
    parameters: Parameters
    """Of all candidates together."""
    single_path_parameters: Parameters

    def __post_init__(self) -> None:
        plain = not self.gated_layers
        _expect_unique("gated_layers", self.gated_layers)
        _expect(plain == (self.sharing is None), "sharing", self.sharing, "null exactly when gated_layers is empty")
        _expect(not plain or self.candidates == 1, "candidates", self.candidates, "1 where no layer is gated")
        _expect(
            self.single_path_parameters <= self.parameters,
            "single_path_parameters",
            self.single_path_parameters,
            f"at most the parameters, {self.parameters}",
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Paths:
    """The derived paths, written as `zoo.paths` does: one digit per gate ("0110…")."""

    single: str | None
    ensemble: Annotated[tuple[str, ...], Meta(max_length=MAX_PATHS)]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Exit:
    """One exit of a network that may answer early."""

    macs: Annotated[int, Meta(ge=1, le=MAX_MACS)]
    """Multiply-accumulates (convolutions and linear layers) of one image up to this exit's answer, with the answers of
    the exits before it."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Numbers behind a result: a transfer matrix, accuracy against steps, accuracy per corruption and severity; or the
    log of a run."""

    name: Text
    """What the numbers are: "transfer", "steps", "corruptions", "sources", "draws", "paths", "attacks", "exits",
    "budgeted", "log"."""
    row_axis: str
    column_axis: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    """One tuple per row; None where nothing was measured."""

    def __post_init__(self) -> None:
        expected = f"{len(self.rows)} rows of {len(self.columns)} numbers in the table {self.name!r}"
        lengths = [len(row) for row in self.values]
        _expect(lengths == [len(self.columns)] * len(self.rows), "values", f"rows of {lengths} numbers", expected)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Published:
    """The scale at which a method was published."""

    recipe: str
    network: str
    epochs: tuple[int, ...]
    """Of each phase."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """Where the weights come from."""

    recipe: Mapping[str, Any]
    """The resolved recipe, free-form JSON."""
    overrides: tuple[str, ...] | None = None
    """What `--set` changed in the recipe of that name, such as "seed=7"; None where no recipe makes this."""
    published: Published | None = None
    """None where no recipe of the published scale is known."""
    seed: Seed
    commit: str
    versions: Mapping[str, str]
    date: Date
    summary: str
    logs: tuple[Table, ...] = ()
    """What the run wrote per epoch, as a table "log" with a row `EPOCH METHOD` for each; a table per separately trained
    member. Empty if the log was not kept."""

    @property
    def epochs(self) -> tuple[int, ...]:
        """The epochs of each phase of the recipe; empty if it does not say."""
        phases = self.recipe.get("phases")
        found = [phase.get("epochs") for phase in phases if isinstance(phase, dict)] if isinstance(phases, list) else []
        return tuple(epochs for epochs in found if isinstance(epochs, int))


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One sanity check of an evaluation, and whether it held."""

    name: str
    held: bool
    detail: str


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """How often an int8 graph gives the class that the float32 weights give."""

    share: Share
    """Of the images of the result: as they are where its attack is `none`, else as the attack on the weights left them
    at the end of its first start."""
    interval: tuple[Share, Share]
    """95 % confidence interval of `share`."""

    def __post_init__(self) -> None:
        _expect_around("interval", self.interval, "share", self.share)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """One measured accuracy, with everything needed to measure it again."""

    protocol: Text
    variant: Text
    attack: Text
    """`none` for clean accuracy."""
    norm: Annotated[str, one_of(NORMS)] = "linf"
    """In which norm `eps` is measured: "linf" or "l2"."""
    eps: Length
    """In pixel units for l_inf: 1.0 is black to white."""
    eps_fraction: str
    """The same number exactly: "1/100", "8/255", "0"."""
    steps: Count
    step_size: Length
    restarts: Count
    draws: Count = 0
    """Fresh draws of the gates that each image was judged on; 0 for a deterministic model."""
    images: Images
    seed: Seed
    accuracy: Share
    interval: tuple[Share, Share]
    """95 % confidence interval of `accuracy`."""
    agreement: Agreement | None = None
    """With the float32 weights, of an int8 graph; None where that was not measured."""
    note: str
    checks: tuple[Check, ...]
    tables: tuple[Table, ...] = ()
    date: Date
    command: str

    def __post_init__(self) -> None:
        _expect_fraction("eps_fraction", self.eps_fraction, self.eps)
        _expect_around("interval", self.interval, "accuracy", self.accuracy)
        _expect(
            self.agreement is None or self.variant.endswith(INT8),
            "agreement",
            self.agreement,
            f"null for the variant {self.variant!r}, which is no int8 graph",
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """How the ranges of the int8 graphs' activations were found."""

    images: Images
    """Training images."""
    seed: Seed
    """Of the images and, for random gates, of their paths."""
    method: str
    tool: str
    """The program that quantised, with its version."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Int8:
    """The int8 graphs: variant V of them is the file V.int8.onnx."""

    variants: Annotated[tuple[Variant, ...], Meta(min_length=1)]
    calibration: Calibration

    def __post_init__(self) -> None:
        _expect_unique("variants", self.variants)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One question that the linter asked a model, its figure and its verdict."""

    code: str
    """"S1", "G2", ...; docs/robustness.md lists them."""
    name: str
    verdict: Annotated[str, one_of(VERDICTS)]
    """"ok", "alarm", or "skipped" where the question does not apply."""
    figure: str
    """What was measured, in words."""
    meaning: str
    """What an alarm usually means."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Lint:
    """What the robustness linter found on one variant of a model."""

    variant: MeasuredVariant
    images: Count
    seed: Seed
    findings: tuple[Finding, ...]
    date: Date
    command: str

    @property
    def alarms(self) -> tuple[Finding, ...]:
        """The findings that raise an alarm; empty for a model that passed."""
        return tuple(finding for finding in self.findings if finding.verdict == "alarm")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FileEntry:
    """What a file must be: its digest and its size in bytes."""

    sha256: Annotated[str, matching("[0-9a-f]{64}", "64 hexadecimal digits")]
    size: Annotated[int, Meta(ge=0, le=MAX_BYTES)]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """One model, as `card.json` holds it; the fields are in the order of the keys.

    Types and the bounds of single fields are checked where a card is read or written, what several fields must hold
    together also where one is made.

    Raises:
        BadInput: fields that do not fit together.
        BundleError: a file that a bundle must not hold.
    """

    schema: Annotated[int, Meta(ge=SCHEMA, le=SCHEMA)] = SCHEMA
    name: Annotated[str, matching(NAME.pattern, NAME_MEANING)]
    description: str
    method: Text
    license: Text
    """An SPDX identifier in the hub's lower-case spelling."""
    dataset: Text
    architecture: NetworkSummary
    input: InputFormat
    classes: Annotated[tuple[str, ...], Meta(min_length=2, max_length=MAX_CLASSES)]
    paths: Paths
    exits: Annotated[tuple[Exit, ...], Meta(max_length=MAX_EXITS)] = ()
    """First exit first; empty for a network with one exit. Such a bundle holds early_exit.onnx too."""
    variants: tuple[Variant, ...]
    """Which graphs there are: variant V is the file V.onnx."""
    int8: Int8 | None = None
    """The int8 graphs; None if there are none. What was measured on them has a variant that ends in "-int8"."""
    training: Training
    results: tuple[Result, ...]
    lint: tuple[Lint, ...] = ()
    """At most one per variant; a variant that is not here was not linted."""
    files: Annotated[Mapping[str, FileEntry], Meta(max_length=MAX_FILES)]

    def __post_init__(self) -> None:
        _expect_unique("classes", self.classes)
        _expect_unique("variants", self.variants)
        _expect_unique("lint", tuple(lint.variant for lint in self.lint))
        self._check_paths()
        self._check_exits()
        self._check_int8()
        for file_name in self.files:
            check_file_name(file_name)

    def _check_paths(self) -> None:
        """Every path fits the gates, and a variant has the paths it is made of."""
        gates, candidates = len(self.architecture.gated_layers), self.architecture.candidates
        listed = [("paths.single", self.paths.single)] if self.paths.single is not None else []
        listed += [(f"paths.ensemble[{index}]", path) for index, path in enumerate(self.paths.ensemble)]
        for key, path in listed:
            try:
                zoo.paths.parse(path, gates, candidates)
            except BadPath as error:
                raise BadInput(f"{key}: {error}") from error
        if "gated" in self.variants:
            _expect(gates > 0, "variants", "gated", "a network with gated layers")
        if gates and "single" in self.variants:
            _expect(self.paths.single is not None, "paths.single", None, "the path of the variant 'single'")
        if gates and "ensemble" in self.variants:
            _expect(bool(self.paths.ensemble), "paths.ensemble", [], "the paths of the variant 'ensemble'")

    def _check_exits(self) -> None:
        """Several exits, each at least as expensive as the one before, and nothing that exits are not combined with."""
        if not self.exits:
            return
        costs = [found.macs for found in self.exits]
        _expect(len(costs) >= 2, "exits", costs, "none, or at least two")
        _expect(costs == sorted(costs), "exits.macs", costs, "costs that grow from exit to exit")
        _expect(not self.architecture.gated_layers, "exits", costs, "none, because layers are gated")
        for variant in self.variants:
            _expect(variant == "single", "variants", variant, "only 'single' for a network with several exits")

    def _check_int8(self) -> None:
        """An int8 graph is the twin of a float32 one, and nothing was measured on one that is not there."""
        twins = () if self.int8 is None else self.int8.variants
        for variant in twins:
            _expect(variant in self.variants, "int8.variants", variant, f"one of {', '.join(self.variants) or 'none'}")
        measured = [(f"results[{index}].variant", result.variant) for index, result in enumerate(self.results)]
        measured += [(f"lint[{index}].variant", lint.variant) for index, lint in enumerate(self.lint)]
        for key, variant in measured:
            known = not variant.endswith(INT8) or variant.removesuffix(INT8) in twins
            _expect(known, key, variant, f"one of the variants that int8 lists ({', '.join(twins) or 'none'})")

    @property
    def suspect(self) -> tuple[str, ...]:
        """The variants that failed the robustness linter: their numbers may flatter them."""
        return tuple(lint.variant for lint in self.lint if lint.alarms)

    @classmethod
    def from_json(cls, text: str) -> "Card":
        """Read a card.

        Raises:
            BundleError: if it is not JSON, a key is missing, unknown or twice there, a value has the wrong type or
                makes no sense, or the schema is another than `SCHEMA`.
        """
        document = strict_json.parse(text)
        schema = document.get("schema") if isinstance(document, dict) else None
        if isinstance(schema, int) and schema != SCHEMA:  # before the keys, which differ
            newer = "upgrade with `pip install --upgrade manygates`"
            advice = newer if schema > SCHEMA else "export the bundle again"
            raise BundleError(f"card.json has schema {schema}, this version reads {SCHEMA}; {advice}")
        return strict_json.convert(cls, document)

    def to_json(self) -> str:
        """Return the card as indented JSON that ends in a newline; the same card gives the same text.

        Raises:
            BundleError: `from_json` would refuse it.
        """
        return strict_json.write(self)


def check_file_name(name: str) -> None:
    """Refuse a file name that leaves the bundle's folder or that would be unpickled.

    Raises:
        BundleError: for separators, "..", odd characters, a name the bundle itself uses, and for pickles.
    """
    if NAME.fullmatch(name) is None:
        raise BundleError(
            f"the bundle lists the file {name!r}, expected a plain file name, without folders: {NAME_MEANING}"
        )
    if name.lower().endswith(_PICKLES):
        raise BundleError(
            f"the bundle lists {name!r}, which is a pickle and can run code when loaded; weights are safetensors, so "
            "export the model again"
        )
    if name in ("card.json", "README.md"):
        raise BundleError(f"the bundle lists the file {name!r}, expected a file other than the card and its README")


def _expect(held: bool, key: str, value: object, expectation: str) -> None:
    if not held:
        raise BadInput(f"{key} is {value!r}, expected {expectation}")


def _expect_unique(key: str, values: Iterable[str]) -> None:
    values = list(values)
    _expect(len(set(values)) == len(values), key, values, "no name twice")


def _expect_around(key: str, interval: tuple[float, float], name: str, value: float) -> None:
    low, high = interval
    _expect(low <= value + 1e-6 and value - 1e-6 <= high, key, interval, f"[low, high] around the {name} {value}")


def _expect_fraction(key: str, text: str, value: float) -> None:
    """Check that a text is the number exactly."""
    try:
        # a short pattern first: Fraction would spend minutes on "1e300000000"
        exact = float(Fraction(text)) if _FRACTION.fullmatch(text) else math.nan
    except ZeroDivisionError:
        exact = math.nan
    held = math.isclose(exact, value, rel_tol=1e-6, abs_tol=1e-12)
    _expect(held, key, text, f'the fraction that eps {value} is, like "8/255"')
