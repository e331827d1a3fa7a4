"""The comparison of the whole zoo: one table and two figures per data set, from the cards alone."""

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

import manygates
from zoo.bundle.card import Calibration, Card, Check, Finding, Int8, Lint, Paths, Published, Result
from zoo.errors import BadInput
from zoo.hub import source as catalogue
from zoo.report.drawings import Scatter
from zoo.report.leaderboard import BEGIN, END, leaderboard_of, write_leaderboard

pytest.importorskip("matplotlib", reason="needs the extra [report]")

ROOT = Path(__file__).parents[3]
GOLDEN = Card.from_json((Path(__file__).parents[1] / "golden_card.json").read_text(encoding="utf-8"))
FOUND = Finding(code="G2", name="gradients", verdict="alarm", figure="none", meaning="masking")
LINT = Lint(variant="single", images=9, seed=0, findings=(FOUND,), date="2026-11-21", command="")


def measured(accuracy: float, eps: str = "0", **changes: Any) -> Result:
    named: dict[str, Any] = (
        {"protocol": "clean", "attack": "none", "steps": 0, "restarts": 0, "images": 10_000}
        if eps == "0"
        else {"protocol": "whitebox", "attack": "PGD", "steps": 50, "restarts": 5, "images": 1000}
    )
    low, high = max(0.0, accuracy - 0.03), min(1.0, accuracy + 0.03)
    radius = float(Fraction(eps))
    fields = {"variant": "single", **named, **changes}
    return Result(
        eps=radius,
        eps_fraction=eps,
        step_size=radius / 5,
        seed=0,
        accuracy=accuracy,
        interval=(low, high),
        note="",
        checks=fields.pop("checks", ()),
        date="2026-11-21",
        command="",
        **fields,
    )


def card(name: str, *results: Result, **changes: Any) -> Card:
    network = replace(
        GOLDEN.architecture,
        gated_layers=(),
        candidates=1,
        sharing=None,
        parameters=GOLDEN.architecture.single_path_parameters,
    )
    fields = {
        "architecture": network,
        "paths": Paths(single=None, ensemble=()),
        "variants": ("single",),
        "int8": None,
        "lint": (),
        "results": results or (measured(0.8), measured(0.5, "1/100"), measured(0.2, "3/100")),
        **changes,
    }
    return replace(GOLDEN, name=name, **fields)


def gated(name: str, *results: Result, **changes: Any) -> Card:
    fields = {"architecture": GOLDEN.architecture, "paths": GOLDEN.paths, "variants": GOLDEN.variants}
    return card(name, *results, **{**fields, **changes})


def rows_of(page: str) -> list[list[str]]:
    """Return the cells of every row of every table, headers too."""
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    return [[cell.strip().replace("\\", "") for cell in line.strip("|").split(" | ")] for line in lines]


def named(page: str) -> dict[str, dict[str, str]]:
    """Return the rows by "model variant", each by the names of its columns."""
    found, header = {}, []
    for row in rows_of(page):
        if row[0] == "row":
            header = row
        else:
            found[f"{row[1]} {row[2]}"] = dict(zip(header, row, strict=True))
    return found


def said(*cards: Card) -> str:
    """Return the Markdown alone, where nothing is drawn."""
    return leaderboard_of(cards)[0]


def write(tmp_path: Path, *cards: Card) -> str:
    write_leaderboard(cards, tmp_path / "zoo.md")
    return (tmp_path / "zoo.md").read_text(encoding="utf-8")


def test_the_filed_page_is_what_the_cards_say(tmp_path: Path) -> None:
    filed = (ROOT / "docs/zoo.md").read_text(encoding="utf-8")
    (tmp_path / "zoo.md").write_text(filed, encoding="utf-8")
    assert manygates.main(["report", "--zoo", "--out", str(tmp_path / "zoo.md")]) == 0
    again = (tmp_path / "zoo.md").read_text(encoding="utf-8")
    assert again == filed, "run `manygates report --zoo --out docs/zoo.md`"
    named_there = set(re.findall(r"figures/(zoo-[a-z0-9-]+\.svg)", filed))
    assert named_there == {file.name for file in (ROOT / "docs/figures").glob("zoo-*.svg")}


def test_a_data_set_has_one_table_and_two_figures(tmp_path: Path) -> None:
    page = write(tmp_path, card("one"), card("two", dataset="mnist"))
    assert [line for line in page.splitlines() if line.startswith("## ")] == ["## CIFAR-10", "## MNIST"]
    assert sum(row[0] == "row" for row in rows_of(page)) == 2
    figures = sorted(file.name for file in (tmp_path / "figures").iterdir())
    assert figures == [f"zoo-{name}-{kind}.svg" for name in ("cifar10", "mnist") for kind in ("clean-robust", "eps")]
    assert re.findall(r"\(figures/([^)]+)\)", page) == figures
    for file in (tmp_path / "figures").iterdir():
        ElementTree.fromstring(file.read_bytes())


def test_a_row_has_every_number_with_its_interval_under_its_radius() -> None:
    results = (
        measured(0.8123),
        measured(0.5, "1/100"),
        measured(0.1, "8/255"),
        measured(0.6, "3/100", protocol="blackbox", attack="transfer, set a"),
        measured(0.4, "1/100", protocol="autoattack", attack="AutoAttack"),
    )
    (row,) = named(said(card("one", *results))).values()
    assert row["clean"].startswith("81.23 % (78.23")
    assert row["white-box, ε 0.01"] == "50.0 % (47.0–53.0)"
    assert row["white-box, ε 8/255"].startswith("10.0 %")
    assert row["transfer, ε 0.03"].startswith("60.0 %")
    assert row["AutoAttack, ε 0.01"].startswith("40.0 %")
    assert "white-box, ε 0.03" not in row


def test_rows_are_ranked_by_a_stated_column_and_failed_ones_come_last_and_are_marked(tmp_path: Path) -> None:
    weak = card("weak", measured(0.9), measured(0.1, "1/100"))
    flattered = card("flattered", measured(0.9), measured(0.9, "1/100"), lint=(LINT,))
    unmeasured = card("no-attack", measured(0.7))
    cards = [weak, flattered, card("strong", measured(0.8), measured(0.6, "1/100")), unmeasured]
    page = said(*cards)
    rows = list(named(page).values())
    assert [row["model"] for row in rows] == ["strong", "weak", "no-attack", "flattered"]
    assert [row["row"] for row in rows] == ["1", "2", "3", "4"]
    assert rows[3]["white-box, ε 0.01"].startswith("90.0 % ‡")
    assert rows[3]["linter"] == "1 alarm (G2)"
    assert rows[0]["linter"] == "not linted"
    assert "Ranked by white-box at ε 0.01" in page
    assert "‡ The robustness linter raised an alarm" in page
    scatter = leaderboard_of(cards)[1][0][1].drawing
    assert isinstance(scatter, Scatter)
    assert {tag for tags in scatter.tags for tag in tags} == {"1", "2", "4‡"}


def test_without_an_alarm_the_mark_is_not_explained() -> None:
    page = said(card("one"))
    assert "‡" not in page
    assert "†" not in page


def test_a_check_that_did_not_hold_is_marked() -> None:
    failed = Check(name="gradients", held=False, detail="all zero")
    page = said(card("one", measured(0.8), measured(0.5, "1/100", checks=(failed,))))
    assert "50.0 % †" in page
    assert "† A check of this measurement did not hold" in page


def test_random_gates_stand_below_and_say_how_they_were_judged(tmp_path: Path) -> None:
    random = measured(
        0.7,
        "1/100",
        protocol="random-gates",
        attack="minimum of 18 attacks",
        variant="gated",
        steps=20,
        restarts=1,
        draws=100,
        images=100,
    )
    clean = measured(0.8, variant="gated", draws=10)
    page = said(gated("net", clean, random, measured(0.8), measured(0.3, "1/100")))
    rows = named(page)
    assert list(rows) == ["net one path", "net random gates"]
    assert rows["net random gates"]["white-box, ε 0.01"] == "70.0 % § (67.0–73.0; 100 images)"
    assert "§ Random gates: for each image the lowest mean over 100 fresh draws" in page


def test_other_terms_and_other_transferred_images_are_said_beside_the_number() -> None:
    def transferred(accuracy: float, attack: str, images: int) -> Result:
        return measured(accuracy, "3/100", protocol="blackbox", attack=attack, steps=100, restarts=3, images=images)

    common = [card(name, measured(0.8), transferred(0.5, "transfer, set a", 1000)) for name in ("one", "two")]
    other = card("other", measured(0.8), transferred(0.6, "transfer, set b", 100))
    page = said(*common, other)
    assert named(page)["other the network"]["transfer, ε 0.03"] == "60.0 % ¶ (57.0–63.0; 100 images)"
    assert named(page)["one the network"]["transfer, ε 0.03"] == "50.0 % (47.0–53.0)"
    assert "¶ On another set of transferred images" in page
    assert "transfer: 100 steps of ε/5, 3 restarts, 1,000 images, seed 0" in page


def test_l2_and_int8_results_have_no_place_here() -> None:
    others = (measured(0.123, "1/2", norm="l2"), measured(0.124, "1/100", variant="single-int8"))
    calibration = Calibration(images=9, seed=0, method="min-max", tool="onnxruntime")
    int8 = Int8(variants=("single",), calibration=calibration)
    page = said(card("one", measured(0.8), measured(0.5, "1/100"), *others, int8=int8))
    assert "12.3" not in page
    assert "12.4" not in page
    assert len(named(page)) == 1


def test_variants_are_named_by_what_they_are() -> None:
    network = replace(card("x").architecture, parameters=3 * GOLDEN.architecture.single_path_parameters)
    both = (measured(0.8), measured(0.5, "1/100"), measured(0.8, variant="ensemble"))
    page = said(card("three", *both, variants=("single", "ensemble"), architecture=network))
    assert {(row["variant"], row["passes"]) for row in named(page).values()} == {
        ("one member", "1"),
        ("3 members averaged", "3"),
    }


def test_how_long_was_trained_stands_against_the_published_time() -> None:
    run = replace(GOLDEN.training, recipe={"phases": [{"epochs": 1}, {"epochs": 18}]}, published=None)
    same = Published(recipe="r", network=GOLDEN.architecture.name, epochs=(200, 200))
    elsewhere = replace(same, network="preact_resnet18", epochs=(200,))
    scales = {"same": same, "elsewhere": elsewhere, "unknown": None}
    cards = [card(name, training=replace(run, published=scale)) for name, scale in scales.items()]
    rows = named(said(*cards))
    assert rows["same the network"]["trained"] == "1 + 18 epochs of 200 + 200"
    assert rows["elsewhere the network"]["trained"] == "1 + 18 epochs (published: 200, preact_resnet18)"
    assert rows["unknown the network"]["trained"] == "1 + 18 epochs"


@pytest.mark.parametrize("begun", ["other-model", "local-dir:models/other-model", "hf-hub:org/other-model"])
def test_a_model_that_went_on_from_another_says_so(begun: str) -> None:
    run = replace(GOLDEN.training, recipe={"phases": [{"epochs": 6}], "start_from": begun})
    (row,) = named(said(card("one", training=run))).values()
    assert row["trained"] == "6 epochs, from other-model"


def test_a_model_without_numbers_is_named_and_has_no_row(tmp_path: Path) -> None:
    page = said(card("one"), replace(card("blank"), results=()))
    assert list(named(page)) == ["one the network"]
    assert "Not measured yet: blank." in page
    assert rows_of(said(replace(card("blank"), results=()))) == []


def test_the_figures_of_last_time_go(tmp_path: Path) -> None:
    write(tmp_path, card("one"))
    write(tmp_path, replace(card("blank"), results=()))
    assert list((tmp_path / "figures").iterdir()) == []


def test_what_was_not_measured_is_a_dash_and_no_point() -> None:
    page = said(card("clean-only", measured(0.8)), card("both"))
    assert named(page)["clean-only the network"]["white-box, ε 0.01"] == "–"
    assert said(card("clean-only", measured(0.8))).count("![") == 0


def test_the_text_around_the_marks_stays(tmp_path: Path) -> None:
    (tmp_path / "zoo.md").write_text(f"# Mine\n\nbefore\n{BEGIN}\nold\n{END}\nafter\n")
    page = write(tmp_path, card("one"))
    assert page.startswith(f"# Mine\n\nbefore\n{BEGIN}\n## CIFAR-10")
    assert page.endswith(f"{END}\nafter\n")
    assert "old" not in page


@pytest.mark.parametrize("text", ["", BEGIN, END, f"{END}{BEGIN}", f"{BEGIN}{END}{BEGIN}{END}"])
def test_a_page_without_one_pair_of_marks_is_left_alone(text: str, tmp_path: Path) -> None:
    (tmp_path / "zoo.md").write_text(text)
    with pytest.raises(BadInput, match="lacks one <!-- leaderboard -->"):
        write(tmp_path, card("one"))
    assert (tmp_path / "zoo.md").read_text() == text
    assert not (tmp_path / "figures").exists()


def test_a_page_that_cannot_be_written_leaves_no_figures(tmp_path: Path) -> None:
    (tmp_path / "zoo.md").mkdir()
    with pytest.raises(OSError, match=r"zoo\.md"):
        write_leaderboard([card("one")], tmp_path / "zoo.md")
    assert list((tmp_path / "figures").iterdir()) == []


def test_the_same_cards_give_the_same_bytes(tmp_path: Path) -> None:
    cards = [card(f"m{index}", method=f"method {index}") for index in range(9)]
    for name in ("first", "second"):
        write(tmp_path / name, *cards)
    files = [file.relative_to(tmp_path / "first") for file in (tmp_path / "first").rglob("*") if file.is_file()]
    assert len(files) == 3
    for file in files:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


def test_hostile_text_stays_text() -> None:
    page = said(card("one", method="<script>|x", dataset="a|b\n## c"))
    assert "<script>" not in page
    assert {len(row) for row in rows_of(page)} == {len(rows_of(page)[0])}
    assert [line for line in page.splitlines() if line.startswith("## ")] == ["## a\\|b ## c"]


def test_bad_requests_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    with pytest.raises(BadInput, match="no cards to compare"):
        write_leaderboard([], tmp_path / "zoo.md")
    with pytest.raises(BadInput, match="expected a page of Markdown"):
        write_leaderboard([card("one")], tmp_path / "folder")
    assert manygates.main(["report", "--zoo", "some-model", "--out", str(tmp_path / "zoo.md")]) == 2
    assert "leave 'some-model' out" in capsys.readouterr().err
    assert manygates.main(["report", "--out", str(tmp_path / "report")]) == 2
    assert "report got no model" in capsys.readouterr().err


def test_cards_that_are_not_bundled_are_compared_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "bundled_dir", lambda: tmp_path / "package/bundles")
    place = tmp_path / "package/cards/unbundled.json"
    place.parent.mkdir(parents=True)
    place.write_text(card("unbundled").to_json(), encoding="utf-8")
    assert manygates.main(["report", "--zoo", "--out", str(tmp_path / "zoo.md")]) == 0
    assert "unbundled" in (tmp_path / "zoo.md").read_text(encoding="utf-8")
