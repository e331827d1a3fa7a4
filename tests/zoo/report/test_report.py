import itertools
import math
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import zoo.report
from zoo.bundle.card import Card, Check, Finding, Lint, NetworkSummary, Paths, Result, Table
from zoo.errors import BadInput
from zoo.report.document import Exhibit
from zoo.report.drawings import INK, MUTED, PAGE, SERIES, VARIABLES, Lines, Style
from zoo.report.entries import Entry, entries_of
from zoo.report.figures import Rendered
from zoo.report.markdown import markdown_of, markdown_table
from zoo.report.page import page_of
from zoo.report.write import check_report_target, report_of, write_report

pytest.importorskip("matplotlib", reason="the figures of a report need manygates[report]")

GOLDEN = Card.from_json((Path(__file__).parents[1] / "golden_card.json").read_text(encoding="utf-8"))
CLEAN, ATTACKED = GOLDEN.results
EMPTY_TAGS = {"meta", "link", "br", "hr", "img"}
HEADINGS = ("h1", "h2", "h3", "h4")


STYLE = (Path(zoo.report.__file__).parent / "templates" / "page.css").read_text(encoding="utf-8")
LIGHT, DARK, PRINT = (
    dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6})", rule))
    for rule in re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)
)
CHROMIUM = Path("/usr/bin/chromium")


class Page(HTMLParser):
    """What a browser would make of a page, as far as these tests ask."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.headings: list[tuple[str, str]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.ids: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._caption = ""
        self._rows: list[list[str]] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        self.ids += [value or "" for key, value in attributes if key == "id"]
        if tag not in EMPTY_TAGS:
            self.open.append(tag)
        if tag in HEADINGS:
            self.headings.append((tag, ""))
        if tag == "table":
            self._caption, self._rows = "", []
        if tag == "tr":
            self._rows.append([])
        if tag in ("td", "th"):
            self._rows[-1].append("")
        if tag == "small":
            self._rows[-1][-1] += " "

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        self.ids += [value or "" for key, value in attributes if key == "id"]

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag
        if tag == "table":
            self.tables[self._caption] = self._rows

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            return
        self.text += data
        if self.open and self.open[-1] in HEADINGS:
            self.headings[-1] = (self.headings[-1][0], self.headings[-1][1] + data)
        elif "caption" in self.open:
            self._caption += data
        elif {"td", "th"} & set(self.open):
            self._rows[-1][-1] += data


def attacked(accuracy: float = 0.42, **changes: Any) -> Result:
    low, high = max(0.0, accuracy - 0.03), min(1.0, accuracy + 0.03)
    return replace(ATTACKED, accuracy=accuracy, interval=(low, high), **{"tables": (), "checks": (), **changes})


def card(name: str = "golden", *results: Result, **changes: Any) -> Card:
    return replace(GOLDEN, name=name, results=results or (CLEAN, attacked()), **{"lint": (), **changes})


def matrix(name: str, rows: Sequence[str], columns: Sequence[str], *values: Sequence[float | None]) -> Table:
    return Table(
        name=name,
        row_axis="row",
        column_axis="column",
        rows=tuple(rows),
        columns=tuple(columns),
        values=tuple(map(tuple, values)),
    )


def with_table(name: str, *tables: Table, **changes: Any) -> Card:
    return card(name, attacked(tables=tables, **changes))


def shown(*cards: Card, title: str = "A report") -> Page:
    """Return the page of cards with blanks where its figures belong: what is drawn is nobody's question here."""
    report = report_of(cards, title=title)
    blank = {
        picture.name: Rendered(svg=b"", png=b"", inline=f'<svg role="img" id="{picture.name}"></svg>')
        for _, picture in report.pictures
    }
    return Page(page_of(report, blank))


def figures_of(*cards: Card) -> list[str]:
    """Return the names of a report's figures, without those of the first screen."""
    report = report_of(cards, title="")
    first = {exhibit.picture.name for exhibit in report.overview.exhibits if exhibit.picture is not None}
    return [picture.name for _, picture in report.pictures if picture.name not in first]


def labels_of(*cards: Card) -> list[str]:
    """Return the names of the lines against eps."""
    section = next(section for section in report_of(cards, title="").compared if section.key == "eps")
    (picture,) = (exhibit.picture for exhibit in section.exhibits)
    assert picture is not None
    assert isinstance(picture.drawing, Lines)
    return [series.label for series in picture.drawing.series]


def section_titles(page: Page) -> list[str]:
    """Return the titles of the folded sections."""
    folded = page.headings[page.headings.index(("h2", "Side by side")) :]
    return [text for tag, text in folded if tag == "h3"]


EVERY_TABLE = (
    matrix("steps", ["PGD"], ["0", "1", "10"], [0.8, 0.5, None]),
    matrix("transfer", ["011", "100"], ["011", "100"], [0.1, 0.6], [None, 0.2]),
    matrix("paths", ["011", "100", "111"], ["clean"], [0.81], [0.79], [0.8]),
    matrix("corruptions", ["fog", "snow"], ["1", "2"], [0.7, 0.6], [0.5, None]),
    matrix("sources", ["three"], ["SGM", "all"], [0.6, 0.5]),
    matrix("attacks", ["none", "EOT-20"], ["mean", "worst of 10"], [0.8, 0.7], [0.4, 0.3]),
    matrix("exits", ["clean", "average"], ["1", "2"], [0.7, 0.8], [0.3, 0.4]),
    matrix(
        "budgeted",
        ["0.5", "1"],
        ["million MACs, clean", "accuracy, clean", "million MACs, attack", "accuracy, attack"],
        [9.3, 0.7, 11.0, 0.4],
        [20.1, 0.8, 20.8, 0.5],
    ),
    matrix("diversity", ["011"], ["100"], [5.25]),
)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a report on two models with every kind of table."""
    cards = [with_table("one", *EVERY_TABLE), with_table("two", *EVERY_TABLE)]
    return write_report(cards, tmp_path_factory.mktemp("reports") / "report").parent


def test_a_report_is_one_page_one_markdown_file_and_a_pair_of_files_per_figure(written: Path) -> None:
    assert sorted(entry.name for entry in written.iterdir()) == ["figures", "report.html", "report.md"]
    page, markdown = ((written / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))
    drawings, pictures = (sorted((written / "figures").glob(f"*.{kind}")) for kind in ("svg", "png"))
    assert [file.stem for file in drawings] == [file.stem for file in pictures]
    assert set(drawings + pictures) == set((written / "figures").iterdir())
    for file in drawings:
        assert ElementTree.parse(file).getroot().tag == "{http://www.w3.org/2000/svg}svg"
        assert f"(figures/{file.name})" in markdown
    for file in pictures:
        assert file.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    for file in drawings + pictures:
        assert f"figures/{file.name}" in page


def test_the_page_needs_no_network_and_no_script_and_its_identifiers_are_unique(written: Path) -> None:
    page = Page((written / "report.html").read_text(encoding="utf-8"))
    assert not page.open
    assert len(page.ids) == len(set(page.ids))
    assert not {tag for tag, _ in page.tags} & {"script", "img", "link", "iframe", "image"}
    for _, attributes in page.tags:
        for key, value in attributes.items():
            assert not key.startswith("on")
            if key.endswith("href"):
                assert value is not None
                assert value.startswith(("#", "figures/"))
                assert not value.startswith("#") or value[1:] in page.ids


def test_every_figure_says_what_it_shows_and_stands_beside_its_numbers(written: Path) -> None:
    page = Page((written / "report.html").read_text(encoding="utf-8"))
    pictures = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert len(pictures) == len(list((written / "figures").glob("*.svg"))) == 5 + 2 * 3
    for attributes in pictures:
        assert attributes["role"] == "img"
        assert all(name in page.ids for name in (attributes["aria-labelledby"] or "missing").split())
    tags = [tag for tag, _ in page.tags]
    for index, tag in enumerate(tags):
        if tag == "svg":
            following = [later for later in tags[index + 1 :] if later in ("table", *HEADINGS)]
            assert following[0] == "table"


def test_the_first_screen_has_a_sentence_per_model_one_plot_and_one_short_table() -> None:
    ensemble = [replace(CLEAN, variant="ensemble"), attacked(0.51, variant="ensemble")]
    many = [attacked(0.9 - 0.1 * index, eps=index / 100, eps_fraction=f"{index}/100") for index in range(1, 8)]
    one, two, new = card("one", CLEAN, attacked(0.31), *ensemble), card("two", CLEAN, *many), card("new")
    report = report_of([one, two, replace(new, results=())], title="")
    (exhibit,) = report.overview.exhibits
    assert [claim.subject for claim in exhibit.claims] == ["one", "two", "new"]
    assert "80.00 %" in exhibit.claims[0].text
    assert "31.0 %" in exhibit.claims[0].text, "at the radius that ranks"
    assert "60.0 %" in exhibit.claims[1].text, "not measured there, so at its own largest"
    assert "not been measured" in exhibit.claims[2].text
    (table,) = exhibit.grids
    assert len(table.header) == 8
    assert [tuple(cell.text for cell in row[:2]) for row in table.rows] == [
        ("one", "ensemble"),
        ("one", "single"),
        ("two", "single"),
    ]
    assert exhibit.picture is not None
    assert isinstance(exhibit.picture.drawing, Lines)
    assert [(line.label, line.values[:2]) for line in exhibit.picture.drawing.series] == [
        ("one", (0.8, 0.31)),
        ("two", (0.8, many[0].accuracy)),
    ]


def test_a_sentence_says_what_the_linter_and_the_checks_of_the_attack_found() -> None:
    failed = Check(name="a large eps reaches zero", held=False, detail="0.03 at 64/255")
    report = report_of([card(CLEAN.variant, CLEAN, attacked(checks=(failed,)), lint=GOLDEN.lint)], title="")
    (claim,) = report.overview.exhibits[0].claims
    assert claim.tone == "alarm"
    assert "a check of the attack did not hold" in claim.text
    assert "may flatter" in claim.text
    (plain,) = report_of([card("golden", CLEAN)], title="").overview.exhibits[0].claims
    assert "not attacked" in plain.text
    assert (plain.tone, plain.link) == ("", "variant-golden-single")


def test_everything_below_the_first_screen_is_folded_and_a_link_leads_into_it() -> None:
    page = shown(replace(with_table("golden", *EVERY_TABLE), lint=GOLDEN.lint))
    tags = [tag for tag, _ in page.tags]
    folded = [index for index, tag in enumerate(tags) if tag == "summary" and tags[index + 1] == "h3"]
    assert len(folded) == len(section_titles(page))
    anchors = [page.tags[index + 2] for index in folded]
    # a browser unfolds what is inside, not the fold itself
    assert all(tags[index - 1] == "details" for index in folded)
    linked = {attributes["href"] for tag, attributes in page.tags if tag == "a"}
    assert f"#{anchors[-1][1]['id']}" in linked


def test_headings_go_down_one_level_at_a_time() -> None:
    page = shown(with_table("golden", *EVERY_TABLE))
    levels = [int(tag[1]) for tag, _ in page.headings]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(below - above <= 1 for above, below in itertools.pairwise(levels))


def test_every_measured_accuracy_and_its_interval_are_in_the_page_and_in_the_markdown() -> None:
    shares = (0.123, 0.234, 0.345, 0.456)
    names = ("whitebox", "blackbox", "transfer-matrix", "a protocol of tomorrow")
    results = [attacked(share, protocol=name) for share, name in zip(shares, names, strict=True)]
    page = shown(card("golden", CLEAN, *results))
    markdown = markdown_of(report_of([card("golden", CLEAN, *results)], title=""))
    for written in ("80.00 %", "12.3 %", "23.4 %", "34.5 %", "45.6 %", "79.20–80.80", "9.3–15.3"):
        assert written in page.text
        assert written in markdown
    exact = {attributes.get("value") for tag, attributes in page.tags if tag == "data"}
    assert {"0.8", *map(str, shares)} <= exact


def test_models_and_variants_stand_side_by_side() -> None:
    ensemble = [replace(CLEAN, variant="ensemble", accuracy=0.805), attacked(0.51, variant="ensemble")]
    page = shown(card("one", CLEAN, attacked(0.31), *ensemble), card("two"))
    rows = page.tables["Accuracy on cifar10"]
    assert [row[:2] for row in rows[2:]] == [
        ["one ensemble_in_one", "single not linted"],
        ["one ensemble_in_one", "ensemble not linted"],
        ["one ensemble_in_one", "gated not linted"],
        ["two ensemble_in_one", "single not linted"],
        ["two ensemble_in_one", "ensemble not linted"],
        ["two ensemble_in_one", "gated not linted"],
    ]
    assert rows[0][1:4] == [
        "clean 10,000 images, seed 0",
        "white-box PGD 50 steps of 0.002, 5 restarts, 1,000 images, seed 0",
        "cost",
    ]
    assert rows[1][3] == "ε 8/255"
    assert [row[3].split(" %")[0] for row in rows[2:5]] == ["31.0", "51.0", "–"]


def test_the_cost_of_a_variant_is_its_forward_passes_and_the_parameters() -> None:
    page = shown(GOLDEN)
    rows = page.tables["Accuracy on cifar10"][2:]
    assert [row[-1] for row in rows] == ["1", "2", "1"]
    assert {row[-2] for row in rows} == {"272,474 541,546"}


@pytest.mark.parametrize(("parameters", "passes"), [(300, 3), (250, None)])
def test_an_ensemble_of_plain_networks_costs_as_many_passes_as_its_parameters_say(
    parameters: int, passes: int | None
) -> None:
    plain_network = NetworkSummary(
        name="resnet20",
        options={},
        gated_layers=(),
        candidates=1,
        sharing=None,
        parameters=parameters,
        single_path_parameters=100,
    )
    entry = Entry(
        card=card(architecture=plain_network, paths=Paths(single=None, ensemble=()), variants=("single", "ensemble")),
        model="golden",
        variant="ensemble",
        key="golden",
        style=Style(),
    )
    assert entry.passes == passes
    assert replace(entry, variant="single").passes == 1


def test_a_variant_that_failed_the_linter_is_marked_wherever_its_numbers_stand() -> None:
    page = shown(card(lint=GOLDEN.lint))
    single, ensemble = page.tables["Accuracy on cifar10"][2:4]
    assert single[1] == "single linter: 1 alarm (G2)"
    assert "80.00 % ‡" in single[2]
    assert "42.0 % ‡" in single[3]
    assert ensemble[1] == "ensemble not linted"
    assert "‡ The robustness linter raised an alarm" in page.text
    assert "golden · single‡" in page.text
    assert "‡" in markdown_table([card(lint=GOLDEN.lint)])
    assert "golden · single‡" in labels_of(card(lint=GOLDEN.lint))


def test_the_linter_s_findings_are_listed_with_code_figure_verdict_and_meaning() -> None:
    page = shown(card(lint=GOLDEN.lint))
    assert page.tables["Findings of the linter on golden · single‡"][1:] == [
        ["S1", "eps 0 equals clean", "ok", "0 of 100 images changed", "the attack or the evaluation is broken"],
        ["G2", "losses agree", "alarm", "cross-entropy leaves 1.00, margin 0.30", "saturated logits hide the gradient"],
    ]
    assert "Not linted: golden · ensemble, golden · gated." in page.text


def test_several_linted_variants_have_their_verdicts_side_by_side() -> None:
    other = Finding(code="R1", name="repeats", verdict="skipped", figure="", meaning="")
    lint = (*GOLDEN.lint, replace(GOLDEN.lint[0], variant="ensemble", findings=(GOLDEN.lint[0].findings[0], other)))
    page = shown(card(lint=lint))
    assert page.tables["Verdicts side by side"] == [
        ["Code", "Question", "golden · single‡", "golden · ensemble"],
        ["S1", "eps 0 equals clean", "ok", "ok"],
        ["G2", "losses agree", "alarm", "–"],
        ["R1", "repeats", "–", "skipped"],
    ]


def test_a_linter_that_could_ask_nothing_is_no_praise() -> None:
    nothing = Lint(variant="single", images=1, seed=0, findings=(), date="2026-11-21", command="")
    verdict = entries_of([card(lint=(nothing,))])[0].verdict
    assert (verdict.text, verdict.tone) == ("nothing applied", "unknown")


def test_a_number_whose_own_checks_failed_is_marked_and_the_check_is_named() -> None:
    failed = Check(name="a large eps reaches zero", held=False, detail="0.03 at 64/255")
    page = shown(card("golden", CLEAN, attacked(checks=(failed,))))
    assert "42.0 % †" in page.tables["Accuracy on cifar10"][2][3]
    assert page.tables["Checks that did not hold"][1:] == [
        ["golden · single", "white-box PGD, ε 8/255", "a large eps reaches zero", "0.03 at 64/255"]
    ]
    assert "† A check of this measurement did not hold" in page.text


def test_marks_that_do_not_occur_are_not_explained() -> None:
    ok = replace(GOLDEN.lint[0], findings=GOLDEN.lint[0].findings[:1])
    page = shown(card(variants=("single",), lint=(ok,)))
    assert not set("†‡") & set(page.text)
    assert "not linted" not in page.text
    assert "linter: no alarm" in page.text


def test_results_on_other_terms_say_so_beside_the_number() -> None:
    cards = [card("one"), card("two"), card("three", attacked(0.55, images=200, restarts=1))]
    page = shown(*cards)
    rows = page.tables["Accuracy on cifar10"]
    assert rows[0][2].endswith("1,000 images, seed 0, unless said otherwise")
    assert rows[-3][3].endswith(" 1 restart, 200 images")
    assert rows[2][3].endswith("39.0–45.0")
    assert "where they differ, compare with care" in page.text
    assert "three · single (1 restart, 200 images)" in labels_of(*cards)
    assert "1 restart, 200 images" in markdown_table(cards)


def test_the_same_attack_measured_twice_shows_both_numbers() -> None:
    page = shown(card("golden", CLEAN, attacked(0.42), attacked(0.4, images=200)))
    cell = page.tables["Accuracy on cifar10"][2][3]
    assert cell.startswith("42.0 % / 40.0 %")
    assert cell.endswith("usual terms / 200 images")


@pytest.mark.parametrize("change", [{"protocol": "blackbox"}, {"attack": "CW"}, {"norm": "l2"}])
def test_unlike_measurements_never_share_a_column_or_a_figure(change: dict[str, str]) -> None:
    page = shown(card("one"), card("two", CLEAN, attacked(**change)))
    columns = page.tables["Accuracy on cifar10"][1]
    assert columns.count("ε 8/255") == 2
    assert len(figures_of(card("one"), card("two", CLEAN, attacked(**change)))) == 2


def test_data_sets_have_tables_and_figures_of_their_own() -> None:
    cards = card("one"), card("two", dataset="mnist")
    page = shown(*cards)
    assert len(page.tables["Accuracy on cifar10"]) == len(page.tables["Accuracy on mnist"]) == 5
    assert len(figures_of(*cards)) == 2
    assert len(report_of(cards, title="").overview.exhibits) == 2


def test_many_attacks_are_split_into_tables_that_fit_a_page() -> None:
    results = [attacked(0.01 * index, attack=f"attack {index}") for index in range(12)]
    page = shown(card("golden", CLEAN, *results))
    first, second = page.tables["Accuracy on cifar10"], page.tables["Accuracy on cifar10, continued (2 of 2)"]
    assert len(first[2]) == 2 + 1 + 9 + 2
    assert len(second[2]) == 2 + 1 + 3
    assert len(second) == 2 + 1  # of the variants that were not attacked at all it says nothing more


def test_a_card_without_results_is_a_row_of_dashes(tmp_path: Path) -> None:
    new = replace(card("new"), results=(), variants=("single",))
    page = shown(replace(card("measured"), variants=("single",)), new)
    assert page.tables["Accuracy on cifar10"][3][2:4] == ["–", "–"]
    alone = write_report([new], tmp_path / "alone")
    assert section_titles(Page(alone.read_text(encoding="utf-8"))) == ["Every accuracy", "The models", "new · single"]
    assert not (tmp_path / "alone" / "figures").exists()


def test_a_section_without_data_is_left_out() -> None:
    plain = report_of([card()], title="")
    assert [section.key for section in plain.compared] == ["accuracies", "eps", "models"]
    whole = report_of([card("golden", attacked(tables=EVERY_TABLE), lint=GOLDEN.lint)], title="")
    keys = ["accuracies", "steps", "paths", "corruptions", "sources", "attacks", "lint", "models"]
    assert [section.key for section in whole.compared] == keys


def test_a_variant_has_all_that_is_known_of_it_in_one_place() -> None:
    report = report_of([card("golden", attacked(tables=EVERY_TABLE), lint=GOLDEN.lint)], title="")
    single, ensemble, gated = report.alone
    assert [exhibit.title.partition(":")[0] for exhibit in single.exhibits] == [
        "The linter",
        "Every result",
        "Attacks carried from one network to another",
        "Accuracy at every exit",
        "Accuracy at a mean cost",
        "Diversity",
        "How to repeat",
    ]
    assert [len(section.exhibits) for section in (ensemble, gated)] == [1, 1], "each is told to be unmeasured"


def test_what_was_not_measured_is_a_dash_and_never_a_zero() -> None:
    hole = matrix("transfer", ["a", "b"], ["a", "b"], [0.1, None], [math.nan, 0.2])
    page = shown(with_table("golden", hole))
    caption = "golden · single: white-box PGD, ε 8/255, on cifar10 (transfer)"
    assert page.tables[caption][1:] == [["a", "10.0 %", "–"], ["b", "–", "20.0 %"]]
    assert "nan" not in page.text.lower()


def test_tables_of_other_numbers_are_not_turned_into_per_cent() -> None:
    tables = (matrix("diversity", ["a"], ["b"], [0.5]), matrix("paths", ["011"], ["cost"], [1234.5]))
    page = shown(with_table("golden", *tables))
    cells = [row[1:] for caption, rows in page.tables.items() if "golden · single:" in caption for row in rows[1:]]
    assert cells == [["0.5"], ["1,234"]]
    assert not any(tag == "svg" for tag, _ in page.tags)


def test_long_paths_are_numbered_in_the_figure_and_named_beside_it() -> None:
    paths = ["01" * 10, "10" * 10]
    page = shown(with_table("golden", matrix("transfer", paths, paths, [0.1, 0.6], [0.7, 0.2])))
    table = next(rows for caption, rows in page.tables.items() if "(transfer)" in caption)
    assert [row[0] for row in table[1:]] == [f"1: {paths[0]}", f"2: {paths[1]}"]
    assert table[0][1:] == ["1", "2"]


def test_a_very_large_matrix_is_a_table_without_a_figure() -> None:
    names = [str(index) for index in range(65)]
    page = shown(with_table("golden", matrix("transfer", names, names, *[[0.5] * 65] * 65)))
    assert not any(tag == "svg" for tag, _ in page.tags)


def test_the_spread_of_paths_is_told_in_quartiles() -> None:
    shares = matrix("paths", list("abcde"), ["clean"], [0.5], [0.1], [0.3], [0.2], [0.4])
    page = shown(with_table("golden", shares))
    rows = page.tables["White-box PGD, ε 8/255, on cifar10: clean: quartiles over paths"]
    assert rows[1] == ["golden · single", "5", "10.0 %", "20.0 %", "30.0 %", "40.0 %", "50.0 %", "30.0 %"]


@pytest.mark.parametrize(
    ("note", "title"),
    [
        ("synthetic: corrupted by manygates, not CIFAR-10-C; mean", "Synthetic corruptions, on cifar10"),
        ("CIFAR-10-C, the official files; mean", "CIFAR-10-C, on cifar10"),
        ("", "Corruptions, on cifar10"),
    ],
)
def test_only_the_official_files_are_called_cifar_10_c(note: str, title: str) -> None:
    cells = matrix("corruptions", ["fog", "snow"], ["1", "2"], [0.75, 0.625], [0.5, None])
    result = replace(CLEAN, protocol="corruptions", attack="corruptions", images=1000, note=note, tables=(cells,))
    page = shown(card("golden", result))
    headings = [text for tag, text in page.headings if tag == "h4"]
    assert title in headings
    assert sum("CIFAR-10-C" in heading for heading in headings) == title.startswith("CIFAR")
    means = page.tables[f"{title}: mean over severities"]
    assert means == [["Model", "fog", "snow", "mean"], ["golden · single", "68.8 %", "50.0 %", "59.4 %"]]


def test_many_categories_go_down_the_page_and_few_go_across() -> None:
    names = [f"attack {index}" for index in range(9)]
    for count, header in ((9, ["Attack", "one · single", "two · single"]), (2, ["Model", *names[:2]])):
        one_row = matrix("attacks", ["alone"], names[:count], [0.1 * index for index in range(count)])
        page = shown(with_table("one", one_row), with_table("two", one_row))
        (table,) = [rows for caption, rows in page.tables.items() if caption == "White-box PGD, ε 8/255, on cifar10"]
        assert table[0] == header
        assert table[-1][-1] == ("80.0 %" if count == 9 else "10.0 %")


def test_official_and_synthetic_corruptions_are_never_compared() -> None:
    cells = matrix("corruptions", ["fog"], ["1"], [0.5])
    results = [
        replace(CLEAN, protocol="corruptions", attack="corruptions", note=note, tables=(cells,))
        for note in ("synthetic", "CIFAR-10-C, the official files")
    ]
    page = shown(card("one", results[0]), card("two", results[1]))
    assert sum(tag == "svg" for tag, _ in page.tags) == 2
    assert [cell.split(" 10,000")[0] for cell in page.tables["Accuracy on cifar10"][0][1:3]] == [
        "CIFAR-10-C",
        "synthetic corruptions",
    ]


def test_budgets_are_drawn_in_order_of_cost_and_what_does_not_fit_stays_a_table() -> None:
    budgets = EVERY_TABLE[-2]
    assert budgets.name == "budgeted"

    def exhibit(table: Table) -> Exhibit:
        return report_of([with_table("golden", table)], title="").alone[0].exhibits[1]

    drawn = exhibit(replace(budgets, values=budgets.values[::-1]))
    assert drawn.picture is not None
    assert isinstance(drawn.picture.drawing, Lines)
    assert [(line.label, line.at, line.values) for line in drawn.picture.drawing.series] == [
        ("clean", (9.3, 20.1), (0.7, 0.8)),
        ("attack", (11.0, 20.8), (0.4, 0.5)),
    ]
    for odd in (
        replace(budgets, columns=("cost", *budgets.columns[1:])),
        replace(budgets, values=((9.3, 1.7, 11.0, 0.4), budgets.values[1])),
        replace(budgets, values=((None, 0.7, 11.0, 0.4), budgets.values[1])),
    ):
        table = exhibit(odd)
        assert table.picture is None
        assert len(table.grids[0].rows) == 2


def test_every_command_is_there_to_repeat_and_once_per_variant() -> None:
    commands = ["manygates evaluate golden --protocol whitebox --eps 1/100 8/255", "manygates evaluate --seed 1"]
    results = [
        attacked(0.5, eps=0.01, eps_fraction="1/100", command=commands[0]),
        attacked(command=commands[0]),
        attacked(0.4, seed=1, command=commands[1]),
    ]
    golden = card("golden", *results, lint=GOLDEN.lint)
    page, markdown = shown(golden), markdown_of(report_of([golden], title=""))
    for command in (*commands, GOLDEN.lint[0].command):
        assert page.text.count(command) == 1
        assert markdown.count(f"    {command}\n") == 1


HOSTILE = '<script>alert("1")</script>|`*_[x](javascript:1)\n# $\\frac{1}$ &amp; \u202e\x00\ud800 中文 --> ]]>'


def test_hostile_text_stays_text_in_every_place(tmp_path: Path) -> None:
    tables = [
        matrix(name, [HOSTILE, "b"], [HOSTILE, "c"], [0.1, 0.2], [0.3, 0.4])
        for name in ("steps", "transfer", "paths", "corruptions", "sources", "attacks", "exits", "budgeted", HOSTILE)
    ]
    finding = Finding(code=HOSTILE, name=HOSTILE, verdict="alarm", figure=HOSTILE, meaning=HOSTILE)
    result = attacked(
        protocol=HOSTILE,
        attack=HOSTILE,
        note=HOSTILE,
        command=HOSTILE,
        tables=tables,
        checks=(Check(name=HOSTILE, held=False, detail=HOSTILE),),
    )
    hostile = card(
        "golden",
        replace(CLEAN, variant=HOSTILE),
        result,
        replace(result, variant=HOSTILE),
        description=HOSTILE,
        method=HOSTILE,
        dataset=HOSTILE,
        license=HOSTILE,
        lint=(replace(GOLDEN.lint[0], findings=(finding,), command=HOSTILE),),
        training=replace(GOLDEN.training, summary=HOSTILE, commit=HOSTILE),
    )
    page_file = write_report([hostile], tmp_path / "report", title=HOSTILE)
    text = page_file.read_text(encoding="utf-8")
    page = Page(text)
    assert not page.open
    assert not {tag for tag, _ in page.tags} & {"script", "img", "a:script"}
    assert "<script" not in text
    assert not set("\x00\u202e") & set(text)
    assert '<script>alert("1")</script>' in page.text
    for markdown in ((page_file.parent / "report.md").read_text(encoding="utf-8"), markdown_table([hostile])):
        outside_code = "\n".join(line for line in markdown.splitlines() if not line.startswith("    "))
        assert "<script" not in outside_code
        assert "[x](" not in outside_code
        tables_lines = [line for line in markdown.splitlines() if line.startswith("|")]
        widths = {line.replace("\\|", "").count("|") for line in tables_lines}
        assert len(tables_lines) > 2
        assert all(line.endswith("|") for line in tables_lines), widths
    for file in (page_file.parent / "figures").glob("*.svg"):
        ElementTree.parse(file)


def test_the_rows_of_a_markdown_table_have_as_many_cells_as_its_header(written: Path) -> None:
    for block in (written / "report.md").read_text(encoding="utf-8").split("\n\n"):
        if block.startswith("|"):
            assert len({line.count("|") for line in block.splitlines()}) == 1


def test_the_same_cards_give_the_same_bytes(written: Path, tmp_path: Path) -> None:
    write_report([with_table("one", *EVERY_TABLE), with_table("two", *EVERY_TABLE)], tmp_path / "again")
    files = sorted(file.relative_to(written) for file in written.rglob("*") if file.is_file())
    assert len(files) > 10
    for file in files:
        assert (written / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


def test_an_older_report_is_replaced_as_a_whole(written: Path, tmp_path: Path) -> None:
    shutil.copytree(written, tmp_path / "report")
    write_report([card("new")], tmp_path / "report")
    assert "two" not in (tmp_path / "report" / "report.md").read_text(encoding="utf-8")
    assert len(list((tmp_path / "report" / "figures").iterdir())) == 4
    assert [entry.name for entry in tmp_path.iterdir()] == ["report"]


@pytest.mark.parametrize("stranger", ["notes.txt", "figures/mine.png", "figures/deeper/eps.svg", ".git/config"])
def test_a_folder_that_holds_strangers_is_left_alone(stranger: str, written: Path, tmp_path: Path) -> None:
    folder = tmp_path / "report"
    shutil.copytree(written, folder)
    (folder / stranger).parent.mkdir(parents=True, exist_ok=True)
    (folder / stranger).write_text("precious")
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    with pytest.raises(BadInput, match="would be lost"):
        write_report([card("other")], folder)
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


def test_a_page_that_is_no_report_is_a_stranger_too(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("<p>mine</p>")
    with pytest.raises(BadInput, match="holds no report"):
        check_report_target(tmp_path)
    with pytest.raises(BadInput, match="is a file"):
        check_report_target(tmp_path / "report.html")
    (tmp_path / "empty").mkdir()
    check_report_target(tmp_path / "empty")
    check_report_target(tmp_path / "new")


def test_a_report_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no cards"):
        write_report([], tmp_path / "report")
    with pytest.raises(BadInput, match="no cards"):
        markdown_table([])
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_without_the_extra_the_old_report_stays(
    package: str, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(written, tmp_path / "report")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BadInput, match=package):
        write_report([replace(card("other"), results=())] if package == "jinja2" else [card()], tmp_path / "report")
    assert (tmp_path / "report" / "report.html").read_bytes() == (written / "report.html").read_bytes()


def test_a_card_given_twice_counts_once_and_another_of_its_name_is_numbered() -> None:
    names = [entry.model for entry in entries_of([card(), card(), card("golden", attacked(0.1))])]
    assert names == ["golden"] * 3 + ["golden (2)"] * 3
    assert report_of([card(), card()], title="").subtitle.startswith("1 model, 3 variants, 2 results")


def test_a_readme_s_table_has_one_row_per_variant_and_the_terms_below() -> None:
    results = [CLEAN, attacked(), attacked(0.6, protocol="blackbox", attack="transfer")]
    ensemble = replace(CLEAN, variant="ensemble")
    written = markdown_table([card("golden", *results, ensemble, variants=("single", "ensemble"), lint=GOLDEN.lint)])
    lines = written.splitlines()
    assert lines[:2] == [
        "| Model | Variant | passes | clean | white-box, ε 8/255 | transfer, ε 8/255 | linter |",
        "|---|---|---:|---:|---:|---:|---|",
    ]
    ensemble_row, single_row = lines[2:4]
    assert "80.00 %" in ensemble_row
    assert ensemble_row.endswith("| – | – | not linted |")
    for number in ("80.00 % ‡", "42.0 % ‡", "60.0 % ‡", "1 alarm (G2)"):
        assert number in single_row
    assert "white-box: 50 steps of 0.002, 5 restarts, 1,000 images, seed 0" in written


def test_reading_and_tabulating_cards_loads_neither_torch_nor_matplotlib() -> None:
    unneeded = {"torch", "matplotlib", "jinja2", "huggingface_hub"}
    code = f"import sys, zoo.report.markdown, zoo.report.write; sys.exit(bool({unneeded} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def contrast(one: str, other: str) -> float:
    """Return the contrast ratio of two colours (WCAG 2.2)."""
    luminance = []
    for colour in (one, other):
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        luminance.append(0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2])
    low, high = sorted(luminance)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [LIGHT, DARK, PRINT], ids=["light", "dark", "print"])
def test_text_and_lines_stand_out_from_the_page(scheme: dict[str, str]) -> None:
    for name in ("ink", "muted", "link", "good", "alarm", "unknown"):
        assert contrast(scheme[name], scheme["page"]) >= 4.5, name
    for index in range(len(SERIES)):
        assert contrast(scheme[f"series-{index}"], scheme["page"]) >= 3, index
    assert contrast(scheme["ink"], scheme["panel"]) >= 4.5


def test_the_page_s_light_scheme_has_the_colours_of_the_files() -> None:
    assert (LIGHT["ink"], LIGHT["muted"], LIGHT["page"]) == (INK, MUTED, PAGE)
    assert {f"var(--{name})": colour for name, colour in LIGHT.items()}.items() >= {
        variable: colour for colour, variable in VARIABLES.items()
    }.items()
    assert set(DARK) == set(LIGHT) == set(PRINT)


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM.exists(), reason=f"no {CHROMIUM}; `apt-get install chromium` on Debian")
def test_a_browser_shows_the_page_at_any_width_and_in_both_schemes(written: Path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    complaints: list[str] = []
    seen = {}
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        for width, scheme in itertools.product((1280, 400), ("light", "dark")):
            page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
            page.on("console", lambda message: complaints.append(message.text))
            page.on("request", lambda request: complaints.append(request.url) if "http" in request.url[:5] else None)
            page.goto((written / "report.html").as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.evaluate("document.documentElement.scrollHeight") < 3000
            folds = page.locator("main > section > details")
            assert page.locator("details[open]").count() == 0
            page.click(".claims a >> nth=0")
            assert page.locator("details[open] > .unfolded:target").count() == 1
            assert folds.count() > 5
            page.evaluate("document.querySelectorAll('details').forEach(details => { details.open = true })")
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            sizes = page.evaluate("[...document.querySelectorAll('figure svg')].map(svg => svg.clientWidth)")
            assert all(300 < size <= width for size in sizes)
            seen[scheme] = page.evaluate("getComputedStyle(document.querySelector('figure svg text')).fill")
        browser.close()
    assert not complaints
    assert seen["light"] != seen["dark"]
