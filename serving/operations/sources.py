"""What a command's flags, the environment and a settings file say, before it is checked."""

import dataclasses
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from serving.operations.fields import unknown
from zoo.errors import BadInput

PREFIX = "MANYGATES_SERVE_"
CONFIG_VARIABLE = PREFIX + "CONFIG"
# What Kubernetes puts into every container for a Service called manygates-serve, or manygates-serve-SOMETHING. A port
# of theirs is a URL, so it cannot be taken for one of ours.
_SERVICE_LINK = re.compile(
    r"([A-Z0-9_]+_)?(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)=.*"
    r"|([A-Z0-9_]+_)?PORT=(tcp|udp|sctp)://.*",
    re.DOTALL,
)

Fields = Mapping[str, "dataclasses.Field[Any]"]
Layer = dict[str, tuple[Any, str]]
"""Field -> its value and where that came from."""


def flag_of(name: str) -> str:
    """Return the flag of a setting; models are the command's words without one."""
    return "MODEL …" if name == "models" else "--" + name.replace("_", "-")


def of_flags(flags: Mapping[str, Any], fields: Fields) -> Layer:
    """Return the values of flags, by field; texts are read. BadInput if one is no setting."""
    layer = {}
    for name, value in flags.items():
        if name not in fields:
            raise unknown(name, [*fields])
        read = _read(value, fields[name]) if isinstance(value, str) else value
        layer[name] = (read, "arguments" if name == "models" else f"flag {flag_of(name)}")
    return layer


def of_environment(environment: Mapping[str, str], fields: Fields) -> Layer:
    """Return the values of the variables with our prefix; Kubernetes' links to services are passed over.

    Raises:
        BadInput: if one is no setting, or not in capitals.
    """
    layer = {}
    for variable, text in environment.items():
        name = variable.removeprefix(PREFIX)
        if name == variable or variable == CONFIG_VARIABLE or _SERVICE_LINK.fullmatch(f"{name}={text}"):
            continue
        if name.lower() not in fields or name != name.upper():
            raise unknown(variable, [PREFIX + known.upper() for known in fields])
        layer[name.lower()] = (_read(text, fields[name.lower()]), f"environment {variable}")
    return layer


def of_file(file: Path, fields: Fields) -> Layer:
    """Return the values of a TOML file, and its tables `[[model]]` as `model_tables`.

    Raises:
        BadInput: if it cannot be read, is no TOML, has a key twice, or has one that is no setting.
    """
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"cannot read the settings file {file} ({error.strerror or error})") from error
    except ValueError as error:  # not UTF-8, or not TOML
        raise BadInput(f"the settings file {file} is no TOML ({error})") from error
    known = [*fields, "model"]
    for name in document:
        if name not in known:
            raise BadInput(f"{file}: {unknown(name, known)}")
    if "model" in document:
        document["model_tables"] = document.pop("model")
    return {name: (value, f"file {file}") for name, value in document.items()}


def _read(text: str, field: "dataclasses.Field[Any]") -> Any:
    """Return the value that a text means to a field, or the text itself if it means none; the check then refuses it."""
    default: Any = field.default
    if isinstance(default, bool):
        return {"0": False, "1": True, "false": False, "true": True}.get(text.lower(), text)
    try:
        if isinstance(default, tuple):
            each = float if get_args(field.type)[0] is float else str
            return tuple(each(part.strip()) for part in text.split(",") if part.strip())
        return type(default)(text)
    except ValueError:
        return text
