"""Blocks against brute force on small tables, and the names of the searches."""

import pytest

from layerprune.errors import RefusedError, RegistryError, UsageError
from layerprune.registry import build, spec_of
from layerprune.search import SEARCHES, Constraints, Greedy
from layerprune.search.searches import Blocks
from table_judge import TableJudge


@pytest.mark.parametrize("seed", range(5))
def test_blocks_finds_the_best_run(seed):
    judge = TableJudge(seed)
    found = Blocks().find(judge, Constraints(9, protect=frozenset({8})), 3)
    runs = [tuple(range(start, start + 3)) for start in range(6)]
    assert found.removal.layers == min(runs, key=judge.value)
    assert judge.asked == [runs]


def test_a_run_that_is_interrupted_everywhere_is_refused():
    with pytest.raises(RefusedError, match="no 3 neighbouring layers may go together: layers that have to stay"):
        Blocks().find(TableJudge(), Constraints(8, protect=frozenset({2, 5})), 3)


@pytest.mark.parametrize("seed", range(5))
def test_the_same_judge_gives_the_same_answer_and_the_constraints_hold(seed):
    def keep_one(removal):
        if {5, 6, 7} <= set(removal.layers):
            raise RefusedError("one full-attention layer must stay")

    constraints = Constraints(10, protect=frozenset({9}), together=(frozenset({1, 2}),), check=keep_one)
    first, second = (Blocks().find(TableJudge(seed), constraints, 4) for _ in range(2))
    assert first == second
    removed = set(first.removal.layers)
    assert len(removed) == 4
    assert 9 not in removed
    assert len(removed & {1, 2}) in (0, 2)
    assert not {5, 6, 7} <= removed


def test_an_impossible_count_is_refused_before_the_judge_is_asked():
    judge = TableJudge()
    with pytest.raises(UsageError):
        Blocks().find(judge, Constraints(5), 5)
    assert judge.asked == []


def test_searches_are_known_by_name_and_take_options():
    assert set(SEARCHES.entries()) == {"one-shot", "greedy", "blocks", "exchange"}
    _, search = build(SEARCHES, "greedy:lazy=true")
    assert search == Greedy(lazy=True)
    assert spec_of("greedy", search) == "greedy:lazy=true"
    with pytest.raises(UsageError, match="most is -1 and has to be from 0 to"):
        build(SEARCHES, "exchange:most=-1")
    with pytest.raises(RegistryError, match=r"unknown search 'beam'.* Known: blocks, exchange, greedy, one-shot"):
        build(SEARCHES, "beam:width=8")
