"""The linter on a variant of a bundle: the deployed network, on test images, compared with the graph that serves it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from fractions import Fraction
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from zoo.attacks.outputs import Model
from zoo.bundle.bundle import Bundle, int8_file
from zoo.bundle.card import Card, Finding, Lint
from zoo.data import datasets
from zoo.evaluation.int8_graph import check_int8
from zoo.evaluation.ledger import Ledger
from zoo.evaluation.linter.evidence import QUERIES
from zoo.evaluation.linter.lint import lint_model
from zoo.evaluation.request import Request
from zoo.evaluation.run import Run
from zoo.evaluation.surrogates import check_surrogates, open_surrogate
from zoo.runtime import session
from zoo.weights.models import check_variant

IMAGES = 100


def lint_bundle(
    bundle: Bundle,
    variant: str,
    *,
    eps: Fraction = Fraction(8, 255),
    images: int | None = None,
    seed: int = 0,
    queries: int = QUERIES,
    surrogate: str | None = None,
    device: str = "cpu",
    precision: str = "fp32",
    command: str = "",
    watch: Callable[[Finding], None] | None = None,
) -> Lint:
    """Ask every question of the linter about one variant, on the first test images of the fixed order.

    Args:
        bundle: its weights are attacked, and the variant's graph is compared with them (P1).
        variant: "single", "ensemble" or "gated".
        eps: radius of the l_inf ball.
        images: how many; 100 by default.
        seed: of starts, noise, squares and gates.
        queries: of Square, per image.
        surrogate: another model (MODEL) for transfer and for a direction from outside.
        device: where to compute.
        precision: "int8" attacks the variant's int8 graph, with the gradients of the weights that it rounds.
        command: repeats this, for the record.
        watch: called with each finding.

    Raises:
        BadInput: no such variant, a surrogate that is the target; see `lint_model`.
    """
    check_variant(bundle, variant)
    if precision == "int8":
        check_int8(bundle, variant)
    named = () if surrogate is None else (surrogate,)
    request = Request(
        protocol="lint", variant=variant, eps=(eps,), images=images, precision=precision, seed=seed, surrogates=named
    )
    run = Run(bundle=bundle, request=request, device=torch.device(device), ledger=Ledger())
    chosen = run.images(IMAGES)
    sampler = run.fresh_paths(run.rng("lint", 0)) if variant == "gated" else None
    graph_file = int8_file(variant) if run.int8 else f"{variant}.onnx"
    model: Model = run.network if sampler is None else lambda pixels: sampler()(pixels)
    findings = lint_model(
        model,
        datasets.as_float(chosen.pixels),
        chosen.labels,
        eps=float(eps),
        sampler=sampler,
        surrogate=None if surrogate is None else _opened(bundle, surrogate, run.device),
        served=None if sampler is not None else _served(bundle, graph_file),
        seed=seed,
        queries=queries,
        watch=watch,
    )
    return Lint(
        variant=request.measured_variant,
        images=len(chosen),
        seed=seed,
        findings=tuple(_answered(finding, bundle.card, request.measured_variant) for finding in findings),
        date=datetime.now(UTC).date().isoformat(),
        command=command,
    )


def _opened(target: Bundle, name: str, device: torch.device) -> Model:
    """Return a surrogate as it is attacked, once it is known to be another model than the target."""
    surrogate = open_surrogate(name)
    check_surrogates(target, [surrogate])
    return surrogate.deployed(device)


def _answered(finding: Finding, card: Card, variant: str) -> Finding:
    """Return the finding, its alarm withdrawn where it asks for averaging over gates and the card's numbers did that.

    E1 and E2 say that attacks with one draw flatter a random model. A result of the protocol random-gates whose checks
    held is the answer: it averages over ever more draws, until more change nothing, and judges on fresh ones.
    """
    if finding.verdict != "alarm" or finding.code not in ("E1", "E2"):
        return finding
    for result in card.results:
        if (result.protocol, result.variant) == ("random-gates", variant) and all(
            check.held for check in result.checks
        ):
            said = f"so attacks must average over gates, as the card's {result.protocol} result does ({result.date})"
            return replace(finding, verdict="ok", figure=f"{finding.figure}; {said}")
    return finding


def _served(bundle: Bundle, file: str) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """Return the graph that serves a variant, as a function of pixels."""
    opened = session(bundle.read(file))

    def answer(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        (logits,) = opened.run(["logits"], {"images": np.ascontiguousarray(pixels)})
        return cast("NDArray[np.float32]", logits)

    return answer
