"""Checks that compare a model with another function: a surrogate, what is served, the weights that a graph rounds."""

from __future__ import annotations

import torch

from zoo.attacks.outputs import are_probabilities
from zoo.errors import BadInput
from zoo.evaluation.intervals import exceeds
from zoo.evaluation.linter.check import Answer, check
from zoo.evaluation.linter.evidence import LONG_STEPS, NOISES, STEPS, Evidence, answers_of, count, parts
from zoo.evaluation.thresholds import (
    BLACK_BOX_ALONE,
    ROUNDED_AWAY,
    SERVED_DISAGREEMENT,
    SURROGATE_SUCCESS,
)

NO_GRAPH = "the model is no int8 graph"


@check(
    "T1",
    "the surrogate fools itself",
    "Examples that do not even fool the surrogate say nothing about transfer; take a plain surrogate or a "
    "stronger attack on it.",
)
def surrogate(evidence: Evidence) -> Answer:
    """Count the surrogate's own images that an attack on it does not break."""
    if evidence.surrogate is None:
        return None, "no surrogate given"
    _, known, lost = evidence.on_surrogate
    if not bool(known.any()):
        return True, f"the surrogate answers none of {evidence.number} images correctly"
    return exceeds(count(known & ~lost), count(known), 1 - SURROGATE_SUCCESS), (
        f"PGD-{STEPS} on the surrogate fools it on {count(lost)} of its {count(known)} images ({evidence.ball})"
    )


@check(
    "P1",
    "what is served is what was attacked",
    "The deployed graph is another function than the attacked one, so its robustness was not measured; export "
    "again and compare the preprocessing.",
)
def served(evidence: Evidence) -> Answer:
    """Compare the answers of what is served with those of the model, to clean and adversarial images."""
    if evidence.served is None:
        return None, "nothing served was given"
    if evidence.sampler is not None or not evidence.repeats:
        return None, "a random model has no answer to be compared with; compare fixed paths"
    counted, disagreeing, furthest = 0, 0, 0.0
    for images in (evidence.images, evidence.one_step, evidence.trace.first):
        for part in parts(images.nan_to_num().float()):
            with torch.no_grad():
                attacked = evidence.net(part)
            answered = torch.as_tensor(evidence.served(part.cpu().numpy())).to(attacked)
            if answered.shape != attacked.shape:
                raise BadInput(
                    f"served returned shape {tuple(answered.shape)} for {len(part)} images, expected "
                    f"{tuple(attacked.shape)}, like the model; pass one output of a session, not all"
                )
            probabilities = answered if are_probabilities(answered) else answered.softmax(1)
            furthest = max(furthest, float((probabilities - attacked.softmax(1)).abs().max()))
            top = attacked.topk(2, dim=1).values
            clear = top[:, 0] - top[:, 1] > evidence.notable  # a tie may fall either way
            disagreeing += count((answered.argmax(1) != attacked.argmax(1)) & clear)
            counted += len(part)
    return disagreeing > SERVED_DISAGREEMENT * counted, (
        f"{disagreeing} of {counted} answers to clean and adversarial images differ (ties aside), probabilities by at "
        f"most {furthest:.2g} ({evidence.ball})"
    )


@check(
    "Q1",
    "what fools the weights fools their rounding",
    "Rounding moved the border and took nothing from the attacker, who has only to aim at the graph: its "
    "transferred accuracy flatters it; attack through the rounding, and calibrate on more images.",
)
def rounding_keeps(evidence: Evidence) -> Answer:
    """Count what an attack on the weights breaks there and not on the graph."""
    if evidence.weights is None:
        return None, NO_GRAPH
    weights_kept, graph_kept, last = evidence.on_weights
    alone = count(~weights_kept & graph_kept)
    same = answers_of(evidence.net, last).argmax(1) == answers_of(evidence.weights, last).argmax(1)
    return exceeds(alone, evidence.number, ROUNDED_AWAY), (
        f"PGD-{LONG_STEPS} on the weights, 2 starts, breaks {count(~weights_kept)} of {evidence.number} on the weights "
        f"and {count(~graph_kept)} on the graph, {alone} on the weights alone; both say the same of {count(same)} "
        f"({evidence.ball})"
    )


@check(
    "Q2",
    "asking the graph finds no more than its weights",
    "An attacker who knows less did better: attacks on the weights miss what the rounded graph does; report "
    "the black-box number and attack through the rounding.",
)
def graph_asked(evidence: Evidence) -> Answer:
    """Ask the graph about the images that no attack on the weights broke on it; other gradients do not count here."""
    if evidence.weights is None:
        return None, NO_GRAPH
    _, graph_kept, _ = evidence.on_weights
    broken = evidence.wrong(evidence.attacked_by_square(graph_kept, "square on the graph")) & graph_kept
    noise = (evidence.corner_logits.argmax(2) != evidence.labels).any(0) & graph_kept
    alone = count(broken | noise)
    return exceeds(alone, evidence.number, BLACK_BOX_ALONE), (
        f"what breaks the weights breaks {count(~graph_kept)} of {evidence.number} on the graph; {alone} more broken "
        f"by asking it: Square ({evidence.queries} queries) {count(broken)}, random noise ({2 * NOISES} draws) "
        f"{count(noise)} ({evidence.ball})"
    )
