"""The server's settings, with defaults that need no thought."""

import dataclasses
import os
import re
from collections.abc import Mapping
from typing import Any, Self

from serving.engine import Device, usable_cores
from zoo.errors import BadInput

_PREFIX = "MANYGATES_SERVE_"
_DAY = 86_400
_RANGES = {
    "threads": (0, 1024),
    "intra_op": (1, 1024),
    "max_batch": (1, 65_536),
    "max_queue": (1, 2**24),
    "max_body_bytes": (1, 2**40),
    "max_total_body_bytes": (1, 2**50),
    "max_connections": (1, 2**24),
    "queue_timeout": (0.001, _DAY),
    "header_timeout": (0.001, _DAY),
    "body_timeout": (0.001, _DAY),
    "keep_alive_timeout": (0.001, _DAY),
    "drain_delay": (0, _DAY),
    "drain_timeout": (0, _DAY),
}
# What Kubernetes puts into every container for a Service called manygates-serve, or manygates-serve-SOMETHING.
# PORT alone is also what a person might try, so it must look like one of theirs.
_SERVICE_LINK = re.compile(
    r"([A-Z0-9_]+_)?(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)=.*"
    r"|([A-Z0-9_]+_)?PORT=(tcp|udp|sctp)://.*",
    re.DOTALL,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How a server runs; each field is also the environment variable MANYGATES_SERVE_<FIELD>, in upper case."""

    threads: int = 0
    """Batches that run at a time, per model; 0 is as many as there are cores for, or one on a GPU."""
    intra_op: int = 1
    """Cores that one batch uses."""
    max_batch: int = 8
    """Images in a batch. On a processor larger batches gain nothing; on a GPU raise it."""
    max_queue: int = 1024
    """Images waiting, per model; more are answered with 429. Also the most images in one request."""
    max_body_bytes: int = 16 * 2**20
    """Larger requests are answered with 413."""
    max_total_body_bytes: int = 2**30
    """Bytes of all requests that are being received or answered; beyond that they get 503."""
    max_connections: int = 2048
    """Open connections; requests beyond that are answered with 503."""
    queue_timeout: float = 30.0
    """Seconds a request may wait for its turn before it is answered with 503."""
    header_timeout: float = 10.0
    """Seconds a client may take to send a request's first line and headers before it is cut off."""
    body_timeout: float = 30.0
    """Seconds a client may take to send a body before it is answered with 408."""
    keep_alive_timeout: float = 30.0
    """Seconds an idle connection stays open."""
    drain_delay: float = 0.0
    """Seconds after SIGTERM in which requests are still taken, while readiness already says no."""
    drain_timeout: float = 30.0
    """Seconds that requests in flight then have to finish."""
    device: Device = "cpu"
    allow_cpu_fallback: bool = False
    """With device `cuda`: run on the processor where the GPU cannot be used, rather than stop."""
    allow_spinning: bool = False
    """Let ONNX Runtime's idle threads spin: less latency, and cores that are never idle."""
    allow_exit_choice: bool = False
    """Let a request choose which exit of a multi-exit model answers it; both of its graphs are loaded then."""

    def __post_init__(self) -> None:
        for name, (lowest, highest) in _RANGES.items():
            value = getattr(self, name)
            if not (lowest <= value <= highest):  # written so that NaN fails
                raise BadInput(f"{name} is {value}, expected {lowest} to {highest}; leave it out for the default")
        if self.max_total_body_bytes < self.max_body_bytes:
            raise BadInput(
                f"max_total_body_bytes is {self.max_total_body_bytes}, expected at least the {self.max_body_bytes} of "
                "max_body_bytes; raise it"
            )
        if self.device not in ("cpu", "cuda"):
            raise BadInput(f"device is {self.device!r}, expected cpu or cuda")

    @property
    def workers(self) -> int:
        """How many batches run at a time: never so many that threads compete for cores, unless it was asked for."""
        if self.threads:
            return self.threads
        return max(1, usable_cores() // self.intra_op) if self.device == "cpu" else 1

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """Return the defaults with what the environment sets; Kubernetes' links to services are passed over.

        Raises:
            BadInput: if a variable with our prefix is no setting, or its value is not of the setting's type.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        values = {}
        for variable, text in environment.items():
            name = variable.removeprefix(_PREFIX)
            if name == variable or _SERVICE_LINK.fullmatch(f"{name}={text}"):
                continue
            name = name.lower()
            if name not in fields:
                known = ", ".join(_PREFIX + field.upper() for field in fields)
                raise BadInput(f"{variable} is no setting; known: {known}")
            values[name] = _read(variable, text, fields[name].default)
        return cls(**values)


def _read(variable: str, text: str, default: Any) -> Any:
    """Read a value of the type that `default` has."""
    if isinstance(default, bool):
        if text.lower() not in ("0", "1", "false", "true"):
            raise BadInput(f"{variable} is {text!r}, expected true or false")
        return text.lower() in ("1", "true")
    try:
        return type(default)(text)
    except ValueError as error:
        raise BadInput(f"{variable} is {text!r}, expected a number like {default}") from error
