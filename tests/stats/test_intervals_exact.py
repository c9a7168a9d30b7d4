import itertools
import math
import random

import numpy as np
import pytest
from scipy import stats as scipy_stats

from layerprune.stats import above_chance, as_bits, holm, mcnemar


def brute_force_above_chance(right, chances):
    """The definition: sum over every pattern of guesses with at least as many right answers."""
    total = 0.0
    for pattern in itertools.product((0, 1), repeat=len(chances)):
        if sum(pattern) >= right:
            total += math.prod(c if hit else 1 - c for hit, c in zip(pattern, chances, strict=True))
    return total


@pytest.mark.parametrize("right", range(10))
def test_above_chance_equals_enumeration_of_all_guesses(right):
    chances = [1 / 4, 1 / 3, 1 / 5, 1 / 4, 1 / 2, 1 / 3, 0.0, 0.9, 1 / 4]
    correct = "1" * right + "0" * (9 - right)
    assert above_chance(correct, chances) == pytest.approx(brute_force_above_chance(right, chances), abs=1e-14)


def test_above_chance_is_the_binomial_test_when_all_chances_are_alike():
    correct = [True] * 140 + [False] * 260
    expected = scipy_stats.binomtest(140, 400, 0.25, alternative="greater").pvalue
    assert above_chance(correct, [0.25] * 400) == pytest.approx(expected, rel=1e-9)


def test_above_chance_equals_scipys_poisson_binomial_and_keeps_a_tiny_tail():
    rng = random.Random(1)
    chances = [rng.choice([1 / 3, 1 / 4, 1 / 5]) for _ in range(600)]
    correct = "1" * 190 + "0" * 410
    assert above_chance(correct, chances) == pytest.approx(scipy_stats.poisson_binom.sf(189, chances), rel=1e-6)
    exact = scipy_stats.binomtest(400, 600, 0.25, alternative="greater").pvalue  # about 1e-100
    assert above_chance("1" * 400 + "0" * 200, [0.25] * 600) == pytest.approx(exact, rel=1e-9)


def test_without_any_chance_one_right_answer_is_proof_and_none_is_none():
    assert above_chance("0010", [0.0] * 4) == 0.0
    assert above_chance("0000", [0.0] * 4) == 1.0


@pytest.mark.parametrize(
    ("correct", "chances"), [("", []), ("01", [0.5]), ("01", [0.5, 1.5]), ("0x", [0.5, 0.5]), ("01", [0.5, -0.1])]
)
def test_above_chance_refuses_what_it_cannot_mean(correct, chances):
    with pytest.raises(ValueError, match=r"chance|characters"):
        above_chance(correct, chances)


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (1, 0), (0, 6), (5, 5), (12, 3), (40, 71), (7, 8)])
def test_mcnemar_equals_the_two_sided_binomial_test_on_flips(lost, won):
    base = "1" * lost + "0" * won + "1" * 9 + "0" * 4
    other = "0" * lost + "1" * won + "1" * 9 + "0" * 4
    found = mcnemar(base, other)
    assert (found.right_to_wrong, found.wrong_to_right) == (lost, won)
    expected = 1.0 if lost + won == 0 else scipy_stats.binomtest(lost, lost + won, 0.5).pvalue
    assert found.p_value == pytest.approx(expected, rel=1e-12)


def test_mcnemar_refuses_answers_to_different_items():
    with pytest.raises(ValueError, match="same items"):
        mcnemar("0101", "010")


def brute_force_holm(p_values):
    """Holm by its rejections: an adjusted p is the smallest level at which its hypothesis is rejected."""
    order = np.argsort(p_values, kind="stable")
    rejected_at = []
    for index in range(len(p_values)):
        steps = [(len(p_values) - rank) * p_values[i] for rank, i in enumerate(order)]
        upto = list(order).index(index)
        rejected_at.append(min(1.0, max(steps[: upto + 1])))
    return rejected_at


def test_holm_by_hand_and_by_its_definition():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    rng = np.random.default_rng(3)
    for size in range(1, 9):
        values = list(rng.random(size) ** 2)
        assert holm(values) == pytest.approx(brute_force_holm(values))


def test_holm_holds_the_family_wise_error():
    rng = np.random.default_rng(5)
    wrong = sum(min(holm(list(rng.random(5)))) <= 0.05 for _ in range(4000))
    assert 0.04 < wrong / 4000 < 0.06


def test_outcomes_may_be_text_or_booleans():
    assert as_bits("101").tolist() == as_bits([True, False, True]).tolist() == [True, False, True]
