"""Audit an exported folder: load what a user would load, ask both models the same unseen questions, write it down."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from layerprune import __version__
from layerprune.audit.compare import adjusted, compare_task, overall
from layerprune.audit.exported import Exported, check_compared, check_unseen, seen_items
from layerprune.audit.models import Loading, check_same_tokens
from layerprune.audit.verdict import verdict
from layerprune.documents import PRUNED, Audit, AuditedTask, Compared, Outcomes, Plan
from layerprune.engine import examine
from layerprune.errors import UsageError
from layerprune.progress import SILENT, Progress
from layerprune.removal import Removal
from layerprune.report.card import write_card
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
    tokens: int | None = None,
    batch_size: int | str = "auto",
    trust_remote_code: bool = False,
    seed: int = 0,
    progress: Progress = SILENT,
) -> Audit:
    """Compare an exported checkpoint with its base and write ``layerprune/audit.json`` and the model card into it.

    ``tasks``: lm-eval names, by default those of the plan. ``base``: where the base model is now, by default where it
    was exported from. ``compare``: other plans for the same base by label, run on the same items as removals.
    ``limit`` is items per task, ``tokens`` the batch's token budget, unless ``batch_size`` fixes its rows. No item that
    any of the plans has seen is used.
    Raises ``DocumentError`` when folder, plans and base do not belong together, ``TaskError`` and ``ModelError``.
    """
    exported = Exported.read(folder)
    rows = batch_size if isinstance(batch_size, int) else None
    job = Job(
        exported=exported,
        base=base,
        tasks=_tasks(tasks, exported.plan),
        compare=check_compared(compare or {}, exported.receipt),
        include_path=include_path,
        data_dir=data_dir,
        limit=limit,
        num_fewshot=num_fewshot,
        loading=Loading(dtype, device, tokens, trust_remote_code, rows),
        seed=seed,
    )
    result = _measure(job, progress)
    result.save(exported.folder / "layerprune" / Audit.filename)
    write_card(exported.folder)
    return result


def _tasks(tasks: Sequence[str] | None, plan: Plan) -> tuple[str, ...]:
    chosen = tuple(tasks or dict.fromkeys(data.task for data in plan.data))
    if not chosen:
        raise UsageError("the plan was made without tasks, so the audit needs to be told which: --tasks arc_easy,piqa")
    return chosen


def _measure(job: Job, progress: Progress) -> Audit:
    """Ask the base (and compared removals) first, then the pruned model: they need not fit into memory together."""
    receipt, loading = job.exported.receipt, job.loading
    progress.note(f"loading the base model {job.base or receipt.base.id}")
    subject = loading.base(receipt, job.base)
    questions = _questions(job, subject.encoder)
    removals = {label: Removal.from_units(plan.removal) for label, plan in job.compare.items()}
    wanted = list(dict.fromkeys([INTACT, *removals.values()]))
    found = examine(loading.engine(subject), questions, wanted, progress, "asking the base model")
    del subject
    progress.note(f"loading the pruned model {job.exported.folder}")
    pruned = loading.pruned(receipt, job.exported.folder)
    check_same_tokens(questions, pruned)
    own = examine(loading.engine(pruned), questions, [INTACT], progress, "asking the pruned model")
    outcomes = {PRUNED: own[INTACT], **{label: found[removal] for label, removal in removals.items()}}
    tasks = _compare(questions, found[INTACT], outcomes, job.seed)
    return _document(job, tasks, dtype=str(pruned.dtype).removeprefix("torch."), device=str(pruned.device))


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
        compared.append(compare_task(task.data(), chances, task.excluded, base[name], outcomes, seed))
    return adjusted(compared)


def _document(job: Job, tasks: tuple[AuditedTask, ...], *, dtype: str, device: str) -> Audit:
    plan, receipt = job.exported.plan, job.exported.receipt
    everything = overall(tasks)
    return Audit(
        verdict=verdict(receipt.removal, receipt.base.layers, tasks, everything),
        base=receipt.base,
        pruned=receipt.result,
        removal=receipt.removal,
        plan_sha256=plan.sha256(),
        receipt_sha256=receipt.sha256(),
        compared={
            label: Compared(removal=other.removal, plan_sha256=other.sha256(), metric=other.metric.spec)
            for label, other in job.compare.items()
        },
        tasks=tasks,
        overall=everything,
        bytes_before=receipt.bytes_before,
        bytes_after=receipt.bytes_after,
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
