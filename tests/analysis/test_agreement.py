"""The study's statistics against slow, obvious computations and simulated layers."""

import numpy as np
import pytest
from scipy import stats as scipy_stats

from layerprune.analysis.agreement import (
    ACCURACY_DROP,
    Reference,
    agreement_of,
    item_losses,
    item_noise,
    rank_confusion,
    shared,
    spreads,
)
from layerprune.artifacts import Outcomes, TaskData
from layerprune.artifacts.study import MetricRanking
from layerprune.stats import correlations, mean_losses, rank_agreement, relevance

UNITS = 12


def simulated(seed=0, tasks=2, items=40, same=True):
    """Items of several tasks: each unit's true loss, the same in all tasks or not, and noise."""
    rng = np.random.default_rng(seed)
    true = rng.normal(size=(1 if same else tasks, UNITS))
    return {
        f"task {number}": true[number % len(true)] + rng.normal(size=(items + 5 * number, UNITS))
        for number in range(tasks)
    }


def ranking(scores):
    return MetricRanking(metric="cosine", calibration="all tasks", scores=tuple(scores))


def compared(losses, scores, chosen=None, seed=0):
    reference = Reference.of(losses, seed)
    return agreement_of(reference, ranking(scores), chosen or [True] * UNITS)


def data(task="toy", chance=0.25, items=8):
    return TaskData(
        task=task, split="test", items=items, fingerprints=("0",) * items, num_fewshot=0, metric="acc", chance=chance
    )


def test_losses_average_to_relevance_and_to_the_share_of_probability():
    intact = {"toy": Outcomes(correct="11110100", gold_probability=(0.5,) * 8)}
    without = [
        {"toy": Outcomes(correct="11100000", gold_probability=(0.25,) * 8)},
        {"toy": Outcomes(correct="11110100", gold_probability=(0.5,) * 8)},
    ]
    found = item_losses([data()], intact, without)
    lost = found["accuracy"]["toy"]
    assert lost.shape == (8, 2)
    assert lost.mean(axis=0) == pytest.approx([relevance(3 / 8, 5 / 8, 0.25), 0.0])
    assert found["probability"]["toy"].mean(axis=0) == pytest.approx([0.5, 0.0])
    bare = item_losses([data()], {"toy": Outcomes(correct="1")}, [{"toy": Outcomes(correct="0")}])
    assert bare["probability"] == {}


def test_agreement_is_scipys_with_an_interval_around_it():
    losses = simulated()
    scores = np.random.default_rng(5).normal(size=UNITS) + mean_losses(losses)
    found = compared(losses, scores)
    slow = rank_agreement(scores, mean_losses(losses))
    for name in ("spearman", "kendall", "pearson"):
        estimate = getattr(found, name)
        assert estimate.value == pytest.approx(getattr(slow, name), abs=1e-4)
        assert estimate.interval[0] <= estimate.value <= estimate.interval[1]
        assert 0 < estimate.interval[1] - estimate.interval[0] < 1
    assert found.misplaced == pytest.approx(slow.misplaced_share, abs=1e-4)
    assert (found.ends, found.units, found.task) == (True, UNITS, "mean of tasks")


@pytest.mark.parametrize(("items", "noise"), [(60, 2.0), (60, 6.0)])
def test_the_intervals_cover_what_as_many_other_items_give(items, noise):
    covered = {name: [] for name in ("spearman", "kendall", "pearson")}
    for seed in range(60):
        rng = np.random.default_rng(seed)
        true = rng.normal(size=30)
        scores = true + rng.normal(size=30)
        reference = Reference.of({"a": true + noise * rng.normal(size=(items, 30))}, seed)
        found = agreement_of(reference, ranking(scores), [True] * 30)
        others = correlations(scores, true + noise / np.sqrt(items) * rng.normal(size=(300, 30)))
        for name, hits in covered.items():
            low, high = getattr(found, name).interval
            hits.append(low <= others[name].mean() <= high)
    assert all(np.mean(hits) >= 0.87 for hits in covered.values()), {n: np.mean(h) for n, h in covered.items()}


def test_end_layers_can_be_left_out():
    losses = simulated()
    scores = mean_losses(losses).copy()
    scores[[0, -1]] = [99, -99]
    inner = [0 < unit < UNITS - 1 for unit in range(UNITS)]
    found = compared(losses, scores, inner)
    assert (found.ends, found.units) == (False, UNITS - 2)
    assert found.spearman.value == 1
    assert compared(losses, scores).spearman.value < 1


def test_a_metric_that_says_the_same_of_all_layers_has_no_correlation():
    found = compared(simulated(), [1.0] * UNITS)
    assert (found.spearman.value, found.spearman.interval) == (None, None)
    assert found.misplaced == pytest.approx(found.misplaced_by_chance, abs=1e-3)


def test_confusion_is_the_mean_over_tasks():
    right, wrong = (list(range(4)), list(range(4))), (list(range(4)), list(range(3, -1, -1)))
    found = rank_confusion("cosine", [right, wrong])
    assert found.matrix == ((0.5, 0, 0, 0.5), (0, 0.5, 0.5, 0), (0, 0.5, 0.5, 0), (0.5, 0, 0, 0.5))
    assert (found.misplaced, found.by_chance) == (0.5, 0.75)


def test_overlaps_of_an_eighth_a_quarter_and_half():
    found = shared(ranking(range(16)), [*range(8, 16), *range(8)])
    assert [(one.count, one.shared, one.by_chance) for one in found] == [(2, 0, 0.25), (4, 0, 1), (8, 0, 4)]


def test_variance_over_tasks_is_noise_where_tasks_agree_and_more_where_they_do_not():
    alike = [spreads(simulated(seed, same=True), {}, 0)[0] for seed in range(20)]
    assert np.mean([one.mean for one in alike]) == pytest.approx(np.mean([one.noise for one in alike]), rel=0.15)
    different = [spreads(simulated(seed, same=False), {}, 0)[0] for seed in range(20)]
    assert np.mean([one.mean for one in different]) > 10 * np.mean([one.noise for one in different])


def test_spreads_are_compared_by_wilcoxons_test():
    losses = simulated(same=False)
    rng = np.random.default_rng(3)
    shape = rng.normal(size=UNITS)
    by_task = {"alike": [shape, shape + 0.01 * rng.normal(size=UNITS)], "constant": [shape, np.ones(UNITS)]}
    drop, alike = spreads(losses, by_task, 0)
    assert (drop.metric, drop.wilcoxon_p, alike.metric) == (ACCURACY_DROP, None, "alike")
    slow = np.array([scipy_stats.zscore(lost.mean(axis=0)) for lost in losses.values()]).var(axis=0, ddof=1)
    assert drop.variances == pytest.approx(slow, abs=1e-4)
    assert alike.wilcoxon_p == pytest.approx(scipy_stats.wilcoxon(slow, alike.variances).pvalue, rel=0.05)
    assert alike.wilcoxon_p < 0.01


def test_one_task_has_no_spread_and_equal_losses_have_no_noise_to_speak_of():
    assert spreads(simulated(tasks=1), {}, 0) == []
    assert spreads({"a": np.ones((5, 3)), "b": np.ones((5, 3))}, {}, 0) == []
    assert item_noise({"a": np.tile([0.0, 1.0, 2.0], (6, 1))}, 0) == pytest.approx(0)
