"""How far rankings agree: a metric with the accuracy that is really lost, and the tasks with one another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from layerprune.analysis.bench import Bench
from layerprune.artifacts import Outcomes, TaskData
from layerprune.artifacts.study import (
    ALL_TASKS,
    MEAN,
    TEXT,
    Agreed,
    Confusion,
    Estimate,
    Lost,
    MetricRanking,
    Shared,
    SplitHalf,
    Spread,
)
from layerprune.registry import build
from layerprune.removal import Removal
from layerprune.scoring.metrics import METRICS
from layerprune.scoring.metrics.ablation import INTACT
from layerprune.stats import (
    Losses,
    as_bits,
    confusion,
    correlations,
    mean_losses,
    overlap,
    rank_agreement,
    resampled_losses,
    split_half,
)
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
        return cls(task, mean_losses(losses), resampled_losses(losses, DRAWS, seed))


def agreed(
    reference: Reference, scores: Sequence[float], chosen: Sequence[bool], *, metric: str, calibration: str
) -> Agreed:
    """Compare a ranking with the loss on the ``chosen`` units; the intervals say what as many other items would give.

    Each interval is the correlation plus or minus 1.96 standard deviations of its bootstrap draws, on Fisher's scale.
    The draws themselves lie too low (resampling adds noise to losses that are noisy already), so their quantiles, BCa
    among them, miss; docs/notes/2026-11-25-study.md has the simulation. The correlation with losses free of noise is
    higher still, by the square root of the reliability.
    """
    mask = np.asarray(chosen)
    own, value = np.asarray(scores, dtype=float)[mask], reference.value[mask]
    found = rank_agreement(own.tolist(), value.tolist())
    parts = [correlations(own, reference.drawn[start : start + ROWS, mask]) for start in range(0, DRAWS, ROWS)]
    estimates = {
        name: _estimate(getattr(found, name), np.concatenate([part[name] for part in parts])) for name in COEFFICIENTS
    }
    return Agreed(
        metric=metric,
        calibration=calibration,
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


def shared(metric: str, scores: Sequence[float], losses: Sequence[float]) -> list[Shared]:
    """Return how many of the lowest eighth, quarter and half the metric finds."""
    counts = sorted({max(1, len(scores) // share) for share in SHARES})
    return [
        Shared(
            metric=metric,
            count=found.count,
            shared=round(found.shared, 4),
            by_chance=round(found.by_chance, 4),
            chance_interval=found.chance_interval,
        )
        for found in (overlap(scores, losses, count) for count in counts)
    ]


def confused(metric: str, pairs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> Confusion:
    """Return the rank-confusion matrix over tasks, from (loss, score) of each: rows by loss, columns by the metric."""
    matrix = np.mean([confusion(losses, scores) for losses, scores in pairs], axis=0)
    return Confusion(
        metric=metric,
        matrix=tuple(tuple(round(float(entry), 4) for entry in row) for row in matrix),
        misplaced=round(1 - float(np.trace(matrix)) / len(matrix), 4),
        by_chance=round(1 - 1 / len(matrix), 4),
    )


# Every metric's ranking of the layers, held against what removing each layer really costs.


def ranked(bench: Bench) -> list[MetricRanking]:
    """Score every unit alone by every metric: on all tasks, on each task, and on the plain text."""
    everything, by_task = bench.scorer(), {task: bench.scorer_for(task) for task in bench.tasks}
    found = []
    for spec in bench.specs:
        _, metric = build(METRICS, spec)
        scorers = {ALL_TASKS: everything} | (by_task if metric.needs != "nothing" else {})
        if metric.needs == "text" and (on_text := bench.scorer_on_text()):
            scorers[TEXT] = on_text
        for calibration, scorer in scorers.items():
            scores = tuple(candidate.score for candidate in scorer.judge(spec)(bench.units))
            found.append(MetricRanking(metric=spec, calibration=calibration, scores=scores))
    return found


def judged(bench: Bench, rankings: Sequence[MetricRanking]) -> dict[str, Any]:
    """Answer the questions about rankings from the audit outcomes of every unit's removal: fields of a ``Study``."""
    seed, lost = bench.request.seed, losses_of(bench)
    accuracy = lost["accuracy"]
    mean = Reference.of(accuracy, seed)
    by_task = {task: Reference.of({task: values}, seed, task) for task, values in accuracy.items()}
    whole = [ranking for ranking in rankings if ranking.calibration == ALL_TASKS]
    own = {(ranking.metric, ranking.calibration): ranking.scores for ranking in rankings}
    complete = {
        one.metric: [own[one.metric, task] for task in by_task] for one in whole if (one.metric, bench.tasks[0]) in own
    }
    return {
        "lost": tuple(_lost(lost)),
        "agreement": tuple(_agreement(bench, rankings, mean, by_task)),
        "shared": tuple(part for one in whole for part in shared(one.metric, one.scores, mean.value.tolist())),
        "confusion": tuple(_confusion(one, own, by_task) for one in whole),
        "spread": tuple(spreads(accuracy, complete, seed)),
        "reliability": tuple(_reliability(lost, seed)),
    }


def losses_of(bench: Bench) -> dict[str, Losses]:
    """Return what each unit's removal loses on the audit items, by signal."""
    data = [one for evaluator in bench.audits.values() for one in evaluator.eval_set.data()]

    def answered(removal: Removal) -> dict[str, Outcomes]:
        return {task: bench.outcomes(removal, task) for task in bench.tasks}

    intact, without = answered(INTACT), [answered(unit) for unit in bench.units]
    return {
        "accuracy": accuracy_losses(data, intact, without),
        "probability": probability_losses(data, intact, without),
    }


def _lost(lost: dict[str, Losses]) -> list[Lost]:
    return [
        Lost(
            task=task,
            accuracy=_means(values),
            probability=_means(lost["probability"][task]) if task in lost["probability"] else None,
        )
        for task, values in lost["accuracy"].items()
    ]


def _agreement(
    bench: Bench, rankings: Sequence[MetricRanking], mean: Reference, by_task: dict[str, Reference]
) -> list[Agreed]:
    """Compare rankings made on one task with that task's loss, all others with the mean's, without the ends too."""
    everyone = [True] * len(bench.units)
    inner = [not {0, bench.constraints.depth - 1} & set(unit.layers) for unit in bench.units]
    found = []
    for ranking in rankings:
        reference = by_task.get(ranking.calibration)
        for chosen in (everyone, inner) if reference is None else (everyone,):
            found.append(
                agreed(
                    reference or mean, ranking.scores, chosen, metric=ranking.metric, calibration=ranking.calibration
                )
            )
    return found


def _confusion(
    one: MetricRanking, own: dict[tuple[str, str], tuple[float, ...]], by_task: dict[str, Reference]
) -> Confusion:
    """Hold a metric's ranking on each task (its only one, where it reads nothing) against the task's loss."""
    pairs = [(reference.value.tolist(), own.get((one.metric, task), one.scores)) for task, reference in by_task.items()]
    return confused(one.metric, pairs)


def _reliability(lost: dict[str, Losses], seed: int) -> list[SplitHalf]:
    found = []
    for signal, losses in lost.items():
        if not losses:  # no task offers choices: no gold answer has a probability
            continue
        parts: dict[str, Losses] = {MEAN: losses} | {task: {task: values} for task, values in losses.items()}
        for task, part in parts.items():
            it = split_half(part, seed=seed)
            halves, whole = (None if value is None else round(value, 4) for value in (it.halves, it.whole))
            found.append(
                SplitHalf(
                    task=task,
                    signal=signal,  # type: ignore[arg-type]
                    items=it.items,
                    halves=halves,
                    whole=whole,
                    items_needed=it.items_needed,
                )
            )
    return found


def _means(values: np.ndarray) -> tuple[float, ...]:
    return tuple(round(float(value), 6) for value in values.mean(axis=0))


# What each unit's removal loses on every audit item, as a share of what the intact model has there.


Answered = Mapping[str, Outcomes]  # by task


def accuracy_losses(data: Sequence[TaskData], intact: Answered, without: Sequence[Answered]) -> Losses:
    """Return right answers lost with each unit over the task's accuracy above chance, (items, units) by task.

    The mean over the items is the relevance.
    """
    found = {}
    for task in data:
        base = as_bits(intact[task.task].correct).astype(float)
        own = np.array([as_bits(one[task.task].correct) for one in without], dtype=float)
        found[task.task] = (base - own).T / (base.mean() - task.chance)
    return found


def probability_losses(data: Sequence[TaskData], intact: Answered, without: Sequence[Answered]) -> Losses:
    """Return the gold answer's probability lost over its mean, (items, units), for tasks that offer choices."""
    found = {}
    for task in data:
        known = [one[task.task].gold_probability for one in (intact, *without)]
        if None not in known:
            base, *own = (np.array(values) for values in known)
            found[task.task] = (base - np.array(own)).T / base.mean()
    return found


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
    drop = np.array([lost.mean(axis=0) for lost in losses.values()])  # (tasks, units)
    if len(drop) < 2 or not _varied(drop):
        return []
    reference = _variances(drop)
    found = [_spread(ACCURACY_DROP, reference, noise=item_noise(losses, seed))]
    for metric, scores in by_task.items():
        rows = np.asarray(scores, dtype=float)
        if _varied(rows):
            variances = _variances(rows)
            found.append(_spread(metric, variances, p_value=_wilcoxon(reference, variances)))
    return found


def item_noise(losses: Losses, seed: int) -> float:
    """Return the variance over tasks that the draw of items would give a unit if all tasks agreed, mean over units.

    Two halves of one task's items differ by noise alone: their z-scores differ by twice the variance of a half, and
    the whole has half of a half's.
    """
    one, other = (_z_scored(half) for half in half_losses(losses, SPLITS, seed))
    return float(np.nanmean((one - other) ** 2) / 4)


def _spread(metric: str, variances: Floats, noise: float | None = None, p_value: float | None = None) -> Spread:
    return Spread(
        metric=metric,
        variances=tuple(round(float(value), 4) for value in variances),
        mean=round(float(variances.mean()), 4),
        noise=None if noise is None else round(noise, 4),
        wilcoxon_p=None if p_value is None else float(f"{p_value:.3g}"),
    )


def _wilcoxon(reference: Floats, variances: Floats) -> float:
    from scipy.stats import wilcoxon

    if np.array_equal(reference, variances):
        return 1.0
    return float(wilcoxon(reference, variances).pvalue)


def _varied(rows: Floats) -> bool:
    return bool((np.ptp(rows, axis=1) > 0).all())


def _variances(rows: Floats) -> Floats:
    variances: Floats = _z_scored(rows).var(axis=0, ddof=1)
    return variances


def _z_scored(rows: Floats) -> Floats:
    """Return scores with mean 0 and variance 1 over the units (the last axis); nan where all are the same."""
    spread = rows.std(axis=-1, keepdims=True)
    scored: Floats = (rows - rows.mean(axis=-1, keepdims=True)) / np.where(spread > 0, spread, np.nan)
    return scored
