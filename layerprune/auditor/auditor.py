"""Audit a checkpoint: load what a user would load, ask both models the same unseen questions, write it down."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from layerprune.artifacts import PLAIN, Audit, Plan, Scores, read_plan, read_scores
from layerprune.auditor.foreign import ForeignCheckpoint, check_output, is_foreign, publish
from layerprune.auditor.inputs import ExportedFolder, Loading, check_weights, columns
from layerprune.auditor.layerwise import recorded_ranking
from layerprune.auditor.measurement import AuditJob, measure
from layerprune.auditor.recheck import RecheckResult, recheck
from layerprune.auditor.verification import foreign_audit
from layerprune.checkpoint import locate
from layerprune.checkpoint.location import record, source_of
from layerprune.config import AuditConfig
from layerprune.data.tasks import prompting_of
from layerprune.errors import DocumentError, UsageError
from layerprune.files import check_places, locked, published_together, try_folder
from layerprune.report.card import CARD, FRAGMENT, card_faults, read_card, unlike_the_card, write_card, write_fragment
from layerprune.report.page import REPORT, render_report, write_report
from layerprune.util import SILENT, Progress


def audit(
    folder: str | Path,
    tasks: Sequence[str] | None = None,
    out: Path | None = None,
    *,
    progress: Progress = SILENT,
    **options: Any,
) -> Audit | RecheckResult:
    """Compare a checkpoint with its base and write audit.json, a card and report.html.

    They go into ``folder`` where layerprune exported it. Any other checkpoint, a folder or a Hub id, is compared with
    the option ``base``; its folder stays as it is, and ``out`` gets audit.json, report.html and card.md. With the
    option ``recheck`` nothing is written: so many items of the audit that is there are asked again, see ``recheck``.

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
    if config.recheck is not None:
        return recheck(folder, out, config, {"tasks": tasks, **options}, others, progress)
    scores = [one if isinstance(one, Scores) else read_scores(one) for one in config.scores]
    if is_foreign(folder) and (config.base is not None or out is not None):
        return _audit_foreign(folder, config, others, out, progress)
    if is_foreign(folder) and Path(folder).is_dir():
        raise DocumentError(
            f"{folder} is not an exported checkpoint: it has no layerprune/receipt.json; make one with layerprune "
            "export PLAN -o FOLDER, or audit any other model beside its base: --base MODEL -o DIR"
        )
    exported = ExportedFolder.read(Path(folder))
    if out is not None:
        raise UsageError(
            f"{folder} was exported by layerprune, so its audit goes into it; leave out -o, which is for other models"
        )
    read_card(exported.folder / "README.md")  # one that cannot be read is refused before anything is measured
    inside = exported.folder / "layerprune"
    with locked(exported.folder):
        check_places(exported.folder, files=("README.md", REPORT, f"{inside.name}/{Audit.filename}"))
        try_folder(inside)
        chosen = config.tasks or tuple(dict.fromkeys(data.task for data in exported.plan.data))
        if not chosen:
            raise UsageError(
                "the plan was made without tasks, so the audit needs to be told which: --tasks arc_easy,piqa"
            )
        job = AuditJob(
            config=config,
            exported=exported,
            tasks=chosen,
            compare=columns(others, exported.base, exported.plan if exported.heal else None),
            prompting=prompting_of(config, exported.plan.data[0].prompting if exported.plan.data else PLAIN),
            loading=Loading.of(config),
            rankings=tuple(recorded_ranking(one, exported.base) for one in scores),
        )
        check_weights(exported, config.base)
        result = _measured(job, progress)
        with published_together(exported.folder) as new:
            write_card(exported.folder, audit=result, into=new)
            write_report(exported.folder, result, into=new)
            result.save(new / inside.name / Audit.filename)  # last: an audit that is there is whole
        record(inside, result.base)
    return result


def _audit_foreign(
    model: str | Path, config: AuditConfig, others: Mapping[str, Plan], out: Path | None, progress: Progress
) -> Audit:
    """Audit a checkpoint without documents of layerprune; everything that was given is looked at first."""
    if config.base is None:
        raise UsageError(f"layerprune did not export {model}, so its base has to be named: --base MODEL")
    if out is None:
        raise UsageError(
            f"layerprune did not export {model}, which stays as it is: give -o DIR for audit.json, report.html and "
            "card.md"
        )
    if not config.tasks:
        raise UsageError(f"layerprune did not export {model}, so tasks have to be named: --tasks arc_easy,piqa")
    if config.scores:
        raise UsageError("--scores shows rankings beside those of a plan, and there is none; leave it out")
    check_output(out)
    with locked(out, model, config.base):
        found = ForeignCheckpoint.read(model, config.base, trust_remote_code=config.trust_remote_code)
        if found.adapter is not None and config.speed and config.speed_engine == "vllm":
            raise UsageError("--speed-engine vllm reads a folder: merge and save the adapter, or leave the option out")
        job = AuditJob(
            config=config,
            exported=found,
            tasks=config.tasks,
            compare=columns(others, found.base),
            prompting=prompting_of(config, PLAIN),
            loading=Loading.of(config),
            rankings=(),
        )
        result = _measured(job, progress)
        publish(out, result)
    return result


def _measured(job: AuditJob, progress: Progress) -> Audit:
    measured = measure(job, progress).canonical_json()
    return Audit.parse(json.loads(measured), Audit.filename)  # in the order in which ``verify`` will read it


def renew(folder: Path, progress: Progress = SILENT, *, base: Callable[[], Path]) -> None:
    """Bring a folder's card and report to what its documents say; an audit that was killed may have left others.

    ``base`` gives the folder whose card holds the licence and language for one that is missing. Raises
    ``DocumentError`` for an audit that is not the one that the card names: it is written down after its card, so it was
    edited.
    """
    report, audited = folder / REPORT, folder / "layerprune" / Audit.filename
    _check_audit(folder, Audit.load(audited) if audited.exists() else None)
    if not (folder / CARD).exists():
        progress.note(f"{folder / CARD} is missing: written anew")
        write_card(folder, base())
    elif any(card_faults(folder)):
        progress.note(f"{folder / CARD} is not what the documents say: written anew")
        write_card(folder)
    if audited.exists():
        if not report.exists() or report.read_bytes() != render_report(folder).encode():
            progress.note(f"{report} is not what the documents say: written anew")
            write_report(folder)
    elif report.exists():
        progress.note(f"removed: {report}, of an audit that was not finished")
        report.unlink()


def renew_card(folder: Path, base: str | None = None) -> Path:
    """Bring the card alone to what the documents of a folder say, and return its path; see ``api.card``.

    ``base``: where the base is, whose card has the licence and language that this one lacks; None: where the documents
    found it, and looked for only where there is no card. Raises ``DocumentError`` for documents that are not those that
    the card names, and for another base.
    """
    with locked(folder):
        if foreign_audit(folder) and (audit := Audit.load(folder / Audit.filename)).foreign:
            check_output(folder)
            _check_audit(folder, audit, FRAGMENT)
            return write_fragment(folder, audit)
        exported = ExportedFolder.read(folder)
        _check_audit(folder, exported.audit)
        check_places(folder, files=(CARD,))
        if base is None and (folder / CARD).exists():
            return write_card(folder)
        place = locate(*source_of(exported.base, base), shards=False, weights=False)
        if place.open().fingerprint() != exported.base.fingerprint:
            raise DocumentError(f"{place.id} is not the base of {folder}: its weights' fingerprint is another")
        return write_card(folder, place.path)


def _check_audit(folder: Path, audit: Audit | None, card: str = CARD) -> None:
    for fault in unlike_the_card(folder, audit, card=card):
        raise DocumentError(f"{folder}: {fault}; put it back, or remove it to audit again")
