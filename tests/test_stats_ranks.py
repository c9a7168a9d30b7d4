import itertools

import numpy as np
import pytest
from scipy import stats as scipy_stats

from layerprune.stats import rank_agreement


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
