"""The servers that benchmarks/serving.py measures: ours by its command line, its peers in environments of their own.

Each is a process with a session of its own, on a free port of 127.0.0.1, started afresh in every round. The peers load
the very file that we serve, with the preprocessing that such servers leave to their users: uint8 to float32 / 255 in
numpy. Ours and Triton are sent the same bytes (Open Inference Protocol, a binary UINT8 tensor), the others the raw
3 072 bytes of an image.
"""

import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import machine
import numpy as np
import wrk

ROOT = Path(__file__).resolve().parents[1]
PEERS = ROOT / ".peers"
SCRIPTS = ROOT / "benchmarks" / "peers"
PATIENCE = 60.0  # seconds a server may take to give its first answer

Right = Callable[[int, np.ndarray], bool]


class StartError(RuntimeError):
    """A server ended before it answered: settings it does not know, something that is not installed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A server to measure, and how it is spoken to."""

    name: str
    """As it is called in results."""
    about: str
    """Its configuration, in words."""
    command: Callable[[int, Path], Sequence[str]]
    """What starts it, given a port and a scratch folder (in which it may prepare files)."""
    environment: Mapping[str, str]
    path: str
    """Where it takes requests."""
    bodies: tuple[bytes, ...]
    """Requests, one image each, in rotation."""
    headers: Mapping[str, str]
    right: Right
    """Says whether an answer is right, given the number of the image and its probabilities."""
    folder: Path = ROOT


@dataclasses.dataclass(frozen=True, kw_only=True)
class Running:
    """A server that has given its first answer."""

    target: Target
    port: int
    session: int
    """Of all its processes; see machine.processes."""
    seconds_to_first_answer: float

    @property
    def url(self) -> str:
        """Where it takes requests."""
        return f"http://127.0.0.1:{self.port}{self.target.path}"

    def check(self) -> float:
        """Compare the answers to all images, from many connections at once; returns bytes per answer."""
        target = self.target
        return wrk.check(self.port, target.path, target.bodies, target.headers, target.right)

    def processes(self) -> list[int]:
        """Return its processes."""
        return machine.processes(self.session)


@contextmanager
def running(target: Target) -> Iterator[Running]:
    """Start a server, wait for its first answer, which must be right, and end it in the end.

    Raises:
        StartError: it ended, or gave no right answer in time.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "log"
        with log.open("wb") as output:
            command = target.command(port, Path(scratch))
            environment = {**os.environ, **target.environment}
            began = time.perf_counter()
            process = subprocess.Popen(
                command,
                cwd=target.folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                seconds = _first_answer(target, port, process, began, log)
                yield Running(target=target, port=port, session=process.pid, seconds_to_first_answer=seconds)
            finally:
                _end(process)


def _first_answer(target: Target, port: int, process: subprocess.Popen[bytes], began: float, log: Path) -> float:
    """Ask until a server answers; returns the seconds since it was started."""
    last = "nothing"
    while time.perf_counter() < began + PATIENCE:
        if process.poll() is not None:
            raise StartError(f"{target.name} ended with {process.returncode}: {_tail(log)}")
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
                status, headers, content, _ = wrk.ask(connection, target.path, target.bodies[0], target.headers)
        except (OSError, KeyError, ValueError):  # not there yet, or no answer yet
            time.sleep(0.002)
            continue
        if status == 200:
            seconds = round(time.perf_counter() - began, 3)
            answer = wrk.probabilities(headers, content)
            if not target.right(0, answer):
                raise wrk.RequestError(f"{target.name} answers {answer}, which is not what it should be")
            return seconds
        last = f"{status} {content[:300]!r}"
        if 400 <= status < 500 and status not in (404, 408, 429):
            break
        time.sleep(0.002)
    raise StartError(f"{target.name} gave no answer; its last was {last}; its log: {_tail(log)}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a server, gently first, and whatever it has started."""
    members = machine.processes(process.pid)
    process.terminate()
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pid in members:  # by number: those that it started and left behind
        if pid in machine.processes(process.pid):
            os.kill(pid, signal.SIGKILL)


def _tail(log: Path) -> str:
    return log.read_text(errors="replace").strip()[-600:]


def free_port() -> int:
    """Return a port of 127.0.0.1 that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def open_inference_bodies(
    images: np.ndarray, parameters: Mapping[str, object] | None = None
) -> tuple[tuple[bytes, ...], dict[str, str]]:
    """Return one binary request per uint8 image (image, channel, height, width), and their headers."""
    shape = [1, *images.shape[1:]]
    tensor = {
        "name": "images",
        "shape": shape,
        "datatype": "UINT8",
        "parameters": {"binary_data_size": int(np.prod(shape))},
    }
    document: dict[str, object] = {
        "inputs": [tensor],
        "outputs": [{"name": "probabilities", "parameters": {"binary_data": True}}],
    }
    if parameters:
        document["parameters"] = dict(parameters)
    head = json.dumps(document, separators=(",", ":")).encode()
    headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(head))}
    return tuple(head + image.tobytes() for image in images), headers


def ours(
    name: str,
    model: str,
    card_name: str,
    images: np.ndarray,
    right: Right,
    *,
    mode: str = "single",
    settings: Mapping[str, str] | None = None,
    parameters: Mapping[str, object] | None = None,
    python: str = sys.executable,
) -> Target:
    """Return our server, started by its command line; `settings` become variables MANYGATES_SERVE_<NAME>."""
    bodies, headers = open_inference_bodies(images, parameters)
    settings = settings or {}
    told = " ".join([f"--mode {mode}", *(f"{key}={value}" for key, value in settings.items())])
    return Target(
        name=name,
        about=f"manygates serve {model} {told}",
        command=lambda port, scratch: [
            python, "-m", "manygates", "serve", model, "--mode", mode, "--port", str(port)
        ],
        environment={f"MANYGATES_SERVE_{key.upper()}": value for key, value in settings.items()},
        path=f"/v2/models/{card_name}/infer",
        bodies=bodies,
        headers=headers,
        right=right,
    )  # fmt: skip


def peers(graph: Path, images: np.ndarray, right: Right) -> list[Target]:
    """Return the three fastest servers that install from the package registry, in their best configurations.

    Args:
        graph: the ONNX file to serve, with input `images` and output `probabilities`.
        images: uint8 (image, channel, height, width).
        right: says whether an answer is right.
    """
    return [
        mosec(graph, images, right, batch=8, wait=1),
        triton(graph, images, right, batch=8),
        fastapi(graph, images, right, workers=2),
    ]


def other_peers(graph: Path, images: np.ndarray, right: Right) -> list[Target]:
    """Return the configurations among which `peers` are the best, and those."""
    found = {f"batch {batch}": triton(graph, images, right, batch=batch) for batch in (4, 8, 16)}
    found |= {
        f"batch {batch} wait {wait}": mosec(graph, images, right, batch=batch, wait=wait)
        for batch, wait in ((1, 1), (4, 1), (8, 1), (16, 1), (8, 2), (16, 2))
    }
    found |= {f"workers {workers}": fastapi(graph, images, right, workers=workers) for workers in (2, 3)}
    found["workers 1, 2 threads"] = fastapi(graph, images, right, workers=1, intra_op=2)
    return [dataclasses.replace(target, name=f"{target.name}:{note}") for note, target in found.items()]


def mosec(graph: Path, images: np.ndarray, right: Right, *, batch: int, wait: int) -> Target:
    """Return mosec: a front end in Rust, two worker processes with one thread each."""
    python = PEERS / "mosec" / "bin" / "python"
    return Target(
        name="mosec",
        about=f"mosec, 2 workers of one thread, batch <= {batch}, wait {wait} ms",
        command=lambda port, scratch: [
            str(python), str(SCRIPTS / "mosec_server.py"), "--address", "127.0.0.1", "--port", str(port),
            "--timeout", "30000", "--path", str(scratch / "sockets"), "--log-level", "warning",
        ],
        environment={
            "MODEL_FILE": str(graph),
            "WORKERS": "2",
            "MAX_BATCH": str(batch),
            "MAX_WAIT_MS": str(wait),
        },
        path="/inference",
        bodies=tuple(image.tobytes() for image in images),
        headers={"Content-Type": "application/octet-stream"},
        right=right,
        folder=SCRIPTS,
    )  # fmt: skip


def triton(graph: Path, images: np.ndarray, right: Right, *, batch: int) -> Target:
    """Return Triton's front end with its python backend, from PyTriton's wheel: two instances of one thread."""
    python = PEERS / "triton" / "bin" / "python"
    packages = next(PEERS.glob("triton/lib/python3*/site-packages"), PEERS)
    bundled = packages / "pytriton" / "tritonserver"
    shape = ", ".join(str(size) for size in images.shape[1:])
    bodies, headers = open_inference_bodies(images)
    configuration = f"""
        name: "resnet20"
        backend: "python"
        max_batch_size: {batch}
        input [{{ name: "images", data_type: TYPE_UINT8, dims: [{shape}] }}]
        output [{{ name: "probabilities", data_type: TYPE_FP32, dims: [10] }}]
        instance_group [{{ count: 2, kind: KIND_CPU }}]
        dynamic_batching {{ max_queue_delay_microseconds: 0 }}
    """

    def command(port: int, scratch: Path) -> list[str]:
        version = scratch / "repository" / "resnet20" / "1"
        version.mkdir(parents=True)
        (version.parent / "config.pbtxt").write_text(configuration)
        shutil.copy(SCRIPTS / "triton_model.py", version / "model.py")
        shutil.copy(graph, version / "single.onnx")
        return [
            str(bundled / "bin" / "tritonserver"), f"--model-repository={scratch / 'repository'}",
            f"--backend-directory={bundled / 'backends'}", "--http-address=127.0.0.1", f"--http-port={port}",
            "--allow-grpc=false", "--allow-metrics=false", "--log-info=false", "--exit-timeout-secs=3",
        ]  # fmt: skip

    return Target(
        name="triton",
        about=f"Triton 2.51 front end, python backend, 2 instances of one thread, batch <= {batch}, no delay",
        command=command,
        environment={
            "LD_LIBRARY_PATH": _library_folder(python),  # the stub is linked to libpython
            "PATH": f"{python.parent}:{os.environ.get('PATH', '')}",  # by which it finds its environment
        },
        path="/v2/models/resnet20/infer",
        bodies=bodies,
        headers=headers,
        right=right,
    )


def _library_folder(python: Path) -> str:
    """Return where a Python keeps its shared library."""
    if not python.exists():
        return ""
    command = [str(python), "-c", "import sysconfig; print(sysconfig.get_config_var('LIBDIR'))"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def fastapi(graph: Path, images: np.ndarray, right: Right, *, workers: int, intra_op: int = 1) -> Target:
    """Return FastAPI under uvicorn: worker processes without batching."""
    uvicorn = PEERS / "fastapi" / "bin" / "uvicorn"
    return Target(
        name="fastapi",
        about=f"FastAPI, uvicorn, {workers} worker(s) of {intra_op} thread(s), no batching",
        command=lambda port, scratch: [
            str(uvicorn), "fastapi_server:application", "--host", "127.0.0.1", "--port", str(port),
            "--workers", str(workers), "--loop", "uvloop", "--http", "httptools", "--no-access-log",
            "--log-level", "warning",
        ],
        environment={"MODEL_FILE": str(graph), "INTRA_OP": str(intra_op)},
        path="/infer",
        bodies=tuple(image.tobytes() for image in images),
        headers={"Content-Type": "application/octet-stream"},
        right=right,
        folder=SCRIPTS,
    )  # fmt: skip
