"""The load generator `wrk` (Debian's package of that name) in a process of its own, and a slow client that checks.

Closed loop over keep-alive connections, one thread, requests in rotation that a script in Lua made beforehand. wrk's
numbers come back as JSON, written by that script. wrk 4 adds to its latencies what it takes for requests that a late
answer held up (coordinated omission): that makes high percentiles somewhat worse, for everybody alike.
"""

import json
import re
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

SCRIPT = """
local requests, current = {}, 0
init = function(args)
  for number = 1, @COUNT@ do
    local file = io.open("@FOLDER@/" .. number, "rb")
    requests[number] = wrk.format("POST", wrk.path, @HEADERS@, file:read("*a"))
    file:close()
  end
end
request = function()
  current = current % @COUNT@ + 1
  return requests[current]
end
done = function(summary, latency, requests)
  local failed = summary.errors
  io.write(string.format(
    '\\nRESULT {"requests": %d, "microseconds": %d, "bytes": %d, "p50": %d, "p90": %d, "p99": %d, "worst": %d, ' ..
    '"connect": %d, "read": %d, "write": %d, "status": %d, "timeout": %d}\\n',
    summary.requests, summary.duration, summary.bytes, latency:percentile(50), latency:percentile(90),
    latency:percentile(99), latency.max, failed.connect, failed.read, failed.write, failed.status, failed.timeout))
end
"""


class RequestError(RuntimeError):
    """A request was refused, cut off, or answered wrongly: then no number counts."""


def load(
    url: str,
    bodies: Sequence[bytes],
    headers: Mapping[str, str],
    *,
    clients: int,
    seconds: int,
) -> dict[str, Any]:
    """Load a server; returns requests, their rate, latencies in milliseconds, and bytes per answer.

    Args:
        url: where every request goes.
        bodies: what is posted, in rotation.
        headers: of every request.
        clients: connections, each with one request at a time.
        seconds: how long, at least 1.

    Raises:
        RequestError: any request failed.
    """
    if shutil.which("wrk") is None:
        raise SystemExit("this benchmark needs wrk; install Debian's package `wrk`")
    with tempfile.TemporaryDirectory() as folder:
        for number, body in enumerate(bodies, start=1):
            (Path(folder) / str(number)).write_bytes(body)
        script = Path(folder) / "rotate.lua"
        script.write_text(lua(folder, len(bodies), headers))
        command = ["wrk", "-t1", f"-c{clients}", f"-d{max(1, seconds)}s", "--timeout", "20s", "-s", str(script)]
        done = subprocess.run([*command, url], capture_output=True, text=True)
    if done.returncode:
        raise RequestError(f"wrk ended with {done.returncode}: {done.stderr.strip()[-300:]}")
    return read_report(done.stdout)


def lua(folder: str, count: int, headers: Mapping[str, str]) -> str:
    """Return the script that sends the files 1 … `count` of a folder in rotation."""
    table = ", ".join(f"[{json.dumps(name)}] = {json.dumps(value)}" for name, value in headers.items())
    replacements = {"@COUNT@": str(count), "@FOLDER@": folder, "@HEADERS@": "{" + table + "}"}
    script = SCRIPT
    for mark, value in replacements.items():
        script = script.replace(mark, value)
    return script


def read_report(text: str) -> dict[str, Any]:
    """Take the numbers out of what wrk printed.

    Raises:
        RequestError: any request failed, or none was answered.
    """
    found = re.search(r"^RESULT (\{.*\})$", text, re.MULTILINE)
    if found is None:
        raise RequestError(f"wrk printed no result, expected a line RESULT {{…}}; it printed: {text!r}")
    result = json.loads(found[1])
    if failed := {kind: result[kind] for kind in ("connect", "read", "write", "status", "timeout") if result[kind]}:
        raise RequestError(f"{failed} of {result['requests']} requests failed; a server under test must answer all")
    if result["requests"] == 0:
        raise RequestError("no request was answered; is it the right URL?")
    return {
        "per_second": round(result["requests"] / result["microseconds"] * 1e6, 1),
        "requests": result["requests"],
        "seconds": round(result["microseconds"] / 1e6, 2),
        "p50_ms": round(result["p50"] / 1000, 3),
        "p90_ms": round(result["p90"] / 1000, 3),
        "p99_ms": round(result["p99"] / 1000, 3),
        "worst_ms": round(result["worst"] / 1000, 3),
        "bytes_each": round(result["bytes"] / result["requests"], 1),
    }


def ask(
    connection: socket.socket, path: str, body: bytes, headers: Mapping[str, str]
) -> tuple[int, dict[str, str], bytes, int]:
    """Post one request on an open connection; returns status, headers (lower case), content, and bytes received."""
    lines = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    connection.sendall("\r\n".join([*lines, "", ""]).encode() + body)
    received = b""
    while b"\r\n\r\n" not in received:
        received += _more(connection)
    head, _, content = received.partition(b"\r\n\r\n")
    status, *fields = head.decode("latin-1").split("\r\n")
    answered = {name.strip().lower(): value.strip() for name, _, value in (field.partition(":") for field in fields)}
    while len(content) < int(answered["content-length"]):
        content += _more(connection)
    return int(status.split()[1]), answered, content, len(head) + 4 + len(content)


def check(
    port: int,
    path: str,
    bodies: Sequence[bytes],
    headers: Mapping[str, str],
    right: Callable[[int, np.ndarray], bool],
    *,
    clients: int = 16,
    times: int = 2,
) -> float:
    """Ask for all images from several connections at a time and look at every answer; returns bytes per answer.

    Args:
        port: of a server on 127.0.0.1.
        path: where every request goes.
        bodies: one per image.
        headers: of every request.
        right: says whether an image's probabilities are right, given its number and them.
        clients: connections.
        times: how often each asks for every image.

    Raises:
        RequestError: an answer is no answer, or wrong.
    """
    failures: list[str] = []
    received: list[int] = []

    def client(first: int) -> None:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
                for number in range(times * len(bodies)):
                    index = (first + number) % len(bodies)
                    status, answered, content, size = ask(connection, path, bodies[index], headers)
                    received.append(size)
                    if status != 200:
                        failures.append(f"status {status}: {content[:300]!r}")
                        return
                    if not right(index, probabilities(answered, content)):
                        failures.append(f"image {index}: {probabilities(answered, content)} is not what it should be")
                        return
        except (OSError, ValueError, KeyError) as error:
            failures.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=client, args=(first,)) for first in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise RequestError(f"{len(failures)} of {clients} clients got a wrong answer; the first: {failures[0]}")
    return sum(received) / len(received)


def probabilities(headers: Mapping[str, str], content: bytes) -> np.ndarray:
    """Return the float32 vector of an answer: all of it, or what follows the JSON of the Open Inference Protocol."""
    skip = int(headers.get("inference-header-content-length", 0))
    return np.frombuffer(content[skip:], "<f4")


def _more(connection: socket.socket) -> bytes:
    part = connection.recv(65536)
    if not part:
        raise ConnectionError("the server closed the connection in the middle of an answer")
    return part
