"""How far a recorded ranking would repeat on other items, from what is recorded of each item: no forward pass."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np

from layerprune.documents import Scores
from layerprune.errors import UsageError
from layerprune.judgement.objective import combined_losses
from layerprune.judgement.signals import scale, signal_of, values
from layerprune.stats import Losses, Reliability, split_half, stepped

# A ranking less reliable than this is called noisy: the usual least for a measure in use (Nunnally 1978).
NOISY = 0.7


def can_be_split(scores: Scores) -> bool:
    """Whether three layers or more were ranked by answered items, two or more of each task."""
    candidates = scores.rounds[0].candidates if scores.rounds else ()
    answered = all(candidate.tasks.keys() == scores.base.keys() for candidate in candidates)
    return (
        bool(scores.base)
        and len(candidates) > 2
        and answered
        and all(task.items > 1 for candidate in candidates for task in candidate.tasks.values())
    )


def no_halves(metric: str) -> str:
    """Say what it takes to tell how stable a ranking is."""
    needed = "that takes three layers and two answered items of each task"
    return f"the stability of the ranking by {metric} cannot be told: {needed}"


def recorded_losses(scores: Scores) -> Losses:
    """Return what each candidate of the first round lost on the items all of them answered, by task, (items, removals).

    A loss is a share of what the metric's signal makes it a share of. A race stops candidates early: what all have seen
    is then a part of the items.
    """
    signal, candidates = signal_of(scores.metric), scores.rounds[0].candidates
    losses = {}
    for data in scores.data:
        task = data.task
        base, answered = scores.base[task].outcomes, [candidate.tasks[task].outcomes for candidate in candidates]
        items = min(len(outcomes.correct) for outcomes in answered)
        own = np.stack([values(signal, task, outcomes)[:items] for outcomes in answered], axis=1)
        losses[task] = (values(signal, task, base)[:items, None] - own) / scale(signal, task, base, data.chance)
    return losses


def reliability_of(scores: Scores, task: str | None = None) -> Reliability:
    """Return the split-half reliability of the first round's ranking, stepped up to the items that made it.

    Of the ranking by the objective, or by one task alone. A race that stopped layers early left a ranking of which only
    the items all of them answered can be told: it is not stepped up. Raises ``UsageError`` where there is nothing to
    split.
    """
    if not can_be_split(scores):
        raise UsageError(no_halves(scores.metric.words))
    losses = {name: lost for name, lost in recorded_losses(scores).items() if task in (None, name)}
    combine = partial(combined_losses, scores.metric.objective, list(losses))
    found = split_half(losses, seed=scores.seed, combine=combine)
    candidates = scores.rounds[0].candidates
    items = sum(max(one.tasks[name].items for one in candidates) for name in losses)
    if any(one.stopped for one in candidates):
        return found
    if found.whole is None or found.whole <= 0:
        return replace(found, items=items)
    return replace(found, items=items, whole=stepped(found.whole, items / found.items))
