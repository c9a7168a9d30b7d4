"""The study: measure everything once, then answer each question from what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from layerprune.analysis.agreement import compare_rankings, metric_rankings
from layerprune.analysis.bench import CALIBRATED_SHARES, DRAWS, SELECTION, SHARES, Bench
from layerprune.analysis.counterexample import counterexample_shown
from layerprune.architecture import load_config, read_architecture
from layerprune.artifacts import Interval, MetricRef, Outcomes, Study
from layerprune.artifacts.study import ALL_TASKS, TEXT, Calibrated, Contrast, IntactModel, PathPoint, RemovalPath
from layerprune.checkpoint import locate
from layerprune.config import StudyConfig
from layerprune.errors import RefusedError, UsageError
from layerprune.files import locked
from layerprune.registry import build, normalised, options_of, spec_of
from layerprune.removal import Removal, parse_drop, parse_layers
from layerprune.scoring.metrics import METRICS, cheapest_search
from layerprune.scoring.metrics.ablation import INTACT
from layerprune.search import Constraints
from layerprune.stats import as_bits, bootstrap_interval, mean_interval, paired_interval
from layerprune.util import SILENT, Progress, tool_versions

WORK = "work"  # of a study's folder: journals of what was measured


def study(request: StudyConfig, folder: Path, *, progress: Progress = SILENT) -> Study:
    """Answer the paper's questions for one model; what was measured stays in ``folder``, and a killed study goes on.

    Raises ``UsageError`` and ``RegistryError`` for what cannot be asked, before the model is loaded; ``TaskError`` for
    a task on which the intact model is at chance.
    """
    metrics = tuple(dict.fromkeys(normalised(METRICS, spec) for spec in request.metrics))
    request = replace(request, metrics=metrics)  # one spelling: what is measured by it is looked up by it
    with locked(folder, request.model), locked(folder / SELECTION):  # each goes again where a study is refused
        check(request)
        bench = Bench.open(request, folder, progress)
        progress.note("ranking the layers by every metric")
        rankings = metric_rankings(bench)
        counts = counts_of(bench.request, bench.constraints)
        choices = [*metric_choices(bench, counts)]
        others = calibrated_choices(bench, choices, counts)
        asked = {r for choice in choices for drawn in choice.removals.values() for r in drawn}
        for task in bench.tasks:
            by_task = (chosen[task] for one in others.values() for chosen in one.values())
            bench.answer([*bench.units, *asked, *by_task], task)
        progress.note("comparing")
        return Study(
            paths=tuple(path_of(bench, choice) for choice in choices),
            contrasts=tuple(contrasts(bench, choices)),
            calibration=tuple(calibrated(bench, others)),
            counterexample=counterexample_shown(),
            rankings=tuple(rankings),
            **compare_rankings(bench, rankings),
            **provenance(bench),
        )


def check(request: StudyConfig) -> None:
    """Raise where a request cannot be carried out, before anything slow starts."""
    if not request.tasks:
        raise UsageError("a study measures accuracy: give tasks, such as --tasks arc_easy,hellaswag")
    if "ablation" not in request.metrics:
        raise UsageError("a study compares metrics with ablation: leave it among the metrics")
    if request.text is not None and not request.text.is_file():
        raise UsageError(f"the text {request.text} is not a file; give a .txt or .jsonl file")
    folder = locate(request.model, request.revision).path
    architecture = read_architecture(load_config(folder, trust_remote_code=request.trust_remote_code))
    limits = Constraints(
        architecture.depth,
        protect=parse_layers(request.protect, architecture.depth),
        must_keep=architecture.must_keep,
        together=architecture.together,
    )
    inner = [move for move in limits.moves if not {0, architecture.depth - 1} & set(move)]
    if len(inner) < 2:
        raise UsageError(
            f"a study compares rankings, also without the end layers: {len(inner)} others may go and two are needed; "
            "protect fewer layers, or take a deeper model"
        )
    for count in request.counts:
        limits.require(count)
    if request.greedy is not None:
        limits.require(parse_drop(request.greedy, architecture.depth, "--greedy"))


def provenance(bench: Bench) -> dict[str, Any]:
    """Return what was studied, on which items, with which tools."""
    session, loaded = bench.session, bench.loaded
    return {
        "model": loaded.ref,
        "metrics": tuple(
            MetricRef(
                name=entry.name, spec=spec_of(entry.name, metric), options=options_of(metric), unit=metric.unit,
                scope=metric.scope, owner=entry.owner,
            )
            for entry, metric in (build(METRICS, spec) for spec in bench.specs)
        ),
        "units": tuple(unit.layers for unit in bench.units),
        "selection": session.data.eval_set.data(),  # type: ignore[union-attr]
        "audit": tuple(one for evaluator in bench.audits.values() for one in evaluator.eval_set.data()),
        "text": bench.text,
        "intact": {
            task: IntactModel(
                selection_accuracy=session.base[task].accuracy, accuracy=base.accuracy, p_value=base.p_value
            )
            for task, base in bench.audit_base.items()
        },
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "device": loaded.device.type,
        "attention": loaded.attention,
        "seed": bench.request.seed,
        "versions": tool_versions(),
    }  # fmt: skip


# Which layers each metric would remove, how many at a time, after reading what.


@dataclass
class MetricChoice:
    """One way to choose, and what it removes at each count (several removals: draws of a baseline)."""

    metric: str
    search: str
    removals: dict[int, tuple[Removal, ...]] = field(default_factory=dict)
    remark: str = ""  # why it ends early


ByCalibration = dict[str, dict[str, Removal]]  # after reading what, then for which task


def counts_of(request: StudyConfig, constraints: Constraints) -> list[int]:
    """Return how many units go at each point: those asked for, or the usual shares of the stack as far as it allows.

    Where greedy's path is to end is one of them, so that every choice can be compared with it there.
    """
    counts = set(request.counts)
    for count in _rounded(SHARES, constraints.depth) if not counts else ():
        with suppress(UsageError):  # no removal of so many exists
            constraints.require(count)
            counts.add(count)
    if request.greedy is not None:
        counts.add(parse_drop(request.greedy, constraints.depth, "--greedy"))
    return sorted(counts)


def _rounded(shares: Sequence[float], depth: int) -> list[int]:
    return sorted({max(1, min(depth - 1, round(share * depth))) for share in shares})


def metric_choices(bench: Bench, counts: Sequence[int]) -> Iterator[MetricChoice]:
    """Yield each metric's choice by scores of single units (of whole blocks where it scores those), baselines last.

    After them comes ablation's greedy path, as far as it was asked for.
    """
    scorer, constraints, first = bench.scorer(), bench.constraints, bench.request.seed
    asked = [(spec, cheapest_search(spec), counts) for spec in bench.specs]
    if bench.request.greedy is not None:
        most = parse_drop(bench.request.greedy, constraints.depth, "--greedy")
        asked.append(("ablation", "greedy", [count for count in counts if count <= most]))
    for metric, search, wanted in asked:
        choice = MetricChoice(metric, search)
        seeds = range(first, first + DRAWS) if metric == "random" else [first]
        racing = search == "greedy"  # one-shot scores were all measured in full
        for count in wanted:
            try:
                found = [scorer.find(metric, search, constraints, count, seed=seed, racing=racing) for seed in seeds]
            except RefusedError as error:  # the architecture allows no further: the path ends here, and says so
                choice.remark = str(error)
                break
            choice.removals[count] = tuple(one.removal for one in found)
        yield choice


def calibrated_choices(
    bench: Bench, choices: Sequence[MetricChoice], counts: Sequence[int]
) -> dict[tuple[str, int], ByCalibration]:
    """Return what the one-shot metrics that need data remove after reading each task, all tasks, and plain text.

    By metric and count: those of the ``counts`` that are nearest to the usual shares. By its own task: each task is
    answered without the layers that were chosen on that task.
    """
    found: dict[tuple[str, int], ByCalibration] = {}
    near = _rounded(CALIBRATED_SHARES, bench.constraints.depth)
    wanted = sorted({min(counts, key=lambda count, share=share: (abs(count - share), count)) for share in near})
    agnostic = {choice.metric: choice.removals for choice in choices if choice.search == "one-shot"}
    on_text = bench.scorer_on_text()
    for spec in bench.specs:
        _, metric = build(METRICS, spec)
        if not metric.needs or cheapest_search(spec) != "one-shot":
            continue
        scorers = {task: bench.scorer_for(task) for task in bench.tasks}
        if on_text is not None and "text" in metric.needs:
            scorers[TEXT] = on_text
        for count in (count for count in wanted if count in agnostic[spec]):
            try:
                alone = {
                    name: scorer.find(spec, "one-shot", bench.constraints, count, racing=False).removal
                    for name, scorer in scorers.items()
                }
            except RefusedError:  # the architecture allows no further by this ranking; smaller counts are compared
                break
            (everyone,) = agnostic[spec][count]
            removals = {"own task": {task: alone[task] for task in bench.tasks}}
            removals[ALL_TASKS] = dict.fromkeys(bench.tasks, everyone)
            if TEXT in scorers:
                removals[TEXT] = dict.fromkeys(bench.tasks, alone[TEXT])
            found[spec, count] = removals
    return found


# Accuracy on unseen items along each choice's path, and how choices differ, item by item.


def path_of(bench: Bench, choice: MetricChoice) -> RemovalPath:
    """Return the accuracy at every count, with its paired difference from the intact model."""
    intact, points = answered(bench, [INTACT]), []
    for count, drawn in choice.removals.items():
        found = answered(bench, drawn)
        points.append(
            PathPoint(
                count=count,
                removals=tuple(removal.layers for removal in drawn),
                accuracy=round(mean_accuracy(found), 6),
                tasks={task: round(float(values.mean()), 6) for task, values in found.items()},
                **_compared(intact, found),
            )
        )
    return RemovalPath(metric=choice.metric, search=choice.search, points=tuple(points), remark=choice.remark)


def contrasts(bench: Bench, choices: Sequence[MetricChoice]) -> Iterator[Contrast]:
    """Yield ablation's one-shot accuracy minus every other choice's, count by count."""
    ours = next(choice for choice in choices if (choice.metric, choice.search) == ("ablation", "one-shot"))
    for choice in choices:
        if choice is ours:
            continue
        for count in sorted(choice.removals.keys() & ours.removals.keys()):
            theirs, own = choice.removals[count], ours.removals[count]
            same = theirs == own
            found = _compared(answered(bench, theirs), answered(bench, own), same)
            yield Contrast(metric=choice.metric, search=choice.search, count=count, same=same, **found)


def calibrated(bench: Bench, choices: dict[tuple[str, int], ByCalibration]) -> Iterator[Calibrated]:
    """Yield each metric's accuracy after reading its own task, all tasks, and text; differences from all tasks."""
    for (metric, count), by_calibration in choices.items():
        answers = {
            calibration: answers_of([{task: bench.outcomes(removal, task) for task, removal in removals.items()}])
            for calibration, removals in by_calibration.items()
        }
        for calibration, found in answers.items():
            same = by_calibration[calibration] == by_calibration[ALL_TASKS]
            yield Calibrated(
                metric=metric,
                calibration=calibration,  # type: ignore[arg-type]
                count=count,
                accuracy=round(mean_accuracy(found), 6),
                same=same,
                **_compared(answers[ALL_TASKS], found, same),
            )


def _compared(base: Answers, other: Answers, same: bool = False) -> dict[str, Any]:
    """Return the paired difference; the same layers give the same answers, and no flips leave nothing to estimate."""
    value, (low, high) = (0.0, (0.0, 0.0)) if same else difference(base, other)
    return {"difference": round(value, 6), "interval": (round(low, 6), round(high, 6))}


def answered(bench: Bench, removals: Sequence[Removal]) -> Answers:
    """Return the audit answers, averaged over removals that are draws of one baseline."""
    return answers_of([{task: bench.outcomes(removal, task) for task in bench.tasks} for removal in removals])


# Right and wrong answers of several models on the same items: means over tasks, and paired differences.


Answers = Mapping[str, NDArray[np.float64]]  # by task, one value an item: 1 right, 0 wrong, between: a mean over draws


def answers_of(drawn: Sequence[Mapping[str, Outcomes]]) -> dict[str, NDArray[np.float64]]:
    """Return each item's share of right answers over several removals (draws of one baseline) on the same items."""
    return {
        task: np.mean([as_bits(outcomes[task].correct).astype(float) for outcomes in drawn], axis=0)
        for task in drawn[0]
    }


def mean_accuracy(answers: Answers) -> float:
    """Return the mean over the tasks of the accuracies."""
    return float(np.mean([values.mean() for values in answers.values()]))


def difference(base: Answers, other: Answers) -> tuple[float, Interval]:
    """Return accuracy(other) - accuracy(base), mean over tasks, and its 95 % interval paired over the items.

    Right-or-wrong answers: Tango's interval a task, joined by MOVER. Means over draws are neither right nor wrong:
    stratified BCa bootstrap.
    """
    if base.keys() != other.keys():
        raise ValueError(f"answers to {sorted(base)} cannot be compared with answers to {sorted(other)}")
    seen = mean_accuracy(other) - mean_accuracy(base)
    if all(np.isin(values, (0.0, 1.0)).all() for side in (base, other) for values in side.values()):
        pairs = [(base[task].astype(bool), other[task].astype(bool)) for task in base]
        return seen, mean_interval(
            [float(b.mean()) - float(a.mean()) for a, b in pairs], [paired_interval(a, b) for a, b in pairs]
        )
    return seen, bootstrap_interval([other[task] - base[task] for task in base])
