"""How fast training is, as ratios within one run on a quiet machine.

    python benchmarks/train_step.py [--rounds 1]

1. One batch of `ensemble_in_one` (ResNet-20, p = 3, 10 distillation steps, every layer l once) against the same
   computation done plainly: fp32, contiguous images, both features recomputed at every distillation step, gradients of
   the parameters accumulated along the way.
2. Training a random gated ResNet-20 along one path against training the plain template.

The variants take turns, so that a drift of the machine meets all of them. The last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional as F

from training.objectives import Batch, EnsembleInOne, Standard, Step
from zoo.gates.rgn import RandomGatedNetwork, randomly_gate
from zoo.networks import build
from zoo.paths import sample_distinct


def plain_step(
    rgn: RandomGatedNetwork, objective: EnsembleInOne, layer: int, source: Batch, target: Batch, step: Step
) -> None:
    """Ensemble-in-One's step without any of our savings; the same formulas, the same paths and layer."""
    from training.randomness import gate_generator, tensor_generator

    rng = gate_generator(step.seed, "gates", step.number)
    assert rng.randint(1, rgn.num_features) == layer  # the objective's first draw
    within = min(layer, rgn.num_gates)
    chosen = sample_distinct(
        min(objective.paths, rgn.candidates**within), rgn.num_gates, rgn.candidates, rng, within=within
    )
    distilled = []
    for number, path in enumerate(chosen):
        generator = tensor_generator(step.seed, "distil", step.number, number, 0)
        noise = torch.rand(source.images.shape, generator=generator)
        images = (source.images + objective.eps * (2 * noise - 1)).clamp(0, 1)
        rgn.eval()
        for _ in range(objective.distillation_steps):
            images = images.detach().requires_grad_(True)
            with torch.no_grad():
                wanted = rgn.runner(layer, rgn.select(path), activated=objective.activated)(target.images)
            found = rgn.runner(layer, rgn.select(path), activated=objective.activated)(images)
            F.mse_loss(found, wanted).backward()
            assert images.grad is not None
            moved = images.detach() - objective.eps / objective.distillation_steps * images.grad.sign()
            low, high = source.images - objective.eps, source.images + objective.eps
            images = torch.minimum(torch.maximum(moved, low), high).clamp(0, 1)
        rgn.train()
        distilled.append(images.detach())
    rgn.zero_grad(set_to_none=True)
    for number, path in enumerate(chosen):
        others = [images for other, images in enumerate(distilled) if other != number]
        loss = torch.stack([F.cross_entropy(rgn(images, path), source.labels) for images in others]).sum()
        (loss / len(chosen)).backward()


def take_turns(variants: dict[str, Callable[[int], None]], rounds: int) -> dict[str, float]:
    """Return median seconds per call; the variants alternate."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds):
        for name, run in variants.items():
            started = time.perf_counter()
            run(number)
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def layer_of(step: Step, rgn: RandomGatedNetwork) -> int:
    """Return the layer that the objective draws at a step."""
    from training.randomness import gate_generator

    return gate_generator(step.seed, "gates", step.number).randint(1, rgn.num_features)


def main() -> None:
    """Measure and print."""
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--rounds", type=int, default=1)
    arguments.add_argument("--batch", type=int, default=128)
    options = arguments.parse_args()
    torch.manual_seed(0)
    images = [torch.rand(options.batch, 3, 32, 32) for _ in range(2)]
    labels = torch.randint(0, 10, (options.batch,))
    contiguous = [Batch(image, labels) for image in images]
    blocked = [Batch(image.contiguous(memory_format=torch.channels_last), labels) for image in images]
    objective = EnsembleInOne.release()

    rgn_plain = randomly_gate(build("resnet20")).train()
    rgn_fast = randomly_gate(build("resnet20")).train().to(memory_format=torch.channels_last)
    template = build("resnet20").train().to(memory_format=torch.channels_last)

    # One step number per layer, so that both variants run every layer once per round.
    fast_step = Step(seed=0, number=0, precision=torch.bfloat16)
    numbers: dict[int, int] = {}
    for number in range(10_000):
        numbers.setdefault(layer_of(replace(fast_step, number=number), rgn_fast), number)
        if len(numbers) == rgn_fast.num_features:
            break

    def ours(layer: int) -> Callable[[int], None]:
        def run(_: int) -> None:
            rgn_fast.zero_grad(set_to_none=True)
            objective.accumulate(rgn_fast, blocked, replace(fast_step, number=numbers[layer]))

        return run

    def plainly(layer: int) -> Callable[[int], None]:
        return lambda _: plain_step(rgn_plain, objective, layer, *contiguous, Step(seed=0, number=numbers[layer]))

    eio = {"plain": 0.0, "ours": 0.0}
    for layer in sorted(numbers):
        measured = take_turns({"plain": plainly(layer), "ours": ours(layer)}, options.rounds)
        eio = {name: eio[name] + measured[name] for name in eio}
        print(f"layer {layer}: {measured['plain']:.2f} s plainly, {measured['ours']:.2f} s ours", file=sys.stderr)

    def train_on(model: nn.Module) -> Callable[[int], None]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)

        def run(number: int) -> None:
            optimizer.zero_grad(set_to_none=True)
            Standard().accumulate(model, blocked[:1], replace(fast_step, number=number))
            optimizer.step()

        return run

    steps = {"template": train_on(template), "gated": train_on(rgn_fast)}
    take_turns(steps, 3)  # warm-up
    gated = take_turns(steps, 20 * options.rounds)
    document = {
        "benchmark": "training",
        "hardware": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "batch": options.batch,
        "eio_step_seconds": {name: round(value / len(numbers), 4) for name, value in eio.items()},
        "eio_speedup": round(eio["plain"] / eio["ours"], 2),
        "gated_step_seconds": {name: round(value, 4) for name, value in gated.items()},
        "gated_over_template": round(gated["gated"] / gated["template"], 3),
    }
    print(json.dumps(document))


if __name__ == "__main__":
    main()
