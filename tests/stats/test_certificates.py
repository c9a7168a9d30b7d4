import itertools
from functools import cache
from math import comb

import numpy as np
import pytest
from scipy.stats import binom

from layerprune.stats import certify, draw_mixture, items_needed, loss_p_value
from layerprune.stats.certificates import score_statistic


def outcomes(lost, won, items):
    """Answers of a base that is right on the first items, wrong on the last, and of a model with these flips."""
    right = items * 3 // 4
    base = "1" * right + "0" * (items - right)
    other = "0" * lost + "1" * (right - lost) + "1" * won + "0" * (items - right - won)
    return base, other


def brute_force_p_value(lost, won, items, limit, shares=2001):
    """The definition: every outcome at least as favourable, its multinomial probability, worst case over all shares."""
    cells = [(a, b) for a, b in itertools.product(range(items + 1), repeat=2) if a + b <= items]
    scores = score_statistic(np.array([a for a, _ in cells]), np.array([b for _, b in cells]), items, limit)
    seen = scores[cells.index((lost, won))]
    favourable = [cell for cell, score in zip(cells, scores, strict=True) if score <= seen + 1e-9]
    worst = 0.0
    for q in np.linspace(0, (1 - limit) / 2, shares):
        p = q + limit
        rest = max(1 - p - q, 0.0)
        worst = max(
            worst,
            sum(comb(items, a) * comb(items - a, b) * p**a * q**b * rest ** (items - a - b) for a, b in favourable),
        )
    return worst


@pytest.mark.parametrize(("lost", "won", "limit"), [(0, 0, 0.1), (1, 0, 0.2), (0, 3, 0.05), (2, 5, 0.1), (3, 1, 0.3)])
def test_p_value_equals_enumeration_of_all_outcomes(lost, won, limit):
    expected = brute_force_p_value(lost, won, 14, limit)
    # The nuisance is searched in its 99.99 % interval only, which may lower the maximum, and 0.0001 is added for it.
    assert loss_p_value(lost, won, 14, limit) == pytest.approx(expected, abs=1.5e-3)


def test_without_any_flip_it_is_close_to_the_binomial_chance_of_none():
    assert 0.98**200 <= loss_p_value(0, 0, 200, 0.02) <= 0.98**200 * 1.2


def test_more_losses_are_never_stronger_evidence_and_more_gains_never_weaker():
    by_losses = [loss_p_value(lost, 4, 150, 0.05) for lost in range(20)]
    assert by_losses == sorted(by_losses)
    assert by_losses[0] < 0.001
    assert by_losses[-1] > 0.5
    by_gains = [loss_p_value(8, won, 150, 0.05) for won in range(12)]
    assert by_gains == sorted(by_gains, reverse=True)


@cache
def most_losses_certified(won, items, limit, level=0.05):
    """The largest count of losses that is still certified beside ``won`` gains: p-values rise with losses."""
    low, high = -1, int(items * limit) + won
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if loss_p_value(middle, won, items, limit) <= level else (low, middle - 1)
    return low


@pytest.mark.parametrize(("items", "limit"), [(120, 0.03), (200, 0.05)])
@pytest.mark.parametrize("gains", [0.0, 0.005, 0.02, 0.05, 0.12])
def test_a_loss_of_exactly_the_limit_is_certified_at_most_at_the_level(gains, items, limit):
    """The hardest case of the null hypothesis; its probability is summed over all outcomes, not simulated."""
    won = np.arange(binom.isf(1e-9, items, gains) + 1).astype(int)
    most = np.array([most_losses_certified(int(count), items, limit) for count in won])
    chance = (binom.pmf(won, items, gains) * binom.cdf(most, items - won, (gains + limit) / (1 - gains))).sum()
    assert chance <= 0.05
    if gains >= 0.02:
        assert chance >= 0.035  # and not by hardly ever certifying


@pytest.mark.parametrize(
    "losses",
    [
        (0.05, 0.08, 0.12),  # already the first step loses exactly the limit
        (0.0, 0.0, 0.05, 0.1),
        (0.01, 0.02, 0.06, 0.03),  # not monotone: a bad step between good ones
        (0.04, 0.05, 0.05, 0.05),  # many chances to go wrong
    ],
)
def test_certified_drop_holds_over_simulated_models(losses):
    """The guarantee itself: violations are models for which a certified step truly loses the limit or more."""
    rng = np.random.default_rng(42)
    limit, items, models = 0.05, 200, 10_000
    gain = 0.03
    flips = np.stack(
        [rng.multinomial(items, [loss + gain, gain, 1 - loss - 2 * gain], size=models) for loss in losses], 1
    )
    most = np.array([most_losses_certified(won, items, limit) for won in range(int(flips[:, :, 1].max()) + 1)])
    walked = np.cumprod(flips[:, :, 0] <= most[flips[:, :, 1]], axis=1).sum(axis=1)  # steps before the first failure
    for model in range(40):  # the same decisions as certify takes itself
        pairs = [outcomes(int(lost), int(won), items) for lost, won, _ in flips[model]]
        assert certify(pairs[0][0], [other for _, other in pairs], limit).certified == walked[model]
    violations = np.array([any(loss >= limit for loss in losses[:steps]) for steps in walked])
    assert violations.mean() <= 0.05
    if losses[0] < limit:
        assert (walked >= 1).mean() > 0.05  # good first steps are found, if there are items enough


def test_the_walk_stops_at_the_first_step_that_fails():
    base = "1" * 500
    good, bad = "1" * 500, "0" * 60 + "1" * 440
    found = certify(base, [good, good, bad, good], limit=0.02)
    assert found.certified == 2
    assert [step.certified for step in found.steps] == [True, True, False]  # the fourth is not looked at
    assert certify(base, [bad, good], limit=0.02).certified == 0
    assert certify(base, [], limit=0.02).steps == ()


def test_confidence_is_what_p_values_are_held_against():
    base, other = outcomes(5, 4, 400)
    p_value = loss_p_value(5, 4, 400, 0.02)
    assert certify(base, [other], 0.02, confidence=1 - p_value - 0.001).certified == 1
    assert certify(base, [other], 0.02, confidence=1 - p_value + 0.001).certified == 0


def test_how_many_items_would_be_enough_is_where_certifying_begins():
    for lost, won, items in ((0, 0, 1), (5, 4, 400), (9, 3, 300)):
        needed = items_needed(lost, won, items, 0.03, 0.95)
        scaled = [round(flips / items * needed) for flips in (lost, won)]
        assert loss_p_value(*scaled, needed, 0.03) <= 0.05
        fewer = int(needed * 0.9)
        assert loss_p_value(*(round(flips / items * fewer) for flips in (lost, won)), fewer, 0.03) > 0.05
    assert items_needed(12, 0, 400, 0.03, 0.95) is None  # the loss seen is the limit itself
    assert items_needed(0, 0, 1, 1e-7, 0.95) is None


def test_a_path_is_made_as_it_is_walked():
    asked = []

    def path():
        for wrong in (0, 60, 0):
            asked.append(wrong)
            yield "0" * wrong + "1" * (500 - wrong)

    assert certify("1" * 500, path(), limit=0.02).certified == 1
    assert asked == [0, 60]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((5, 6, 10, 0.1), "not possible"),
        ((1, 1, 10, -0.1), "limit"),
        ((1, 1, 10, 1.0), "limit"),
        ((0, 0, 0, 0.1), "not"),
    ],
)
def test_impossible_arguments_are_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        loss_p_value(*arguments)
    with pytest.raises(ValueError, match="confidence"):
        certify("1", ["1"], 0.1, confidence=95)


def test_a_mixture_draws_tasks_alike_whatever_their_sizes():
    sizes = {"a": 400, "b": 5000, "c": 900}
    draws = [draw_mixture(sizes, seed) for seed in range(300)]
    counts = np.array([[len(draw[name]) for name in sizes] for draw in draws])
    assert (counts.sum(axis=1) == 900).all()  # a length that depends on the sizes alone
    assert counts.mean(axis=0) == pytest.approx([300, 300, 300], rel=0.02)
    assert counts.std(axis=0) == pytest.approx([(900 * 2 / 9) ** 0.5] * 3, rel=0.15)
    for name, chosen in draws[0].items():
        assert len(set(chosen.tolist())) == len(chosen)
        assert chosen.max() < sizes[name]
    assert draw_mixture(sizes, 7)["b"].tolist() == draws[7]["b"].tolist()
    assert draw_mixture({"only": 50}, 0)["only"].tolist() == list(range(50))


def test_a_certified_mixture_is_about_the_mean_of_the_tasks():
    """One task loses 0, one 10 points; the limit is 5 on their mean: at the boundary, rejections stay at the level."""
    rng = np.random.default_rng(43)
    certified, models = 0, 4000
    for model in range(models):
        drawn = draw_mixture({"a": 100, "b": 1000}, model)
        lost = rng.binomial(len(drawn["a"]), 0.02) + rng.binomial(len(drawn["b"]), 0.12)
        won = rng.binomial(len(drawn["a"]), 0.02) + rng.binomial(len(drawn["b"]), 0.02)
        certified += lost <= most_losses_certified(int(won), sum(map(len, drawn.values())), 0.05)
    assert certified / models <= 0.05
