"""The server's settings, with defaults that need no thought.

A setting is one field of `Settings`, and that is all there is to write down: its flag `--field-name`, its environment
variable `MANYGATES_SERVE_FIELD_NAME`, its key `field_name` in a TOML file, its help, its range and its line in the docs
are made from it. `python -m serving.operations.settings FILE` writes their table into a page between its two markers.
"""

# ruff: noqa: RUF009 -- `_setting` returns a dataclass's field

import argparse
import dataclasses
import difflib
import ipaddress
import math
import os
import re
import sys
import tomllib
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from serving.cores import usable_cores
from zoo.bundle.card import MAX_PIXELS
from zoo.errors import BadInput

if TYPE_CHECKING:
    from serving.engine.exits import ExitChoice

Device = Literal["cpu", "cuda"]
Precision = Literal["fp32", "int8"]
GateScope = Literal["image", "batch"]
LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]
Tracing = Literal["off", "otlp"]

PREFIX = "MANYGATES_SERVE_"
CONFIG_VARIABLE = PREFIX + "CONFIG"
TABLE_START, TABLE_END = "<!-- settings: start -->", "<!-- settings: end -->"
_DAY = 86_400
_MOST_PIXELS = 89_478_485  # Pillow warns of a decompression bomb beyond
_MODES = ("", "single", "ensemble", "random")
_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_ORIGIN = re.compile(r"https?://[A-Za-z0-9._~\[\]:-]+")
# What Kubernetes puts into every container for a Service called manygates-serve, or manygates-serve-SOMETHING. A port
# of theirs is a URL, so it cannot be taken for one of ours.
_SERVICE_LINK = re.compile(
    r"([A-Z0-9_]+_)?(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)=.*"
    r"|([A-Z0-9_]+_)?PORT=(tcp|udp|sctp)://.*",
    re.DOTALL,
)


@dataclasses.dataclass(frozen=True)
class _Kind:
    """What a setting means, and what it may be."""

    meaning: str
    lowest: float | None = None
    highest: float | None = None
    choices: tuple[str, ...] = ()
    each: type[str] | type[float] = str
    """What the entries of a tuple are."""
    metavar: str = ""


def _setting(default: Any, meaning: str, *bounds: float, **more: Any) -> Any:
    """Return a field of the type that `default` has; numbers take their lowest and highest value."""
    lowest, highest = bounds or (None, None)
    kind = _Kind(meaning=meaning, lowest=lowest, highest=highest, **more)
    return dataclasses.field(default=default, metadata={"kind": kind})


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelTable:
    """A `[[model]]` of a settings file: what is different for one model; None is what holds for all."""

    source: str
    """A catalogue name, `local-dir:FOLDER` or `hf-hub:ORGANISATION/NAME`."""
    name: str | None = None
    """What clients call it; the name in its card else."""
    weight: float | None = None
    """Its share of the cores beside other models that are busy too; 1 else."""
    mode: str | None = None
    draws: int | None = None
    gate_scope: str | None = None
    precision: str | None = None
    allow_mode_choice: bool | None = None
    exit: int | None = None
    confidence: tuple[float, ...] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """How one model is served, after what holds for all models and what its own table says."""

    source: str
    """A catalogue name, `local-dir:FOLDER` or `hf-hub:ORGANISATION/NAME`."""
    name: str = ""
    """What clients call it; empty is the name in its card."""
    weight: float = 1.0
    """Its share of the cores beside other models that are busy too, above 0."""
    mode: str = ""
    draws: int = 1
    gate_scope: GateScope = "image"
    precision: Precision = "fp32"
    allow_mode_choice: bool = False
    exit: int = 0
    confidence: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for name in _MODEL_KEYS:
            _check_value(name, getattr(self, name))
        if not self.source:
            raise BadInput("a model has no source; name a catalogue name, local-dir:FOLDER or hf-hub:ORGANISATION/NAME")
        if self.name and not _MODEL_NAME.fullmatch(self.name):
            raise BadInput(
                f"the name of {self.source} is {self.name!r}, expected up to 128 letters, digits, dots, underscores "
                "and hyphens, the first a letter or digit"
            )
        if not 0 < self.weight <= 1000:
            raise BadInput(f"the weight of {self.source} is {self.weight}, expected above 0 and up to 1000")
        if self.exit and self.confidence:
            raise BadInput(f"exit {self.exit} and confidence {self.confidence} were both given; leave one out")

    @property
    def exit_choice(self) -> "ExitChoice":
        """Which exit of a multi-exit model answers."""
        from serving.engine.exits import ExitChoice  # not above: settings are read where numpy is not needed

        confidence = self.confidence[0] if len(self.confidence) == 1 else self.confidence or None
        return ExitChoice(exit=self.exit or None, confidence=confidence)

    @property
    def may_be_random(self) -> bool:
        """Whether mode `random` may answer."""
        return self.mode == "random" or self.allow_mode_choice


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How a server runs; each field is also a flag, an environment variable and a key of a settings file."""

    # what is served
    models: tuple[str, ...] = _setting(
        (),
        "names, `local-dir:FOLDER` or `hf-hub:ORGANISATION/NAME`, the first the default; none serves all bundled ones",
    )
    model_repository: str = _setting(
        "", "a folder of bundles to serve, each in `NAME/` or `NAME/VERSION/` with a number as version", metavar="DIR"
    )
    mode: str = _setting("", "what answers; empty takes `single`, or the first mode the model has", choices=_MODES)
    draws: int = _setting(1, "mode `random`: paths per image, whose probabilities are averaged", 1, 256)
    gate_scope: GateScope = _setting(
        "image",
        "mode `random`: a fresh path for each image, or one for the images of a batch",
        choices=("image", "batch"),
    )
    precision: Precision = _setting(
        "fp32", "which graphs run; `int8` is faster and needs a model that has them", choices=("fp32", "int8")
    )
    exit: int = _setting(0, "the exit of multi-exit models that answers, from 1; 0 is the last", 0, 1024)
    confidence: tuple[float, ...] = _setting(
        (),
        "or the first exit whose largest probability reaches this; one number, or one per exit but the last",
        each=float,
    )
    allow_mode_choice: bool = _setting(False, "let a request choose its mode; the graphs of all modes are loaded then")
    allow_exit_choice: bool = _setting(
        False, "let a request choose its exit of a multi-exit model; both of its graphs are loaded then"
    )
    demo: bool = _setting(False, "also serve the attack page under /demo")

    # where
    host: str = _setting("127.0.0.1", "the address to listen on")
    port: int = _setting(8000, "for HTTP; 0 takes a free one", 0, 65_535)
    grpc_port: int = _setting(-1, "for gRPC; 0 takes a free one, -1 serves none", -1, 65_535)

    # how fast
    threads: int = _setting(
        0, "batches that run at a time; 0 is as many as there are cores for, or one on a GPU", 0, 1024
    )
    intra_op: int = _setting(1, "cores that one batch uses", 1, 1024)
    max_batch: int = _setting(8, "images in a batch; more gain nothing on a processor, so raise it on a GPU", 1, 65_536)
    bulk_images: int = _setting(
        0, "a request of more images (times draws it chose) is bulk: smaller ones pass; 0 is `max_batch`", 0, 2**24
    )
    device: Device = _setting("cpu", "`cuda` uses ONNX Runtime's CUDA provider", choices=("cpu", "cuda"))
    allow_cpu_fallback: bool = _setting(
        False, "with device `cuda`: run on the processor where the GPU cannot be used, rather than stop"
    )
    allow_spinning: bool = _setting(
        False, "let ONNX Runtime's idle threads spin: less latency, and cores that are never idle"
    )

    # limits
    max_queue: int = _setting(
        1024, "images waiting, per model, and the most in one request; more are answered with 429", 1, 2**24
    )
    max_body_bytes: int = _setting(16 * 2**20, "larger requests are answered with 413", 1, 2**40)
    max_image_pixels: int = _setting(
        MAX_PIXELS,
        "pixels of an image file; larger ones are answered with 400, before they are unpacked",
        1,
        _MOST_PIXELS,
    )
    max_total_body_bytes: int = _setting(
        2**30, "bytes of all requests being received or answered; beyond that they get 503", 1, 2**50
    )
    max_connections: int = _setting(2048, "open connections; requests beyond that are answered with 503", 1, 2**24)
    queue_timeout: float = _setting(
        30.0, "seconds a request may wait for its turn before it is answered with 503", 0.001, _DAY
    )
    header_timeout: float = _setting(
        10.0,
        "seconds for a TLS handshake, and for a request's first line and headers, before the client is cut off",
        0.001,
        _DAY,
    )
    body_timeout: float = _setting(
        30.0, "seconds a client may take to send a body before it is answered with 408", 0.001, _DAY
    )
    keep_alive_timeout: float = _setting(30.0, "seconds an idle connection stays open", 0.001, _DAY)

    # stop and change
    drain_delay: float = _setting(
        0.0, "seconds after SIGTERM in which requests are still taken, while readiness already says no", 0, _DAY
    )
    drain_timeout: float = _setting(30.0, "seconds that requests in flight then have to finish", 0, _DAY)
    reload_seconds: float = _setting(0.0, "how often to look for a changed bundle; 0 is never", 0, _DAY)
    allow_repository_changes: bool = _setting(False, "let clients load and unload models")
    allow_empty: bool = _setting(
        False, "be ready even while the model repository is empty, or something in it cannot be loaded"
    )

    # who may ask
    api_keys_file: str = _setting("", "keys of which a request must have one; empty asks for none", metavar="FILE")
    admin_keys_file: str = _setting("", "keys of which one is needed to load and unload models", metavar="FILE")
    tls_certificate: str = _setting("", "PEM file of the server's certificate and those above it", metavar="FILE")
    tls_key: str = _setting("", "PEM file of the certificate's key, not encrypted", metavar="FILE")
    tls_client_ca: str = _setting("", "PEM file of who signs clients' certificates; clients need one", metavar="FILE")
    cors_origins: tuple[str, ...] = _setting((), "web pages' origins that browsers may ask from; `*` is all")

    # what is written down
    log_format: LogFormat = _setting("text", "`json` is one object a line", choices=("text", "json"))
    log_level: LogLevel = _setting("info", "the least that is logged", choices=("debug", "info", "warning", "error"))
    log_requests: bool = _setting(False, "a line for each request: never its content, key or path through the gates")
    tracing: Tracing = _setting("off", "`otlp` sends OpenTelemetry traces", choices=("off", "otlp"))

    # not settings of their own
    model_tables: tuple[ModelTable, ...] = ()
    """What is different for single models; a model not among `models` is served too."""
    origins: Mapping[str, str] = dataclasses.field(default_factory=dict, compare=False, repr=False)
    """Field -> where its value came from, if not from the defaults."""

    def __post_init__(self) -> None:
        for field in setting_fields():
            if isinstance(field.default, tuple):  # what is listed may come as a list
                object.__setattr__(self, field.name, _as_tuple(field.name, getattr(self, field.name)))
            _check_value(field.name, getattr(self, field.name), self._from(field.name))
        if self.max_total_body_bytes < self.max_body_bytes:
            raise BadInput(
                f"max_total_body_bytes is {self.max_total_body_bytes}, expected at least the {self.max_body_bytes} of "
                "max_body_bytes; raise it"
            )
        if self.exit and self.confidence:
            raise BadInput(f"exit {self.exit} and confidence {self.confidence} were both given; leave one out")
        if self.port and self.port == self.grpc_port:
            raise BadInput(f"port and grpc_port are both {self.port}; choose another, or -1 to serve no gRPC")
        self._check_security()
        self._check_models()

    @property
    def workers(self) -> int:
        """How many batches run at a time: never so many that threads compete for cores, unless it was asked for."""
        if self.threads:
            return self.threads
        return max(1, usable_cores() // self.intra_op) if self.device == "cpu" else 1

    @property
    def model_settings(self) -> tuple[ModelSettings, ...]:
        """How each model is served, in the order of `models` and then of the tables of others.

        A model with several tables is served once for each, under their names.
        """
        tables: dict[str, list[ModelTable]] = {source: [] for source in self.models}
        for table in self.model_tables:
            tables.setdefault(table.source, []).append(table)
        return tuple(
            self.settings_of(table)
            for source, listed in tables.items()
            for table in listed or [ModelTable(source=source)]
        )

    def settings_of(self, table: ModelTable) -> ModelSettings:
        """Return how the model of a table is served; one with no more than its source is what holds for all.

        Raises:
            BadInput: if a value makes no sense.
        """
        own = {name: value for name, value in vars(table).items() if value is not None}
        shared = {name: getattr(self, name) for name in _MODEL_KEYS}
        if "exit" in own or "confidence" in own:  # the one takes the place of the other
            del shared["exit"], shared["confidence"]
        try:
            return ModelSettings(**{**shared, **own})
        except BadInput as error:
            raise BadInput(f"[[model]] {table.source!r}: {error}") from error

    @property
    def exposed(self) -> bool:
        """Whether other machines can connect."""
        try:
            return not ipaddress.ip_address(self.host.partition("%")[0]).is_loopback
        except ValueError:
            return self.host != "localhost"

    @classmethod
    def resolve(
        cls, flags: Mapping[str, Any], environment: Mapping[str, str] = os.environ, file: Path | None = None
    ) -> Self:
        """Return the settings of a command: flags go before the environment, that before a file, that before defaults.

        Models named by flags or the environment are all that is served: the file's tables then only say how.

        Args:
            flags: field -> its value, or the text of it.
            environment: variables; Kubernetes' links to services are passed over.
            file: a TOML file; None takes what MANYGATES_SERVE_CONFIG names, if anything.

        Raises:
            BadInput: if a flag, a variable with our prefix or a key is no setting, or its value is not of its type.
        """
        fields = {field.name: field for field in setting_fields()}
        layers = [_of_flags(flags, fields), _of_environment(environment, fields)]
        if file is None and environment.get(CONFIG_VARIABLE):
            file = Path(environment[CONFIG_VARIABLE])
        tables: tuple[ModelTable, ...] = ()
        if file is not None:
            from_file, tables = _of_file(file, fields)
            layers.append(from_file)
        values: dict[str, Any] = {}
        origins: dict[str, str] = {}
        for layer in layers:
            exits_chosen = "exit" in values or "confidence" in values
            for name, (value, origin) in layer.items():
                if name not in values and not (exits_chosen and name in ("exit", "confidence")):
                    values[name], origins[name] = value, origin
        if any("models" in layer for layer in layers[:2]):
            tables = tuple(table for table in tables if table.source in values["models"])
        if tables:
            origins["model_tables"] = f"file {file}"
        return cls(**values, model_tables=tables, origins=origins)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """Return the defaults with what the environment sets, and the file that it names; see `resolve`."""
        return cls.resolve({}, environment)

    def to_toml(self) -> str:
        """Return a settings file that gives these settings again, with where each value came from.

        It holds no secret: keys are in files, and only those files' names are settings.
        """
        lines = []
        for field in setting_fields():
            if field.name in _SECTIONS:
                lines += ["", f"# {_SECTIONS[field.name]}"]
            value = getattr(self, field.name)
            lines.append(f"{field.name} = {_toml(value)}  # {self._origin(field)}")
        for table in self.model_tables:
            lines += ["", f"[[model]]  # {_one_line(self.origins.get('model_tables', 'given'))}"]
            lines += [f"{name} = {_toml(value)}" for name, value in vars(table).items() if value is not None]
        return "\n".join(lines[1:]) + "\n"

    def _origin(self, field: "dataclasses.Field[Any]") -> str:
        untold = "default" if getattr(self, field.name) == field.default else "given"
        return _one_line(self.origins.get(field.name, untold))

    def _from(self, name: str) -> str:
        return f" (from {self.origins[name]})" if name in self.origins else ""

    def _check_security(self) -> None:
        for name, other in (("tls_certificate", "tls_key"), ("tls_key", "tls_certificate")):
            if getattr(self, name) and not getattr(self, other):
                raise BadInput(f"{name} is {getattr(self, name)!r}, but {other} is empty; TLS needs both")
        if self.tls_client_ca and not self.tls_certificate:
            raise BadInput(
                f"tls_client_ca is {self.tls_client_ca!r}, but tls_certificate and tls_key are empty; clients' "
                "certificates are only asked for over TLS"
            )
        for origin in self.cors_origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise BadInput(
                    f"cors_origins has {origin!r}, expected https://HOST or https://HOST:PORT without a path, or *"
                )
        if self.allow_repository_changes and self.exposed and not self.admin_keys_file:
            raise BadInput(
                f"allow_repository_changes is true and host is {self.host!r}, so anybody could load and unload models; "
                "name admin_keys_file, or listen on 127.0.0.1"
            )

    def _check_models(self) -> None:
        served = self.model_settings
        by_table = [(table, self.settings_of(table)) for table in self.model_tables]
        identities = [(model.source, model.name) for model in served]
        names = [model.name for model in served if model.name]
        for twice in [source for source, name in identities if identities.count((source, name)) > 1]:
            raise BadInput(f"[[model]] {twice!r} is there twice; give each a name of its own")
        for name in names:
            if names.count(name) > 1:
                raise BadInput(f"the name {name!r} is given to two models; clients could not tell them apart")
        for table, model in by_table:
            if (table.draws or 1) > 1 and not model.may_be_random:
                raise BadInput(f"[[model]] {table.source!r}: {_needs_random(model)}")
        # models that are found later, in the repository or because none was named, are served as all are
        others = () if served and not self.model_repository else (self.settings_of(ModelTable(source="any")),)
        if self.draws > 1 and not any(model.may_be_random for model in (*served, *others)):
            raise BadInput(_needs_random(self))


def setting_fields() -> list["dataclasses.Field[Any]"]:
    """Return the fields that are settings, in order."""
    return [field for field in dataclasses.fields(Settings) if "kind" in field.metadata]


def flag_of(name: str) -> str:
    """Return the flag of a setting; models are the command's words without one."""
    return "MODEL …" if name == "models" else "--" + name.replace("_", "-")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Give a parser a flag for each setting, and MODEL… for the models; what is not said is not in the result."""
    group: Any = parser
    for field in setting_fields():
        kind = _kind(field)
        if field.name in _SECTIONS:
            group = parser.add_argument_group(_SECTIONS[field.name])
        text = kind.meaning.replace("%", "%%")
        if field.name == "models":
            group.add_argument("models", nargs="*", default=argparse.SUPPRESS, metavar="MODEL", help=text)
            continue
        default: Any = field.default
        shown = f"{text} (default {_shown(default)})" if default not in ("", (), False) else text
        how: dict[str, Any] = {"default": argparse.SUPPRESS, "help": shown, "dest": field.name}
        if isinstance(default, bool):
            how["action"] = argparse.BooleanOptionalAction
        elif kind.choices:
            how["choices"] = [choice for choice in kind.choices if choice]
        else:
            how["metavar"] = kind.metavar or {int: "N", float: "SECONDS", tuple: "X[,X…]"}.get(type(default), "TEXT")
        group.add_argument(flag_of(field.name), **how)


def flags_in(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what was said by the flags of `add_flags`, for `Settings.resolve`."""
    said = vars(arguments)
    return {
        field.name: said[field.name]
        for field in setting_fields()
        if field.name in said and not (field.name == "models" and not said["models"])
    }


def markdown_table() -> str:
    """Return all settings as a table in Markdown."""
    lines = ["| setting | flag | environment | default | meaning |", "|---|---|---|---|---|"]
    for field in setting_fields():
        default = f"`{_shown(field.default)}`" if field.default not in ("", ()) else ""
        flag = "`MODEL …`" if field.name == "models" else f"`{flag_of(field.name)}`"
        meaning = _kind(field).meaning.replace("|", "\\|")
        lines.append(f"| `{field.name}` | {flag} | `{PREFIX}{field.name.upper()}` | {default} | {meaning} |")
    return "\n".join(lines) + "\n"


def with_table(page: str) -> str:
    """Return a page with the table of settings between its markers.

    Raises:
        BadInput: if the page lacks the markers.
    """
    before, start, rest = page.partition(TABLE_START)
    _, end, after = rest.partition(TABLE_END)
    if not end:
        raise BadInput(f"the page has no {TABLE_START} … {TABLE_END} for the table of settings; put both there")
    return f"{before}{start}\n{markdown_table()}{end}{after}"


_SECTIONS = {
    "models": "What is served",
    "host": "Where",
    "threads": "How fast",
    "max_queue": "Limits",
    "drain_delay": "Stop and change",
    "api_keys_file": "Who may ask",
    "log_format": "What is written down",
}
"""First setting of each section -> its heading."""
_MODEL_KEYS = (
    "mode",
    "draws",
    "gate_scope",
    "precision",
    "allow_mode_choice",
    "exit",
    "confidence",
)
"""Settings that a model may have otherwise."""

_Values = dict[str, tuple[Any, str]]
"""Field -> its value and where that came from."""
_Fields = Mapping[str, "dataclasses.Field[Any]"]


def _kind(field: "dataclasses.Field[Any]") -> _Kind:
    kind: _Kind = field.metadata["kind"]
    return kind


_KINDS = {field.name: _kind(field) for field in setting_fields()}


def _check_value(name: str, value: Any, origin: str = "") -> None:
    """Refuse a value out of its setting's range."""
    kind = _KINDS[name]
    if kind.lowest is not None and kind.highest is not None and not (kind.lowest <= value <= kind.highest):
        # written so that NaN fails
        raise BadInput(
            f"{name} is {value}, expected {kind.lowest:g} to {_number(kind.highest)}{origin}; "
            "leave it out for the default"
        )
    if kind.choices and value not in kind.choices:
        raise BadInput(f"{name} is {value!r}, expected {_listed(kind.choices)}{origin}")
    if name == "confidence":
        for number in value:
            if not (0 < number <= 1 or (len(value) > 1 and number == math.inf)):
                raise BadInput(f"confidence is {number}, expected a number above 0 and up to 1, like 0.9{origin}")
    for text in value if isinstance(value, tuple) else (value,):
        if isinstance(text, str) and any(unicodedata.category(character) in ("Cc", "Cs") for character in text):
            raise BadInput(f"{name} is {text!r}, expected text without control characters{origin}")
    if name == "host" and not value:
        raise BadInput(f"host is empty, expected an address{origin}; 0.0.0.0 is all of this machine's")


def _as_tuple(name: str, value: Any) -> tuple[Any, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise BadInput(f"{name} is {value!r}, expected a list; put it into one")
    return tuple(value)


def _needs_random(settings: ModelSettings | Settings) -> str:
    return f"draws is {settings.draws}, but no mode is random; say mode random, allow_mode_choice, or leave draws out"


def _of_flags(flags: Mapping[str, Any], fields: _Fields) -> _Values:
    values: _Values = {}
    for name, value in flags.items():
        if name not in fields:
            raise _no_setting(name, fields)
        flag = flag_of(name)
        read = _read(flag, value, fields[name]) if isinstance(value, str) else value
        values[name] = (read, "arguments" if name == "models" else f"flag {flag}")
    return values


def _of_environment(environment: Mapping[str, str], fields: _Fields) -> _Values:
    values: _Values = {}
    for variable, text in environment.items():
        name = variable.removeprefix(PREFIX)
        if name == variable or variable == CONFIG_VARIABLE or _SERVICE_LINK.fullmatch(f"{name}={text}"):
            continue
        if name.lower() not in fields or name != name.upper():
            raise _no_setting(name.lower(), fields, written=lambda field: PREFIX + field.upper(), said=variable)
        values[name.lower()] = (_read(variable, text, fields[name.lower()]), f"environment {variable}")
    return values


def _of_file(file: Path, fields: _Fields) -> tuple[_Values, tuple[ModelTable, ...]]:
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"cannot read the settings file {file} ({error.strerror or error})") from error
    except ValueError as error:  # not UTF-8, or not TOML
        raise BadInput(f"the settings file {file} is no TOML ({error})") from error
    tables = document.pop("model", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise BadInput(f"{file}: model is {tables!r}, expected tables; write [[model]] above each model's keys")
    values: _Values = {}
    for name, value in document.items():
        if name not in fields:
            raise _no_setting(name, [*fields, "model"], f"{file}: ")
        values[name] = (_of_toml(f"{file}: {name}", value, fields[name]), f"file {file}")
    return values, tuple(_model_table(file, table, fields) for table in tables)


def _model_table(file: Path, table: Mapping[str, Any], fields: _Fields) -> ModelTable:
    source = table.get("source")
    if not isinstance(source, str) or not source:
        raise BadInput(f'{file}: a [[model]] has source {source!r}, expected a model; write source = "NAME"')
    values: dict[str, Any] = {}
    for name, value in table.items():
        where = f"{file}: [[model]] {source!r}: {name}"
        if name in ("source", "name"):
            if not isinstance(value, str) or not value:
                raise BadInput(f"{where} is {value!r}, expected text")
            values[name] = value
        elif name == "weight":
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise BadInput(f"{where} is {value!r}, expected a number like 2.0")
            values[name] = float(value)
        elif name in _MODEL_KEYS:
            values[name] = _of_toml(where, value, fields[name])
        else:
            known = [field.name for field in dataclasses.fields(ModelTable)]
            raise _no_setting(name, known, f"{file}: [[model]] {source!r}: ", "key of a model")
    return ModelTable(**values)


def _no_setting(
    name: str,
    known: Iterable[str],
    where: str = "",
    kind: str = "setting",
    *,
    written: Callable[[str], str] = str,
    said: str = "",
) -> BadInput:
    """Say that there is no such setting, and which there are.

    `written` is how names are written there, and `said` how this one was; they are compared without that.
    """
    listed = list(known)
    nearest = difflib.get_close_matches(name, listed, n=1)
    suggestion = f"did you mean {written(nearest[0])}? " if nearest else ""
    return BadInput(f"{where}{said or name} is no {kind}; {suggestion}known: {', '.join(map(written, listed))}")


def _read(where: str, text: str, field: "dataclasses.Field[Any]") -> Any:
    """Read a value of the type that the setting's default has."""
    default: Any = field.default
    if isinstance(default, bool):
        if text.lower() not in ("0", "1", "false", "true"):
            raise BadInput(f"{where} is {text!r}, expected true or false")
        return text.lower() in ("1", "true")
    if isinstance(default, tuple):
        each = _kind(field).each
        try:
            return tuple(each(part.strip()) for part in text.split(",") if part.strip())
        except ValueError as error:
            raise BadInput(f'{where} is {text!r}, expected numbers like "0.9" or "0.9,0.8"') from error
    try:
        return type(default)(text)
    except ValueError as error:
        raise BadInput(f"{where} is {text!r}, expected a number like {default}") from error


def _of_toml(where: str, value: Any, field: "dataclasses.Field[Any]") -> Any:
    """Take a value of a settings file if it is of the type that the setting's default has."""
    default: Any = field.default
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if isinstance(default, bool):
        if isinstance(value, bool):
            return value
        raise BadInput(f"{where} is {value!r}, expected true or false")
    if isinstance(default, tuple):
        each = _kind(field).each
        if each is float and number:
            return (float(value),)
        wanted = (int, float) if each is float else str
        if isinstance(value, list) and all(isinstance(x, wanted) and not isinstance(x, bool) for x in value):
            return tuple(each(entry) for entry in value)
        raise BadInput(f"{where} is {value!r}, expected a list of {'numbers' if each is float else 'texts'}")
    if isinstance(default, str):
        if isinstance(value, str):
            return value
        raise BadInput(f"{where} is {value!r}, expected text in quotes")
    if not number or (isinstance(default, int) and not isinstance(value, int)):
        raise BadInput(f"{where} is {value!r}, expected a number like {default}")
    return type(default)(value)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, tuple):
        return f"[{', '.join(_toml(entry) for entry in value)}]"
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'  # control characters are refused in `_check_value`


def _one_line(text: str) -> str:
    """Return text for a comment: a file's name may hold a line's end."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _shown(value: Any) -> str:
    """Show a default as one writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else str(value)


def _listed(choices: tuple[str, ...]) -> str:
    named = [choice for choice in choices if choice]
    return f"{', '.join(named[:-1])} or {named[-1]}"


def _main() -> None:
    """Write the table of settings into the pages named."""
    for page in map(Path, sys.argv[1:]):
        page.write_text(with_table(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    _main()
