"""From outcomes item by item to one candidate's score: signals, the objective over tasks, reliability. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from layerprune import stats
from layerprune.artifacts import MEAN, Candidate, Interval, MetricRef, Objective, Outcomes, Scores, TaskData, TaskScore
from layerprune.errors import TaskError, UsageError, did_you_mean
from layerprune.search import by_importance

# Signals: what each answered item is worth, and what a loss of it is a share of.
#
# accuracy     1 right, 0 wrong; a loss is a share of the intact model's accuracy above chance (relevance)
# probability  the gold answer's probability among the choices; a share of the intact model's mean
# margin       log-likelihood of the gold answer minus that of the best wrong one, positive where the answer is right;
#              normalised as the task's accuracy is: nats per character of the answer where that is acc_norm, else nats.
#              A loss is counted in standard deviations of the intact model's margins, for a mean margin may be 0
# blend        the mean of accuracy and probability; a share of the intact model's accuracy above chance
# answers      of tasks that have the model write: log-likelihood of the intact model's own answer, nats per token, in
#              which a loss is counted. Of tasks that offer choices: accuracy


Signal = Literal["accuracy", "probability", "margin", "blend", "answers"]
Floats = NDArray[np.float64]


def signal_of(metric: MetricRef) -> Signal:
    """Return the signal a recorded metric went by; accuracy where it has no such option."""
    named = metric.options.get("signal")
    return next((signal for signal in get_args(Signal) if signal == named), "accuracy")


def unit_of(metric: Any) -> str:
    """Return the unit of a metric's scores with the options it has: answers are lost in nats per token."""
    return "nats per token" if getattr(metric, "signal", None) == "answers" else str(metric.unit)


def values(signal: Signal, task: str, outcomes: Outcomes) -> Floats:
    """Return what each item is worth, (items,); raises ``TaskError`` where the items do not have the signal."""
    if signal == "margin":
        if outcomes.margin is None:
            raise TaskError(
                f"task {task!r} offers no choices, or its margins were not recorded: no gold answer has a margin; "
                "use signal=accuracy"
            )
        return np.array(outcomes.margin)
    if signal == "answers" and outcomes.answer is not None:
        return np.array(outcomes.answer)
    correct = stats.as_bits(outcomes.correct).astype(float)
    if signal in ("accuracy", "answers"):
        return correct
    if outcomes.gold_probability is None:
        raise TaskError(f"task {task!r} offers no choices: no gold answer has a probability; use signal=accuracy")
    probability = np.array(outcomes.gold_probability)
    return probability if signal == "probability" else (correct + probability) / 2


def scale(signal: Signal, task: str, base: Outcomes, chance: float) -> float:
    """Return what a loss is a share of, from the intact model's outcomes; ``TaskError`` where that is nothing."""
    if signal == "answers" and base.answer is not None:
        return 1.0
    if signal in ("accuracy", "blend", "answers"):
        level = base.accuracy - chance
    else:
        own = values(signal, task, base)
        level = float(own.mean() if signal == "probability" else own.std())
    if not level > 0:
        raise TaskError(f"task {task!r}: the intact model has no {signal} to lose ({level:.3g}); leave it out")
    return level


# From outcomes to a candidate: one removal's loss on each task, with intervals, and its score.


@dataclass(frozen=True)
class BaseOutcomes:
    """The intact model on the items that judge removals, and how they are judged."""

    tasks: Mapping[str, Outcomes]
    chances: Mapping[str, float]  # accuracy of guessing
    signal: Signal = "accuracy"
    objective: Objective = MEAN

    @classmethod
    def of(
        cls, data: Sequence[TaskData], base: Mapping[str, Outcomes], signal: Signal, objective: Objective
    ) -> BaseOutcomes:
        """Put together what documents hold; ``TaskError`` for a task with no accuracy above chance on these items."""
        chances = {one.task: one.chance for one in data}
        for task, chance in chances.items():
            if base[task].answer is None:
                scale("accuracy", task, base[task], chance)
        return cls({task: base[task] for task in chances}, chances, signal, objective)

    @property
    def items(self) -> int:
        return sum(len(outcomes.correct) for outcomes in self.tasks.values())

    @property
    def shares(self) -> dict[str, float]:
        """What part of the score each task has."""
        return dict(zip(self.tasks, shares(self.objective, list(self.tasks)), strict=True))

    def scale(self, task: str) -> float:
        return scale(self.signal, task, self.tasks[task], self.chances[task])


def as_recorded(outcomes: Outcomes, signal: Signal) -> Outcomes:
    """Return outcomes as documents hold them: margins, half of their size, only where they are the signal."""
    return outcomes if signal == "margin" else outcomes.model_copy(update={"margin": None})


def judge(intact: BaseOutcomes, removal: tuple[int, ...], own: Mapping[str, Outcomes]) -> Candidate:
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


def _loss(intact: BaseOutcomes, task: str, own: Outcomes, confidence: float) -> tuple[float, Interval]:
    if intact.signal == "accuracy" or (intact.signal == "answers" and own.answer is None):
        return _relevance(intact.tasks[task], own, intact.chances[task], confidence)
    base = values(intact.signal, task, intact.tasks[task])[: len(own.correct)]
    return _mean_loss((base - values(intact.signal, task, own)) / intact.scale(task), confidence)


def _disagreement(base: Outcomes, own: Outcomes) -> tuple[float, Interval]:
    """Return the share of agreed tokens that is lost, and its interval, paired over the items seen."""
    before, after = np.array(base.agreed)[: len(own.correct)], np.array(own.agreed)
    value, (low, high) = _mean_loss((before - after) / before.mean(), 0.95)
    return rounded(value), (rounded(low), rounded(high))


def _mean_loss(lost: Floats, confidence: float) -> tuple[float, Interval]:
    """Return the mean over the items and its normal interval."""
    spread = stats.quantile(confidence) * float(lost.std(ddof=1)) / float(np.sqrt(len(lost))) if len(lost) > 1 else 1.0
    value = float(lost.mean())
    return value, (value - spread, value + spread)


def _relevance(base: Outcomes, own: Outcomes, chance: float, confidence: float = 0.95) -> tuple[float, Interval]:
    """Return the relevance and its interval, rounded as documents hold them.

    A removal that was stopped early has seen the first items only: what it lost on those is set against the intact
    model's accuracy on all of them.
    """
    if len(own.correct) == len(base.correct):
        value = stats.relevance(own.accuracy, base.accuracy, chance)
        low, high = stats.relevance_interval(base.correct, own.correct, chance, confidence)
    else:
        seen = first(base, len(own.correct))
        value = stats.relevance(base.accuracy + own.accuracy - seen.accuracy, base.accuracy, chance)
        limits = stats.paired_interval(seen.correct, own.correct, confidence)
        low, high = (-limit / (base.accuracy - chance) for limit in reversed(limits))
    return rounded(value), (rounded(min(low, value)), rounded(max(high, value)))


def _task_score(intact: BaseOutcomes, task: str, own: Outcomes) -> TaskScore:
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


PER_ITEM = ("gold_probability", "margin", "answer", "agreed")  # figures of Outcomes beside what was right


def first(outcomes: Outcomes, items: int) -> Outcomes:
    """Return the outcomes of the first items."""
    lists = {name: getattr(outcomes, name) for name in PER_ITEM}
    cut = {name: None if values is None else values[:items] for name, values in lists.items()}
    return Outcomes(correct=outcomes.correct[:items], **cut)


def joined(pieces: Sequence[Outcomes]) -> Outcomes:
    """Put the outcomes of consecutive items together."""
    lists = {name: [getattr(piece, name) for piece in pieces] for name in PER_ITEM}
    chained = {name: None if None in parts else tuple(chain.from_iterable(parts)) for name, parts in lists.items()}
    correct = "".join(piece.correct for piece in pieces)
    return Outcomes(correct=correct, not_finite=sum(piece.not_finite for piece in pieces), **chained)


def _probability_loss(intact: BaseOutcomes, names: Sequence[str], own: Mapping[str, Outcomes]) -> float:
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


# The objective: what a removal costs over several tasks, and what no task may lose.
#
# mean      the mean over the tasks
# weighted  a weighted mean; a task that is given no weight counts 1
# worst     the largest loss of any task
#
# A floor is a share of the intact model's accuracy above chance that a task must keep, on the items that select:
# piqa=0.9 of an intact .70 asks for .68, since guessing gives .50. Own answers have no chance level: a floor is the
# share of their tokens that are still the likeliest ones. A removal below a floor comes after all that keep them.


EPSILON = 1e-9  # a share that equals its floor but for rounding keeps it


def asked_objective(
    name: str | None, weights: Mapping[str, float] | None, floors: Mapping[str, float] | None
) -> Objective:
    """Return the objective that options describe; raises ``UsageError`` for one that contradicts itself."""
    try:
        chosen = name or ("weighted" if weights else "mean")
        return Objective(name=chosen, weights=dict(weights or {}), floors=dict(floors or {}))
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"--objective: {first['msg'].removeprefix('Value error, ')}") from error


def check_tasks(objective: Objective, tasks: Sequence[str]) -> None:
    """Raise ``UsageError`` for a weight or a floor of a task that is not there, and where no task has any weight."""
    for option, given in (("--weights", objective.weights), ("--floor", objective.floors)):
        for name in given:
            if name not in tasks:
                known = f"{did_you_mean(name, tasks)} Tasks: {', '.join(tasks)}"
                raise UsageError(f"{option} names the task {name!r}, which is not among those that score.{known}")
    if tasks and not sum(objective.weights.get(task, 1.0) for task in tasks) > 0:
        raise UsageError("--weights leaves every task without weight; give one at least a weight above 0")


def task_weights(objective: Objective, tasks: Sequence[str]) -> list[float]:
    """Return the weight of each task, 1 where none is given."""
    weights = [objective.weights.get(task, 1.0) for task in tasks]
    # Tasks without weight alone (a race stopped before the others' first item) count alike: there is nothing else.
    return weights if any(weights) else [1.0] * len(tasks)


def shares(objective: Objective, tasks: Sequence[str]) -> list[float]:
    """Return what part of the score each task has; they add up to 1."""
    weights = task_weights(objective, tasks)
    return [weight / sum(weights) for weight in weights]


def additive(objective: Objective) -> bool:
    """Whether the score is a mean of importances per item: a race can tell from some items what all would say."""
    return objective.name != "worst" and not objective.floors


def combined(
    objective: Objective, tasks: Sequence[str], losses: Sequence[float], intervals: Sequence[Interval]
) -> tuple[float, Interval]:
    """Return the score and its interval.

    Of a mean: MOVER. Of the worst: from the largest lower to the largest upper limit, which holds the largest true loss
    whenever every task's interval holds its own (give intervals at ``1 - 0.05 / tasks``).
    """
    if objective.name == "worst":
        lows, highs = zip(*intervals, strict=True)
        return max(losses), (max(lows), max(highs))
    weights = task_weights(objective, tasks)
    middle = sum(weight * loss for weight, loss in zip(weights, losses, strict=True)) / sum(weights)
    return middle, stats.mean_interval(losses, intervals, weights)


def combined_losses(objective: Objective, tasks: Sequence[str], losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the scores of many removals at once: (..., tasks, removals) to (..., removals)."""
    scores: NDArray[np.float64]
    scores = losses.max(axis=-2) if objective.name == "worst" else np.asarray(shares(objective, tasks)) @ losses
    return scores


def broken_floors(objective: Objective, relevances: Mapping[str, float]) -> dict[str, float]:
    """Return the tasks that keep less than their floor, and what share they miss it by; below chance a task keeps 0."""
    missed = {name: floor - (1 - stats.clipped(relevances[name])) for name, floor in objective.floors.items()}
    return {name: round(share, 6) for name, share in missed.items() if share > EPSILON}


# Judging again what is recorded, by another objective: no forward pass.


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
    intact = BaseOutcomes.of(scores.data, base, signal_of(scores.metric), objective)

    rounds = []
    for entry in scores.rounds:
        recorded = [(one.removal, one.tasks) for one in entry.candidates]
        again = [judge(intact, units, {name: task.outcomes for name, task in own.items()}) for units, own in recorded]
        rounds.append(entry.model_copy(update={"candidates": tuple(failures_last(again))}))
    metric = scores.metric.model_copy(update={"objective": objective})
    return scores.model_copy(update={"metric": metric, "rounds": tuple(rounds)})


# How far a recorded ranking would repeat on other items, from what is recorded of each item: no forward pass.


# A ranking less reliable than this is called noisy: the usual least for a measure in use (Nunnally 1978).
NOISY = 0.7


def can_be_split(scores: Scores) -> bool:
    """Whether three layers or more were ranked by answered items, two or more of each task."""
    candidates = scores.rounds[0].candidates if scores.rounds else ()
    answered = all(candidate.tasks.keys() == scores.base.keys() for candidate in candidates)
    enough = all(task.items > 1 for candidate in candidates for task in candidate.tasks.values())
    return bool(scores.base) and len(candidates) > 2 and answered and enough


def no_halves(metric: str) -> str:
    """Say what it takes to tell how stable a ranking is."""
    needed = "that takes three layers and two answered items of each task"
    return f"the stability of the ranking by {metric} cannot be told: {needed}"


def recorded_losses(scores: Scores) -> stats.Losses:
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


def reliability_of(scores: Scores, task: str | None = None) -> stats.Reliability:
    """Return the split-half reliability of the first round's ranking, stepped up to the items that made it.

    Of the ranking by the objective, or by one task alone. A race that stopped layers early left a ranking of which only
    the items all of them answered can be told: it is not stepped up. Raises ``UsageError`` where there is nothing to
    split.
    """
    if not can_be_split(scores):
        raise UsageError(no_halves(scores.metric.words))
    losses = {name: lost for name, lost in recorded_losses(scores).items() if task in (None, name)}
    combine = partial(combined_losses, scores.metric.objective, list(losses))
    found = stats.split_half(losses, seed=scores.seed, combine=combine)
    candidates = scores.rounds[0].candidates
    items = sum(max(one.tasks[name].items for one in candidates) for name in losses)
    if any(one.stopped for one in candidates):
        return found
    if found.whole is None or found.whole <= 0:
        return replace(found, items=items)
    return replace(found, items=items, whole=stats.stepped(found.whole, items / found.items))


# Two scores.json side by side: do they call the same layers removable?

SHARES = (8, 4, 2)  # the lowest eighth, quarter and half of the layers: what a plan would remove


@dataclass(frozen=True)
class Pair:
    """One unit in both rankings; rank 1 is the first to remove."""

    unit: int
    scores: tuple[float, float]
    ranks: tuple[int, int]


@dataclass(frozen=True)
class ScoresComparison:
    """Two rankings of the same units."""

    pairs: tuple[Pair, ...]  # ordered by unit
    agreement: stats.Agreement
    overlaps: tuple[stats.Overlap, ...]
    only_in_one: tuple[int, ...]  # judged in one of the two, and left out
    shared_items: int  # that both have looked at


def compare_scores(first: Scores, second: Scores) -> ScoresComparison:
    """Compare the first rounds of two documents; raises ``UsageError`` where there is nothing to compare."""
    if first.model.layers != second.model.layers:
        raise UsageError(
            f"cannot compare scores of {first.model.layers} layers ({first.model.id}) "
            f"with scores of {second.model.layers} ({second.model.id})"
        )
    ours, theirs = (
        {one.removal[0]: one for one in scores.rounds[0].candidates if len(one.removal) == 1}
        for scores in (first, second)
    )
    shared = sorted(ours.keys() & theirs.keys())
    if len(shared) < 2:
        raise UsageError(f"the two documents judge {len(shared)} layers in common; at least 2 are needed")
    (a, first_ranks), (b, second_ranks) = _ranked(ours, shared), _ranked(theirs, shared)
    counts = sorted({max(1, len(shared) // share) for share in SHARES})
    seen = [{(data.task, item) for data in scores.data for item in data.fingerprints} for scores in (first, second)]
    return ScoresComparison(
        pairs=tuple(map(Pair, shared, zip(a, b, strict=True), zip(first_ranks, second_ranks, strict=True))),
        agreement=stats.rank_agreement(a, b),
        overlaps=tuple(stats.overlap(first_ranks, second_ranks, count) for count in counts),
        only_in_one=tuple(sorted(ours.keys() ^ theirs.keys())),
        shared_items=len(seen[0] & seen[1]),
    )


def _ranked(candidates: Mapping[int, Candidate], units: Sequence[int]) -> tuple[list[float], list[int]]:
    """Return the score and the rank of each unit; rank 1 is the first to remove."""
    order = sorted(units, key=lambda unit: by_importance(candidates[unit]))
    return [candidates[unit].score for unit in units], [order.index(unit) + 1 for unit in units]
