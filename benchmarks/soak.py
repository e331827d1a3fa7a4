"""Whether the server stays right, polite and small under load: a soak.

    python benchmarks/soak.py [--minutes 10] [--clients 128] [--malformed 0.05]
    python benchmarks/soak.py --report [FILE]

A server is started by its command line over a repository with copies of the bundled models, in which a request may
choose its mode. Clients in processes of their own, closed loop over keep-alive connections, send one image each. Of the
requests some are malformed in ten ways. Every answer is looked at:

- well-formed, modes `single` and `ensemble`: 200, and the probabilities that ONNX Runtime gives on the bundle's file;
- well-formed, mode `random`: 200, finite, summing to 1 (they differ by design);
- malformed: a status from 400 to 499, and the connection or the next one goes on.

In between one bundle is replaced while its model is asked (a hot reload), and in the middle the server gets SIGTERM,
with a second one ready to take over: clients go there when the first says that it is not ready any more, as a load
balancer would make them. A request counts as lost if it was sent whole and its connection ended without an answer.
Memory and open files of both servers are sampled every ten seconds.

Progress goes to standard error, the report to benchmarks/results and, as JSON, to standard output. The exit status is 0
only if everything held.
"""

import argparse
import asyncio
import collections
import dataclasses
import json
import multiprocessing
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import machine
import numpy as np
import onnxruntime
from servers import free_port

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from zoo.bundle.bundle import Bundle  # noqa: E402
from zoo.files import replace_directory, write_text_atomic  # noqa: E402
from zoo.hub.source import bundled_dir  # noqa: E402

STANDARD, GATED = "standard-resnet20-cifar10", "eio-resnet20-cifar10"
IMAGES = 16
TOLERANCE = 1e-4
GENERATORS = 2
SAMPLE_SECONDS = 10.0
DRAIN_DELAY = 3.0
GROWTH = 1.05  # what memory may grow by after the first minute


@dataclasses.dataclass(frozen=True)
class Shot:
    """A request, and what its answer has to be."""

    name: str
    content: bytes
    good: bool
    expected: np.ndarray | None = None
    """Probabilities; None where they differ by design."""


def main() -> int:
    """Soak, or print a filed report."""
    options = parse_arguments()
    if options.report is not None:
        print(as_markdown(json.loads(Path(options.report).read_text())))
        return 0
    report = soak(options)
    text = json.dumps(report, indent=1)
    if options.out:
        write_text_atomic(Path(options.out), text + "\n")
    print(text)
    return 0 if report["held"] else 1


def soak(options: argparse.Namespace) -> dict[str, Any]:
    """Run the whole, and return its report."""
    seconds = 60 * options.minutes
    with tempfile.TemporaryDirectory() as scratch:
        repository = Path(scratch) / "models"
        for name in (STANDARD, GATED):
            shutil.copytree(bundled_dir() / name, repository / name)
        shots = well_formed(repository), malformed()
        ports = free_port(), free_port()
        context = multiprocessing.get_context("spawn")
        target = context.Value("i", ports[0])
        results = context.Queue()
        began = time.perf_counter()
        servers = [start(repository, port, Path(scratch)) for port in ports]
        try:
            for port in ports:
                wait_ready(port)
            generators = [
                context.Process(
                    target=generate,
                    args=(number, options.clients // GENERATORS, seconds, options.malformed, shots, target, results),
                )
                for number in range(GENERATORS)
            ]
            for generator in generators:
                generator.start()
            samples, events = attend(servers, ports, repository, seconds, target)
            counted = [results.get(timeout=120) for _ in generators]
            for generator in generators:
                generator.join(30)
            second = end(servers[1])
        finally:
            for server in servers:
                server.kill()
                server.wait()
    return judged(options, counted, samples, {**events, "second_exit_status": second}, time.perf_counter() - began)


def start(repository: Path, port: int, scratch: Path) -> subprocess.Popen[bytes]:
    """Start a server by its command line."""
    command = [sys.executable, "-m", "manygates", "serve", "--port", str(port), "--model-repository", str(repository)]
    command += ["--allow-mode-choice", "--reload-seconds", "1", "--drain-delay", str(DRAIN_DELAY)]
    with (scratch / f"log-{port}").open("wb") as log:
        return subprocess.Popen(command, cwd=ROOT, stderr=log, stdout=log)


def end(server: subprocess.Popen[bytes]) -> int:
    """Stop a server gently, and return its exit status."""
    server.send_signal(signal.SIGTERM)
    return server.wait(60)


def wait_ready(port: int) -> None:
    """Return when a server is ready."""
    deadline = time.monotonic() + 60
    while not is_ready(port):
        if time.monotonic() > deadline:
            sys.exit("a server did not become ready within a minute")
        time.sleep(0.05)


def is_ready(port: int) -> bool:
    """Ask a server whether it is ready."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def attend(
    servers: list[subprocess.Popen[bytes]], ports: tuple[int, int], repository: Path, seconds: float, target: Any
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Sample memory and files, replace a bundle, and let the second server take over in the middle."""
    samples: list[dict[str, Any]] = []
    events: dict[str, Any] = {}
    began = time.monotonic()
    next_sample, terminated = 0.0, False
    while (now := time.monotonic() - began) < seconds:
        if now >= next_sample:
            for number, server in enumerate(servers):
                if server.poll() is None:
                    samples.append({"second": round(now), "server": number, **held_by(server.pid)})
            say(f"{now:5.0f} s  {json.dumps(samples[-2:])}")
            next_sample += SAMPLE_SECONDS
        if "reloaded_at" not in events and now >= seconds / 4:
            replace_bundle(repository / GATED)
            events["reloaded_at"] = round(now, 1)
        if "reloads" not in events and now >= seconds * 0.45:
            events["reloads"] = reloads(ports[0])
        if not terminated and now >= seconds / 2:
            servers[0].send_signal(signal.SIGTERM)
            events["terminated_at"], terminated = round(now, 1), True
        if terminated and target.value == ports[0] and not is_ready(ports[0]):
            target.value = ports[1]
        if terminated and "first_exit_status" not in events and servers[0].poll() is not None:
            events["first_exit_status"] = servers[0].returncode
            events["drained_in_seconds"] = round(now - events["terminated_at"], 1)
        time.sleep(0.05)
    return samples, events


def replace_bundle(folder: Path) -> None:
    """Put a bundle in the place of another that says something else, as a deployment would: by renaming."""
    with replace_directory(folder) as fresh:
        for file in folder.iterdir():
            if file.name != "card.json":
                shutil.copy(file, fresh / file.name)
        card = json.loads((folder / "card.json").read_text())
        card["description"] += " (replaced)"
        (fresh / "card.json").write_text(json.dumps(card))
    Bundle.open(folder)


def reloads(port: int) -> int:
    """Return how many models a server says it has loaded while it ran."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    found = [line for line in lines if line.startswith("manygates_model_loads_total") and 'outcome="loaded"' in line]
    return sum(int(float(line.rpartition(" ")[2])) for line in found)


def held_by(pid: int) -> dict[str, float]:
    """Return a process's resident megabytes (10^6 bytes) and open files."""
    return {
        "rss_mb": round(machine.memory([pid])["resident_mb"], 1),
        "files": sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir()),
    }


# --- requests ---


def well_formed(repository: Path) -> list[Shot]:
    """Return requests of one image each with the answers of ONNX Runtime."""
    images = np.random.default_rng(0).integers(0, 256, (IMAGES, 3, 32, 32), dtype=np.uint8)
    shots = []
    for model, mode in ((STANDARD, "single"), (GATED, "single"), (GATED, "ensemble"), (GATED, "random")):
        expected = None
        if mode != "random":
            graph = (repository / model / f"{mode}.onnx").read_bytes()
            session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
            feeds = {"images": images.astype(np.float32) / np.float32(255)}
            (expected,) = session.run(["probabilities"], feeds)
        for number, image in enumerate(images):
            parameters = {"binary_data_output": True, "mode": mode}
            content = request(model, head("UINT8", parameters, image.nbytes), image.tobytes())
            row = None if expected is None else expected[number]
            shots.append(Shot(f"{model} {mode}", content, True, row))
    return shots


def malformed() -> list[Shot]:
    """Return requests that are wrong in ten ways; each is refused without harm to its connection, or closes it."""
    image = np.zeros((1, 3, 32, 32), np.float32)
    pixels = image.tobytes()
    levels = head("FP32", {}, len(pixels))
    wrong_shape = levels.replace(b"[1, 3, 32, 32]", b"[1, 3, 31, 32]")
    nan = np.full_like(image, np.nan).tobytes()
    bad = {
        "not JSON": request(STANDARD, b"{", b""),
        "a tensor cut short": request(STANDARD, levels, pixels[:-7]),
        "a wrong shape": request(STANDARD, wrong_shape, pixels),
        "NaN": request(STANDARD, levels, nan),
        "a pixel of 255": request(STANDARD, levels, (image + 255).tobytes()),
        "an unknown model": request("no-such-model", levels, pixels),
        "an unknown output": request(STANDARD, levels[:-1] + b', "outputs": [{"name": "gates"}]}', pixels),
        "a header length beyond the body": request(STANDARD, levels, b"", claimed=10**6),
        "an image that is none": raw("POST", "/classify", b"GIF89a" + bytes(64)),
        "a method that is not offered": raw("DELETE", f"/v2/models/{STANDARD}/infer", b""),
    }
    return [Shot(name, content, False) for name, content in bad.items()]


def head(datatype: str, parameters: dict[str, Any], size: int) -> bytes:
    """Return the JSON of a binary request of one image."""
    tensor = {"name": "images", "shape": [1, 3, 32, 32], "datatype": datatype}
    tensor["parameters"] = {"binary_data_size": size}
    return json.dumps({"inputs": [tensor], "parameters": parameters}).encode()


def request(model: str, header: bytes, tensor: bytes, claimed: int | None = None) -> bytes:
    """Return the bytes of an inference request."""
    length = len(header) if claimed is None else claimed
    more = f"Inference-Header-Content-Length: {length}\r\n"
    return raw("POST", f"/v2/models/{model}/infer", header + tensor, more)


def raw(method: str, path: str, body: bytes, more: str = "") -> bytes:
    """Return the bytes of an HTTP request."""
    return f"{method} {path} HTTP/1.1\r\nHost: soak\r\n{more}Content-Length: {len(body)}\r\n\r\n".encode() + body


# --- load ---


def generate(
    number: int,
    clients: int,
    seconds: float,
    share: float,
    shots: tuple[list[Shot], list[Shot]],
    target: Any,
    results: Any,
) -> None:
    """Be some of the clients, in this process of its own."""
    results.put(asyncio.run(_generate(number, clients, seconds, share, shots, target)))


async def _generate(
    number: int, clients: int, seconds: float, share: float, shots: tuple[list[Shot], list[Shot]], target: Any
) -> dict[str, Any]:
    counts: collections.Counter[str] = collections.Counter()
    wrong: list[str] = []
    milliseconds: list[float] = []
    until = time.monotonic() + seconds
    good, bad = shots

    async def client(seed: int) -> None:
        rng = random.Random(seed)
        port, streams = 0, None
        while time.monotonic() < until:
            shot = rng.choice(bad if rng.random() < share else good)
            try:
                if streams is None or port != target.value:
                    if streams is not None:
                        streams[1].close()
                    port = target.value
                    streams = await asyncio.open_connection("127.0.0.1", port)
                    counts["connections"] += 1
            except OSError:
                counts["connections refused"] += 1
                streams = None
                await asyncio.sleep(0.05)
                continue
            reader, writer = streams
            began = time.perf_counter()
            try:
                writer.write(shot.content)
                await writer.drain()
                async with asyncio.timeout(60):
                    status, closing, body = await read(reader)
            except (OSError, asyncio.IncompleteReadError, TimeoutError) as error:
                counts["lost"] += 1
                wrong.append(f"{shot.name}: {type(error).__name__}")
                streams = None
                continue
            milliseconds.append(1000 * (time.perf_counter() - began))
            counts["good" if shot.good else "malformed"] += 1
            counts[f"status {status}"] += 1
            if problem := fault(shot, status, body):
                counts["wrong"] += 1
                wrong.append(f"{shot.name}: {problem}")
            if closing:
                writer.close()
                streams = None

    await asyncio.gather(*(client(1000 * number + seed) for seed in range(clients)))
    return {"counts": dict(counts), "wrong": wrong[:20], "milliseconds": milliseconds}


async def read(reader: asyncio.StreamReader) -> tuple[int, bool, bytes]:
    """Read an answer: its status, whether the connection ends, and its body."""
    top = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    lines = dict(line.partition(": ")[::2] for line in top.split("\r\n")[1:] if line)
    body = await reader.readexactly(int(lines["content-length"]))
    skipped = int(lines.get("inference-header-content-length", 0))
    return int(top.split(" ", 2)[1]), lines.get("connection") == "close", body[skipped:]


def fault(shot: Shot, status: int, body: bytes) -> str:
    """Say what is wrong with an answer; empty if nothing is."""
    if not shot.good:
        return "" if 400 <= status < 500 else f"answered with {status}"
    if status != 200:
        return f"answered with {status}: {body[:100]!r}"
    probabilities = np.frombuffer(body, "<f4", count=10)
    if not np.isfinite(probabilities).all() or abs(float(probabilities.sum()) - 1) > 1e-3:
        return f"probabilities {probabilities.tolist()}"
    if shot.expected is not None and float(np.abs(probabilities - shot.expected).max()) > TOLERANCE:
        return "other probabilities than ONNX Runtime's"
    return ""


# --- report ---


def judged(
    options: argparse.Namespace,
    counted: list[dict[str, Any]],
    samples: list[dict[str, Any]],
    events: dict[str, Any],
    seconds: float,
) -> dict[str, Any]:
    """Put everything together, and say whether it held."""
    counts: collections.Counter[str] = collections.Counter()
    for part in counted:
        counts.update(part["counts"])
    milliseconds = np.concatenate([part["milliseconds"] for part in counted])
    growth = {str(server): growth_of([s for s in samples if s["server"] == server]) for server in (0, 1)}
    claims = {
        "every well-formed request was answered rightly, every malformed one refused with 4xx": counts["wrong"] == 0,
        "no 5xx": not any(name.startswith("status 5") for name in counts),
        "no request was lost": counts["lost"] == 0 and counts["connections refused"] == 0,
        "the replaced bundle was loaded": events.get("reloads", 0) >= 1,
        "the first server drained and ended with 0": events.get("first_exit_status") == 0,
        "the second server ended with 0": events["second_exit_status"] == 0,
        "memory is flat within 5 % after the first minute": all(g["memory"] <= GROWTH for g in growth.values()),
        "no open files are left behind": all(g["files"] <= 0 for g in growth.values()),
    }
    return {
        "benchmark": "soak",
        "held": all(claims.values()),
        "claims": claims,
        "minutes": options.minutes,
        "clients": options.clients,
        "malformed_share": options.malformed,
        "seconds_with_start": round(seconds, 1),
        "requests": int(counts["good"] + counts["malformed"]),
        "counts": dict(sorted(counts.items())),
        "wrong": [line for part in counted for line in part["wrong"]][:20],
        "latency_ms": {f"p{p}": round(float(np.percentile(milliseconds, p)), 2) for p in (50, 99, 99.9)},
        "events": events,
        "growth": growth,
        "samples": samples,
        "machine": machine.machine(),
        "versions": machine.versions("numpy", "onnxruntime-gpu", "uvicorn", "uvloop", "httptools"),
        "date": machine.today(),
        "command": f"python benchmarks/soak.py --minutes {options.minutes:g}",
    }


def growth_of(samples: list[dict[str, Any]]) -> dict[str, float]:
    """Return by what factor memory, and by how many files a server grew after its first loaded minute.

    Files are compared between the highest of the first and of the last third: connections come and go with the clients.
    """
    loaded = [sample for sample in samples if sample["rss_mb"] > 0]
    busy = [s for s in loaded if s["files"] > min(x["files"] for x in loaded) + 10] or loaded
    settled = [
        s for s in busy if s["second"] >= busy[0]["second"] + min(60, (busy[-1]["second"] - busy[0]["second"]) / 2)
    ]
    third = max(1, len(settled) // 3)
    return {
        "memory": round(max(s["rss_mb"] for s in settled) / settled[0]["rss_mb"], 4),
        "files": max(s["files"] for s in settled[-third:]) - max(s["files"] for s in settled[:third]),
        "rss_mb_first": settled[0]["rss_mb"],
        "rss_mb_last": settled[-1]["rss_mb"],
    }


def as_markdown(report: dict[str, Any]) -> str:
    """Return a report as a page shows it."""
    counts = report["counts"]
    rows = [f"| {claim} | {'yes' if held else '**no**'} |" for claim, held in report["claims"].items()]
    statuses = ", ".join(f"{counts[name]:,} x {name[7:]}" for name in counts if name.startswith("status "))
    growth = report["growth"]
    lines = [
        f"{report['minutes']:g} minutes, {report['clients']} clients, {report['malformed_share']:.0%} malformed, "
        f"{report['date']}: {report['requests']:,} requests ({statuses}), {counts.get('lost', 0)} lost; "
        f"p50 {report['latency_ms']['p50']:.1f} ms, p99 {report['latency_ms']['p99']:.1f} ms.",
        f"Resident memory after the first minute and at the end: {growth['0']['rss_mb_first']:.0f} and "
        f"{growth['0']['rss_mb_last']:.0f} MB of the first server, {growth['1']['rss_mb_first']:.0f} and "
        f"{growth['1']['rss_mb_last']:.0f} MB of the second. The first drained in "
        f"{report['events'].get('drained_in_seconds', float('nan')):.1f} s.",
        "",
        "| claim | held |",
        "|---|---|",
        *rows,
    ]
    return "\n".join(lines)


def say(text: str) -> None:
    """Report progress."""
    print(text, file=sys.stderr, flush=True)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=128)
    parser.add_argument("--malformed", type=float, default=0.05, help="share of the requests")
    parser.add_argument("--out", help="file for the report")
    parser.add_argument("--report", metavar="FILE", help="print a filed report as markdown and do nothing else")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
