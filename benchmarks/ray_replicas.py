"""Requests per second through a local Ray Serve, with one replica and with two, beside the server without Ray.

    python benchmarks/ray_replicas.py [--clients 32] [--seconds 8] [--replicas 1 2]

It needs manygates[ray] and `wrk`. Everything runs on this machine: the load, Ray's proxy and controller, and the
replicas, each with one core reserved. So on two cores this tells what Ray costs, not how it scales. One image per
request, as a binary UINT8 tensor; every replica's first answers are compared with those of the server alone.

The last line is JSON.
"""

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import wrk
import yaml

ROOT = Path(__file__).resolve().parents[1]
MODEL = "standard-resnet20-cifar10"
PATIENCE = 120.0


def main() -> None:
    """Measure and print."""
    commands = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands.add_argument("--clients", type=int, default=32)
    commands.add_argument("--seconds", type=int, default=8)
    commands.add_argument("--replicas", type=int, nargs="+", default=[1, 2])
    arguments = commands.parse_args()
    images = np.random.default_rng(0).integers(0, 256, (16, 1, 3, 32, 32), dtype=np.uint8)
    header = {
        "inputs": [
            {"name": "images", "shape": [1, 3, 32, 32], "datatype": "UINT8", "parameters": {"binary_data_size": 3072}}
        ],
        "outputs": [{"name": "probabilities", "parameters": {"binary_data": True}}],
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    headers = {"Inference-Header-Content-Length": str(len(text)), "Content-Type": "application/octet-stream"}
    bodies = [text + image.tobytes() for image in images]
    rows: dict[str, Any] = {}
    answers = None
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        for replicas in [0, *arguments.replicas]:
            with running(Path(folder), replicas) as url:
                infer = f"{url}/v2/models/{MODEL}/infer"
                # at 40 requests the answers of every replica are among those compared, but for bad luck
                said = np.array([[ask(infer, body, headers) for body in bodies] for _ in range(40 if replicas else 1)])
                answers = said[0] if answers is None else answers
                np.testing.assert_allclose(said, np.broadcast_to(answers, said.shape), rtol=1e-3, atol=1e-6)
                name = f"{replicas} replicas" if replicas else "without Ray"
                wrk.load(infer, bodies, headers, clients=arguments.clients, seconds=2)
                one = wrk.load(infer, bodies, headers, clients=1, seconds=arguments.seconds)
                many = wrk.load(infer, bodies, headers, clients=arguments.clients, seconds=arguments.seconds)
                rows[name] = {"1": one, str(arguments.clients): many}
                for clients, row in rows[name].items():
                    print(
                        f"{name:12} {clients:>3} clients {row['per_second']:8.1f}/s  p50 {row['p50_ms']:7.2f} ms  "
                        f"p99 {row['p99_ms']:7.2f} ms",
                        file=sys.stderr,
                    )
    print(json.dumps({"model": MODEL, "cores": os.cpu_count(), "rows": rows}))


def ask(url: str, body: bytes, headers: dict[str, str]) -> np.ndarray:
    """Return the probabilities of one image."""
    with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=30) as answer:
        content = answer.read()
        return np.frombuffer(content[int(answer.headers["Inference-Header-Content-Length"]) :], dtype=np.float32)


@contextlib.contextmanager
def running(folder: Path, replicas: int) -> Iterator[str]:
    """Start deploy/ray.yaml with so many replicas, or for 0 the server alone; yields the URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": str(folder)}
    command = [sys.executable, "-m", "manygates", "serve", MODEL, "--port", str(port)]
    if replicas:
        config = yaml.safe_load((ROOT / "deploy" / "ray.yaml").read_text(encoding="utf-8"))
        config["http_options"]["port"] = port
        (deployment,) = config["applications"][0]["deployments"]
        deployment["autoscaling_config"] = {"min_replicas": replicas, "max_replicas": replicas}
        file = folder / "ray.yaml"
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
        command = [sys.executable, "-c", "from ray.serve.scripts import cli; cli()", "run", str(file)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=folder)
    try:
        wait(process, f"http://127.0.0.1:{port}/v2/health/ready", folder / "log")
        if replicas:  # the first is ready before the last
            time.sleep(5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Return when the server is ready."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2):
            return
        time.sleep(0.2)
    sys.exit(f"the server did not start:\n{log.read_text(encoding='utf-8', errors='replace')[-3000:]}")


if __name__ == "__main__":
    main()
