"""The one door to torchvision: everything of ours that needs it imports it from here.

Beside a CPU-only torch, PyPI's torchvision (built for CUDA) cannot load its C++ operators and fails at import with
`operator torchvision::nms does not exist`. We use none of those operators, so where they are missing their schemas are
declared first; where they are present nothing is done.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

_SCHEMAS = {
    "nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def _declare_missing_operators() -> None:
    """Declare the operators that torchvision's import expects, if its library cannot be loaded."""
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        raise ImportError("torchvision is not installed; pip install 'manygates[train]'")
    for library in Path(spec.origin).parent.glob("_C*"):
        try:
            torch.ops.load_library(library)  # type: ignore[no-untyped-call]
        except OSError:  # built for another torch: the schemas below stand in for its operators
            continue
    for name, schema in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            torch.library.define(f"torchvision::{name}", schema)


@cache
def torchvision() -> ModuleType:
    """Return the torchvision package, importable whatever build it is."""
    _declare_missing_operators()
    import torchvision.models

    return torchvision


@cache
def transforms() -> ModuleType:
    """Return `torchvision.transforms.v2`."""
    torchvision()
    import torchvision.transforms.v2 as v2

    return v2
