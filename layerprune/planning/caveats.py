"""What a reader of a plan has to know before trusting it: the plan's warnings."""

from __future__ import annotations

from collections.abc import Iterator

from layerprune.documents import Limits, Prediction, Scores, Units
from layerprune.judgement import NOISY, can_be_split, reliability_of
from layerprune.planners.base import OVERFLOW
from layerprune.removal import Removal
from layerprune.stats import TARGET, clipped, relevance

NAMED = 5  # removals named one by one


def caveats(scores: Scores, predicted: Prediction | None) -> tuple[str, ...]:
    """Return what is to be said about how the removals were judged, and on how much."""
    return (*_failures(scores), *_noise(scores), *_floors(scores, predicted))


def ends(scores: Scores, removal: Units, limits: Limits) -> Iterator[str]:
    """Say where the metric let the first or the last layer go: they read the embeddings and shape the output.

    Nothing is to be said where it was asked for: nothing else may go, or what goes has to keep the period.
    """
    last = scores.model.layers - 1
    gone = [unit for unit in (0, last) if unit in removal]
    free = {unit for one in scores.rounds[0].candidates for unit in one.removal} - {*limits.protect, *removal}
    if not gone or not free or limits.keep_period:
        return
    which = " and ".join(f"{'the first' if unit == 0 else 'the last'} (layer {unit})" for unit in gone)
    keep = ",".join("-1" if unit else "0" for unit in gone)
    verb, it = ("are", "them") if len(gone) > 1 else ("is", "it")
    yield f"{which} of {last + 1} layers {verb} to go, which models seldom bear well: --protect {keep} keeps {it}"


def _failures(scores: Scores) -> Iterator[str]:
    """Name the removals without which the model's figures are not finite, the least of each kind."""
    asked = {one.removal for entry in scores.rounds for one in entry.candidates if one.not_finite}
    failed = [units for units in asked if not any(set(other) < set(units) for other in asked)]
    if failed:
        named = ", ".join(str(Removal.from_layers(units)) for units in sorted(failed)[:NAMED])
        more = f" and {len(failed) - NAMED} others" if len(failed) > NAMED else ""
        yield f"without {named}{more} the model's figures are not finite: ranked as the most harmful ({OVERFLOW})"


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
        if own.agreed is not None:
            what, kept = "the tokens of the model's own answers", own.agreed / (own.base_agreed or 1)
        elif own.base_accuracy > chances[task]:
            what = "its accuracy above chance"
            kept = 1 - clipped(relevance(own.accuracy, own.base_accuracy, chances[task]))
        else:
            continue
        if kept < floor:
            yield (
                f"{task} keeps its floor of {floor:g} on the items that selected, but {kept:.2f} of {what} on "
                f"{own.items} others"
            )
