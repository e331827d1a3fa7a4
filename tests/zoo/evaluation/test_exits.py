from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zoo import networks
from zoo.attacks import LinfBudget, pgd
from zoo.attacks.exits import average_exits, exits_of, max_average_exits, single_exit
from zoo.bundle.bundle import Bundle, write_bundle
from zoo.bundle.card import Card, Exit, InputFormat, NetworkSummary, Paths, Result, Table, Training
from zoo.data import datasets
from zoo.errors import BadInput
from zoo.evaluation import Request, evaluate
from zoo.evaluation.protocols.exits import RATIOS, budgeted, strongest
from zoo.gates.early_exit import thresholds
from zoo.weights.checkpoint import Architecture
from zoo.weights.models import PLAIN_WEIGHTS, save_members

EPS = 0.1


class TwoExits(nn.Module):
    """Exit i answers class 1 where the mean of pixel column i is above its boundary."""

    def __init__(self, *boundaries: float) -> None:
        super().__init__()
        self.boundaries = boundaries
        self.scale = nn.Parameter(torch.tensor(10.0))

    def forward(self, images: Tensor) -> list[Tensor]:
        columns = images.mean((1, 2))
        scores = [self.scale * (columns[:, index] - boundary) for index, boundary in enumerate(self.boundaries)]
        return [torch.stack([torch.zeros_like(score), score], 1) for score in scores]


@pytest.fixture
def images() -> Tensor:
    return torch.full((2, 1, 3, 2), 0.5)


LABELS = torch.tensor([0, 0])


def broken(network: nn.Module, images: Tensor) -> list[bool]:
    return [bool((outputs.argmax(1) == 1).all()) for outputs in exits_of(network, images)]


def test_the_single_attack_breaks_its_exit_and_leaves_the_others(images: Tensor) -> None:
    network = TwoExits(0.55, 0.55)
    budget = LinfBudget(eps=EPS, random_start=False)
    assert broken(network, single_exit(network, images, LABELS, budget, 0)) == [True, False]
    assert broken(network, single_exit(network, images, LABELS, budget, 1)) == [False, True]


def test_the_average_attack_breaks_every_exit_within_reach(images: Tensor) -> None:
    network = TwoExits(0.55, 0.55)
    found = average_exits(network, images, LABELS, LinfBudget(eps=EPS, random_start=False))
    assert broken(network, found) == [True, True]
    torch.testing.assert_close(found, images + EPS)


def test_the_max_average_attack_harms_all_exits_together_at_least_as_much_as_any_single_one(images: Tensor) -> None:
    torch.manual_seed(0)
    network = TwoExits(0.52, 0.7)
    budget = LinfBudget(eps=EPS, random_start=False)

    def harm(adversarial: Tensor) -> Tensor:
        losses = [nn.functional.cross_entropy(o, LABELS, reduction="none") for o in exits_of(network, adversarial)]
        return torch.stack(losses).sum(0)

    most = harm(max_average_exits(network, images, LABELS, budget))
    singles = torch.stack([harm(single_exit(network, images, LABELS, budget, index)) for index in range(2)])
    torch.testing.assert_close(most, singles.amax(0))


def test_with_one_exit_all_attacks_are_pgd(images: Tensor) -> None:
    network = TwoExits(0.7)
    budget = LinfBudget(eps=EPS, restarts=2)
    make = [
        lambda g: single_exit(network, images, LABELS, budget, 0, generator=g),
        lambda g: average_exits(network, images, LABELS, budget, generator=g),
        lambda g: max_average_exits(network, images, LABELS, budget, generator=g),
        lambda g: pgd(lambda x: network(x)[0], images, LABELS, budget, generator=g),
    ]
    found = [attack(torch.Generator().manual_seed(1)) for attack in make]
    assert all(torch.equal(one, found[0]) for one in found)


def test_a_budget_of_one_exit_is_that_exit() -> None:
    generator = torch.Generator().manual_seed(0)
    answers = torch.randn(50, 3, 4, generator=generator)
    labels = torch.randint(0, 4, (50,), generator=generator)
    costs = [1.0, 2.0, 5.0]
    for index in range(3):
        quotas = [float(index == other) for other in range(3)]
        accuracy, cost = budgeted(answers, labels, thresholds(answers.softmax(2).amax(2), quotas), costs)
        assert accuracy == pytest.approx(float((answers[:, index].argmax(1) == labels).double().mean()))
        assert cost == costs[index]


def test_what_makes_no_sense_is_refused(images: Tensor) -> None:
    network = TwoExits(0.5, 0.5)
    with pytest.raises(BadInput, match=r"exit 2 .*0 to 1"):
        single_exit(network, images, LABELS, LinfBudget(), 2)
    with pytest.raises(BadInput):
        average_exits(lambda x: x.mean((1, 2)), images, LABELS, LinfBudget())


def test_the_strongest_of_the_single_attacks_is_the_max_average_attack(images: Tensor) -> None:
    torch.manual_seed(0)
    pixels, labels = torch.rand(16, 1, 3, 2), torch.randint(0, 2, (16,))
    network = TwoExits(0.45, 0.55)
    budget = LinfBudget(eps=EPS, steps=3)
    expected = max_average_exits(network, pixels, labels, budget, generator=torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    made = [single_exit(network, pixels, labels, budget, index, generator=generator) for index in range(2)]
    answers = torch.stack([torch.stack(network(adversarial), 1) for adversarial in made], 1)
    assert torch.equal(strongest(answers, labels), torch.stack(network(expected), 1))


# --- the protocol, on networks whose robustness is known ---

SHARP = 40.0
RADIUS = Fraction(2, 17)
"""Half of the tiny images have a smaller margin."""
COSTS = (1_000_000, 3_000_000)


class Colours(nn.Module):
    """Two linear exits: the class is the strongest colour; the first sees only the left half, and less sharply."""

    num_exits = 2

    def __init__(self, sharpness: float = SHARP) -> None:
        super().__init__()
        self.sharpness = nn.Parameter(torch.tensor(sharpness))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        half = images[:, :, :, :8].mean((2, 3))
        return 0.05 * self.sharpness * half, self.sharpness * images.mean((2, 3))


@pytest.fixture(scope="module", autouse=True)
def known(tiny_dataset: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(networks.NETWORKS, "colours", lambda images, classes, **options: Colours(**options))
        yield


def bundle_of(folder: Path, **changes: Any) -> Bundle:
    """Write a bundle of `Colours`; evaluation reads its weights, so its graphs can be anything."""
    source, architecture = datasets.source("tiny"), Architecture(network="colours", dataset="tiny")
    card = Card(
        name="colours",
        description="made by a test",
        method="standard",
        license="apache-2.0",
        dataset="tiny",
        architecture=NetworkSummary(
            name="colours",
            options={},
            gated_layers=(),
            candidates=1,
            sharing=None,
            parameters=1,
            single_path_parameters=1,
        ),
        input=InputFormat(
            channels=3,
            height=16,
            width=16,
            range=(0.0, 1.0),
            mean=source.format.mean,
            std=source.format.std,
            resize="bicubic",
        ),
        classes=source.classes,
        paths=Paths(single=None, ensemble=()),
        exits=tuple(Exit(macs=cost) for cost in COSTS),
        variants=("single",),
        training=Training(
            recipe={"held_out": 80}, seed=0, commit="abc", versions={}, date="2026-11-21", summary="none"
        ),
        results=(),
        files={},
    )
    save_members(folder / "weights", [architecture.build()], architecture)
    graphs = dict.fromkeys(("single.onnx", "early_exit.onnx"), b"graph")
    return write_bundle(folder / "bundle", replace(card, **changes), {PLAIN_WEIGHTS: folder / "weights", **graphs})


def measured(bundle: Bundle, **options: Any) -> Result:
    request = Request(protocol="exits", eps=(RADIUS,), **options)
    (result,) = evaluate(bundle, request)
    return result


@pytest.fixture(scope="module")
def of_all(tmp_path_factory: pytest.TempPathFactory, known: None) -> Result:
    """The result on all test images, which several tests read."""
    return measured(bundle_of(tmp_path_factory.mktemp("exits")), images=120)


def tables_of(result: Result) -> dict[str, Table]:
    return {table.name: table for table in result.tables}


def margins(limit: float) -> list[float]:
    """Return the share of test images that each exit answers rightly when every pixel moved by `limit` against it."""
    images = datasets.load("tiny", "test")
    pixels = datasets.as_float(images.pixels)
    shares = []
    for seen in (pixels[:, :, :, :8], pixels):
        means = seen.mean((2, 3))
        own = means.gather(1, images.labels[:, None])[:, 0]
        others = means.scatter(1, images.labels[:, None], -1.0).amax(1)
        shares.append(float((own - others > 2 * limit).double().mean()))
    return shares


def test_every_exit_is_measured_clean_and_under_each_attack_as_its_margin_says(of_all: Result) -> None:
    result, exits = of_all, tables_of(of_all)["exits"]
    assert exits.rows == ("clean", "average", "max-average", "single")
    rows = dict(zip(exits.rows, exits.values, strict=True))
    assert rows["clean"] == pytest.approx(margins(0), abs=1e-6)
    assert rows["single"] == pytest.approx(margins(float(RADIUS)), abs=0.02)
    assert 0.1 < min(rows["single"]) < 0.9  # or nothing is compared
    assert result.accuracy == pytest.approx(sum(value or 0 for value in rows["max-average"]) / 2, abs=1e-6)
    assert result.attack == "max-average PGD"
    assert result.note.startswith("mean over 2 exits; ")
    assert all(check.held for check in result.checks)


def test_the_transfer_map_has_each_exits_own_attack_on_its_diagonal(of_all: Result) -> None:
    tables = tables_of(of_all)
    transfer = tables["transfer"]
    assert (transfer.row_axis, transfer.column_axis) == ("made on exit", "judged on exit")
    assert transfer.rows == transfer.columns == ("1", "2")
    assert tuple(transfer.values[index][index] for index in range(2)) == tables["exits"].values[3]
    # an attack on the first exit moves the left half only, so the second keeps more than under its own
    assert (transfer.values[0][1] or 0) > (transfer.values[1][1] or 0) + 0.1
    # an attack on the second moves every pixel, the left half too
    assert transfer.values[1][0] == pytest.approx(transfer.values[0][0], abs=0.02)


def test_budgets_go_from_the_cheap_exit_to_the_dear_one_at_the_cards_costs(of_all: Result) -> None:
    table = tables_of(of_all)["budgeted"]
    assert table.columns == (
        "million MACs, clean",
        "accuracy, clean",
        "million MACs, average attack",
        "accuracy, average attack",
    )
    assert table.rows == tuple(f"{ratio:g}" for ratio in RATIOS)
    assert len(table.rows) == 39
    costs = [row[0] or 0 for row in table.values]
    assert costs == sorted(costs)
    assert all(1 <= (row[0] or 0) <= 3 and 1 <= (row[2] or 0) <= 3 for row in table.values)
    # equal shares leave at each exit of as many test images as of those held out, but for sampling
    assert costs[RATIOS.index(1.0)] == pytest.approx(2.0, abs=0.3)
    assert costs[0] < 1.3
    # what is attacked is answered with less confidence, so it goes on and costs more
    assert (table.values[RATIOS.index(1.0)][2] or 0) > costs[RATIOS.index(1.0)]


def test_limits_are_chosen_on_the_very_images_that_training_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int, int]] = []
    hold_out = datasets.hold_out

    def watched(images: datasets.Images, number: int, seed: int) -> tuple[datasets.Images, datasets.Images]:
        asked.append((len(images), number, seed))
        return hold_out(images, number, seed)

    monkeypatch.setattr(datasets, "hold_out", watched)
    note = measured(bundle_of(tmp_path), images=10, steps=1).note
    assert "80 held out" in note
    (tmp_path / "none").mkdir()
    training = Training(recipe={}, seed=0, commit="abc", versions={}, date="2026-11-21", summary="none")
    bundle = bundle_of(tmp_path / "none", training=training)
    note = measured(bundle, images=10, steps=1).note
    assert "199 of the training" in note
    (tmp_path / "few").mkdir()
    bundle = bundle_of(tmp_path / "few", training=replace(training, recipe={"held_out": 20, "train_images": 100}))
    measured(bundle, images=10, steps=1)
    assert asked == [
        (200, 80, datasets.HOLD_OUT_SEED),
        (200, 199, datasets.HOLD_OUT_SEED),
        (100, 20, datasets.HOLD_OUT_SEED),
    ]


def test_without_an_attack_all_rows_are_clean_accuracy(tmp_path: Path) -> None:
    (result,) = evaluate(bundle_of(tmp_path), Request(protocol="exits", eps=(Fraction(0),), images=120))
    tables = tables_of(result)
    assert len(set(tables["exits"].values)) == 1
    assert set(tables["transfer"].values) == {tables["exits"].values[0]}
    assert result.checks == ()


def test_other_protocols_judge_the_last_exit_and_say_so(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path)
    (clean,) = evaluate(bundle, Request(protocol="clean"))
    assert clean.accuracy == pytest.approx(margins(0)[1], abs=1e-6)
    assert clean.note == "the last of 2 exits"
    (attacked,) = evaluate(bundle, Request(protocol="whitebox", eps=(RADIUS,), images=120, steps=20))
    assert attacked.accuracy == pytest.approx(margins(float(RADIUS))[1], abs=0.02)
    assert attacked.note == "all-or-nothing over restarts and iterates; the last of 2 exits"


def test_a_card_without_the_costs_of_its_exits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="colours"):
        measured(bundle_of(tmp_path, exits=()), images=10)


def test_the_limits_of_every_budget_stand_in_the_result_and_fall_with_it(of_all: Result) -> None:
    tables = tables_of(of_all)
    limits = tables["limits"]
    assert limits.rows == tables["budgeted"].rows
    assert limits.columns == ("1",)
    found = [row[0] or 0 for row in limits.values]
    assert found == sorted(found), "a dearer budget asks more of the first exit"
    assert all(0 < value <= 2 for value in found)
