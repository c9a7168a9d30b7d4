"""From outcomes to a candidate: one removal's loss on each task, with intervals, and its score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from layerprune.documents import MEAN, Candidate, Interval, Objective, Outcomes, TaskData, TaskScore, Units
from layerprune.judgement.objective import broken_floors, combined, shares
from layerprune.judgement.signals import Signal, scale, values
from layerprune.stats import paired_interval, quantile, relevance, relevance_interval


@dataclass(frozen=True)
class Intact:
    """The intact model on the items that judge removals, and how they are judged."""

    tasks: Mapping[str, Outcomes]
    chances: Mapping[str, float]  # accuracy of guessing
    signal: Signal = "accuracy"
    objective: Objective = MEAN

    @classmethod
    def of(
        cls, data: Sequence[TaskData], base: Mapping[str, Outcomes], signal: Signal, objective: Objective
    ) -> Intact:
        """Put together what documents hold; ``TaskError`` for a task with no accuracy above chance on these items."""
        chances = {one.task: one.chance for one in data}
        for task, chance in chances.items():
            if base[task].answer is None:
                scale("accuracy", task, base[task], chance)
        return cls({task: base[task] for task in chances}, chances, signal, objective)

    @property
    def items(self) -> int:
        return sum(len(outcomes.correct) for outcomes in self.tasks.values())

    def scale(self, task: str) -> float:
        return scale(self.signal, task, self.tasks[task], self.chances[task])


def outcomes_of(candidate: Candidate) -> dict[str, Outcomes]:
    """Return what a recorded candidate did, task by task."""
    return {name: task.outcomes for name, task in candidate.tasks.items()}


def as_recorded(outcomes: Outcomes, signal: Signal) -> Outcomes:
    """Return outcomes as documents hold them: margins, half of their size, only where they are the signal."""
    return outcomes if signal == "margin" else outcomes.model_copy(update={"margin": None})


def judge(intact: Intact, removal: Units, own: Mapping[str, Outcomes]) -> Candidate:
    """Turn one removal's outcomes, on all items or on those it ran over before it was stopped, into its score."""
    names = [name for name in intact.tasks if name in own]  # not there: stopped before the first item of a short task
    worst = intact.objective.name == "worst"
    confidence = 1 - 0.05 / len(names) if worst else 0.95
    losses = [_loss(intact, name, own[name], confidence) for name in names]
    score, limits = combined(intact.objective, names, [loss for loss, _ in losses], [each for _, each in losses])
    tasks = {name: _task_score(intact, name, own[name]) for name in names}
    return Candidate(
        removal=removal,
        score=rounded(score),
        interval=(rounded(limits[0]), rounded(limits[1])),
        tie_break=rounded(_probability_loss(intact, names, own)),
        stopped=sum(len(own[name].correct) for name in names) < intact.items,
        not_finite=any(own[name].not_finite for name in names),
        below_floor=broken_floors(intact.objective, {name: task.relevance for name, task in tasks.items()}),
        tasks=tasks,
    )


def failures_last(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Lift the scores of candidates whose figures are not finite above all others asked beside them.

    By as much as the others differ: any number above theirs would do, and documents hold no infinity.
    """
    failed = [one.score for one in candidates if one.not_finite]
    others = [one.score for one in candidates if not one.not_finite]
    if not failed or not others:
        return list(candidates)
    lift = max(others) + ((max(others) - min(others)) or 1.0) - min(failed)
    return [
        one.model_copy(update={"score": rounded(one.score + lift), "interval": None}) if one.not_finite else one
        for one in candidates
    ]


def _loss(intact: Intact, task: str, own: Outcomes, confidence: float) -> tuple[float, Interval]:
    if intact.signal == "accuracy" or (intact.signal == "answers" and own.answer is None):
        return _relevance(intact.tasks[task], own, intact.chances[task], confidence)
    base = values(intact.signal, task, intact.tasks[task])[: len(own.correct)]
    lost = (base - values(intact.signal, task, own)) / intact.scale(task)
    spread = quantile(confidence) * float(lost.std(ddof=1)) / float(np.sqrt(len(lost))) if len(lost) > 1 else 1.0
    value = float(lost.mean())
    return value, (value - spread, value + spread)


def _disagreement(base: Outcomes, own: Outcomes) -> tuple[float, Interval]:
    """Return the share of agreed tokens that is lost, and its interval: normal, paired over the items seen."""
    before, after = np.array(base.agreed)[: len(own.correct)], np.array(own.agreed)
    lost = (before - after) / before.mean()
    spread = quantile(0.95) * float(lost.std(ddof=1)) / float(np.sqrt(len(lost))) if len(lost) > 1 else 1.0
    value = float(lost.mean())
    return rounded(value), (rounded(value - spread), rounded(value + spread))


def _relevance(base: Outcomes, own: Outcomes, chance: float, confidence: float = 0.95) -> tuple[float, Interval]:
    """Return the relevance and its interval, rounded as documents hold them.

    A removal that was stopped early has seen the first items only: what it lost on those is set against the intact
    model's accuracy on all of them.
    """
    if len(own.correct) == len(base.correct):
        value = relevance(own.accuracy, base.accuracy, chance)
        low, high = relevance_interval(base.correct, own.correct, chance, confidence)
    else:
        seen = first(base, len(own.correct))
        value = relevance(base.accuracy + own.accuracy - seen.accuracy, base.accuracy, chance)
        limits = paired_interval(seen.correct, own.correct, confidence)
        low, high = (-limit / (base.accuracy - chance) for limit in reversed(limits))
    return rounded(value), (rounded(min(low, value)), rounded(max(high, value)))


def _task_score(intact: Intact, task: str, own: Outcomes) -> TaskScore:
    base = intact.tasks[task]
    written = own.answer is not None
    value, limits = _disagreement(base, own) if written else _relevance(base, own, intact.chances[task])
    probability = own.mean_gold_probability
    return TaskScore(
        relevance=value,
        interval=limits,
        accuracy=rounded(own.accuracy),
        gold_probability=None if probability is None else rounded(probability),
        items=len(own.correct),
        outcomes=as_recorded(own, intact.signal),
    )


def first(outcomes: Outcomes, items: int) -> Outcomes:
    """Return the outcomes of the first items."""
    lists = {name: getattr(outcomes, name) for name in ("gold_probability", "margin", "answer", "agreed")}
    cut = {name: None if values is None else values[:items] for name, values in lists.items()}
    return Outcomes(correct=outcomes.correct[:items], **cut)


def _probability_loss(intact: Intact, names: Sequence[str], own: Mapping[str, Outcomes]) -> float:
    """Return the loss of mean gold probability over the tasks that have one; it orders equal scores."""
    losses: dict[str, float] = {}
    for name in names:
        before = first(intact.tasks[name], len(own[name].correct)).mean_gold_probability
        after = own[name].mean_gold_probability
        if before is not None and after is not None:
            losses[name] = before - after
    parts = shares(intact.objective, list(losses))
    return sum(part * loss for part, loss in zip(parts, losses.values(), strict=True))


def rounded(value: float) -> float:
    """Keep six decimals: more is noise, and documents are compared byte by byte."""
    return round(float(value), 6)
