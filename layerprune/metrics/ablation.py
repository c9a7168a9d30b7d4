"""Accuracy-drop ablation: the honest measure of a layer is the accuracy that is lost when it is gone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np

from layerprune.documents import BaseTask, Candidate, Interval, Outcomes, TaskScore
from layerprune.engine import Examiner
from layerprune.engine.exam import joined
from layerprune.engine.examiner import Harm
from layerprune.errors import TaskError
from layerprune.metrics.base import Data, Needs, Scope
from layerprune.removal import Removal
from layerprune.stats import above_chance, as_bits, mean_interval, paired_interval, relevance, relevance_interval
from layerprune.subject import Subject
from layerprune.tasks import Questions

SIGNIFICANT = 0.05  # one-sided; a task the intact model does not pass says nothing about its layers
INTACT = Removal(())
Signal = Literal["accuracy", "probability"]


@dataclass(frozen=True)
class Ablation:
    """Share of the accuracy above chance that is lost when the layers are skipped, mean over tasks."""

    signal: Signal = field(
        default="accuracy",
        metadata={"help": "what is lost: accuracy, or the gold answer's probability (sharper on few items)"},
    )

    unit: ClassVar[str] = "relevance"
    scope: ClassVar[Scope] = "any set"
    runs_without: ClassVar[bool] = True
    needs: ClassVar[Needs] = "items"
    cost: ClassVar[str] = "one evaluation per removal, shared work computed once"
    source: ClassVar[str] = "arXiv:2605.14075"
    search: ClassVar[str] = "greedy"

    def score(self, subject: Subject, removals: Sequence[Removal], data: Data) -> list[Candidate]:
        """Answer all items under each removal; relevances, intervals and outcomes per task are in the candidates."""
        if data.examiner is None or data.questions is None:
            raise TaskError("ablation answers questions: give it items with --tasks")
        base = data.examiner.outcomes([INTACT], "the intact model")[INTACT]
        label = f"ablation of {len(removals)} candidates"
        if data.keep is None or data.keep >= len(removals):
            found = data.examiner.outcomes(removals, label)
        else:
            found = data.examiner.race(removals, data.keep, self._harm(data.questions, base), label)
        return [self.candidate(data.questions, removal, base, found[removal]) for removal in removals]

    def _harm(self, questions: Questions, base: dict[str, Outcomes]) -> Harm:
        """Return per-item harms whose mean over all items is the score but for a constant."""
        total = len(questions)
        weights = {
            data.task: total / len(base) / data.items / self._level(base[data.task], data.chance)
            for data in questions.data()
        }

        def harm(own: dict[str, Outcomes]) -> np.ndarray:
            return np.concatenate([weights[name] * (1 - self._signal(outcomes)) for name, outcomes in own.items()])

        return harm

    def _level(self, base: Outcomes, chance: float) -> float:
        """Return what a loss is a share of: accuracy above chance, or the gold answer's probability."""
        return base.accuracy - chance if self.signal == "accuracy" else float(self._signal(base).mean())

    def _signal(self, outcomes: Outcomes) -> np.ndarray:
        if self.signal == "accuracy":
            return as_bits(outcomes.correct).astype(float)
        if outcomes.gold_probability is None:
            raise TaskError("a task offers no choices, so no gold answer has a probability; use signal=accuracy")
        return np.array(outcomes.gold_probability)

    def candidate(
        self, questions: Questions, removal: Removal, base: dict[str, Outcomes], own: dict[str, Outcomes]
    ) -> Candidate:
        """Turn one removal's outcomes, on all items or on those it ran over before it was stopped, into its score."""
        tasks: dict[str, TaskScore] = {}
        scores, intervals = [], []
        for data in questions.data():
            name = data.task
            if name not in own:  # stopped before the first item of a short task
                continue
            tasks[name] = judged = task_score(base[name], own[name], data.chance)
            value, limits = judged.relevance, judged.interval
            if self.signal == "probability":
                value, limits = probability_loss(name, first(base[name], len(own[name].correct)), own[name])
            scores.append(value)
            intervals.append(limits)
        low, high = mean_interval(scores, intervals)
        return Candidate(
            removal=removal.units,
            score=rounded(sum(scores) / len(scores)),
            interval=(rounded(low), rounded(high)),
            tie_break=rounded(mean_probability_loss(base, own)),
            stopped=sum(len(outcomes.correct) for outcomes in own.values()) < len(questions),
            tasks=tasks,
        )


def task_score(base: Outcomes, own: Outcomes, chance: float) -> TaskScore:
    """Compare one removal with the intact model on one task.

    A removal that was stopped early has seen the first items only: what it lost on those is set against the intact
    model's accuracy on all of them.
    """
    seen = first(base, len(own.correct))
    if len(own.correct) == len(base.correct):
        value = relevance(own.accuracy, base.accuracy, chance)
        low, high = relevance_interval(base.correct, own.correct, chance)
    else:
        value = relevance(base.accuracy + own.accuracy - seen.accuracy, base.accuracy, chance)
        limits = paired_interval(seen.correct, own.correct)
        low, high = (min(1.0, -limit / (base.accuracy - chance)) for limit in reversed(limits))
    probability = own.mean_gold_probability
    return TaskScore(
        relevance=rounded(value),
        interval=(rounded(min(low, value)), rounded(max(high, value))),
        accuracy=rounded(own.accuracy),
        gold_probability=None if probability is None else rounded(probability),
        items=len(own.correct),
        outcomes=own,
    )


def probability_loss(task: str, base: Outcomes, own: Outcomes) -> tuple[float, Interval]:
    """Return the share of the gold answer's mean probability that is lost, and its 95 % interval (paired, normal)."""
    if base.gold_probability is None or own.gold_probability is None:
        raise TaskError(f"task {task!r} offers no choices: no gold answer has a probability; use signal=accuracy")
    before, after = np.array(base.gold_probability), np.array(own.gold_probability)
    level = float(before.mean())
    lost = (before - after) / level
    spread = 1.96 * float(lost.std(ddof=1)) / float(np.sqrt(len(lost))) if len(lost) > 1 else 1.0
    value = float(lost.mean())
    return value, (value - spread, value + spread)


def first(outcomes: Outcomes, items: int) -> Outcomes:
    """Return the outcomes of the first items."""
    known = outcomes.gold_probability
    return Outcomes(correct=outcomes.correct[:items], gold_probability=None if known is None else known[:items])


def mean_probability_loss(base: dict[str, Outcomes], own: dict[str, Outcomes]) -> float:
    """Return the loss of mean gold probability, averaged over the tasks that have one; it orders equal accuracies."""
    losses = [
        first(base[name], len(own[name].correct)).mean_gold_probability - own[name].mean_gold_probability  # type: ignore[operator]
        for name in own
        if base[name].gold_probability is not None and own[name].gold_probability is not None
    ]
    return sum(losses) / len(losses) if losses else 0.0


def examine_base(questions: Questions, examiners: Sequence[Examiner]) -> dict[str, BaseTask]:
    """Answer all items with the intact model; a task it is not significantly above chance on raises ``TaskError``.

    ``examiners`` hold the items of ``questions`` between them, in order.
    """
    parts = [examiner.outcomes([INTACT], "the intact model")[INTACT] for examiner in examiners]
    base: dict[str, BaseTask] = {}
    for name, task in questions.tasks.items():
        own = joined([part[name] for part in parts])
        chances = [item.chance for item in task.items]
        p_value = above_chance(own.correct, chances)
        base[name] = BaseTask(
            accuracy=rounded(own.accuracy),
            gold_probability=None if own.mean_gold_probability is None else rounded(own.mean_gold_probability),
            p_value=float(f"{p_value:.3g}"),
            outcomes=own,
        )
    refused = [name for name, entry in base.items() if entry.p_value > SIGNIFICANT]
    if refused:
        name, entry = refused[0], base[refused[0]]
        items = len(entry.outcomes.correct)
        chance = sum(item.chance for item in questions.tasks[name].items) / items
        others = f" (and {', '.join(refused[1:])})" if len(refused) > 1 else ""
        raise TaskError(
            f"task {name!r}{others}: the intact model is at chance, {entry.accuracy:.3f} on {items} items where "
            f"guessing gives {chance:.3f} (p = {entry.p_value:.2g}); leave it out, or use more items with --limit"
        )
    return base


def rounded(value: float) -> float:
    """Keep six decimals: more is noise, and documents are compared byte by byte."""
    return round(float(value), 6)
