"""The table of methods is drawn from the registry, and the page that shows it is what it draws."""

from __future__ import annotations

from pathlib import Path

import pytest

from training.methods import markdown_table, methods
from training.objectives import OBJECTIVES
from training.recipes import RECIPES

PAGE = Path(__file__).parents[2] / "docs/methods/README.md"


def test_every_method_is_a_row_with_a_recipe_at_each_scale() -> None:
    rows = {row.name: row for row in methods()}
    assert rows.keys() == OBJECTIVES.keys()
    for row in rows.values():
        assert any(name.endswith("-cpu") for name in row.recipes), f"{row.name} has no recipe for two cores"
        assert any(not name.endswith("-cpu") for name in row.recipes), (
            f"{row.name} has no recipe at its published scale"
        )


def test_every_recipe_stands_in_exactly_one_row() -> None:
    assert sorted(name for row in methods() for name in row.recipes) == sorted(RECIPES)


def test_the_page_of_methods_holds_the_generated_table() -> None:
    assert markdown_table(methods()) in PAGE.read_text(encoding="utf-8"), "paste what `manygates methods` prints"


def test_costs_are_relative_to_a_standard_step() -> None:
    rows = {row.name: row for row in methods()}
    assert (rows["standard"].forwards, rows["standard"].relative) == (3, 1)
    assert rows["adp"].relative == pytest.approx(3)
    assert all(row.forwards >= 3 for row in rows.values())


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_command_hardware_and_result_or_that_it_was_not_run(name: str) -> None:
    said = RECIPES[name].__doc__ or ""
    assert f"manygates train {name} --out RUN" in said
    assert "not run" in said or "measured" in said or "came out" in said
