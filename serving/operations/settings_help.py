"""How settings are shown: as flags of the command line, as a settings file, as a table in the docs.

`python -m serving.operations.settings_help FILE` writes the table into a page between its two markers.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from serving.operations.fields import choices, meaning_of, shown
from serving.operations.settings import Settings, setting_fields
from serving.operations.sources import PREFIX, flag_of
from zoo.errors import BadInput

TABLE_START, TABLE_END = "<!-- settings: start -->", "<!-- settings: end -->"
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


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Give a parser a flag for each setting, and MODEL… for the models; what is not said is not in the result."""
    group: Any = parser
    for name, field in setting_fields().items():
        if name in _SECTIONS:
            group = parser.add_argument_group(_SECTIONS[name])
        text = meaning_of(field).text.replace("%", "%%")
        if name == "models":
            group.add_argument("models", nargs="*", default=argparse.SUPPRESS, metavar="MODEL", help=text)
            continue
        default: Any = field.default
        if default not in ("", (), False):
            text += f" (default {shown(default)})"
        how: dict[str, Any] = {"default": argparse.SUPPRESS, "help": text, "dest": name}
        if isinstance(default, bool):
            how["action"] = argparse.BooleanOptionalAction
        elif words := choices(field):
            how["choices"] = words
        else:
            by_type = {int: "N", float: "SECONDS", tuple: "X[,X…]"}
            how["metavar"] = meaning_of(field).metavar or by_type.get(type(default), "TEXT")
        group.add_argument(flag_of(name), **how)


def flags_in(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what was said by the flags of `add_flags`, for `Settings.resolve`."""
    said = {name: value for name, value in vars(arguments).items() if name in setting_fields()}
    return {name: value for name, value in said.items() if name != "models" or value}


def to_toml(settings: Settings) -> str:
    """Return a settings file that gives these settings again, with where each value came from.

    It holds no secret: keys are in files, and only those files' names are settings.
    """
    lines = []
    for name, field in setting_fields().items():
        if name in _SECTIONS:
            lines += ["", f"# {_SECTIONS[name]}"]
        value = getattr(settings, name)
        untold = "default" if value == field.default else "given"
        lines.append(f"{name} = {_toml(value)}  # {_one_line(settings.origins.get(name, untold))}")
    for table in settings.model_tables:
        lines += ["", f"[[model]]  # {_one_line(settings.origins.get('model_tables', 'given'))}"]
        lines += [f"{name} = {_toml(value)}" for name, value in table.items()]
    return "\n".join(lines[1:]) + "\n"


def markdown_table() -> str:
    """Return all settings as a table in Markdown."""
    lines = ["| setting | flag | environment | default | meaning |", "|---|---|---|---|---|"]
    for name, field in setting_fields().items():
        default = f"`{shown(field.default)}`" if field.default not in ("", ()) else ""
        meaning = meaning_of(field).text.replace("|", "\\|")
        lines.append(f"| `{name}` | `{flag_of(name)}` | `{PREFIX}{name.upper()}` | {default} | {meaning} |")
    return "\n".join(lines) + "\n"


def with_table(page: str) -> str:
    """Return a page with the table of settings between its markers; BadInput if it lacks them."""
    before, start, rest = page.partition(TABLE_START)
    _, end, after = rest.partition(TABLE_END)
    if not end:
        raise BadInput(f"the page has no {TABLE_START} … {TABLE_END} for the table of settings; put both there")
    return f"{before}{start}\n{markdown_table()}{end}{after}"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(_toml, value))}]"
    escaped = str(value).replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'  # `Settings` refuses control characters


def _one_line(text: str) -> str:
    """Return text for a comment: a file's name may hold a line's end."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _main() -> None:
    """Write the table of settings into the pages named."""
    for page in map(Path, sys.argv[1:]):
        page.write_text(with_table(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    _main()
