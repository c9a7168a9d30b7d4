"""What a reader of a plan has to know before trusting it: the plan's warnings."""

from __future__ import annotations

from collections.abc import Iterator

from layerprune.documents import Prediction, Scores
from layerprune.judgement import NOISY, can_be_split, reliability_of
from layerprune.stats import TARGET


def caveats(scores: Scores, predicted: Prediction | None) -> tuple[str, ...]:
    """Return what is to be said about how the removals were judged, and on how much."""
    return (*_operator(scores), *_noise(scores), *_floors(scores, predicted))


def _operator(scores: Scores) -> Iterator[str]:
    operator = scores.metric.operator
    if operator != "skip":
        healing = " (layerprune heal --method rescale)" if operator == "rescale" else ""
        yield (
            f"judged, and predicted, with the operator {operator}: export skips the layers plainly, which costs "
            f"something else unless the checkpoint is healed so{healing}"
        )


def _noise(scores: Scores) -> Iterator[str]:
    """Say where other items would have ranked the layers otherwise."""
    if not can_be_split(scores):
        return
    found = reliability_of(scores)
    if found.whole is not None and found.whole >= NOISY:
        return
    seen = "not to be told, all layers alike" if found.whole is None else f"{found.whole:.2f}"
    more = "" if found.items_needed is None else f"; about {found.items_needed:,} items would give {TARGET}"
    raced = any(candidate.stopped for candidate in scores.rounds[0].candidates)
    items = f"the {found.items:,} items that all layers saw" if raced else f"{found.items:,} items"
    yield f"the ranking is noisy: its split-half reliability on {items} is {seen}{more} (--limit)"


def _floors(scores: Scores, predicted: Prediction | None) -> Iterator[str]:
    """Say where a floor that holds on the items that selected does not on those held back."""
    chances = {data.task: data.chance for data in scores.data}
    for task, floor in scores.metric.objective.floors.items():
        if predicted is None:
            yield f"whether {task} keeps its floor of {floor:g} without all of these layers was not measured"
            continue
        own = predicted.tasks[task]
        if own.base_accuracy <= chances[task]:
            continue
        kept = (own.accuracy - chances[task]) / (own.base_accuracy - chances[task])
        if kept < floor:
            yield (
                f"{task} keeps its floor of {floor:g} on the items that selected, but {kept:.2f} of its accuracy above "
                f"chance on {own.items} others"
            )
