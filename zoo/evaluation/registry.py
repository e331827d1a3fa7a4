"""The protocols by name, and the one function that runs them."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import torch

from zoo.bundle.bundle import Bundle
from zoo.bundle.card import Result
from zoo.errors import BadInput, UnknownName
from zoo.evaluation.int8_graph import check_int8
from zoo.evaluation.ledger import Ledger
from zoo.evaluation.request import Request
from zoo.evaluation.run import Run, terms_of
from zoo.weights.models import check_variant

Protocol = Callable[[Run], list[Result]]

PROTOCOLS = {
    "clean": ("zoo.evaluation.protocols.whitebox", "clean"),
    "whitebox": ("zoo.evaluation.protocols.whitebox", "whitebox"),
    "blackbox": ("zoo.evaluation.protocols.transfer", "blackbox"),
    "transfer-matrix": ("zoo.evaluation.protocols.transfer_matrix", "transfer_matrix"),
    "diversity": ("zoo.evaluation.protocols.transfer_matrix", "diversity"),
    "autoattack": ("zoo.evaluation.protocols.autoattack", "autoattacked"),
    "random-gates": ("zoo.evaluation.protocols.random_gates", "random_gates"),
    "corruptions": ("zoo.evaluation.protocols.corruptions", "corruptions"),
    "exits": ("zoo.evaluation.protocols.exits", "exits"),
    "queries": ("zoo.evaluation.protocols.black_box", "queried"),
}
"""Where each protocol is; loaded when it is asked for."""
WEIGHTS_ONLY = ("transfer-matrix", "diversity", "exits")
"""They compare the networks behind a variant, of which an int8 graph has none of its own."""


def evaluate(bundle: Bundle, request: Request, *, device: str = "cpu", fresh: bool = False) -> list[Result]:
    """Measure one protocol; one result per eps where the protocol has one.

    An evaluation that was interrupted goes on where it was, batch by batch, with the same result.

    Args:
        bundle: the model; only its weights are read.
        request: what to measure.
        device: where to compute.
        fresh: begin again even if an interrupted evaluation on the same terms is there.

    Raises:
        UnknownName: no such protocol.
        BadInput: the bundle has no such variant, the protocol does not fit it, or a number makes no sense.
        DataMissing: the model's data set is not there.
    """
    if request.protocol not in PROTOCOLS:
        raise UnknownName(request.protocol, PROTOCOLS, kind="protocol")
    check_variant(bundle, request.variant)
    if request.precision == "int8":
        check_int8(bundle, request.variant)
        if request.protocol in WEIGHTS_ONLY:
            judging = ", ".join(name for name in PROTOCOLS if name not in WEIGHTS_ONLY)
            raise BadInput(
                f"the protocol {request.protocol} compares networks, not what a graph answers; use one of {judging} "
                "with the precision int8"
            )
    request = request.resolved()
    module, name = PROTOCOLS[request.protocol]
    protocol: Protocol = getattr(importlib.import_module(module), name)
    target = torch.device(device)
    # deployed graphs compute in float32; a GPU would round convolutions to TF32
    exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    with Ledger(terms_of(bundle, request, target)) as ledger, exact:
        if fresh:
            ledger.clear()
        return protocol(Run(bundle=bundle, request=request, device=target, ledger=ledger))


def resumable(bundle: Bundle, request: Request, *, device: str = "cpu") -> int:
    """Return how many batches of this evaluation an interrupted run has left behind."""
    return len(Ledger(terms_of(bundle, request.resolved(), torch.device(device))))
