"""The race's guarantee, held against simulations: it ends with those that the full data puts first."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
import pytest

from layerprune.scoring.racing import Place, Race

CANDIDATES = 30


def outcomes(rng: np.random.Generator, items: int, spread: float) -> np.ndarray:
    """Draw whether each candidate misses each item: items of varied difficulty, three candidates that break it all."""
    difficulty = rng.normal(size=items)
    harm = np.abs(rng.normal(size=CANDIDATES)) * spread
    harm[rng.choice(CANDIDATES, size=3, replace=False)] += 1.5
    noise = rng.normal(size=(CANDIDATES, items)) * 0.45
    return (difficulty - harm[:, None] + noise <= 0).astype(float)


def run(race: Race, harms: Sequence[np.ndarray]) -> tuple[set[int], int]:
    """Run a race in equal blocks, the rest by the full data; return who wins and how many item evaluations it took."""
    spent = 0
    edges = np.linspace(0, 1, race.looks + 1)
    cuts = [(edges * items).astype(int) for items in race.items]
    for look in range(race.looks):
        spent += len(race.running) * sum(int(own[look + 1] - own[look]) for own in cuts)
        race.settle([own[race.running, : cut[look + 1]] for own, cut in zip(harms, cuts, strict=True)])
        if not race.running:
            break
    mean = np.concatenate(harms, axis=1).mean(axis=1)
    rest = sorted(race.running, key=lambda number: mean[number])
    return {*race.accepted, *rest[: race.keep - len(race.accepted)]}, spent


def best(harms: np.ndarray, keep: int) -> set[int]:
    return set(np.argsort(harms.mean(axis=1), kind="stable")[:keep].tolist())


@pytest.mark.parametrize("spread", [0.0, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("keep", [1, 6])
def test_the_winners_are_those_of_the_full_data(spread, keep):
    rng = np.random.default_rng(round(10 * spread) + keep)
    same = 0
    for _ in range(200):
        harms = outcomes(rng, 600, spread)
        won, _ = run(Race(CANDIDATES, (600,), keep, 12), [harms])
        same += harms[list(won)].mean(axis=1).sum() == pytest.approx(harms[list(best(harms, keep))].mean(axis=1).sum())
    assert same >= 0.95 * 200


def test_a_race_is_worth_running():
    rng = np.random.default_rng(1)
    spent = [run(Race(CANDIDATES, (3000,), 1, 60), [outcomes(rng, 3000, 1.0)])[1] for _ in range(20)]
    assert np.mean(spent) * 4 < CANDIDATES * 3000


def test_winners_that_stand_apart_need_not_finish_either():
    rng = np.random.default_rng(1)
    spent = [run(Race(CANDIDATES, (3000,), 8, 20), [separate(rng, 3000, 8)])[1] for _ in range(20)]
    assert np.mean(spent) * 4 < CANDIDATES * 3000  # eight who finish would be more than that alone


def separate(rng: np.random.Generator, items: int, keep: int) -> np.ndarray:
    """Draw outcomes of which ``keep`` candidates stand apart from the rest."""
    rate = np.where(np.arange(CANDIDATES) < keep, 0.3, 0.45)
    return (rng.random((CANDIDATES, items)) < rate[:, None]).astype(float)


def test_a_careless_error_loses_winners():
    """The simulation can fail: with no care taken, near-equal candidates are placed by chance."""
    rng = np.random.default_rng(2)
    same = 0
    for _ in range(100):
        harms = outcomes(rng, 600, 0.0)
        same += run(Race(CANDIDATES, (600,), 1, 12, error=29 * 12 * 0.4), [harms])[0] == best(harms, 1)
    assert same < 90


@pytest.mark.parametrize(("candidates", "keep", "pairs"), [(30, 1, 29), (30, 8, 8 * 22), (30, 29, 29), (2, 2, 1)])
def test_the_error_is_divided_by_looks_and_pairs_of_winner_and_loser(candidates, keep, pairs):
    race = Race(candidates, (600,), keep, 12, error=0.1)
    assert 12 * pairs * (1 - NormalDist().cdf(race.threshold)) == pytest.approx(0.1)


def test_equal_candidates_all_go_on():
    assert Race(4, (100,), 1, 5).places([np.ones((4, 40))], 1) == [Place.OPEN] * 4


def test_a_lead_of_one_item_is_not_certain():
    harms = np.zeros((2, 50))
    harms[1, 0] = 1
    assert Race(2, (100,), 1, 2).places([harms], 1) == [Place.OPEN, Place.OPEN]


def test_a_clear_lead_takes_the_place_and_ends_the_race():
    rng = np.random.default_rng(3)
    harms = np.concatenate([np.zeros((1, 50)), (rng.random((3, 50)) < 0.9).astype(float)])
    race = Race(4, (1000,), 1, 20)
    assert sorted(race.settle([harms])) == [0, 1, 2, 3]
    assert (race.accepted, race.running) == ([0], [])


def test_places_that_are_taken_are_taken_once():
    rng = np.random.default_rng(4)
    rate = np.array([0.0, 0.02, 0.9, 0.95])[:, None]
    harms = (rng.random((4, 60)) < rate).astype(float)
    race = Race(4, (1000,), 2, 20)
    race.settle([harms])
    assert (sorted(race.accepted), race.running) == ([0, 1], [])
    assert Race(4, (1000,), 2, 20).places([harms[2:]], 0) == [Place.OUT, Place.OUT]  # none is left
    assert Race(4, (1000,), 2, 20).places([harms[:2]], 2) == [Place.IN, Place.IN]  # a place for everyone


def test_once_all_items_are_seen_the_full_data_decides():
    harms = np.zeros((2, 100))
    harms[1, 0] = 1
    assert Race(2, (100,), 1, 2).places([harms], 1) == [Place.OPEN, Place.OPEN]


def unequal(rng: np.random.Generator, items: tuple[int, int]) -> list[np.ndarray]:
    """Draw harms of a long and a short task that count alike: the best on the long one fails at the short one."""
    rate = np.abs(rng.normal(size=(2, CANDIDATES))) * 0.08 + 0.4
    rate[:, 0] = 0.33, 0.8
    weights = [sum(items) / 2 / own for own in items]
    return [
        weight * (rng.random((CANDIDATES, own)) < misses[:, None])
        for weight, own, misses in zip(weights, items, rate, strict=True)
    ]


@pytest.mark.parametrize("items", [(4000, 40), (1000, 20)])
def test_what_a_short_task_loses_is_waited_for(items):
    rng = np.random.default_rng(5)
    same, spent = 0, 0
    for _ in range(100):
        harms = unequal(rng, items)
        won, evaluations = run(Race(CANDIDATES, items, 1, items[0] // 50), harms)
        same += won == best(np.concatenate(harms, axis=1), 1)
        spent += evaluations
    assert same >= 95
    assert spent < 0.9 * 100 * CANDIDATES * sum(items)


@pytest.mark.parametrize(("rivals", "gap", "missed"), [(1, 0.06, 0.1), (5, 0.08, 0.15)])
def test_a_small_loss_on_a_short_task_is_waited_for_where_none_has_shown(rivals, gap, missed):
    """The best on the long task misses a few of the short one, as nobody else does: ten items may show none of it."""
    rng = np.random.default_rng(6)
    items, same = (4000, 40), 0
    for _ in range(200):
        long = np.array([0.37, *[0.37 + gap] * rivals])
        short = np.array([missed, *[0.0] * rivals])
        harms = [
            weight * (rng.random((rivals + 1, own)) < rate[:, None])
            for weight, own, rate in zip((0.505, 50.5), items, (long, short), strict=True)
        ]
        won, _ = run(Race(rivals + 1, items, 1, 80), harms)
        mean = np.concatenate(harms, axis=1).mean(axis=1)
        same += mean[next(iter(won))] == pytest.approx(mean.min())
    assert same >= 190


def test_nothing_is_decided_before_each_task_has_shown_enough():
    clear = np.repeat([[0.0], [1.0], [1.0]], 50, axis=1)
    race = Race(3, (1000, 100, 5), 1, 20)
    for short, shorter, decided in [(0, 0, False), (9, 5, False), (10, 4, False), (10, 5, True)]:
        places = race.places([clear, clear[:, :short], clear[:, :shorter]], 1)
        assert (places == [Place.IN, Place.OUT, Place.OUT]) is decided


def test_two_that_did_alike_where_others_did_not_may_differ_there_yet():
    rng = np.random.default_rng(7)
    long = (rng.random((3, 1000)) < np.array([[0.3], [0.45], [0.9]])).astype(float)
    short = 100 * np.array([[0.0] * 10, [0.0] * 10, [1.0] * 10])  # an item weighs as much as a hundred of the long task
    race = Race(3, (4000, 40), 1, 80)
    assert race.places([long, short], 1) == [Place.OPEN, Place.OPEN, Place.OUT]
    assert Race(3, (4000,), 1, 80).places([long], 1) == [Place.IN, Place.OUT, Place.OUT]
