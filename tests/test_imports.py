"""Who may import whom (docs/adr/0001 and 0002); tests/serving/test_imports.py asks the same of the server's modules."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

HEAVY = ("torch", "torchvision", "onnx", "onnxruntime", "gradio", "pyarrow", "starlette", "tensorboard", "training")

# `manygates` as the console script runs it: with its arguments in sys.argv and perhaps an exit.
RUN = """
import json, sys
import manygates
if len(sys.argv) > 1:
    try:
        code = manygates.main()
    except SystemExit as stopped:
        code = stopped.code
    assert not code, code
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})), file=sys.stderr)
"""


def loaded_by(*arguments: str) -> set[str]:
    """Return the top-level modules that a fresh interpreter holds after `manygates ARGUMENTS`, or its mere import."""
    done = subprocess.run(
        [sys.executable, "-c", RUN, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stderr.splitlines()[-1]))


def test_the_import_contracts_of_pyproject_hold() -> None:
    command = shutil.which("lint-imports", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if command is None:
        pytest.skip("import-linter is not installed; `make test` installs it")
    done = subprocess.run([command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_importing_manygates_loads_nothing_heavy() -> None:
    assert loaded_by().isdisjoint(HEAVY)


@pytest.mark.parametrize("arguments", [["list"], ["list", "--json"], ["--version"], ["--help"]], ids=" ".join)
def test_a_command_that_only_reads_loads_nothing_heavy(arguments: list[str]) -> None:
    assert loaded_by(*arguments).isdisjoint(HEAVY)


@pytest.mark.parametrize("package", ["zoo", "training", "serving"])
def test_a_packages_init_holds_a_docstring_and_nothing_else(package: str) -> None:
    import ast

    (only,) = ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8")).body
    assert isinstance(only, ast.Expr)
    assert isinstance(only.value, ast.Constant)
    assert isinstance(only.value.value, str)
