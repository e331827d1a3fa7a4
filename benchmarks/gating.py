"""Processor time of the self-checks: gating with and without them, and an export against one of a folded network.

python benchmarks/gating.py [--rounds 3] [--networks resnet20,torchvision:resnet50]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import machine

from zoo.data.vision import torchvision
from zoo.export.stencil import stencil_of
from zoo.gates.derive import folded_copy
from zoo.gates.rgn import RandomGatedNetwork, randomly_gate
from zoo.networks import build


def network(name: str) -> Any:
    """Return a network of ours, or of torchvision with 32 x 32 images, in evaluation mode."""
    if not name.startswith("torchvision:"):
        return build(name).eval()
    made = torchvision().models.get_model(name.partition(":")[2], weights=None, num_classes=10)
    made.image_shape = (3, 32, 32)
    return made.eval()


def seconds(work: Callable[[], object]) -> float:
    """Return the processor time of one call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    """Print a table on standard error and a JSON document on standard output."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--networks", default="resnet20,torchvision:resnet50")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, dict[str, float]] = {}
    for name in arguments.networks.split(","):
        plain = network(name)
        folded = folded_copy(plain)
        works: dict[str, Callable[[], object]] = {
            "gating, checked": lambda name=name: randomly_gate(network(name)),
            "gating, unchecked": lambda name=name: RandomGatedNetwork(network(name)),
            "folding, checked": lambda plain=plain: folded_copy(plain),
            "export": lambda plain=plain: stencil_of(plain, plain.image_shape),
            "export of the folded network": lambda plain=plain, folded=folded: stencil_of(folded, plain.image_shape),
        }
        for work in works.values():
            work()
        times = [{key: seconds(work) for key, work in works.items()} for _ in range(arguments.rounds)]
        found[name] = {key: round(statistics.median(row[key] for row in times), 3) for key in works}
        for key, value in found[name].items():
            print(f"{name:24} {key:30} {value:8.3f} s", file=sys.stderr)
    facts = {"machine": machine.machine(), "versions": machine.versions("torch", "onnxscript"), "date": machine.today()}
    print(json.dumps({**facts, "rounds": arguments.rounds, "seconds": found}))


if __name__ == "__main__":
    main()
