"""An audit's passes over the models: the smaller one first, then the base, both in memory only where it has to be."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from layerprune.auditor.agreement import agreement, own_answers_of
from layerprune.auditor.compare import adjusted, compare_task
from layerprune.auditor.continuing import Text, write
from layerprune.auditor.exported import Exported, check_unseen, seen_items
from layerprune.auditor.flips import flipped_items
from layerprune.auditor.layerwise import ask_layers, cosine_ranking, layerwise, layerwise_questions, parts_of
from layerprune.auditor.models import Loading, check_same_tokens, check_weights
from layerprune.auditor.prompts import PROMPTS
from layerprune.auditor.running_text import read_text, text_loss, windows_of
from layerprune.auditor.speed import cache_bytes_per_token, time_both
from layerprune.auditor.writing import health
from layerprune.checkpoint.locator import source_of
from layerprune.documents import (
    PRUNED,
    UNHEALED,
    AuditedTask,
    Generation,
    Layerwise,
    Outcomes,
    OwnAnswers,
    Plan,
    Prompting,
    Ranking,
    Speed,
    TextLoss,
)
from layerprune.engine import Engine, examine
from layerprune.progress import Progress
from layerprune.removal import Removal
from layerprune.subject import Subject
from layerprune.tasks import Questions, check_turns, load_questions
from layerprune.tasks.answers import is_written

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
    prompting: Prompting
    turns: bool | None  # whether examples were asked for as turns
    loading: Loading
    text: Path | None
    generation: bool
    speed: bool
    layerwise: bool
    rankings: tuple[Ranking, ...]  # of other metrics, as they were recorded
    seed: int


@dataclass(frozen=True)
class Findings:
    """Everything that was measured."""

    tasks: tuple[AuditedTask, ...]
    dtype: str
    device: str
    cache: tuple[int, int] | None
    text: TextLoss | None
    generation: Generation | None
    own_answers: tuple[OwnAnswers, ...]
    speed: Speed | None
    layerwise: Layerwise | None
    rankings: tuple[Ranking, ...]


@dataclass(frozen=True)
class Alone:
    """What the exported model did before the base was loaded."""

    outcomes: Mapping[str, Outcomes]
    written: Sequence[Text]
    cache: int | None
    dtype: str
    device: str
    subject: Subject | None  # kept in memory only for what needs both models at once


def measure(job: Job, progress: Progress) -> Findings:
    """Ask the exported model, then the base, on the same questions."""
    exported = job.exported
    check_weights(exported, job.base)
    text = read_text(job.text) if job.text else None
    progress.note(f"loading the pruned model {exported.folder}")
    subject = job.loading.subject(str(exported.folder))
    if text is not None:
        windows_of(text, subject)  # too short a text is refused before anything is measured
    questions = _questions(job, subject.encoder, progress)
    pruned = _alone(job, subject, questions, progress)
    del subject
    model, revision = source_of(exported.receipt.base, job.base)
    progress.note(f"loading the base model {model}")
    base = job.loading.subject(model, revision)
    check_same_tokens(questions, base.encoder)
    engine = job.loading.engine(base)
    removals = {label: Removal.from_layers(plan.removal) for label, plan in job.compare.items()}
    wanted = list(dict.fromkeys([INTACT, *removals.values()]))
    found = examine(engine, questions, wanted, progress, "asking the base model")
    outcomes = {PRUNED: pruned.outcomes, **{label: found[removal] for label, removal in removals.items()}}
    tasks = _compare(questions, found[INTACT], outcomes, job.seed)
    by_layer, rankings = _layer_by_layer(job, engine, questions, tasks, progress)
    findings = Findings(
        tasks=tasks,
        dtype=pruned.dtype,
        device=pruned.device,
        cache=_both(cache_bytes_per_token(base), pruned.cache),
        text=_text(job, text, base, pruned.subject, progress),
        generation=None,
        own_answers=(),
        speed=time_both(base, pruned.subject, progress=progress) if job.speed and pruned.subject else None,
        layerwise=by_layer,
        rankings=rankings,
    )
    if not job.generation:
        return findings
    texts = write(base, PROMPTS, progress, "base model writes")
    own = own_answers_of(engine, questions, PROMPTS, texts, progress)
    generation = health(base, PROMPTS, texts, pruned.written)
    read = examine(engine, own, wanted, progress, "the base's own answers, read by it")
    smaller = pruned.subject
    del base, engine
    if smaller is None:  # one model in memory at a time
        progress.note(f"loading the pruned model {exported.folder} again, to read what the base wrote")
        smaller = job.loading.subject(str(exported.folder))
    label = "the base's own answers, read by the pruned model"
    models = {
        PRUNED: examine(job.loading.engine(smaller), own, [INTACT], progress, label)[INTACT],
        **{label: read[removal] for label, removal in removals.items()},
    }
    return replace(findings, generation=generation, own_answers=agreement(own, read[INTACT], models, job.seed))


def _alone(job: Job, subject: Subject, questions: Questions, progress: Progress) -> Alone:
    found = examine(job.loading.engine(subject), questions, [INTACT], progress, "asking the pruned model")
    return Alone(
        outcomes=found[INTACT],
        written=write(subject, PROMPTS, progress, "pruned model writes") if job.generation else [],
        cache=cache_bytes_per_token(subject),
        dtype=str(subject.dtype).removeprefix("torch."),
        device=str(subject.device),
        subject=subject if job.text or job.speed else None,
    )


def _layer_by_layer(
    job: Job, engine: Engine, questions: Questions, tasks: Sequence[AuditedTask], progress: Progress
) -> tuple[Layerwise | None, tuple[Ranking, ...]]:
    if not job.layerwise:
        return None, job.rankings
    plan, few = job.exported.plan, layerwise_questions(questions)
    parts = parts_of(plan, engine.subject.anatomy)
    whole = PRUNED if job.exported.heal is None else UNHEALED
    found = layerwise(ask_layers(engine, few, parts, progress), parts, tasks, whole)
    if "cosine" in (plan.metric and plan.metric.spec, *(ranking.metric for ranking in job.rankings)):
        return found, job.rankings
    cosine = cosine_ranking(engine.subject, few, progress)
    return found, (*job.rankings, *([cosine] if cosine else []))


def _both(base: int | None, pruned: int | None) -> tuple[int, int] | None:
    return None if base is None or pruned is None else (base, pruned)


def _text(job: Job, text: str | None, base: Subject, pruned: Subject | None, progress: Progress) -> TextLoss | None:
    if text is None or job.text is None or pruned is None:
        return None
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    source = f"{Path(job.text).name} (sha256 {digest})"
    before = Removal.from_layers(job.exported.plan.removal) if job.exported.heal else None
    return text_loss(base, pruned, windows_of(text, base), source, unhealed=before, seed=job.seed, progress=progress)


def _questions(job: Job, encoder: object, progress: Progress) -> Questions:
    seen = seen_items(*job.compare.values()) | job.exported.seen
    questions = load_questions(
        job.tasks,
        encoder,  # type: ignore[arg-type]  # an HFLM, which lm-eval leaves untyped
        use="evaluation",
        include_path=job.include_path,
        data_dir=job.data_dir,
        limit=job.limit,
        num_fewshot=job.num_fewshot,
        prompting=job.prompting,
        seed=job.seed,
        exclude=seen,
    )
    check_unseen(questions, seen)
    for remark in questions.remarks():
        progress.note(remark)
    check_turns(job.turns, questions)
    return questions


def _compare(
    questions: Questions, base: Mapping[str, Outcomes], models: Mapping[str, Mapping[str, Outcomes]], seed: int
) -> tuple[AuditedTask, ...]:
    compared = []
    for name, task in questions.tasks.items():
        outcomes = {label: found[name] for label, found in models.items()}
        chances = [item.chance for item in task.items]
        found = compare_task(task.data(), chances, task.excluded, base[name], outcomes, seed)
        flipped = flipped_items(task, base[name], outcomes[PRUNED])
        compared.append(found.model_copy(update={"flipped": flipped, "written": is_written(task)}))
    return adjusted(compared)
