"""What an ensemble of paths costs beside one path, when the paths begin alike: processor time, in one run.

    python benchmarks/ensembles.py [--members 2 4 8] [--batch 1 32] [--rounds 20] [--prefix 10] [--out FILE]

The work: a random gated ResNet-20 with random weights, exported as `manygates export` does it, on ONNX Runtime with one
thread. `one path` is single.onnx. An ensemble's paths agree on the first `--prefix` gates; 10 of the 19 are half of the
multiply-accumulates. Behind them there are two cases:

    drawn     paths of a network with 2 candidates, as models are trained, drawn at random: some agree a little further
    disjoint  paths of a network with as many candidates as members, which have nothing else in common: the worst case

The graphs take turns, call by call. Costs are in units of one path; `least` is what the multiply-accumulates of the
graph alone would cost. It is checked that every ensemble answers with the mean probability of its paths. `nodes` counts
what ONNX Runtime made of a graph: a change of memory layout, or an addition or activation that stands by itself instead
of in a convolution, would say why it is slow.

Progress goes to standard error; the last line on standard output is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = str(Path(__file__).resolve().parent)
# the project first, or `serving` would be the script beside this one
sys.path[:] = [str(ROOT), *(entry for entry in sys.path if entry not in (str(ROOT), BENCHMARKS)), BENCHMARKS]

import machine  # noqa: E402

import manygates  # noqa: E402
from zoo import paths  # noqa: E402
from zoo.export import onnx_graphs  # noqa: E402
from zoo.gates.derive import derive  # noqa: E402
from zoo.gates.rgn import RandomGatedNetwork, randomly_gate  # noqa: E402
from zoo.networks import build  # noqa: E402

TOLERANCE = 1e-5
WATCHED = ("Conv", "ReorderInput", "ReorderOutput", "Relu", "Add")
BARS = {(4, 32): 2.6, (8, 32): 4.7}
"""(members, batch) -> the most that an ensemble may cost with half of the layers in common."""

_runtime: Any = onnxruntime


def network(candidates: int) -> RandomGatedNetwork:
    """Return a random gated ResNet-20 with random weights whose BatchNorms are not trivial."""
    torch.manual_seed(0)
    gated = randomly_gate(build("resnet20"), candidates=candidates)
    for module in gated.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            nn.init.normal_(module.running_mean, 0, 0.2)
            assert module.running_var is not None
            nn.init.uniform_(module.running_var, 0.5, 2)
    return gated.eval()


def chosen_paths(gated: RandomGatedNetwork, members: int, prefix: int, *, disjoint: bool) -> list[paths.Path]:
    """Return distinct paths that agree on the first `prefix` gates; disjoint ones on no other."""
    if disjoint:
        return [(0,) * prefix + (member,) * (gated.num_gates - prefix) for member in range(members)]
    rng = random.Random(0)
    behind = paths.sample_distinct(members, gated.num_gates - prefix, gated.candidates, rng)
    return [(0,) * prefix + path for path in behind]


def session(content: bytes, dump: Path | None = None) -> Any:
    """Open a graph with one thread, as the server does; write down what ONNX Runtime made of it."""
    options = _runtime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if dump is not None:
        options.optimized_model_filepath = str(dump)
    return _runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def optimised(content: bytes) -> dict[str, int]:
    """Count the nodes of the optimised graph that matter for its speed."""
    with tempfile.TemporaryDirectory() as folder:
        dump = Path(folder) / "optimised.onnx"
        session(content, dump)
        kinds = Counter(node.op_type for node in onnx.load(dump).graph.node)
    return {kind: kinds[kind] for kind in WATCHED}


def least(gated: RandomGatedNetwork, ensemble: bytes) -> float:
    """Return the multiply-accumulates of an ensemble's graph in units of one path."""
    plain = derive(gated, (0,) * gated.num_gates)
    costs: dict[str, int] = {}

    def counting(name: str) -> Any:
        def count(layer: nn.Module, _: object, output: torch.Tensor) -> None:
            costs[f"{name}.weight"] = output[0].numel() * layer.get_parameter("weight")[0].numel()

        return count

    for name, layer in plain.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.register_forward_hook(counting(name))
    with torch.no_grad():
        plain(torch.zeros(1, 3, 32, 32))
    nodes = [node for node in onnx.load_from_string(ensemble).graph.node if node.op_type in ("Conv", "Gemm")]
    return sum(costs[node.input[1].partition("/")[0]] for node in nodes) / sum(costs.values())


def check(gated: RandomGatedNetwork, taken: list[paths.Path], opened: Any, images: np.ndarray) -> None:
    """Stop unless the ensemble answers with the mean probability of its paths."""
    with torch.no_grad():
        mean = torch.stack([gated(torch.from_numpy(images), path).softmax(1) for path in taken]).mean(0)
    (answered,) = opened.run(["probabilities"], {"images": images})
    worst = float(np.abs(answered - mean.numpy()).max())
    if worst > TOLERANCE:
        raise SystemExit(f"the ensemble of {len(taken)} is off by {worst:.1e}, more than {TOLERANCE:.0e}")


def milliseconds(sessions: dict[str, Any], images: np.ndarray, rounds: int) -> dict[str, float]:
    """Return the median processor time of a call; the graphs take turns."""
    for opened in sessions.values():
        for _ in range(3):
            opened.run(None, {"images": images})
    spent: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(rounds):
        for name, opened in sessions.items():
            begin = time.process_time()
            opened.run(None, {"images": images})
            spent[name].append(1000 * (time.process_time() - begin))
    return {name: statistics.median(each) for name, each in spent.items()}


def say(text: str) -> None:
    """Report progress."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Measure, and print JSON last."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--members", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--prefix", type=int, default=10, help="gates that the paths have in common, of 19")
    parser.add_argument("--out", type=Path, help="write the JSON to this file too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    busy, began, own = machine.busy_seconds(), time.perf_counter(), time.process_time()
    images = np.random.default_rng(0).random((max(options.batch), 3, 32, 32), dtype=np.float32)
    sessions: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    two = network(2)
    for members in options.members:
        for case in ("drawn", "disjoint"):
            gated = network(members) if case == "disjoint" else two
            taken = chosen_paths(gated, members, options.prefix, disjoint=case == "disjoint")
            graphs = onnx_graphs.rgn_graphs(gated, taken[0], taken, gated=False)
            if not sessions:
                sessions["one path"] = session(graphs["single"])
                rows.append({"graph": "one path", "members": 1, "least": 1.0, "nodes": optimised(graphs["single"])})
            name = f"{members} {case}"
            sessions[name] = session(graphs["ensemble"])
            check(gated, taken, sessions[name], images)
            rows.append(
                {
                    "graph": name,
                    "members": members,
                    "paths": [paths.format_path(path) for path in taken],
                    "least": round(least(gated, graphs["ensemble"]), 3),
                    "nodes": optimised(graphs["ensemble"]),
                }
            )
    for batch in options.batch:
        spent = milliseconds(sessions, np.ascontiguousarray(images[:batch]), options.rounds)
        for row in rows:
            each = spent[row["graph"]]
            row[f"batch {batch}"] = {"milliseconds": round(each, 3), "cost": round(each / spent["one path"], 3)}
            bar = BARS.get((row["members"], batch))
            said = "" if bar is None else f" (at most {bar})"
            cost = row[f"batch {batch}"]["cost"]
            say(f"batch {batch}, {row['graph']}: {each:.2f} ms, {cost:.2f} of one path{said}, least {row['least']:.2f}")
    foreign = machine.foreign(busy, began, time.process_time() - own)
    document = {
        "benchmark": "ensembles",
        "network": "resnet20",
        "gates": two.num_gates,
        "prefix": options.prefix,
        "rounds": options.rounds,
        "graphs": rows,
        "foreign_cores": foreign,
        "quiet": (foreign or 0) < machine.QUIET,
        "threads": 1,
        **machine.machine(),
        "versions": {**machine.versions("onnxruntime-gpu", "onnxruntime", "torch"), "manygates": manygates.__version__},
        "date": machine.today(),
    }
    line = json.dumps(document)
    if options.out is not None:
        options.out.write_text(line + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    main()
