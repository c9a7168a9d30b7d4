"""Audit a checkpoint: load what a user would load, ask both models the same unseen questions, write it down."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerprune.artifacts import (
    PLAIN,
    PRUNED,
    UNHEALED,
    Audit,
    AuditedTask,
    Compared,
    LayerRanking,
    Outcomes,
    Plan,
    Prompting,
    Scores,
    TextLoss,
    as_removal,
    not_looked_for,
    read_plan,
    read_scores,
)
from layerprune.auditor.comparison import adjusted, compare_task, flipped_items, foreign_verdict, overall, verdict
from layerprune.auditor.foreign import ForeignCheckpoint, check_output, is_foreign, publish
from layerprune.auditor.generation import PROMPTS, agreement, health, own_answers_of, write
from layerprune.auditor.inputs import (
    ExportedFolder,
    Loading,
    check_same_tokens,
    check_unseen,
    check_weights,
    columns,
)
from layerprune.auditor.layerwise import layer_by_layer, recorded_ranking
from layerprune.auditor.performance import cache_bytes_per_token, read_text, text_loss, windows_of
from layerprune.auditor.speed import LARGER, time_both, time_vllm
from layerprune.checkpoint.location import locate, record
from layerprune.config import AuditConfig
from layerprune.data.items import Encoder, EvalSet, is_written
from layerprune.data.tasks import check_turns, load_eval_set, prompting_of
from layerprune.errors import DocumentError, UsageError
from layerprune.files import check_places, locked, published_together, try_folder
from layerprune.models.model import LoadedModel
from layerprune.removal import Removal
from layerprune.report.card import card_faults, read_card, unlike_the_card, write_card
from layerprune.report.page import REPORT, render_report, write_report
from layerprune.scoring.evaluator import evaluate
from layerprune.util import SILENT, Progress, tool_versions


def audit(
    folder: str | Path,
    tasks: Sequence[str] | None = None,
    out: Path | None = None,
    *,
    progress: Progress = SILENT,
    **options: Any,
) -> Audit:
    """Compare a checkpoint with its base and write audit.json, a card and report.html.

    They go into ``folder`` where layerprune exported it. Any other checkpoint, a folder or a Hub id, is compared with
    the option ``base``; its folder stays as it is, and ``out`` gets audit.json, report.html and card.md.

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
            loading=_loading(config),
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
            loading=_loading(config),
            rankings=(),
        )
        result = _measured(job, progress)
        publish(out, result)
    return result


def _loading(config: AuditConfig) -> Loading:
    return Loading(
        config.dtype,
        config.device,
        config.batch_size if isinstance(config.batch_size, int) else None,
        config.memory,
        config.trust_remote_code,
        config.attn_implementation,
        config.offload,
    )


def _measured(job: AuditJob, progress: Progress) -> Audit:
    measured = measure(job, progress).canonical_json()
    return Audit.parse(json.loads(measured), Audit.filename)  # in the order in which ``verify`` will read it


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


# An audit's passes over the models: the smaller one first, then the base, both in memory only where it has to be.


INTACT = Removal(())


@dataclass(frozen=True)
class AuditJob:
    """What an audit was asked for, validated before any model is loaded."""

    config: AuditConfig
    exported: ExportedFolder | ForeignCheckpoint
    tasks: tuple[str, ...]  # those that were asked for, or the plan's
    compare: Mapping[str, Plan]
    prompting: Prompting
    loading: Loading
    rankings: tuple[LayerRanking, ...]  # of other metrics, as they were recorded


def measure(job: AuditJob, progress: Progress) -> Audit:
    """Ask the exported model, then the base, on the same questions, and return what came out."""
    config, exported, loading = job.config, job.exported, job.loading
    text = read_text(config.text) if config.text else None
    model, revision = exported.base_source(config.base)
    this = "candidate" if isinstance(exported, ForeignCheckpoint) else "pruned model"
    speed = None
    if config.speed and config.speed_engine == "vllm":  # first: its engines need the card for themselves
        kept = exported.result.layers / exported.base.layers
        trust, where = config.trust_remote_code, locate(model, revision).path
        speed = time_vllm(where, exported.folder, kept, dtype=config.dtype, trust_remote_code=trust, progress=progress)

    progress.note(f"loading the {this} {exported.folder}")
    pruned: LoadedModel | None = exported.load(loading)
    if text is not None:
        windows_of(text, pruned)  # too short a text is refused before anything is measured
    eval_set = _questions(job, pruned.encoder, progress)
    if isinstance(exported, ForeignCheckpoint):
        exported.check_items(eval_set, pruned)
    asked = evaluate(loading.engine(pruned), eval_set, [INTACT], progress, f"asking the {this}")
    written = write(pruned, PROMPTS, progress, f"{this} writes") if config.generation else []
    pruned_cache = cache_bytes_per_token(pruned)
    dtype, device = str(pruned.dtype).removeprefix("torch."), str(pruned.device)
    attention = pruned.attention
    if text is None and not (config.speed and speed is None):
        pruned = None  # kept in memory only for what needs both models at once

    progress.note(f"loading the base model {model}")
    base = loading.load_model(model, revision)
    check_same_tokens(eval_set, base.encoder)
    engine = loading.engine(base)
    removals = {label: as_removal(plan.removal) for label, plan in job.compare.items()}
    wanted = list(dict.fromkeys([INTACT, *removals.values()]))
    found = evaluate(engine, eval_set, wanted, progress, "asking the base model")
    outcomes = {PRUNED: asked[INTACT], **{label: found[removal] for label, removal in removals.items()}}
    tasks = _compare(eval_set, found[INTACT], outcomes, config.seed)
    by_layer, rankings = None, job.rankings
    if config.layerwise and exported.plan is not None:
        whole = PRUNED if exported.heal is None else UNHEALED
        by_layer, rankings = layer_by_layer(engine, exported.plan, eval_set, tasks, whole, job.rankings, progress)
    caches = cache_bytes_per_token(base), pruned_cache
    loss = None if text is None or pruned is None else _text_loss(job, text, base, pruned, progress)
    if config.speed and speed is None and pruned:
        speed = time_both(base, pruned, larger=LARGER, progress=progress)

    generation, own_answers = None, ()
    if config.generation:
        texts = write(base, PROMPTS, progress, "base model writes")
        own = own_answers_of(engine, eval_set, PROMPTS, texts, progress)
        generation = health(base, PROMPTS, texts, written)
        read = evaluate(engine, own, wanted, progress, "the base's own answers, read by it")
        del base, engine
        if pruned is None:  # one model in memory at a time
            progress.note(f"loading the {this} {exported.folder} again, to read what the base wrote")
            pruned = exported.load(loading)
        label = f"the base's own answers, read by the {this}"
        asked = evaluate(loading.engine(pruned), own, [INTACT], progress, label)
        outcomes = {PRUNED: asked[INTACT], **{label: read[removal] for label, removal in removals.items()}}
        own_answers = agreement(own, read[INTACT], outcomes, config.seed)

    plan, receipt, heal = exported.plan, exported.receipt, exported.heal
    if receipt is None:
        said = foreign_verdict(exported.base, exported.result, tasks, generation, own_answers)
    else:
        unlooked = not_looked_for(receipt, heal, (task.data.task for task in tasks))
        said = verdict(receipt.removal, receipt.base.layers, tasks, generation, unlooked, own_answers)
    return Audit(
        verdict=said,
        base=exported.base,
        pruned=exported.result,
        removal=receipt.removal if receipt else None,
        plan_sha256=plan.sha256() if plan else None,
        receipt_sha256=receipt.sha256() if receipt else None,
        adapter=exported.adapter if isinstance(exported, ForeignCheckpoint) else None,
        heal_sha256=heal.sha256() if heal else None,
        compared={
            label: Compared(
                removal=other.removal,
                plan_sha256=other.sha256(),
                metric=other.metric.spec if other.metric else other.chosen_by,
            )
            for label, other in job.compare.items()
        },
        tasks=tasks,
        overall=overall(tasks),
        bytes_before=exported.sizes[0],
        bytes_after=exported.sizes[1],
        cache_bytes_per_token=None if None in caches else caches,
        text=loss,
        generation=generation,
        own_answers=own_answers,
        speed=speed,
        layerwise=by_layer,
        rankings=rankings,
        dtype=dtype,
        device=device,
        attention=attention,
        limit=config.limit,
        seed=config.seed,
        versions=tool_versions("torch", "transformers", "lm-eval", "numpy", "scipy"),
    )


def _text_loss(job: AuditJob, text: str, base: LoadedModel, pruned: LoadedModel, progress: Progress) -> TextLoss:
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    source = f"{Path(job.config.text).name} (sha256 {digest})"
    plan = job.exported.plan
    before = as_removal(plan.removal) if plan and job.exported.heal else None
    seed, windows = job.config.seed, windows_of(text, base)
    return text_loss(base, pruned, windows, source, unhealed=before, seed=seed, progress=progress)


def _questions(job: AuditJob, encoder: Encoder, progress: Progress) -> EvalSet:
    config = job.config
    seen = job.exported.seen.union(*(plan.seen for plan in job.compare.values()))
    eval_set = load_eval_set(
        job.tasks,
        encoder,
        use="evaluation",
        include_path=config.include_path,
        data_dir=config.data_dir,
        limit=config.limit,
        num_fewshot=config.num_fewshot,
        prompting=job.prompting,
        seed=config.seed,
        exclude=seen,
    )
    check_unseen(eval_set, seen)
    for remark in eval_set.remarks():
        progress.note(remark)
    check_turns(config.fewshot_as_multiturn, eval_set)
    return eval_set


def _compare(
    eval_set: EvalSet, base: Mapping[str, Outcomes], models: Mapping[str, Mapping[str, Outcomes]], seed: int
) -> tuple[AuditedTask, ...]:
    compared = []
    for name, task in eval_set.tasks.items():
        outcomes = {label: found[name] for label, found in models.items()}
        chances = [item.chance for item in task.items]
        found = compare_task(task.data(), chances, task.excluded, base[name], outcomes, seed)
        flipped = flipped_items(task, base[name], outcomes[PRUNED])
        compared.append(found.model_copy(update={"flipped": flipped, "written": is_written(task)}))
    return adjusted(compared)
