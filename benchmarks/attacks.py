"""How fast PGD is, ours against every other implementation that is installed, doing the same work in one run.

    python benchmarks/attacks.py [--images 1000] [--eps 0.01] [--out FILE]

The work: 50 steps of eps / 5 on the cross-entropy from each of 5 random starts, all-or-nothing, on CPU. A restart goes
to the images that the ones before have left, for everybody, so that the adapters differ in nothing but the attack. Ours
runs twice: judging an attempt by its last iterate, as the others do, and stopping at the first iterate that is broken,
which is the stricter verdict (`--protocol whitebox`). Both on the network as it is loaded ("plain") and as `manygates
evaluate` attacks it ("deployed": BatchNorms folded, channels last).

The implementations take turns batch by batch, in rotating order, so that a drift of the machine meets all of them. What
each returns is judged by one and the same forward pass, and a result outside the ball stops the benchmark. `quiet` says
whether other processes used less than a quarter of a core; `processor_ratio` suffers less from them.

Progress goes to standard error; the last line on standard output is JSON.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import re
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import machine  # noqa: E402

import manygates  # noqa: E402
from zoo.attacks import LinfBudget, pgd  # noqa: E402
from zoo.data import datasets  # noqa: E402
from zoo.evaluation.run import ready  # noqa: E402

MODELS = ("standard-resnet20-cifar10", "eio-resnet20-cifar10")
OURS = {"manygates, last iterate": "last", "manygates, first broken": "first broken"}
REFERENCE = "manygates, last iterate"

Attack = Callable[[Tensor, Tensor], Tensor]
Peer = Callable[[nn.Module, LinfBudget], Attack]


# --- one attempt by each of the others, on images in [0, 1] ---


def foolbox(network: nn.Module, budget: LinfBudget) -> Attack:
    """https://github.com/bethgelab/foolbox."""
    import foolbox

    model = foolbox.PyTorchModel(network, bounds=(0, 1), device="cpu")
    attack = foolbox.attacks.LinfPGD(abs_stepsize=budget.step, steps=budget.steps, random_start=True)
    return lambda images, labels: attack(model, images, labels, epsilons=budget.eps)[1]


def torchattacks(network: nn.Module, budget: LinfBudget) -> Attack:
    """https://github.com/Harry24k/adversarial-attacks-pytorch."""
    import torchattacks

    attack = torchattacks.PGD(network, eps=budget.eps, alpha=budget.step, steps=budget.steps, random_start=True)
    return lambda images, labels: attack(images, labels)


def adversarial_robustness_toolbox(network: nn.Module, budget: LinfBudget) -> Attack:
    """https://github.com/Trusted-AI/adversarial-robustness-toolbox."""
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    classifier = PyTorchClassifier(
        network, nn.CrossEntropyLoss(), (3, 32, 32), 10, clip_values=(0, 1), device_type="cpu"
    )

    def attack(images: Tensor, labels: Tensor) -> Tensor:
        steps = ProjectedGradientDescentPyTorch(
            classifier,
            eps=budget.eps,
            eps_step=budget.step,
            max_iter=budget.steps,
            num_random_init=1,
            batch_size=len(images),
            verbose=False,
        )
        return torch.from_numpy(steps.generate(images.numpy(), labels.numpy()))

    return attack


def adv_lib(network: nn.Module, budget: LinfBudget) -> Attack:
    """https://github.com/jeromerony/adversarial-library."""
    from adv_lib.attacks import pgd_linf

    def attack(images: Tensor, labels: Tensor) -> Tensor:
        found: Tensor = pgd_linf(
            network,
            images,
            labels,
            budget.eps,
            steps=budget.steps,
            random_init=True,
            restarts=1,
            absolute_step_size=budget.step,
        )
        return found

    return attack


PEERS: dict[str, tuple[Peer, str]] = {
    "foolbox": (foolbox, "foolbox"),
    "torchattacks": (torchattacks, "torchattacks"),
    "ART": (adversarial_robustness_toolbox, "adversarial-robustness-toolbox"),
    "adv-lib": (adv_lib, "adv-lib"),
}


def restarted(attempt: Attack, network: nn.Module, restarts: int) -> Attack:
    """Return the attack that gives each restart the images that are still answered correctly."""

    def attack(images: Tensor, labels: Tensor) -> Tensor:
        result, left = images.clone(), torch.arange(len(images))
        for _ in range(restarts):
            result[left] = attempt(images[left], labels[left])
            left = left[answered(network, result[left], labels[left])]
            if not len(left):
                break
        return result

    return attack


def our_attack(network: nn.Module, budget: LinfBudget, keep: Any) -> Attack:
    """Return PGD with all its restarts."""
    generator = torch.Generator().manual_seed(0)
    return lambda images, labels: pgd(network, images, labels, budget, keep=keep, generator=generator)


def implementations(network: nn.Module, budget: LinfBudget) -> tuple[dict[str, Attack], dict[str, str]]:
    """Return the attacks by name, and of those that cannot be imported the reason."""
    attacks = {name: our_attack(network, budget, keep) for name, keep in OURS.items()}
    absent = {}
    for name, (peer, _) in PEERS.items():
        try:
            attacks[name] = restarted(peer(network, budget), network, budget.restarts)
        except ImportError as error:
            absent[name] = str(error)
    return attacks, absent


@torch.no_grad()
def answered(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return where the network answers with the label (batch,) bool."""
    right: Tensor = network(images).argmax(1) == labels
    return right


# --- measuring ---


class Tally:
    """What one implementation used and left, over all batches."""

    def __init__(self) -> None:
        self.seconds, self.processor_seconds, self.right, self.peak = 0.0, 0.0, 0, 0

    def run(self, attack: Attack, network: nn.Module, images: Tensor, labels: Tensor, eps: float) -> None:
        """Time the attack on a batch; judge what it returns."""
        reset_peak()
        processor, start = time.process_time(), time.perf_counter()
        adversarial = attack(images, labels)
        self.seconds += time.perf_counter() - start
        self.processor_seconds += time.process_time() - processor
        self.peak = max(self.peak, peak_bytes() or 0)
        furthest = float((adversarial - images).abs().max())
        if furthest > eps + 1e-6 or float(adversarial.min()) < 0 or float(adversarial.max()) > 1:
            raise SystemExit(f"an attack left the ball: it moved a pixel by {furthest}, expected at most {eps}")
        self.right += int(answered(network, adversarial, labels).sum())

    def document(self, reference: Tally, images: int) -> dict[str, float | int | None]:
        """Return the numbers, and how many times as long as ours it took."""
        return {
            "seconds": round(self.seconds, 2),
            "ratio": round(self.seconds / reference.seconds, 3),
            "processor_seconds": round(self.processor_seconds, 2),
            "processor_ratio": round(self.processor_seconds / reference.processor_seconds, 3),
            "robust_accuracy": round(self.right / images, 4),
            "peak_rss_mib": round(self.peak / 2**20) or None,
        }


def measure(name: str, kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return the numbers of all implementations on one network."""
    network = manygates.load(name)
    if kind == "deployed":
        network = ready(network, torch.device("cpu"))
    layout = torch.channels_last if kind == "deployed" else torch.contiguous_format
    budget = LinfBudget(eps=options.eps, steps=options.steps, restarts=options.restarts)
    attacks, absent = implementations(network, budget)
    images = datasets.evaluation_subset(datasets.load("cifar10", "test"), options.images)
    tallies = {entry: Tally() for entry in attacks}
    clean, busy, began, own = 0, machine.busy_seconds(), time.perf_counter(), time.process_time()
    for number, (pixels, labels) in enumerate(images.batches(options.batch)):
        pixels = pixels.contiguous(memory_format=layout)
        clean += int(answered(network, pixels, labels).sum())
        if not number:
            warm_up = LinfBudget(eps=options.eps, steps=2)
            for attack in implementations(network, warm_up)[0].values():
                attack(pixels, labels)
        order = list(attacks)
        for entry in order[number % len(order) :] + order[: number % len(order)]:
            tallies[entry].run(attacks[entry], network, pixels, labels, options.eps)
            say(f"{name}, {kind}, batch {number + 1}, {entry}: {tallies[entry].seconds:.1f} s so far")
    others = machine.foreign(busy, began, time.process_time() - own)
    return {
        "model": name,
        "network": kind,
        "clean_accuracy": round(clean / options.images, 4),
        "attacks": {entry: tally.document(tallies[REFERENCE], options.images) for entry, tally in tallies.items()},
        "absent": absent,
        "foreign_cores": others,
    }


def reset_peak() -> None:
    """Let the process's peak of resident memory begin anew; Linux only."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def peak_bytes() -> int | None:
    """Return the most memory that was resident since the last reset; None where nobody knows."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return None
    return int(found[1]) * 1024 if found else None


def versions() -> dict[str, str]:
    """Return the versions of Python, torch and the peers that are installed."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "manygates": manygates.__version__}
    for name, (_, distribution) in PEERS.items():
        try:
            found[name] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def say(text: str) -> None:
    """Report progress."""
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Measure, and print JSON last."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--networks", nargs="+", choices=["deployed", "plain"], default=["deployed", "plain"])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--eps", type=float, default=0.01)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--restarts", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the JSON to this file too")
    options = parser.parse_args()
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # of the peers' imports
    measured = [measure(name, kind, options) for name in options.models for kind in options.networks]
    document = {
        "benchmark": "attacks",
        "attack": f"PGD-{options.steps} x {options.restarts}, eps {options.eps:g}, steps of eps / 5",
        "images": options.images,
        "batch": options.batch,
        "reference": REFERENCE,
        "measured": measured,
        "quiet": all((entry["foreign_cores"] or 0) < machine.QUIET for entry in measured),
        "threads": torch.get_num_threads(),
        "processor": machine.processor(),
        "versions": versions(),
        "date": machine.today(),
    }
    line = json.dumps(document)
    if options.out is not None:
        options.out.write_text(line + "\n", encoding="utf-8")
    print(line)


if __name__ == "__main__":
    main()
