"""One adversarial image for one model, in closed form."""

import random
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="the demo needs torch")

import torch

from serving.demo.attack import Attack, Crafted, Method, craft
from serving.demo.pictures import batch_of
from serving.demo.shelf import Contestant, Shelf
from zoo.errors import BadInput, UnknownName


class HalfSpace(torch.nn.Module):
    """Answers class 1 where the mean of all levels is above `boundary`, and class 0 elsewhere."""

    def __init__(self, boundary: float) -> None:
        super().__init__()
        self.boundary = boundary

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        score = 255 * images.flatten(1).mean(1) - self.boundary
        return torch.stack([-score, score], 1)


def half_space(shelf: Shelf, boundary: float) -> Contestant:
    card, _ = shelf.card("plain/single")
    return Contestant(name="half-space", variant="single", card=card, network=HalfSpace(boundary).eval())


def grey(level: int) -> np.ndarray:
    return np.full((3, 4, 4), level, dtype=np.uint8)


@pytest.mark.parametrize("method", ["FGSM", "PGD"])
@pytest.mark.parametrize(("eps_levels", "broken"), [(2, False), (3, True)])
def test_a_half_space_falls_exactly_when_the_whole_levels_reach_its_boundary(
    shelf: Shelf, method: Method, eps_levels: int, broken: bool
) -> None:
    model = half_space(shelf, 102.5)

    crafted = craft(model, grey(100), 0, Attack(method=method, eps_levels=eps_levels, steps=12, restarts=2))

    assert (crafted.levels == 100 + eps_levels).all()
    answer = model.probabilities(batch_of(crafted.levels), random.Random(0))
    assert bool(answer.argmax() == 1) == broken
    assert crafted.attempts == (1 if broken or method == "FGSM" else 2)
    assert crafted.gradients == crafted.attempts * (1 if method == "FGSM" else 12)


def test_an_attack_stops_at_black_and_white(shelf: Shelf) -> None:
    crafted = craft(half_space(shelf, 256.0), grey(253), 0, Attack(eps_levels=8, steps=10))

    assert (crafted.levels == 255).all()


def test_the_trace_says_what_the_attacker_saw_before_each_step(shelf: Shelf) -> None:
    def crafted(method: Method) -> Crafted:
        return craft(half_space(shelf, 110.0), grey(100), 0, Attack(method=method, steps=3, restarts=2))

    assert [len(seen) for seen in crafted("PGD").trace] == [3, 3]
    assert crafted("FGSM").trace == []


def test_of_attempts_that_all_fail_the_best_is_returned(shelf: Shelf) -> None:
    one, several = (
        craft(half_space(shelf, 110.0), grey(100), 0, Attack(eps_levels=8, steps=1, restarts=restarts))
        for restarts in (1, 5)
    )

    assert several.levels.mean() > one.levels.mean(), "nearer to the boundary"


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("steps", 0, "from 1 to 50"),
        ("steps", 51, "from 1 to 50"),
        ("eps_levels", 2.5, "from 0 to 255"),
        ("restarts", 6, "from 1 to 5"),
        ("seed", None, "from 0 to 2147483647"),
    ],
)
def test_a_number_out_of_range_is_refused_with_the_range(field: str, value: Any, expected: str) -> None:
    with pytest.raises(BadInput, match=f"{field} is {value}, .*{expected}"):
        Attack(**{field: value})


def test_an_unknown_attack_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UnknownName) as refused:
        Attack(method="CW")  # type: ignore[arg-type]
    assert (refused.value.name, refused.value.known) == ("CW", ("FGSM", "PGD"))
