"""How results are spelt, wherever they are shown."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from zoo.bundle.card import Card, Result
from zoo.bundle.wording import accuracy, apart, plain, slug, terms, usual_terms

_, ATTACKED = Card.from_json((Path(__file__).parents[1] / "golden_card.json").read_text(encoding="utf-8")).results


def attacked(accuracy: float = 0.42, **changes: Any) -> Result:
    return replace(ATTACKED, accuracy=accuracy, interval=(accuracy, accuracy), **changes)


def test_terms_that_lack_something_are_said_in_full() -> None:
    bare = attacked(restarts=0, steps=0, step_size=0.0)
    usual = usual_terms([attacked(), attacked(), bare])
    assert usual == terms(attacked())
    assert apart(attacked(), usual) == ""
    assert apart(bare, usual) == "1,000 images, seed 0"


def test_a_step_is_a_part_of_eps_only_where_it_is_one() -> None:
    assert terms(attacked(step_size=8 / 255 / 5)).startswith("50 steps of ε/5, 5 restarts")
    assert terms(attacked(step_size=8 / 255)).startswith("50 steps of ε,")
    assert terms(attacked(step_size=0.002)).startswith("50 steps of 0.002,")


def test_words_of_a_report() -> None:
    assert plain(" a\n\tb\x07 ") == "a b\ufffd"
    assert slug("White-box PGD, ε 8/255") == "white-box-pgd-8-255"
    assert slug("../../etc", ["etc"]) == "etc-2"
    assert slug("中文") == "figure"
    assert accuracy(attacked(0.4567)) == "45.7 %"
    assert accuracy(attacked(0.4567, images=10_000)) == "45.67 %"
