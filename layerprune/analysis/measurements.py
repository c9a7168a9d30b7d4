"""The study: measure everything once, then answer each question from what was measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from layerprune.analysis.agreement import judged, ranked
from layerprune.analysis.bench import CALIBRATED_SHARES, DRAWS, SELECTION, SHARES, Bench
from layerprune.analysis.counterexample import counterexample_shown
from layerprune.architecture import load_config, read_architecture
from layerprune.artifacts import MetricRef, Outcomes, Study
from layerprune.artifacts.study import Calibrated, Contrast, IntactModel, PathPoint, RemovalPath
from layerprune.checkpoint import locate
from layerprune.config import StudyConfig
from layerprune.errors import LayerpruneError, RefusedError, UsageError
from layerprune.files import locked
from layerprune.planner.search_runner import SearchRunner
from layerprune.registry import build, normalised, options_of, spec_of
from layerprune.removal import Removal, parse_drop, parse_layers
from layerprune.scoring.metrics import METRICS
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
        return _studied(Bench.open(request, folder, progress), progress)


def _studied(bench: Bench, progress: Progress) -> Study:
    request = bench.request
    counts = counts_of(request, bench.constraints)
    progress.note("ranking the layers by every metric")
    rankings = ranked(bench)
    choices = [*metric_choices(bench, counts)]
    if greedy := greedy_choice(bench, counts):
        choices.append(greedy)
    others = [*calibrated_choices(bench, calibrated_counts(counts, bench.constraints.depth))]
    asked = {r for choice in choices for drawn in choice.removals.values() for r in drawn}
    asked |= {other.text for other in others if other.text is not None}
    for task in bench.tasks:
        bench.answer([*bench.units, *asked, *(other.own[task] for other in others)], task)
    progress.note("comparing")
    paths = tuple(path_of(bench, choice) for choice in choices)
    return Study(
        paths=paths,
        contrasts=tuple(contrasts(bench, choices)),
        calibration=tuple(calibrated(bench, choices, others)),
        counterexample=counterexample_shown(),
        rankings=tuple(rankings),
        **judged(bench, rankings),
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
    request, loaded = bench.request, bench.loaded
    return {
        "model": loaded.ref,
        "metrics": tuple(_metric_ref(spec) for spec in bench.specs),
        "units": tuple(unit.layers for unit in bench.units),
        "selection": bench.session.data.eval_set.data(),  # type: ignore[union-attr]
        "audit": tuple(one for evaluator in bench.audits.values() for one in evaluator.eval_set.data()),
        "text": bench.text,
        "intact": {
            task: IntactModel(
                selection_accuracy=bench.session.base[task].accuracy, accuracy=base.accuracy, p_value=base.p_value
            )
            for task, base in bench.audit_base.items()
        },
        "dtype": str(loaded.dtype).removeprefix("torch."),
        "device": loaded.device.type,
        "seed": request.seed,
        "versions": tool_versions(),
    }


def _metric_ref(spec: str) -> MetricRef:
    entry, metric = build(METRICS, spec)
    return MetricRef(
        name=entry.name, spec=spec_of(entry.name, metric), options=options_of(metric), unit=metric.unit,
        scope=metric.scope, owner=entry.owner,
    )  # fmt: skip


# Which layers each metric would remove, how many at a time, after reading what.


@dataclass
class MetricChoice:
    """One way to choose, and what it removes at each count (several removals: draws of a baseline)."""

    metric: str
    search: str
    removals: dict[int, tuple[Removal, ...]] = field(default_factory=dict)
    remark: str = ""  # why it ends early


@dataclass(frozen=True)
class CalibratedChoice:
    """What one metric removes after reading each task alone, and after reading plain text."""

    metric: str
    count: int
    own: dict[str, Removal]  # by task
    text: Removal | None


def counts_of(request: StudyConfig, constraints: Constraints) -> list[int]:
    """Return how many units go at each point: those asked for, or the usual shares of the stack as far as it allows.

    Where greedy's path is to end is one of them, so that every choice can be compared with it there.
    """
    usual = [count for count in _rounded(SHARES, constraints.depth) if _possible(count, constraints)]
    ends = () if request.greedy is None else (parse_drop(request.greedy, constraints.depth, "--greedy"),)
    return sorted({*(request.counts or usual), *ends})


def calibrated_counts(counts: Sequence[int], depth: int) -> list[int]:
    """Return the counts nearest to those at which calibrations are compared."""
    wanted = _rounded(CALIBRATED_SHARES, depth)
    return sorted({min(counts, key=lambda count, near=near: (abs(count - near), count)) for near in wanted})


def _rounded(shares: Sequence[float], depth: int) -> list[int]:
    return sorted({max(1, min(depth - 1, round(share * depth))) for share in shares})


def _possible(count: int, constraints: Constraints) -> bool:
    try:
        constraints.require(count)
    except LayerpruneError:
        return False
    return True


def metric_choices(bench: Bench, counts: Sequence[int]) -> Iterator[MetricChoice]:
    """Yield each metric's choice by scores of single units (of whole blocks where it scores those), baselines last."""
    scorer, first = bench.scorer(), bench.request.seed
    for spec in bench.specs:
        search = search_of(spec)
        seeds = range(first, first + DRAWS) if spec == "random" else [first]
        yield _followed(MetricChoice(spec, search), scorer, bench.constraints, counts, seeds)


def greedy_choice(bench: Bench, counts: Sequence[int]) -> MetricChoice | None:
    """Return ablation's greedy path as far as it was asked for."""
    if bench.request.greedy is None:
        return None
    most = parse_drop(bench.request.greedy, bench.constraints.depth, "--greedy")
    wanted = [count for count in counts if count <= most]
    choice, seeds = MetricChoice("ablation", "greedy"), [bench.request.seed]
    return _followed(choice, bench.scorer(), bench.constraints, wanted, seeds)


def calibrated_choices(bench: Bench, counts: Sequence[int]) -> Iterator[CalibratedChoice]:
    """Yield what the one-shot metrics that need data choose by other data than all tasks together."""
    on_text = bench.scorer_on_text()
    for spec in bench.specs:
        _, metric = build(METRICS, spec)
        if metric.needs == "nothing" or search_of(spec) != "one-shot":
            continue
        for count in counts:
            try:
                own = {task: _one_shot(bench.scorer_for(task), spec, bench.constraints, count) for task in bench.tasks}
                text = None
                if on_text is not None and metric.needs == "text":
                    text = _one_shot(on_text, spec, bench.constraints, count)
            except RefusedError:  # the architecture allows no further by this ranking; smaller counts are compared
                break
            yield CalibratedChoice(spec, count, own, text)


def search_of(spec: str) -> str:
    """Return the search that turns a metric's scores into a removal without scoring again."""
    _, metric = build(METRICS, spec)
    return "blocks" if metric.scope == "contiguous blocks" else "one-shot"


def _one_shot(scorer: SearchRunner, spec: str, constraints: Constraints, count: int) -> Removal:
    return scorer.find(spec, "one-shot", constraints, count, racing=False).removal


def _followed(
    choice: MetricChoice, scorer: SearchRunner, constraints: Constraints, counts: Sequence[int], seeds: Sequence[int]
) -> MetricChoice:
    for count in counts:
        try:
            racing = choice.search == "greedy"  # one-shot scores were all measured in full
            found = [
                scorer.find(choice.metric, choice.search, constraints, count, seed=s, racing=racing) for s in seeds
            ]
        except RefusedError as error:  # the architecture allows no further: the path ends here, and says so
            choice.remark = str(error)
            break
        choice.removals[count] = tuple(one.removal for one in found)
    return choice


# Accuracy on unseen items along each choice's path, and how choices differ, item by item.


def path_of(bench: Bench, choice: MetricChoice) -> RemovalPath:
    """Return the accuracy at every count, with its paired difference from the intact model."""
    intact = answered(bench, [INTACT])
    return RemovalPath(
        metric=choice.metric,
        search=choice.search,
        points=tuple(_point(bench, intact, count, drawn) for count, drawn in choice.removals.items()),
        remark=choice.remark,
    )


def contrasts(bench: Bench, choices: Sequence[MetricChoice]) -> Iterator[Contrast]:
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


def calibrated(
    bench: Bench, choices: Sequence[MetricChoice], others: Sequence[CalibratedChoice]
) -> Iterator[Calibrated]:
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
    return {"difference": round(value, 6), "interval": _rounded_interval(interval), "same": same}


def answered(bench: Bench, removals: Sequence[Removal], tasks: Sequence[str] | None = None) -> Answers:
    """Return the audit answers, averaged over removals that are draws of one baseline."""
    names = tasks or bench.tasks
    return answers_of([{task: bench.outcomes(removal, task) for task in names} for removal in removals])


def _point(bench: Bench, intact: Answers, count: int, drawn: Sequence[Removal]) -> PathPoint:
    found = answered(bench, drawn)
    value, interval = difference(intact, found)
    return PathPoint(
        count=count,
        removals=tuple(removal.layers for removal in drawn),
        accuracy=round(mean_accuracy(found), 6),
        difference=round(value, 6),
        interval=_rounded_interval(interval),
        tasks={task: round(float(values.mean()), 6) for task, values in found.items()},
    )


def _rounded_interval(interval: tuple[float, float]) -> tuple[float, float]:
    return round(interval[0], 6), round(interval[1], 6)


# Right and wrong answers of several models on the same items: means over tasks, and paired differences.


Interval = tuple[float, float]
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


def difference(base: Answers, other: Answers, seed: int = 0) -> tuple[float, Interval]:
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
    return seen, bootstrap_interval([other[task] - base[task] for task in base], seed=seed)
