"""The README and the guides are tests: their commands parse, their Python runs, their links lead somewhere.

A fenced block that needs more than the bundled models is preceded by a comment, `<!-- needs: data -->` or
`<!-- needs: gpu -->`, and is skipped where that is missing; `<!-- sketch -->` marks a fragment that is not run. A block
that talks to the server's address finds one there, and the bundled model it serves for NAME.
"""

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import manygates.cli
from zoo.hub.source import list_bundled

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")]
DOCUMENTS += [
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("docs/adr/*.md")),
    *sorted(ROOT.glob("docs/methods/*.md")),
]
DEFAULT_ADDRESS = "127.0.0.1:8000"
SHELLS = ("", "sh", "bash", "shell", "console")

FENCE = re.compile(
    r"^(?P<note><!--[^\n]*-->\n+)?(?P<indent> *)```(?P<language>[\w-]*)[^\n]*\n(?P<text>.*?)^(?P=indent)```\s*$",
    re.MULTILINE | re.DOTALL,
)
INDENTED = re.compile(r"(?<=\n\n)(?: {4}[^\n]*\n)+")
LINK = re.compile(r"(?<!!)\[[^\]]*\]\((?P<target>[^)\s#]+)(?:#[^)\s]*)?\)")


@dataclass(frozen=True)
class Block:
    """A fenced or indented block of a document; the latter has no language."""

    place: str
    language: str
    note: str
    text: str


def blocks_of(document: Path) -> list[Block]:
    text = document.read_text(encoding="utf-8")
    blocks = []
    for found in FENCE.finditer(text):
        line = text.count("\n", 0, found.start("language")) + 1
        place = f"{document.relative_to(ROOT).as_posix()}:{line}"
        blocks.append(Block(place, found["language"], found["note"] or "", found["text"]))
    unfenced = FENCE.sub(lambda fence: "\n" * fence[0].count("\n"), text)
    for found in INDENTED.finditer(unfenced):
        line = unfenced.count("\n", 0, found.start()) + 1
        place = f"{document.relative_to(ROOT).as_posix()}:{line}"
        blocks.append(Block(place, "", "", textwrap.dedent(found[0])))
    return blocks


def commands_of(block: Block) -> list[list[str]]:
    """Return the words of every `manygates …` command in a shell block, without what the shell itself reads."""
    if block.language not in SHELLS:
        return []
    commands = []
    for line in block.text.replace("\\\n", " ").splitlines():
        if "manygates" not in line:  # what is quoted over several lines need not be read
            continue
        lexer = shlex.shlex(line.strip().removeprefix("$ "), posix=True, punctuation_chars="();<>|&")
        lexer.whitespace_split = True
        command: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set("();<>|&"):
                commands.append(command)
                command = []
            elif command or "=" not in word:  # VARIABLE=value before a command is the shell's
                command.append(word)
    ours = [command for command in commands if command and Path(command[0]).name == "manygates"]
    return [
        command for command in ours if not any(word.startswith("[") for word in command)
    ]  # a synopsis is no command


BLOCKS = [block for document in DOCUMENTS if document.is_file() for block in blocks_of(document)]
COMMANDS = [(block.place, command) for block in BLOCKS for command in commands_of(block)]
PYTHON = [block for block in BLOCKS if block.language in ("python", "py") and "sketch" not in block.note]


@pytest.mark.parametrize(
    "command", [pytest.param(words, id=f"{place} {shlex.join(words)}") for place, words in COMMANDS]
)
def test_a_command_in_the_documentation_is_one_that_the_command_line_takes(command: list[str]) -> None:
    complaint = io.StringIO()
    with contextlib.redirect_stderr(complaint), contextlib.redirect_stdout(io.StringIO()):
        try:
            manygates.cli.parser().parse_args(command[1:])
        except SystemExit as stopped:
            assert not stopped.code, complaint.getvalue()  # noqa: PT017 -- --help and --version exit with 0


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, str]]:
    """The address of a server of ours, and the name of the model that it serves."""
    cards = list_bundled()
    if not cards:
        pytest.skip("no model is bundled, so there is nothing to serve")
    command = [sys.executable, "-m", "manygates", "serve", cards[0].name, "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            said = process.stderr.readline()
            found = re.search(r"http://(\S+:\d+)", said)
            assert found is not None, said + process.stderr.read()
            yield found[1], cards[0].name
        finally:
            process.terminate()


@pytest.mark.parametrize("block", [pytest.param(block, id=block.place) for block in PYTHON])
def test_a_python_block_in_the_documentation_runs(block: Block, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if "needs: gpu" in block.note and shutil.which("nvidia-smi") is None:
        pytest.skip("the block needs a GPU")
    if "needs: data" in block.note and not data_dir().is_dir():
        pytest.skip("the block needs the data sets; set MANYGATES_DATA")
    text = block.text
    if DEFAULT_ADDRESS in text:
        address, name = request.getfixturevalue("server")
        text = text.replace(DEFAULT_ADDRESS, address).replace("NAME", name)
    script = tmp_path / "block.py"
    script.write_text(text, encoding="utf-8")
    environment = {**os.environ, "MANYGATES_DATA": str(data_dir()), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{block.place}\n{done.stderr}"


@pytest.mark.parametrize("document", [pytest.param(document, id=document.name) for document in DOCUMENTS])
def test_every_link_to_a_file_of_the_repository_leads_to_one(document: Path) -> None:
    targets = [found["target"] for found in LINK.finditer(document.read_text(encoding="utf-8"))]
    local = [target for target in targets if "://" not in target and not target.startswith("mailto:")]
    missing = [target for target in local if not (document.parent / target).exists()]
    assert missing == []


def test_the_readme_shows_how_to_serve_and_how_to_test() -> None:
    shell = "\n".join(block.text for block in blocks_of(ROOT / "README.md") if block.language in SHELLS)
    assert {"make serve", "make test"} <= {line.partition("#")[0].strip() for line in shell.splitlines()}


def test_every_make_target_in_the_documentation_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {
        word
        for document in DOCUMENTS
        for word in re.findall(r"(?:`|^ *)make ([a-z]+)", document.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert named <= targets


def data_dir() -> Path:
    """Return where the real data sets are, by the rule of `zoo.data.datasets`, as seen from the repository's root."""
    return (ROOT / (os.environ.get("MANYGATES_DATA") or "../shared/data")).resolve()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("manygates list | head -1", [["manygates", "list"]]),
        ("A=1 manygates serve \\\n  NAME --port 1 &  # a comment", [["manygates", "serve", "NAME", "--port", "1"]]),
        ("$ .venv/bin/manygates list && manygates demo", [[".venv/bin/manygates", "list"], ["manygates", "demo"]]),
        ("pip install 'manygates[serve]'", []),
        ("manygates serve [MODEL …] [--mode single|random]", []),
    ],
)
def test_commands_are_found_behind_what_the_shell_reads(text: str, expected: list[list[str]]) -> None:
    assert commands_of(Block("here", "sh", "", text)) == expected
