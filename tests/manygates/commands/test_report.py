"""report, from the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


def test_a_report_stands_beside_its_figures(model: Path, tmp_path: Path, cli: Any, changed: Any) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra [report]")
    folder = changed(model, tmp_path / "model")
    for words in (
        ("clean",),
        ("whitebox", "--eps", "0.02", "0.1", "--images", "20", "--steps", "20", "--restarts", "1"),
    ):
        cli.done("evaluate", folder, "--protocol", *words, "--record")
    said = cli.done("report", folder, "--out", tmp_path / "report")
    assert "report.html" in said.err
    page = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    assert "smoke" in page
    assert list((tmp_path / "report" / "figures").glob("*.svg"))
    assert "smoke" in (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("years of work")
    cli.refused("report", folder, "--out", tmp_path / "full")
    assert (tmp_path / "full" / "thesis.tex").read_text() == "years of work"
