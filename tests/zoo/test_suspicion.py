"""Suspicion: thresholds in closed form, counting on hand-made cases, the adaptive attack where its goal is known."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import manygates
from zoo import suspicion
from zoo.attacks.budget import LinfBudget
from zoo.attacks.gradient import pgd
from zoo.bundle.bundle import Bundle, record_suspicion
from zoo.bundle.card import Card, Suspicion, Training
from zoo.bundle.readme import model_card
from zoo.data import datasets
from zoo.errors import BadInput, BundleError
from zoo.export.write import Description, export_members, export_rgn
from zoo.gates.derive import agreement, mean_probability
from zoo.gates.rgn import RandomGatedNetwork
from zoo.suspicion import Attack, calibrate, detection_of, spared_images, threshold_of, unanimous
from zoo.weights.checkpoint import Architecture
from zoo.weights.models import member_networks

PATHS = [(0, 1, 0, 1, 0, 1, 0), (1, 1, 0, 1, 0, 1, 0), (1, 0, 1, 1, 0, 0, 1)]
HELD_OUT = 40


def shares(voters: int, *votes: int) -> Tensor:
    """Return agreements as a graph counts them: float32, votes divided by voters."""
    return torch.tensor(votes, dtype=torch.float32) / voters


# --- the threshold ---

KNOWN = shares(4, *[1] * 5, *[2] * 5, *[3] * 10, *[4] * 80)
"""Of 100 clean images 5, 10 and 20 per cent have fewer than 2, 3 and 4 of 4 votes."""


@pytest.mark.parametrize(
    ("rate", "threshold", "flagged"),
    [
        (0.01, 1 / 8, 0.0),
        (0.049, 1 / 8, 0.0),
        (0.05, 3 / 8, 0.05),  # at most the stated rate: equal is allowed
        (0.0999, 3 / 8, 0.05),
        (0.1, 5 / 8, 0.1),
        (0.2, 7 / 8, 0.2),
        (0.9, 7 / 8, 0.2),  # nothing is flagged on which all agree
    ],
)
def test_the_threshold_of_a_known_distribution_is_the_largest_within_the_rate(
    rate: float, threshold: float, flagged: float
) -> None:
    assert threshold_of(KNOWN, 4, rate) == (threshold, flagged)


def test_where_even_the_fewest_votes_are_common_nothing_is_flagged() -> None:
    """Agreement 0 is possible: the mean may have a winner that no voter names."""
    assert threshold_of(shares(3, 0, 0, 3, 3), 3, 0.25) == (0.0, 0.0)
    assert threshold_of(shares(3, 0, 1, 3, 3), 3, 0.25) == (1 / 6, 0.25)


@pytest.mark.parametrize("seed", range(20))
def test_a_threshold_never_flags_more_than_stated_and_the_next_one_would(seed: int) -> None:
    rng = random.Random(seed)
    voters, number = rng.randint(2, 20), rng.randint(1, 300)
    rate = rng.choice([0.001, 0.05, 0.1, 0.5, 0.99, 1 / 3])
    votes = [rng.randint(0, voters) for _ in range(number)]
    agreements = shares(voters, *votes)
    threshold, flagged = threshold_of(agreements, voters, rate)
    assert flagged == int((agreements.double() < threshold).sum()) / number
    assert flagged <= rate
    higher = threshold + 1 / voters if threshold else 1 / (2 * voters)
    if higher < 1:
        assert sum(vote / voters < higher for vote in votes) / number > rate


@pytest.mark.parametrize("voters", range(2, 65))
def test_no_rounding_moves_an_image_across_a_threshold(voters: int) -> None:
    """Shares of votes are no exact numbers (1/3 in float32 is above 1/3, 3/7 below): thresholds lie between them."""
    counts = shares(voters, *range(voters + 1))
    for winning in range(1, voters + 1):
        below = shares(voters, *[winning - 1] * 1, *[winning] * 99)
        threshold, _ = threshold_of(below, voters, 0.01)
        for kind in (torch.float32, torch.float64):
            assert int((counts.to(kind) < threshold).sum()) == winning


@pytest.mark.parametrize(
    ("agreements", "voters", "rate", "said"),
    [
        (KNOWN, 4, 0.0, "between 0 and 1, got 0"),
        (KNOWN, 4, 1.0, "between 0 and 1, got 1"),
        (KNOWN, 4, 5.0, "between 0 and 1, got 5"),
        (KNOWN, 4, float("nan"), "between 0 and 1, got nan"),
        (KNOWN, 1, 0.05, "1 voter always agrees with itself"),
        (KNOWN[:0], 4, 0.05, "needs clean images to be set on, got none"),
        (KNOWN, 3, 0.05, "an agreement of 0.25 is no share of 3 votes"),
        (shares(4, 4, 5), 4, 0.05, "an agreement of 1.25 is no share of 4 votes"),
        (torch.tensor([float("nan")]), 4, 0.05, "an agreement of nan is no share of 4 votes"),
    ],
)
def test_a_threshold_of_nothing_or_of_the_impossible_is_refused(
    agreements: Tensor, voters: int, rate: float, said: str
) -> None:
    with pytest.raises(BadInput, match=said):
        threshold_of(agreements, voters, rate)


# --- agreement and detection ---


def test_agreement_counts_the_votes_for_the_winner_of_the_mean_not_for_the_most_named() -> None:
    """Two voters hardly prefer class 0, one is sure of class 1: the mean says 1, and one in three agrees."""
    logits = torch.tensor([[[0.51, 0.49, 0.0]], [[0.51, 0.49, 0.0]], [[0.0, 9.0, 0.0]]])
    assert agreement(logits).tolist() == [float(shares(3, 1))]
    nobody = torch.tensor([[[5.0, 4.9, -9.0]], [[-9.0, 4.9, 5.0]]])  # each has a favourite, the mean a compromise
    assert agreement(nobody).tolist() == [0.0]


def test_detection_is_counted_among_the_images_that_were_broken() -> None:
    attack = Attack("by hand", 7, "a remark", lambda images, *_: images)
    found = detection_of(
        attack,
        Fraction(8, 255),
        answers=torch.tensor([0, 0, 1, 1, 1, 1]),
        agreements=shares(3, 3, 1, 1, 2, 3, 3),  # flagged: the second, which is right, and the third, which is broken
        labels=torch.zeros(6, dtype=torch.int64),
        threshold=0.5,
    )
    assert (found.images, found.successful) == (6, 4)
    assert found.rate == 0.25
    assert found.rate_of_all == round(2 / 6, 6)
    assert found.evaded == 3 / 6
    assert found.interval[0] < 0.25 < found.interval[1]
    assert (found.attack, found.eps_fraction, found.steps, found.adaptive) == ("by hand", "8/255", 7, False)


def test_an_attack_that_breaks_nothing_has_no_detection_rate_and_leaves_nothing() -> None:
    attack = Attack("idle", 0, "", lambda images, *_: images)
    labels = torch.zeros(3, dtype=torch.int64)
    found = detection_of(attack, Fraction(0), labels, shares(2, 2, 1, 2), labels, 0.75)
    assert (found.successful, found.rate, found.interval, found.evaded) == (0, 0.0, (0.0, 1.0), 0.0)
    assert found.rate_of_all == round(1 / 3, 6)


# --- the adaptive attack, where the best answer is known ---


def first(images: Tensor) -> Tensor:
    """Vote for class 1 where the first pixel is above 0.6; be more easily won for class 2 by the second pixel."""
    x, y = images[:, 0, 0, 0], images[:, 0, 0, 1]
    return torch.stack([torch.zeros_like(x), 10 * (x - 0.6), 20 * (y - 0.6)], dim=1)


def second(images: Tensor) -> Tensor:
    """Vote for class 1 where the first pixel is above 0.6; class 2 is out of reach."""
    x, y = images[:, 0, 0, 0], images[:, 0, 0, 1]
    return torch.stack([torch.zeros_like(x), 10 * (x - 0.6), 10 * (y - 0.95)], dim=1)


GREY, ZERO = torch.full((1, 1, 1, 2), 0.5), torch.zeros(1, dtype=torch.int64)


def votes(images: Tensor) -> tuple[int, float]:
    logits = torch.stack([first(images), second(images)])
    return int(mean_probability(logits).argmax()), float(agreement(logits))


def test_the_adaptive_attack_finds_the_class_on_which_voters_can_agree_and_plain_pgd_does_not() -> None:
    budget = LinfBudget(eps=0.3, steps=20, random_start=False)

    def mean(images: Tensor) -> Tensor:
        return mean_probability(torch.stack([first(images), second(images)]))

    plain = pgd(mean, GREY, ZERO, budget)
    assert votes(plain)[0] != 0
    assert votes(plain)[1] == 0.5  # one voter says 1, the other 2
    adaptive = unanimous(lambda: [first, second], GREY, ZERO, budget)
    assert votes(adaptive) == (1, 1.0)
    assert float((adaptive - GREY).abs().max()) <= 0.3 + 1e-6
    x, y = adaptive.flatten().tolist()
    assert x > 0.6  # what class 1 takes
    assert 20 * (y - 0.6) < 10 * (x - 0.6)  # and what the first voter must not be tempted by


def test_the_adaptive_attack_stays_in_its_ball_where_there_is_nothing_to_find() -> None:
    budget = LinfBudget(eps=0.05, steps=5, restarts=2)
    adaptive = unanimous(lambda: [first, second], GREY, ZERO, budget, generator=torch.Generator().manual_seed(0))
    assert votes(adaptive)[0] == 0
    assert float((adaptive - GREY).abs().max()) <= 0.05 + 1e-6


def test_the_adaptive_attack_keeps_the_best_iterate_of_each_image() -> None:
    """Images in one batch are attacked independently: alone, each ends where it does in company."""
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(6, 1, 1, 2, generator=generator) * 0.2 + 0.4
    labels = torch.zeros(6, dtype=torch.int64)
    budget = LinfBudget(eps=0.25, steps=10, random_start=False)
    together = unanimous(lambda: [first, second], images, labels, budget)
    alone = [unanimous(lambda: [first, second], images[i : i + 1], labels[:1], budget) for i in range(6)]
    assert torch.equal(together, torch.cat(alone))
    assert unanimous(lambda: [first, second], images[:0], labels[:0], budget).shape == (0, 1, 1, 2)


# --- whole calibrations ---


def built(dataset: str) -> tuple[RandomGatedNetwork, Architecture]:
    architecture = Architecture(
        network="resnet8", options={"width": 4}, dataset=dataset, candidates=2, sharing="independent"
    )
    torch.manual_seed(0)
    rgn = architecture.build()
    assert isinstance(rgn, RandomGatedNetwork)
    for module in rgn.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
            nn.init.normal_(module.running_mean, 0, 0.2)
    return rgn.eval(), architecture


def description(**recipe: object) -> Description:
    training = Training(recipe=recipe, seed=0, commit="abc", versions={}, date="2026-11-21", summary="none")
    return Description(name="some", description="made by a test", method="standard", training=training)


@pytest.fixture(scope="module")
def folder(tiny_dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models") / "gated"
    rgn, architecture = built(tiny_dataset)
    export_rgn(place, rgn, architecture, description(held_out=HELD_OUT), single=PATHS[0], ensemble=PATHS)
    return place


@pytest.fixture(autouse=True)
def _brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attacks need no strength here."""
    brief = {"STEPS": 3, "RESTARTS": 2, "EXPECTED_STEPS": 2, "EXPECTED_DRAWS": 3, "ADAPTIVE_RESTARTS": 2, "BATCH": 7}
    brief |= {"QUERIES": 4, "RANDOM_QUERIES": 4, "SQUARE_DRAWS": 2}
    for name, value in brief.items():
        monkeypatch.setattr(suspicion, name, value)


def measured(folder: Path, variant: str, **options: object) -> Suspicion:
    terms = {"rate": 0.3, "eps": [Fraction(1, 20)], "attacked": 6, "command": "repeat", **options}
    return calibrate(Bundle.open(folder), variant, **terms)  # type: ignore[arg-type]


def test_a_calibration_of_an_ensemble_says_what_it_flags_and_catches(folder: Path) -> None:
    found = measured(folder, "ensemble")
    assert (found.variant, found.draws, found.false_positive_rate) == ("ensemble", 0, 0.3)
    assert (found.calibration_images, found.images) == (HELD_OUT // 2, HELD_OUT // 2)
    assert found.threshold in (0.0, 1 / 6, 1 / 2, 5 / 6)
    assert [each.attack for each in found.detection] == [
        "PGD, first success",
        "PGD, all steps",
        "Square",
        "adaptive PGD",
    ]
    assert [each.adaptive for each in found.detection] == [False, False, False, True]
    assert all(each.images <= 6 and each.eps_fraction == "1/20" for each in found.detection)
    assert "held out of training" in found.source
    assert "the first 20 set the threshold, the other 20 measured it" in found.source


def test_the_measured_rate_is_that_of_the_images_that_did_not_set_the_threshold(folder: Path) -> None:
    bundle = Bundle.open(folder)
    found = measured(folder, "ensemble")
    spared, _ = spared_images(bundle.card)
    with torch.no_grad():
        counts = agreement(
            torch.stack([member(datasets.as_float(spared.pixels)) for member in member_networks(bundle, "ensemble")])
        )
    threshold, _ = threshold_of(counts[:20], 3, 0.3)
    assert found.threshold == threshold
    assert found.measured_false_positive_rate == float((counts[20:] < threshold).double().mean())


def test_random_gates_are_calibrated_on_their_draws_and_twice_alike(folder: Path) -> None:
    found = measured(folder, "gated", draws=4)
    assert (found.variant, found.draws, found.images) == ("random", 4, HELD_OUT // 2)
    assert found.threshold * 8 == pytest.approx(round(found.threshold * 8))
    assert [each.attack for each in found.detection] == ["EOT-3 PGD", "Square", "adaptive PGD"]
    assert measured(folder, "gated", draws=4) == found
    assert measured(folder, "gated", attacked=1).draws == suspicion.DRAWS


def test_a_surrogate_adds_a_transfer_attack(folder: Path, tiny_dataset: str, tmp_path: Path) -> None:
    architecture = Architecture(network="resnet8", options={"width": 4}, dataset=tiny_dataset)
    torch.manual_seed(5)
    export_members(tmp_path / "other", [architecture.build().eval()], architecture, description())
    found = measured(folder, "ensemble", surrogates=[f"local-dir:{tmp_path / 'other'}"])
    assert [each.attack for each in found.detection][-2:] == ["transfer from some", "adaptive PGD"]
    with pytest.raises(BadInput, match="surrogate"):
        measured(folder, "ensemble", surrogates=[f"local-dir:{folder}"])  # the target itself


@pytest.mark.parametrize(
    ("variant", "options", "said"),
    [
        ("single", {}, "agrees with itself; name ensemble or gated"),
        ("ensemble", {"draws": 4}, "takes no draws, got draws=4"),
        ("gated", {"draws": 1}, "has 1 voter"),
        ("gated", {"rate": 1.5}, "between 0 and 1, got 1.5"),
        ("ensemble", {"images": 1}, f"cannot calibrate on 1 images, expected 2 to {HELD_OUT}"),
        ("ensemble", {"images": 41}, f"cannot calibrate on 41 images, expected 2 to {HELD_OUT}"),
        ("ensemble", {"attacked": 0}, "at least 1 image to attack, got 0"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(
    folder: Path, variant: str, options: dict[str, object], said: str
) -> None:
    with pytest.raises(BadInput, match=said):
        measured(folder, variant, **options)


def test_a_model_that_is_never_right_cannot_be_attacked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = datasets.Images(torch.zeros(4, 3, 16, 16, dtype=torch.uint8), torch.full((4,), 9))
    monkeypatch.setattr(suspicion, "spared_images", lambda *_: (wrong, "nothing"))
    with pytest.raises(BadInput, match="answers none of the 2 measuring images correctly"):
        measured(folder, "ensemble")


def test_a_plain_network_has_no_agreement(tiny_dataset: str, tmp_path: Path) -> None:
    architecture = Architecture(network="resnet8", options={"width": 4}, dataset=tiny_dataset)
    export_members(tmp_path / "plain", [architecture.build().eval()], architecture, description())
    with pytest.raises(BadInput, match="has no variant 'ensemble'"):
        measured(tmp_path / "plain", "ensemble")


# --- which images ---


def trained(folder: Path, **recipe: object) -> Card:
    card = Bundle.open(folder, only=()).card
    return replace(card, training=replace(card.training, recipe=recipe))


def test_the_images_are_those_that_training_held_out(folder: Path) -> None:
    spared, origin = spared_images(trained(folder, held_out=30))
    train = datasets.load("tiny", "train")
    rest, held_out = datasets.hold_out(train, 30, datasets.HOLD_OUT_SEED)
    assert torch.equal(spared.pixels, held_out.pixels)
    assert not set(map(bytes, spared.pixels.numpy())) & set(map(bytes, rest.pixels.numpy()))
    assert origin.startswith("30 tiny training images that the recipe held out")
    few, _ = spared_images(trained(folder, held_out=30), 10)
    assert torch.equal(few.pixels, held_out.pixels[:10])


@pytest.mark.parametrize(
    "recipe",
    [
        {},
        {"held_out": 0},
        {"held_out": 30, "derived": {"finetune_epochs": 2, "recalibrated": False}},
        {"held_out": 30, "derived": {"finetune_epochs": 0, "recalibrated": True}},
    ],
)
def test_where_training_spared_none_they_are_the_test_images_that_attacks_take_last(
    folder: Path, recipe: dict[str, object]
) -> None:
    spared, origin = spared_images(trained(folder, **recipe))
    test = datasets.load("tiny", "test")
    attacked = datasets.evaluation_subset(test, len(test) // 2)
    assert len(spared) == len(test) // 2
    assert not set(map(bytes, spared.pixels.numpy())) & set(map(bytes, attacked.pixels.numpy()))
    assert "test images, the last in the order" in origin


def test_the_model_where_training_started_must_have_spared_them_too(folder: Path) -> None:
    _, known = spared_images(trained(folder, held_out=HELD_OUT, start_from=f"local-dir:{folder}"))
    assert f"as did local-dir:{folder}" in known
    _, more = spared_images(trained(folder, held_out=30, start_from=f"local-dir:{folder}"))
    assert "did not spare them all" in more
    _, unknown = spared_images(trained(folder, held_out=30, start_from="local-dir:/nowhere"))
    assert "is not known" in unknown


# --- the card and the command ---


def test_a_calibration_takes_the_place_of_one_on_the_same_terms_only(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "copy"
    manygates.main(["pull", f"local-dir:{folder}", "--to", str(place)])
    found = measured(folder, "gated", draws=2)
    for changes in ({}, {"draws": 3}, {"false_positive_rate": 0.1}, {"seed": 7}):
        record_suspicion(place, replace(found, **changes))
    kept = Bundle.open(place).card.suspicion
    assert [(each.draws, each.false_positive_rate, each.seed) for each in kept] == [
        (2, 0.1, 0),
        (2, 0.3, 7),
        (3, 0.3, 0),
    ]
    for name in Bundle.open(folder).card.files:
        assert (place / name).read_bytes() == (folder / name).read_bytes()


def test_the_model_card_says_what_is_left_to_an_attacker(folder: Path) -> None:
    card = Bundle.open(folder).card
    assert "Suspicion" not in model_card(card)
    found = measured(folder, "ensemble", images=10)
    (one, *_) = found.detection
    half = replace(one, images=8, successful=4, rate=0.25, interval=(0.1, 0.6))
    text = model_card(replace(card, suspicion=(replace(found, threshold=0.5, detection=(half,)),)))
    assert "agreement < 0.5 is suspicious" in text
    assert "| PGD, first success | 1/20 | 3 | 8 | 50.0% | 25.0% (10.0% to 60.0%) | 37.5% |" in text
    none = model_card(replace(card, suspicion=(replace(found, threshold=0.0),)))
    assert "agreement < 0 is suspicious**, so nothing is" in none


def test_the_command_records_a_threshold_that_show_tells(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "copy"
    manygates.main(["pull", f"local-dir:{folder}", "--to", str(place)])
    line = ["calibrate", f"local-dir:{place}", "--variant", "ensemble", "--false-positive-rate", "0.3"]
    assert manygates.main([*line, "--eps", "0.05", "--images", "12", "--attacked", "2", "--record"]) == 0
    out, err = capsys.readouterr()
    assert "adaptive PGD, eps 1/20: " in out
    assert "is suspicious" in out
    assert "recorded in" in err
    (kept,) = Bundle.open(place).card.suspicion
    assert kept.command == (
        f"manygates calibrate local-dir:{place} --variant ensemble --false-positive-rate 0.3 --eps 0.05 --images 12 "
        "--attacked 2 --seed 0"
    )
    assert manygates.main(["show", f"local-dir:{place}"]) == 0
    assert f"agreement < {kept.threshold:.4g} is suspicious" in capsys.readouterr().out
    assert manygates.main(["export", f"local-dir:{place}", "--out", str(tmp_path / "again")]) == 0
    assert Bundle.open(tmp_path / "again").card.suspicion == (kept,)  # the same weights and paths


def test_the_command_prints_one_document(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["calibrate", f"local-dir:{folder}", "--variant", "gated", "--draws", "2", "--images", "30", "--json"]
    assert manygates.main([*line, "--eps", "0.05", "--attacked", "1"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["variant"], document["draws"], document["images"]) == ("random", 2, 15)
    assert Bundle.open(folder).card.suspicion == ()  # nothing is recorded unasked


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"variant": "single"}, "suspicion.variant is 'single', expected one of ensemble, random"),
        ({"draws": 8}, "suspicion.draws is 8"),
        ({"variant": "random", "draws": 1}, "suspicion.draws is 1"),
        ({"threshold": 1.5}, "suspicion.threshold is 1.5"),
        ({"false_positive_rate": 5.0}, "suspicion.false_positive_rate is 5.0"),
        ({"interval": (0.9, 1.0), "measured_false_positive_rate": 0.1}, "suspicion.interval is"),
        ({"images": 0}, "suspicion.images is 0"),
        ({"date": "today"}, "suspicion.date is 'today'"),
    ],
)
def test_a_threshold_that_makes_no_sense_enters_no_card(folder: Path, changes: dict[str, object], said: str) -> None:
    golden = Card.from_json((Path(__file__).parent / "golden_card.json").read_text(encoding="utf-8"))
    with pytest.raises(BundleError) as refusal:
        replace(golden.suspicion[0], **changes)  # type: ignore[arg-type]
    assert said in str(refusal.value)


def test_two_calibrations_on_the_same_terms_are_no_card() -> None:
    golden = Card.from_json((Path(__file__).parent / "golden_card.json").read_text(encoding="utf-8"))
    with pytest.raises(BundleError, match="no name twice"):
        replace(golden, suspicion=golden.suspicion * 2)
    for changes in itertools.combinations([("successful", 300), ("rate", 2.0), ("eps_fraction", "1/7")], 1):
        with pytest.raises(BundleError, match=f"suspicion.detection.{changes[0][0]}"):
            replace(golden.suspicion[0].detection[0], **dict(changes))  # type: ignore[arg-type]
