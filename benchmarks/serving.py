"""How fast the server is against ONNX Runtime itself, on the same graph and the same cores, in one run.

    python benchmarks/serving.py MODEL [--mode single|ensemble|random] [--clients 32] [--seconds 5] [--rounds 3]

Three numbers that belong together: images per second of raw ONNX Runtime at its best batch size and thread
arrangement, requests per second of the server at its clients (one image each, binary bodies, closed loop, keep-alive),
and their ratio. Both are measured in turn, round by round, so that whatever else the machine does hits both; the ratio
is the median over the rounds. Other processes still spoil it: `quiet` says whether they used less than a quarter of a
core, and `processor_ratio` compares processor time per image instead, which suffers less.

The load comes from `wrk` where it is installed (Debian's package), otherwise from a small generator in a process of its
own, which costs more of the same cores. The server's answer is compared with ONNX Runtime's before the clock starts
(not in mode random, whose answers differ by design), and any failed request stops the benchmark.

Progress goes to standard error; the last line on standard output is JSON.
"""

import argparse
import asyncio
import json
import os
import platform
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # first, or `serving` would be this very file

from serving.engine import choose_mode, graph_file, usable_cores  # noqa: E402
from zoo.bundle import Bundle  # noqa: E402
from zoo.catalogue import open_model  # noqa: E402

OUTPUTS = ["probabilities", "logits"]
BATCHES = (1, 8, 16, 32, 64)
QUIET = 0.25
SERVE = "import sys; from serving.server import serve; serve([sys.argv[1]], mode=sys.argv[2], port=0)"
LUA = """
local file = io.open("{body}", "rb")
wrk.method = "POST"
wrk.body = file:read("*a")
file:close()
wrk.headers["Content-Type"] = "application/octet-stream"
wrk.headers["Inference-Header-Content-Length"] = "{head_length}"
"""


def main() -> None:
    """Measure, and print JSON last."""
    options = parse_arguments()
    if options.generate:
        generate_load(options)
        return
    card = open_model(options.model, only=()).card
    mode = choose_mode(card, options.mode)
    bundle = open_model(options.model, only=(graph_file(mode),))
    raw = Raw(bundle, mode)
    arrangement = raw.best_arrangement(options.seconds / 3)
    with server_process(options.model, mode) as (process, url, seconds_to_first_answer):
        target = f"{url}/v2/models/{card.name}/infer"
        body, head_length = request_body(raw.image)
        if mode != "random":
            check_answer(target, body, head_length, raw)
        load(target, body, head_length, options.clients, 1.0)  # warm up
        rounds = []
        for number in range(options.rounds):
            measured = measure_round(raw, arrangement, process.pid, target, body, head_length, options)
            say(f"round {number + 1}: {json.dumps(measured)}")
            rounds.append(measured)
        alone = load(target, body, head_length, 1, options.seconds / 2)
    print(
        json.dumps(
            {
                "benchmark": "serving",
                "model": card.name,
                "mode": mode,
                "ratio": statistics.median(entry["ratio"] for entry in rounds),
                "requests_per_second": statistics.median(entry["server"]["per_second"] for entry in rounds),
                "raw_images_per_second": statistics.median(entry["raw"]["per_second"] for entry in rounds),
                "processor_ratio": statistics.median(entry["processor_ratio"] for entry in rounds),
                "quiet": all(
                    (entry[part]["foreign_cores"] or 0) < QUIET for entry in rounds for part in ("raw", "server")
                ),
                "raw_arrangement": arrangement,
                "clients": options.clients,
                "one_client": alone,
                "seconds_to_first_answer": seconds_to_first_answer,
                "load_generator": "wrk" if shutil.which("wrk") else "built in",
                "rounds": rounds,
                "cores": usable_cores(),
                "processor": processor(),
                "versions": {
                    "python": platform.python_version(),
                    "onnxruntime": onnxruntime.__version__,
                    "numpy": np.__version__,
                },
                "date": time.strftime("%Y-%m-%d"),
            }
        )
    )


class Raw:
    """ONNX Runtime alone on a bundle's graph."""

    def __init__(self, bundle: Bundle, mode: str) -> None:
        self.graph = bundle.read(graph_file(mode))
        images = bundle.card.input
        self.image = np.random.default_rng(0).random((1, images.channels, images.height, images.width), np.float32)
        self.gates = np.zeros(len(bundle.card.architecture.gated_layers), np.int64) if mode == "random" else None
        self.sessions = [self.session(1) for _ in range(usable_cores())]
        self.wide_session = self.session(usable_cores())

    def session(self, intra_op: int) -> Any:
        """Return a session with ONNX Runtime's own defaults but for its threads."""
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = intra_op
        return onnxruntime.InferenceSession(self.graph, settings, providers=["CPUExecutionProvider"])

    def answer(self) -> list[np.ndarray]:
        """Return probabilities and logits of the image."""
        return list(self.sessions[0].run(OUTPUTS, self.feeds(1)))

    def feeds(self, batch: int) -> dict[str, np.ndarray]:
        """Return the inputs of a batch; all of it takes one path, which is the fastest a gated graph can be."""
        feeds = {"images": np.repeat(self.image, batch, axis=0)}
        return feeds if self.gates is None else {**feeds, "gates": self.gates}

    def best_arrangement(self, seconds: float) -> dict[str, Any]:
        """Try every batch size with a session per core and with one session over all cores; return the fastest."""
        tried = [
            {"batch": batch, "sessions": sessions, **self.rate(batch, sessions, seconds)}
            for batch in BATCHES
            for sessions in {1, len(self.sessions)}
        ]
        for entry in tried:
            say(f"raw: {json.dumps(entry)}")
        best = max(tried, key=lambda entry: entry["per_second"])
        return {"batch": best["batch"], "sessions": best["sessions"]}

    def rate(self, batch: int, sessions: int, seconds: float) -> dict[str, float]:
        """Return images per second and processor milliseconds per image."""
        chosen = self.sessions if sessions > 1 or len(self.sessions) == 1 else [self.wide_session]
        counts = [0] * len(chosen)
        feeds = self.feeds(batch)
        for session in chosen:
            session.run(OUTPUTS, feeds)
        cpu, start = time.process_time(), time.perf_counter()

        def work(index: int) -> None:
            while time.perf_counter() < start + seconds:
                chosen[index].run(OUTPUTS, feeds)
                counts[index] += batch

        threads = [threading.Thread(target=work, args=(index,)) for index in range(len(chosen))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        elapsed, cpu = time.perf_counter() - start, time.process_time() - cpu
        return {"per_second": round(sum(counts) / elapsed, 1), "cpu_ms_each": round(1000 * cpu / sum(counts), 4)}


def measure_round(
    raw: Raw,
    arrangement: dict[str, Any],
    pid: int,
    target: str,
    body: bytes,
    head_length: int,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Measure raw and server one after the other."""
    busy = busy_seconds()
    start, own = time.perf_counter(), time.process_time()
    raw_rate = raw.rate(arrangement["batch"], arrangement["sessions"], options.seconds)
    raw_rate["foreign_cores"] = foreign(busy, start, time.process_time() - own)
    busy, start = busy_seconds(), time.perf_counter()
    cpu, children = cpu_seconds(pid), resource.getrusage(resource.RUSAGE_CHILDREN)
    server = load(target, body, head_length, options.clients, options.seconds)
    cpu = cpu_seconds(pid) - cpu
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    generator = after.ru_utime + after.ru_stime - children.ru_utime - children.ru_stime
    server["cpu_ms_each"] = round(1000 * cpu / max(1, server["requests"]), 4)
    server["generator_cpu_ms_each"] = round(1000 * generator / max(1, server["requests"]), 4)
    server["foreign_cores"] = foreign(busy, start, cpu + generator)
    spent = server["cpu_ms_each"] + server["generator_cpu_ms_each"]
    return {
        "ratio": round(server["per_second"] / raw_rate["per_second"], 4),
        "processor_ratio": round(raw_rate["cpu_ms_each"] / spent, 4) if spent else None,
        "raw": raw_rate,
        "server": server,
    }


@contextmanager
def server_process(model: str, mode: str) -> Iterator[tuple[subprocess.Popen[str], str, float]]:
    """Start a server; yields it, its URL, and the seconds from the start of the process to its first answer."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, model, mode], cwd=ROOT, stderr=subprocess.PIPE, text=True, env={**os.environ}
    )
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.search(r"http://\S+", line)
        if found is None:
            sys.exit(f"the server did not start: {line}{process.stderr.read()}")
        with urllib.request.urlopen(f"{found[0]}/v2/health/ready") as answer:
            assert answer.status == 200
        yield process, found[0], round(time.perf_counter() - start, 3)
        process.terminate()
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()


def request_body(image: np.ndarray) -> tuple[bytes, int]:
    """Return a binary request as tritonclient would send it, and the length of its JSON."""
    tensor = {
        "name": "images",
        "shape": list(image.shape),
        "datatype": "FP32",
        "parameters": {"binary_data_size": image.nbytes},
    }
    head = json.dumps({"inputs": [tensor], "parameters": {"binary_data_output": True}}).encode()
    return head + image.tobytes(), len(head)


def check_answer(target: str, body: bytes, head_length: int, raw: Raw) -> None:
    """Stop unless the server answers what ONNX Runtime answers."""
    request = urllib.request.Request(target, body, {"Inference-Header-Content-Length": str(head_length)})
    with urllib.request.urlopen(request) as answer:
        content = answer.read()[int(answer.headers["Inference-Header-Content-Length"]) :]
    served = np.frombuffer(content, "<f4").reshape(2, -1)
    assert np.allclose(served, np.concatenate(raw.answer()), atol=1e-5), (
        "the server's answer differs from ONNX Runtime's"
    )


def load(target: str, body: bytes, head_length: int, clients: int, seconds: float) -> dict[str, Any]:
    """Load the server from another process; returns requests, their rate and latencies in milliseconds."""
    with tempfile.TemporaryDirectory() as folder:
        body_file = Path(folder) / "body"
        body_file.write_bytes(body)
        if shutil.which("wrk"):
            script = Path(folder) / "post.lua"
            script.write_text(LUA.format(body=body_file, head_length=head_length))
            command = [
                "wrk",
                "-t1",
                f"-c{clients}",
                f"-d{max(1, round(seconds))}s",
                "--latency",
                "-s",
                str(script),
                target,
            ]
            return read_wrk(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        command = [sys.executable, __file__, target, "--generate", str(body_file), "--head-length", str(head_length)]
        command += ["--clients", str(clients), "--seconds", str(seconds)]
        done: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        return done


def read_wrk(text: str) -> dict[str, Any]:
    """Take the numbers out of wrk's report, and stop if any request failed."""
    for failure in ("Non-2xx", "Socket errors"):
        if failure in text:
            sys.exit(f"requests failed:\n{text}")
    scale = {"us": 0.001, "ms": 1.0, "s": 1000.0}
    latencies = {
        f"p{percent}_ms": round(float(value) * scale[unit], 3)
        for percent, value, unit in re.findall(r"^\s+(50|99)%\s+([\d.]+)(us|ms|s)$", text, re.MULTILINE)
    }
    requests = re.search(r"(\d+) requests in", text)
    rate = re.search(r"Requests/sec:\s+([\d.]+)", text)
    assert requests is not None
    assert rate is not None
    return {"per_second": float(rate[1]), "requests": int(requests[1]), **latencies}


def generate_load(options: argparse.Namespace) -> None:
    """Be the load generator: closed-loop clients on raw sockets, in this process of its own."""
    body = Path(options.generate).read_bytes()
    host, _, path = options.model.removeprefix("http://").partition("/")
    address, _, port = host.partition(":")
    head = f"POST /{path} HTTP/1.1\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n"
    request = f"{head}Inference-Header-Content-Length: {options.head_length}\r\n\r\n".encode() + body
    latencies: list[float] = []

    async def client(until: float) -> None:
        reader, writer = await asyncio.open_connection(address, int(port))
        while (start := time.perf_counter()) < until:
            writer.write(request)
            answer = await reader.readuntil(b"\r\n\r\n")
            length = re.search(
                rb"content-length: (\d+)\r\n(?!.*content-length)", answer.lower().replace(b"inference-header-", b"x-")
            )
            assert length is not None
            await reader.readexactly(int(length[1]))
            if not answer.startswith(b"HTTP/1.1 200"):
                sys.exit(f"a request failed: {answer!r}")
            latencies.append(time.perf_counter() - start)
        writer.close()

    async def clients() -> float:
        start = time.perf_counter()
        await asyncio.gather(*(client(start + options.seconds) for _ in range(options.clients)))
        return time.perf_counter() - start

    elapsed = asyncio.run(clients())
    milliseconds = np.array(latencies) * 1000
    print(
        json.dumps(
            {
                "per_second": round(len(latencies) / elapsed, 1),
                "requests": len(latencies),
                "p50_ms": round(float(np.percentile(milliseconds, 50)), 3),
                "p99_ms": round(float(np.percentile(milliseconds, 99)), 3),
            }
        )
    )


def busy_seconds() -> float | None:
    """Return the processor seconds that all processes used since the machine started; None where nobody knows."""
    try:
        fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    except OSError:
        return None
    user, nice, system, _idle, _wait, interrupt, soft = fields[:7]
    return (user + nice + system + interrupt + soft) / os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    """Return the processor seconds that a process used; 0 where nobody knows."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def foreign(busy_before: float | None, start: float, ours: float) -> float | None:
    """Return how many cores other processes used since `start`; a measurement above a quarter is noisy."""
    busy = busy_seconds()
    if busy is None or busy_before is None:
        return None
    return round(max(0.0, (busy - busy_before - ours) / (time.perf_counter() - start)), 2)


def processor() -> str:
    """Return the processor's name."""
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found[1] if found else platform.processor()


def say(text: str) -> None:
    """Report progress."""
    print(text, file=sys.stderr, flush=True)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", help="a catalogue name, local-dir:FOLDER or hf-hub:ORGANISATION/NAME")
    parser.add_argument("--mode", choices=["single", "ensemble", "random"])
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--generate", help=argparse.SUPPRESS)  # be the load generator for `model`, a URL
    parser.add_argument("--head-length", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
