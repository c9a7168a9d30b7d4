"""Intervals are judged by what they promise: how often they cover the truth, counted in simulations."""

import numpy as np
import pytest
from scipy import stats as scipy_stats
from scipy.optimize import brentq

from layerprune.stats import bootstrap_interval, mean_interval, paired_interval, paired_intervals


def tango_score(delta, lost, won, items):
    """The score statistic, its restricted estimate found by maximising the likelihood numerically, not by formula."""
    rest = items - lost - won

    def slope(q):  # q = P(right to wrong); P(wrong to right) = q + delta
        stay = 1 - 2 * q - delta
        return won / (q + delta) + lost / q - 2 * rest / stay

    low, high = max(0.0, -delta), (1 - delta) / 2
    width = high - low
    q = brentq(slope, low + width * 1e-12, high - width * 1e-12)
    return (won - lost - items * delta) / np.sqrt(items * (2 * q + delta - delta**2))


@pytest.mark.parametrize(("lost", "won", "items"), [(12, 5, 100), (3, 1, 40), (90, 31, 1000), (1, 7, 30), (20, 20, 60)])
def test_limits_are_where_the_score_test_just_stops_rejecting(lost, won, items):
    base = "1" * lost + "0" * won + "1" * (items - lost - won)
    other = "0" * lost + "1" * won + "1" * (items - lost - won)
    low, high = paired_interval(base, other)
    z = scipy_stats.norm.ppf(0.975)
    assert tango_score(low, lost, won, items) == pytest.approx(z, abs=1e-6)
    assert tango_score(high, lost, won, items) == pytest.approx(-z, abs=1e-6)
    assert low < (won - lost) / items < high


def test_without_flips_the_interval_is_still_wide_and_closes_with_items():
    z2 = scipy_stats.norm.ppf(0.975) ** 2
    for items in (20, 200, 2000):
        low, high = paired_intervals(0, 0, items)
        assert high == pytest.approx(z2 / (items + z2), abs=1e-9)  # the closed form for no flips
        assert low == pytest.approx(-z2 / (items + z2), abs=1e-9)


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.99])
def test_swapping_the_models_mirrors_the_interval(confidence):
    there, back = paired_intervals(9, 2, 50, confidence), paired_intervals(2, 9, 50, confidence)
    assert there[0] == pytest.approx(-back[1])
    assert there[1] == pytest.approx(-back[0])


@pytest.mark.parametrize(("lost", "won", "items"), [(50, 0, 50), (0, 50, 50), (25, 25, 50), (0, 0, 1), (1, 0, 1)])
def test_extreme_counts_stay_within_what_a_difference_can_be(lost, won, items):
    low, high = paired_intervals(lost, won, items)
    assert -1 <= low <= (won - lost) / items <= high <= 1


@pytest.mark.parametrize(("p_lost", "p_won", "items"), [(0.10, 0.06, 200), (0.02, 0.005, 200), (0.25, 0.05, 60)])
def test_paired_intervals_cover_the_truth(p_lost, p_won, items):
    rng = np.random.default_rng(11)
    flips = rng.multinomial(items, [p_lost, p_won, 1 - p_lost - p_won], size=20_000)
    low, high = paired_intervals(flips[:, 0], flips[:, 1], items)
    truth = p_won - p_lost
    coverage = ((low <= truth) & (truth <= high)).mean()
    assert 0.935 <= coverage <= 0.975, coverage  # 0.939 with five flips expected, 0.95 with thirty


def test_a_bootstrap_would_cover_far_less_with_few_flips():
    """Why accuracy does not use one: 0.75 flips expected among 150 items."""
    rng = np.random.default_rng(12)
    truth, items, hits = -0.005, 150, 0
    for trial in range(300):
        lost = rng.binomial(items, 0.005)
        differences = np.zeros(items)
        differences[:lost] = -1
        low, high = bootstrap_interval([differences], seed=trial, resamples=400)
        hits += low <= truth <= high
    assert hits / 300 < 0.75  # without a flip its width is zero
    drawn = rng.binomial(items, 0.005, size=20_000)
    low, high = paired_intervals(drawn, 0, items)
    assert ((low <= truth) & (truth <= high)).mean() > 0.94


def test_mean_over_tasks_covers_the_truth():
    rng = np.random.default_rng(13)
    tasks = [(0.12, 0.05, 300), (0.03, 0.03, 120), (0.20, 0.02, 80)]
    trials, hits = 3000, 0
    truth = np.mean([won - lost for lost, won, _ in tasks])
    flips = [rng.multinomial(n, [lost, won, 1 - lost - won], size=trials) for lost, won, n in tasks]
    limits = [np.stack(paired_intervals(f[:, 0], f[:, 1], n), 1) for f, (_, _, n) in zip(flips, tasks, strict=True)]
    for trial in range(trials):
        points = [(f[trial, 1] - f[trial, 0]) / n for f, (_, _, n) in zip(flips, tasks, strict=True)]
        low, high = mean_interval(points, [task[trial] for task in limits])
        hits += low <= truth <= high
    assert 0.935 <= hits / trials <= 0.97


def test_mean_of_one_task_is_that_task_and_weights_weigh():
    assert mean_interval([0.1], [(0.0, 0.3)]) == pytest.approx((0.0, 0.3))
    low, high = mean_interval([0.0, 1.0], [(-0.1, 0.1), (1.0, 1.0)], weights=[3, 1])
    assert (low, high) == pytest.approx((0.25 - 0.075, 0.25 + 0.075))


def test_bootstrap_equals_scipys_bca_on_one_stratum():
    values = np.random.default_rng(14).exponential(size=120)
    ours = bootstrap_interval([values], seed=1, resamples=20_000)
    theirs = scipy_stats.bootstrap((values,), np.mean, n_resamples=20_000, method="BCa", rng=2).confidence_interval
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.012)


def test_bootstrap_covers_the_truth_in_two_skewed_strata():
    rng = np.random.default_rng(15)
    hits, trials = 0, 800
    for trial in range(trials):
        strata = [rng.exponential(1.0, size=90), rng.normal(2.0, 1.0, size=60)]
        low, high = bootstrap_interval(strata, seed=trial, resamples=800)
        hits += low <= 1.5 <= high
    assert 0.92 <= hits / trials <= 0.975


def test_bootstrap_repeats_itself_and_knows_constant_data():
    values = [np.random.default_rng(16).normal(size=50)]
    assert bootstrap_interval(values, seed=4) == bootstrap_interval(values, seed=4)
    assert bootstrap_interval(values, seed=4) != bootstrap_interval(values, seed=5)
    assert bootstrap_interval([np.full(30, 0.25)]) == (0.25, 0.25)


@pytest.mark.parametrize("counts", [(-1, 0, 10), (6, 5, 10), (0, 0, 0)])
def test_impossible_counts_are_refused(counts):
    with pytest.raises(ValueError, match="flip counts"):
        paired_intervals(*counts)
