"""Accuracy on unseen items along each choice's path, and how choices differ, item by item."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from layerprune.analysis.answers import Answers, answers_of, difference, mean_accuracy
from layerprune.analysis.bench import Bench
from layerprune.analysis.choices import CalibratedChoice, Choice
from layerprune.documents.study import Calibrated, Contrast, Path, Point
from layerprune.metrics.ablation import INTACT
from layerprune.removal import Removal


def path_of(bench: Bench, choice: Choice) -> Path:
    """Return the accuracy at every count, with its paired difference from the intact model."""
    intact = answered(bench, [INTACT])
    return Path(
        metric=choice.metric,
        search=choice.search,
        points=tuple(_point(bench, intact, count, drawn) for count, drawn in choice.removals.items()),
        remark=choice.remark,
    )


def contrasts(bench: Bench, choices: Sequence[Choice]) -> Iterator[Contrast]:
    """Yield ablation's one-shot accuracy minus every other choice's, count by count."""
    ours = next(choice for choice in choices if (choice.metric, choice.search) == ("ablation", "one-shot"))
    for choice in choices:
        if choice is ours:
            continue
        for count in sorted(choice.removals.keys() & ours.removals.keys()):
            theirs, own = choice.removals[count], ours.removals[count]
            yield Contrast(
                metric=choice.metric,
                search=choice.search,
                count=count,
                **_compared(answered(bench, theirs), answered(bench, own), same=theirs == own),
            )


def calibrated(bench: Bench, choices: Sequence[Choice], others: Sequence[CalibratedChoice]) -> Iterator[Calibrated]:
    """Yield each metric's accuracy after reading its own task, all tasks, and text; differences from all tasks.

    By its own task: each task is answered without the layers that were chosen on that task.
    """
    agnostic = {choice.metric: choice.removals for choice in choices if choice.search == "one-shot"}
    for other in others:
        if other.count not in agnostic[other.metric]:
            continue
        (chosen,) = agnostic[other.metric][other.count]
        everyone = answered(bench, [chosen])
        own = {task: answered(bench, [removal], [task])[task] for task, removal in other.own.items()}
        rows = [("own task", own, set(other.own.values()) == {chosen}), ("all tasks", everyone, True)]
        if other.text is not None:
            rows.append(("text", answered(bench, [other.text]), other.text == chosen))
        for calibration, found, same in rows:
            yield Calibrated(
                metric=other.metric,
                calibration=calibration,  # type: ignore[arg-type]
                count=other.count,
                accuracy=round(mean_accuracy(found), 6),
                **_compared(everyone, found, same),
            )


def _compared(base: Answers, other: Answers, same: bool) -> dict[str, Any]:
    """Return the paired difference; the same layers give the same answers, and no flips leave nothing to estimate."""
    value, interval = (0.0, (0.0, 0.0)) if same else difference(base, other)
    return {"difference": round(value, 6), "interval": _rounded(interval), "same": same}


def answered(bench: Bench, removals: Sequence[Removal], tasks: Sequence[str] | None = None) -> Answers:
    """Return the audit answers, averaged over removals that are draws of one baseline."""
    names = tasks or bench.tasks
    return answers_of([{task: bench.outcomes(removal, task) for task in names} for removal in removals])


def _point(bench: Bench, intact: Answers, count: int, drawn: Sequence[Removal]) -> Point:
    found = answered(bench, drawn)
    value, interval = difference(intact, found)
    return Point(
        count=count,
        removals=tuple(removal.layers for removal in drawn),
        accuracy=round(mean_accuracy(found), 6),
        difference=round(value, 6),
        interval=_rounded(interval),
        tasks={task: round(float(values.mean()), 6) for task, values in found.items()},
    )


def _rounded(interval: tuple[float, float]) -> tuple[float, float]:
    return round(interval[0], 6), round(interval[1], 6)
