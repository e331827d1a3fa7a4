"""How fast the server is against ONNX Runtime itself and against other servers: the same graph and cores, in one run.

    python benchmarks/serving.py [MODEL]                     # raw ONNX Runtime and mode single: a minute
    python benchmarks/serving.py --peers                     # everything, ten minutes; needs peers/setup.sh once
    python benchmarks/serving.py --only ours,raw --clients 32
    python benchmarks/serving.py --only modes --seconds 2 --rounds 2
    python benchmarks/serving.py --report results/FILE.json  # the table of a filed run, as markdown

Parts, for --only:

    raw       ONNX Runtime's best batch size and threads, before and after; one image on all cores
    ours      the server in mode single
    modes     the server with a random gated network: single, random (a path per image), random-batch (a path per
              batch), int8, ensemble (each can be named alone: modes:single, modes:random, …)
    peers     mosec, Triton's front end, FastAPI; each can be named alone
    tune      the peers in other configurations (not part of --peers: to find their best)
    prefixes  what an ensemble of 4 or 8 paths with half in common costs, against one path (ensembles.py)
    memory    resident with all modes loaded, and over 100 000 requests
    start     from the start of the process to the first right answer
    install   size of the extra serve-cpu in a fresh environment (needs the package registry)

One image per request, 16 images in rotation, closed loop over keep-alive connections, `wrk` in a process of its own on
the same cores. Every round starts every server afresh, checks its answers, warms it up for a second and measures it at
each number of clients; raw ONNX Runtime is measured before and after each server, and a ratio is to the faster of the
two. A cell in which other processes used more than a quarter of a core, or in which wrk itself was held up, is
repeated, and flagged if it stays so; `processor_ratio` compares processor time per image instead, which suffers less.

Progress goes to standard error; the last line on standard output is JSON (--out files it).
"""

import argparse
import dataclasses
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = str(Path(__file__).resolve().parent)
# the project first, or `serving` would be this very file
sys.path[:] = [str(ROOT), *(entry for entry in sys.path if entry not in (str(ROOT), BENCHMARKS)), BENCHMARKS]

import machine  # noqa: E402
import servers  # noqa: E402
import serving_report  # noqa: E402
import wrk  # noqa: E402

from zoo.bundle.bundle import Bundle  # noqa: E402
from zoo.hub.source import open_model  # noqa: E402

_runtime: Any = onnxruntime  # its modules do not say what they export

PLAIN, GATED = "standard-resnet20-cifar10", "eio-resnet20-cifar10"
IMAGES = 16
CLIENTS = (1, 8, 32, 128)
MODES_CLIENTS = 32
BATCHES = (1, 8, 16, 32, 64)
MODES = ("single", "random", "random-batch", "int8", "ensemble")
PARTS = ("raw", "ours", "modes", "peers", "tune", "prefixes", "memory", "start", "install")
REPEATS = 2  # of a noisy cell, at most
FLAT_REQUESTS, FLAT_STEP = 100_000, 10_000
STARTS = 5


def main() -> None:
    """Measure, and print JSON last."""
    options = parse_arguments()
    if options.report:
        print(serving_report.markdown(json.loads(options.report.read_text())), end="")
        return
    began = time.perf_counter()
    run = Run(options)
    run.measure()
    document = run.document() | {"minutes": round((time.perf_counter() - began) / 60, 1)}
    text = json.dumps(document)
    if options.out:
        options.out.write_text(text + "\n")
    say("\n" + serving_report.markdown(document))
    print(text)
    if run.failed:
        sys.exit(f"failed: {json.dumps(run.failed)}")


class Raw:
    """ONNX Runtime alone on a graph, with float32 images: it need not convert what a client sends."""

    def __init__(self, graph: bytes, images: np.ndarray) -> None:
        """Prepare for uint8 images (image, channel, height, width)."""
        self.graph = graph
        self.images = images.astype(np.float32) / 255
        self.sessions = [self.session(1) for _ in range(machine.cores())]

    def session(self, intra_op: int) -> Any:
        """Return a session with ONNX Runtime's own defaults but for its threads."""
        settings = _runtime.SessionOptions()
        settings.intra_op_num_threads = intra_op
        return _runtime.InferenceSession(self.graph, settings, providers=["CPUExecutionProvider"])

    def answers(self) -> np.ndarray:
        """Return the probabilities of all images."""
        return np.asarray(self.sessions[0].run(["probabilities"], {"images": self.images})[0])

    def batch(self, size: int) -> dict[str, np.ndarray]:
        """Return the inputs of a batch of any size."""
        return {"images": np.resize(self.images, (size, *self.images.shape[1:]))}

    def arrangements(self, seconds: float) -> list[dict[str, Any]]:
        """Measure every batch size with a session per core and with one session over all cores; fastest first."""
        counts = {1, len(self.sessions)}
        tried = [
            {"batch": batch, "sessions": sessions, **self.rate(batch, sessions, seconds)}
            for batch in BATCHES
            for sessions in sorted(counts)
        ]
        return sorted(tried, key=lambda entry: -entry["per_second"])

    def rate(self, batch: int, sessions: int, seconds: float) -> dict[str, Any]:
        """Return images per second and processor milliseconds per image."""
        wide = sessions == 1 and len(self.sessions) > 1
        chosen = [self.session(machine.cores())] if wide else self.sessions
        counts = [0] * len(chosen)
        feeds = self.batch(batch)
        for session in chosen:
            session.run(["probabilities"], feeds)
        busy, cpu, start = machine.busy_seconds(), time.process_time(), time.perf_counter()

        def work(index: int) -> None:
            while time.perf_counter() < start + seconds:
                chosen[index].run(["probabilities"], feeds)
                counts[index] += batch

        threads = [threading.Thread(target=work, args=(index,)) for index in range(len(chosen))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        elapsed, cpu = time.perf_counter() - start, time.process_time() - cpu
        return {
            "per_second": round(sum(counts) / elapsed, 1),
            "cpu_ms_each": round(1000 * cpu / sum(counts), 4),
            "foreign_cores": machine.foreign(busy, start, cpu),
        }

    def lone(self, seconds: float) -> dict[str, Any]:
        """Return the latency of one image at a time on all cores, in milliseconds; the session is a new one."""
        session, feeds = self.session(machine.cores()), self.batch(1)
        for _ in range(100):
            session.run(["probabilities"], feeds)
        busy, cpu, start = machine.busy_seconds(), time.process_time(), time.perf_counter()
        taken: list[float] = []
        while (before := time.perf_counter()) < start + seconds:
            session.run(["probabilities"], feeds)
            taken.append(1000 * (time.perf_counter() - before))
        own = time.process_time() - cpu
        return {
            "per_second": round(len(taken) / (time.perf_counter() - start), 1),
            "p50_ms": round(float(np.percentile(taken, 50)), 4),
            "p99_ms": round(float(np.percentile(taken, 99)), 4),
            "foreign_cores": machine.foreign(busy, start, own),
        }


class Run:
    """One run: what is measured, and what was."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Open the models and work out what each server should answer."""
        self.options = options
        self.parts: set[str] = set(options.only)
        self.repeats_left: int = options.repeats
        self.result: dict[str, Any] = {"raw": {}, "cells": [], "servers": {}, "skipped": {}}
        self.failed: dict[str, str] = {}
        self.plain = open_model(options.model or PLAIN, only=("single.onnx",))
        self.gated_name = options.model or GATED
        self.gated = open_model(self.gated_name, only=())
        shape = self.plain.card.input
        self.images = np.random.default_rng(0).integers(
            0, 256, (IMAGES, shape.channels, shape.height, shape.width), np.uint8
        )
        self.raw = Raw(self.plain.read("single.onnx"), self.images)
        self.scratch = tempfile.TemporaryDirectory()

    def measure(self) -> None:
        """Do all parts that were asked for."""
        groups = self.groups()
        arrangement = None
        if groups or "raw" in self.parts:
            arrangement = self.search("before")
        for number in range(self.options.rounds if groups or arrangement else 0):
            self.round(number, groups)
        if groups and self.options.peers:
            self.search("after")
        for part in ("prefixes", "memory", "start", "install"):
            if part in self.parts:
                say(f"{part} …")
                try:
                    self.result[part] = getattr(self, f"measure_{part}")()
                except subprocess.CalledProcessError as error:
                    self.give_up(part, RuntimeError(f"{error}: {(error.stderr or '')[-300:]}"))
                except (servers.StartError, wrk.RequestError) as error:
                    self.give_up(part, error)
                else:
                    say(f"{part}: {json.dumps(self.result[part])}")
        self.scratch.cleanup()

    def groups(self) -> list[list[servers.Target]]:
        """Return the servers to measure in every round; those of a group share the raw measurements around it."""
        found = []
        if "ours" in self.parts:
            found.append([self.ours("ours", self.plain, right=close_to(self.raw.answers()))])
        for peer in self.peers():
            found.append([peer])
        modes = [self.mode(name) for name in MODES if {"modes", f"modes:{name}"} & self.parts]
        if any(modes):
            found.append([mode for mode in modes if mode])
        return found

    def peers(self) -> list[servers.Target]:
        """Return the peers that were asked for and are installed."""
        wanted = {name for name in serving_report.PEERS if {"peers", "tune", name} & self.parts}
        graph = Path(self.scratch.name) / "single.onnx"
        graph.write_bytes(self.raw.graph)
        found = []
        right = close_to(self.raw.answers())
        known = servers.peers(graph, self.images, right)
        if "tune" in self.parts:
            known = servers.other_peers(graph, self.images, right)
        for peer in known:
            if peer.name.partition(":")[0] not in wanted:
                continue
            if not (servers.PEERS / peer.name.partition(":")[0]).is_dir():
                self.give_up(peer.name, servers.StartError("not installed: run `sh benchmarks/peers/setup.sh`"))
            else:
                found.append(peer)
        return found

    def ours(self, name: str, bundle: Bundle, **more: Any) -> servers.Target:
        """Return our server on a bundle."""
        model = self.options.model or (PLAIN if bundle is self.plain else GATED)
        return servers.ours(name, model, bundle.card.name, self.images, **more)

    def mode(self, name: str) -> servers.Target | None:
        """Return our server with the random gated network in one of MODES, or None where the bundle lacks it."""
        needs = {"random": "gated", "random-batch": "gated", "ensemble": "ensemble"}.get(name, "single")
        full = f"modes:{name}"
        if needs not in self.gated.card.variants:
            self.result["skipped"][full] = f"{self.gated.card.name} has no variant {needs}"
            return None
        if name.startswith("random"):
            scope = "batch" if name.endswith("batch") else "image"
            return self.ours(full, self.gated, right=plausible, mode="random", settings={"gate_scope": scope})
        file = f"{needs}.int8.onnx" if name == "int8" else f"{needs}.onnx"
        if file not in self.gated.card.files:
            self.result["skipped"][full] = f"{self.gated.card.name} has no {file}"
            return None
        expected = Raw(open_model(self.gated_name, only=(file,)).read(file), self.images).answers()
        settings = {"precision": "int8"} if name == "int8" else {}
        tolerance = 0.02 if name == "int8" else 1e-5  # int8 kernels may round otherwise in a batch of another size
        return self.ours(full, self.gated, right=close_to(expected, tolerance), mode=needs, settings=settings)

    def search(self, when: str) -> dict[str, Any]:
        """Find the fastest way to run the graph, and keep it for the rounds."""
        tried = self.raw.arrangements(max(0.4, self.options.seconds / 8))
        say(f"raw {when}: {json.dumps(tried[:3])}")
        self.result["raw"][when] = tried
        if when == "before":
            self.arrangement = {"batch": tried[0]["batch"], "sessions": tried[0]["sessions"]}
            self.result["raw"]["arrangement"] = self.arrangement
        return self.arrangement

    def round(self, number: int, groups: list[list[servers.Target]]) -> None:
        """Measure raw, a server, raw, a server … raw; the servers in another order each time."""
        shift = number % max(1, len(groups))
        before = self.raw_cell(number)
        if 1 in self.options.clients:
            lone = self.repeated(lambda: self.raw.lone(max(0.5, self.options.seconds / 4)))
            self.result["raw"].setdefault("lone", []).append(lone)
            say(f"round {number + 1}: one image on all cores: {json.dumps(lone)}")
        for group in groups[shift:] + groups[:shift]:
            cells = []
            for target in group:
                if target.about not in self.result["skipped"] and target.name not in self.result["skipped"]:
                    cells += self.server(target, number)
            after = self.raw_cell(number)
            best = max(before, after, key=lambda cell: cell["per_second"])
            for cell in cells:
                cell["raw_per_second"] = best["per_second"]
                cell["quiet"] = cell["quiet"] and before["quiet"] and after["quiet"]
                cell["ratio"] = round(cell["per_second"] / best["per_second"], 4)
                cell["processor_ratio"] = round(
                    best["cpu_ms_each"] / max(1e-9, cell["cpu_ms_each"] + cell["generator_cpu_ms_each"]), 4
                )
                say(f"  {json.dumps(cell)}")
            self.result["cells"] += cells
            before = after

    def raw_cell(self, number: int) -> dict[str, Any]:
        """Measure raw ONNX Runtime once."""
        seconds = max(1.0, self.options.seconds / 2)
        cell = self.repeated(lambda: self.raw.rate(**self.arrangement, seconds=seconds))
        say(f"round {number + 1}: raw: {json.dumps(cell)}")
        self.result["raw"].setdefault("rounds", []).append({"round": number + 1, **cell})
        return cell

    def server(self, target: servers.Target, number: int) -> list[dict[str, Any]]:
        """Start a server and measure it at each number of clients."""
        many = self.options.clients
        clients = (
            many if not target.name.startswith("modes:") else [MODES_CLIENTS if MODES_CLIENTS in many else many[-1]]
        )
        say(f"round {number + 1}: {target.about}")
        cells: list[dict[str, Any]] = []
        try:
            with servers.running(target) as server:
                size = server.check()
                wrk.load(server.url, target.bodies, target.headers, clients=clients[0], seconds=1)
                for count in clients:
                    cell = self.repeated(lambda count=count: self.loaded(server, count, self.options.seconds))  # type: ignore[misc]
                    if abs(cell["bytes_each"] / size - 1) > 0.03:
                        raise wrk.RequestError(
                            f"answers under load have {cell['bytes_each']} bytes, expected {size:.0f} as when checked"
                        )
                    place = {"server": target.name, "clients": count, "round": number + 1}
                    cells.append({**place, **cell, "seconds_to_first_answer": server.seconds_to_first_answer})
                held = machine.memory(server.processes()) | {"processes": len(server.processes())}
        except (servers.StartError, wrk.RequestError) as error:
            self.give_up(target.name, error)
            return []
        self.result["servers"][target.name] = {"about": target.about, **held}
        return cells

    def loaded(self, server: servers.Running, clients: int, seconds: float) -> dict[str, Any]:
        """Load a server once; returns rate, latencies, and processor time per request."""
        pids = server.processes()
        busy, start, own = machine.busy_seconds(), time.perf_counter(), time.process_time()
        cpu, children = machine.cpu_seconds(pids), resource.getrusage(resource.RUSAGE_CHILDREN)
        target = server.target
        cell = wrk.load(server.url, target.bodies, target.headers, clients=clients, seconds=round(seconds))
        cpu, after = machine.cpu_seconds(pids) - cpu, resource.getrusage(resource.RUSAGE_CHILDREN)
        generator = after.ru_utime + after.ru_stime - children.ru_utime - children.ru_stime
        cell["cpu_ms_each"] = round(1000 * cpu / cell["requests"], 4)
        cell["generator_cpu_ms_each"] = round(1000 * generator / cell["requests"], 4)
        cell["foreign_cores"] = machine.foreign(busy, start, cpu + generator + time.process_time() - own)
        cell["overrun"] = round(max(0.0, cell["seconds"] / max(1, round(seconds)) - 1.1), 2)
        return cell

    def repeated(self, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Measure again while other processes disturb, a few times; the quietest counts."""
        best = measure()
        tries = 0
        while disturbance(best) >= machine.QUIET and tries < REPEATS and self.repeats_left > 0:
            tries += 1
            self.repeats_left -= 1
            best = min(best, measure(), key=disturbance)
        return best | {"repeated": tries, "quiet": disturbance(best) < machine.QUIET}

    def give_up(self, name: str, error: Exception) -> None:
        """Note that something cannot be measured; a server that refuses a setting is skipped, wrong answers fail."""
        say(f"skipped {name}: {error}")
        self.result["skipped"][name] = str(error)[:600]
        if isinstance(error, wrk.RequestError):
            self.failed[name] = str(error)[:600]

    def measure_prefixes(self) -> dict[str, Any]:
        """Let benchmarks/ensembles.py compare ensembles whose paths begin alike with one path."""
        script = str(Path(__file__).with_name("ensembles.py"))
        command = [sys.executable, script, "--members", "4", "8", "--batch", "32"]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        measured = json.loads(done.stdout.splitlines()[-1])
        costs = {row["graph"]: row["batch 32"]["cost"] for row in measured["graphs"]}
        return {"costs": costs, "measured": measured}

    def measure_memory(self) -> dict[str, Any]:
        """Load all modes of the random gated network, and watch memory over many requests of all of them."""
        modes = [
            "single",
            *(
                mode
                for mode, needs in (("ensemble", "ensemble"), ("random", "gated"))
                if needs in self.gated.card.variants
            ),
        ]
        target = self.all_modes(modes)
        try:
            return self.watch_memory(target, modes)
        except servers.StartError as error:
            say(f"not all modes in one process: {error}")
            self.result["skipped"]["memory: all modes"] = str(error)[:600]
            return self.watch_memory(self.ours("memory", self.gated, right=plausible), ["single"])

    def all_modes(self, modes: list[str]) -> servers.Target:
        """Return our server with the choice of modes left to requests, and requests of all of them in rotation."""
        heads = [servers.open_inference_bodies(self.images, {"mode": mode}) for mode in modes]
        lengths = [int(headers["Inference-Header-Content-Length"]) for _, headers in heads]
        bodies = []
        for image in range(IMAGES):
            for (made, _), length in zip(heads, lengths, strict=True):
                body = made[image]  # JSON may end in spaces, so that all heads are of one length
                bodies.append(body[:length] + b" " * (max(lengths) - length) + body[length:])
        target = self.ours("memory", self.gated, right=plausible, settings={"allow_mode_choice": "true"})
        headers = {**target.headers, "Inference-Header-Content-Length": str(max(lengths))}
        return dataclasses.replace(target, bodies=tuple(bodies), headers=headers)

    def watch_memory(self, target: servers.Target, modes: list[str]) -> dict[str, Any]:
        """Return what a server holds after its warm-up and after every 10 000 requests."""

        def held() -> dict[str, float]:
            return machine.memory(server.processes())

        with servers.running(target) as server:
            started = held()
            server.check()
            wrk.load(server.url, target.bodies, target.headers, clients=32, seconds=2)
            samples = [held() | {"requests": 0}]
            done, rate = 0, 1000.0
            while done < FLAT_REQUESTS:
                due = len(samples) * FLAT_STEP
                while done < due:  # wrk counts seconds, not requests
                    seconds = max(1, int((due - done) / rate))
                    part = wrk.load(server.url, target.bodies, target.headers, clients=32, seconds=min(10, seconds))
                    done, rate = done + part["requests"], part["per_second"]
                samples.append(held() | {"requests": done})
        resident = [sample["resident_mb"] for sample in samples]
        return {
            "about": target.about,
            "modes": modes,
            "at_start": started,
            **{key: samples[0][key] for key in ("resident_mb", "pss_mb")},
            "highest_resident_mb": max(resident),
            "growth": round(max(resident) / resident[0] - 1, 4),
            "requests": done,
            "samples": samples,
        }

    def measure_start(self) -> dict[str, Any]:
        """Time several starts up to the first answer, which must be right."""
        seconds = []
        target = self.ours("start", self.plain, right=close_to(self.raw.answers()))
        for _ in range(STARTS):
            with servers.running(target) as server:
                seconds.append(server.seconds_to_first_answer)
        return {"about": target.about, "seconds": seconds, "median": statistics.median(seconds)}

    def measure_install(self) -> dict[str, Any]:
        """Install the extra serve-cpu into a fresh environment, and weigh it."""
        extra = "serve-cpu"
        if f"{extra} = [" not in (ROOT / "pyproject.toml").read_text():
            raise servers.StartError(f"pyproject.toml has no extra {extra}")
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, "-m", "venv", folder], check=True)
            pip = [f"{folder}/bin/python", "-m", "pip", "--disable-pip-version-check"]
            subprocess.run([*pip, "install", "--quiet", f"{ROOT}[{extra}]"], check=True, capture_output=True, text=True)
            listed = subprocess.run([*pip, "list", "--format=json"], check=True, capture_output=True, text=True).stdout
            packages = next(Path(folder).glob("lib/python3*/site-packages"))
            installers = ("pip", "setuptools", "pkg_resources", "_distutils_hack", "distutils-precedence")
            for entry in packages.iterdir():
                if entry.name.partition("-")[0] in installers or entry.name == "distutils-precedence.pth":
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            sizes = {
                entry.name: sum(file.stat().st_size for file in [entry, *entry.rglob("*")] if file.is_file())
                for entry in packages.iterdir()
            }
        largest = sorted(sizes.items(), key=lambda item: -item[1])[:8]
        return {
            "extra": extra,
            "megabytes": round(sum(sizes.values()) / 1e6, 1),
            "largest_mb": {name: round(size / 1e6, 1) for name, size in largest},
            "packages": {entry["name"]: entry["version"] for entry in json.loads(listed)},
        }

    def document(self) -> dict[str, Any]:
        """Return everything that was measured, and what it depends on."""
        document = {
            "benchmark": "serving",
            "plain_model": self.plain.card.name,
            "gated_model": self.gated.card.name,
            **self.result,
            "failed": self.failed,
            "seconds_per_cell": self.options.seconds,
            "rounds": self.options.rounds,
            "parts": sorted(self.parts),
            "load_generator": "wrk",
            **machine.machine(),
            "versions": machine.versions("onnxruntime-gpu", "onnxruntime", "numpy", "uvloop", "httptools", "uvicorn"),
            "date": machine.today(),
        }
        return document | {"summary": serving_report.summary(document)}


def disturbance(cell: dict[str, Any]) -> float:
    """Return how many cores others used, or, if that is more, by how much the load generator itself was held up."""
    return float(max(cell["foreign_cores"] or 0.0, cell.get("overrun", 0.0)))


def close_to(expected: np.ndarray, tolerance: float = 1e-5) -> servers.Right:
    """Return what says whether an image's probabilities are those of a row of `expected`."""
    return lambda index, answer: (
        answer.shape == expected.shape[1:] and bool(np.allclose(answer, expected[index], rtol=0, atol=tolerance))
    )


def plausible(_: int, answer: np.ndarray) -> bool:
    """Say whether an answer is a distribution: all that is known of one along a path that nobody knows."""
    return answer.size > 1 and bool(np.isfinite(answer).all() and (answer >= 0).all() and abs(answer.sum() - 1) < 1e-4)


def say(text: str) -> None:
    """Report progress."""
    print(text, file=sys.stderr, flush=True)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or ""), formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", nargs="?", help=f"for every part; {PLAIN} and {GATED} (for modes) by default")
    parser.add_argument("--peers", action="store_true", help="everything but tune")
    parser.add_argument("--only", type=words, metavar="PART[,PART…]", help="these parts")
    parser.add_argument("--clients", type=numbers, default=list(CLIENTS), metavar="N[,N…]")
    parser.add_argument("--seconds", type=float, default=4.0, help="of a cell, at least 1")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--repeats", type=int, default=20, help="of noisy cells, in all: on a busy machine it shall end"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON there, too")
    parser.add_argument("--report", type=Path, metavar="FILE", help="print the table of a filed run, measure nothing")
    options = parser.parse_args()
    if options.only is None:
        options.only = [part for part in PARTS if part != "tune"] if options.peers else ["raw", "ours"]
    return options


def words(text: str) -> list[str]:
    """Read the parts to measure."""
    known = {*PARTS, *serving_report.PEERS, *(f"modes:{name}" for name in MODES)}
    found = text.split(",")
    if wrong := set(found) - known:
        raise argparse.ArgumentTypeError(f"{sorted(wrong)} is unknown, expected some of {', '.join(sorted(known))}")
    return found


def numbers(text: str) -> list[int]:
    """Read numbers of clients."""
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
