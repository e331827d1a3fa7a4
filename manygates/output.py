"""How commands print: results on standard output, remarks on standard error, and the exit code."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zoo.bundle.card import Check, Finding, Result

DONE, NOT_HELD, WRONG = 0, 1, 2
"""Exit codes: all is well; a check did not hold; wrong usage or bad input."""
INTERRUPTED = 130


def say(text: str) -> None:
    """Print a remark for people on standard error, which leaves standard output to the result."""
    print(text, file=sys.stderr, flush=True)


def print_json(document: object) -> None:
    """Print the one document of a command with --json."""
    print(json.dumps(document, indent=2))


def print_foreign(text: str) -> None:
    """Print text that others may have written; what would control the terminal is replaced."""
    from zoo.bundle.wording import printable

    print(printable(text))


def print_check(check: Check, indent: str = "") -> None:
    """Print a check in one line."""
    print(f"{indent}{'ok  ' if check.held else 'FAIL'}  {check.name}: {check.detail}")


def print_result(result: Result) -> None:
    """Print a measured accuracy in one line, and its checks below it."""
    low, high = result.interval
    attack = "clean" if result.attack == "none" else result.attack
    attack += f", {result.steps} x {result.restarts}" if result.attack.startswith("PGD") else ""
    print(
        f"{result.protocol} {result.variant}: {result.accuracy:.2%} [{low:.2%}, {high:.2%}]  {attack}, "
        f"eps {result.eps_fraction}, {result.images} images, seed {result.seed}"
        + (f"; {result.note}" if result.note else "")
    )
    for check in result.checks:
        print_check(check, indent="  ")


def print_finding(finding: Finding) -> None:
    """Print what the linter found in one line; an alarm's meaning below it."""
    from zoo.bundle import findings

    print("  " + findings.line(finding).replace("\n", "\n  "), flush=True)
