"""Audit an exported folder: load what a user would load, ask both models the same unseen questions, write it down."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from layerprune import __version__
from layerprune.audit.compare import adjusted, compare_task, overall
from layerprune.audit.exported import Exported, check_unseen, columns, seen_items
from layerprune.audit.flips import flipped_items
from layerprune.audit.models import Loading, base_source, check_same_tokens, check_weights
from layerprune.audit.prompts import PROMPTS
from layerprune.audit.running_text import read_text, text_loss, windows_of
from layerprune.audit.speed import cache_bytes_per_token, time_both
from layerprune.audit.verdict import verdict
from layerprune.audit.writing import Text, health, write
from layerprune.documents import (
    PRUNED,
    Audit,
    AuditedTask,
    Compared,
    Generation,
    Outcomes,
    Plan,
    Speed,
    TextLoss,
)
from layerprune.engine import examine
from layerprune.errors import UsageError
from layerprune.progress import SILENT, Progress
from layerprune.removal import Removal
from layerprune.report.card import write_card
from layerprune.report.page import write_report
from layerprune.subject import Subject
from layerprune.tasks import Questions, load_questions

INTACT = Removal(())


@dataclass(frozen=True)
class Job:
    """What an audit was asked for, validated before any model is loaded."""

    exported: Exported
    base: str | None
    tasks: tuple[str, ...]
    compare: Mapping[str, Plan]
    include_path: Sequence[str | Path]
    data_dir: Path | None
    limit: int | None
    num_fewshot: int | None
    loading: Loading
    text: Path | None
    generation: bool
    speed: bool
    seed: int


def audit(
    folder: Path,
    tasks: Sequence[str] | None = None,
    *,
    base: str | None = None,
    compare: Mapping[str, Plan] | None = None,
    include_path: Sequence[str | Path] = (),
    data_dir: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    batch_size: int | str = "auto",
    trust_remote_code: bool = False,
    text: Path | None = None,
    generation: bool = True,
    speed: bool = False,
    seed: int = 0,
    progress: Progress = SILENT,
) -> Audit:
    """Compare an exported checkpoint with its base and write audit.json, the model card and report.html into it.

    ``tasks``: lm-eval names, by default those of the plan. ``base``: where the base model is now, by default where it
    was exported from. ``compare``: other plans for the same base by label, run on the same items as removals.
    ``limit`` is items per task, ``batch_size`` a number of rows or "auto". ``text``: a .txt or .jsonl file for
    perplexity and KL; ``generation``: look at greedy continuations of fixed prompts; ``speed``: time both models
    (``text`` and ``speed`` hold both in memory). No item that any of the plans has seen is used.
    Raises ``DocumentError`` when folder, plans and base do not belong together, ``TaskError`` and ``ModelError``.
    """
    exported = Exported.read(folder)
    job = Job(
        exported=exported,
        base=base,
        tasks=_tasks(tasks, exported.plan),
        compare=columns(compare or {}, exported),
        include_path=include_path,
        data_dir=data_dir,
        limit=limit,
        num_fewshot=num_fewshot,
        loading=Loading(dtype, device, batch_size if isinstance(batch_size, int) else None, trust_remote_code),
        text=text,
        generation=generation,
        speed=speed,
        seed=seed,
    )
    result = _measure(job, progress)
    result.save(exported.folder / "layerprune" / Audit.filename)
    write_card(exported.folder)
    write_report(exported.folder)
    return result


def _tasks(tasks: Sequence[str] | None, plan: Plan) -> tuple[str, ...]:
    chosen = tuple(tasks or dict.fromkeys(data.task for data in plan.data))
    if not chosen:
        raise UsageError("the plan was made without tasks, so the audit needs to be told which: --tasks arc_easy,piqa")
    return chosen


def _measure(job: Job, progress: Progress) -> Audit:
    """Ask the pruned model, then the base: side by side in memory only for what needs both at once (text, speed)."""
    exported, loading = job.exported, job.loading
    check_weights(exported, job.base)
    text = read_text(job.text) if job.text else None
    progress.note(f"loading the pruned model {exported.folder}")
    pruned = loading.subject(str(exported.folder))
    questions = _questions(job, pruned.encoder)
    own = examine(loading.engine(pruned), questions, [INTACT], progress, "asking the pruned model")
    written = write(pruned, PROMPTS, progress, "pruned model writes") if job.generation else []
    cache = cache_bytes_per_token(pruned)
    dtype, device = str(pruned.dtype).removeprefix("torch."), str(pruned.device)
    kept = pruned if text or job.speed else None
    del pruned
    model, revision = base_source(exported.receipt, job.base)
    progress.note(f"loading the base model {model}")
    base = loading.subject(model, revision)
    check_same_tokens(questions, base.encoder)
    removals = {label: Removal.from_units(plan.removal) for label, plan in job.compare.items()}
    wanted = list(dict.fromkeys([INTACT, *removals.values()]))
    found = examine(loading.engine(base), questions, wanted, progress, "asking the base model")
    outcomes = {PRUNED: own[INTACT], **{label: found[removal] for label, removal in removals.items()}}
    return _document(
        job,
        _compare(questions, found[INTACT], outcomes, job.seed),
        dtype=dtype,
        device=device,
        cache=_both(cache_bytes_per_token(base), cache),
        text=_text(job, text, base, kept, progress),
        generation=_health(base, written, progress) if job.generation else None,
        speed=time_both(base, kept, progress=progress) if job.speed and kept else None,
    )


def _both(base: int | None, pruned: int | None) -> tuple[int, int] | None:
    return None if base is None or pruned is None else (base, pruned)


def _text(job: Job, text: str | None, base: Subject, pruned: Subject | None, progress: Progress) -> TextLoss | None:
    if text is None or job.text is None or pruned is None:
        return None
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    source = f"{Path(job.text).name} (sha256 {digest})"
    return text_loss(base, pruned, windows_of(text, base), source, seed=job.seed, progress=progress)


def _health(base: Subject, written: Sequence[Text], progress: Progress) -> Generation:
    return health(base, PROMPTS, write(base, PROMPTS, progress, "base model writes"), written)


def _questions(job: Job, encoder: object) -> Questions:
    seen = seen_items(job.exported.plan, *job.compare.values())
    questions = load_questions(
        job.tasks,
        encoder,  # type: ignore[arg-type]  # an HFLM, which lm-eval leaves untyped
        use="evaluation",
        include_path=job.include_path,
        data_dir=job.data_dir,
        limit=job.limit,
        num_fewshot=job.num_fewshot,
        seed=job.seed,
        exclude=seen,
    )
    check_unseen(questions, seen)
    return questions


def _compare(
    questions: Questions, base: Mapping[str, Outcomes], models: Mapping[str, Mapping[str, Outcomes]], seed: int
) -> tuple[AuditedTask, ...]:
    compared = []
    for name, task in questions.tasks.items():
        outcomes = {label: found[name] for label, found in models.items()}
        chances = [item.chance for item in task.items]
        found = compare_task(task.data(), chances, task.excluded, base[name], outcomes, seed)
        compared.append(found.model_copy(update={"flipped": flipped_items(task, base[name], outcomes[PRUNED])}))
    return adjusted(compared)


def _document(
    job: Job,
    tasks: tuple[AuditedTask, ...],
    *,
    dtype: str,
    device: str,
    cache: tuple[int, int] | None,
    text: TextLoss | None,
    generation: Generation | None,
    speed: Speed | None,
) -> Audit:
    plan, receipt = job.exported.plan, job.exported.receipt
    everything = overall(tasks)
    return Audit(
        verdict=verdict(receipt.removal, receipt.base.layers, tasks, everything, generation),
        base=receipt.base,
        pruned=job.exported.result,
        removal=receipt.removal,
        plan_sha256=plan.sha256(),
        receipt_sha256=receipt.sha256(),
        heal_sha256=job.exported.heal.sha256() if job.exported.heal else None,
        compared={
            label: Compared(removal=other.removal, plan_sha256=other.sha256(), metric=other.metric.spec)
            for label, other in job.compare.items()
        },
        tasks=tasks,
        overall=everything,
        bytes_before=receipt.bytes_before,
        bytes_after=receipt.bytes_after,
        cache_bytes_per_token=cache,
        text=text,
        generation=generation,
        speed=speed,
        dtype=dtype,
        device=device,
        limit=job.limit,
        seed=job.seed,
        versions=tool_versions(),
    )


def tool_versions() -> dict[str, str]:
    """Return the versions of what the figures depend on."""
    tools = {name: version(name) for name in ("torch", "transformers", "lm-eval", "numpy", "scipy")}
    return {"layerprune": __version__, "python": platform.python_version(), **tools}
