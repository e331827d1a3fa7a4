"""The server's settings, with defaults that need no thought.

A setting is one field of `Settings`, and that is all there is to write down. Its flag `--field-name`, its environment
variable `MANYGATES_SERVE_FIELD_NAME`, its key `field_name` in a TOML file, its help, its range and its line in the docs
are made from it (`serving.operations.settings_help`).
"""

import dataclasses
import ipaddress
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from serving.cores import usable_cores
from serving.operations.fields import check, is_plain, setting, unknown
from serving.operations.sources import CONFIG_VARIABLE, of_environment, of_file, of_flags
from zoo.errors import BadInput
from zoo.input_format import MAX_PIXELS
from zoo.vocabulary import NAME, Device, Precision

_DAY = 86_400
_MOST_PIXELS = 89_478_485  # Pillow warns of a decompression bomb beyond
_ORIGIN = re.compile(r"\*|https?://[A-Za-z0-9._~\[\]:-]+")


def _is_source(text: str) -> bool:
    return bool(text) and is_plain(text)


def _are_confidences(numbers: tuple[float, ...]) -> bool:
    return all(0 < number <= 1 or (number == math.inf and len(numbers) > 1) for number in numbers)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Answering:
    """How a model answers: what a `[[model]]` may say otherwise than all."""

    mode: Literal["", "single", "ensemble", "random"] = setting(
        "", "what answers; empty takes `single`, or the first mode the model has"
    )
    draws: int = setting(1, "mode `random`: paths per image, whose probabilities are averaged", 1, 256)
    gate_scope: Literal["image", "batch"] = setting(
        "image", "mode `random`: a fresh path for each image, or one for the images of a batch"
    )
    precision: Precision = setting("fp32", "which graphs run; `int8` is faster and needs a model that has them")
    exit: int = setting(0, "the exit of multi-exit models that answers, from 1; 0 is the last", 0, 1024)
    confidence: tuple[float, ...] = setting(
        (),
        "or the first exit whose largest probability reaches this; one number, or one per exit but the last",
        allowed=_are_confidences,
        expected="numbers above 0 and up to 1, like 0.9 or 0.9,0.8; among several, inf is an exit that never answers",
    )
    allow_mode_choice: bool = setting(False, "let a request choose its mode; the graphs of all modes are loaded then")

    def __post_init__(self) -> None:
        confidence: Any = self.confidence
        if type(confidence) in (int, float):  # one need not be a list
            object.__setattr__(self, "confidence", (confidence,))
        check(self, getattr(self, "origins", {}))
        if self.exit and self.confidence:
            raise BadInput(f"exit {self.exit} and confidence {self.confidence} were both given; leave one out")

    @property
    def may_be_random(self) -> bool:
        """Whether mode `random` may answer."""
        return self.mode == "random" or self.allow_mode_choice


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSettings(_Answering):
    """How one model is served, after what holds for all models and what its own table says."""

    source: str = setting("", "what is served", allowed=_is_source, expected='a model; write source = "NAME"')
    """A catalogue name, `local-dir:FOLDER` or `hf-hub:ORGANISATION/NAME`."""
    name: str = setting(
        "",
        "what clients call it; empty is the name in its card",
        allowed=lambda name: not name or NAME.fullmatch(name),
        expected="up to 128 letters, digits, dots, underscores and hyphens, the first a letter or digit",
    )
    weight: float = setting(
        1.0,
        "its share of the cores beside other models that are busy too",
        allowed=lambda weight: 0 < weight <= 1000,
        expected="a number above 0 and up to 1000",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(_Answering):
    """How a server runs; each field is also a flag, an environment variable and a key of a settings file.

    Raises:
        BadInput: if a value is not of its setting's type or range, or two values exclude each other.
    """

    # what is served
    models: tuple[str, ...] = setting(
        (),
        "names, `local-dir:FOLDER` or `hf-hub:ORGANISATION/NAME`, the first the default; none serves all bundled ones",
    )
    model_repository: str = setting(
        "", "a folder of bundles to serve, each in `NAME/` or `NAME/VERSION/` with a number as version", metavar="DIR"
    )
    allow_exit_choice: bool = setting(
        False, "let a request choose its exit of a multi-exit model; both of its graphs are loaded then"
    )
    demo: bool = setting(False, "also serve the attack page under /demo")

    # where
    host: str = setting(
        "127.0.0.1",
        "the address to listen on",
        allowed=lambda host: host and is_plain(host),
        expected="an address without control characters; 0.0.0.0 is all of this machine's",
    )
    port: int = setting(8000, "for HTTP; 0 takes a free one", 0, 65_535)
    grpc_port: int = setting(-1, "for gRPC; 0 takes a free one, -1 serves none", -1, 65_535)

    # how fast
    threads: int = setting(
        0, "batches that run at a time; 0 is as many as there are cores for, or one on a GPU", 0, 1024
    )
    intra_op: int = setting(1, "cores that one batch uses", 1, 1024)
    max_batch: int = setting(8, "images in a batch; more gain nothing on a processor, so raise it on a GPU", 1, 65_536)
    bulk_images: int = setting(
        0, "a request of more images (times draws it chose) is bulk: smaller ones pass; 0 is `max_batch`", 0, 2**24
    )
    device: Device = setting("cpu", "`cuda` uses ONNX Runtime's CUDA provider")
    allow_cpu_fallback: bool = setting(
        False, "with device `cuda`: run on the processor where the GPU cannot be used, rather than stop"
    )
    allow_spinning: bool = setting(
        False, "let ONNX Runtime's idle threads spin: less latency, and cores that are never idle"
    )

    # limits
    max_queue: int = setting(
        1024, "images waiting, per model, and the most in one request; more are answered with 429", 1, 2**24
    )
    max_body_bytes: int = setting(16 * 2**20, "larger requests are answered with 413", 1, 2**40)
    max_image_pixels: int = setting(
        MAX_PIXELS,
        "pixels of an image file; larger ones are answered with 400, before they are unpacked",
        1,
        _MOST_PIXELS,
    )
    max_total_body_bytes: int = setting(
        2**30, "bytes of all requests being received or answered; beyond that they get 503", 1, 2**50
    )
    max_connections: int = setting(2048, "open connections; requests beyond that are answered with 503", 1, 2**24)
    queue_timeout: float = setting(
        30.0, "seconds a request may wait for its turn before it is answered with 503", 0.001, _DAY
    )
    header_timeout: float = setting(
        10.0,
        "seconds for a TLS handshake, and for a request's first line and headers, before the client is cut off",
        0.001,
        _DAY,
    )
    body_timeout: float = setting(
        30.0, "seconds a client may take to send a body before it is answered with 408", 0.001, _DAY
    )
    keep_alive_timeout: float = setting(30.0, "seconds an idle connection stays open", 0.001, _DAY)

    # stop and change
    drain_delay: float = setting(
        0.0, "seconds after SIGTERM in which requests are still taken, while readiness already says no", 0, _DAY
    )
    drain_timeout: float = setting(30.0, "seconds that requests in flight then have to finish", 0, _DAY)
    reload_seconds: float = setting(0.0, "how often to look for a changed bundle; 0 is never", 0, _DAY)
    allow_repository_changes: bool = setting(False, "let clients load and unload models")
    allow_empty: bool = setting(
        False, "be ready even while the model repository is empty, or something in it cannot be loaded"
    )

    # who may ask
    api_keys_file: str = setting("", "keys of which a request must have one; empty asks for none", metavar="FILE")
    admin_keys_file: str = setting("", "keys of which one is needed to load and unload models", metavar="FILE")
    tls_certificate: str = setting("", "PEM file of the server's certificate and those above it", metavar="FILE")
    tls_key: str = setting("", "PEM file of the certificate's key, not encrypted", metavar="FILE")
    tls_client_ca: str = setting("", "PEM file of who signs clients' certificates; clients need one", metavar="FILE")
    cors_origins: tuple[str, ...] = setting(
        (),
        "web pages' origins that browsers may ask from; `*` is all",
        allowed=lambda origins: all(map(_ORIGIN.fullmatch, origins)),
        expected="a list of https://HOST or https://HOST:PORT without a path, or *",
    )

    # what is written down
    log_format: Literal["text", "json"] = setting("text", "`json` is one object a line")
    log_level: Literal["debug", "info", "warning", "error"] = setting("info", "the least that is logged")
    log_requests: bool = setting(False, "a line for each request: never its content, key or path through the gates")
    tracing: Literal["off", "otlp"] = setting("off", "`otlp` sends OpenTelemetry traces")

    # not settings of their own
    model_tables: tuple[dict[str, Any], ...] = setting(
        (), "", allowed=lambda _: True, expected="tables; write [[model]] above each model's keys"
    )
    """Fields of `ModelSettings` that are different for single models; a source not among `models` is served too."""
    origins: Mapping[str, str] = dataclasses.field(default_factory=dict, compare=False, repr=False)
    """Field -> where its value came from, if not from the defaults."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_total_body_bytes < self.max_body_bytes:
            raise BadInput(
                f"max_total_body_bytes is {self.max_total_body_bytes}, expected at least the {self.max_body_bytes} of "
                "max_body_bytes; raise it"
            )
        if self.port and self.port == self.grpc_port:
            raise BadInput(f"port and grpc_port are both {self.port}; choose another, or -1 to serve no gRPC")
        for name, other in (("tls_certificate", "tls_key"), ("tls_key", "tls_certificate")):
            if getattr(self, name) and not getattr(self, other):
                raise BadInput(f"{name} is {getattr(self, name)!r}, but {other} is empty; TLS needs both")
        if self.tls_client_ca and not self.tls_certificate:
            raise BadInput(
                f"tls_client_ca is {self.tls_client_ca!r}, but tls_certificate and tls_key are empty; clients' "
                "certificates are only asked for over TLS"
            )
        if self.allow_repository_changes and self.exposed and not self.admin_keys_file:
            raise BadInput(
                f"allow_repository_changes is true and host is {self.host!r}, so anybody could load and unload models; "
                "name admin_keys_file, or listen on 127.0.0.1"
            )
        self._check_models()

    def _check_models(self) -> None:
        for table in self.model_tables:
            if not self.settings_of(table).may_be_random and table.get("draws", 1) > 1:
                raise BadInput(f"[[model]] {table['source']!r}: {_needs_random(table['draws'])}")
        served = self.model_settings
        identities = [(model.source, model.name) for model in served]
        for source, name in identities:
            if identities.count((source, name)) > 1:
                raise BadInput(f"[[model]] {source!r} is there twice; give each a name of its own")
            if name and sum(name == other for _, other in identities) > 1:
                raise BadInput(f"the name {name!r} is given to two models; clients could not tell them apart")
        # models that are found later, in the repository or because none was named, are served as all are
        others = () if served and not self.model_repository else (self,)
        if self.draws > 1 and not any(model.may_be_random for model in (*served, *others)):
            raise BadInput(_needs_random(self.draws))

    @property
    def workers(self) -> int:
        """How many batches run at a time: never so many that threads compete for cores, unless it was asked for."""
        if self.threads:
            return self.threads
        return max(1, usable_cores() // self.intra_op) if self.device == "cpu" else 1

    @property
    def exposed(self) -> bool:
        """Whether other machines can connect."""
        try:
            return not ipaddress.ip_address(self.host.partition("%")[0]).is_loopback
        except ValueError:
            return self.host != "localhost"

    @property
    def model_settings(self) -> tuple[ModelSettings, ...]:
        """How each model is served, in the order of `models` and then of the tables of others.

        A model with several tables is served once for each, under their names.
        """
        tables: dict[str, list[dict[str, Any]]] = {source: [] for source in self.models}
        for table in self.model_tables:
            tables.setdefault(table["source"], []).append(table)
        return tuple(
            self.settings_of(table) for source, listed in tables.items() for table in listed or [{"source": source}]
        )

    def settings_of(self, table: Mapping[str, Any]) -> ModelSettings:
        """Return how the model of a table is served; one with no more than its source is served as all are.

        Raises:
            BadInput: if a key is no field of `ModelSettings`, or a value makes no sense.
        """
        shared = {name: getattr(self, name) for name in _names_of(_Answering)}
        if "exit" in table or "confidence" in table:  # the one takes the place of the other
            del shared["exit"], shared["confidence"]
        try:
            for name in table:
                if name not in _names_of(ModelSettings):
                    raise unknown(name, _names_of(ModelSettings))
            return ModelSettings(**{**shared, **table})
        except BadInput as error:
            raise BadInput(f"[[model]] {table.get('source')!r}: {error}{self._from('model_tables')}") from error

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
        if file is None and environment.get(CONFIG_VARIABLE):
            file = Path(environment[CONFIG_VARIABLE])
        fields = setting_fields()
        chosen = [of_flags(flags, fields), of_environment(environment, fields)]
        values: dict[str, Any] = {}
        origins: dict[str, str] = {}
        for layer in [*chosen, {} if file is None else of_file(file, fields)]:
            exits_chosen = "exit" in values or "confidence" in values
            for name, (value, origin) in layer.items():
                if name not in values and not (exits_chosen and name in ("exit", "confidence")):
                    values[name], origins[name] = value, origin
        if any("models" in layer for layer in chosen) and isinstance(tables := values.get("model_tables"), list):
            named = values["models"]
            values["model_tables"] = [t for t in tables if not isinstance(t, dict) or t.get("source") in named]
        return cls(**values, origins=origins)

    def _from(self, name: str) -> str:
        return f" (from {self.origins[name]})" if name in self.origins else ""


def setting_fields() -> "dict[str, dataclasses.Field[Any]]":
    """Return the fields that are settings, in the order of the sections."""
    fields = {field.name: field for field in dataclasses.fields(Settings)}
    fields = {name: fields[name] for name in ("models", "model_repository")} | fields
    return {name: field for name, field in fields.items() if name not in ("model_tables", "origins")}


def _names_of(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def _needs_random(draws: int) -> str:
    return f"draws is {draws}, but no mode is random; say mode random, allow_mode_choice, or leave draws out"
