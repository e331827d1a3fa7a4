"""What a training step of every method costs, relative to standard training of one network of the same kind.

    python benchmarks/methods.py [--rounds 10] [--batch 64] [--device cuda]

ResNet-20, or the nearest network that has what the method needs: an RGN of it, three of them, MSDNet with 3 exits, a
LeNet with dropout. Steps of the method and of standard training take turns; the ratio of their times stands beside the
ratio of forward passes that the method predicts (`Objective.forwards`, a standard step being 3). The methods that draw
a layer draw another at every round. Precision and memory layout are those of each method's recipe for two cores. The
last line is one JSON document.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from datetime import UTC, datetime
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from training.methods import EXITS, MEMBERS, methods
from training.objectives import OBJECTIVES, Batch, Memory, MultiExit, Objective, Standard, Step
from training.recipes import Recipe, recipe
from zoo.gates.derive import Ensemble
from zoo.gates.rgn import randomly_gate
from zoo.networks import MNIST_FORMAT, build

ALLOWED = 1.3
"""Measured over predicted; beyond it the table says so."""


def networks(needs: str) -> tuple[str, nn.Module, nn.Module]:
    """Return the name of a kind of network, what the method trains, and what standard training trains beside it."""
    if needs == "several exits":
        return "msdnet3", build("msdnet3"), build("msdnet3")
    if needs == "dropout":
        made = [build("lenet", images=MNIST_FORMAT, dropout=0.5) for _ in range(2)]
        return "lenet", made[0], made[1]
    plain = build("resnet20")
    if needs == "several members":
        return f"{MEMBERS} x resnet20", Ensemble(build("resnet20") for _ in range(MEMBERS)), plain
    if needs == "gates":
        return "resnet20, 2 candidates", randomly_gate(build("resnet20"), candidates=2), plain
    return "resnet20", build("resnet20"), plain


def recipe_of(method: str) -> Recipe:
    """Return a method's recipe for two cores."""
    (row,) = [row for row in methods() if row.name == method]
    return recipe(next(name for name in row.recipes if name.endswith("-cpu")))


def measure(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return one row: predicted and measured cost of a method with its default settings."""
    objective: Objective = OBJECTIVES[name]()
    device = torch.device(options.device)
    kind, trained, beside = networks(objective.needs)
    baseline: Objective = MultiExit() if objective.needs == "several exits" else Standard()
    channels, height, width = beside.image_shape
    settings = {"method": recipe_of(name), "standard": recipe_of("standard")}
    memories: dict[str, Memory] = {"method": Memory(), "standard": Memory()}
    runs = {"method": (objective, trained), "standard": (baseline, beside)}
    seconds: dict[str, list[float]] = {"method": [], "standard": []}
    batches = {}
    for who, (_, model) in runs.items():
        layout = torch.channels_last if settings[who].channels_last else torch.contiguous_format
        model.to(device).train().to(memory_format=layout)
        batches[who] = [
            Batch(
                torch.rand(options.batch, channels, height, width, device=device).contiguous(memory_format=layout),
                torch.randint(0, 10, (options.batch,), device=device),
            )
            for _ in range(2)
        ]
    for number in range(-1, options.rounds):
        for who, (what, model) in runs.items():
            precision = torch.bfloat16 if settings[who].precision == "bf16" else torch.float32
            step = Step(seed=0, number=number + 1, precision=precision, epoch=number + 1, memory=memories[who])
            if device.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            model.zero_grad(set_to_none=True)
            what.accumulate(model, batches[who][: what.streams], step)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number >= 0:  # the first round warms up
                seconds[who].append(time.perf_counter() - started)
    forwards = objective.forwards(MEMBERS if objective.needs == "several members" else 1, EXITS)
    if objective.needs == "gates":
        forwards = objective.forwards()
    predicted = forwards / baseline.forwards()
    # the mean, not the median: a layer that is drawn belongs to the cost
    measured = statistics.mean(seconds["method"]) / statistics.mean(seconds["standard"])
    return {
        "method": name,
        "network": kind,
        "precision": settings["method"].precision,
        "channels_last": settings["method"].channels_last,
        "forwards": round(forwards, 1),
        "predicted": round(predicted, 2),
        "measured": round(measured, 2),
        "measured_over_predicted": round(measured / predicted, 2),
        "ms_per_image": round(1e3 * statistics.mean(seconds["method"]) / options.batch, 4),
        "standard_ms_per_image": round(1e3 * statistics.mean(seconds["standard"]) / options.batch, 4),
    }


def main() -> None:
    """Measure and print."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--rounds", type=int, default=10)
    arguments.add_argument("--batch", type=int, default=64)
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--methods", nargs="+", choices=tuple(OBJECTIVES), default=list(OBJECTIVES))
    options = arguments.parse_args()
    torch.manual_seed(0)
    load = os.getloadavg()[0]
    rows = []
    print("method            network                  predicted  measured  ratio", file=sys.stderr)
    for name in tqdm(options.methods, disable=not sys.stderr.isatty(), leave=False):
        row = measure(name, options)
        rows.append(row)
        mark = "  beyond 1.3" if row["measured_over_predicted"] > ALLOWED else ""
        print(
            f"{name:<18}{row['network']:<24}{row['predicted']:>10.2f}{row['measured']:>10.2f}"
            f"{row['measured_over_predicted']:>7.2f}{mark}",
            file=sys.stderr,
        )
    document = {
        "benchmark": "methods",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "load_at_start": round(load, 2),
        "versions": {"torch": torch.__version__, "manygates": importlib.metadata.version("manygates")},
        "settings": {"batch": options.batch, "rounds": options.rounds},
        "rows": rows,
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
