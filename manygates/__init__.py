"""manygates: adversarially robust image classifiers, from training to serving.

The public API in short; the command line is `manygates.cli`:

    network = manygates.load("eio-resnet20-cifar10")            # an nn.Module on images in [0, 1]
    rgn = manygates.randomly_gate(network, candidates=2)        # any traceable CNN
    single = manygates.derive(rgn, path)
    adversarial = manygates.attacks.pgd(single, images, labels, manygates.attacks.LinfBudget(eps=8 / 255))

Importing this loads nothing heavy: each name is imported when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zoo.vocabulary import VERSION

if TYPE_CHECKING:
    from torch import nn

__version__ = VERSION
__all__ = ["attacks", "derive", "evaluate", "load", "main", "randomly_gate"]


def __getattr__(name: str) -> Any:
    if name == "attacks":
        from zoo import attacks

        return attacks
    if name == "derive":
        from zoo.gates.derive import derive

        return derive
    if name == "evaluate":
        from zoo.evaluation import evaluate

        return evaluate
    if name == "main":
        from manygates.cli import main

        return main
    if name == "randomly_gate":
        from zoo.gates.rgn import randomly_gate

        return randomly_gate
    raise AttributeError(f"module 'manygates' has no attribute {name!r}; it has {', '.join(__all__)}")


def load(model: str, variant: str = "single") -> nn.Module:
    """Return what a variant deploys, in evaluation mode, on images (batch, channel, height, width) in [0, 1].

    Args:
        model: a catalogue name, `local-dir:FOLDER` or `hf-hub:ORGANISATION/NAME[@REVISION]`.
        variant: "single" (one derived path), "ensemble" (k paths averaged) or "gated" (a fresh path per image).

    Raises:
        ManygatesError: no such model or variant, or a bundle that is not what its card says.
    """
    from zoo.hub.source import resolve
    from zoo.weights.models import load_variant, weights_file

    return load_variant(resolve(model).open(lambda card: (weights_file(card),)), variant)
