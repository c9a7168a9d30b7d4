"""Races and scores together: made answers go through the real judgement, race and search, and all items decide."""

import runpy

import pytest

from checkout import BENCHMARKS

PROGRAM = runpy.run_path(str(BENCHMARKS / "race_worlds.py"))


@pytest.mark.parametrize(
    ("world", "races", "most"),
    [
        ("made pair", 3, 0),  # one candidate falls far below chance on one of two tasks
        ("two tasks", 12, 1),
        ("margin, t2, one to go", 6, 0),
        ("margin, contaminated, small tasks", 6, 0),
    ],
)
def test_a_race_ends_with_those_that_all_items_choose(world, races, most):
    wrong, spent = PROGRAM["races"](PROGRAM["WORLDS"][world], range(races))
    assert wrong <= most  # the aim is 5 % of races
    assert 0.02 < spent <= 1.0


def test_the_worst_task_is_never_raced():
    assert PROGRAM["races"](PROGRAM["WORLDS"]["worst task"], range(1)) == (0, 1.0)
