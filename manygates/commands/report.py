"""What cards say, as pages: report."""

from __future__ import annotations

import argparse
from pathlib import Path

from manygates.arguments import Command
from manygates.output import DONE, say
from zoo.errors import BadInput


def _add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="*", metavar="MODEL")
    parser.add_argument("--zoo", action="store_true", help="the leaderboard of all models, as a page of Markdown")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for report.html and the rest; --zoo: a .md file"
    )


def _report(arguments: argparse.Namespace) -> int:
    from zoo.hub.source import open_model
    from zoo.report.write import write_report

    if arguments.zoo:
        return _leaderboard(arguments)
    if not arguments.models:
        raise BadInput("report got no model; name one or more, or write --zoo for all of them")
    page = write_report([open_model(model, only=()).card for model in arguments.models], arguments.out)
    say(f"the report is in {page}; its figures and a Markdown version are beside it")
    return DONE


def _leaderboard(arguments: argparse.Namespace) -> int:
    from zoo.hub.source import package_models
    from zoo.report.leaderboard import write_leaderboard

    if arguments.models:
        raise BadInput(f"--zoo draws every model, so leave {arguments.models[0]!r} out; or leave --zoo out")
    figures = write_leaderboard([model.card for model in package_models()], arguments.out)
    say(f"the leaderboard is in {arguments.out}; figures: {', '.join(map(str, figures)) or 'none'}")
    return DONE


COMMANDS = {
    "report": Command("Draw what the cards of models say, side by side: HTML, Markdown and figures.", _add, _report)
}
