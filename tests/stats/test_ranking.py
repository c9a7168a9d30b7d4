import itertools

import numpy as np
import pytest
from scipy import stats as scipy_stats

from layerprune.stats import confusion, correlations, overlap, rank_agreement


def brute_force_misplaced(a, b):
    """The definition: every way to break the ties of both rankings, position by position."""

    def rankings(scores):
        return [
            p
            for p in itertools.permutations(range(len(scores)))
            if all(scores[x] <= scores[y] for x, y in itertools.pairwise(p))
        ]

    shares = [np.mean([x != y for x, y in zip(p, q, strict=True)]) for p in rankings(a) for q in rankings(b)]
    return float(np.mean(shares))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4]),
        ([1, 2, 3, 4], [4, 3, 2, 1]),
        ([0, 0, 1, 2, 2], [3, 1, 1, 1, 5]),
        ([0, 0, 0, 0], [3, 1, 2, 5]),
        ([5, 1, 1, 0, 2, 2], [0, 1, 1, 3, 2, 9]),
    ],
)
def test_misplaced_share_equals_all_ways_to_break_ties(a, b):
    assert rank_agreement(a, b).misplaced_share == pytest.approx(brute_force_misplaced(a, b))


def test_correlations_are_scipys_with_ties():
    rng = np.random.default_rng(31)
    a, b = rng.integers(0, 8, 30).tolist(), rng.normal(size=30).tolist()
    found = rank_agreement(a, b)
    assert found.spearman == pytest.approx(scipy_stats.spearmanr(a, b).statistic)
    assert found.kendall == pytest.approx(scipy_stats.kendalltau(a, b).statistic)
    assert found.pearson == pytest.approx(np.corrcoef(a, b)[0, 1])


def test_a_constant_score_has_no_correlation_and_the_chance_level_of_misplacement():
    found = rank_agreement([1.0] * 10, list(range(10)))
    assert (found.spearman, found.kendall, found.pearson) == (None, None, None)
    assert found.misplaced_share == pytest.approx(0.9)


def test_chance_levels_are_what_random_rankings_show():
    rng = np.random.default_rng(32)
    found = [rank_agreement(rng.permutation(30), rng.permutation(30)) for _ in range(600)]
    assert found[0].misplaced_by_chance == pytest.approx(0.9667, abs=1e-4)  # the paper's 96.7 % at 30 layers
    assert np.mean([f.misplaced_share for f in found]) == pytest.approx(found[0].misplaced_by_chance, abs=0.005)
    assert np.std([f.spearman for f in found]) == pytest.approx(found[0].spearman_spread, rel=0.1)


@pytest.mark.parametrize(("a", "b"), [([1], [1]), ([1, 2], [1, 2, 3]), ([1, float("nan")], [1, 2])])
def test_scores_that_cannot_be_compared_are_refused(a, b):
    with pytest.raises(ValueError, match="rank agreement"):
        rank_agreement(a, b)


def test_many_correlations_at_once_are_scipys_one_by_one():
    rng = np.random.default_rng(33)
    fixed, drawn = rng.integers(0, 6, 12).astype(float), rng.integers(0, 5, (40, 12)).astype(float)
    found = correlations(fixed, drawn)
    for row, values in enumerate(drawn):
        slow = rank_agreement(fixed, values)
        assert found["spearman"][row] == pytest.approx(slow.spearman)
        assert found["kendall"][row] == pytest.approx(slow.kendall)
        assert found["pearson"][row] == pytest.approx(slow.pearson)
    assert np.isnan(correlations(fixed, np.ones((1, 12)))["kendall"]).all()
    pairwise = correlations(drawn, drawn[::-1])
    assert pairwise["spearman"][0] == pytest.approx(rank_agreement(drawn[0], drawn[-1]).spearman)


def test_confusion_counts_positions():
    assert confusion([0.1, 0.2, 0.3], [9, 8, 7]).tolist() == np.eye(3)[::-1].tolist()
    tied = confusion([0, 0, 1], [1, 2, 3])
    assert tied.tolist() == [[0.5, 0.5, 0], [0.5, 0.5, 0], [0, 0, 1]]
    assert 1 - np.trace(tied) / 3 == pytest.approx(brute_force_misplaced([0, 0, 1], [1, 2, 3]))


def test_overlap_of_the_lowest_and_its_chance_level():
    found = overlap([1, 2, 3, 4, 5, 6], [1, 6, 2, 5, 3, 4], 3)
    assert (found.count, found.shared, found.by_chance) == (3, 2, 1.5)
    assert overlap([1, 1, 2, 3], [1, 2, 3, 4], 1).shared == 0.5  # either of the tied ones may be the lowest
    rng = np.random.default_rng(34)
    shared = [overlap(rng.permutation(12), np.arange(12), 4).shared for _ in range(2000)]
    low, high = overlap(np.arange(12), np.arange(12), 4).chance_interval
    assert np.mean(shared) == pytest.approx(16 / 12, rel=0.05)
    assert np.mean([low <= s <= high for s in shared]) >= 0.95
    with pytest.raises(ValueError, match="5 lowest of 4"):
        overlap([1, 2, 3, 4], [1, 2, 3, 4], 5)
