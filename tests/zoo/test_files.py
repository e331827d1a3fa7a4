import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from zoo import files
from zoo.errors import BadInput


def names_in(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """Let the system cut off files at so many bytes, with an error that names none of them, as a full disk does."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_digest_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc" * 100_000)
    assert files.sha256_of(tmp_path / "file") == hashlib.sha256(b"abc" * 100_000).hexdigest()


@pytest.mark.parametrize(
    ("write", "content"),
    [
        (lambda file: files.write_bytes_atomic(file, b"\0\r\n"), b"\0\r\n"),
        (lambda file: files.write_text_atomic(file, "é\n"), "é\n".encode()),
        (
            lambda file: files.write_json_atomic(file, {"é": [1, 0.5]}),
            '{\n  "é": [\n    1,\n    0.5\n  ]\n}\n'.encode(),
        ),
    ],
)
def test_a_file_is_replaced_as_a_whole(tmp_path: Path, write: Callable[[Path], None], content: bytes) -> None:
    file = tmp_path / "file"
    for _ in range(2):
        write(file)
        assert file.read_bytes() == content
    assert names_in(tmp_path) == ["file"]


def test_what_is_no_json_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    files.write_json_atomic(file, 1)
    with pytest.raises(ValueError):
        files.write_json_atomic(file, float("nan"))
    with pytest.raises(TypeError):
        files.write_json_atomic(file, {1, 2})
    assert file.read_text() == "1\n"
    assert names_in(tmp_path) == ["file.json"]


def test_a_disk_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    files.write_bytes_atomic(file, b"old")

    def no_space(descriptor: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        files.write_bytes_atomic(file, b"new")
    assert file.read_bytes() == b"old"
    assert names_in(tmp_path) == ["file"]


def test_files_and_folders_get_the_permissions_that_the_umask_leaves(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        files.write_bytes_atomic(tmp_path / "file", b"")
        with files.replace_directory(tmp_path / "folder"):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o644
    assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o755


def test_a_directory_is_swapped_in_when_it_is_complete(tmp_path: Path) -> None:
    target_dir = tmp_path / "deep" / "target"
    for content in ("first", "second"):
        with files.replace_directory(target_dir) as new_dir:
            (new_dir / content).write_text(content)
            assert new_dir.parent == target_dir.parent
        assert names_in(target_dir) == [content]
    assert names_in(target_dir.parent) == ["target"]


def test_a_failure_on_the_way_leaves_the_old_directory_and_nothing_else(tmp_path: Path) -> None:
    target_dir = tmp_path / "target"
    target_dir.mkdir()
    (target_dir / "old").touch()
    with pytest.raises(KeyboardInterrupt), files.replace_directory(target_dir) as new_dir:  # noqa: PT012
        (new_dir / "new").touch()
        raise KeyboardInterrupt
    assert names_in(target_dir) == ["old"]
    assert names_in(tmp_path) == ["target"]


def test_a_swap_that_fails_puts_the_old_directory_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target_dir = tmp_path / "target"
    target_dir.mkdir()
    (target_dir / "old").touch()
    rename, calls = Path.rename, []

    def fail_the_second_time(place: Path, target: Path) -> Path:
        calls.append(place)
        if len(calls) == 2:
            raise OSError("Input/output error")
        return rename(place, target)

    monkeypatch.setattr(Path, "rename", fail_the_second_time)
    with pytest.raises(OSError, match="Input/output"), files.replace_directory(target_dir) as new_dir:
        (new_dir / "new").touch()
    assert names_in(target_dir) == ["old"]
    assert names_in(tmp_path) == ["target"]


def test_a_file_in_the_way_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BadInput, match="is a file, expected a directory"), files.replace_directory(tmp_path / "file"):
        pass
    assert (tmp_path / "file").read_text() == "mine"


def test_what_cannot_be_written_whole_names_its_place_and_leaves_nothing(tmp_path: Path) -> None:
    files.write_bytes_atomic(tmp_path / "file", b"old")
    with no_file_above(1000), pytest.raises(OSError) as told:
        files.write_bytes_atomic(tmp_path / "file", bytes(5000))
    assert (told.value.errno, told.value.filename) == (errno.EFBIG, str(tmp_path / "file"))
    with no_file_above(1000), pytest.raises(OSError) as told, files.replace_directory(tmp_path / "a" / "folder") as new:
        (new / "large").write_bytes(bytes(5000))
    assert (told.value.errno, told.value.filename) == (errno.EFBIG, str(tmp_path / "a" / "folder"))
    assert (tmp_path / "file").read_bytes() == b"old"
    assert names_in(tmp_path) == ["a", "file"]
    assert names_in(tmp_path / "a") == []


def test_an_error_of_another_file_keeps_its_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as told, files.replace_directory(tmp_path / "folder"):
        (tmp_path / "elsewhere").read_bytes()
    assert told.value.filename == str(tmp_path / "elsewhere")


def test_a_place_is_tried_without_a_trace(tmp_path: Path) -> None:
    files.check_writable(tmp_path / "new" / "below" / "folder")
    assert names_in(tmp_path) == []
    (tmp_path / "file").touch()
    files.check_writable(tmp_path / "file")
    with pytest.raises(NotADirectoryError) as told:
        files.check_writable(tmp_path / "file" / "below" / "folder")
    assert told.value.filename == str(tmp_path / "file" / "below" / "folder")
    assert names_in(tmp_path) == ["file"]
