"""The attack demo: one image, two models side by side, and an attacker who may move each pixel a little.

What is shown is what was classified: an adversarial image is rounded to 8 bits and put back into the ball *before* any
model judges it, and the page hands out those very PNG files. Rounding afterwards could leave the ball or undo the
attack, and a lossy picture (Gradio's default is WebP) differs from the original by more than a typical eps.

Unlike the rest of `serving` this needs torch, because a white-box attack needs gradients; see docs/demo.md.
"""

from __future__ import annotations

import contextlib
import functools
import html
import io
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast, get_args

# read when gradio is imported; otherwise it reports each start to its makers
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

import gradio as gr
import numpy as np
import torch
import uvicorn
from gradio import processing_utils
from numpy.typing import NDArray
from PIL import Image
from starlette.applications import Starlette
from starlette.types import ASGIApp
from torch import Tensor, nn

from serving.listener import bind, url_of
from zoo import paths
from zoo.attacks import LinfBudget, fgsm, pgd, to_grid, unchecked
from zoo.bundle.bundle import Bundle
from zoo.bundle.card import Card, Result
from zoo.data import datasets
from zoo.errors import BadImage, BadInput, ManygatesError, MissingFile, UnknownName
from zoo.gates.derive import Ensemble, folded_copy, mean_probability
from zoo.gates.rgn import RandomGatedNetwork
from zoo.hub.source import find, list_bundled
from zoo.pictures import DAMAGE, FORMATS, MAX_PIXELS, decode_image, encode_png
from zoo.weights.models import load_rgn, member_networks, weights_file

Levels = NDArray[np.uint8]
"""An image as its file holds it: (channel, height, width), levels 0 to 255."""

Method = Literal["FGSM", "PGD"]
Scenario = Literal["own", "a", "b"]

AUTOMATIC = "automatic"
EOT_DRAWS = 4
"""Fresh paths that one gradient of a random gated model is averaged over."""
SELECTION_DRAWS = 16
"""Fresh paths on which the attacker compares attempts; the vote is on others, which the attacker never saw."""
VOTES = 32
"""Fresh paths that answer in the vote."""

MAX_EPS_LEVELS = 32
MAX_STEPS = 50
MAX_RESTARTS = 5
MAX_SEED = 2**31 - 1
MAX_FILE_SIZE = "8mb"

_EXAMPLES = Path(__file__).parent / "examples"
_VARIANTS = {
    "single": "one path, fixed once and for all",
    "ensemble": "several fixed paths, whose probabilities are averaged",
    "gated": "a fresh random path for each answer",
}


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A model with one of its variants: what is attacked and what answers."""

    name: str
    variant: str
    card: Card
    network: nn.Module
    """A plain network or an ensemble, BatchNorms folded; for the variant "gated" the random gated network itself."""

    @property
    def gated(self) -> bool:
        """Whether each answer comes along a fresh random path."""
        return isinstance(self.network, RandomGatedNetwork)

    @property
    def passes(self) -> int:
        """Networks that are differentiated for one gradient."""
        if self.gated:
            return EOT_DRAWS
        return len(self.network.members) if isinstance(self.network, Ensemble) else 1

    def differentiable(self, rng: random.Random) -> Callable[[Tensor], Tensor]:
        """Return images -> logits, as an attacker differentiates it.

        For random gates that is the log of the mean probability over `EOT_DRAWS` fresh paths, drawn anew at every call:
        its gradient averages over gates (expectation over transformation, Athalye et al. 2018, arXiv:1707.07397).
        """
        if not self.gated:
            return self.network
        # random on purpose, of which an attack on a deterministic model would warn
        return unchecked(
            lambda images: mean_probability(torch.stack([self._along_a_path(images, rng) for _ in range(EOT_DRAWS)]))
        )

    @torch.no_grad()
    def probabilities(self, images: Tensor, rng: random.Random, draws: int = VOTES) -> Tensor:
        """Return probabilities (draw, batch, class); a deterministic model has one draw, and `rng` stays unused."""
        if not self.gated:
            return cast(Tensor, self.network(images)).softmax(1)[None]
        return torch.stack([self._along_a_path(images, rng).softmax(1) for _ in range(draws)])

    def _along_a_path(self, images: Tensor, rng: random.Random) -> Tensor:
        rgn = cast(RandomGatedNetwork, self.network)
        return rgn(images, paths.sample(rgn.num_gates, rgn.candidates, rng))  # type: ignore[no-any-return]


@dataclass(frozen=True, kw_only=True)
class Attack:
    """What the attacker does: FGSM is one step of length eps; PGD takes steps of eps / 5 from random starts."""

    method: Method = "PGD"
    eps_levels: int = 2
    """Radius of the ball in levels of 1/255, whole because an 8-bit file holds whole levels."""
    steps: int = 20
    restarts: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise UnknownName(str(self.method), get_args(Method), kind="attack")
        limits = {"eps_levels": (0, 255), "steps": (1, MAX_STEPS), "restarts": (1, MAX_RESTARTS), "seed": (0, MAX_SEED)}
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not isinstance(value, int) or not low <= value <= high:
                raise BadInput(f"{name} is {value!r}, expected a whole number from {low} to {high}")


@dataclass(frozen=True, kw_only=True)
class Crafted:
    """An adversarial image and what it cost."""

    levels: Levels
    gradients: int
    """Networks that were differentiated, over all steps, paths, members and attempts."""
    attempts: int
    seconds: float
    trace: list[list[float]] = field(default_factory=list)
    """For each attempt the probability of the attacked label before each step, as the attacker saw it."""


def craft(contestant: Contestant, clean: Levels, label: int, attack: Attack) -> Crafted:
    """Attack one image of one model; the result is on the 8-bit grid and within `attack.eps_levels` of `clean`.

    Every attempt is rounded to 8 bits first and judged then. The first that changes the answer is returned, else the
    one that leaves the label the lowest probability. For random gates the judge is the mean over `SELECTION_DRAWS`
    fresh paths, never one lucky draw.
    """
    started = time.perf_counter()
    rng = random.Random(f"{attack.seed} attack")  # noqa: S311 -- repeatable on purpose
    generator = torch.Generator().manual_seed(attack.seed)
    images, labels = _as_images(clean), torch.tensor([label])
    model = contestant.differentiable(rng)
    budget = LinfBudget(eps=attack.eps_levels / 255, steps=attack.steps)
    trace: list[list[float]] = []
    best: Levels = clean
    lowest = float("inf")

    for _ in range(attack.restarts if attack.method == "PGD" else 1):
        seen: list[float] = []

        def watch(step: int, iterate: Tensor, logits: Tensor, seen: list[float] = seen) -> None:
            seen.append(float(logits.softmax(1)[0, label]))

        if attack.method == "FGSM":
            adversarial = fgsm(model, images, labels, budget)
        else:
            adversarial = pgd(model, images, labels, budget, generator=generator, watch=watch)
        levels = _on_the_grid(adversarial, clean, attack.eps_levels)
        answer = contestant.probabilities(_as_images(levels), rng, SELECTION_DRAWS).mean(0)[0]
        trace.append(seen)
        broken = int(answer.argmax()) != label
        if broken or float(answer[label]) < lowest:
            best, lowest = levels, float(answer[label])
        if broken:
            break

    steps = sum(len(seen) for seen in trace) if attack.method == "PGD" else 1
    return Crafted(
        levels=best,
        gradients=steps * contestant.passes,
        attempts=len(trace),
        seconds=time.perf_counter() - started,
        trace=trace if attack.method == "PGD" else [],
    )


def amplified(clean: Levels, adversarial: Levels, factor: int) -> Levels:
    """Return the signed difference times `factor` around the grey level 128; beyond black and white it is cut off."""
    difference = adversarial.astype(np.int32) - clean.astype(np.int32)
    return (128 + factor * difference).clip(0, 255).astype(np.uint8)


def png_distance(clean_png: bytes, adversarial_png: bytes) -> int:
    """Decode two PNG files and return the largest difference of any number in them, in levels of 1/255."""
    first, second = (np.asarray(Image.open(io.BytesIO(png))).astype(np.int32) for png in (clean_png, adversarial_png))
    return int(np.abs(first - second).max())


class Shelf:
    """The models on offer: their cards at once, their weights when they are first attacked."""

    def __init__(self, models: Sequence[str], *, max_pixels: int = MAX_PIXELS) -> None:
        """Open the bundles of `models`; all that come with the package if there are none.

        Raises:
            ManygatesError: if a model cannot be found or opened, or holds no weights; or if two have the same name.
        """
        self.max_pixels = max_pixels
        """Of an uploaded image."""
        self._bundles: dict[str, Bundle] = {}
        self._loaded: dict[tuple[str, str], Contestant] = {}
        for model in models or [card.name for card in list_bundled()]:
            found = find(model)
            card = found.card
            if card.name in self._bundles:
                raise BadInput(f"{card.name!r} is to be shown twice; name each model once")
            if weights_file(card) not in card.files:
                raise MissingFile(
                    f"{card.name!r} holds no {weights_file(card)}, but an attack needs gradients; export it anew"
                )
            self._bundles[card.name] = found.open([weights_file(card)])
        if not self._bundles:
            raise BadInput("no model to attack: none comes with this installation; name one, like local-dir:FOLDER")

    @property
    def cards(self) -> list[Card]:
        """The cards, in the order in which the models were named."""
        return [bundle.card for bundle in self._bundles.values()]

    @property
    def choices(self) -> list[tuple[str, str]]:
        """What the page offers: (what it reads, "name/variant")."""
        return [
            (f"{card.name}, {variant}", f"{card.name}/{variant}") for card in self.cards for variant in card.variants
        ]

    @property
    def defaults(self) -> tuple[str, str]:
        """A plain model against the random gates where there are such, else the first choice against the last."""
        values = [value for _, value in self.choices]
        plain = [f"{card.name}/single" for card in self.cards if not card.architecture.gated_layers]
        gated = [value for value in values if value.endswith("/gated")]
        return (plain or values)[0], (gated or values[::-1])[0]

    def card(self, choice: str) -> tuple[Card, str]:
        """Return the card and the variant of a choice.

        Raises:
            UnknownName: if it is not on offer.
        """
        name, _, variant = choice.rpartition("/")
        bundle = self._bundles.get(name)
        if bundle is None or not bundle.has_variant(variant):
            raise UnknownName(choice, [value for _, value in self.choices], kind="model/variant")
        return bundle.card, variant

    def contestant(self, choice: str) -> Contestant:
        """Return a choice, loaded.

        Raises:
            UnknownName: if it is not on offer.
            ManygatesError: if its weights cannot be read.
        """
        card, variant = self.card(choice)
        key = (card.name, variant)
        if key not in self._loaded:
            network = _network(self._bundles[card.name], variant).requires_grad_(False)
            self._loaded[key] = Contestant(name=card.name, variant=variant, card=card, network=network)
        return self._loaded[key]


def _network(bundle: Bundle, variant: str) -> nn.Module:
    if variant == "gated":
        return load_rgn(bundle)
    members: list[nn.Module] = [folded_copy(member) for member in member_networks(bundle, variant)]
    return members[0] if variant == "single" else Ensemble(members).eval()


def _described(card: Card, variant: str) -> str:
    """Say what a variant is, in the words of the page."""
    if card.exits:
        return f"one network with {len(card.exits)} exits, of which the last answers"
    if not card.architecture.gated_layers:
        return "one network" if variant == "single" else "several networks, whose probabilities are averaged"
    return _VARIANTS[variant]


def _as_images(levels: Levels) -> Tensor:
    return torch.from_numpy(levels.astype(np.float32) / np.float32(255))[None]


def _on_the_grid(adversarial: Tensor, clean: Levels, eps_levels: int) -> Levels:
    """Round to whole levels inside the ball."""
    rounded = to_grid(adversarial, _as_images(clean), eps_levels / 255)
    levels: Levels = (rounded[0] * 255).round().numpy().astype(np.uint8)
    return levels


# ---------------------------------------------------------------------------------------------------------- one contest


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that the page asks for, beside the image."""

    model_a: str
    model_b: str
    label: str = AUTOMATIC
    scenario: Scenario = "own"
    attack: Attack = field(default_factory=Attack)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model says to one image: the mean over its draws, and each draw's own class."""

    probabilities: list[float]
    votes: list[int]
    """How many draws answered each class; a deterministic model has one draw."""

    @property
    def top(self) -> int:
        """The class of highest probability."""
        return int(np.argmax(self.probabilities))


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What happened to one of the two models."""

    contestant: Contestant
    surrogate: Contestant
    """The model whose gradients were followed; the contestant itself unless the attack was transferred."""
    surrogate_letter: str
    label: int
    label_given: bool
    clean_png: bytes
    adversarial_png: bytes
    crafted: Crafted
    clean: Answer
    adversarial: Answer

    @property
    def transferred(self) -> bool:
        """Whether the image was crafted on the other model."""
        return self.surrogate is not self.contestant

    @property
    def verdict(self) -> Literal["fooled", "held", "wrong before"]:
        """Whether the answer left the label; a clean answer that is wrong already is no merit of the attack."""
        if self.clean.top != self.label:
            return "wrong before"
        return "fooled" if self.adversarial.top != self.label else "held"

    @property
    def distance(self) -> int:
        """The largest change of any number, in levels, measured on the PNG files that are handed out."""
        return png_distance(self.clean_png, self.adversarial_png)


def contest(shelf: Shelf, content: bytes, settings: Settings) -> tuple[Outcome, Outcome]:
    """Attack one image file on two models.

    Raises:
        BadImage: if the bytes are no still PNG, JPEG or WEBP image of reasonable size.
        BadInput: if the label is no class of a model, or an image is to be transferred between models that take
            different images or know different classes.
        UnknownName: if a model is not on offer.
    """
    contestants = shelf.contestant(settings.model_a), shelf.contestant(settings.model_b)
    clean = [_levels(content, contestant.card, shelf.max_pixels) for contestant in contestants]
    _check_still(content)
    if settings.scenario != "own":
        _check_comparable(*contestants)
    seed = settings.attack.seed
    answers = [_answer(contestant, levels, seed) for contestant, levels in zip(contestants, clean, strict=True)]
    labels = [
        _label(settings.label, contestant, answer) for contestant, answer in zip(contestants, answers, strict=True)
    ]
    crafted: dict[int, Crafted] = {}
    outcomes = []
    for index, contestant in enumerate(contestants):
        source = {"own": index, "a": 0, "b": 1}[settings.scenario]
        if source not in crafted:
            crafted[source] = craft(contestants[source], clean[source], labels[source], settings.attack)
        levels = crafted[source].levels
        outcomes.append(
            Outcome(
                contestant=contestant,
                surrogate=contestants[source],
                surrogate_letter="AB"[source],
                label=labels[index],
                label_given=settings.label != AUTOMATIC,
                clean_png=_png(clean[index]),
                adversarial_png=_png(levels),
                crafted=crafted[source],
                clean=answers[index],
                adversarial=_answer(contestant, levels, seed),
            )
        )
    return outcomes[0], outcomes[1]


def _check_still(content: bytes) -> None:
    """Refuse an image that can be decoded but moves: of an animation the decoder takes the first frame."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            frames = getattr(image, "n_frames", 1)
    except DAMAGE:  # in its metadata, which the decoder leaves alone
        return
    if frames > 1:
        raise BadImage(f"the image is an animation of {frames} frames, expected a still image; export one frame")


def _levels(content: bytes, card: Card, max_pixels: int = MAX_PIXELS) -> Levels:
    levels: Levels = np.rint(decode_image(content, card.input, max_pixels=max_pixels)[0] * 255).astype(np.uint8)
    return levels


def _png(levels: Levels) -> bytes:
    return encode_png(levels.astype(np.float32) / np.float32(255))


def _check_comparable(a: Contestant, b: Contestant) -> None:
    shapes = [(c.card.input.channels, c.card.input.height, c.card.input.width) for c in (a, b)]
    if shapes[0] != shapes[1] or a.card.classes != b.card.classes:
        raise BadInput(
            f"an image cannot be transferred between {a.name} (images {shapes[0]}, {len(a.card.classes)} classes) and "
            f"{b.name} (images {shapes[1]}, {len(b.card.classes)} classes); choose models of one data set"
        )


def _answer(contestant: Contestant, levels: Levels, seed: int) -> Answer:
    """Ask for an answer; the same seed draws the same paths for the clean and the adversarial image."""
    rng = random.Random(f"{seed} vote")  # noqa: S311 -- repeatable on purpose
    draws = contestant.probabilities(_as_images(levels), rng)[:, 0]
    votes = torch.bincount(draws.argmax(1), minlength=draws.shape[1])
    return Answer(probabilities=draws.mean(0).tolist(), votes=votes.tolist())


def _label(label: str, contestant: Contestant, answer: Answer) -> int:
    if label == AUTOMATIC:
        return answer.top
    if label not in contestant.card.classes:
        raise BadInput(
            f"{label!r} is no class of {contestant.name}, expected one of {', '.join(contestant.card.classes)}, or "
            f"{AUTOMATIC!r}"
        )
    return contestant.card.classes.index(label)


def report(outcome: Outcome) -> dict[str, Any]:
    """Return an outcome as JSON's types; probabilities are between 0 and 1, distances in levels of 1/255."""
    classes = outcome.contestant.card.classes
    document: dict[str, Any] = {
        "model": outcome.contestant.name,
        "variant": outcome.contestant.variant,
        "verdict": outcome.verdict,
        "label": classes[outcome.label],
        "label_given": outcome.label_given,
        "clean_answer": classes[outcome.clean.top],
        "clean_label_probability": round(outcome.clean.probabilities[outcome.label], 6),
        "adversarial_answer": classes[outcome.adversarial.top],
        "adversarial_label_probability": round(outcome.adversarial.probabilities[outcome.label], 6),
        "measured_linf_levels": outcome.distance,
        "crafted_on": f"{outcome.surrogate.name}/{outcome.surrogate.variant}",
        "gradient_evaluations": outcome.crafted.gradients,
        "attempts": outcome.crafted.attempts,
        "seconds": round(outcome.crafted.seconds, 3),
        "votes": None,
    }
    if outcome.contestant.gated:
        document["votes"] = {
            "draws": VOTES,
            "clean": _named_votes(classes, outcome.clean.votes),
            "adversarial": _named_votes(classes, outcome.adversarial.votes),
        }
    return document


def _named_votes(classes: Sequence[str], votes: Sequence[int]) -> dict[str, int]:
    return {name: count for name, count in zip(classes, votes, strict=True) if count}


# ------------------------------------------------------------------------------------------------------------ the words


def knowledge(outcome: Outcome) -> str:
    """Say in one plain sentence what the attacker knows of this model."""
    contestant, surrogate = outcome.contestant, outcome.surrogate
    if outcome.transferred:
        sentence = (
            f"The attacker knows nothing of this model's answers or gradients: the image was crafted on model "
            f"{outcome.surrogate_letter} ({surrogate.name}, {surrogate.variant}) and is only shown to this one."
        )
        if surrogate.name == contestant.name:
            sentence += " Both come from the same weights, so this transfer is easier than one between strangers."
        return sentence
    if contestant.gated:
        return (
            "The attacker knows all candidates' weights and how the gates are drawn, but not which path will answer; "
            f"each gradient averages over {EOT_DRAWS} fresh paths."
        )
    if contestant.passes > 1:
        return (
            f"The attacker knows everything: the weights of all {contestant.passes} networks, and follows the gradient "
            "of their averaged probabilities."
        )
    return "The attacker knows everything: this network's weights, and follows its own gradient."


def summary_text(outcome: Outcome) -> str:
    """Say in words what happened, for those who do not see the pictures as well."""
    classes = outcome.contestant.card.classes
    label, before, after = (classes[index] for index in (outcome.label, outcome.clean.top, outcome.adversarial.top))
    share = (outcome.clean.probabilities, outcome.adversarial.probabilities)
    if outcome.verdict == "wrong before":
        text = f"It is labelled {label}, but the model answers {before} to the clean image, before any attack"
        return f"{text}, and {after} to the adversarial one."
    clean, adversarial = (_percent(probabilities[outcome.label]) for probabilities in share)
    if outcome.verdict == "held":
        return f"The answer is still {label}: its probability goes from {clean} to {adversarial}."
    wrong = _percent(outcome.adversarial.probabilities[outcome.adversarial.top])
    return f"The answer goes from {label} ({clean}) to {after} ({wrong})."


def _percent(share: float) -> str:
    if 0 < share < 0.001:
        return "under 0.1 %"
    if 0.999 < share < 1:
        return "over 99.9 %"
    return f"{100 * share:.1f} %"


_VERDICTS = {"fooled": ("✗", "Fooled"), "held": ("✓", "Held"), "wrong before": ("•", "Wrong before the attack")}


def _summary_html(outcome: Outcome, attack: Attack) -> str:
    mark, word = _VERDICTS[outcome.verdict]
    crafted, contestant = outcome.crafted, outcome.surrogate
    if attack.method == "FGSM":
        work = "1 step"
    else:
        work = f"{crafted.gradients // contestant.passes} steps in {_count(crafted.attempts, 'attempt')}"
    if contestant.passes > 1:
        work += f", {contestant.passes} {'paths' if contestant.gated else 'networks'} each"
    facts = [
        ("Largest change", f"{outcome.distance}/255, measured on the PNG file; allowed {attack.eps_levels}/255"),
        ("Effort", f"{_count(crafted.gradients, 'gradient evaluation')} ({work}), {crafted.seconds:.2f} s"),
        ("Knowledge", knowledge(outcome)),
    ]
    if not outcome.label_given:
        facts.append(("Label", "none given, so success is leaving the answer to the clean image"))
    rows = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in facts)
    return (
        f'<div class="verdict verdict-{outcome.verdict.split()[0]}" role="status">'
        f'<p><span aria-hidden="true">{mark}</span> <strong>{word}.</strong> {html.escape(summary_text(outcome))}</p>'
        f"<dl>{rows}</dl></div>"
    )


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


def _details_html(outcome: Outcome) -> str:
    """Draw the vote of random gates, and the label's probability while PGD ran on this model."""
    parts = []
    if outcome.contestant.gated:
        parts.append(_votes_html(outcome))
    if not outcome.transferred and any(outcome.crafted.trace):
        parts.append(_trace_html(outcome.crafted.trace, outcome.contestant.card.classes[outcome.label]))
    return "".join(parts)


def _votes_html(outcome: Outcome) -> str:
    classes = outcome.contestant.card.classes
    clean, adversarial = outcome.clean.votes, outcome.adversarial.votes
    named = sorted((i for i in range(len(classes)) if clean[i] + adversarial[i]), key=lambda i: (-clean[i], i))
    rows = ""
    for index in named:
        cells = "".join(
            f'<td><span class="bar" aria-hidden="true"><span style="width:{100 * count / VOTES:.0f}%"></span></span>'
            f'<span class="count">{count}</span></td>'
            for count in (clean[index], adversarial[index])
        )
        label = " (label)" if index == outcome.label else ""
        rows += f'<tr><th scope="row">{html.escape(classes[index])}{label}</th>{cells}</tr>'
    right = adversarial[outcome.label]
    return (
        f'<figure class="votes"><figcaption>The vote of {VOTES} fresh random paths: after the attack '
        f"{right} of {VOTES} answer the label, before it {clean[outcome.label]}.</figcaption>"
        f'<table><thead><tr><th scope="col">answer</th><th scope="col">clean</th><th scope="col">adversarial</th></tr>'
        f"</thead><tbody>{rows}</tbody></table></figure>"
    )


def _trace_html(trace: Sequence[Sequence[float]], label: str) -> str:
    width, height = 300, 70
    longest = max(len(seen) for seen in trace)
    lines = ""
    for seen in trace:
        points = " ".join(
            f"{width * step / max(longest - 1, 1):.1f},{height * (1 - probability):.1f}"
            for step, probability in enumerate(seen)
        )
        lines += f'<polyline points="{points}"/>'
    first, last = trace[0][0], trace[-1][-1]
    text = f"Probability of {label} before each step: {_percent(first)} at the first, {_percent(last)} at the last."
    return (
        f'<figure class="trace"><figcaption>{html.escape(text)}</figcaption>'
        f'<svg viewBox="-26 -8 {width + 34} {height + 28}" role="img" aria-label="{html.escape(text)}">'
        f'<path d="M0 0V{height}H{width}"/>{lines}'
        f'<text x="-5" y="4" text-anchor="end">1</text><text x="-5" y="{height}" text-anchor="end">0</text>'
        f'<text x="0" y="{height + 15}">step 1</text>'
        f'<text x="{width}" y="{height + 15}" text-anchor="end">step {longest}</text></svg></figure>'
    )


def card_html(card: Card, variant: str) -> str:
    """Show what a card has measured of a variant: clean accuracy, white-box and transfer accuracy, the linter's word.

    White-box means PGD on a deterministic variant, and for random gates the worst of the attacks of random-gates.
    """
    known = ("random gates", "random-gates") if variant == "gated" else ("white-box", "whitebox")
    wanted = (
        ("clean", "clean", 0.0),
        (f"{known[0]}, eps 0.01", known[1], 0.01),
        (f"{known[0]}, eps 0.03", known[1], 0.03),
        ("transfer, eps 0.03", "blackbox", 0.03),
    )
    rows = "".join(
        f'<tr><th scope="row">{name}</th>{_result_cells(_measured(card, variant, protocol, eps))}</tr>'
        for name, protocol, eps in wanted
    )
    return (
        f'<p class="note">{html.escape(card.description)}. '
        f"Variant {html.escape(variant)}: {_described(card, variant)}.</p>"
        f"<table><caption>Accuracy on the card</caption><tbody>{rows}</tbody></table>{_lint_html(card, variant)}"
    )


def _lint_html(card: Card, variant: str) -> str:
    """Say what the robustness linter found; an alarm is shown with its figure and what it means."""
    lint = next((lint for lint in card.lint if lint.variant == variant), None)
    if lint is None:
        return '<p class="note">The robustness linter has not looked at this variant.</p>'
    asked = sum(finding.verdict != "skipped" for finding in lint.findings)
    if not lint.alarms:
        return f'<p class="note">The robustness linter asked {asked} questions and found nothing ({lint.date}).</p>'
    found = "".join(
        f"<li><strong>{html.escape(f'{finding.code} {finding.name}')}</strong>: {html.escape(finding.figure)}. "
        f"{html.escape(finding.meaning)}</li>"
        for finding in lint.alarms
    )
    return (
        f'<p class="alarm"><strong>Failed the robustness linter: the numbers may flatter.</strong></p><ul>{found}</ul>'
    )


def _measured(card: Card, variant: str, protocol: str, eps: float) -> Result | None:
    """Return the latest measurement that fits."""
    fitting = [
        result
        for result in card.results
        if result.variant == variant and result.protocol == protocol and abs(result.eps - eps) < 1e-6
    ]
    return max(fitting, key=lambda result: result.date, default=None)


def _attack_text(result: Result) -> str:
    if result.attack == "none":
        return ""
    if result.attack == "PGD":
        return f"PGD-{result.steps} x {result.restarts}, "
    return f"{result.attack}, "


def _result_cells(result: Result | None) -> str:
    if result is None:
        return '<td colspan="2">not measured</td>'
    low, high = (100 * bound for bound in result.interval)
    attack = _attack_text(result)
    failed = [check.name for check in result.checks if not check.held]
    alarm = f"<br><strong>a sanity check failed: {html.escape('; '.join(failed))}</strong>" if failed else ""
    return (
        f"<td><strong>{100 * result.accuracy:.1f} %</strong> [{low:.1f}, {high:.1f}]</td>"
        f"<td>{html.escape(attack)}n = {result.images:,}, {result.date}{alarm}</td>"
    )


# ------------------------------------------------------------------------------------------------------------- the page

_INTRODUCTION = """
# One image, two models, one attacker

Move every pixel by a few levels out of 255, too little to see, and watch what two image classifiers answer.
"""

_EXPLANATION = f"""
**What the attacker does.** FGSM takes one step of length eps along the sign of the loss's gradient. PGD takes many
steps of eps / 5 from a random start inside the ball, and another start if that failed. Both may move each pixel's red,
green and blue by at most eps, written here as k/255. A PNG holds whole levels, so k is whole; the eps of 0.01 and 0.03
at which the cards measure are 2.55/255 and 7.65/255 and lie between two positions of the slider.

**What is shown is what was classified.** The adversarial image is rounded to 8 bits inside the ball before any model
sees it, and the change is measured on the PNG file that you can download. The pictures are those files, enlarged
without smoothing. An upload is first scaled to what the model takes (32 x 32 for CIFAR-10), and the ball is around
the scaled image.

**Random gates.** A random gated network draws a fresh path for each answer. The attacker cannot know the path in
advance, and averages the gradient over {EOT_DRAWS} fresh ones at each step. The prediction shown is the mean of
{VOTES} fresh paths, the vote says how many of them answer what; the deployed model asks only one. The paths that vote
are not those that the attacker saw.

**What this page cannot say.** One image is an anecdote: the robustness of a model is measured on a thousand, and those
numbers are on the cards, "not measured" where they are missing. A model that holds here may fall to more steps,
restarts or another attack; an attack that fails proves nothing. With no label given, "fooled" means that the model
left the answer it gave to the clean image, which may itself be wrong. Transfer from one model to another tells of that
pair only. These small models know ten classes and nothing else: any picture is one of the ten to them.

The same seed and settings give the same result on the same machine. Uploads stay on this server and are deleted within
two hours.
"""

_CSS = """
.gradio-container { max-width: 1240px !important; margin: 0 auto !important; }
footer .divider { display: none !important; }
.picture img { image-rendering: pixelated; width: 100% !important; height: 100% !important; object-fit: contain; }
.side .picture label[data-testid=block-label] { position: static !important; background: none; border: 0;
  box-shadow: none; padding: .25rem .5rem; }
.side { background: var(--block-background-fill); border: 1px solid var(--border-color-primary);
  border-radius: var(--block-radius); padding: 1rem; gap: .8rem; }
.side h2 { margin: 0; font-size: 1.05rem; font-weight: 600; overflow-wrap: anywhere; }
.side p, .side td, .side th, .side figcaption, .side dd, .side dt { color: var(--body-text-color); }
.side .note { margin: 0; font-size: .85rem; }
.side table { width: 100%; border-collapse: collapse; font-size: .9rem; }
.side caption, .side figcaption { text-align: left; font-size: .9rem; padding: .2rem 0; }
.side caption { font-weight: 600; color: var(--body-text-color); }
.side th, .side td { text-align: left; font-weight: 400; padding: .25rem .6rem .25rem 0; vertical-align: top;
  border: 0; border-bottom: 1px solid var(--border-color-primary); }
.side figure { margin: 0 0 .6rem; }
.verdict { border-left: 6px solid var(--neutral-400); background: var(--background-fill-secondary);
  padding: .7rem .9rem; border-radius: 4px; }
.verdict p { margin: 0 0 .5rem; font-size: 1.05rem; }
.verdict-fooled { border-left: 6px double #c2410c; }
.verdict-held { border-left-color: #0f766e; }
.verdict dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem .8rem; margin: 0; font-size: .9rem; }
.verdict dt { font-weight: 600; }
.verdict dd { margin: 0; }
.votes td { width: 34%; }
.votes .bar { display: inline-block; width: calc(100% - 2.4rem); height: .7rem; vertical-align: middle;
  border: 1px solid var(--border-color-primary); }
.votes .bar > span { display: block; height: 100%; background: #0f9488; }
.votes td:last-child .bar > span { background: repeating-linear-gradient(45deg, #c2410c 0 4px, #ea8a5a 4px 7px); }
.votes .count { display: inline-block; width: 2rem; text-align: right; font-variant-numeric: tabular-nums; }
.trace svg { width: 100%; max-width: 26rem; height: auto; }
.trace path { stroke: var(--body-text-color-subdued); fill: none; stroke-width: 1; }
.trace polyline { stroke: #d9571c; fill: none; stroke-width: 2; }
.trace text { font-size: 11px; fill: var(--body-text-color); }
#eps-text { padding: 0 .8rem .6rem; background: var(--block-background-fill); margin-top: -1px; }
.side .html-container { padding: 0; }
#status p { margin: 0; font-weight: 600; }
@media (max-width: 640px) { .verdict dl { grid-template-columns: 1fr; } .verdict dd { margin-bottom: .3rem; } }
"""

# A region is announced only if it was one before its text changed; gradio has no parameter for that.
_ON_LOAD = "() => document.getElementById('status')?.setAttribute('aria-live', 'polite')"
_EPS_MEANING = "so far may each pixel's red, green and blue move (black to white is 1)"
_EPS_TEXT = f"(k) => `${{k}}/255 = ${{(k / 255).toFixed(4)}}: {_EPS_MEANING}`"


def _theme() -> gr.themes.Base:
    """A theme with the system's own fonts (gradio's defaults would fetch some) and text of enough contrast."""
    theme = gr.themes.Default(
        primary_hue="teal",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )
    return theme.set(
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_800",
        button_primary_text_color="white",
        block_info_text_color="*body_text_color",
        block_info_text_color_dark="*body_text_color",
        block_label_text_color="*body_text_color",
        block_title_text_weight="600",
    )


@dataclass(frozen=True, kw_only=True)
class _Controls:
    """The parts of the page that ask; `settings` in the order of the endpoint's arguments."""

    image: gr.Image
    drawings: gr.Dataset | None
    random_test: gr.Button
    label: gr.Dropdown
    models: tuple[gr.Dropdown, gr.Dropdown]
    eps: gr.Slider
    eps_text: gr.Markdown
    settings: list[Any]
    button: gr.Button
    status: gr.Markdown


@dataclass(frozen=True, kw_only=True)
class _Side:
    """The parts of the page that tell of one of the two models; `results` in the order of `_shown`."""

    heading: gr.HTML
    card: gr.HTML
    panel: gr.Column
    results: list[Any]


def build(models: list[str], *, max_pixels: int = MAX_PIXELS) -> gr.Blocks:
    """Build the page for `models`; for all that come with the package if the list is empty.

    Its endpoint "/attack" can be called with gradio_client; docs/demo.md shows how.

    Raises:
        ManygatesError: if a model cannot be found or opened, or holds no weights; or if two have the same name.
    """
    shelf = Shelf(models, max_pixels=max_pixels)
    # uploads and results are deleted after an hour, looked for every hour
    with gr.Blocks(title="manygates: attack two models", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(_INTRODUCTION)
        controls = _controls(shelf)
        with gr.Row():
            sides = [_side(letter, shelf, default) for letter, default in zip("AB", shelf.defaults, strict=True)]
        with gr.Accordion("How to read this, and what it cannot say", open=False):
            gr.Markdown(_EXPLANATION)
        with gr.Accordion("The result as JSON", open=False):
            numbers = gr.JSON(label="Result", show_label=False)
        _connect(shelf, controls, sides, numbers, page.GRADIO_CACHE)
        page.load(None, js=_ON_LOAD)
    # a direct call would skip the queue, and with it the limits
    page.queue(max_size=16, default_concurrency_limit=1, api_open=False)
    return cast(gr.Blocks, page)


def _controls(shelf: Shelf) -> _Controls:
    classes = list(dict.fromkeys(name for card in shelf.cards for name in card.classes))
    examples = sorted(str(file) for file in _EXAMPLES.glob("*.png"))
    default = Attack()
    with gr.Row():
        with gr.Column(scale=2, min_width=280):
            image = gr.Image(
                value=examples[0] if examples else None,
                label="Image",
                type="filepath",
                format="png",
                image_mode=None,
                sources=["upload", "clipboard"],
                buttons=[],
                height=250,
                elem_classes="picture",
                elem_id="image",
                alt_text="The image to attack",
            )
            # gradio would try all of Pillow's decoders on the file, and answer damage with a traceback
            image.preprocess = _file_of  # type: ignore[method-assign]
            drawings = gr.Examples(examples, image, label="Drawings to try").dataset if examples else None
            random_test = gr.Button("Random test image", visible=_has_test_images(shelf), elem_id="random")
            label = gr.Dropdown(
                [("automatic (the clean answer)", AUTOMATIC), *classes],
                value=AUTOMATIC,
                label="True label",
                info="A model that leaves it is fooled. Automatic: what each model answers to the clean image.",
                elem_id="label",
            )
        with gr.Column(scale=3, min_width=280):
            with gr.Row():
                model_a, model_b = (
                    gr.Dropdown(
                        shelf.choices,
                        value=value,
                        label=f"Model {letter}",
                        min_width=240,
                        elem_id=f"model-{letter.lower()}",
                    )
                    for letter, value in zip("AB", shelf.defaults, strict=True)
                )
            scenario = gr.Radio(
                [
                    ("on each model itself (white-box)", "own"),
                    ("on A, shown to both (transfer)", "a"),
                    ("on B, shown to both (transfer)", "b"),
                ],
                value="own",
                label="The adversarial image is crafted",
                elem_id="crafted",
            )
            method = gr.Radio(
                [("PGD, many steps", "PGD"), ("FGSM, one step", "FGSM")],
                value=default.method,
                label="Attack",
                elem_id="method",
            )
            with gr.Group():
                eps = gr.Slider(
                    0,
                    MAX_EPS_LEVELS,
                    value=default.eps_levels,
                    step=1,
                    label="eps, in levels of 1/255",
                    elem_id="eps",
                )
                eps_text = gr.Markdown(_eps_text(default.eps_levels), elem_id="eps-text")
            with gr.Row():
                steps = gr.Slider(1, MAX_STEPS, value=default.steps, step=1, label="Steps (PGD)", min_width=140)
                restarts = gr.Slider(1, MAX_RESTARTS, value=1, step=1, label="Attempts (PGD)", min_width=140)
            with gr.Row():
                amplification = gr.Slider(1, 50, value=20, step=1, label="Amplify the shown change", min_width=140)
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, min_width=140)
            button = gr.Button("Attack", variant="primary", size="lg", elem_id="attack")
            status = gr.Markdown("Nothing attacked yet.", elem_id="status")
    return _Controls(
        image=image,
        drawings=drawings,
        random_test=random_test,
        label=label,
        models=(model_a, model_b),
        eps=eps,
        eps_text=eps_text,
        settings=[image, label, model_a, model_b, method, scenario, eps, steps, restarts, seed, amplification],
        button=button,
        status=status,
    )


def _side(letter: str, shelf: Shelf, default: str) -> _Side:
    low = letter.lower()
    with gr.Column(min_width=320, elem_classes="side"):
        heading = _html(_heading_html(letter, default))
        with gr.Column(visible=False) as panel:
            summary = _html(elem_id=f"summary-{low}")
            with gr.Row():
                pictures = [
                    gr.Image(
                        label=what,
                        format="png",
                        interactive=False,
                        buttons=["fullscreen"],
                        height=200,
                        min_width=130,
                        elem_classes="picture",
                        alt_text=f"{what} image of model {letter}; the text above says what was answered",
                        elem_id=f"{what.lower()}-{low}",
                    )
                    for what in ("Clean", "Adversarial", "Change")
                ]
            scale = _html()
            with gr.Row():
                clean = gr.Label(label="Clean answer", num_top_classes=3, min_width=150)
                adversarial = gr.Label(label="Adversarial answer", num_top_classes=3, min_width=150)
            details = _html(elem_id=f"details-{low}")
            download = gr.DownloadButton(
                f"Download the adversarial PNG of model {letter}", size="sm", elem_id=f"download-{low}"
            )
        card = _html(card_html(*shelf.card(default)))
    return _Side(
        heading=heading,
        card=card,
        panel=panel,
        results=[*pictures, clean, adversarial, summary, scale, details, download],
    )


def _html(value: str = "", *, elem_id: str | None = None) -> gr.HTML:
    return gr.HTML(value, apply_default_css=False, elem_id=elem_id)


def _connect(shelf: Shelf, controls: _Controls, sides: Sequence[_Side], numbers: gr.JSON, cache_dir: str) -> None:
    """Say what happens when something on the page is used."""

    def attack(
        image: str | None,
        label: str,
        model_a: str,
        model_b: str,
        method: str,
        crafted: str,
        eps_levels: int,
        steps: int,
        restarts: int,
        seed: int,
        amplification: int,
    ) -> list[Any]:
        with _shown_errors():
            settings = Settings(
                model_a=_chosen(model_a, "model A"),
                model_b=_chosen(model_b, "model B"),
                label=_chosen(label, "true label"),
                scenario=cast(Scenario, _chosen(crafted, "place to craft the image")),
                attack=Attack(
                    method=cast(Method, _chosen(method, "attack")),
                    eps_levels=eps_levels,
                    steps=steps,
                    restarts=restarts,
                    seed=seed,
                ),
            )
            outcomes = contest(shelf, _read(image), settings)
        shown = [
            value
            for letter, outcome in zip("ab", outcomes, strict=True)
            for value in _shown(letter, outcome, settings.attack, amplification, cache_dir)
        ]
        return [*shown, _report(settings, outcomes), _status_text(outcomes)]

    def random_image(model: str) -> tuple[NDArray[np.uint8], str]:
        with _shown_errors():
            card, _ = shelf.card(_chosen(model, "model A"))
            images = _test_images(card.dataset)
        index = random.SystemRandom().randrange(len(images))
        planes = images.pixels[index].numpy()
        picture = planes[0] if len(planes) == 1 else planes.transpose(1, 2, 0)
        return np.ascontiguousarray(picture), card.classes[int(images.labels[index])]

    def describe(letter: str, choice: str) -> tuple[str, str]:
        with _shown_errors():
            return _heading_html(letter, choice), card_html(*shelf.card(choice))

    quiet: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    clicked = controls.button.click(
        attack,
        controls.settings,
        [*sides[0].results, *sides[1].results, numbers, controls.status],
        api_name="attack",
        api_description="Attack one image on two models; pictures come back as PNG files, numbers as JSON.",
        concurrency_limit=1,
    )
    panels = [side.panel for side in sides]
    clicked.success(lambda: [gr.update(visible=True)] * 2, None, panels, queue=False, **quiet)
    failed = "The last attack did not run; the message says why."
    clicked.failure(lambda: failed, None, [controls.status], queue=False, **quiet)
    controls.random_test.click(
        random_image, [controls.models[0]], [controls.image, controls.label], concurrency_limit=1, **quiet
    )
    controls.eps.change(None, [controls.eps], [controls.eps_text], js=_EPS_TEXT, **quiet)
    for letter, model, side in zip("AB", controls.models, sides, strict=True):
        shown_model = functools.partial(describe, letter)
        # what was shown belongs to another model now
        model.change(shown_model, [model], [side.heading, side.card], queue=False, **quiet)
        model.change(lambda: gr.update(visible=False), None, [side.panel], queue=False, **quiet)
    # another image has another label
    events = [controls.image.upload, controls.image.clear]
    for event in [*events, *([controls.drawings.click] if controls.drawings else [])]:
        event(lambda: AUTOMATIC, None, [controls.label], queue=False, **quiet)


def _report(settings: Settings, outcomes: tuple[Outcome, Outcome]) -> dict[str, Any]:
    attack = settings.attack
    iterated = attack.method == "PGD"
    return {
        "attack": {
            "method": attack.method,
            "crafted": settings.scenario,
            "eps_levels": attack.eps_levels,
            "eps": round(attack.eps_levels / 255, 6),
            "steps": attack.steps if iterated else 1,
            "restarts": attack.restarts if iterated else 1,
            "seed": attack.seed,
        },
        "a": report(outcomes[0]),
        "b": report(outcomes[1]),
    }


def _status_text(outcomes: tuple[Outcome, Outcome]) -> str:
    words = [" ".join(_VERDICTS[outcome.verdict]) for outcome in outcomes]
    return f"Model A: {words[0]}. Model B: {words[1]}."


def _heading_html(letter: str, choice: str) -> str:
    name, _, variant = choice.rpartition("/")
    return f"<h2>Model {letter}: {html.escape(name)}, {html.escape(variant)}</h2>"


def _shown(letter: str, outcome: Outcome, attack: Attack, amplification: int, cache_dir: str) -> list[Any]:
    """Return the values of a side's results, in the order of `_Side.results`."""
    card = outcome.contestant.card
    clean, adversarial = _levels(outcome.clean_png, card), _levels(outcome.adversarial_png, card)
    change_png = _png(amplified(clean, adversarial, amplification))

    def saved(png: bytes, name: str) -> str:
        return str(processing_utils.save_bytes_to_cache(png, f"model-{letter}-{name}.png", cache_dir))

    adversarial_file = saved(outcome.adversarial_png, f"adversarial-{attack.eps_levels}-of-255")
    return [
        saved(outcome.clean_png, "clean"),
        adversarial_file,
        saved(change_png, f"change-times-{amplification}"),
        dict(zip(card.classes, outcome.clean.probabilities, strict=True)),
        dict(zip(card.classes, outcome.adversarial.probabilities, strict=True)),
        _summary_html(outcome, attack),
        _scale_html(amplification),
        _details_html(outcome),
        adversarial_file,
    ]


def _scale_html(amplification: int) -> str:
    return (
        f'<p class="note">Change, x{amplification}: grey is no change, brighter is more of a colour, darker is less; '
        f"±&nbsp;{127 / amplification:.3g} levels reach white and black.</p>"
    )


def _eps_text(levels: int) -> str:
    return f"{levels}/255 = {levels / 255:.4f}: {_EPS_MEANING}"


@contextlib.contextmanager
def _shown_errors() -> Any:
    """Turn what the user can put right into a message on the page; anything else stays a defect of ours."""
    try:
        yield
    except ManygatesError as error:
        # the page renders messages as HTML, and some quote bytes of the upload
        raise gr.Error(
            html.escape(str(error), quote=False), title="That did not work", print_exception=False
        ) from error


def _chosen(value: str | None, what: str) -> str:
    if not value:
        raise BadInput(f"no {what} is chosen; choose one")
    return value


def _file_of(payload: Any) -> str | None:
    """Take the uploaded file as it is; `decode_image` decides what may be decoded."""
    if payload is None:
        return None
    if payload.path is None:
        raise gr.Error("The image came without a file; upload a PNG, JPEG or WEBP file.", print_exception=False)
    return str(payload.path)


def _read(image: str | None) -> bytes:
    if image is None:
        raise BadImage("there is no image; upload one, or choose one of the drawings")
    return Path(image).read_bytes()


def _has_test_images(shelf: Shelf) -> bool:
    """Whether a data set of these models is on this machine; nothing is fetched."""
    named = {card.dataset for card in shelf.cards} & set(datasets.DATASETS)
    return any(datasets.present(name, "test") for name in named)


@functools.cache
def _test_images(name: str) -> datasets.Images:
    return datasets.load(name, "test", fetch=False)


# ----------------------------------------------------------------------------------------------------------- to the web


def mount(app: Starlette, path: str, models: list[str], *, max_pixels: int = MAX_PIXELS) -> ASGIApp:
    """Add the page for `models` to `app` under `path`, like "/demo", and return the application.

    From here on torch computes with one thread in this process. `max_pixels` is of an uploaded image.

    Raises:
        ManygatesError: as `build`.
    """
    page = build(models, max_pixels=max_pixels)
    # One small image is too little work to share, and the server beside it needs the other cores.
    torch.set_num_threads(1)
    # Only `launch` sets this, and without it gradio (6.31) takes any file of this machine for an upload.
    page.has_launched = True
    mounted: ASGIApp = gr.mount_gradio_app(
        cast(Any, app),  # asks for FastAPI, uses only what Starlette has
        page,
        path=path,
        theme=_theme(),
        css=_CSS,
        max_file_size=MAX_FILE_SIZE,
        footer_links=["api"],
        run_history=False,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        pwa=False,
        show_error=True,
    )
    return mounted


def launch(models: list[str], host: str = "127.0.0.1", port: int = 7860) -> None:
    """Serve the page for `models` alone, until SIGINT or SIGTERM.

    Args:
        models: all that come with the package if empty.
        port: 0 takes a free one; the address is printed on standard error.

    Raises:
        BadInput: if the address cannot be used, as when the port is taken.
        ManygatesError: as `build`.
    """
    with contextlib.closing(bind(host, port)) as listener:
        app = mount(Starlette(), "/", models)
        print(f"attack demo on {url_of(listener)} (Ctrl-C stops it)", file=sys.stderr, flush=True)
        _Server(uvicorn.Config(app, log_level="warning", ws="none", timeout_graceful_shutdown=2)).run([listener])


class _Server(uvicorn.Server):
    """Uvicorn, which returns after a signal instead of raising it again."""

    def handle_exit(self, sig: int, frame: Any) -> None:
        self.force_exit = self.should_exit
        self.should_exit = True
