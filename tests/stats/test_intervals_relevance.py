import numpy as np
import pytest

from layerprune.stats import clipped, displayed, relevance, relevance_interval, relevance_intervals


def test_relevance_by_hand():
    assert relevance(0.70, 0.70, 0.25) == 0
    assert relevance(0.25, 0.70, 0.25) == 1
    assert relevance(0.10, 0.70, 0.25) == pytest.approx(1 + 0.15 / 0.45)  # below chance: a mean over items all the same
    assert clipped(relevance(0.10, 0.70, 0.25)) == 1
    assert clipped(relevance(0.475, 0.70, 0.25)) == pytest.approx(0.5)
    assert clipped(-0.2) == -0.2
    assert relevance(0.475, 0.70, 0.25) == pytest.approx(0.5)
    assert relevance(0.79, 0.70, 0.25) == pytest.approx(-0.2)  # removal helped, and is kept so


def test_what_is_shown_is_clipped_but_for_margins():
    assert displayed(1.3, "relevance", "ablation") == displayed(1.3, "relevance", "ablation:signal=blend") == 1
    assert displayed(1.3, "relevance", "ablation:signal=margin") == 1.3
    assert displayed(1.3, "nats/token", "perplexity") == 1.3


@pytest.mark.parametrize("base", [0.25, 0.2])
def test_a_base_at_chance_has_no_relevance(base):
    with pytest.raises(ValueError, match="above chance"):
        relevance(0.5, base, 0.25)
    with pytest.raises(ValueError, match="above chance"):
        relevance_interval("1" * int(base * 100) + "0" * (100 - int(base * 100)), "1" * 100, 0.25)


def fieller_by_search(base, other, chance, z):
    """The definition: every ratio whose residual mean is within z standard errors of zero, found on a grid."""
    x = np.concatenate([other, [0.0, 1.0]]) - chance
    y = np.concatenate([base, [1.0, 0.0]]) - chance
    ratios = np.linspace(-0.5, 2.5, 300_001)
    residual = x.mean() - ratios * y.mean()
    variance = (x.var() - 2 * ratios * np.cov(x, y, bias=True)[0, 1] + ratios**2 * y.var()) / x.size
    inside = ratios[residual**2 <= z**2 * variance]
    return 1 - inside.max(), 1 - inside.min()


def test_interval_is_fiellers():
    rng = np.random.default_rng(21)
    base = rng.random(400) < 0.6
    other = np.where(rng.random(400) < 0.85, base, rng.random(400) < 0.3)
    expected = fieller_by_search(base.astype(float), other.astype(float), 0.25, 1.959964)
    assert relevance_interval(base, other, 0.25) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("both", "lost", "won", "items"),
    [(0.50, 0.08, 0.04, 200), (0.58, 0.02, 0.01, 300), (0.30, 0.30, 0.05, 150), (0.10, 0.50, 0.05, 200)],
)
def test_intervals_cover_the_truth(both, lost, won, items):
    rng = np.random.default_rng(22)
    cells = rng.multinomial(items, [both, lost, won, 1 - both - lost - won], size=20_000)
    truth = relevance(both + won, both + lost, 0.25)
    low, high = relevance_intervals(cells[:, 0], cells[:, 1], cells[:, 2], items, 0.25)
    coverage = ((low <= truth) & (truth <= high)).mean()
    assert 0.94 <= coverage <= 0.985, coverage


def test_without_flips_the_width_is_not_zero():
    low, high = relevance_interval("1" * 60 + "0" * 40, "1" * 60 + "0" * 40, 0.25)
    assert low < 0 < high


def test_a_base_hardly_above_chance_says_nothing_and_stays_finite():
    base, other = "1" * 26 + "0" * 74, "0" * 10 + "1" * 16 + "0" * 74
    low, high = relevance_interval(base, other, 0.25)
    assert (low, high) == pytest.approx((1 - 0.75 / 0.01, 1 + 0.25 / 0.01))


def test_many_at_once_equal_one_by_one():
    rng = np.random.default_rng(23)
    base = rng.random(200) < 0.7
    others = [np.where(rng.random(200) < keep, base, ~base) for keep in (1.0, 0.97, 0.8, 0.5)]
    both, lost, won = (
        [int((f(base) & g(other)).sum()) for other in others]
        for f, g in ((lambda x: x, lambda x: x), (lambda x: x, np.invert), (np.invert, lambda x: x))
    )
    limits = list(zip(*relevance_intervals(both, lost, won, 200, 0.25), strict=True))
    assert limits == [pytest.approx(relevance_interval(base, other, 0.25)) for other in others]
    assert all(
        low <= relevance(other.mean(), base.mean(), 0.25) <= high
        for other, (low, high) in zip(others, limits, strict=True)
    )
