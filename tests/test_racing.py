"""The race's guarantee, held against simulations: who the full data would put first is not stopped on the way."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from layerprune.racing import Race

CANDIDATES = 30


def outcomes(rng: np.random.Generator, items: int, spread: float) -> np.ndarray:
    """Draw whether each candidate misses each item: items of varied difficulty, three candidates that break it all."""
    difficulty = rng.normal(size=items)
    harm = np.abs(rng.normal(size=CANDIDATES)) * spread
    harm[rng.choice(CANDIDATES, size=3, replace=False)] += 1.5
    noise = rng.normal(size=(CANDIDATES, items)) * 0.45
    return (difficulty - harm[:, None] + noise <= 0).astype(float)


def run(race: Race, harms: np.ndarray) -> tuple[set[int], int]:
    """Run a race in equal blocks; return who is left and how many item evaluations it took."""
    running, spent, edges = np.arange(len(harms)), 0, np.linspace(0, race.items, race.looks + 1).astype(int)
    for start, stop in pairwise(edges):
        spent += len(running) * (stop - start)
        if stop < race.items:
            running = running[race.running(harms[running, :stop])]
    return set(running.tolist()), spent


@pytest.mark.parametrize("spread", [0.0, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("keep", [1, 6])
def test_the_winners_of_the_full_data_finish(spread, keep):
    rng = np.random.default_rng(round(10 * spread) + keep)
    kept = 0
    for _ in range(200):
        harms = outcomes(rng, 600, spread)
        winners = set(np.argsort(harms.mean(axis=1), kind="stable")[:keep].tolist())
        left, _ = run(Race(CANDIDATES, 600, keep, 12), harms)
        kept += winners <= left
    assert kept >= 0.95 * 200


def test_a_race_is_worth_running():
    rng = np.random.default_rng(1)
    spent = [run(Race(CANDIDATES, 3000, 1, 60), outcomes(rng, 3000, 1.0))[1] for _ in range(20)]
    assert np.mean(spent) * 4 < CANDIDATES * 3000


def test_a_careless_error_loses_winners():
    """The simulation can fail: with no care taken, equal candidates are stopped by chance."""
    rng = np.random.default_rng(2)
    kept = 0
    for _ in range(100):
        harms = outcomes(rng, 600, 0.0)
        winner = int(np.argsort(harms.mean(axis=1), kind="stable")[0])
        kept += winner in run(Race(CANDIDATES, 600, 1, 12, error=29 * 12 * 0.4), harms)[0]
    assert kept < 95


def test_equal_candidates_all_finish():
    assert Race(4, 100, 1, 5).running(np.ones((4, 40))).all()


def test_a_lead_of_one_item_is_not_certain():
    harms = np.zeros((2, 50))
    harms[1, 0] = 1
    assert Race(2, 100, 1, 2).running(harms).all()


def test_at_the_end_nothing_is_left_to_chance():
    harms = np.zeros((2, 100))
    harms[1, 0] = 1
    assert Race(2, 100, 1, 2).running(harms).tolist() == [True, False]
