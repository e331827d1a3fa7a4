"""What the page says in sentences. Nothing here is HTML; `fragments` escapes what it shows."""

from __future__ import annotations

from serving.demo.attack import Attack
from serving.demo.contest import Outcome, Verdict
from serving.demo.shelf import EOT_DRAWS, VOTES
from zoo.bundle.card import Card
from zoo.bundle.wording import plural

TITLE = "manygates: attack two models"
INTRODUCTION = """
# One image, two models, one attacker

Move every pixel by a few levels out of 255, too little to see, and watch what two image classifiers answer.
"""
EXPLANATION = f"""
**What the attacker does.** FGSM takes one step of length eps along the sign of the loss's gradient. PGD starts at a
random point inside the ball and takes many steps of eps / 5; if that fails, it starts again. Both may move each pixel's
red, green and blue by at most eps, written here as k/255. A PNG holds whole levels, so k is whole. The cards measure at
an eps of 0.01 and 0.03: these are 2.55/255 and 7.65/255 and lie between two positions of the slider.

**What is shown is what was classified.** The adversarial image is rounded to 8 bits inside the ball before any model
sees it, and the change is measured on the PNG file that you can download. The pictures are those files, enlarged
without smoothing. An upload is first scaled to the size that the model takes (32 x 32 for CIFAR-10), and the ball is
around the scaled image.

**Random gates.** A random gated network draws a fresh path for each answer. The attacker cannot know the path in
advance, and averages the gradient over {EOT_DRAWS} fresh ones at each step. The prediction shown is the mean of
{VOTES} fresh paths, and the vote says how many of them answer what. The deployed model asks only one. The attacker saw
none of the paths that vote.

**What this page cannot say.** One image is an anecdote. The robustness of a model is measured on a thousand images, and
the cards show those numbers, or "not measured". A model that holds here may fall to more steps, more attempts or
another attack; an attack that fails proves nothing. If you give no label, "fooled" means that the model left its own
answer to the clean image, which may be wrong. Transfer from one model to another says something about that pair only.
These small models know ten classes and nothing else: to them, any picture is one of the ten.

The same seed and settings give the same result on the same machine. Uploads stay on this server and are deleted within
two hours.
"""

NOTHING_YET = "Nothing attacked yet."
DID_NOT_RUN = "The last attack did not run; the message says why."
EPS_MEANING = "each pixel's red, green and blue may move this far (black to white is 1)"
MARKS: dict[Verdict, str] = {"fooled": "✗", "held": "✓", "wrong before": "•"}
VERDICTS: dict[Verdict, str] = {"fooled": "Fooled", "held": "Held", "wrong before": "Wrong before the attack"}

_GATED_VARIANTS = {
    "single": "one path, chosen once and kept",
    "ensemble": "several fixed paths, whose probabilities are averaged",
    "gated": "a fresh random path for each answer",
}


def eps_text(levels: int) -> str:
    """Say how far eps is, and what it means."""
    return f"{levels}/255 = {levels / 255:.4f}: {EPS_MEANING}"


def status(outcomes: tuple[Outcome, Outcome]) -> str:
    """Say in one line what happened to both models; a screen reader reads it out."""
    said = [f"{MARKS[outcome.verdict]} {VERDICTS[outcome.verdict]}" for outcome in outcomes]
    return f"Model A: {said[0]}. Model B: {said[1]}."


def described(card: Card, variant: str) -> str:
    """Say what a variant is."""
    if card.exits:
        return f"one network with {len(card.exits)} exits, of which the last answers"
    if not card.architecture.gated_layers:
        return "one network" if variant == "single" else "several networks, whose probabilities are averaged"
    return _GATED_VARIANTS[variant]


def summary(outcome: Outcome) -> str:
    """Say what happened, also for those who do not see the pictures."""
    classes = outcome.contestant.card.classes
    label, before, after = (classes[index] for index in (outcome.label, outcome.clean.top, outcome.adversarial.top))
    if outcome.verdict == "wrong before":
        return (
            f"The label is {label}, but the model answers {before} to the clean image, before any attack, and {after} "
            "to the adversarial one."
        )
    clean, adversarial = (said.probabilities[outcome.label] for said in (outcome.clean, outcome.adversarial))
    if outcome.verdict == "held":
        return (
            f"The answer is still {label}: its probability goes from {probability(clean)} to "
            f"{probability(adversarial)}."
        )
    wrong = outcome.adversarial.probabilities[outcome.adversarial.top]
    return f"The answer goes from {label} ({probability(clean)}) to {after} ({probability(wrong)})."


def facts(outcome: Outcome, attack: Attack) -> list[tuple[str, str]]:
    """Return what one should know beside the verdict: the name of each fact, and the fact."""
    seconds = f"{outcome.crafted.seconds:.2f} s"
    found = [
        ("Largest change", f"{outcome.distance}/255, measured on the PNG file; allowed {attack.eps_levels}/255"),
        ("Effort", f"{plural(outcome.crafted.gradients, 'gradient evaluation')} ({_work(outcome, attack)}), {seconds}"),
        ("Knowledge", knowledge(outcome)),
    ]
    if not outcome.label_given:
        found.append(("Label", "none given: the attack succeeds if the model leaves its own answer to the clean image"))
    return found


def knowledge(outcome: Outcome) -> str:
    """Say what the attacker knows of this model."""
    contestant, surrogate = outcome.contestant, outcome.surrogate
    if outcome.transferred:
        sentence = (
            f"The attacker knows neither this model's answers nor its gradients: the image was crafted on model "
            f"{outcome.surrogate_letter} ({surrogate.name}, {surrogate.variant}) and is only shown to this one."
        )
        if surrogate.name == contestant.name:
            sentence += " Both come from the same weights, which makes this transfer easier than one between strangers."
        return sentence
    if contestant.gated:
        return (
            "The attacker knows all candidates' weights and how the gates are drawn, but not which path will answer; "
            f"each gradient averages over {EOT_DRAWS} fresh paths."
        )
    if contestant.passes > 1:
        return (
            f"The attacker knows everything: the weights of all {contestant.passes} networks. It follows the gradient "
            "of their averaged probabilities."
        )
    return "The attacker knows everything: this network's weights. It follows the network's own gradient."


def votes(outcome: Outcome) -> str:
    """Say how the vote of random gates went."""
    before, after = outcome.clean.votes[outcome.label], outcome.adversarial.votes[outcome.label]
    return (
        f"The vote of {VOTES} fresh random paths: {before} answer the label before the attack, {after} of {VOTES} "
        "after it."
    )


def trace(outcome: Outcome) -> str:
    """Say where the label's probability began and ended while PGD ran."""
    label = outcome.contestant.card.classes[outcome.label]
    first, last = outcome.crafted.trace[0][0], outcome.crafted.trace[-1][-1]
    return (
        f"Probability of {label} before each step: {probability(first)} at the first, {probability(last)} at the last."
    )


def probability(share: float) -> str:
    """Write a probability; what is not quite 0 or 1 does not read as such."""
    if 0 < share < 0.001:
        return "under 0.1 %"
    if 0.999 < share < 1:
        return "over 99.9 %"
    return f"{100 * share:.1f} %"


def _work(outcome: Outcome, attack: Attack) -> str:
    crafted, attacked = outcome.crafted, outcome.surrogate
    steps = plural(crafted.gradients // attacked.passes, "step")
    work = f"{steps} in {plural(crafted.attempts, 'attempt')}" if attack.iterated else steps
    if attacked.passes > 1:
        work += f", {attacked.passes} {'paths' if attacked.gated else 'networks'} each"
    return work
