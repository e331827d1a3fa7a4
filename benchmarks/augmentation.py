"""How fast augmentation is, ours in batches against torchvision's image by image, in one run.

    python benchmarks/augmentation.py [--batch 128] [--rounds 20] [--threads 1] [--out FILE]

The work: crop and flip, then AutoAugment's policy for CIFAR-10; and crop and flip, then two mixtures by AugMix, beside
the crop itself. torchvision draws once per call, so its transforms are called image by image, as a loader would. Both
crop and flip alike, in one batch, which is timed by itself too (`crop_flip`).

The variants take turns, batch by batch. They draw from different generators, so their images cannot be compared one by
one (`tests/training/test_augmentation.py` does, for the same draws); what is checked here is that over the whole run
they change a pixel by as much on average, within a tenth. `quiet` says whether other processes used less than a quarter
of a core; `processor_ratio` suffers less from them.

A training step that uses the views takes its turn as well: a ResNet-20 in float32, with AugMix's consistency where
there are three views. In bfloat16, where the processor has it, a step is cheaper and augmentation weighs more.
`training_ratio` is the processor time of augmentation and step together, relative to ours: 1.1 means that a run takes
a tenth longer.

Progress goes to standard error; the last line on standard output is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import machine
import torch
from torch import Tensor

import manygates
from training.augmentation import EWS_SEVERITY, augmented
from training.objectives import Batch, Standard, Step
from zoo.data import datasets
from zoo.data.vision import torchvision, transforms
from zoo.networks import build

AGREEMENT = 0.1

# Pixels and a generator -> the crops and what became of them.
Variant = Callable[[Tensor, torch.Generator], list[Tensor]]


def ours(name: str, views: int) -> Variant:
    """Return our augmentation in batches."""

    def run(pixels: Tensor, generator: torch.Generator) -> list[Tensor]:
        return augmented(name, pixels, generator, flip=True, views=views)

    return run


def image_by_image(name: str, views: int) -> Variant:
    """Return torchvision's transform, called once for each image."""
    v2 = transforms()
    if name == "autoaugment":
        transform = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)
    else:
        transform = v2.AugMix(severity=EWS_SEVERITY, all_ops=False)

    def run(pixels: Tensor, generator: torch.Generator) -> list[Tensor]:
        cropped = datasets.augment(pixels, generator).contiguous()
        made = [torch.stack([transform(image) for image in cropped]) for _ in range(max(views - 1, 1))]
        return made if views == 1 else [cropped, *made]

    return run


TASKS: dict[str, dict[str, Variant]] = {
    "crop_flip": {"ours": ours("crop_flip", 1)},
    "autoaugment": {"image by image": image_by_image("autoaugment", 1), "ours": ours("autoaugment", 1)},
    "augmix, 3 views": {"image by image": image_by_image("augmix", 3), "ours": ours("augmix", 3)},
}


def training_step(views: int) -> Callable[[list[Tensor]], None]:
    """Return a training step of ResNet-20 on augmented pixels."""
    network = build("resnet20").train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    objective = Standard(consistency=12.0) if views > 1 else Standard()

    def run(pixels: list[Tensor]) -> None:
        images, *others = (datasets.as_float(view.contiguous(memory_format=torch.channels_last)) for view in pixels)
        batch = Batch(images, torch.arange(len(images)) % 10, tuple(others))
        optimizer.zero_grad(set_to_none=True)
        objective.accumulate(network, [batch], Step(seed=0, number=0))
        optimizer.step()

    return run


class Tally:
    """What a variant has cost so far, and how far from grey it has brought the images."""

    def __init__(self) -> None:
        self.milliseconds: list[float] = []
        self.processor_seconds, self.contrast = 0.0, 0.0

    def run(self, variant: Variant, pixels: Tensor, generator: torch.Generator) -> list[Tensor]:
        """Time one batch, and return its views."""
        processor, start = time.process_time(), time.perf_counter()
        views = variant(pixels, generator)
        self.milliseconds.append(1000 * (time.perf_counter() - start) / len(pixels))
        self.processor_seconds += time.process_time() - processor
        self.contrast += float((views[-1].double() - 128).abs().mean())
        return views


def images(number: int) -> Tensor:
    """Return smooth noise, uint8 (number, 3, 32, 32): what operations do depends little on what an image shows."""
    coarse = torch.rand(number, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return (255 * torch.nn.functional.interpolate(coarse, size=(32, 32), mode="bicubic")).clamp(0, 255).to(torch.uint8)


def measure(task: str, pixels: Tensor, rounds: int) -> dict[str, dict[str, float]]:
    """Return what each variant of a task costs; they take turns."""
    variants = TASKS[task]
    generator = torch.Generator().manual_seed(0)
    for variant in variants.values():
        variant(pixels, generator)  # warm up
    tallies = {name: Tally() for name in variants}
    step = training_step(3 if "3 views" in task else 1)
    step_seconds = 0.0
    for number in range(rounds):
        for name, variant in variants.items():
            views = tallies[name].run(variant, pixels, generator)
        if number == 0:
            step(views)  # warm up
        processor = time.process_time()
        step(views)
        step_seconds += time.process_time() - processor
    reference = tallies["ours"]
    whole = reference.processor_seconds + step_seconds
    document = {}
    for name, tally in tallies.items():
        if abs(tally.contrast / reference.contrast - 1) > AGREEMENT:
            raise SystemExit(f"{task}: {name} and ours differ by more than {AGREEMENT:.0%} in what they make of images")
        each = statistics.median(tally.milliseconds)
        document[name] = {
            "milliseconds_per_image": round(each, 4),
            "ratio": round(each / statistics.median(reference.milliseconds), 2),
            "processor_ratio": round(tally.processor_seconds / reference.processor_seconds, 2),
            "training_ratio": round((tally.processor_seconds + step_seconds) / whole, 2),
        }
        say(f"{task}, {name}: {each:.3f} ms per image")
    return document


def say(text: str) -> None:
    """Report progress."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Measure, and print JSON last."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write the JSON to this file too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    busy, began, own = machine.busy_seconds(), time.perf_counter(), time.process_time()
    pixels = images(options.batch)
    measured = {task: measure(task, pixels, options.rounds) for task in TASKS}
    foreign = machine.foreign(busy, began, time.process_time() - own)
    document = {
        "benchmark": "augmentation",
        "batch": options.batch,
        "image": list(pixels.shape[1:]),
        "rounds": options.rounds,
        "severity": EWS_SEVERITY,
        "measured": measured,
        "foreign_cores": foreign,
        "quiet": (foreign or 0) < machine.QUIET,
        "threads": torch.get_num_threads(),
        "processor": machine.processor(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision().__version__,
            "manygates": manygates.__version__,
        },
        "date": machine.today(),
    }
    line = json.dumps(document)
    if options.out is not None:
        options.out.write_text(line + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    main()
