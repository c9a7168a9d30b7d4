"""Lazy greedy under a race: what stopped layers promise, and simulated searches against plain greedy on all items."""

import numpy as np
import pytest

from layerprune.artifacts import Candidate
from layerprune.scoring.racing import Race
from layerprune.search import Constraints, Greedy, table_judge

LAZY = Greedy(lazy=True)


class ItemJudge:
    """Harm item by item that never falls as layers go, raced for the best one or not; counts item evaluations."""

    def __init__(self, seed, *, layers=30, items=720, races=False):
        drawn = np.random.default_rng(seed)
        mean = drawn.gamma(1.0, 0.12, layers)
        self.alone = mean[:, None] + drawn.normal(size=(layers, items)) * np.sqrt(mean)[:, None]
        self.pairs = np.triu(np.abs(drawn.normal(size=(layers, layers))) * 0.01, 1)
        self.items, self.races, self.seen = items, races, {}

    @property
    def spent(self):
        return sum(self.seen.values())

    def harms(self, units, items):
        self.seen[units] = max(self.seen.get(units, 0), items)
        chosen = list(units)
        return self.alone[chosen, :items].sum(axis=0) + self.pairs[np.ix_(chosen, chosen)].sum()

    def __call__(self, removals):
        asked = [removal.layers for removal in removals]
        ran, accepted = dict.fromkeys(asked, self.items), set()
        if self.races and len(asked) > 1:
            ran, accepted = self.race(asked)
        return [self.candidate(units, ran[units], units in accepted) for units in asked]

    def race(self, asked):
        looks = -(-self.items // 150)
        race = Race(len(asked), (self.items,), 1, looks)
        ran = {}
        for look in range(1, looks + 1):
            items = self.items * look // looks
            ran |= {asked[number]: items for number in race.running}
            race.settle([np.stack([self.harms(asked[number], items) for number in race.running])])
            if not race.running:
                break
        return ran, {asked[number] for number in race.accepted if ran[asked[number]] < self.items}

    def candidate(self, units, items, accepted):
        harms = self.harms(units, items)
        mean, error = float(harms.mean()), float(harms.std(ddof=1)) / items**0.5
        limits = mean - 2 * error, mean + 2 * error
        return Candidate(removal=units, score=mean, interval=limits, stopped=items < self.items, accepted=accepted)


def test_a_race_leaves_lazy_greedys_order_and_spends_less():
    same = whole = raced = 0
    for seed in range(20):
        plain, lazy, both = ItemJudge(seed), ItemJudge(seed), ItemJudge(seed, races=True)
        expected = Greedy().find(plain, Constraints(30), 8)
        assert LAZY.find(lazy, Constraints(30), 8).order == expected.order
        found = LAZY.find(both, Constraints(30), 8)
        assert LAZY.find(table_judge(found.rounds), Constraints(30), 8) == found  # planning again from what was written
        same += found.order == expected.order
        whole, raced = whole + lazy.spent, raced + both.spent
        assert not found.cost.stopped
    assert same >= 19
    assert raced < whole / 1.15


class Script:
    """A judge that says what a test laid down: ``(score, lower end)`` of one stopped, ``score`` of one that saw all."""

    def __init__(self, said):
        self.said, self.asked = said, []

    def __call__(self, removals):
        self.asked.append([removal.layers for removal in removals])
        return [self.candidate(units, alone=len(removals) == 1) for units in self.asked[-1]]

    def candidate(self, units, *, alone):
        said = self.said[units]
        if isinstance(said, dict):  # let in early, and what it does on all the items
            score = said["all" if alone else "early"]
            return Candidate(removal=units, score=score, stopped=not alone, accepted=not alone)
        score, low = said if isinstance(said, tuple) else (said, None)
        interval = None if low is None else (low, 2 * score - low)
        return Candidate(removal=units, score=score, interval=interval, stopped=low is not None)


@pytest.mark.parametrize(
    ("low", "order", "asked"),
    [
        (-0.2, (0, 5), [[5, 1, 2, 3]]),  # below what the best of the round did, .1: that is its promise
        (0.35, (0, 5), [[1, 2, 3, 4], [1, 5]]),  # the best so far runs along, for the race to be against it
        (0.55, (0, 1), [[1, 2, 3, 4]]),
    ],
)
def test_a_stopped_layer_promises_by_the_lower_end_of_its_interval(low, order, asked):
    first = {(0,): 0.1, (1,): 0.3, (2,): 0.31, (3,): 0.32, (4,): 0.33, (5,): (0.9, low)}
    second = {(0, unit): 0.6 for unit in (1, 2, 3, 4)}  # .5 more each; 5, which looked worse on a few items, .3 more
    judge = Script({**first, **second, (0, 5): 0.4})
    assert LAZY.find(judge, Constraints(6), 2).order == order
    assert judge.asked[1:] == [[(0, unit) for unit in question] for question in asked]


@pytest.mark.parametrize(
    ("first", "second", "harm", "asked"),
    [
        (0.55, -1.0, 0.53, False),  # what the first round promised stands
        (0.45, 0.58, 0.53, False),  # the second promised more
        (0.45, -1.0, 0.48, False),  # it was behind the best of the second, which did .5
        (0.45, -1.0, 0.53, True),
    ],
)
def test_a_layer_stopped_in_two_rounds_promises_the_most_that_is_known(first, second, harm, asked):
    alone = {(0,): 0.1, **{(unit,): 0.29 + 0.01 * unit for unit in range(1, 6)}, (6,): (0.9, first)}
    pairs = {(0, unit): 0.6 for unit in range(1, 6)} | {(0, 6): (1.0, 0.1 + second)}
    triples = {(0, 1, unit): 0.6 + harm for unit in range(2, 6)} | {(0, 1, 6): 2.0}
    judge = Script({**alone, **pairs, **triples})
    LAZY.find(judge, Constraints(7), 3)
    assert judge.asked[2] == [(0, 1), (0, 5), (0, 6)]
    assert any((0, 1, 6) in question for question in judge.asked) == asked


def test_without_an_interval_a_stopped_layer_promises_what_the_best_of_its_round_did():
    def judge(removals):
        said = {(0,): 0.1, **{(unit,): 0.3 for unit in (1, 2, 3, 4)}, (5,): 0.9, (0, 5): 0.4}
        return [Candidate(removal=r.layers, score=said.get(r.layers, 0.6), stopped=r.layers == (5,)) for r in removals]

    assert LAZY.find(judge, Constraints(6), 2).order == (0, 5)


def test_the_one_let_in_early_is_judged_on_all_the_items_before_the_others_are_left_alone():
    judge = Script({(0,): {"early": 0.1, "all": 0.3}, (1,): 0.2, (2,): (0.9, 0.8)})
    found = LAZY.find(judge, Constraints(3), 1)
    assert judge.asked == [[(0,), (1,), (2,)], [(0,)]]
    assert found.order == (1,)
    assert found.cost.score == 0.2
