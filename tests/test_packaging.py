"""What an installation gets: the wheel's files, its dependencies, and the image that is built from it."""

import ast
import email
import email.message
import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

import manygates.cli

ROOT = Path(__file__).parents[1]
PACKAGES = ("zoo", "training", "serving")


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    """The project's own description."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist, built without a network."""
    pytest.importorskip("hatchling", reason="hatchling, which builds the wheel, is not installed; `make test` does it")
    folder = tmp_path_factory.mktemp("distributions")
    build(ROOT, folder, "wheel", "sdist")
    return folder


def build(source: Path, folder: Path, *targets: str) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "--directory", str(folder)]
    for target in targets:
        command += ["--target", target]
    subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=300, check=True)


@pytest.fixture(scope="module")
def wheel(distributions: Path) -> zipfile.ZipFile:
    (file,) = distributions.glob("*.whl")
    return zipfile.ZipFile(file)


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> email.message.Message:
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    return email.message_from_bytes(wheel.read(name))


def requirements(metadata: email.message.Message) -> list[Requirement]:
    return [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]


def needed(metadata: email.message.Message, extra: str, **environment: str) -> set[str]:
    """Return the names of the packages that an extra asks for, with those of the extras it names."""
    names: set[str] = set()
    for requirement in requirements(metadata):
        if requirement.marker is None or requirement.marker.evaluate({"extra": extra, **environment}):
            if requirement.name == "manygates":
                for other in requirement.extras:
                    names |= needed(metadata, other, **environment)
            names.add(requirement.name)
    return names


def test_the_wheel_installs_the_three_packages_and_the_command_line_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    top = {name.partition("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {*PACKAGES, "manygates"}


def test_the_wheel_holds_every_file_of_the_packages_and_no_left_overs(wheel: zipfile.ZipFile) -> None:
    on_disk = {
        file.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for file in (ROOT / package).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    in_wheel = {name for name in wheel.namelist() if name.startswith(tuple(f"{package}/" for package in PACKAGES))}
    assert in_wheel == on_disk


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_tells_type_checkers_that_it_is_typed(wheel: zipfile.ZipFile, package: str) -> None:
    assert f"{package}/py.typed" in wheel.namelist()


def test_every_file_that_a_bundled_card_lists_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    cards = [name for name in wheel.namelist() if re.fullmatch(r"zoo/bundles/[^/]+/card\.json", name)]
    assert len(cards) == len(list(ROOT.glob("zoo/bundles/*/card.json")))
    listed = {
        f"{card.rpartition('/')[0]}/{name}": entry["size"]
        for card in cards
        for name, entry in json.loads(wheel.read(card))["files"].items()
    }
    assert {name: wheel.getinfo(name).file_size for name in listed} == listed


def test_no_pickle_is_shipped(wheel: zipfile.ZipFile) -> None:
    assert [name for name in wheel.namelist() if name.endswith((".pt", ".pth", ".pkl", ".bin", ".ckpt", ".npy"))] == []


def test_the_command_is_installed_as_manygates(wheel: zipfile.ZipFile) -> None:
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/entry_points.txt")]
    assert "manygates = manygates.cli:main" in wheel.read(name).decode().splitlines()


@pytest.mark.slow
def test_the_sdist_builds_the_same_wheel(distributions: Path, wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    (file,) = distributions.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    build(source, tmp_path / "again", "wheel")
    (again,) = (tmp_path / "again").glob("*.whl")
    assert sorted(zipfile.ZipFile(again).namelist()) == sorted(wheel.namelist())


@pytest.mark.parametrize("extra", ["", "serve", "serve-cpu", "serve-gpu", "ray"])
def test_neither_the_base_nor_the_server_asks_for_torch(metadata: email.message.Message, extra: str) -> None:
    assert needed(metadata, extra).isdisjoint({"torch", "torchvision", "onnxscript", "gradio", "tensorboard"})


@pytest.mark.parametrize(
    ("system", "machine", "expected"),
    [
        ("linux", "x86_64", "onnxruntime-gpu"),
        ("win32", "AMD64", "onnxruntime-gpu"),
        ("linux", "aarch64", "onnxruntime"),
        ("darwin", "arm64", "onnxruntime"),
        ("darwin", "x86_64", "onnxruntime"),
    ],
)
def test_every_platform_gets_exactly_one_onnxruntime(
    metadata: email.message.Message, system: str, machine: str, expected: str
) -> None:
    # they are one import name: with both, the later one silently replaces files of the other
    for extra in ("serve", "demo"):
        names = needed(metadata, extra, sys_platform=system, platform_machine=machine)
        assert names & {"onnxruntime", "onnxruntime-gpu"} == {expected}


@pytest.mark.parametrize("name", ["torch", "torchvision"])
def test_torch_is_pinned_exactly_because_measured_numbers_depend_on_it(
    metadata: email.message.Message, name: str
) -> None:
    pins = [requirement for requirement in requirements(metadata) if requirement.name == name]
    assert pins
    assert [specifier.operator for pin in pins for specifier in pin.specifier] == ["=="] * len(pins)


def test_one_version_stands_everywhere(project: dict[str, Any], metadata: email.message.Message) -> None:
    version = project["project"]["version"]
    image = re.search(r'image\.version="([^"]+)"', (ROOT / "Dockerfile").read_text(encoding="utf-8"))
    changes = re.search(r"^## \[([\d.]+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert image is not None
    assert changes is not None
    assert (metadata["Version"], manygates.__version__, image[1], changes[1]) == (version,) * 4


def test_the_image_is_built_from_everything_that_the_wheel_is_built_from(project: dict[str, Any]) -> None:
    sources = {
        "pyproject.toml",
        project["project"]["readme"],
        *project["project"]["license-files"],
        *project["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"],
    }
    copied = {
        word
        for arguments in re.findall(r"^COPY (?!--)(.*) \S+$", (ROOT / "Dockerfile").read_text("utf-8"), re.MULTILINE)
        for word in arguments.split()
    }
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert copied == sources
    assert {line.removeprefix("!") for line in lines if line.startswith("!")} == sources


def test_the_image_runs_a_command_that_the_command_line_takes() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    (command,) = re.findall(r"^CMD (.*)$", dockerfile, re.MULTILINE)
    program, *arguments = ast.literal_eval(command)
    assert program == "manygates"
    assert manygates.cli.parser().parse_args(arguments).host == "0.0.0.0"
    (user,) = re.findall(r"^USER (\d+)", dockerfile, re.MULTILINE)
    assert int(user) != 0


def test_ci_runs_what_a_developer_runs() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", script], timeout=10, check=True)
    assert script.read_text(encoding="utf-8").splitlines()[-1] == "make test"
