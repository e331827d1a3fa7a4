"""One image against two models: what each of them answers before and after the attack."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch

from serving.demo.attack import Attack, Crafted, check_choice, craft
from serving.demo.pictures import Levels, batch_of, check_still, png_distance, png_of, read_levels
from serving.demo.shelf import VOTES, Contestant, Shelf
from zoo.errors import BadInput

Scenario = Literal["own", "a", "b"]
"""The model on which the image is crafted: each is attacked itself, or both are shown the image of one."""
Verdict = Literal["fooled", "held", "wrong before"]

AUTOMATIC = "automatic"
"""The label that stands for the model's own answer to the clean image."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Everything that a contest needs beside the image.

    Raises:
        BadInput: something was not chosen.
        UnknownName: the scenario is none.
    """

    model_a: str
    """As "name/variant"; so is `model_b`."""
    model_b: str
    label: str = AUTOMATIC
    """A class of both models, or `AUTOMATIC`."""
    scenario: Scenario = "own"
    attack: Attack = field(default_factory=Attack)

    def __post_init__(self) -> None:
        check_choice("model A", self.model_a)
        check_choice("model B", self.model_b)
        check_choice("true label", self.label)
        check_choice("place to craft the image", self.scenario, get_args(Scenario))


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
    def verdict(self) -> Verdict:
        """Whether the attack changed a correct answer; one that was wrong before is not to its credit."""
        if self.clean.top != self.label:
            return "wrong before"
        return "fooled" if self.adversarial.top != self.label else "held"

    @property
    def distance(self) -> int:
        """The largest change of any number, in levels, measured on the PNG files that are handed out."""
        return png_distance(self.clean_png, self.adversarial_png)


def contest(shelf: Shelf, content: bytes, setup: Setup) -> tuple[Outcome, Outcome]:
    """Attack one image file on two models.

    Raises:
        BadImage: if the bytes are no still PNG, JPEG or WEBP image of reasonable size.
        BadInput: if the label is no class of a model, or an image is to be transferred between models that take
            different images or know different classes.
        UnknownName: if a model is not on offer.
    """
    contestants = shelf.contestant(setup.model_a), shelf.contestant(setup.model_b)
    clean = [read_levels(content, each.card.input, max_pixels=shelf.max_pixels) for each in contestants]
    check_still(content)
    if setup.scenario != "own":
        _check_comparable(*contestants)
    seed = setup.attack.seed
    answers = [_answer(each, levels, seed) for each, levels in zip(contestants, clean, strict=True)]
    labels = [_label(setup.label, each, answer) for each, answer in zip(contestants, answers, strict=True)]
    crafted: dict[int, Crafted] = {}
    outcomes = []
    for index, contestant in enumerate(contestants):
        source = {"own": index, "a": 0, "b": 1}[setup.scenario]
        if source not in crafted:
            crafted[source] = craft(contestants[source], clean[source], labels[source], setup.attack)
        levels = crafted[source].levels
        outcomes.append(
            Outcome(
                contestant=contestant,
                surrogate=contestants[source],
                surrogate_letter="AB"[source],
                label=labels[index],
                label_given=setup.label != AUTOMATIC,
                clean_png=png_of(clean[index]),
                adversarial_png=png_of(levels),
                crafted=crafted[source],
                clean=answers[index],
                adversarial=_answer(contestant, levels, seed),
            )
        )
    return outcomes[0], outcomes[1]


def _check_comparable(a: Contestant, b: Contestant) -> None:
    shapes = [(each.card.input.channels, each.card.input.height, each.card.input.width) for each in (a, b)]
    if shapes[0] != shapes[1] or a.card.classes != b.card.classes:
        raise BadInput(
            f"an image cannot be transferred between {a.name} (images {shapes[0]}, {len(a.card.classes)} classes) and "
            f"{b.name} (images {shapes[1]}, {len(b.card.classes)} classes); choose models of one data set"
        )


def _answer(contestant: Contestant, levels: Levels, seed: int) -> Answer:
    """Ask for an answer; the same seed draws the same paths for the clean and the adversarial image."""
    rng = random.Random(f"{seed} vote")  # noqa: S311 -- repeatable on purpose
    draws = contestant.probabilities(batch_of(levels), rng)[:, 0]
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


def report(setup: Setup, outcomes: tuple[Outcome, Outcome]) -> dict[str, Any]:
    """Return a contest as JSON's types; probabilities are between 0 and 1, distances in levels of 1/255."""
    attack = setup.attack
    return {
        "attack": {
            "method": attack.method,
            "crafted": setup.scenario,
            "eps_levels": attack.eps_levels,
            "eps": round(attack.eps_levels / 255, 6),
            "steps": attack.steps if attack.iterated else 1,
            "restarts": attack.restarts if attack.iterated else 1,
            "seed": attack.seed,
        },
        "a": _report(outcomes[0]),
        "b": _report(outcomes[1]),
    }


def _report(outcome: Outcome) -> dict[str, Any]:
    classes = outcome.contestant.card.classes
    votes = {
        "draws": VOTES,
        "clean": _named_votes(classes, outcome.clean.votes),
        "adversarial": _named_votes(classes, outcome.adversarial.votes),
    }
    return {
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
        "votes": votes if outcome.contestant.gated else None,
    }


def _named_votes(classes: Sequence[str], votes: Sequence[int]) -> dict[str, int]:
    return {name: count for name, count in zip(classes, votes, strict=True) if count}
