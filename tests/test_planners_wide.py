"""Beam, evolution and blocks against brute force on small tables, under the same constraints."""

import itertools
import random

import pytest
from table_judge import TableJudge, others

from layerprune.errors import RefusedError, UsageError
from layerprune.planners import SEARCHES, Constraints, greedy, one_shot
from layerprune.planners.beam import Beam
from layerprune.planners.blocks import Blocks
from layerprune.planners.cascade import Cascade
from layerprune.planners.evolution import Evolution
from layerprune.specs import build, spec_of

ALL = [Beam(), Evolution(generations=10), Blocks()]
NAMES = [type(search).__name__ for search in ALL]


def optimum(judge, depth, drop, banned=()):
    options = itertools.combinations([layer for layer in range(depth) if layer not in banned], drop)
    return min(options, key=lambda units: (judge.value(units), units))


@pytest.mark.parametrize("seed", range(8))
def test_a_beam_of_one_is_greedy(seed):
    ours, theirs = (search(TableJudge(seed), Constraints(7), 4) for search in (Beam(width=1), greedy))
    assert ours.order == theirs.order
    assert ours.rounds == theirs.rounds
    assert ours.ranking == theirs.ranking


@pytest.mark.parametrize("seed", range(8))
def test_a_beam_as_wide_as_the_table_finds_the_optimum(seed):
    judge = TableJudge(seed)
    found = Beam(width=35)(judge, Constraints(7, protect=frozenset({2})), 3)
    assert found.removal.units == optimum(judge, 7, 3, banned={2})
    assert set(found.order) == set(found.removal.units)
    asked = [units for batch in judge.asked for units in batch]
    assert len(asked) == len(set(asked))  # two ways to the same removal are judged once
    assert all(step.candidates for step in found.rounds)  # a path that leads nowhere new is no round


def test_a_wider_beam_escapes_what_traps_greedy():
    table = {(0,): 0.1, (1,): 0.2, (2,): 0.3, (0, 1): 1.0, (0, 2): 1.0, (1, 2): 0.4}
    judge = TableJudge(score=table.__getitem__)
    assert greedy(judge, Constraints(3), 2).cost.score == 1.0
    assert Beam(width=2)(judge, Constraints(3), 2).removal.units == (1, 2)


@pytest.mark.parametrize("seed", range(8))
def test_evolution_finds_the_optimum_of_a_small_table(seed):
    judge = TableJudge(seed)
    found = Evolution(generations=30)(judge, Constraints(8, must_keep=frozenset({0})), 3, seed=seed)
    assert found.removal.units == optimum(judge, 8, 3, banned={0})
    assert found.cost.score == judge.value(found.removal.units)
    asked = [units for batch in judge.asked for units in batch]
    assert len(asked) == len(set(asked))


def test_evolution_spends_what_it_was_given_and_never_gets_worse():
    judge, best = TableJudge(1), []
    search = Evolution(generations=5, offspring=4)
    search(judge, Constraints(16), 6, watch=lambda removal, candidate: best.append(candidate.score))
    assert sum(map(len, judge.asked)) <= 5 * 4
    assert len(best) == 5
    assert best == sorted(best, reverse=True)


@pytest.mark.parametrize("seed", range(5))
def test_blocks_finds_the_best_run(seed):
    judge = TableJudge(seed)
    found = Blocks()(judge, Constraints(9, protect=frozenset({8})), 3)
    runs = [tuple(range(start, start + 3)) for start in range(6)]
    assert found.removal.units == min(runs, key=judge.value)
    assert judge.asked == [runs]


def test_blocks_of_half_layers_run_from_half_to_half():
    units = tuple(step / 2 if step % 2 else step // 2 for step in range(9))
    judge = TableJudge()
    Blocks()(judge, Constraints(5, units=units), 2)
    assert (0.5, 1.5) in judge.asked[0]
    assert (0, 1) in judge.asked[0]


def test_a_run_that_is_interrupted_everywhere_is_refused():
    with pytest.raises(RefusedError, match="no 3 neighbouring layers may go together: layers that have to stay"):
        Blocks()(TableJudge(), Constraints(8, protect=frozenset({2, 5})), 3)


@pytest.mark.parametrize("search", ALL, ids=NAMES)
@pytest.mark.parametrize("seed", range(5))
def test_the_same_seed_gives_the_same_answer_and_the_constraints_hold(search, seed):
    def keep_one(removal):
        if {5, 6, 7} <= set(removal.units):
            raise RefusedError("one full-attention layer must stay")

    constraints = Constraints(10, protect=frozenset({9}), together=(frozenset({1, 2}),), check=keep_one)
    first, second = (search(TableJudge(seed), constraints, 4, seed=seed) for _ in range(2))
    assert first == second
    removed = set(first.removal.units)
    assert len(removed) == 4
    assert 9 not in removed
    assert len(removed & {1, 2}) in (0, 2)
    assert not {5, 6, 7} <= removed


def test_another_seed_draws_other_removals():
    first, second = TableJudge(), TableJudge()
    Evolution(generations=1)(first, Constraints(20), 5, seed=0)
    Evolution(generations=1)(second, Constraints(20), 5, seed=1)
    assert first.asked != second.asked


@pytest.mark.parametrize("search", [Beam(), Evolution()])
def test_constraints_that_nothing_satisfies_are_refused(search):
    def never(removal):
        if len(removal) > 1:
            raise RefusedError("two layers may not go")

    with pytest.raises(RefusedError):
        search(TableJudge(), Constraints(5, check=never), 2)


@pytest.mark.parametrize("search", ALL, ids=NAMES)
def test_an_impossible_count_is_refused_before_the_judge_is_asked(search):
    judge = TableJudge()
    with pytest.raises(UsageError):
        search(judge, Constraints(5), 5)
    assert judge.asked == []


def test_searches_are_known_by_name_and_take_options():
    assert set(SEARCHES.entries()) == {"one-shot", "greedy", "beam", "evolution", "blocks", "cascade", "exchange"}
    _, search = build(SEARCHES, "beam:width=8")
    assert search == Beam(8)
    assert spec_of("beam", search) == "beam:width=8"
    for spec in ("beam:width=0", "evolution:generations=0", "evolution:offspring=-1"):
        with pytest.raises(UsageError, match="must be at least 1"):
            build(SEARCHES, spec)


@pytest.mark.parametrize("seed", range(6))
def test_a_cascade_that_keeps_everything_is_greedy(seed):
    search = Cascade(keep=7).bind(others(TableJudge(seed + 100)))
    ours, theirs = (each(TableJudge(seed), Constraints(7), 4) for each in (search, greedy))
    assert ours == theirs


def test_a_cascade_of_one_is_what_the_cheap_metric_would_remove():
    cheap, judge = TableJudge(5), TableJudge(6)
    found = Cascade(keep=1).bind(others(cheap))(judge, Constraints(8, protect=frozenset({3})), 3)
    assert found.order == one_shot(TableJudge(5), Constraints(8, protect=frozenset({3})), 3).order
    assert [len(batch) for batch in judge.asked] == [1, 1, 1]
    assert len(cheap.asked) == 1


def test_a_cascade_asks_the_judge_about_the_proposed_only_and_takes_its_word():
    cheap = TableJudge(score=lambda units: float(units[0]))  # proposes 0, 1, 2 ...
    judge = TableJudge(score=lambda units: -float(sum(units)))  # prefers the last
    found = Cascade(keep=3).bind(others(cheap))(judge, Constraints(9), 2)
    assert judge.asked == [[(0,), (1,), (2,)], [(0, 2), (1, 2), (2, 3)]]
    assert found.order == (2, 3)
    assert found.cost.score == -5.0


def test_a_cascade_of_two_cheap_metrics_is_refused():
    with pytest.raises(UsageError, match="by names one metric, got 'cosine\\+angular'"):
        build(SEARCHES, "cascade:by=cosine+angular")


def test_a_cascade_without_its_cheap_metric_is_refused():
    with pytest.raises(UsageError, match="the search 'cascade' asks cosine for proposals: plan from the model"):
        Cascade()(TableJudge(), Constraints(5), 2)


def test_evolution_beats_chance_where_the_table_is_too_large_to_list():
    weights = [random.Random(layer).random() for layer in range(30)]
    judge = TableJudge(score=lambda units: sum(weights[unit] for unit in units))
    found = Evolution(generations=60)(judge, Constraints(30), 8, seed=3)
    best = sum(sorted(weights)[:8])
    assert found.cost.score <= 1.1 * best  # the mean of a random removal is 8 * 0.5
