"""The protocols by name, and the one function that runs them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from zoo.bundle.bundle import Bundle
from zoo.bundle.card import Result
from zoo.errors import BadInput, UnknownName
from zoo.evaluation.int8_graph import check_int8
from zoo.evaluation.ledger import Ledger, digest_of
from zoo.evaluation.protocols import (
    autoattack,
    blackbox,
    clean,
    corruptions,
    diversity,
    exits,
    queries,
    random_gates,
    transfer_matrix,
    whitebox,
)
from zoo.evaluation.request import Request
from zoo.evaluation.run import Run, terms_of
from zoo.files import cache_dir
from zoo.weights.models import check_variant

Protocol = Callable[[Run], list[Result]]

PROTOCOLS: dict[str, Protocol] = {
    "clean": clean.measure,
    "whitebox": whitebox.measure,
    "blackbox": blackbox.measure,
    "transfer-matrix": transfer_matrix.measure,
    "diversity": diversity.measure,
    "autoattack": autoattack.measure,
    "random-gates": random_gates.measure,
    "corruptions": corruptions.measure,
    "exits": exits.measure,
    "queries": queries.measure,
}
WEIGHTS_ONLY = ("transfer-matrix", "diversity", "exits")
"""They compare the networks behind a variant. An int8 graph has none of its own."""


def evaluate(
    bundle: Bundle, request: Request, *, device: str = "cpu", fresh: bool = False, ledger: Ledger | None = None
) -> list[Result]:
    """Measure one protocol; one result per eps where the protocol has one.

    An interrupted evaluation goes on with the batch where it stopped, and finds the same result.

    Args:
        bundle: the model; only its weights are read, and its int8 graph with that precision.
        request: what to measure.
        device: where to compute.
        fresh: begin again even if an interrupted evaluation on the same terms is there.
        ledger: of this evaluation, from `ledger_of`, if the caller shows how far it came; opened here if None.

    Raises:
        UnknownName: no such protocol.
        BadInput: the bundle has no such variant, the protocol does not fit it, or a number makes no sense.
        DataMissing: the model's data set is not there.
    """
    ledger = ledger_of(bundle, request, device=device) if ledger is None else ledger
    # deployed graphs compute in float32; a GPU would round convolutions to TF32
    exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    with ledger, exact:
        if fresh:
            ledger.clear()
        run = Run(bundle=bundle, request=request.resolved(), device=torch.device(device), ledger=ledger)
        return PROTOCOLS[request.protocol](run)


def ledger_of(bundle: Bundle, request: Request, *, device: str = "cpu") -> Ledger:
    """Open the ledger of an evaluation, with the batches that an interrupted one has left behind.

    It is a file in the cache, named by everything that determines the numbers (weights, protocol, attack, images, seed,
    versions).

    Raises:
        UnknownName: no such protocol.
        BadInput: the bundle has no such variant, or the protocol does not fit it.
    """
    _check(bundle, request)
    terms = terms_of(bundle, request.resolved(), torch.device(device))
    return Ledger(cache_dir() / "evaluations" / f"{digest_of(terms)[:24]}.jsonl")


def _check(bundle: Bundle, request: Request) -> None:
    if request.protocol not in PROTOCOLS:
        raise UnknownName(request.protocol, PROTOCOLS, kind="protocol")
    check_variant(bundle, request.variant)
    if request.precision != "int8":
        return
    check_int8(bundle, request.variant)
    if request.protocol in WEIGHTS_ONLY:
        judging = ", ".join(name for name in PROTOCOLS if name not in WEIGHTS_ONLY)
        raise BadInput(
            f"the protocol {request.protocol} compares networks, not what a graph answers; use one of {judging} "
            "with the precision int8"
        )
