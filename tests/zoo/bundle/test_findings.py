"""What the linter found, in the words that the report, the model card and the terminal share."""

import pytest

from zoo.bundle.card import Finding, Lint
from zoo.bundle.findings import explained, line, lines, sentence, verdict

OK = Finding(code="S1", name="eps 0 is clean", verdict="ok", figure="0 of 9", meaning="Never shown.")
ALARM = Finding(code="G1", name="gradients", verdict="alarm", figure="9 of 9", meaning="Rounding.")
SKIPPED = Finding(code="T1", name="surrogate", verdict="skipped", figure="none given", meaning="Never shown.")


def lint(*findings: Finding) -> Lint:
    return Lint(variant="single", images=9, seed=0, findings=findings, date="2026-11-21", command="")


def test_findings_are_a_line_each_and_alarms_explained() -> None:
    assert line(OK) == "ok      S1  eps 0 is clean: 0 of 9"
    assert lines([OK, ALARM, SKIPPED]) == (
        "ok      S1  eps 0 is clean: 0 of 9\n"
        "ALARM   G1  gradients: 9 of 9\n"
        "            Rounding.\n"
        "skipped T1  surrogate: none given\n"
        "1 alarm (G1), 1 ok, 1 skipped"
    )
    assert explained(ALARM) == "G1 gradients: 9 of 9. Rounding."


@pytest.mark.parametrize(
    ("found", "short", "tone", "said"),
    [
        (None, "not linted", "unknown", "has not looked at it"),
        (lint(), "nothing applied", "unknown", "0 checks"),
        (lint(SKIPPED), "nothing applied", "unknown", "0 checks"),
        (lint(OK, SKIPPED), "no alarm", "good", "1 check on 9 images"),
        (lint(OK, ALARM, ALARM), "2 alarms (G1, G1)", "alarm", "may flatter it"),
    ],
)
def test_a_verdict_praises_only_what_was_asked_and_held(found: Lint | None, short: str, tone: str, said: str) -> None:
    assert verdict(found) == (short, tone)
    assert said in sentence(found)
