"""Judging again what is recorded, by another objective: no forward pass."""

from __future__ import annotations

from layerprune.documents import Objective, Round, Scores
from layerprune.errors import UsageError
from layerprune.judgement.candidates import Intact, failures_last, first, judge, outcomes_of
from layerprune.judgement.objective import check_tasks
from layerprune.judgement.signals import signal_of


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
    candidates = [one for entry in scores.rounds for one in entry.candidates]
    seen = {task: max(one.tasks[task].items for one in candidates if task in one.tasks) for task in scores.base}
    base = {task: first(entry.outcomes, seen[task]) for task, entry in scores.base.items()}
    intact = Intact.of(scores.data, base, signal_of(scores.metric), objective)

    def again(entry: Round) -> Round:
        candidates = [judge(intact, one.removal, outcomes_of(one)) for one in entry.candidates]
        return entry.model_copy(update={"candidates": tuple(failures_last(candidates))})

    rounds = tuple(map(again, scores.rounds))
    metric = scores.metric.model_copy(update={"objective": objective})
    return scores.model_copy(update={"metric": metric, "rounds": rounds})
