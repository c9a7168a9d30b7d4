"""Losses over items: what resampling and splitting say, against the true repeatability of simulated layers."""

import numpy as np
import pytest

from layerprune.stats import mean_losses, resampled_losses, split_half
from layerprune.stats.ranking import TARGET, correlations, half_losses


def drawn(rng, items, true, noise=0.5):
    """Items of one task: each layer's true loss with noise."""
    return true + noise * rng.normal(size=(items, len(true)))


def test_the_mean_is_of_tasks_and_not_of_items():
    losses = {"long": np.zeros((30, 2)), "short": np.tile([1.0, 0.5], (2, 1))}
    assert mean_losses(losses).tolist() == [0.5, 0.25]


def test_resamples_spread_as_the_standard_error_says():
    rng = np.random.default_rng(1)
    losses = {"a": drawn(rng, 50, np.array([0.0, 1.0])), "b": drawn(rng, 20, np.array([0.0, 1.0]))}
    found = resampled_losses(losses, 4000, seed=0)
    error = np.sqrt(sum(lost.var(axis=0) / len(lost) for lost in losses.values())) / 2
    assert found.mean(axis=0) == pytest.approx(mean_losses(losses), abs=0.01)
    assert found.std(axis=0) == pytest.approx(error, rel=0.05)


def test_halves_part_the_items():
    lost = np.arange(7.0)[:, None] * np.ones(2)
    one, other = half_losses({"a": lost}, 50, seed=0)
    sizes = {3.0, 4.0}
    for a, b in zip(one[:, 0, 0], other[:, 0, 0], strict=True):
        assert any(abs(size * a + (7 - size) * b - lost[:, 0].sum()) < 1e-9 for size in sizes)
    assert len(np.unique(one)) > 10
    with pytest.raises(ValueError, match="at least 2"):
        half_losses({"a": lost[:1]}, 5, seed=0)


def test_reliability_is_the_correlation_between_two_sets_of_items():
    rng = np.random.default_rng(2)
    true = rng.normal(size=30) * 0.1
    found, repeats = [], []
    for _ in range(40):
        first, second = ({"a": drawn(rng, 40, true), "b": drawn(rng, 40, true)} for _ in range(2))
        found.append(split_half(first, splits=50).whole)
        repeats.append(correlations(mean_losses(first), mean_losses(second)[None])["spearman"][0])
    assert np.mean(found) == pytest.approx(np.mean(repeats), abs=0.04)
    assert 0.5 < np.mean(found) < 0.95  # neither hopeless nor certain


def test_items_needed_are_enough_and_not_too_many():
    rng = np.random.default_rng(3)
    true = rng.normal(size=30) * 0.1
    needed = np.mean([split_half({"a": drawn(rng, 60, true)}).items_needed for _ in range(20)])
    reached = np.mean([split_half({"a": drawn(rng, int(needed), true)}).whole for _ in range(20)])
    assert reached == pytest.approx(TARGET, abs=0.03)


def test_nothing_to_rank_and_nothing_but_noise():
    flat = split_half({"a": np.ones((10, 5))})
    assert (flat.halves, flat.whole, flat.items_needed) == (None, None, None)
    noise = [split_half({"a": np.random.default_rng(seed).normal(size=(30, 20))}).halves for seed in range(30)]
    assert abs(np.mean(noise)) < 0.15


def test_halves_that_contradict_each_other_are_not_stepped_below_minus_one():
    lost = np.array([[1.0, 0.0, 0.5], [0.0, 1.0, 0.5]])  # two items: each half is one
    found = split_half({"a": lost})
    assert found.halves == found.whole == -1.0
    mild = split_half({"a": drawn(np.random.default_rng(8), 6, np.zeros(5))})
    assert -1 < mild.whole == mild.halves < -0.05
    assert mild.items_needed is None
