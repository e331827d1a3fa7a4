"""The card: everything that is known about a model, in one strict JSON document (`card.json`).

A card is read as strictly as it is written: an unknown or missing key, a wrong type or a number out of range is refused
with the key, the value and what was expected. The same card always gives the same bytes.
"""

import dataclasses
import json
import math
import re
import types
import typing
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import zoo.paths
from zoo.errors import BadPath, BundleError

SCHEMA = 6
NORMS = ("linf", "l2")
VERDICTS = ("ok", "alarm", "skipped")
VARIANTS = ("single", "ensemble", "gated")
INT8 = "-int8"
"""What the variant of a result or a lint ends in if it was measured on the int8 graph: "single-int8"."""
MEASURED_VARIANTS = (*VARIANTS, *(f"{variant}{INT8}" for variant in VARIANTS))
SHARINGS = ("independent", "shared_conv")
RESIZES = ("nearest", "bilinear", "bicubic", "lanczos")
MAX_PIXELS = 4_000_000
"""Of a picture that is decoded, unless somebody allows more, and of a model's input: none is larger than that."""
MAX_SIDE = 4096
"""Pixels of a side of a model's input; a row of 65,536 would pass for few pixels."""
MAX_GATES, MAX_CANDIDATES, MAX_CLASSES, MAX_EXITS, MAX_PATHS, MAX_FILES = 4096, 1024, 65_536, 1024, 1024, 1024
"""An order of magnitude above the largest there are: 110 layers, ImageNet-21k's 21,841 classes, a path per draw."""
MAX_PARAMETERS, MAX_MACS, MAX_COUNT, MAX_BYTES = 10**12, 10**15, 10**9, 2**40
"""Of a network, of an image, of images or steps, of a file: what no machine here holds or does."""
MAX_DIGITS = 1000
"""Of an integer in a card; the largest float has 309."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_FRACTION = re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?|[0-9]{1,9}/[0-9]{1,9}")
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")
_PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """The network: a template by name, and the layers that have several candidates."""

    name: str
    options: Mapping[str, Any]
    """Keyword arguments of the template, free-form JSON."""
    gated_layers: tuple[str, ...]
    """Names of the gated convolutions in the order of the gates; empty for a plain network."""
    candidates: int
    """n, how many candidates each gated layer has; 1 for a plain network."""
    sharing: str | None
    """`independent` (the paper), `shared_conv` (the authors' code), or None for a plain network."""
    parameters: int
    """Of all candidates together."""
    single_path_parameters: int

    def __post_init__(self) -> None:
        _expect(self.name != "", "architecture.name", self.name, "a name")
        _expect_count("architecture.candidates", self.candidates, MAX_CANDIDATES, lowest=1)
        _expect_count("the number of architecture.gated_layers", len(self.gated_layers), MAX_GATES)
        _expect_unique("architecture.gated_layers", self.gated_layers)
        _expect(
            self.sharing is None or self.sharing in SHARINGS,
            "architecture.sharing",
            self.sharing,
            f"null or one of {', '.join(SHARINGS)}",
        )
        plain = not self.gated_layers
        _expect(
            plain == (self.sharing is None),
            "architecture.sharing",
            self.sharing,
            "null exactly when gated_layers is empty",
        )
        _expect(
            not plain or self.candidates == 1, "architecture.candidates", self.candidates, "1 where no layer is gated"
        )
        _expect_count("architecture.parameters", self.parameters, MAX_PARAMETERS, lowest=1)
        _expect_count("architecture.single_path_parameters", self.single_path_parameters, self.parameters, lowest=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InputFormat:
    """What an image must look like; mean and std are inside the graphs and stand here for the reader."""

    channels: int
    height: int
    width: int
    range: tuple[float, float]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: str
    """The filter that brings an image file to height x width."""

    def __post_init__(self) -> None:
        _expect(self.channels in (1, 3), "input.channels", self.channels, "1 (grey) or 3 (red, green, blue)")
        for key in ("height", "width"):
            _expect_count(f"input.{key}", getattr(self, key), MAX_SIDE, lowest=1)
        _expect_count("input.height x input.width", self.height * self.width, MAX_PIXELS, lowest=1)
        _expect(self.range[0] < self.range[1], "input.range", self.range, "[low, high] with low < high")
        for key in ("mean", "std"):
            values = getattr(self, key)
            _expect(len(values) == self.channels, f"input.{key}", values, f"{self.channels} values, one per channel")
        _expect(all(value > 0 for value in self.std), "input.std", self.std, "positive values")
        _expect(self.resize in RESIZES, "input.resize", self.resize, f"one of {', '.join(RESIZES)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Paths:
    """The derived paths, written as `zoo.paths` does: one digit per gate ("0110…")."""

    single: str | None
    ensemble: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exit:
    """One exit of a network that may answer early."""

    macs: int
    """Multiply-accumulates (convolutions and linear layers) of one image up to this exit's answer, with the answers of
    the exits before it."""

    def __post_init__(self) -> None:
        _expect_count("exits.macs", self.macs, MAX_MACS, lowest=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """Numbers behind a result: a transfer matrix, accuracy against steps, accuracy per corruption and severity; or the
    log of a run."""

    name: str
    """What the numbers are: "transfer", "steps", "corruptions", "sources", "draws", "paths", "attacks", "exits",
    "budgeted", "log"."""
    row_axis: str
    column_axis: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    """One tuple per row; None where nothing was measured."""

    def __post_init__(self) -> None:
        _expect(self.name != "", "tables.name", self.name, "a name")
        shape = (len(self.values), {len(row) for row in self.values})
        _expect(
            shape == (len(self.rows), {len(self.columns)}),
            f"tables.{self.name}.values",
            shape,
            f"{len(self.rows)} rows of {len(self.columns)} numbers",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """Where the weights come from."""

    recipe: Mapping[str, Any]
    """The resolved recipe, free-form JSON."""
    seed: int
    commit: str
    versions: Mapping[str, str]
    date: str
    summary: str
    logs: tuple[Table, ...] = ()
    """What the run wrote per epoch, as a table "log" with a row `EPOCH METHOD` for each; a table per separately trained
    member. Empty if the log was not kept."""

    def __post_init__(self) -> None:
        _expect_date("training.date", self.date)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """One sanity check of an evaluation, and whether it held."""

    name: str
    held: bool
    detail: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """One measured accuracy, with everything needed to measure it again."""

    protocol: str
    variant: str
    attack: str
    """`none` for clean accuracy."""
    norm: str = "linf"
    """In which norm `eps` is measured: "linf" or "l2"."""
    eps: float
    """In pixel units for l_inf: 1.0 is black to white."""
    eps_fraction: str
    """The same number exactly: "1/100", "8/255", "0"."""
    steps: int
    step_size: float
    restarts: int
    draws: int = 0
    """Fresh draws of the gates that each image was judged on; 0 for a deterministic model."""
    images: int
    seed: int
    accuracy: float
    """Between 0 and 1."""
    interval: tuple[float, float]
    """95 % confidence interval of `accuracy`."""
    note: str
    checks: tuple[Check, ...]
    tables: tuple[Table, ...] = ()
    date: str
    command: str

    def __post_init__(self) -> None:
        for key in ("protocol", "variant", "attack"):
            _expect(getattr(self, key) != "", f"results.{key}", getattr(self, key), "a name")
        _expect(self.norm in NORMS, "results.norm", self.norm, f"one of {', '.join(NORMS)}")
        for key in ("steps", "restarts", "draws"):
            _expect_count(f"results.{key}", getattr(self, key))
        for key in ("eps", "step_size"):
            _expect(getattr(self, key) >= 0, f"results.{key}", getattr(self, key), "0 or more")
        _expect_count("results.images", self.images, lowest=1)
        _expect_fraction("results.eps_fraction", self.eps_fraction, self.eps)
        _expect_share("results.accuracy", self.accuracy)
        _expect_interval("results.interval", self.interval, "accuracy", self.accuracy)
        _expect_date("results.date", self.date)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """How the ranges of the int8 graphs' activations were found."""

    images: int
    """Training images."""
    seed: int
    """Of the images and, for random gates, of their paths."""
    method: str
    tool: str
    """The program that quantised, with its version."""

    def __post_init__(self) -> None:
        _expect_count("int8.calibration.images", self.images, lowest=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Agreement:
    """How often an int8 graph and the float32 weights give the same class to the same images."""

    variant: str
    attack: str
    """What was done to the images, always by an attack on the float32 weights; `none` for clean ones."""
    eps: float
    eps_fraction: str
    images: int
    seed: int
    share: float
    """Between 0 and 1."""
    interval: tuple[float, float]
    """95 % confidence interval of `share`."""
    date: str
    command: str

    def __post_init__(self) -> None:
        key = "int8.agreement"
        _expect(self.variant in VARIANTS, f"{key}.variant", self.variant, f"one of {', '.join(VARIANTS)}")
        _expect(self.attack != "", f"{key}.attack", self.attack, "a name")
        _expect_count(f"{key}.images", self.images, lowest=1)
        _expect_fraction(f"{key}.eps_fraction", self.eps_fraction, self.eps)
        _expect_share(f"{key}.share", self.share)
        _expect_interval(f"{key}.interval", self.interval, "share", self.share)
        _expect_date(f"{key}.date", self.date)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int8:
    """The int8 graphs: variant V of them is the file V.int8.onnx."""

    variants: tuple[str, ...]
    calibration: Calibration
    agreement: tuple[Agreement, ...] = ()

    def __post_init__(self) -> None:
        _expect(bool(self.variants), "int8.variants", [], "at least one variant, or int8 null")
        _expect_unique("int8.variants", self.variants)
        for entry in self.agreement:
            listed = ", ".join(self.variants)
            _expect(entry.variant in self.variants, "int8.agreement.variant", entry.variant, f"one of {listed}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Finding:
    """One question that the linter asked a model, its figure and its verdict."""

    code: str
    """"S1", "G2", ...; docs/robustness.md lists them."""
    name: str
    verdict: str
    """"ok", "alarm", or "skipped" where the question does not apply."""
    figure: str
    """What was measured, in words."""
    meaning: str
    """What an alarm usually means."""

    def __post_init__(self) -> None:
        _expect(self.verdict in VERDICTS, f"lint.{self.code}", self.verdict, f"one of {', '.join(VERDICTS)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lint:
    """What the robustness linter found on one variant of a model."""

    variant: str
    images: int
    seed: int
    findings: tuple[Finding, ...]
    date: str
    command: str

    def __post_init__(self) -> None:
        named = ", ".join(MEASURED_VARIANTS)
        _expect(self.variant in MEASURED_VARIANTS, "lint.variant", self.variant, f"one of {named}")
        _expect_count("lint.images", self.images)
        _expect_date("lint.date", self.date)

    @property
    def alarms(self) -> tuple[Finding, ...]:
        """The findings that raise an alarm; empty for a model that passed."""
        return tuple(finding for finding in self.findings if finding.verdict == "alarm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileEntry:
    """What a file must be: its digest and its size in bytes."""

    sha256: str
    size: int

    def __post_init__(self) -> None:
        _expect(_SHA256.fullmatch(self.sha256) is not None, "files.sha256", self.sha256, "64 hexadecimal digits")
        _expect_count("files.size", self.size, MAX_BYTES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
    """One model, as `card.json` holds it; the fields are in the order of the keys."""

    schema: int = SCHEMA
    name: str
    description: str
    method: str
    license: str
    """An SPDX identifier in the hub's lower-case spelling."""
    dataset: str
    architecture: Architecture
    input: InputFormat
    classes: tuple[str, ...]
    paths: Paths
    exits: tuple[Exit, ...] = ()
    """First exit first; empty for a network with one exit. Such a bundle holds early_exit.onnx too."""
    variants: tuple[str, ...]
    """Which graphs there are: variant V is the file V.onnx."""
    int8: Int8 | None = None
    """The int8 graphs; None if there are none. What was measured on them has a variant that ends in "-int8"."""
    training: Training
    results: tuple[Result, ...]
    lint: tuple[Lint, ...] = ()
    """At most one per variant; a variant that is not here was not linted."""
    files: Mapping[str, FileEntry]

    def __post_init__(self) -> None:
        _expect(self.schema == SCHEMA, "schema", self.schema, f"{SCHEMA}")
        _expect(
            _NAME.fullmatch(self.name) is not None and ".." not in self.name,
            "name",
            self.name,
            "letters, digits, '.', '_' and '-', at most 128, starting with a letter or digit",
        )
        for key in ("method", "license", "dataset"):
            _expect(getattr(self, key) != "", key, getattr(self, key), "a name")
        _expect(len(self.classes) >= 2, "classes", self.classes, "at least two class names")
        for key, most in (("classes", MAX_CLASSES), ("exits", MAX_EXITS), ("files", MAX_FILES)):
            _expect_count(f"the number of {key}", len(getattr(self, key)), most)
        _expect_count("the number of paths.ensemble", len(self.paths.ensemble), MAX_PATHS)
        _expect_unique("classes", self.classes)
        for variant in self.variants:
            _expect(variant in VARIANTS, "variants", variant, f"one of {', '.join(VARIANTS)}")
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
        listed += [("paths.ensemble", path) for path in self.paths.ensemble]
        for key, path in listed:
            try:
                zoo.paths.parse(path, gates, candidates)
            except BadPath as error:
                raise BundleError(f"card.json: {key}: {error}; correct the card or export again") from error
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
        measured = [("results.variant", result.variant) for result in self.results]
        measured += [("lint.variant", lint.variant) for lint in self.lint]
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
        try:
            document = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_no_constant, parse_int=_integer)
        except (ValueError, RecursionError) as error:
            raise BundleError(f"card.json is not JSON ({error}); fetch or export the bundle again") from error
        schema = document.get("schema") if isinstance(document, dict) else None
        if isinstance(schema, int) and schema != SCHEMA:  # before the keys, which differ
            newer = "upgrade with `pip install --upgrade manygates`"
            advice = newer if schema > SCHEMA else "export the bundle again"
            raise BundleError(f"card.json has schema {schema}, this version reads {SCHEMA}; {advice}")
        card: Card = _decode(cls, document, "")
        return card

    def to_json(self) -> str:
        """Return the card as indented JSON that ends in a newline; the same card gives the same text."""
        return json.dumps(_encode(self), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def check_file_name(name: str) -> None:
    """Refuse a file name that leaves the bundle's folder or that would be unpickled.

    Raises:
        BundleError: for separators, "..", odd characters, a name the bundle itself uses, and for pickles.
    """
    _expect(
        _NAME.fullmatch(name) is not None and ".." not in name,
        "files",
        name,
        "a plain file name of letters, digits, '.', '_' and '-', without folders",
    )
    if name.lower().endswith(_PICKLES):
        raise BundleError(
            f"the bundle lists {name!r}, which is a pickle and can run code when loaded; weights are safetensors, so "
            "export the model again"
        )
    _expect(name not in ("card.json", "README.md"), "files", name, "a file other than the card and its README")


def _expect(held: bool, key: str, value: object, expectation: str) -> None:
    if not held:
        raise BundleError(f"card.json: {key} is {value!r}, expected {expectation}; correct the card or export again")


def _expect_count(key: str, value: int, most: int = MAX_COUNT, *, lowest: int = 0) -> None:
    _expect(lowest <= value <= most, key, value, f"between {lowest} and {most}")


def _expect_unique(key: str, values: tuple[str, ...]) -> None:
    _expect(len(set(values)) == len(values), key, list(values), "no name twice")


def _expect_share(key: str, value: float) -> None:
    _expect(0 <= value <= 1, key, value, "a share between 0 and 1, not per cent")


def _expect_interval(key: str, interval: tuple[float, float], name: str, value: float) -> None:
    low, high = interval
    _expect(
        0 <= low <= value + 1e-6 and value - 1e-6 <= high <= 1,
        key,
        interval,
        f"[low, high] within [0, 1] around the {name} {value}",
    )


def _expect_fraction(key: str, text: str, value: float) -> None:
    """Check that a text is the number exactly."""
    try:
        # a short pattern first: Fraction would spend minutes on "1e300000000"
        exact = float(Fraction(text)) if _FRACTION.fullmatch(text) else math.nan
    except ZeroDivisionError:
        exact = math.nan
    held = math.isclose(exact, value, rel_tol=1e-6, abs_tol=1e-12)
    _expect(held, key, text, f'the fraction that eps {value} is, like "8/255"')


def _expect_date(key: str, value: str) -> None:
    _expect(_DATE.fullmatch(value) is not None, key, value, 'a date like "2026-11-21"')


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise BundleError(f"card.json has the key {twice!r} twice, expected once; delete one")
    return document


def _no_constant(constant: str) -> Any:
    raise BundleError(f"card.json holds {constant}, expected finite numbers only; measure that number again")


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:  # before Python, which refuses thousands of them with advice to programmers
        raise BundleError(
            f"card.json holds an integer of {len(digits)} digits, {digits[:20]}…, expected at most {MAX_DIGITS}; "
            "correct the card or export again"
        )
    return int(digits)


def _encode(value: Any) -> Any:
    """Turn a dataclass into JSON's types, in the order of its fields."""
    if dataclasses.is_dataclass(value):
        return {field.name: _encode(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _encode(entry) for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return [_encode(entry) for entry in value]
    return value


def _decode(expected: Any, value: Any, key: str) -> Any:
    """Turn JSON into `expected` (dataclass, scalar, tuple[…], Mapping[str, …], X | None), or say what is wrong."""
    if expected is Any:
        return value
    if dataclasses.is_dataclass(expected):
        return _decode_dataclass(typing.cast("type[Any]", expected), value, key)
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin in (types.UnionType, typing.Union):
        present = next(argument for argument in arguments if argument is not types.NoneType)
        return None if value is None else _decode(present, value, key)
    if origin is tuple:
        _expect(isinstance(value, list), key, value, "an array")
        if arguments[-1] is not Ellipsis:
            _expect(len(value) == len(arguments), key, value, f"{len(arguments)} values")
        return tuple(_decode(arguments[0], entry, f"{key}[{index}]") for index, entry in enumerate(value))
    if isinstance(origin, type) and issubclass(origin, Mapping):
        _expect(isinstance(value, dict), key, value, "an object")
        return {name: _decode(arguments[1], entry, f"{key}.{name}") for name, entry in value.items()}
    return _decode_scalar(expected, value, key)


def _decode_dataclass(expected: type[Any], value: Any, key: str) -> Any:
    _expect(isinstance(value, dict), key or "the document", value, "an object")
    hints = typing.get_type_hints(expected)
    names = [field.name for field in dataclasses.fields(expected)]
    prefix = f"{key}." if key else ""
    for name in names:
        if name not in value:
            raise BundleError(f"card.json lacks the key {prefix + name!r}, expected {_kind(hints[name])}; add it")
    for name in value:
        if name not in names:
            raise BundleError(
                f"card.json has the unknown key {prefix + name!r} = {value[name]!r}, expected only {', '.join(names)}; "
                "remove it, or upgrade manygates if the card is newer"
            )
    return expected(**{name: _decode(hints[name], value[name], prefix + name) for name in names})


def _decode_scalar(expected: Any, value: Any, key: str) -> Any:
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        _expect(abs(value) < 2**53, key, "an integer of many digits", "a number of reasonable size")
        value = float(value)
    if isinstance(value, float):
        _expect(math.isfinite(value), key, value, "a finite number")  # 1e999 is infinite without saying so
    if isinstance(value, str):
        _expect(_is_unicode(value), key, ascii(value), "text that can be written in UTF-8")
    if type(value) is int:
        _expect(
            abs(value) < 2**64, key, "an integer of many digits", "a number of reasonable size"
        )  # seeds have 64 bits
    right = isinstance(value, expected) and (expected is bool or not isinstance(value, bool))
    _expect(right, key, value, _kind(expected))
    return value


def _is_unicode(text: str) -> bool:
    """Whether a text can be encoded; JSON may hold half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _kind(expected: Any) -> str:
    """Name a type the way someone who edits JSON would."""
    scalars = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}
    if expected in scalars:
        return scalars[expected]
    origin = typing.get_origin(expected)
    if origin in (types.UnionType, typing.Union):
        return f"{_kind(typing.get_args(expected)[0])} or null"
    return "an array" if origin is tuple else "an object"
