"""Exchange: it starts from the best proposal, and ends where no exchange of one layer does less harm."""

import itertools

import pytest

from layerprune.artifacts import Candidate
from layerprune.errors import RefusedError, UsageError
from layerprune.registry import build
from layerprune.removal import Removal
from layerprune.search import SEARCHES, Constraints, NoAdjacent, OneShot, Others
from layerprune.search.base import by_importance
from layerprune.search.searches import Exchange
from table_judge import TableJudge, others

DEPTH = 9


def exchanged(seed, constraints, drop, **options):
    judge = TableJudge(seed)
    asked = others(TableJudge(seed + 100), own=judge)
    return judge, Exchange(**options).find(judge, constraints, drop, others=asked)


def starts(seed, constraints, drop):
    return [OneShot().find(TableJudge(one), constraints, drop).removal for one in (seed, seed + 100)]


def neighbours(units, allowed):
    for out, new in itertools.product(units, allowed):
        if new not in units:
            yield tuple(sorted({*units} - {out} | {new}))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("drop", [1, 3, 5])
def test_no_exchange_of_one_layer_betters_what_is_found(seed, drop):
    constraints = Constraints(DEPTH, protect=frozenset({2}))
    judge, found = exchanged(seed, constraints, drop, most=100)
    allowed = [layer for layer in range(DEPTH) if layer != 2]
    cost = judge.value(found.removal.layers)
    assert found.cost.score == cost
    assert all(judge.value(units) > cost for units in neighbours(found.removal.layers, allowed))
    assert cost <= min(judge.value(start.layers) for start in starts(seed, constraints, drop))


@pytest.mark.parametrize("seed", range(12))
def test_without_exchanges_it_is_the_better_of_the_proposals(seed):
    judge, found = exchanged(seed, Constraints(DEPTH), 4, most=0)
    proposed = starts(seed, Constraints(DEPTH), 4)
    assert found.removal == min(proposed, key=lambda removal: judge.value(removal.layers))


def test_races_that_err_in_turn_do_not_walk_in_circles():
    """Whichever way it is asked, the next layer is called the best: 0, 1, 2, 0, 1 ... were there no end."""
    turn = itertools.count()

    def race(removals):
        best = next(turn) % 3
        return [Candidate(removal=r.layers, score=float((r.layers[0] - best) % 3)) for r in removals]

    asked = Others(lambda _, c, drop: OneShot().find(TableJudge(), c, drop), lambda _: TableJudge())
    found = Exchange(most=50).find(race, Constraints(3), 1, others=asked)
    stood = [one.removal for one in found.rounds[-1].candidates]
    assert len(set(stood)) == len(stood) > 1


def test_each_exchange_is_made_only_for_less_harm_and_as_many_as_asked_for():
    costs = []
    for most in range(6):
        judge, found = exchanged(3, Constraints(DEPTH), 4, most=most)
        costs.append(judge.value(found.removal.layers))
    assert costs == sorted(costs, reverse=True)
    assert len(set(costs)) > 2  # more than one exchange was there to be made


@pytest.mark.parametrize("seed", range(12))
def test_what_goes_together_is_exchanged_for_what_goes_together(seed):
    pairs = tuple(frozenset({layer, layer + 1}) for layer in (0, 2, 4))
    _, found = exchanged(seed, Constraints(10, together=pairs), 3)
    assert {len(one.removal) for entry in found.rounds if len(entry.removed) for one in entry.candidates} <= {3}
    gone = set(found.removal.layers)
    assert len(gone) == 3
    assert all(len(gone & pair) in (0, 2) for pair in pairs)
    assert set(found.order) == gone


def test_every_set_stood_at_has_the_shape_asked_for():
    _, found = exchanged(2, Constraints(DEPTH, shape=NoAdjacent()), 3)
    assert all(b - a > 1 for a, b in itertools.pairwise(found.removal.layers))


def test_watch_hears_of_every_set_it_stands_at():
    heard, judge = [], TableJudge(3)
    asked = others(TableJudge(103), own=judge)

    def watch(removal, best):
        heard.append((removal, best.score))

    found = Exchange().find(judge, Constraints(DEPTH), 4, watch=watch, others=asked)
    assert heard[-1][0] == found.removal
    assert [score for _, score in heard] == sorted((score for _, score in heard), reverse=True)
    assert all(score == judge.value(removal.layers) for removal, score in heard)


@pytest.mark.parametrize("seed", range(6))
def test_races_that_err_neither_keep_it_walking_nor_have_the_last_word(seed):
    """A judge that calls another set better each time it is asked: the walk ends, at the best of where it stood."""
    turn, whole, asked = itertools.count(), TableJudge(seed), []
    race = TableJudge(score=lambda units: -float(next(turn)))

    def own(keep):
        asked.append(keep)
        return whole

    beside = Others(lambda _, c, drop: OneShot().find(TableJudge(seed + 9), c, drop), own)
    found = Exchange(most=10**6).find(race, Constraints(6), 2, others=beside)
    stood = [one.removal for one in found.rounds[-1].candidates]
    assert asked == [2, len(stood)]  # none of them may be stopped early
    assert len(set(stood)) == len(stood) >= 2
    assert found.removal.layers == min(stood, key=whole.value)
    assert found.cost.score == whole.value(found.removal.layers)


def test_the_first_round_is_the_ranking_and_the_last_the_whole_removals_stood_at():
    _, found = exchanged(4, Constraints(DEPTH), 3)
    assert [one.removal for one in found.rounds[0].candidates] == [(layer,) for layer in range(DEPTH)]
    assert found.cost in found.rounds[-1].candidates
    assert not found.nested
    assert found.removal == Removal(found.cost.removal)
    singles = sorted(found.rounds[0].candidates, key=by_importance)
    assert [entry.unit for entry in found.ranking] == [one.removal[0] for one in singles]


def test_cheap_metrics_are_asked_first_and_single_layers_race_for_all_places():
    asked, judge = [], TableJudge(1)
    own = Others(
        lambda spec, c, drop: asked.append(spec) or OneShot().find(judge, c, drop),
        lambda keep: asked.append(keep) or judge,
    )
    search = Exchange(by="cosine+angular:tokens=all+cosine")
    assert search.next_to_go(3) == 1
    search.find(judge, Constraints(6), 3, others=own)
    assert asked[:3] == ["cosine", "angular:tokens=all", 3]


def test_bad_options_and_a_search_without_its_metrics_are_refused():
    for spec, message in {
        "exchange:by=": "by names metrics",
        "exchange:by=cosine+": "by names metrics",
        "exchange:most=-1": "most is -1 and has to be from 0 to 1,000,000",
    }.items():
        with pytest.raises(UsageError, match=message):
            build(SEARCHES, spec)
    with pytest.raises(UsageError, match="asks cosine for proposals: plan from the model"):
        Exchange().find(TableJudge(), Constraints(5), 2)
    with pytest.raises((RefusedError, UsageError)):
        exchanged(0, Constraints(5, protect=frozenset({0, 1, 2, 3})), 2)


def test_a_metric_that_can_propose_nothing_is_named_before_anything_is_judged():
    def choose(metric, constraints, drop):
        raise RefusedError("no 2 neighbouring layers may go together")

    judge = TableJudge()
    search, beside = Exchange(by="angular"), Others(choose, lambda _: judge)
    with pytest.raises(UsageError, match="the metric 'angular' proposes nothing here: no 2 neighbouring"):
        search.find(judge, Constraints(6), 2, others=beside)
    assert not judge.asked
