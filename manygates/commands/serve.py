"""Models that answer: serve, demo."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from manygates.arguments import Command, count, require
from manygates.output import DONE, say
from zoo.errors import BadInput

if TYPE_CHECKING:
    from serving.operations.settings import Settings

NONE_BUNDLED = "no model is bundled with this installation; name one, such as local-dir:FOLDER"


def _add_serve(parser: argparse.ArgumentParser) -> None:
    from serving.operations.settings_help import add_flags
    from serving.operations.sources import CONFIG_VARIABLE

    parser.add_argument(
        "--config", type=Path, metavar="FILE", help=f"settings in TOML; {CONFIG_VARIABLE} by default; flags go first"
    )
    parser.add_argument("--print-config", action="store_true", help="print the settings as such a file, and stop")
    add_flags(parser)
    parser.usage = "manygates serve [MODEL ...] [--config FILE] [--print-config] [--SETTING VALUE ...]"


def _serve(arguments: argparse.Namespace) -> int:
    from serving.operations.settings import Settings
    from serving.operations.settings_help import flags_in, to_toml

    settings = Settings.resolve(flags_in(arguments), os.environ, arguments.config)
    if arguments.print_config:
        sys.stdout.write(to_toml(settings))
        return DONE
    from serving.server import serve

    if settings.demo:
        require("gradio", "demo")
    serve(settings if settings.model_settings or settings.model_repository else _with_bundled(settings))
    return DONE


def _with_bundled(settings: Settings) -> Settings:
    """Return the settings with all bundled models that can be served so."""
    import dataclasses

    from zoo.bundle.bundle import variants_in
    from zoo.hub.source import list_bundled
    from zoo.vocabulary import VARIANT_OF_MODE

    variant = VARIANT_OF_MODE[settings.mode or "single"]
    cards = list_bundled()
    if settings.exit or settings.confidence:
        cards = [card for card in cards if card.exits]
        _some([card.name for card in cards], "no bundled model has several exits; name one, such as local-dir:FOLDER")
    able = [card.name for card in cards if variant in variants_in(card, settings.precision)]
    if left_out := [card.name for card in cards if card.name not in able]:
        graphs = f"{variant!r}" if settings.precision == "fp32" else f"{variant!r} in {settings.precision}"
        say(f"not served, because without the variant {graphs}: {', '.join(left_out)}")
    return dataclasses.replace(settings, models=tuple(_some(able)))


def _some(models: list[str], none: str = NONE_BUNDLED) -> list[str]:
    if not models:
        raise BadInput(none)
    return models


def _add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="*", metavar="MODEL", help="all bundled models by default")
    parser.add_argument("--host", default="127.0.0.1", metavar="H")
    parser.add_argument("--port", type=count(0, 65_535), default=7860, metavar="P")


def _demo(arguments: argparse.Namespace) -> int:
    from zoo.hub.source import list_bundled

    require("gradio", "demo")
    from serving.demo.page import launch

    launch(_some(arguments.models or [card.name for card in list_bundled()]), arguments.host, arguments.port)
    return DONE


COMMANDS = {
    "serve": Command("Serve models over HTTP (Open Inference Protocol and POST /classify).", _add_serve, _serve),
    "demo": Command("The page on which one attacks models.", _add_demo, _demo),
}
