"""The study: measure everything once, then answer each question from what was measured."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from layerprune.analysis.bench import SELECTION, Bench
from layerprune.analysis.choices import calibrated_choices, calibrated_counts, counts_of, greedy_choice, metric_choices
from layerprune.analysis.followed import calibrated, contrasts, path_of
from layerprune.analysis.rankings import judged, ranked
from layerprune.analysis.shown import counterexample_shown
from layerprune.anatomy import load_config, read_anatomy
from layerprune.checkpoint import locate
from layerprune.config import StudyConfig
from layerprune.documents import MetricRef, Study
from layerprune.documents.study import Intact
from layerprune.errors import UsageError
from layerprune.lock import locked
from layerprune.metrics import METRICS
from layerprune.planners import Constraints, parse_drop, parse_protect
from layerprune.progress import SILENT, Progress
from layerprune.specs import build, normalised, options_of, spec_of
from layerprune.versions import tool_versions

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
    anatomy = read_anatomy(load_config(folder, trust_remote_code=request.trust_remote_code))
    limits = Constraints(
        anatomy.depth,
        protect=parse_protect(request.protect, anatomy.depth),
        must_keep=anatomy.must_keep,
        together=anatomy.together,
    )
    inner = [move for move in limits.moves if not {0, anatomy.depth - 1} & set(move)]
    if len(inner) < 2:
        raise UsageError(
            f"a study compares rankings, also without the end layers: {len(inner)} others may go and two are needed; "
            "protect fewer layers, or take a deeper model"
        )
    for count in request.counts:
        limits.require(count)
    if request.greedy is not None:
        limits.require(parse_drop(request.greedy, anatomy.depth, "--greedy"))


def provenance(bench: Bench) -> dict[str, Any]:
    """Return what was studied, on which items, with which tools."""
    request, subject = bench.request, bench.subject
    return {
        "model": subject.ref,
        "metrics": tuple(_metric_ref(spec) for spec in bench.specs),
        "units": tuple(unit.layers for unit in bench.units),
        "selection": bench.desk.data.questions.data(),  # type: ignore[union-attr]
        "audit": tuple(one for examiner in bench.audits.values() for one in examiner.questions.data()),
        "text": bench.text,
        "intact": {
            task: Intact(
                selection_accuracy=bench.desk.base[task].accuracy, accuracy=base.accuracy, p_value=base.p_value
            )
            for task, base in bench.audit_base.items()
        },
        "dtype": str(subject.dtype).removeprefix("torch."),
        "device": subject.device.type,
        "seed": request.seed,
        "versions": tool_versions(),
    }


def _metric_ref(spec: str) -> MetricRef:
    entry, metric = build(METRICS, spec)
    return MetricRef(
        name=entry.name, spec=spec_of(entry.name, metric), options=options_of(metric), unit=metric.unit,
        scope=metric.scope, owner=entry.owner,
    )  # fmt: skip
