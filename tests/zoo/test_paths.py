from __future__ import annotations

import itertools
import random

import pytest

from zoo import paths
from zoo.errors import BadPath


@pytest.mark.parametrize(
    ("path", "candidates", "text"),
    [((0, 1, 1, 0), 2, "0110"), ((9, 0), 10, "90"), ((0, 11, 3), 12, "0,11,3"), ((4, 2, 0), 12, "420"), ((3,), 4, "3")],
)
def test_a_path_survives_being_written_and_read(path: paths.Path, candidates: int, text: str) -> None:
    assert paths.format_path(path) == text
    assert paths.parse(text, len(path), candidates) == path


def test_random_paths_survive_being_written_and_read() -> None:
    rng = random.Random(0)
    for candidates in (1, 2, 3, 10, 11, 200):
        for num_gates in (2, 19):
            path = paths.sample(num_gates, candidates, rng)
            assert paths.parse(paths.format_path(path), num_gates, candidates) == path


@pytest.mark.parametrize("text", ["", " ", "01a0", "-1", "0.1", "0,,1", "0,x", "²³", "٣٣"])
def test_text_that_is_not_a_row_of_gates_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(BadPath, match="0110"):
        paths.parse(text, 2, 2)


def test_a_path_of_the_wrong_length_is_refused_with_both_lengths() -> None:
    with pytest.raises(BadPath, match=r"'011' has 3 gates, expected 4"):
        paths.check((0, 1, 1), 4, 2)


@pytest.mark.parametrize("gate", [-1, 2, 7])
def test_a_gate_without_a_candidate_is_refused_with_its_position(gate: int) -> None:
    with pytest.raises(BadPath, match=rf"gate {gate} at position 1 .*expected 0 to 1"):
        paths.check((0, gate, 0), 3, 2)


def test_sampling_is_repeatable_and_reaches_every_path() -> None:
    draws = [paths.sample(4, 3, rng) for rng in [random.Random(1)] for _ in range(1500)]
    again = [paths.sample(4, 3, rng) for rng in [random.Random(1)] for _ in range(1500)]
    assert draws == again
    assert set(draws) == set(itertools.product(range(3), repeat=4))


def test_every_gate_is_uniform() -> None:
    rng = random.Random(2)
    draws = [paths.sample(5, 2, rng) for _ in range(4000)]
    for position in range(5):
        assert abs(sum(draw[position] for draw in draws) / len(draws) - 0.5) < 0.04  # five standard deviations


@pytest.mark.parametrize("candidates", [2, 3])
@pytest.mark.parametrize("within", range(1, 20))
def test_distinct_paths_differ_within_the_first_gates(within: int, candidates: int) -> None:
    for seed in range(5):
        num_paths = min(5, candidates**within)
        drawn = paths.sample_distinct(num_paths, 19, candidates, random.Random(seed), within=within)
        assert len({path[:within] for path in drawn}) == len(drawn) == num_paths
        assert all(paths.check(path, 19, candidates) == path for path in drawn)


def test_as_many_distinct_paths_as_prefixes_exhaust_them() -> None:
    drawn = paths.sample_distinct(8, 5, 2, random.Random(0), within=3)
    assert {path[:3] for path in drawn} == set(itertools.product((0, 1), repeat=3))


def test_the_gates_behind_a_distinct_prefix_stay_free() -> None:
    rng = random.Random(0)
    behind = {path[1:] for _ in range(200) for path in paths.sample_distinct(2, 4, 2, rng, within=1)}
    assert len(behind) == 8


def test_more_distinct_paths_than_prefixes_are_refused_with_their_number() -> None:
    with pytest.raises(BadPath, match="only 2 prefixes"):
        paths.sample_distinct(3, 19, 2, random.Random(0), within=1)


@pytest.mark.parametrize("within", [0, 6, -1])
def test_a_prefix_that_is_no_prefix_is_refused(within: int) -> None:
    with pytest.raises(BadPath, match="expected 1 to 5"):
        paths.sample_distinct(1, 5, 2, random.Random(0), within=within)
