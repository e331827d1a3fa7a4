import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

QUIET = """
import pathlib, sys
import serving.engine.engine
if sys.argv[1:] == ["all"]:
    import zoo.export.write, zoo.export.quantize
"""


@pytest.mark.parametrize("others", [[], ["all"]])
def test_onnx_runtime_keeps_and_reports_nothing_whether_or_not_there_is_a_home(
    others: list[str], tmp_path: Path
) -> None:
    kept = {name: value for name, value in os.environ.items() if name not in ("HOME", "ORT_DISABLE_TELEMETRY")}
    for home in (tmp_path, tmp_path / "file" / "nowhere"):
        (tmp_path / "file").touch()
        environment = {**kept, "HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(
            [sys.executable, "-c", QUIET, *others],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env=environment,
            check=True,
        )
        assert (done.stdout, done.stderr) == ("", "")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_onnx_runtime_is_imported_in_one_place() -> None:
    importing = re.compile(r"^\s*(from|import) onnxruntime", re.MULTILINE)
    files = [file for name in ("zoo", "training", "serving") for file in (ROOT / name).rglob("*.py")]
    assert [file.name for file in files if importing.search(file.read_text(encoding="utf-8"))] == ["runtime.py"]
