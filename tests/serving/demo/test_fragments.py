"""The page's sentences and its HTML."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the demo needs torch")
pytest.importorskip("jinja2", reason="the demo's HTML is made with jinja2")

from serving.demo import fragments, words
from serving.demo.attack import Attack
from serving.demo.contest import Outcome, Setup, contest
from serving.demo.shelf import Shelf
from zoo.bundle.card import Card, Check, Finding, Lint, Result

PGD = Attack(eps_levels=8, steps=3)


@pytest.fixture(scope="module")
def both(shelf: Shelf, image_png: bytes) -> tuple[Outcome, Outcome]:
    return contest(shelf, image_png, Setup(model_a="plain/single", model_b="gates/gated", attack=PGD))


@pytest.fixture
def card(shelf: Shelf) -> Card:
    return shelf.card("plain/single")[0]


def rows(html: str) -> list[list[str]]:
    """Return the cells of each row, without tags."""
    cells = [re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row, re.S) for row in re.findall(r"<tr>(.*?)</tr>", html, re.S)]
    return [[" ".join(re.sub(r"<.*?>", " ", cell).split()) for cell in row] for row in cells]


# ------------------------------------------------------------------------------------------------------------- the card


def test_a_card_shows_what_was_measured_and_what_was_not(shelf: Shelf, card: Card) -> None:
    clean, white, transfer = rows(fragments.card(card, "single"))

    assert clean[:2] == ["clean", "87.7 % [86.0–89.0]"] or clean[:2] == ["clean", "87.6 % [86.0–89.0]"]
    assert white[:2] == ["white-box, eps 0.01", "25.0 % [20.0–30.0]"]
    assert all(said in white[2] for said in ("PGD, 50 steps", "5 restarts", "1,000 images", "2026-11-21"))
    assert transfer == ["transfer, eps 0.03", "not measured"]


def test_a_card_says_of_a_variant_only_what_was_measured_of_it(shelf: Shelf) -> None:
    found = fragments.accuracies(*shelf.card("gates/gated"))

    assert found == [("clean", None), ("random gates, eps 0.01", None), ("transfer, eps 0.03", None)]


def test_a_card_that_was_never_measured_is_asked_for_the_usual_radii(card: Card) -> None:
    found = fragments.accuracies(replace(card, results=()), "single")

    assert [name for name, result in found] == [
        *("clean", "white-box, eps 0.01", "white-box, eps 0.03", "transfer, eps 0.03")
    ]


def test_the_accuracy_on_most_images_stands_for_a_model_not_the_latest(
    card: Card, make_result: Callable[..., Result]
) -> None:
    latest = make_result(images=100, accuracy=0.99, interval=(0.9, 1.0), date="2026-12-01")
    most = make_result(images=2000, accuracy=0.8, interval=(0.7, 0.9))

    found = dict(fragments.accuracies(replace(card, results=(most, *card.results, latest)), "single"))

    assert found["clean"] == most


def test_a_failed_sanity_check_stands_beside_its_number(card: Card, make_result: Callable[..., Result]) -> None:
    failed = make_result(checks=(Check(name="more steps break more", held=False, detail=""),))

    (clean, *_) = rows(fragments.card(replace(card, results=(failed,)), "single"))

    assert "more steps break more" in clean[2]


def test_a_card_shows_what_the_linter_found(card: Card) -> None:
    alarm = Finding(code="L1", name="masked", verdict="alarm", figure="0.5 of 1", meaning="Gradients say nothing.")
    fine = replace(alarm, code="L2", verdict="ok")

    def shown(*findings: Finding) -> str:
        lint = Lint(variant="single", images=8, seed=0, findings=findings, date="2026-11-21", command="lint")
        return fragments.card(replace(card, lint=(lint,)), "single")

    assert 'class="alarm"' in shown(alarm, fine)
    assert all(said in shown(alarm, fine) for said in ("L1 masked", "0.5 of 1", "Gradients say nothing."))
    assert "L2" not in shown(alarm, fine)
    assert 'class="alarm"' not in shown(fine)
    assert 'class="alarm"' not in fragments.card(card, "single")


def test_a_hostile_card_is_shown_as_text(card: Card) -> None:
    hostile = replace(card, description="<script>alert(1)</script>\x1b[31m")

    shown = fragments.card(hostile, "single")

    assert "&lt;script&gt;" in shown
    assert "<script" not in shown
    assert "\x1b" not in shown


def test_what_a_variant_is_depends_on_the_model(shelf: Shelf, make_bundle: Callable[..., str], tmp_path: Path) -> None:
    said = {choice: words.described(*shelf.card(choice)) for choice in shelf.choices}
    exits = Shelf([make_bundle(tmp_path / "leaver", network="msdnet3", exits=3)])

    assert said["plain/single"] == said["digits/single"]
    assert len(set(said.values())) == 4
    assert "3 exits" in words.described(*exits.card("leaver/single"))


# ---------------------------------------------------------------------------------------------------------- the outcome


def test_a_summary_gives_the_change_the_effort_and_the_knowledge(both: tuple[Outcome, Outcome]) -> None:
    for outcome, gradients in zip(both, (3, 12), strict=True):
        facts = dict(words.facts(outcome, PGD))
        assert re.findall(r"\d+/255", facts["Largest change"]) == [f"{outcome.distance}/255", "8/255"]
        assert facts["Effort"].startswith(f"{gradients} gradient evaluations (3 steps in 1 attempt")
        assert all(fact.replace("'", "&#39;") in fragments.summary(outcome, PGD) for fact in facts.values())
    assert "paths each" in dict(words.facts(both[1], PGD))["Effort"]


def test_one_step_is_one_gradient(shelf: Shelf, image_png: bytes) -> None:
    attack = Attack(method="FGSM")
    outcome, _ = contest(shelf, image_png, Setup(model_a="plain/single", model_b="plain/single", attack=attack))

    assert dict(words.facts(outcome, attack))["Effort"].startswith("1 gradient evaluation (1 step)")


def test_the_label_is_a_fact_only_if_none_was_given(both: tuple[Outcome, Outcome]) -> None:
    assert "Label" in dict(words.facts(both[0], PGD))
    assert "Label" not in dict(words.facts(replace(both[0], label_given=True), PGD))


def test_what_the_attacker_knows_depends_on_what_was_attacked(shelf: Shelf, both: tuple[Outcome, Outcome]) -> None:
    plain, gated = both
    ensemble, single = (shelf.contestant(f"gates/{variant}") for variant in ("ensemble", "single"))
    stranger = replace(plain, surrogate=gated.contestant, surrogate_letter="B")
    sibling = replace(stranger, contestant=single)
    cases = [plain, gated, replace(plain, contestant=ensemble, surrogate=ensemble), stranger, sibling]

    said = [words.knowledge(outcome) for outcome in cases]

    assert len(set(said)) == 5
    assert "(gates, gated)" in said[3]
    assert said[4].startswith(said[3]), "a transfer within one bundle says more"
    assert "same weights" in said[4].removeprefix(said[3])


def test_the_verdict_is_told_with_the_probabilities_that_changed(both: tuple[Outcome, Outcome]) -> None:
    outcome = both[0]
    classes = outcome.contestant.card.classes
    one, other = ([0.75, 0.25] + [0.0] * 8), ([0.4, 0.6] + [0.0] * 8)
    fooled = replace(
        outcome,
        label=0,
        clean=replace(outcome.clean, probabilities=one),
        adversarial=replace(outcome.adversarial, probabilities=other),
    )
    held = replace(fooled, adversarial=fooled.clean)
    wrong = replace(fooled, label=2)

    assert [each.verdict for each in (fooled, held, wrong)] == ["fooled", "held", "wrong before"]
    assert all(said in words.summary(fooled) for said in (classes[0], "75.0 %", classes[1], "60.0 %"))
    assert words.summary(held).count("75.0 %") == 2
    assert all(name in words.summary(wrong) for name in classes[:3])
    for each in (fooled, held, wrong):
        assert f"{words.VERDICTS[each.verdict]}." in fragments.summary(each, PGD)
        assert words.VERDICTS[each.verdict] in words.status((fooled, each))


@pytest.mark.parametrize(
    ("share", "said"), [(0, "0.0 %"), (0.0005, "under 0.1 %"), (0.5, "50.0 %"), (0.9995, "over 99.9 %"), (1, "100.0 %")]
)
def test_a_probability_that_is_not_quite_0_or_1_does_not_read_as_such(share: float, said: str) -> None:
    assert words.probability(share) == said


def test_only_random_gates_show_a_vote(both: tuple[Outcome, Outcome]) -> None:
    plain, gated = both
    classes = gated.contestant.card.classes

    _, *votes = rows(fragments.details(gated))

    counted = zip(classes, gated.clean.votes, gated.adversarial.votes, strict=True)
    assert {name.removesuffix(" (label)"): (int(clean), int(adversarial)) for name, clean, adversarial in votes} == {
        name: (clean, adversarial) for name, clean, adversarial in counted if clean or adversarial
    }
    assert [name for name, *_ in votes if name.endswith(" (label)")] == [f"{classes[gated.label]} (label)"]
    assert rows(fragments.details(plain)) == []


def test_a_trace_has_a_line_per_attempt_and_belongs_to_the_model_that_was_attacked(
    both: tuple[Outcome, Outcome],
) -> None:
    plain = both[0]
    twice = replace(plain, crafted=replace(plain.crafted, trace=[[1.0, 0.5, 0.0], [1.0]]))

    shown = fragments.details(twice)

    assert re.findall(r'points="(.*?)"', shown) == ["0.0,0.0 150.0,35.0 300.0,70.0", "0.0,0.0"]
    assert fragments.details(replace(twice, surrogate=both[1].contestant)) == ""
    assert fragments.details(replace(plain, crafted=replace(plain.crafted, trace=[]))) == ""
