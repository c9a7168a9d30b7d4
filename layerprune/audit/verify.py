"""Is a folder still what export and audit left? Every byte is looked at, every figure worked out again."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from layerprune.audit.compare import SIGNIFICANT, adjusted, compare_models, overall
from layerprune.audit.layerwise import layerwise
from layerprune.audit.verdict import verdict
from layerprune.audit.writing import counts
from layerprune.checkpoint import Checkpoint, locate
from layerprune.documents import PRUNED, UNHEALED, Audit, AuditedTask, Document, HealLog, Plan, Receipt, not_looked_for
from layerprune.documents.base import pretty
from layerprune.errors import LayerpruneError, one_line
from layerprune.progress import SILENT, Progress
from layerprune.report.card import card_faults
from layerprune.report.page import REPORT, render_report

FOLDER = "layerprune"
CARD = "README.md"
NOT_LOOKED_AT = (".git", ".cache", ".gitattributes")  # what git and the Hub's client put beside a model


@dataclass(frozen=True)
class Verification:
    """What was checked and what was found wrong; each problem is one line that names file or field."""

    problems: tuple[str, ...]
    files: int
    bytes: int
    audited: bool
    digests: dict[str, str]  # sha256 of each document: compare them with those the publisher gives

    @property
    def ok(self) -> bool:
        return not self.problems


@dataclass
class Documents:
    """The documents of a folder, each None when missing or unreadable."""

    plan: Plan | None = None
    receipt: Receipt | None = None
    heal: HealLog | None = None
    audit: Audit | None = None

    @property
    def writer(self) -> Receipt | HealLog | None:
        """The document that names this folder's files and weights: the last step's that wrote any."""
        return self.heal or self.receipt


def verify(folder: Path, *, base: str | None = None, progress: Progress = SILENT) -> Verification:
    """Recompute every hash of an exported folder and how plan, receipt, audit and card hang together.

    ``base``: the base model, whose weights are then compared with the receipt too. Problems are returned, not raised.
    A person who changes weights *and* rewrites every document consistently is found only by comparing ``digests`` with
    what the publisher says, or by repeating audit items (``rerun.repeat``).
    """
    folder = Path(folder)
    documents, problems = _read(folder)
    files = size = 0
    if documents.writer is not None:
        files, size = len(documents.writer.files), sum(entry.bytes for entry in documents.writer.files.values())
        problems += _files(folder, documents.writer, progress)
        problems += _weights(folder, documents.writer, base)
    problems += _chain(documents)
    if documents.audit is not None:
        problems += _figures(documents.audit, documents.receipt, documents.heal)
    if documents.receipt is not None:
        problems += _earlier_rounds(documents.receipt, documents.audit)
    if documents.plan is not None and documents.receipt is not None:
        problems += _card(folder)
        problems += _report(folder, documents.audit)
    found = {kind: getattr(documents, kind) for kind in ("plan", "receipt", "heal", "audit")}
    digests = {name: document.sha256() for name, document in found.items() if document is not None}
    return Verification(tuple(problems), files, size, documents.audit is not None, digests)


def _read(folder: Path) -> tuple[Documents, list[str]]:
    documents, problems = Documents(), []
    for name, kind in (("plan", Plan), ("receipt", Receipt), ("heal", HealLog), ("audit", Audit)):
        path = folder / FOLDER / kind.filename
        if kind in (HealLog, Audit) and not path.exists():
            continue
        try:
            document: Document = kind.load(path)
        except LayerpruneError as error:
            problems.append(one_line(error))
            continue
        setattr(documents, name, document)
        if path.read_bytes() != (pretty(document.model_dump(mode="json")) + "\n").encode():
            problems.append(
                f"{FOLDER}/{kind.filename}: the file's bytes are not those layerprune writes for its content"
            )
    return documents, problems


def _files(folder: Path, writer: Receipt | HealLog, progress: Progress) -> Iterator[str]:
    whose = _name(writer)
    total = sum(entry.bytes for entry in writer.files.values())
    with progress.task("hashing files", total, "B") as advance:
        for name, entry in writer.files.items():
            path = folder / name
            if not path.is_file():
                yield f"{name}: missing"
            elif path.stat().st_size != entry.bytes:
                yield f"{name}: {path.stat().st_size} bytes, the {whose} says {entry.bytes}"
            elif _sha256(path) != entry.sha256:
                yield f"{name}: its sha256 is not the {whose}'s"
            advance(entry.bytes)
    known = {*writer.files, CARD, REPORT, *(f"{FOLDER}/{kind.filename}" for kind in (Plan, Receipt, HealLog, Audit))}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in known and name.split("/")[0] not in NOT_LOOKED_AT:
            yield f"{name}: not a file that export, heal or audit wrote"


def _name(writer: Receipt | HealLog) -> str:
    return "receipt" if isinstance(writer, Receipt) else "healing log"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _weights(folder: Path, writer: Receipt | HealLog, base: str | None) -> Iterator[str]:
    whose = _name(writer)
    try:
        if Checkpoint.open(folder).fingerprint() != writer.result.fingerprint:
            yield f"the weights' fingerprint is not the {whose}'s"
    except LayerpruneError as error:
        yield one_line(error)
    if base is not None and Checkpoint.open(locate(base).path).fingerprint() != writer.base.fingerprint:
        yield f"{base} is not the base model of this checkpoint: its weights' fingerprint is not the {whose}'s"


def _chain(documents: Documents) -> Iterator[str]:
    """Check that the documents name each other and the same base."""
    plan, receipt, audit = documents.plan, documents.receipt, documents.audit
    if plan and receipt:
        yield from _differ(
            ("receipt.plan_sha256", receipt.plan_sha256, "the plan's", plan.sha256()),
            ("receipt.base.fingerprint", receipt.base.fingerprint, "the plan's", plan.model.fingerprint),
            ("receipt.removal", receipt.removal, "the plan's", plan.removal),
        )
    if documents.heal:
        yield from _healing(documents.heal, plan, receipt)
    if plan and audit:
        yield from _differ(("audit.plan_sha256", audit.plan_sha256, "the plan's", plan.sha256()))
        seen = plan.seen
        shared = sum(mark in seen for task in audit.tasks for mark in task.data.fingerprints)
        if shared:
            yield f"audit: {shared} of its items have been seen by the plan"
    if receipt and audit:
        yield from _differ(
            ("audit.receipt_sha256", audit.receipt_sha256, "the receipt's", receipt.sha256()),
            ("audit.base", audit.base, "the receipt's", receipt.base),
            ("audit.removal", audit.removal, "the receipt's", receipt.removal),
        )
    if audit and documents.heal:
        met = sum(mark in documents.heal.met for task in audit.tasks for mark in task.data.fingerprints)
        if met:
            yield f"audit: {met} of its items stood in the text that healed"
    if audit and documents.writer:
        log = documents.heal.sha256() if documents.heal else None
        yield from _differ(
            ("audit.pruned", audit.pruned, f"the {_name(documents.writer)}'s", documents.writer.result),
            ("audit.heal_sha256", audit.heal_sha256, "the healing log's", log),
        )


def _healing(log: HealLog, plan: Plan | None, receipt: Receipt | None) -> Iterator[str]:
    """Check that each healing went on from what the step before it left."""
    before = None if receipt is None else receipt.result
    for step in log.steps:
        if plan:
            yield from _differ(("heal.plan_sha256", step.plan_sha256, "the plan's", plan.sha256()))
        if receipt:
            yield from _differ(
                ("heal.receipt_sha256", step.receipt_sha256, "the receipt's", receipt.sha256()),
                ("heal.base", step.base, "the receipt's", receipt.base),
            )
        if before is not None:
            yield from _differ(("heal.unhealed", step.unhealed, "the result of the step before", before))
        before = step.result


def _differ(*pairs: tuple[str, object, str, object]) -> Iterator[str]:
    for field, value, whose, other in pairs:
        if value != other:
            yield f"{field} is not {whose}"


def _earlier_rounds(receipt: Receipt, audit: Audit | None) -> Iterator[str]:
    """Check that no audit used what an earlier round had seen, and work the earlier audits' figures out again.

    That the documents of a round belong together is checked when the receipt that holds them is read.
    """
    for number, one in enumerate(receipt.rounds, 1):
        if one.audit is not None:
            where = f"round {number}: "
            shared = one.plan.seen | one.receipt.seen_before | (one.heal.met if one.heal else frozenset())
            yield from (where + problem for problem in _shared(one.audit, shared))
            yield from (where + problem for problem in _figures(one.audit, one.receipt, one.heal))
    if audit is not None:
        yield from _shared(audit, receipt.seen_before)


def _shared(audit: Audit, seen: frozenset[str]) -> Iterator[str]:
    count = sum(mark in seen for task in audit.tasks for mark in task.data.fingerprints)
    if count:
        yield f"audit: {count} of its items have been seen by an earlier round of pruning"


def _figures(audit: Audit, receipt: Receipt | None, log: HealLog | None) -> Iterator[str]:
    """Work every figure out again from the items' outcomes."""
    if len({task.data.task for task in audit.tasks}) < len(audit.tasks):
        yield "audit: one of its tasks stands there twice"
        return
    for task in audit.tasks:
        name, items = task.data.task, task.data.items
        lengths = {len(task.data.fingerprints), len(task.base_outcomes.correct)}
        lengths |= {len(model.outcomes.correct) for model in task.models.values()}
        if lengths != {items}:
            yield f"audit: {name}: {items} items, but lists of {sorted(lengths)} entries"
            return
    tasks = adjusted([_worked_out(task, audit.seed) for task in audit.tasks])
    for found, written in zip(tasks, audit.tasks, strict=True):
        if not _alike(found.model_dump(), written.model_dump()):
            yield f"audit: the figures of {written.data.task} do not follow from its items' outcomes"
    everything = overall(tasks)
    if not _alike(
        {k: v.model_dump() for k, v in everything.items()}, {k: v.model_dump() for k, v in audit.overall.items()}
    ):
        yield "audit: the overall figures do not follow from the tasks'"
    if audit.layerwise is not None and not _layers_follow(audit, tasks):
        yield "audit: the layerwise figures do not follow from their items' outcomes"
    if audit.generation is not None:
        counted = counts(audit.generation.continuations)
        if any(getattr(audit.generation, name) != value for name, value in counted.items()):
            yield "audit: the count of faulty texts does not follow from the texts' faults"
    unlooked = not_looked_for(receipt, log, (task.data.task for task in tasks))
    if audit.verdict != verdict(audit.removal, audit.base.layers, tasks, everything, audit.generation, unlooked):
        yield "audit: the verdict does not follow from the figures"


def _layers_follow(audit: Audit, tasks: Sequence[AuditedTask]) -> bool:
    written = audit.layerwise
    if written is None:
        return True
    asked = {one.units: one.correct for one in (*written.alone, *written.path) if one.units != audit.removal}
    try:
        found = layerwise(asked, written.parts, tasks, PRUNED if audit.heal_sha256 is None else UNHEALED)
    except (KeyError, IndexError, ValueError):  # lists that are too short, tasks that are missing
        return False
    return found is not None and _alike(found.model_dump(), written.model_dump())


def _worked_out(task: AuditedTask, seed: int) -> AuditedTask:
    return task.model_copy(
        update={
            "informative": task.p_above_chance <= SIGNIFICANT,
            "base_accuracy": task.base_outcomes.accuracy,
            "base_gold_probability": task.base_outcomes.mean_gold_probability,
            "models": compare_models(task.base_outcomes, {k: m.outcomes for k, m in task.models.items()}, seed),
        }
    )


def _alike(a: object, b: object) -> bool:
    """Compare nested plain data, numbers to nine digits: another numpy may round differently."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_alike(a[key], b[key]) for key in a)
    if isinstance(a, Sequence) and isinstance(b, Sequence) and not isinstance(a, str):
        return len(a) == len(b) and all(map(_alike, a, b))
    if isinstance(a, float) and isinstance(b, int | float):
        return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)
    return a == b


def _card(folder: Path) -> Iterator[str]:
    """The card must say what the documents say, in its metadata as in its generated part."""
    try:
        for fault in card_faults(folder):
            yield f"{CARD}: {fault}"
    except LayerpruneError as error:
        yield one_line(error)


def _report(folder: Path, audit: Audit | None) -> Iterator[str]:
    path = folder / REPORT
    if audit is not None and not path.exists():
        yield f"{REPORT}: missing"
    elif path.exists() and (audit is None or path.read_bytes() != render_report(folder).encode()):
        yield f"{REPORT}: not what the documents give"
