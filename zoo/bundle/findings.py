"""What the robustness linter found, in words: the report, the model card and the terminal all take them from here.

A text made here holds what the card says as it stands there; whoever shows it escapes it for its own language.
"""

from collections.abc import Sequence

from zoo.bundle.card import Finding, Lint
from zoo.bundle.wording import plural

TONES = {"ok": "good", "alarm": "alarm", "skipped": "unknown"}
"""How each verdict of a finding is coloured, wherever there are colours."""


def verdict(lint: Lint | None) -> tuple[str, str]:
    """Return the linter's verdict on a variant in a few words, and its tone: one of the values of `TONES`."""
    if lint is None:
        return "not linted", "unknown"
    if lint.alarms:
        return _alarms(lint.findings), "alarm"
    if all(finding.verdict == "skipped" for finding in lint.findings):
        return "nothing applied", "unknown"
    return "no alarm", "good"


def sentence(lint: Lint | None) -> str:
    """Return the linter's verdict on a variant as the end of a sentence that begins with the variant."""
    if lint is None:
        return "the robustness linter has not looked at it"
    if lint.alarms:
        return "failed the robustness linter; its numbers may flatter it"
    asked = sum(finding.verdict != "skipped" for finding in lint.findings)
    return f"passed the robustness linter ({plural(asked, 'check')} on {plural(lint.images, 'image')}, {lint.date})"


def explained(finding: Finding) -> str:
    """Return one finding with its figure and what an alarm means."""
    return f"{finding.code} {finding.name}: {finding.figure}. {finding.meaning}"


def line(finding: Finding) -> str:
    """Return one finding for a terminal; an alarm has a second line that says what it means."""
    said = "ALARM" if finding.verdict == "alarm" else finding.verdict
    text = f"{said:<8}{finding.code:<4}{finding.name}: {finding.figure}"
    return f"{text}\n{'':<12}{finding.meaning}" if finding.verdict == "alarm" else text


def lines(findings: Sequence[Finding]) -> str:
    """Return findings for a terminal, and a line of totals."""
    ok, skipped = (sum(finding.verdict == name for finding in findings) for name in ("ok", "skipped"))
    return "\n".join([*map(line, findings), f"{_alarms(findings)}, {ok} ok, {skipped} skipped"])


def _alarms(findings: Sequence[Finding]) -> str:
    codes = [finding.code for finding in findings if finding.verdict == "alarm"]
    return plural(len(codes), "alarm") + (f" ({', '.join(codes)})" if codes else "")
