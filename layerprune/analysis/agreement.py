"""How far rankings agree: a metric with the accuracy that is really lost, and the tasks with one another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from layerprune import stats
from layerprune.analysis.bench import Bench
from layerprune.artifacts import Outcomes, TaskData
from layerprune.artifacts import study as documents
from layerprune.artifacts.study import ALL_TASKS, MEAN, TEXT, Agreed, Confusion, Estimate, MetricRanking, Shared, Spread
from layerprune.registry import build
from layerprune.scoring.metrics import METRICS
from layerprune.scoring.metrics.ablation import INTACT
from layerprune.stats import Losses
from layerprune.stats.ranking import half_losses

# How far a metric's ranking agrees with the accuracy that is really lost, and what chance would give.


Floats = NDArray[np.float64]
COEFFICIENTS = ("spearman", "kendall", "pearson")
DRAWS = 1000  # bootstrap samples of the items
ROWS = 500  # resamples correlated at once: all pairs of 80 units are 3,160 numbers a row
LARGEST = 0.999
SHARES = (8, 4, 2)  # the lowest eighth, quarter and half of the units


@dataclass(frozen=True)
class Reference:
    """The loss that rankings are held against, one task's or the mean of all, and what resampling its items gives."""

    task: str
    value: Floats  # (units,)
    drawn: Floats  # (draws, units)

    @classmethod
    def of(cls, losses: Losses, seed: int, task: str = MEAN) -> Reference:
        """Resample the items, each task's for itself."""
        return cls(task, stats.mean_losses(losses), stats.resampled_losses(losses, DRAWS, seed))


def agreement_of(reference: Reference, ranking: MetricRanking, chosen: Sequence[bool]) -> Agreed:
    """Compare a ranking with the loss on the ``chosen`` units; the intervals say what as many other items would give.

    Each interval is the correlation plus or minus 1.96 standard deviations of its bootstrap draws, on Fisher's scale.
    The draws themselves lie too low (resampling adds noise to losses that are noisy already), so their quantiles, BCa
    among them, miss; docs/notes/2026-11-25-study.md has the simulation. The correlation with losses free of noise is
    higher still, by the square root of the reliability.
    """
    mask = np.asarray(chosen)
    scores, value = np.asarray(ranking.scores, dtype=float)[mask], reference.value[mask]
    found = stats.rank_agreement(scores.tolist(), value.tolist())
    parts = [stats.correlations(scores, reference.drawn[start : start + ROWS, mask]) for start in range(0, DRAWS, ROWS)]
    estimates = {
        name: _estimate(getattr(found, name), np.concatenate([part[name] for part in parts])) for name in COEFFICIENTS
    }
    return Agreed(
        metric=ranking.metric,
        calibration=ranking.calibration,
        task=reference.task,
        ends=bool(mask.all()),
        units=found.n,
        **estimates,
        spearman_by_chance=round(1.96 * found.spearman_spread, 4),
        misplaced=round(found.misplaced_share, 4),
        misplaced_by_chance=round(found.misplaced_by_chance, 4),
    )


def _estimate(value: float | None, drawn: Floats) -> Estimate:
    """Put an interval to a correlation; resamples without one (all units lose alike) are left out of it."""
    if value is None:
        return Estimate(value=None, interval=None)
    spread = 1.96 * float(_fisher(drawn[np.isfinite(drawn)]).std())
    low, high = (float(np.tanh(_fisher(np.array(value)) + side * spread)) for side in (-1, 1))
    return Estimate(value=round(value, 4), interval=(round(min(low, value), 4), round(max(high, value), 4)))


def _fisher(correlations: Floats) -> Floats:
    """Return Fisher's z, kept finite for rankings that agree in full."""
    z: Floats = np.arctanh(np.clip(correlations, -LARGEST, LARGEST))
    return z


def shared(ranking: MetricRanking, losses: Sequence[float] | Floats) -> list[Shared]:
    """Return how many of the lowest eighth, quarter and half the metric finds."""
    counts = sorted({max(1, len(ranking.scores) // share) for share in SHARES})
    return [
        Shared(
            metric=ranking.metric,
            count=found.count,
            shared=round(found.shared, 4),
            by_chance=round(found.by_chance, 4),
            chance_interval=found.chance_interval,
        )
        for found in (stats.overlap(ranking.scores, losses, count) for count in counts)
    ]


def rank_confusion(metric: str, pairs: Sequence[tuple[Sequence[float] | Floats, Sequence[float]]]) -> Confusion:
    """Return the rank-confusion matrix over tasks, from (loss, score) of each: rows by loss, columns by the metric."""
    matrix = np.mean([stats.confusion(losses, scores) for losses, scores in pairs], axis=0)
    return Confusion(
        metric=metric,
        matrix=tuple(tuple(round(float(entry), 4) for entry in row) for row in matrix),
        misplaced=round(1 - float(np.trace(matrix)) / len(matrix), 4),
        by_chance=round(1 - 1 / len(matrix), 4),
    )


# Every metric's ranking of the layers, held against what removing each layer really costs.


def metric_rankings(bench: Bench) -> list[MetricRanking]:
    """Score every unit alone by every metric: on all tasks, on each task, and on the plain text."""
    everything, by_task = bench.scorer(), {task: bench.scorer_for(task) for task in bench.tasks}
    found = []
    for spec in bench.specs:
        _, metric = build(METRICS, spec)
        scorers = {ALL_TASKS: everything} | (by_task if metric.needs else {})
        if "text" in metric.needs and (on_text := bench.scorer_on_text()):
            scorers[TEXT] = on_text
        for calibration, scorer in scorers.items():
            scores = tuple(candidate.score for candidate in scorer.judge(spec)(bench.units))
            found.append(MetricRanking(metric=spec, calibration=calibration, scores=scores))
    return found


def compare_rankings(bench: Bench, rankings: Sequence[MetricRanking]) -> dict[str, Any]:
    """Answer the questions about rankings from the audit outcomes of every unit's removal: fields of a ``Study``."""
    seed = bench.request.seed
    data = [one for evaluator in bench.audits.values() for one in evaluator.eval_set.data()]
    intact, *without = (
        {task: bench.outcomes(removal, task) for task in bench.tasks} for removal in (INTACT, *bench.units)
    )
    lost = item_losses(data, intact, without)
    accuracy, probability = lost["accuracy"], lost["probability"]
    by_task = {task: Reference.of({task: values}, seed, task) for task, values in accuracy.items()}
    mean = Reference.of(accuracy, seed)
    own = {(ranking.metric, ranking.calibration): ranking.scores for ranking in rankings}
    whole = [ranking for ranking in rankings if ranking.calibration == ALL_TASKS]
    # each metric's ranking on each task; its only one, where it reads nothing
    scores = {one.metric: [own.get((one.metric, task), one.scores) for task in by_task] for one in whole}
    reading = {metric: rows for metric, rows in scores.items() if (metric, bench.tasks[0]) in own}
    values = [reference.value for reference in by_task.values()]
    return {
        "lost": tuple(
            documents.Lost(
                task=task,
                accuracy=_means(values),
                probability=_means(probability[task]) if task in probability else None,
            )
            for task, values in accuracy.items()
        ),
        "agreement": tuple(_agreement(bench, rankings, mean, by_task)),
        "shared": tuple(part for one in whole for part in shared(one, mean.value)),
        "confusion": tuple(
            rank_confusion(metric, [*zip(values, rows, strict=True)]) for metric, rows in scores.items()
        ),
        "spread": tuple(spreads(accuracy, reading, seed)),
        "reliability": tuple(
            _split_half(task, signal, part, seed)
            for signal, losses in lost.items()
            if losses  # no task offers choices: no gold answer has a probability
            for task, part in [(MEAN, losses), *((task, {task: values}) for task, values in losses.items())]
        ),
    }


def _agreement(
    bench: Bench, rankings: Sequence[MetricRanking], mean: Reference, by_task: dict[str, Reference]
) -> list[Agreed]:
    """Compare rankings made on one task with that task's loss, all others with the mean's, without the ends too."""
    everyone = [True] * len(bench.units)
    inner = [not {0, bench.constraints.depth - 1} & set(unit.layers) for unit in bench.units]
    found = []
    for ranking in rankings:
        if ranking.calibration in by_task:
            found.append(agreement_of(by_task[ranking.calibration], ranking, everyone))
        else:
            found += [agreement_of(mean, ranking, everyone), agreement_of(mean, ranking, inner)]
    return found


def _split_half(task: str, signal: Any, losses: Losses, seed: int) -> documents.SplitHalf:
    it = stats.split_half(losses, seed=seed)
    halves, whole = (None if value is None else round(value, 4) for value in (it.halves, it.whole))
    return documents.SplitHalf(
        task=task, signal=signal, items=it.items, halves=halves, whole=whole, items_needed=it.items_needed
    )


def _means(values: Floats) -> tuple[float, ...]:
    return tuple(round(float(value), 6) for value in values.mean(axis=0))


# What each unit's removal loses on every audit item, as a share of what the intact model has there.


Answered = Mapping[str, Outcomes]  # by task


def item_losses(data: Sequence[TaskData], intact: Answered, without: Sequence[Answered]) -> dict[str, Losses]:
    """Return what is lost with each unit on every item, (items, units), by signal and task.

    Accuracy: right answers lost over the task's accuracy above chance; the mean over the items is the relevance.
    Probability: that of the gold answer lost over its mean, for tasks that offer choices.
    """
    accuracy, probability = {}, {}
    for task in data:
        outcomes = [one[task.task] for one in (intact, *without)]
        base, *own = (stats.as_bits(one.correct).astype(float) for one in outcomes)
        accuracy[task.task] = (base - np.array(own)).T / (base.mean() - task.chance)
        known = [one.gold_probability for one in outcomes]
        if None not in known:
            base, *own = (np.array(values) for values in known)
            probability[task.task] = (base - np.array(own)).T / base.mean()
    return {"accuracy": accuracy, "probability": probability}


# How much the relevance of a layer varies from task to task, by each metric, and what the draw of items explains.


ACCURACY_DROP = "accuracy drop"
SPLITS = 100


def spreads(losses: Losses, by_task: Mapping[str, Sequence[Sequence[float]]], seed: int) -> list[Spread]:
    """Return the variance over the tasks of every unit's z-scored loss, and of its z-scored score by each metric.

    ``by_task``: metric -> its scores of the units, task by task. Scores are z-scored over the units within each task,
    so that only the pattern of the layers counts. Each metric's variances are compared with the accuracy drop's by
    Wilcoxon's signed-rank test, paired by unit. Empty with fewer than two tasks; a metric that gives all units of a
    task the same score is left out.
    """
    from scipy.stats import wilcoxon

    drop = np.array([lost.mean(axis=0) for lost in losses.values()])  # (tasks, units)
    if len(drop) < 2 or not np.ptp(drop, axis=1).all():
        return []
    reference = _z_scored(drop).var(axis=0, ddof=1)
    found = [_spread(ACCURACY_DROP, reference, noise=round(item_noise(losses, seed), 4))]
    for metric, scores in by_task.items():
        rows = np.asarray(scores, dtype=float)
        if np.ptp(rows, axis=1).all():
            variances = _z_scored(rows).var(axis=0, ddof=1)
            p_value = 1.0 if np.array_equal(reference, variances) else wilcoxon(reference, variances).pvalue
            found.append(_spread(metric, variances, p_value=float(f"{p_value:.3g}")))
    return found


def item_noise(losses: Losses, seed: int) -> float:
    """Return the variance over tasks that the draw of items would give a unit if all tasks agreed, mean over units.

    Two halves of one task's items differ by noise alone: their z-scores differ by twice the variance of a half, and
    the whole has half of a half's.
    """
    one, other = (_z_scored(half) for half in half_losses(losses, SPLITS, seed))
    return float(np.nanmean((one - other) ** 2) / 4)


def _spread(metric: str, variances: Floats, noise: float | None = None, p_value: float | None = None) -> Spread:
    rounded = tuple(round(float(value), 4) for value in variances)
    return Spread(
        metric=metric, variances=rounded, mean=round(float(variances.mean()), 4), noise=noise, wilcoxon_p=p_value
    )


def _z_scored(rows: Floats) -> Floats:
    """Return scores with mean 0 and variance 1 over the units (the last axis); nan where all are the same."""
    spread = rows.std(axis=-1, keepdims=True)
    scored: Floats = (rows - rows.mean(axis=-1, keepdims=True)) / np.where(spread > 0, spread, np.nan)
    return scored
