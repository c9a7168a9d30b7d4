"""Accuracy-drop ablation: the honest measure of a layer is the accuracy that is lost when it is gone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from layerprune.artifacts import BaseTask, Candidate, Outcomes
from layerprune.data.items import EvalSet
from layerprune.errors import TaskError, UsageError
from layerprune.models.model import LoadedModel
from layerprune.registry import option
from layerprune.removal import Removal
from layerprune.scoring import aggregation
from layerprune.scoring.aggregation import BaseOutcomes, Signal, rounded
from layerprune.scoring.cached_evaluator import CachedEvaluator, Importance
from layerprune.scoring.metrics.base import INTACT, Data, Metric
from layerprune.stats import above_chance

SIGNIFICANT = 0.05  # one-sided; a task the intact model does not pass says nothing about its layers


@dataclass(frozen=True)
class Ablation(Metric):
    """Share of the accuracy above chance that is lost when the layers are skipped, mean over tasks."""

    signal: Signal = option(
        "accuracy",
        "what is lost: accuracy, the gold answer's probability (sharper on few items), its margin over the best wrong "
        "answer (in standard deviations of the intact model's), a blend, the mean of the first two, or answers: the "
        "likelihood of what the intact model itself writes (nats per token), beside the accuracy of tasks that offer "
        "choices",
    )
    only: Literal["all", "right"] = option(
        "all", "with signal=answers: all answers, or those that the task counts as right"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.only == "right" and self.signal != "answers":
            raise UsageError(
                "only=right is about answers that the model writes; give signal=answers too, or leave it out"
            )

    unit = "relevance"
    needs = ("items",)
    cost = "one forward pass over the items per removal, shared work computed once"
    source = "arXiv:2605.14075"
    search = "greedy"

    def score(self, loaded: LoadedModel, removals: Sequence[Removal], data: Data) -> list[Candidate]:
        """Answer all items under each removal; relevances, intervals and outcomes per task are in the candidates."""
        if data.evaluator is None or data.eval_set is None:
            raise TaskError("ablation answers questions: give it items with --tasks")
        base = data.evaluator.outcomes([INTACT], "the intact model")[INTACT]
        if self.signal == "answers" and all(own.answer is None for own in base.values()):
            raise TaskError("signal=answers reads what the intact model writes: give score or plan a task that has it")
        intact = BaseOutcomes.of(data.eval_set.data(), base, self.signal, data.objective)
        label = f"ablation of {len(removals)} candidates"
        if data.keep is None or data.keep >= len(removals):
            found, accepted = data.evaluator.outcomes(removals, label), frozenset[Removal]()
        else:
            counted = [name for name, share in intact.shares.items() if share > 0]
            found, accepted = data.evaluator.race(removals, data.keep, importance_of(intact), label, counted)
        judged = [aggregation.judge(intact, removal.layers, found[removal]) for removal in removals]
        left = [one.model_copy(update={"accepted": Removal(one.removal) in accepted}) for one in judged]
        return aggregation.failures_last(left)


def importance_of(intact: BaseOutcomes) -> Importance:
    """Return per-item importances by task whose mean over all items is the score but for a constant.

    Raises ``UsageError`` for an objective whose score is no such mean: a race would stop the wrong candidates.
    """
    if not aggregation.additive(intact.objective):
        words = intact.objective.words
        raise UsageError(f"a race needs a score that is a mean over items, {words} is not; use --no-racing")
    shares = intact.shares
    weights = {
        name: intact.items * shares[name] / len(outcomes.correct) / intact.scale(name)
        for name, outcomes in intact.tasks.items()
    }

    def importance(own: dict[str, Outcomes]) -> dict[str, np.ndarray]:
        return {name: weights[name] * -aggregation.values(intact.signal, name, each) for name, each in own.items()}

    return importance


def examine_base(
    eval_set: EvalSet, evaluators: Sequence[CachedEvaluator], signal: Signal = "accuracy"
) -> dict[str, BaseTask]:
    """Answer all items with the intact model; a task it is not significantly above chance on raises ``TaskError``.

    ``evaluators`` hold the items of ``eval_set`` between them, in order; ``signal`` says what is recorded of them.
    """
    parts = [evaluator.outcomes([INTACT], "the intact model")[INTACT] for evaluator in evaluators]
    base: dict[str, BaseTask] = {}
    for name, task in eval_set.tasks.items():
        own = aggregation.joined([part[name] for part in parts])
        chances = [item.chance for item in task.items]
        p_value = above_chance(own.correct, chances) if own.answer is None else 0.0  # answers have no chance level
        base[name] = BaseTask(
            accuracy=rounded(own.accuracy),
            gold_probability=None if own.mean_gold_probability is None else rounded(own.mean_gold_probability),
            p_value=float(f"{p_value:.3g}"),
            outcomes=aggregation.as_recorded(own, signal),
        )
    refused = [name for name, entry in base.items() if entry.p_value > SIGNIFICANT]
    if refused:
        name, entry = refused[0], base[refused[0]]
        items = len(entry.outcomes.correct)
        chance = sum(item.chance for item in eval_set.tasks[name].items) / items
        others = f" (and {', '.join(refused[1:])})" if len(refused) > 1 else ""
        raise TaskError(
            f"task {name!r}{others}: the intact model is at chance, {entry.accuracy:.3f} on {items} items where "
            f"guessing gives {chance:.3f} (p = {entry.p_value:.2g}); leave it out, or use more items with --limit"
        )
    return base
