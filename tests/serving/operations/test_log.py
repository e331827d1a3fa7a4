import io
import json
import logging
import multiprocessing
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from serving.operations.log import clean_request_id, configure, log_request, new_request_id, request_id

ROOT = Path(__file__).parents[3]
TOUCHED = ("manygates", "manygates.access", "uvicorn", "uvicorn.error", "uvicorn.access", "asyncio", "py.warnings")
STAMP = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"

logger = logging.getLogger("manygates.serving")


@pytest.fixture(autouse=True)
def loggers_as_before() -> Iterator[None]:
    before = {name: (logging.getLogger(name).handlers[:], logging.getLogger(name).level) for name in TOUCHED}
    yield
    logging.captureWarnings(False)
    for name, (handlers, level) in before.items():
        logging.getLogger(name).handlers[:] = handlers
        logging.getLogger(name).setLevel(level)


@pytest.fixture
def lines() -> Callable[..., Callable[[], list[str]]]:
    """Return a function that configures the log and returns one to the lines written so far."""

    def start(format: Any, level: str = "info") -> Callable[[], list[str]]:
        stream = io.StringIO()
        configure(format, level, stream)
        return lambda: stream.getvalue().splitlines()

    return start


def test_text_has_a_line_per_record_with_time_level_and_logger(lines: Any) -> None:
    written = lines("text")
    logger.warning("%d models", 2)
    logger.debug("nothing")
    (line,) = written()
    assert re.fullmatch(STAMP + r" WARNING manygates\.serving: 2 models", line)


def test_json_has_one_object_per_line_even_with_a_traceback(lines: Any) -> None:
    written = lines("json")
    logger.info("ready", extra={"model": "eio", "request_id": "a-1"})
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logger.exception("failed")
    first, second = map(json.loads, written())
    assert re.fullmatch(STAMP, first.pop("time"))
    assert first == {
        "level": "info",
        "logger": "manygates.serving",
        "message": "ready",
        "request_id": "a-1",
        "model": "eio",
    }
    assert (second["level"], second["message"]) == ("error", "failed")
    assert second["exc"].startswith("Traceback (most recent call last):\n")
    assert second["exc"].endswith("ValueError: two\nlines")
    assert "request_id" not in second


def test_a_record_says_which_request_is_being_answered(lines: Any) -> None:
    written = lines("json")
    token = request_id.set("from-context")
    try:
        logger.info("one")
        logger.info("two", extra={"request_id": "own"})
    finally:
        request_id.reset(token)
    logger.info("three")
    assert [json.loads(line).get("request_id") for line in written()] == ["from-context", "own", None]


@pytest.mark.parametrize("format", ["text", "json"])
def test_a_client_cannot_begin_a_line_of_the_log(lines: Any, format: str) -> None:
    written = lines(format)
    forged = "2026-01-01T00:00:00.000Z INFO manygates.serving: all is well"
    for separator in ("\n", "\r", "\r\n", "\x85", "\u2028", "\u2029", "\x0b", "\x0c", "\x1b[2K"):
        logger.warning("no such model %s", separator + forged)
        log_request(method="GET", path="/" + separator + forged, status=404, seconds=0.0, request_id=separator + "x")
        try:
            raise ValueError(separator + forged)
        except ValueError:
            logger.exception("failed")
    assert not any(line.startswith(forged) for line in written())
    assert all(line.isprintable() for line in written())
    assert "request_id" not in "".join(written())


@pytest.mark.parametrize("format", ["text", "json"])
def test_bytes_that_are_no_text_do_not_break_the_log(lines: Any, format: str) -> None:
    lines(format)
    (handler,) = logging.getLogger("manygates").handlers
    # formatted directly: pytest shows what is logged, and could not send this from one process to another
    record = logging.makeLogRecord({"msg": "no such model \udc80", "levelname": "WARNING", "request_id": "\udc80x"})
    assert handler.format(record).encode().isascii()


def test_uvicorn_and_warnings_are_written_in_the_same_form_once(lines: Any) -> None:
    lines("text")
    written = lines("json")
    uvicorn.Config(app=lambda: None, log_config=None, log_level="warning")
    logging.getLogger("uvicorn.error").error("from uvicorn")
    logging.getLogger("uvicorn.error").info("not worth it")
    logging.getLogger("uvicorn.access").info("nor this")
    logging.getLogger("asyncio").warning("from asyncio")
    logging.getLogger("py.warnings").warning("a warning")
    said = [json.loads(line) for line in written()]
    assert [record["logger"] for record in said] == ["uvicorn.error", "asyncio", "py.warnings"]


def test_the_level_is_ours_and_libraries_begin_at_warnings(lines: Any) -> None:
    written = lines("text", "debug")
    logger.debug("ours")
    logging.getLogger("uvicorn.error").info("theirs")
    assert [line.rpartition(": ")[2] for line in written()] == ["ours"]
    written = lines("text", "error")
    logger.warning("ours")
    logging.getLogger("uvicorn.error").warning("theirs")
    assert written() == []


def test_a_line_per_request_says_what_happened_and_not_what_was_asked(lines: Any) -> None:
    written = lines("json", "error")
    asked = {"method": "POST", "path": "/v2/models/eio/infer", "model": "eio", "rows": 3, "key": "alice"}
    log_request(**asked, status=200, seconds=0.0123456, request_id="r")  # type: ignore[arg-type]
    document = json.loads(written()[0])
    assert document.pop("time")
    assert document == {
        "level": "info",
        "logger": "manygates.access",
        "message": "POST /v2/models/eio/infer 200 12.35 ms 3 images",
        "request_id": "r",
        "model": "eio",
        "method": "POST",
        "path": "/v2/models/eio/infer",
        "status": 200,
        "seconds": 0.012346,
        "rows": 3,
        "key": "alice",
    }
    written = lines("text")
    log_request(method="GET", path="/" + 1000 * "a", status=404, seconds=1.0)
    assert len(written()[0]) < 400


def test_what_a_client_calls_a_model_makes_no_line_long(lines: Any) -> None:
    written = lines("json")
    log_request(method="GET", path="/", status=404, seconds=1.0, model=60_000 * "a")
    assert json.loads(written()[0])["model"] == 256 * "a"


@pytest.mark.parametrize("value", ["a", "A-z_0.9", "x" * 128, "5f0c9d2e-0b1a-4c33-9c55-cafe00000000"])
def test_a_clean_request_id_is_kept(value: str) -> None:
    assert clean_request_id(value) == value
    assert clean_request_id(value.encode()) == value


@pytest.mark.parametrize("value", ["", "x" * 129, "a b", "a\n", "a\r\nset-cookie: b", "é", "٣", "a/b", "{}", "\x00"])
def test_any_other_request_id_is_dropped(value: str) -> None:
    assert clean_request_id(value) is None
    assert clean_request_id(value.encode()) is None
    assert clean_request_id(None) is None


def test_new_request_ids_are_clean_and_never_repeat_across_threads() -> None:
    drawn: list[str] = []
    threads = [threading.Thread(target=lambda: drawn.extend(new_request_id() for _ in range(2000))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(drawn)) == len(drawn) == 8000
    assert all(re.fullmatch("[0-9a-f]{32}", one) and clean_request_id(one) == one for one in drawn)
    ones = sum(int(one, 16).bit_count() for one in drawn)
    assert abs(ones - 64 * 8000) < 6 * (32 * 8000) ** 0.5  # six standard deviations of a fair coin


def test_a_forked_process_draws_other_request_ids() -> None:
    code = """
import os
from serving.operations.log import new_request_id
new_request_id()
reader, writer = os.pipe()
child = os.fork()
own = {new_request_id() for _ in range(300)}
if child == 0:
    os.write(writer, "".join(sorted(own)).encode())
    os._exit(0)
os.waitpid(child, 0)
text = os.read(reader, 32 * 300).decode()
theirs = {text[start : start + 32] for start in range(0, len(text), 32)}
print(len(own), len(theirs), len(own & theirs))
"""
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("this system does not fork")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["300", "300", "0"]


def test_the_log_goes_to_what_standard_error_is_now(capsys: pytest.CaptureFixture[str]) -> None:
    configure("text")
    logger.info("here")
    said = capsys.readouterr()
    assert (said.out, said.err.endswith("INFO manygates.serving: here\n")) == ("", True)
