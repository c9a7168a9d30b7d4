"""Audit an exported folder: load what a user would load, ask both models the same unseen questions, write it down."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from layerprune.auditor.compare import overall
from layerprune.auditor.exported import Exported, columns
from layerprune.auditor.layerwise import recorded_ranking
from layerprune.auditor.measuring import Findings, Job, measure
from layerprune.auditor.models import Loading
from layerprune.auditor.verdict import verdict
from layerprune.checkpoint.locator import record
from layerprune.config import AuditConfig
from layerprune.documents import PLAIN, Audit, Compared, Plan, Scores, not_looked_for, read_plan, read_scores
from layerprune.errors import DocumentError, UsageError
from layerprune.lock import locked
from layerprune.output import check_places, published_together, try_folder
from layerprune.progress import SILENT, Progress
from layerprune.report.card import card_faults, read_card, unlike_the_card, write_card
from layerprune.report.page import REPORT, render_report, write_report
from layerprune.tasks import prompting_of
from layerprune.versions import tool_versions


def audit(folder: Path, tasks: Sequence[str] | None = None, *, progress: Progress = SILENT, **options: Any) -> Audit:
    """Compare an exported checkpoint with its base and write audit.json, the model card and report.html into it.

    ``options`` are those of ``AuditConfig``. ``compare``: other plans for the same base by label, run on the same items
    as removals; ``scores``: rankings of the base by other metrics, to be shown beside the plan's own; both as paths or
    documents. ``limit`` is items per task, ``memory`` bytes. No item that any of the plans has seen is used. Raises
    ``DocumentError`` when folder, plans and base do not belong together, ``WriteError`` when the folder cannot be
    written, before anything is measured, ``UsageError`` when another audit is at work there, ``TaskError`` and
    ``ModelError``.
    """
    config = AuditConfig.of(tasks=tasks, **options)
    compared = (config.compare or {}).items()
    others = {label: plan if isinstance(plan, Plan) else read_plan(plan) for label, plan in compared}
    rankings = [scores if isinstance(scores, Scores) else read_scores(scores) for scores in config.scores]
    exported = Exported.read(folder)
    read_card(exported.folder / "README.md")  # one that cannot be read is refused before anything is measured
    inside = exported.folder / "layerprune"
    with locked(exported.folder):
        check_places(exported.folder, files=("README.md", REPORT, f"{inside.name}/{Audit.filename}"))
        try_folder(inside)
        job = Job(
            exported=exported,
            base=config.base,
            tasks=_tasks(config.tasks, exported.plan),
            compare=columns(others, exported),
            include_path=config.include_path,
            data_dir=config.data_dir,
            limit=config.limit,
            num_fewshot=config.num_fewshot,
            prompting=prompting_of(config, exported.plan.data[0].prompting if exported.plan.data else PLAIN),
            turns=config.fewshot_as_multiturn,
            loading=Loading(
                config.dtype,
                config.device,
                config.batch_size if isinstance(config.batch_size, int) else None,
                config.memory,
                config.trust_remote_code,
            ),
            text=config.text,
            generation=config.generation,
            speed=config.speed,
            layerwise=config.layerwise,
            rankings=tuple(recorded_ranking(one, exported.receipt.base) for one in rankings),
            seed=config.seed,
        )
        result = _document(job, measure(job, progress))
        with published_together(exported.folder) as new:
            write_card(exported.folder, audit=result, into=new)
            write_report(exported.folder, result, into=new)
            result.save(new / inside.name / Audit.filename)  # last: an audit that is there is whole
        record(inside, result.base)
    return result


def renew(folder: Path, progress: Progress = SILENT, *, base: Callable[[], Path]) -> None:
    """Bring a folder's card and report to what its documents say; an audit that was killed may have left others.

    ``base`` gives the folder whose card holds the licence and language for one that is missing. Raises
    ``DocumentError`` for an audit that is not the one that the card names: it is written down after its card, so it was
    edited.
    """
    card, report = folder / "README.md", folder / REPORT
    audited = folder / "layerprune" / Audit.filename
    for fault in unlike_the_card(folder, Audit.load(audited)) if audited.exists() else ():
        raise DocumentError(f"{folder}: {fault}; put it back, or remove it to audit again")
    if not card.exists():
        progress.note(f"{card} is missing: written anew")
        write_card(folder, base())
    elif any(card_faults(folder)):
        progress.note(f"{card} is not what the documents say: written anew")
        write_card(folder)
    if audited.exists():
        if not report.exists() or report.read_bytes() != render_report(folder).encode():
            progress.note(f"{report} is not what the documents say: written anew")
            write_report(folder)
    elif report.exists():
        progress.note(f"removed: {report}, of an audit that was not finished")
        report.unlink()


def _tasks(tasks: Sequence[str] | None, plan: Plan) -> tuple[str, ...]:
    chosen = tuple(tasks or dict.fromkeys(data.task for data in plan.data))
    if not chosen:
        raise UsageError("the plan was made without tasks, so the audit needs to be told which: --tasks arc_easy,piqa")
    return chosen


def _document(job: Job, found: Findings) -> Audit:
    plan, receipt, heal = job.exported.plan, job.exported.receipt, job.exported.heal
    everything = overall(found.tasks)
    unlooked = not_looked_for(receipt, heal, (task.data.task for task in found.tasks))
    return Audit(
        verdict=verdict(
            receipt.removal, receipt.base.layers, found.tasks, everything, found.generation, unlooked, found.own_answers
        ),
        base=receipt.base,
        pruned=job.exported.result,
        removal=receipt.removal,
        plan_sha256=plan.sha256(),
        receipt_sha256=receipt.sha256(),
        heal_sha256=heal.sha256() if heal else None,
        compared={
            label: Compared(
                removal=other.removal,
                plan_sha256=other.sha256(),
                metric=other.metric.spec if other.metric else other.chosen_by,
            )
            for label, other in job.compare.items()
        },
        tasks=found.tasks,
        overall=everything,
        bytes_before=receipt.bytes_before,
        bytes_after=receipt.bytes_after,
        cache_bytes_per_token=found.cache,
        text=found.text,
        generation=found.generation,
        own_answers=found.own_answers,
        speed=found.speed,
        layerwise=found.layerwise,
        rankings=found.rankings,
        dtype=found.dtype,
        device=found.device,
        limit=job.limit,
        seed=job.seed,
        versions=tool_versions("torch", "transformers", "lm-eval", "numpy", "scipy"),
    )
