from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zoo import evaluation, networks
from zoo.attacks.autoattack import ATTACKS, AutoAttackResult
from zoo.bundle.bundle import Bundle, write_bundle
from zoo.bundle.card import Card, Check, Finding, InputFormat, NetworkSummary, Paths, Result, Training
from zoo.bundle.record import record_results
from zoo.data import datasets
from zoo.errors import BadInput, ChecksumMismatch, DataMissing, MissingFile, UnknownName
from zoo.evaluation import Request, adversarial_set, evaluate, ledger_of, parse_eps
from zoo.evaluation.adversarial_set import AdversarialSet
from zoo.evaluation.intervals import wilson
from zoo.evaluation.ledger import Ledger
from zoo.evaluation.linter import bundle as linted
from zoo.evaluation.protocols import autoattack, gate_attacks, whitebox
from zoo.evaluation.protocols import random_gates as gates
from zoo.evaluation.surrogates import open_surrogate
from zoo.weights.checkpoint import Architecture, save_network
from zoo.weights.models import PLAIN_WEIGHTS, RGN_WEIGHTS, save_members

pytestmark = pytest.mark.filterwarnings("ignore:.*single gated layer:zoo.errors.GatingWarning")

SHARP = 40.0
ALL = 120  # test images of the tiny data set


class MeanColour(nn.Module):
    """Linear, so that its robustness is known: the class is the strongest colour."""

    def __init__(self, sharpness: float = SHARP) -> None:
        super().__init__()
        self.sharpness = nn.Parameter(torch.tensor(sharpness))

    def forward(self, images: Tensor) -> Tensor:
        return self.sharpness * images.mean((2, 3))


class Quantised(nn.Module):
    """The same behind a quantiser of eight levels, whose gradient is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.sharpness = nn.Parameter(torch.tensor(SHARP))

    def forward(self, images: Tensor) -> Tensor:
        return self.sharpness * (torch.round(images * 7) / 7).mean((2, 3))


class Contrary(MeanColour):
    """Answers wrongly wherever it can: the class is the weakest colour."""

    def forward(self, images: Tensor) -> Tensor:
        return -self.sharpness * images.mean((2, 3))


class Convolved(nn.Module):
    """Gates on the same answer: candidates are a 1x1 convolution each."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        return SHARP * self.conv(images).mean((2, 3))


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "mean_colour": lambda images, classes, **options: MeanColour(**options),
    "quantised": lambda images, classes: Quantised(),
    "contrary": lambda images, classes: Contrary(),
    "convolved": lambda images, classes: Convolved(),
}


@pytest.fixture(scope="module", autouse=True)
def known(tiny_dataset: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, builder in NETWORKS.items():
            patch.setitem(networks.NETWORKS, name, builder)
        yield


def card(architecture: Architecture, variants: tuple[str, ...], paths: Paths, gated: tuple[str, ...] = ()) -> Card:
    source = datasets.source("tiny")
    return Card(
        name="colours",
        description="made by a test",
        method="standard",
        license="apache-2.0",
        dataset="tiny",
        architecture=NetworkSummary(
            name=architecture.network,
            options=architecture.options,
            gated_layers=gated,
            candidates=architecture.candidates,
            sharing=architecture.sharing,
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
        paths=paths,
        variants=variants,
        training=Training(recipe={}, seed=0, commit="abc", versions={}, date="2026-11-21", summary="none"),
        results=(),
        files={},
    )


def plain(folder: Path, name: str, *, members: list[nn.Module] | None = None, **options: float) -> Bundle:
    """Write a bundle of plain networks; evaluation reads its weights, so its graphs can be anything."""
    architecture = Architecture(network=name, options=dict(options), dataset="tiny")
    found = members or [architecture.build()]
    folder.mkdir(exist_ok=True)
    variants = ("single", "ensemble") if len(found) > 1 else ("single",)
    save_members(folder / "weights", found, architecture)
    graphs = {f"{variant}.onnx": b"graph" for variant in variants}
    described = card(architecture, variants, Paths(single=None, ensemble=()))
    return write_bundle(folder / "bundle", described, {PLAIN_WEIGHTS: folder / "weights", **graphs})


@pytest.fixture
def linear(tmp_path: Path) -> Bundle:
    return plain(tmp_path, "mean_colour")


@pytest.fixture
def gated(tmp_path: Path) -> Bundle:
    """Two candidates: one answers by the strongest colour, the other always the next one."""
    architecture = Architecture(network="convolved", dataset="tiny", candidates=2, sharing="independent")
    rgn = architecture.build()
    with torch.no_grad():
        for alternative, right in zip(rgn.bank[0], (True, False), strict=True):
            weight = torch.eye(3) if right else torch.eye(3).roll(1, 0)
            alternative["conv"].weight.copy_(weight[:, :, None, None])
    save_network(tmp_path / "weights", rgn, architecture)
    variants = ("single", "ensemble", "gated")
    files: dict[str, bytes | Path | str] = {f"{variant}.onnx": b"graph" for variant in variants}
    described = card(architecture, variants, Paths(single="0", ensemble=("0", "1")), ("conv",))
    return write_bundle(tmp_path / "bundle", described, {RGN_WEIGHTS: tmp_path / "weights", **files})


def tiny_images() -> tuple[Tensor, Tensor]:
    images = datasets.load("tiny", "test")
    return datasets.as_float(images.pixels), images.labels


def worst_case_accuracy(eps: float) -> float:
    """Of `MeanColour`: the true colour darkened and the others brightened by eps, within [0, 1]."""
    pixels, labels = tiny_images()
    darker, brighter = (pixels - eps).clamp(min=0).mean((2, 3)), (pixels + eps).clamp(max=1).mean((2, 3))
    true = torch.nn.functional.one_hot(labels, 3).bool()
    return float((darker[true] > brighter.masked_fill(true, -1).amax(1)).float().mean())


def attacked(bundle: Bundle, *eps: Fraction, **changes: object) -> list[Result]:
    request = Request(protocol="whitebox", eps=eps, images=ALL, steps=10, restarts=1)
    return evaluate(bundle, replace(request, **changes))  # type: ignore[arg-type]


def failed(result: Result) -> set[str]:
    return {check.name for check in result.checks if not check.held}


def test_clean_accuracy_is_exact(linear: Bundle) -> None:
    (result,) = evaluate(linear, Request(protocol="clean", command="manygates evaluate"))
    pixels, labels = tiny_images()
    assert result.accuracy == pytest.approx(float((pixels.mean((2, 3)).argmax(1) == labels).float().mean()), abs=1e-6)
    assert (result.protocol, result.variant, result.attack) == ("clean", "single", "none")
    assert (result.eps, result.eps_fraction, result.steps, result.step_size, result.restarts) == (0.0, "0", 0, 0.0, 0)
    assert result.images == ALL
    assert result.interval == pytest.approx(wilson(result.accuracy, ALL), abs=2e-6)
    assert result.command == "manygates evaluate"


def test_a_model_that_is_always_wrong_has_accuracy_zero(tmp_path: Path) -> None:
    (result,) = evaluate(plain(tmp_path, "contrary"), Request(protocol="clean"))
    assert result.accuracy == 0
    assert result.interval[0] == 0 < result.interval[1]


def test_a_subset_of_the_images_is_the_fixed_one(linear: Bundle) -> None:
    first, second = (evaluate(linear, Request(protocol="clean", images=40, seed=seed))[0] for seed in (0, 1))
    assert first.images == 40
    assert first.accuracy == second.accuracy  # the seed draws attacks, not images


def test_white_box_accuracy_of_a_linear_model_is_its_closed_form(linear: Bundle) -> None:
    radii = (Fraction(1, 100), Fraction(1, 10), Fraction(29, 255), Fraction(31, 255), Fraction(1, 5))
    results = attacked(linear, *radii)
    for result, eps in zip(results, radii, strict=True):
        assert result.accuracy == pytest.approx(worst_case_accuracy(float(eps)), abs=1e-6), eps
        assert result.eps == float(eps)
        assert Fraction(result.eps_fraction) == eps
        assert (result.attack, result.steps, result.restarts) == ("PGD", 10, 1)
        assert result.step_size == pytest.approx(float(eps) / 5, abs=1e-9)
    accuracies = [result.accuracy for result in results]
    assert accuracies == sorted(accuracies, reverse=True)
    assert accuracies[0] > accuracies[2] > accuracies[-1] == 0  # the radii tell something


def test_an_eps_of_zero_is_clean_accuracy(linear: Bundle) -> None:
    (result,) = attacked(linear, Fraction(0))
    (clean,) = evaluate(linear, Request(protocol="clean"))
    assert result.accuracy == clean.accuracy
    assert result.eps_fraction == "0"


def test_the_same_request_gives_the_same_result(linear: Bundle) -> None:
    assert attacked(linear, Fraction(29, 255)) == attacked(linear, Fraction(29, 255))


def test_restarts_never_help_the_defender(tmp_path: Path) -> None:
    """One step from a random start leaves much to luck; an image counts only if no start broke it."""
    bundle = plain(tmp_path, "mean_colour")
    budget = {"steps": 1}
    accuracies = [attacked(bundle, Fraction(1, 7), restarts=number, **budget)[0].accuracy for number in (1, 2, 4, 8)]
    assert accuracies == sorted(accuracies, reverse=True)
    assert accuracies[-1] >= worst_case_accuracy(1 / 7) - 1e-6


def test_an_ensemble_is_attacked_through_its_mean_probability(tmp_path: Path) -> None:
    """Two members that answer alike are as robust as one of them."""
    bundle = plain(tmp_path, "mean_colour", members=[MeanColour(), MeanColour(2 * SHARP)])
    (single,) = attacked(bundle, Fraction(29, 255))
    (ensemble,) = attacked(bundle, Fraction(29, 255), variant="ensemble")
    assert ensemble.variant == "ensemble"
    assert ensemble.accuracy == single.accuracy


def test_random_gates_are_measured_over_draws(gated: Bundle) -> None:
    """One candidate is right and the other wrong on every image that the first gets right: half the draws count."""
    (single,) = evaluate(gated, Request(protocol="clean"))
    assert single.accuracy > 0.95
    (result,) = evaluate(gated, Request(protocol="clean", variant="gated"))
    assert 0.2 < result.accuracy < 0.8  # 30 coins
    assert result.draws == 10
    assert result.note.startswith("mean over 10 draws (standard error 0.0920)")
    assert result == evaluate(gated, Request(protocol="clean", variant="gated"))[0]
    seeds = {evaluate(gated, Request(protocol="clean", variant="gated", seed=seed))[0].accuracy for seed in range(4)}
    assert len(seeds) > 1


def test_white_box_on_random_gates_is_refused_with_its_reason(gated: Bundle) -> None:
    with pytest.raises(BadInput, match="whitebox"):
        evaluate(gated, Request(protocol="whitebox", variant="gated"))


def test_an_unknown_protocol_is_refused_with_the_known_ones(linear: Bundle) -> None:
    with pytest.raises(UnknownName, match=r"'white'.*autoattack, .*clean, .*whitebox"):
        evaluate(linear, Request(protocol="white"))
    assert set(evaluation.PROTOCOLS) >= {"clean", "whitebox"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": 0}, "0 images.*1 to 120"),
        ({"images": -1}, "-1 images"),
        ({"images": 121}, "121 images.*1 to 120"),
        ({"steps": 0}, "steps=0"),
        ({"restarts": 0}, "restarts=0"),
        ({"variant": "gated"}, "'gated'.*single"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(changes: dict[str, object], message: str, linear: Bundle) -> None:
    with pytest.raises(BadInput, match=message):
        attacked(linear, Fraction(1, 100), **changes)


def test_a_missing_data_set_is_named(linear: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MANYGATES_DATA", str(tmp_path))
    with pytest.raises(DataMissing, match=r"holds no nobody/tiny/plain/test-\*\.parquet"):
        evaluate(linear, Request(protocol="clean"))


def test_every_sanity_check_holds_for_an_honest_model(linear: Bundle) -> None:
    (result,) = attacked(linear, Fraction(1, 10))
    assert len(result.checks) >= 6
    assert failed(result) == set()


def test_every_sanity_check_holds_for_an_honest_trained_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    architecture = Architecture(network="lenet", dataset="tiny")
    network = architecture.build()
    images = datasets.load("tiny", "train")
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    for _ in range(6):
        for pixels, labels in images.batches(25):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(network(pixels), labels).backward()
            optimizer.step()
    bundle = plain(tmp_path, "lenet", members=[network.eval()])
    (clean,) = evaluate(bundle, Request(protocol="clean"))
    assert clean.accuracy > 0.8
    (result,) = attacked(bundle, Fraction(8, 255))
    assert failed(result) == set()
    assert result.accuracy <= clean.accuracy


def test_a_saturated_softmax_is_found_out(tmp_path: Path) -> None:
    """Logits times a thousand: the cross-entropy of a sure answer is exactly 0, and so is its gradient."""
    (result,) = attacked(plain(tmp_path, "mean_colour", sharpness=1000 * SHARP), Fraction(1, 5))
    assert result.accuracy > worst_case_accuracy(0.2)  # the number flatters
    assert "gradients are not zero" in failed(result)


def test_a_quantiser_in_front_is_found_out(tmp_path: Path) -> None:
    (result,) = attacked(plain(tmp_path, "quantised"), Fraction(1, 5))
    assert result.accuracy > worst_case_accuracy(0.2)
    assert {"gradients are not zero", "a large eps reaches zero"} <= failed(result)


@pytest.mark.parametrize(
    ("text", "eps"),
    [
        ("8/255", Fraction(8, 255)),
        ("0.03", Fraction(3, 100)),
        ("0.1", Fraction(1, 10)),
        ("1e-2", Fraction(1, 100)),
        ("16/510", Fraction(8, 255)),
        ("0", Fraction(0)),
        ("1", Fraction(1)),
        (" 4/255 ", Fraction(4, 255)),
    ],
)
def test_eps_is_read_exactly(text: str, eps: Fraction) -> None:
    assert parse_eps(text) == eps


@pytest.mark.parametrize("text", ["8", "1.01", "-0.1", "256/255"])
def test_an_eps_in_levels_is_refused_with_the_fraction_to_write(text: str) -> None:
    with pytest.raises(BadInput, match=rf"{text} .*8/255"):
        parse_eps(text)


@pytest.mark.parametrize("text", ["", "eight", "8/0", "nan", "inf", "8/255/2", "0,03"])
def test_an_eps_that_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match="8/255"):
        parse_eps(text)


@pytest.mark.parametrize(
    ("right", "of", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662)],
)
def test_the_interval_is_wilsons(right: int, of: int, low: float, high: float) -> None:
    """Newcombe 1998, table I, and values worked out by hand: low = 0 at 0 of 10, high = z^2 / (10 + z^2)."""
    assert wilson(right / of, of) == pytest.approx((low, high), abs=1e-4)


def test_recording_replaces_what_was_measured_under_the_same_terms_and_keeps_the_rest(linear: Bundle) -> None:
    (clean,) = evaluate(linear, Request(protocol="clean", command="first"))
    strong, weak = (replace(clean, protocol="whitebox", attack="PGD", steps=steps, restarts=1) for steps in (50, 10))
    record_results(linear.folder, [strong, weak, clean])
    again = replace(clean, accuracy=0.5, interval=(0.4, 0.6), command="second")
    bundle = record_results(linear.folder, [again])
    assert bundle.card.results == (again, strong, weak)
    assert Bundle.open(linear.folder).card == bundle.card
    assert bundle.card.files == linear.card.files
    assert "second" in (linear.folder / "README.md").read_text()


def test_results_are_kept_in_the_order_of_variant_protocol_and_eps(tmp_path: Path) -> None:
    bundle = plain(tmp_path, "mean_colour", members=[MeanColour(), MeanColour()])
    (clean,) = evaluate(bundle, Request(protocol="clean"))
    attack = replace(clean, protocol="whitebox", attack="PGD", steps=10, restarts=1, step_size=0.01)
    small, large = (replace(attack, eps=eps, eps_fraction=str(eps)) for eps in (0.01, 0.03))
    other = replace(clean, variant="ensemble")
    card = record_results(bundle.folder, [other, large, clean, small]).card
    assert card.results == (clean, small, large, other)


# --- an interrupted evaluation ---


def test_an_interrupted_evaluation_goes_on_where_it_was_and_finds_the_same_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = plain(tmp_path, "mean_colour")
    request = Request(protocol="whitebox", eps=(Fraction(29, 255),), images=ALL, steps=5, restarts=2)
    monkeypatch.setattr("zoo.evaluation.run.BATCH", 30)
    (expected,) = evaluate(bundle, request)
    attacks: list[int] = []
    whole = whitebox.pgd

    def counted(*given: Any, **options: Any) -> Tensor:
        if (given[3].restarts, given[3].steps) == (2, 5):  # the protocol's own attack, not one of its checks
            attacks.append(len(given[1]))
            if len(attacks) == 3:
                raise KeyboardInterrupt
        return whole(*given, **options)

    monkeypatch.setattr(whitebox, "pgd", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluate(bundle, request)
    assert len(ledger_of(bundle, request)) == 2
    (found,) = evaluate(bundle, request)
    assert attacks == [30] * 5, "two of the four batches were done, and the third begun"
    assert found == expected
    assert len(ledger_of(bundle, request)) == 0, "what is done is forgotten, so asking again measures again"


def test_a_torn_line_of_the_ledger_is_measured_again(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    ledger = Ledger(file)
    ledger.put("stage/0", torch.tensor([True, False]))
    ledger.put("stage/1", torch.tensor([0.5, 0.25]))
    file.write_text(file.read_text()[:-20])
    again = Ledger(file)
    assert len(again) == 1
    kept = again.get("stage/0")
    assert kept is not None
    assert torch.equal(kept, torch.tensor([True, False]))
    assert len(Ledger(tmp_path / "b.jsonl")) == 0


def test_a_ledger_on_a_full_disk_keeps_whole_lines_only(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    file = tmp_path / "a.jsonl"
    ledger = Ledger(file)
    ledger.put("first", torch.arange(4))
    kept = file.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(kept) + 20, hard))
    try:
        with pytest.raises(OSError) as told:
            ledger.put("second", torch.arange(4))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert told.value.filename == str(file)
    assert file.read_bytes() == kept
    ledger.put("third", torch.arange(2))
    assert len(Ledger(file)) == 2


def test_other_terms_are_another_evaluation(linear: Bundle) -> None:
    def file_of(**changes: object) -> Path | None:
        request = replace(Request(protocol="whitebox", images=ALL), **changes)  # type: ignore[arg-type]
        return ledger_of(linear, request).file

    assert file_of() == file_of(command="said otherwise")
    others = [{"seed": 1}, {"images": 40}, {"steps": 7}, {"eps": (Fraction(1, 100),)}, {"protocol": "autoattack"}]
    assert len({file_of(), *(file_of(**changes) for changes in others)}) == 1 + len(others)


# --- matrices ---


def test_a_transfer_matrix_says_how_far_an_attack_on_one_path_carries(gated: Bundle) -> None:
    """Both candidates see the same colours, the second one rotated: no image is answered correctly by both."""
    with pytest.raises(BadInput, match=r"120 images.* 2 networks"):
        evaluate(gated, Request(protocol="transfer-matrix", variant="gated", paths=2))


def test_members_that_are_alike_share_every_adversarial_image(tmp_path: Path) -> None:
    bundle = plain(tmp_path, "mean_colour", members=[MeanColour(), MeanColour(2 * SHARP)])
    eps = Fraction(29, 255)
    request = Request(protocol="transfer-matrix", variant="ensemble", eps=(eps,), images=ALL, steps=15, restarts=1)
    (result,) = evaluate(bundle, request)
    matrix, members = result.tables
    (clean,) = evaluate(bundle, Request(protocol="clean"))
    right = round(clean.accuracy * ALL)
    expected = worst_case_accuracy(float(eps)) * ALL / right  # judged are images that both answer correctly
    assert result.images == right
    assert result.accuracy == pytest.approx(expected, abs=1e-5)
    assert [value for row in matrix.values for value in row] == pytest.approx([expected] * 4, abs=1e-5)
    assert members.name == "paths"
    assert [row[0] for row in members.values] == pytest.approx([clean.accuracy] * 2, abs=1e-5)
    assert [row[1] for row in members.values] == pytest.approx([expected] * 2, abs=1e-5)
    assert (matrix.name, matrix.rows, matrix.columns) == (
        "transfer",
        ("member 1", "member 2"),
        ("member 1", "member 2"),
    )


def test_a_single_plain_network_has_no_matrix(linear: Bundle) -> None:
    with pytest.raises(BadInput, match="colours"):
        evaluate(linear, Request(protocol="transfer-matrix"))
    with pytest.raises(BadInput, match="colours"):
        evaluate(linear, Request(protocol="diversity"))


@pytest.fixture
def alike(tmp_path: Path) -> Bundle:
    """Random gates whose candidates are the same network, so that nothing about them is random but the path."""
    architecture = Architecture(network="convolved", dataset="tiny", candidates=2, sharing="independent")
    rgn = architecture.build()
    with torch.no_grad():
        for alternative in rgn.bank[0]:
            alternative["conv"].weight.copy_(torch.eye(3)[:, :, None, None])
    save_network(tmp_path / "weights", rgn, architecture)
    variants = ("single", "ensemble", "gated")
    files: dict[str, bytes | Path | str] = {f"{variant}.onnx": b"graph" for variant in variants}
    described = card(architecture, variants, Paths(single="0", ensemble=("0", "1")), ("conv",))
    return write_bundle(tmp_path / "bundle", described, {RGN_WEIGHTS: tmp_path / "weights", **files})


def test_the_diversity_of_equal_paths_is_that_of_a_path_with_itself(alike: Bundle) -> None:
    (result,) = evaluate(alike, Request(protocol="diversity", variant="gated", images=60))
    values = {value for table in result.tables if table.name == "diversity" for row in table.values for value in row}
    assert len(values) == 1
    assert (result.eps, result.steps, result.step_size) == (0.07, 10, 0.007)


# --- random gates ---


def random_gates(bundle: Bundle, **changes: object) -> Result:
    request = Request(protocol="random-gates", variant="gated", eps=(Fraction(29, 255),), images=20, steps=10, draws=12)
    (result,) = evaluate(bundle, replace(request, **changes))  # type: ignore[arg-type]
    return result


def test_random_gates_that_are_all_alike_are_exactly_as_robust_as_one_path(
    alike: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate_attacks, "SQUARE_QUERIES", 4)
    result = random_gates(alike)
    (single,) = evaluate(alike, Request(protocol="whitebox", eps=(Fraction(29, 255),), images=20, steps=10, restarts=1))
    assert result.accuracy == single.accuracy
    (table,) = result.tables
    rows = dict(zip(table.rows, table.values, strict=True))
    mean, error, of_ten, of_all, averaged = range(5)
    for name, row in rows.items():
        assert row[error] == 0, name
        assert row[mean] == row[of_ten] == row[of_all] == row[averaged], name
    assert rows["EOT-20"][mean] == single.accuracy
    assert {"PGD on fixed path 1", "PGD, fresh gates per step", "EOT-5", "EOT-50", "ARC on 8 paths"} <= rows.keys()
    assert {"APGD-CE, EOT-20", "APGD-DLR, EOT-20", "PGD on the relaxed gates", "random noise"} <= rows.keys()
    assert failed(result) == set()


def test_an_attacker_who_retries_gets_through_where_half_the_paths_are_wrong(
    gated: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gates, "attacks_on", lambda run: {name: lambda on: on.images for name in NO_ATTACKS})
    result = random_gates(gated, draws=40)
    (table,) = result.tables
    clean = dict(zip(table.columns, table.values[0], strict=True))
    assert clean["mean"] is not None
    assert 0.3 < clean["mean"] < 0.7, "a coin decides which path an image takes"
    assert clean["worst of 10"] == pytest.approx(0, abs=0.02)
    assert clean["worst of all"] == 0
    assert result.draws == 40


NO_ATTACKS = ("FGSM on the relaxed gates", "EOT-5", "EOT-20", "EOT-50", "Square, 0 queries")


def test_random_gates_is_for_random_gates(linear: Bundle) -> None:
    with pytest.raises(BadInput, match=r"gated.*'single'"):
        evaluate(linear, Request(protocol="random-gates"))


# --- transfer ---


def blackbox(target: Bundle, *surrogates: Bundle, **changes: object) -> list[Result]:
    request = Request(
        protocol="blackbox",
        eps=(Fraction(29, 255),),
        images=40,
        steps=5,
        surrogates=tuple(f"local-dir:{surrogate.folder}" for surrogate in surrogates),
    )
    return evaluate(target, replace(request, **changes))  # type: ignore[arg-type]


@pytest.fixture
def surrogate(tmp_path: Path) -> Bundle:
    return plain(tmp_path / "surrogate", "mean_colour", sharpness=3 * SHARP)


def test_what_breaks_a_surrogate_that_sees_the_same_breaks_the_target(linear: Bundle, surrogate: Bundle) -> None:
    (result,) = blackbox(linear, surrogate, images=ALL, steps=15)
    assert result.accuracy == pytest.approx(worst_case_accuracy(29 / 255), abs=0.01)
    (sources,) = result.tables
    assert sources.rows == ("colours",)
    assert sources.columns[-1] == "all"
    assert len(sources.columns) == 11
    values = [value for value in sources.values[0] if value is not None]
    assert min(values[:-1]) >= values[-1], "all-or-nothing is at most the worst version"


def test_a_surrogate_without_residual_blocks_says_so_and_one_with_them_skips(
    linear: Bundle, surrogate: Bundle, tmp_path: Path
) -> None:
    (plain_one,) = blackbox(linear, surrogate)
    assert "SGM is momentum PGD on colours, which has no residual block" in plain_one.note
    residual = plain(tmp_path / "residual", "resnet8", members=[build_tiny("resnet8") for _ in range(2)])
    (skipping,) = blackbox(linear, residual, images=6, steps=2)
    assert "SGM" not in skipping.note
    assert skipping.attack != plain_one.attack, "another set is another attack"


def build_tiny(name: str) -> nn.Module:
    return Architecture(network=name, dataset="tiny").build().eval()


def test_an_adversarial_set_that_was_interrupted_is_gone_on_with(
    linear: Bundle, surrogate: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, made = adversarial_set.pgd, []

    def counted(*given: Any, **options: Any) -> Tensor:
        made.append(len(given[1]))
        if len(made) == 14:
            raise KeyboardInterrupt
        return whole(*given, **options)

    (expected,) = blackbox(linear, surrogate, images=ALL, adversarial_set=tmp_path / "whole")
    monkeypatch.setattr(adversarial_set, "pgd", counted)
    with pytest.raises(KeyboardInterrupt):
        blackbox(linear, surrogate, images=ALL, adversarial_set=tmp_path / "set")
    (found,) = blackbox(linear, surrogate, images=ALL, adversarial_set=tmp_path / "set")
    assert found == expected
    assert len(made) == 14 + 20, "30 attacks, of which the first batch's 10 were kept"
    with pytest.raises(BadInput, match="seed"):
        blackbox(linear, surrogate, images=ALL, adversarial_set=tmp_path / "set", seed=1)


def test_an_adversarial_set_is_made_once_and_used_again(
    linear: Bundle, surrogate: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "set"
    first = blackbox(linear, surrogate, adversarial_set=folder)
    monkeypatch.setattr("zoo.evaluation.adversarial_set.pgd", None)  # nothing is attacked again
    assert blackbox(linear, surrogate, adversarial_set=folder) == first
    other = plain(tmp_path / "other", "contrary")
    (contrary,) = blackbox(other, surrogate, adversarial_set=folder)
    assert contrary.accuracy == 0


def test_stored_adversarial_images_stay_in_the_ball_and_in_range(linear: Bundle, surrogate: Bundle) -> None:
    images = datasets.evaluation_subset(datasets.load("tiny", "test"), 40)
    opened = open_surrogate(f"local-dir:{surrogate.folder}")
    stored = AdversarialSet(
        folder=None,
        dataset="tiny",
        images=images,
        index=datasets.evaluation_index(ALL, 40),
        surrogates=[opened],
        steps=5,
        seed=0,
    )
    eps = Fraction(1, 100)
    for pixels in stored.versions(opened, eps, torch.device("cpu")):
        assert float((pixels - datasets.as_float(images.pixels)).abs().max()) <= float(eps) + 1e-7
        assert 0 <= float(pixels.min()) <= float(pixels.max()) <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": 41}, "index"),
        ({"steps": 6}, "steps.*5.*6"),
        ({"seed": 1}, "seed"),
    ],
)
def test_a_stored_set_that_does_not_fit_is_refused(
    linear: Bundle, surrogate: Bundle, tmp_path: Path, changes: dict[str, int], message: str
) -> None:
    blackbox(linear, surrogate, adversarial_set=tmp_path / "set")
    with pytest.raises(BadInput, match=message):
        blackbox(linear, surrogate, adversarial_set=tmp_path / "set", **changes)


def test_a_stored_set_that_was_changed_is_refused(linear: Bundle, surrogate: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    blackbox(linear, surrogate, adversarial_set=folder)
    (file,) = folder.glob("*.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ChecksumMismatch, match=r"set\.json"):
        blackbox(linear, surrogate, adversarial_set=folder)
    file.unlink()
    with pytest.raises(MissingFile, match=r"\.safetensors.*set\.json"):
        blackbox(linear, surrogate, adversarial_set=folder)


def test_a_folder_with_other_things_is_no_adversarial_set(linear: Bundle, surrogate: Bundle, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "thesis.tex").write_text("years of work")
    with pytest.raises(BadInput, match=r"set\.json"):
        blackbox(linear, surrogate, adversarial_set=tmp_path / "set")


def test_surrogates_must_be_others_than_the_target(linear: Bundle, surrogate: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="none"):
        blackbox(linear)
    with pytest.raises(BadInput, match="is the target itself or shares a member with it"):
        blackbox(linear, linear)
    members = plain(tmp_path / "members", "mean_colour", members=[MeanColour(), MeanColour(7.0)])
    with pytest.raises(BadInput, match="is the target itself or shares a member with it"):
        blackbox(linear, members)
    with pytest.raises(BadInput, match="colours"):
        blackbox(linear, surrogate, surrogate)
    with pytest.raises(BadInput, match="surrogate nobody: unknown model"):
        blackbox(linear, surrogates=("nobody",))


def test_what_a_target_was_trained_from_is_no_black_box(linear: Bundle, surrogate: Bundle, tmp_path: Path) -> None:
    document = json.loads((linear.folder / "card.json").read_text())
    document["training"]["recipe"] = {"start_from": "colours"}
    (linear.folder / "card.json").write_text(json.dumps(document))
    with pytest.raises(BadInput, match="colours"):
        blackbox(Bundle.open(linear.folder), surrogate)


# --- corruptions, and what a protocol refuses ---


def test_a_model_that_no_corruption_disturbs_keeps_its_accuracy(
    linear: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zoo.evaluation.protocols.corruptions.corrupt", lambda pixels, name, severity, seed: pixels)
    (clean,) = evaluate(linear, Request(protocol="clean"))
    (result,) = evaluate(linear, Request(protocol="corruptions"))
    assert result.accuracy == clean.accuracy
    (table,) = result.tables
    assert (len(table.rows), table.columns) == (15, ("1", "2", "3", "4", "5"))
    assert result.note.startswith("synthetic: corrupted by manygates, not CIFAR-10-C")


def test_an_image_that_is_wrong_without_an_attack_is_not_robust(tmp_path: Path) -> None:
    """This network is wrong on every image of 8 bits and right on any other."""

    class Shy(MeanColour):
        def forward(self, images: Tensor) -> Tensor:
            levels = (images * 255).flatten(1)
            exact = ((levels - levels.round()).abs().amax(1) < 1e-3).float()[:, None]
            return super().forward(images) * (1 - 2 * exact)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(networks.NETWORKS, "mean_colour", lambda images, classes, **options: Shy(**options))
        patch.setattr("zoo.evaluation.run.folded_copy", lambda network: network)
        (result,) = attacked(plain(tmp_path, "mean_colour"), Fraction(1, 1000))
    assert result.accuracy < 0.1


def test_an_attack_that_has_not_converged_is_found_out(linear: Bundle) -> None:
    """One step of a fifth of the ball from a random start: twice the steps find much more."""
    (weak,) = attacked(linear, Fraction(1, 3), steps=1, restarts=1)
    assert "twice the steps do not help the attacker" in failed(weak)
    (strong,) = attacked(linear, Fraction(1, 3), steps=15, restarts=1)
    assert failed(strong) == set()


def test_a_warning_of_autoattack_survives_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = plain(tmp_path, "mean_colour")
    monkeypatch.setattr(autoattack, "BATCH", 40)
    calls: list[int] = []

    def fake(model: object, images: Tensor, labels: Tensor, budget: object, *, seed: int) -> AutoAttackResult:
        calls.append(len(images))
        if len(calls) == 2:
            raise KeyboardInterrupt
        right = torch.ones(len(images), dtype=torch.bool)
        flags = ("the model is random",) if len(calls) == 1 else ()
        return AutoAttackResult(adversarial=images, clean=right, robust=dict.fromkeys(ATTACKS, right), flags=flags)

    monkeypatch.setattr(autoattack, "autoattack", fake)
    request = Request(protocol="autoattack", eps=(Fraction(1, 100),), images=ALL)
    with pytest.raises(KeyboardInterrupt):
        evaluate(bundle, request)
    (result,) = evaluate(bundle, request)
    assert calls == [40] * 4
    assert failed(result) == {"AutoAttack raises no warning"}
    assert "the model is random" in result.checks[0].detail


@pytest.mark.parametrize(("alone", "said"), [(1, set()), (5, {"gradients find what Square finds"})])
def test_square_that_breaks_what_gradients_leave_is_found_out(
    alone: int, said: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One image in a hundred is allowed, also where the shares 0.77 and 0.76 differ by more than 0.01 in floats."""

    def fake(model: object, images: Tensor, labels: Tensor, budget: object, *, seed: int) -> AutoAttackResult:
        number = torch.arange(len(images))
        after = dict.fromkeys(ATTACKS[:-1], number >= 23) | {"square": number >= 23 + alone}
        return AutoAttackResult(adversarial=images, clean=number >= 0, robust=after, flags=())

    monkeypatch.setattr(autoattack, "autoattack", fake)
    request = Request(protocol="autoattack", eps=(Fraction(1, 100),), images=100)
    (result,) = evaluate(plain(tmp_path, "mean_colour"), request)
    assert failed(result) == said


def test_paths_are_compared_as_random_gates(alike: Bundle) -> None:
    with pytest.raises(BadInput, match=r"gated.*'single'"):
        evaluate(alike, Request(protocol="transfer-matrix"))


def test_official_corruptions_belong_to_their_data_set(linear: Bundle, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"colours.* tiny"):
        evaluate(linear, Request(protocol="corruptions", corrupted=tmp_path))


def test_a_random_model_given_to_a_deterministic_protocol_is_refused(tmp_path: Path) -> None:
    class Noisy(MeanColour):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images + 0.1 * torch.rand_like(images))

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(networks.NETWORKS, "mean_colour", lambda images, classes, **options: Noisy(**options))
        patch.setattr("zoo.evaluation.run.folded_copy", lambda network: network)
        bundle = plain(tmp_path, "mean_colour")
        with pytest.raises(BadInput, match="random-gates"):
            attacked(bundle, Fraction(1, 100))


def test_a_network_with_one_exit_has_no_exits_to_compare(linear: Bundle) -> None:
    with pytest.raises(BadInput, match="colours"):
        evaluate(linear, Request(protocol="exits", images=20))


# --- the linter on a bundle ---


def test_an_alarm_that_asks_for_averaging_is_answered_by_a_random_gates_result(
    alike: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """E1 says that attacks with one draw flatter; the protocol averages. No other alarm can be answered."""

    def found(*given: object, **options: object) -> tuple[Finding, ...]:
        made = [Finding(code=code, name="?", verdict="alarm", figure="0.2", meaning="!") for code in ("E1", "G1")]
        return tuple(made)

    monkeypatch.setattr(linted, "lint_model", found)
    before = linted.lint_bundle(alike, "gated", images=20)
    assert [finding.code for finding in before.alarms] == ["E1", "G1"]
    (clean,) = evaluate(alike, Request(protocol="clean", variant="gated"))
    failing = Check(name="EOT is flat", held=False, detail="no")
    averaged = replace(clean, protocol="random-gates", attack="minimum", draws=100)
    unsound = record_results(alike.folder, [replace(averaged, checks=(failing,))])
    assert [finding.code for finding in linted.lint_bundle(unsound, "gated", images=20).alarms] == ["E1", "G1"]
    answered = record_results(alike.folder, [averaged])
    lint = linted.lint_bundle(answered, "gated", images=20)
    assert [finding.code for finding in lint.alarms] == ["G1"]
    assert "as the card's random-gates result does" in lint.findings[0].figure
