"""An audit's passes over the models: the smaller one first, then the base, both in memory only where it has to be."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from layerprune.artifacts import (
    PRUNED,
    UNHEALED,
    Audit,
    AuditedTask,
    Compared,
    LayerRanking,
    Outcomes,
    Plan,
    Prompting,
    TextLoss,
    as_removal,
    not_looked_for,
)
from layerprune.auditor.comparison import adjusted, compare_task, flipped_items, foreign_verdict, overall, verdict
from layerprune.auditor.foreign import ForeignCheckpoint
from layerprune.auditor.generation import PROMPTS, agreement, health, own_answers_of, write
from layerprune.auditor.inputs import ExportedFolder, Loading, check_same_tokens, check_unseen
from layerprune.auditor.layerwise import layer_by_layer
from layerprune.auditor.performance import cache_bytes_per_token, read_text, text_loss, windows_of
from layerprune.auditor.speed import LARGER, time_both, time_vllm
from layerprune.checkpoint.location import locate
from layerprune.config import AuditConfig
from layerprune.data.items import Encoder, EvalSet, is_written
from layerprune.data.tasks import check_turns, load_eval_set
from layerprune.models.model import LoadedModel
from layerprune.removal import Removal
from layerprune.scoring.evaluator import evaluate
from layerprune.util import Progress, tool_versions

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


def questions_of(job: AuditJob, encoder: Encoder, progress: Progress) -> EvalSet:
    """Return the items of the job's tasks that no earlier step has seen."""
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


def measure(
    job: AuditJob,
    progress: Progress,
    questions: Callable[[AuditJob, Encoder, Progress], EvalSet] = questions_of,
    *,
    margins: bool = False,
) -> Audit:
    """Ask the exported model, then the base, on the same questions, and return what came out.

    ``questions`` chooses the items; ``margins``: their outcomes have margins, which no audit.json holds.
    """
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
    eval_set = questions(job, pruned.encoder, progress)
    if isinstance(exported, ForeignCheckpoint):
        exported.check_items(eval_set, pruned)
    asked = evaluate(loading.engine(pruned), eval_set, [INTACT], progress, f"asking the {this}", margins=margins)
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
    found = evaluate(engine, eval_set, wanted, progress, "asking the base model", margins=margins)
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
