"""Judging again what is recorded, by another objective: no forward pass."""

from __future__ import annotations

from layerprune.documents import Candidate, Objective, Scores
from layerprune.errors import UsageError
from layerprune.judgement.candidates import Intact, failures_last, first, judge, outcomes_of
from layerprune.judgement.objective import check_tasks
from layerprune.judgement.signals import signal_of

CHANCE_ROUNDING = 1e-6  # documents keep six decimals


def rejudged(scores: Scores, objective: Objective) -> Scores:
    """Return the scores that the same answers give under another objective.

    Raises ``UsageError`` for scores without answers, and for those of a race: it stopped candidates by the objective it
    was run with. Chance levels are those recorded, of all items.
    """
    if objective == scores.metric.objective:
        return scores
    if not scores.base:
        raise UsageError(f"scores by {scores.metric.words} hold no answers to tasks: --objective needs ablation")
    if any(candidate.stopped for entry in scores.rounds for candidate in entry.candidates):
        raise UsageError("scores.json is of a race, which stopped layers by another objective; plan from the model")
    check_tasks(objective, list(scores.base))
    return _judged_again(scores, objective)


def unclipped(scores: Scores) -> Scores:
    """Return scores by accuracy that layerprune 0.1 clipped where a task fell below chance, as they are judged today.

    All others are returned as they are.
    """
    chances = {data.task: data.chance for data in scores.data}
    judged = [
        (chances[name], task)
        for entry in scores.rounds
        for one in entry.candidates
        for name, task in one.tasks.items()
    ]
    if any(task.relevance == 1 and task.accuracy < chance - CHANCE_ROUNDING for chance, task in judged):
        return _judged_again(scores, scores.metric.objective)
    return scores


def _judged_again(scores: Scores, objective: Objective) -> Scores:
    """Judge the recorded answers; what a race said of a candidate stays."""
    candidates = [one for entry in scores.rounds for one in entry.candidates]
    seen = {task: max(one.tasks[task].items for one in candidates if task in one.tasks) for task in scores.base}
    base = {task: first(entry.outcomes, seen[task]) for task, entry in scores.base.items()}
    intact = Intact.of(scores.data, base, signal_of(scores.metric), objective)

    def again(candidate: Candidate) -> Candidate:
        raced = {"stopped": candidate.stopped, "accepted": candidate.accepted}
        return judge(intact, candidate.removal, outcomes_of(candidate)).model_copy(update=raced)

    rounds = tuple(
        entry.model_copy(update={"candidates": tuple(failures_last([again(one) for one in entry.candidates]))})
        for entry in scores.rounds
    )
    metric = scores.metric.model_copy(update={"objective": objective})
    return scores.model_copy(update={"metric": metric, "rounds": rounds})
