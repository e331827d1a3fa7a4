"""Checks of how a model behaves when it is asked: its outputs, its repeats, its batch, and what else it does."""

from __future__ import annotations

import torch

from zoo.evaluation.linter.check import Answer, check
from zoo.evaluation.linter.evidence import BATCH, REPEATED_IMAGES, REPEATS, Evidence, count, relative
from zoo.evaluation.linter.side_effects import state_of
from zoo.evaluation.thresholds import COUPLED, FEWEST_FINITE, ROUNDING_STEPS


@check(
    "O1",
    "outputs are logits",
    "A softmax in the way flattens gradients, and infinities end them; attack what stands before it.",
)
def logits(evidence: Evidence) -> Answer:
    """Look for probabilities, NaN and infinities in the first answers."""
    outputs = evidence.outputs
    # -inf is the logit of a class that is masked, an honest one as long as others are left to be told apart
    left = outputs.isfinite().sum(1) >= min(FEWEST_FINITE, evidence.classes)
    infinite = count(outputs.isnan().any(1) | (outputs == torch.inf).any(1) | ~left)
    figure = (
        f"rows of {len(outputs)} outputs in [{float(outputs.min()):.3g}, {float(outputs.max()):.3g}], {infinite} with "
        f"NaN, +inf or fewer than {FEWEST_FINITE} finite values"
    )
    if evidence.form.probabilities:
        figure += "; non-negative and summing to 1: probabilities (the other checks attack their logarithm)"
    return evidence.form.probabilities or infinite > 0, figure


@check(
    "R1",
    "the same images get the same answer",
    "Randomness is mistaken for robustness: a deterministic attack on a random model fails by chance; give a "
    "sampler and report attacks that average over draws.",
)
def repeats(evidence: Evidence) -> Answer:
    """Ask about the same images again and again."""
    number = min(REPEATED_IMAGES, evidence.number)
    difference = evidence.repeated_difference
    figure = f"{REPEATS} answers to the same {number} images differ by at most {difference:.2g} of a mean logit"
    if evidence.sampler is not None:
        return False, figure + (
            "; random, and given with a sampler: see E1 to E3" if not evidence.repeats else "; not random"
        )
    return not evidence.repeats, figure


@check(
    "B1",
    "an answer does not depend on the batch",
    "Batch statistics or another coupling at test time: the attack sees another function than a user who "
    "sends one image; freeze the statistics.",
)
def batch(evidence: Evidence) -> Answer:
    """Ask about images alone, together, and among others."""
    if evidence.sampler is None and not evidence.repeats:
        return None, "answers differ from call to call anyway, see R1"
    images = evidence.images[:REPEATED_IMAGES]
    if evidence.given < 2:
        return None, "a single image has no batch to depend on"
    with torch.no_grad():
        together = evidence.net(evidence.images[:BATCH])[: len(images)]
        alone = torch.cat([evidence.net(image[None]) for image in images])
        among = evidence.net(torch.cat([images, 1 - images, images.flip(3)]))[: len(images)]
    difference = max(relative(together, alone), relative(together, among))
    changed = count((together.argmax(1) != alone.argmax(1)) | (together.argmax(1) != among.argmax(1)))
    limit = (
        COUPLED if evidence.form.half is None else max(COUPLED, ROUNDING_STEPS * torch.finfo(evidence.form.half).eps)
    )
    return not difference <= limit, (
        f"logits of {len(images)} images alone and among others differ by {difference:.2g} of a mean logit, {changed} "
        "answers change"
    )


@check(
    "M1",
    "attacks leave the model as it was",
    "A forward changes weights, buffers, modes, gradients or global random states, so that the model measured "
    "is not the one that was given; make the forward free of side effects.",
)
def unchanged(evidence: Evidence) -> Answer:
    """Compare the model's state, and the random states, with those before the attacks."""
    before, after = evidence.state, state_of(evidence.model, evidence.images.device)
    changed = [name for name in before.tensors | after.tensors if not before.same(name, after)]
    parts = [
        ("weights and buffers", changed),
        ("gradients", [] if before.gradients == after.gradients else ["left on parameters"]),
        ("modes", [name for name in after.modes if after.modes[name] != before.modes.get(name)]),
    ]
    if evidence.sampler is None:  # a random model may draw from them
        parts.append(("global random states", [key for key in after.random if after.random[key] != before.random[key]]))
    found = [f"{kind}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}" for kind, names in parts if names]
    looked = (
        f"{len(before.tensors)} tensors, {len(before.modes)} modules" if before.modes else "a function, random states"
    )
    return bool(found), (f"changed by the attacks: {'; '.join(found)}" if found else "nothing changed") + f" ({looked})"


@check(
    "D1",
    "no gradients inside the forward",
    "The model optimises at test time, and plain gradients do not see through that; attack through the "
    "optimisation, and report the static model beside it (Croce et al. 2022).",
)
def inner_gradients(evidence: Evidence) -> Answer:
    """Count backward passes in a forward."""
    return evidence.passes > 0, f"{evidence.passes} backward passes in one forward of {len(evidence.outputs)} images"
