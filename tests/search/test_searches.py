"""One-shot and greedy against brute force on small tables, and the constraints every search obeys."""

import itertools
import random

import pytest

from layerprune.artifacts import Candidate, Round
from layerprune.errors import RefusedError, UsageError
from layerprune.removal import Removal
from layerprune.search import Constraints, Greedy, OneShot, table_judge
from table_judge import TableJudge


def greedy_by_hand(judge, depth, drop, banned=frozenset()):
    removed = ()
    for _ in range(drop):
        options = [tuple(sorted((*removed, layer))) for layer in range(depth) if layer not in banned | set(removed)]
        removed = min(options, key=lambda units: (judge.value(units), units))
    return removed


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("drop", [1, 3, 5])
def test_greedy_equals_the_obvious_loop(seed, drop):
    judge = TableJudge(seed)
    found = Greedy().find(judge, Constraints(7, protect=frozenset({2})), drop)
    assert found.removal.layers == greedy_by_hand(judge, 7, drop, frozenset({2}))
    assert [len(round_.removed) for round_ in found.rounds] == list(range(drop))
    assert found.cost.score == judge.value(found.removal.layers)


@pytest.mark.parametrize("seed", range(8))
def test_greedy_finds_the_optimum_where_harm_adds_up(seed):
    weights = [random.Random(f"{seed}-{layer}").random() for layer in range(7)]
    judge = TableJudge(score=lambda units: sum(weights[unit] for unit in units))
    best = min(itertools.combinations(range(7), 3), key=judge.value)
    assert Greedy().find(judge, Constraints(7), 3).removal.layers == best
    assert OneShot().find(judge, Constraints(7), 3).removal.layers == best


def test_greedy_asks_again_after_each_removal_and_one_shot_does_not():
    # layers 0 and 1 stand in for one another: either may go, both may not
    judge = TableJudge(score=lambda units: 9.0 if {0, 1} <= set(units) else 0.1 * sum(units))
    assert OneShot().find(judge, Constraints(4), 2).removal.layers == (0, 1)
    assert len(judge.asked) == 1
    assert Greedy().find(judge, Constraints(4), 2).removal.layers == (0, 2)
    assert judge.asked[1:] == [[(0,), (1,), (2,), (3,)], [(0, 1), (0, 2), (0, 3)]]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("drop", [2, 5])
def test_lazy_greedy_equals_greedy_where_harm_never_falls_and_asks_less(seed, drop):
    weights = [random.Random(f"{seed}-{layer}").random() for layer in range(24)]

    def score(units):  # each pair of neighbours that both go costs extra: removing more makes the rest dearer
        pairs = sum(1 for a, b in itertools.pairwise(sorted(units)) if b == a + 1)
        return sum(weights[unit] for unit in units) + 0.3 * pairs

    eager, lazy = TableJudge(score=score), TableJudge(score=score)
    expected = Greedy().find(eager, Constraints(24), drop)
    found = Greedy(lazy=True).find(lazy, Constraints(24), drop)
    assert found.order == expected.order
    assert found.cost == expected.cost
    assert found.ranking == expected.ranking
    assert sum(map(len, lazy.asked)) < sum(map(len, eager.asked)) / (1.5 if drop == 2 else 2)


def test_lazy_greedy_goes_on_to_a_layer_whose_promise_is_beaten_by_nobody():
    # after 0 has gone, 1 to 4 are dear and 5, which promised more than they did, is the best
    def score(units):
        return sum(0.1 * (unit + 1) for unit in units) + (9.0 if 0 in units and set(units) & {1, 2, 3, 4} else 0.0)

    assert Greedy(lazy=True).find(TableJudge(score=score), Constraints(8), 2).order == (0, 5)


def test_a_candidate_that_a_race_let_in_comes_first_and_one_it_put_out_last():
    def judge(removals):
        places = {0: {}, 1: {"stopped": True, "accepted": True}, 2: {"stopped": True}}
        scores = {0: 0.1, 1: 0.2, 2: 0.0}
        return [Candidate(removal=(layer,), score=scores[layer], **places[layer]) for (layer,) in removals]

    assert OneShot().find(judge, Constraints(3), 2).order == (1, 0)


def test_equal_scores_are_ordered_by_tie_break_then_by_layer():
    ties = {0: 0.5, 1: 0.2, 2: 0.2, 3: 0.9}

    def judge(removals):
        return [Candidate(removal=r.layers, score=1.0, tie_break=ties[r.layers[-1]]) for r in removals]

    found = OneShot().find(judge, Constraints(4), 3)
    assert found.order == (1, 2, 0)
    assert [entry.unit for entry in found.ranking] == [1, 2, 0, 3]
    assert Greedy().find(judge, Constraints(4), 1).order == (1,)


def test_one_shot_knows_the_price_of_one_removal_but_not_of_several():
    assert OneShot().find(TableJudge(), Constraints(4), 1).cost is not None
    assert OneShot().find(TableJudge(), Constraints(4), 2).cost is None


@pytest.mark.parametrize("search", [OneShot(), Greedy()])
def test_layers_that_go_together_are_removed_together_or_not_at_all(search):
    groups = (frozenset({0, 1}), frozenset({2, 3}))
    for seed in range(20):
        constraints = Constraints(7, together=groups, protect=frozenset({3}))
        removed = set(search.find(TableJudge(seed), constraints, 3).removal.layers)
        assert len(removed) == 3
        assert not removed & {2, 3}  # half of the group is protected, so the whole of it stays
        assert len(removed & {0, 1}) in (0, 2)


def test_groups_are_compared_per_layer():
    scores = {(0, 1): 0.3, (2,): 0.2, (3,): 0.25}
    found = OneShot().find(TableJudge(score=scores.__getitem__), Constraints(4, together=(frozenset({0, 1}),)), 2)
    assert found.order == (0, 1)


@pytest.mark.parametrize("search", [OneShot(), Greedy()])
def test_a_choice_that_could_not_be_completed_is_not_made(search):
    # layer 4 is the cheapest, but after it the pairs cannot add up to 4
    pairs = (frozenset({0, 1}), frozenset({2, 3}))
    judge = TableJudge(score=lambda units: 0.0 if units == (4,) else 1.0 * len(units))
    assert search.find(judge, Constraints(5, together=pairs), 4).removal.layers == (0, 1, 2, 3)


def test_a_count_that_groups_cannot_add_up_to_is_refused_with_counts_that_work():
    periods = tuple(frozenset(range(start, start + 4)) for start in range(0, 16, 4))
    with pytest.raises(UsageError, match="possible nearby: 4 or 8"):
        Greedy().find(TableJudge(), Constraints(16, together=periods), 6)


@pytest.mark.parametrize("search", [OneShot(), Greedy()])
def test_what_the_architecture_refuses_is_passed_over(search):
    def keep_one_of_the_first_two(removal):
        if {0, 1} <= set(removal.layers):
            raise RefusedError("layer_types: one full-attention layer must stay")

    judge = TableJudge(score=lambda units: 0.1 * sum(units))
    assert search.find(judge, Constraints(4, check=keep_one_of_the_first_two), 2).removal.layers == (0, 2)
    with pytest.raises(RefusedError, match="layer_types: one full-attention layer must stay"):
        search.find(judge, Constraints(4, protect=frozenset({3}), check=keep_one_of_the_first_two), 3)


@pytest.mark.parametrize("search", [OneShot(), Greedy()])
@pytest.mark.parametrize("drop", [0, 5, 9])
def test_removing_nothing_or_everything_is_refused_before_the_judge_is_asked(search, drop):
    judge = TableJudge()
    with pytest.raises(UsageError, match=f"cannot remove {drop} of 5 layers"):
        search.find(judge, Constraints(5), drop)
    assert judge.asked == []


def test_more_than_what_may_go_is_refused_with_the_reasons():
    constraints = Constraints(6, protect=frozenset({0, 5}), must_keep=frozenset({1}))
    with pytest.raises(UsageError, match=r"6 layers 3 may go \(protected: 0, 5; kept by the architecture: 1\)"):
        OneShot().find(TableJudge(), constraints, 4)


def test_a_judge_that_answers_another_question_is_a_bug():
    with pytest.raises(ValueError, match="was asked about"):
        OneShot().find(lambda removals: [Candidate(removal=(3,), score=0.0) for _ in removals], Constraints(4), 1)


def test_recorded_rounds_can_be_searched_again_without_the_judge():
    found = Greedy().find(TableJudge(3), Constraints(6), 4)
    again = table_judge(found.rounds)
    assert Greedy().find(again, Constraints(6), 4) == found
    assert Greedy().find(again, Constraints(6), 2).order == found.order[:2]
    with pytest.raises(KeyError):
        Greedy().find(again, Constraints(6), 5)


def test_of_a_removal_in_several_races_the_first_is_recorded():
    first, later = Candidate(removal=(1,), score=0.2), Candidate(removal=(1,), score=0.9, stopped=True)
    rounds = (Round(removed=(), candidates=(first,)), Round(removed=(), candidates=(later,)))
    assert table_judge(rounds)([Removal.of(1)]) == [first]


def test_watchers_see_every_round_of_greedy():
    seen = []

    def watch(removal, best):
        seen.append((removal.layers, best.score))

    found = Greedy().find(TableJudge(), Constraints(6), 3, watch=watch)
    assert [len(units) for units, _ in seen] == [1, 2, 3]
    assert seen[-1] == (found.removal.layers, found.cost.score)


def test_moves_of_the_intact_model_are_ordered_and_counted():
    constraints = Constraints(6, must_keep=frozenset({5}), together=(frozenset({1, 3}),))
    assert constraints.moves == ((0,), (1, 3), (2,), (4,))
    assert constraints.removable == 5
    assert constraints.open_moves(Removal.of(0), 2) == ((2,), (4,))
