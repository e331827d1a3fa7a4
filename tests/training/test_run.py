from __future__ import annotations

import json
from pathlib import Path

import pytest

from training.recipes import recipe, resolved
from training.run import load_run, log
from zoo.bundle.card import Table
from zoo.errors import BadInput, CheckpointError


def test_the_log_of_a_run_has_a_row_per_epoch_and_gaps_where_nothing_was_validated(tmp_path: Path) -> None:
    assert log(tmp_path) == ()
    header = "epoch,objective,steps,loss,accuracy,held_out_clean,seconds"
    (tmp_path / "log.csv").write_text(f"{header}\n1,standard,382,0.2500001234,,,66.5\n2,trades,764,0.125,,0.875,4000\n")
    assert log(tmp_path) == (
        Table(
            name="log",
            row_axis="epoch",
            column_axis="",
            rows=("1 standard", "2 trades"),
            columns=("steps", "loss", "held_out_clean", "seconds"),
            values=((382.0, 0.25, None, 66.5), (764.0, 0.125, 0.875, 4000.0)),
        ),
    )


@pytest.mark.parametrize("text", ["epoch,loss\n1,0.5\n", "epoch,objective,loss\n1,standard,little\n"])
def test_a_log_that_no_run_wrote_is_refused_by_name(text: str, tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text(text)
    with pytest.raises(CheckpointError, match=r"log\.csv is not what a run writes"):
        log(tmp_path)


def test_a_folder_that_is_no_run_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is not a training run: it holds no recipe.json"):
        load_run(tmp_path)
    (tmp_path / "recipe.json").write_text(json.dumps(resolved(recipe("smoke"))))
    with pytest.raises(CheckpointError, match=r"has no best.safetensors yet"):
        load_run(tmp_path, which="best")
    with pytest.raises(BadInput, match="which must be 'last' or 'best', got 'first'"):
        load_run(tmp_path, which="first")
