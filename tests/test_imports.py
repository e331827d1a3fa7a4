"""Who may import whom (docs/adr/0016): no circle between modules, no way up between rooms, nothing heavy at the start.

import-linter holds the layers of pyproject.toml for what is written as an import. The tests here also count what it
cannot see: `importlib.import_module`, wherever it stands.
"""

from __future__ import annotations

import ast
import graphlib
import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES = PROJECT["tool"]["importlinter"]["root_packages"]
CONTRACTS = PROJECT["tool"]["importlinter"]["contracts"]
HEAVY = ("torch", "torchvision", "onnx", "onnxruntime", "gradio", "pyarrow", "starlette", "tensorboard", "training")


@cache
def modules() -> dict[str, ast.Module]:
    """Return every module of the product by its name; a package's name stands for its __init__."""
    found = {}
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            parts = file.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = ast.parse(file.read_text(encoding="utf-8"))
    return found


def named_by_importlib(call: ast.Call, module: ast.Module) -> Iterator[str]:
    """Yield the modules of ours that `import_module(...)` may import.

    What it gets from a variable may be any string of the module that is a module's name.
    """
    (first, *_) = call.args
    if isinstance(first, ast.Constant):
        yield str(first.value)
    elif isinstance(first, ast.JoinedStr):  # one that begins with an expression is of a library
        beginning = first.values[0].value if isinstance(first.values[0], ast.Constant) else None
        yield from (name for name in modules() if beginning and name.startswith(str(beginning)))
    else:
        yield from (
            node.value for node in ast.walk(module) if isinstance(node, ast.Constant) and node.value in modules()
        )


def imported_by(nodes: Iterator[ast.AST], module: ast.Module) -> Iterator[str]:
    """Yield the names of the modules, of ours or not, that the nodes import."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"a relative import of {node.module}; write it in full, as everywhere"
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in modules() else str(node.module) for name in inner)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            yield from named_by_importlib(node, module)


def at_start(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what is run when a module is imported: neither the bodies of functions nor what is for type checkers."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from at_start(child)


@cache
def graph() -> dict[str, set[str]]:
    """Return which modules of ours each imports, at any depth of its code."""
    return {
        name: {found for found in imported_by(ast.walk(module), module) if found in modules()} - {name}
        for name, module in modules().items()
    }


def loaded_with(start: str) -> set[str]:
    """Return all modules, of ours or not, that importing `start` imports."""
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        name = waiting.pop()
        parents = {name.rsplit(".", number)[0] for number in range(name.count(".") + 1)}
        for found in parents - seen:
            seen.add(found)
            if found in modules():
                waiting += imported_by(at_start(modules()[found]), modules()[found])
    return seen


def test_no_import_closes_a_circle_hidden_ones_included() -> None:
    try:
        graphlib.TopologicalSorter(graph()).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"a circle: {' <- '.join(error.args[1])}")


def layers() -> list[dict[str, Any]]:
    return [contract for contract in CONTRACTS if contract["type"] == "layers"]


def floor_of(module: str, contract: dict[str, Any], container: str) -> tuple[int, str] | None:
    """Return a module's layer, counted from the top, and its room there; None if the contract says nothing of it."""
    for number, layer in enumerate(contract["layers"]):
        for room in layer.split(" | "):
            full = f"{container}.{room}".removeprefix(".")
            if module == full or module.startswith(f"{full}."):
                return number, full
    return None


@pytest.mark.parametrize("contract", [pytest.param(contract, id=contract["name"]) for contract in layers()])
def test_no_import_leads_up_between_rooms_hidden_ones_included(contract: dict[str, Any]) -> None:
    wrong = set()
    for container in contract.get("containers", [""]):
        for name, imports in graph().items():
            for found in imports:
                here, there = (floor_of(module, contract, container) for module in (name, found))
                if here and there and here[1] != there[1] and here[0] >= there[0]:
                    wrong.add(f"{name} -> {found}")
    assert wrong - set(contract.get("ignore_imports", ())) == set()


@pytest.mark.parametrize("package", PACKAGES)
def test_every_room_has_a_floor(package: str) -> None:
    rooms = {name.split(".")[1] for name in modules() if name.startswith(f"{package}.")}
    (contract,) = [contract for contract in layers() if package in contract.get("containers", ())]
    assert rooms == {room for layer in contract["layers"] for room in layer.split(" | ")}


TORCH_FREE = next(contract for contract in CONTRACTS if "torch" in contract.get("forbidden_modules", ()))
IMPORT_ALL = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
print([name for name in ("torch", "torchvision", "training", "gradio", "onnx", "pyarrow") if name in sys.modules])
"""


def test_the_ground_floor_without_torch_is_every_room_below_the_networks() -> None:
    (zoo,) = [contract for contract in layers() if contract.get("containers") == ["zoo"]]
    below = zoo["layers"][zoo["layers"].index("networks") + 1 :]
    rooms = {f"zoo.{room}" for layer in below for room in layer.split(" | ")}
    assert set(TORCH_FREE["source_modules"]) == {"serving", *rooms}


def test_the_server_and_the_ground_floor_load_no_torch() -> None:
    names = [
        name
        for name in modules()
        if any(f"{name}.".startswith(f"{room}.") for room in TORCH_FREE["source_modules"])
        and not name.startswith("serving.demo")
    ]
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, *names], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("start", ["manygates", "manygates.cli"])
def test_the_command_line_starts_without_anything_heavy(start: str) -> None:
    commands = [name for name in modules() if name.startswith("manygates.commands")] if start == "manygates.cli" else []
    assert {found for name in [start, *commands] for found in loaded_with(name)}.isdisjoint(HEAVY)


# `manygates` as the console script runs it: with its arguments in sys.argv and perhaps an exit.
RUN = """
import json, sys
from manygates.cli import main
try:
    code = main()
except SystemExit as stopped:
    code = stopped.code
assert not code, code
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})), file=sys.stderr)
"""


@pytest.mark.parametrize("arguments", [["list", "--json"], ["--help"]], ids=" ".join)
def test_a_command_that_only_reads_loads_nothing_heavy(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RUN, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stderr.splitlines()[-1])).isdisjoint(HEAVY)


def test_the_import_contracts_of_pyproject_hold() -> None:
    command = shutil.which("lint-imports", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if command is None:
        pytest.skip("import-linter is not installed; `make test` installs it")
    done = subprocess.run([command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("package", ["zoo", "training", "serving"])
def test_a_packages_init_holds_a_docstring_and_nothing_else(package: str) -> None:
    (only,) = modules()[package].body
    assert isinstance(only, ast.Expr)
    assert isinstance(only.value, ast.Constant)
    assert isinstance(only.value.value, str)
