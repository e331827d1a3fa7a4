"""What the server writes down: text for people or one JSON object a line for machines, to standard error.

Neither images nor keys nor the gates that a request drew are ever logged, at any level: whoever reads the log of random
paths faces fixed networks.
"""

import contextvars
import datetime
import json
import logging
import os
import re
import sys
from typing import Final, Literal, TextIO

logger = logging.getLogger("manygates.serving")
_access = logging.getLogger("manygates.access")

request_id: contextvars.ContextVar[str | None] = contextvars.ContextVar("request_id", default=None)
"""The request that is being answered; records say it unless they have one of their own (`extra={"request_id": …}`)."""

_CLEAN: Final = re.compile(r"[A-Za-z0-9._-]{1,128}")
_UNCLEAN: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_OURS: Final = "manygates"
_UVICORN: Final = ("uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi")
_THEIRS: Final = (*_UVICORN, "asyncio", "py.warnings", "opentelemetry")


def configure(format: Literal["text", "json"] = "text", level: str = "info", stream: TextIO | None = None) -> None:
    """Send our log, uvicorn's and Python's warnings to standard error in one form; may be called again.

    Loggers of other libraries keep what they have. Give uvicorn `log_config=None`, or it replaces its own again.

    Args:
        format: `text`, or `json`: one object a line with time, level, logger, message and, where known, request_id,
            model and exc.
        level: the least that is written, of ours; libraries' from warnings on.
        stream: None takes standard error as it is when something is logged.
    """
    handler = _Handler(stream)
    handler.setFormatter(_Json() if format == "json" else _Text())
    least = logging.getLevelNamesMapping()[level.upper()]
    for name in (_OURS, *_THEIRS):
        listed = logging.getLogger(name)
        for earlier in listed.handlers[:]:
            if isinstance(earlier, _Handler) or name.startswith("uvicorn"):
                listed.removeHandler(earlier)
        if not name.startswith("uvicorn."):  # those hand what they have to their parent
            listed.addHandler(handler)
        else:
            listed.propagate = True
        listed.setLevel(least if name == _OURS else max(least, logging.WARNING))
    _access.setLevel(logging.INFO)  # whoever asked for a line per request gets it at every level
    logging.captureWarnings(True)


def clean_request_id(value: bytes | str | None) -> str | None:
    """Return a client's request id if it is 1 to 128 of A-Z a-z 0-9 . _ -, else None: it goes to logs and headers."""
    if isinstance(value, bytes):
        value = value.decode("latin-1")
    return value if value is not None and _CLEAN.fullmatch(value) else None


def new_request_id() -> str:
    """Return a new request id: 32 hexadecimal digits, 128 random bits."""
    return os.urandom(16).hex()


def log_request(
    *,
    method: str,
    path: str,
    status: int,
    seconds: float,
    request_id: str | None = None,
    model: str | None = None,
    rows: int | None = None,
    key: str | None = None,
) -> None:
    """Write a line for a request; call it only where the setting log_requests is on.

    `path` comes without the query, which may hold anything; it and the model's name are cut at 256 characters. The
    `seconds` count from the whole head to the answer, `rows` are images, and `key` is a key's name, never the key.
    """
    message = f"{method[:16]} {path[:256]} {status} {1000 * seconds:.2f} ms"
    if rows is not None:
        message += f" {rows} {'image' if rows == 1 else 'images'}"
    fields = {"method": method[:16], "path": path[:256], "status": status, "seconds": round(seconds, 6)}
    model = None if model is None else model[:256]
    more = {"model": model, "rows": rows, "key": key}
    fields.update({name: value for name, value in more.items() if value is not None})
    _access.info("%s", message, extra={"request_id": request_id, "model": model, "access": fields})


class _Handler(logging.StreamHandler[TextIO]):
    """Writes to a stream, or to what standard error is at that moment, as Python's handler of last resort does."""

    def __init__(self, stream: TextIO | None) -> None:
        logging.Handler.__init__(self)
        self._given = stream

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        """Where lines go."""
        return sys.stderr if self._given is None else self._given


class _Text(logging.Formatter):
    """`2026-11-20T12:00:00.000Z INFO manygates.serving: message [request_id]`, then a traceback, indented.

    Whatever a client can put into a message, it can begin no line with it.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return a line, and the traceback if there is one."""
        line = f"{_time(record)} {record.levelname} {record.name}: {_one_line(record.getMessage())}"
        if (known := _request_id_of(record)) is not None:
            line += f" [{known}]"
        error = _traceback(record)
        return "\n".join([line, *("  " + _one_line(part) for part in error.split("\n") if error)])


class _Json(logging.Formatter):
    """One object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the object."""
        document: dict[str, object] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (known := _request_id_of(record)) is not None:
            document["request_id"] = known
        if (model := getattr(record, "model", None)) is not None:
            document["model"] = str(model)
        access = getattr(record, "access", None)
        if isinstance(access, dict):
            document.update({name: value for name, value in access.items() if name not in document})
        if error := _traceback(record):
            document["exc"] = error
        return json.dumps(document, ensure_ascii=True, default=str)


def _request_id_of(record: logging.LogRecord) -> str | None:
    """Return the record's own id, or that of the request being answered."""
    own = getattr(record, "request_id", None)
    return clean_request_id(own) if isinstance(own, str) else request_id.get()


def _time(record: logging.LogRecord) -> str:
    moment = datetime.datetime.fromtimestamp(record.created, tz=datetime.UTC)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}Z"


def _traceback(record: logging.LogRecord) -> str:
    """Return a record's traceback and stack; empty if it has none."""
    parts = []
    if record.exc_info and record.exc_info[0] is not None:
        parts.append(logging.Formatter().formatException(record.exc_info))
    elif record.exc_text:
        parts.append(record.exc_text)
    if record.stack_info:
        parts.append(record.stack_info)
    return "\n".join(parts)


def _one_line(text: str) -> str:
    """Replace what would begin a line or move a terminal's cursor: part of a message may come from a client."""
    return _UNCLEAN.sub("?", text)
