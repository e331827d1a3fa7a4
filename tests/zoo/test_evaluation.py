from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from zoo import data, evaluation, networks
from zoo.bundle import Bundle, record_results, write_bundle
from zoo.card import Architecture as CardArchitecture
from zoo.card import Card, InputFormat, Paths, Result, Training
from zoo.checkpoint import Architecture, save_network
from zoo.errors import BadInput, DataMissing, UnknownName
from zoo.evaluation import Request, evaluate, parse_eps
from zoo.evaluation.protocols import wilson
from zoo.models import PLAIN_WEIGHTS, RGN_WEIGHTS, save_members

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
    source = data.source("tiny")
    return Card(
        name="colours",
        description="made by a test",
        method="standard",
        license="apache-2.0",
        dataset="tiny",
        architecture=CardArchitecture(
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
    images = data.load("tiny", "test")
    return data.as_float(images.pixels), images.labels


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
    assert result.note == "mean over 10 draws, each with a fresh random path per 50 images"
    assert result == evaluate(gated, Request(protocol="clean", variant="gated"))[0]
    seeds = {evaluate(gated, Request(protocol="clean", variant="gated", seed=seed))[0].accuracy for seed in range(4)}
    assert len(seeds) > 1


def test_white_box_on_random_gates_is_refused_with_its_reason(gated: Bundle) -> None:
    with pytest.raises(BadInput, match=r"says nothing about random gates; measure the variants single and ensemble"):
        evaluate(gated, Request(protocol="whitebox", variant="gated"))


def test_an_unknown_protocol_is_refused_with_the_known_ones(linear: Bundle) -> None:
    with pytest.raises(UnknownName, match=r"protocol 'white'; .*known: clean, .*whitebox"):
        evaluate(linear, Request(protocol="white"))
    assert set(evaluation.PROTOCOLS) >= {"clean", "whitebox"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": 0}, "cannot measure 0 images, expected 1 to 120"),
        ({"images": -1}, "cannot measure -1 images"),
        ({"images": 121}, "cannot measure 121 images, expected 1 to 120"),
        ({"steps": 0}, "at least 1 step and 1 restart, got steps=0 restarts=1"),
        ({"restarts": 0}, "got steps=10 restarts=0"),
        ({"variant": "gated"}, "no variant 'gated'; it has single"),
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
    images = data.load("tiny", "train")
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
    with pytest.raises(BadInput, match=rf"eps {text} is outside \[0, 1\]; .*write 8/255, not 8"):
        parse_eps(text)


@pytest.mark.parametrize("text", ["", "eight", "8/0", "nan", "inf", "8/255/2", "0,03"])
def test_an_eps_that_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(BadInput, match=r"is not a number; write 8/255 or 0\.03"):
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
