"""Is a folder still what export and audit left? Every byte is looked at, every figure worked out again."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerprune.artifacts import (
    PRUNED,
    UNHEALED,
    Audit,
    AuditedTask,
    Document,
    HealLog,
    OwnAnswers,
    Part,
    Plan,
    Receipt,
    not_looked_for,
)
from layerprune.artifacts.base import pretty
from layerprune.artifacts.receipt import audit_faults, chain_faults, name_of
from layerprune.auditor.comparison import SIGNIFICANT, adjusted, compare_models, foreign_verdict, overall, verdict
from layerprune.auditor.generation import counts, followed
from layerprune.auditor.layerwise import layerwise
from layerprune.checkpoint import Checkpoint, locate
from layerprune.checkpoint.location import FILENAME as LOCATOR
from layerprune.errors import LayerpruneError, one_line
from layerprune.files import FILENAME as LOCK
from layerprune.files import listed, shown
from layerprune.report.card import CARD, FRAGMENT, OURS, card_faults, fragment_is_current
from layerprune.report.page import REPORT, render_report
from layerprune.util import SILENT, Progress

FOLDER = "layerprune"
# What the Hub puts into every repo, the lock of an audit that is at work, or was killed, and where the base lies.
NOT_LOOKED_AT = (".gitattributes", LOCK, f"{FOLDER}/{LOCATOR}")


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

    @property
    def first_problem(self) -> str:
        """The first problem, and how many there are beside it."""
        more = len(self.problems) - 1
        return self.problems[0] + (f" (and {more} more)" if more else "")


KINDS: dict[str, type[Document]] = {"plan": Plan, "receipt": Receipt, "heal": HealLog, "audit": Audit}


def verify(folder: Path, *, base: str | None = None, strays: bool = True, progress: Progress = SILENT) -> Verification:
    """Recompute every hash of an exported folder and how plan, receipt, audit and card hang together.

    ``base``: the base model, whose weights are then compared with the receipt too. ``strays``: files that no document
    names are problems. Problems are returned, not raised.
    A person who changes weights *and* rewrites every document consistently is found only by comparing ``digests`` with
    what the publisher says, or by asking audited items again (``recheck``).
    """
    folder = Path(folder)
    links = [f"{shown(name)}: {fault}" for name, fault in listed(folder) if fault]
    if links:  # nothing behind them is this folder's, and opening a named pipe would wait for ever
        return Verification(tuple(links), 0, 0, (folder / FOLDER / Audit.filename).is_file(), {})
    if foreign_audit(folder):
        return _verify_foreign(folder, base, strays)
    documents, problems = _read(folder)
    plan, receipt, heal, audit = (documents.get(name) for name in KINDS)
    writer = heal or receipt  # names this folder's files and weights: the last step's that wrote any
    files = size = 0
    if writer is not None:
        files, size = len(writer.files), sum(entry.bytes for entry in writer.files.values())
        problems += _files(folder, writer, progress)
        problems += _strays(folder, writer) if strays else ()
        problems += _weights(folder, writer, base)
    problems += chain_faults(plan, receipt, heal)
    if audit is not None:
        problems += audit_faults(audit, plan, receipt, heal)
        problems += _figures(audit, receipt, heal)
    if receipt is not None:
        problems += _earlier_rounds(receipt)
    if plan is not None and receipt is not None:
        problems += _card(folder)
        problems += _report(folder, audit)
    digests = {name: document.sha256() for name, document in documents.items()}
    return Verification(tuple(problems), files, size, audit is not None, digests)


def foreign_audit(folder: Path) -> bool:
    """Whether a folder is what the audit of a checkpoint left that layerprune did not export."""
    return (folder / Audit.filename).is_file() and not (folder / FOLDER).exists()


def _verify_foreign(folder: Path, base: str | None, strays: bool) -> Verification:
    """Work out again what the audit of a foreign checkpoint says; the checkpoint itself lies elsewhere."""
    path, pages = folder / Audit.filename, (REPORT, FRAGMENT)
    try:
        audit = Audit.load(path)
    except LayerpruneError as error:
        return Verification((one_line(error),), 0, 0, True, {})
    problems: list[str] = []
    if not _holds(path, (pretty(audit.model_dump(mode="json")) + "\n").encode()):
        problems.append(f"{path.name}: the file's bytes are not those layerprune writes for its content")
    if not audit.foreign:
        problems.append(f"{path.name}: it is of an exported checkpoint, and stands in layerprune/ of its folder")
        return Verification(tuple(problems), 1, path.stat().st_size, True, {"audit": audit.sha256()})
    problems += _figures(audit, None, None)
    current = (
        lambda: _holds(folder / REPORT, render_report(folder, audit).encode()),
        lambda: fragment_is_current(folder, audit),
    )
    for name, holds in zip(pages, current, strict=True):
        if not (folder / name).is_file():
            problems.append(f"{name}: missing")
        elif not holds():
            problems.append(f"{name}: not what audit.json gives")
    known = {path.name, *pages, *NOT_LOOKED_AT}
    there = [name for name, _ in listed(folder)]
    problems += [f"{shown(name)}: not a file that the audit wrote" for name in there if strays and name not in known]
    if base is not None and Checkpoint.open(locate(base).path).fingerprint() != audit.base.fingerprint:
        problems.append(f"{base} is not the base model of this audit: its weights' fingerprint is not the audit's")
    sizes = [(folder / name).stat().st_size for name in (path.name, *pages) if name in there]
    return Verification(tuple(problems), len(sizes), sum(sizes), True, {"audit": audit.sha256()})


def _read(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the folder's documents by name, those that are there and can be read, and what is wrong with others."""
    documents, problems = {}, []
    for name, kind in KINDS.items():
        path = folder / FOLDER / kind.filename
        if kind in (HealLog, Audit) and not path.exists():
            continue
        try:
            document = kind.load(path)
        except LayerpruneError as error:
            problems.append(one_line(error))
            continue
        documents[name] = document
        if not _holds(path, (pretty(document.model_dump(mode="json")) + "\n").encode()):
            problems.append(
                f"{FOLDER}/{kind.filename}: the file's bytes are not those layerprune writes for its content"
            )
    return documents, problems


def _files(folder: Path, writer: Receipt | HealLog, progress: Progress) -> Iterator[str]:
    whose = name_of(writer)
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


def _strays(folder: Path, writer: Receipt | HealLog) -> Iterator[str]:
    known = {*writer.files, REPORT, *OURS, *NOT_LOOKED_AT}
    for name, _ in listed(folder):
        if name not in known:
            yield f"{shown(name)}: not a file that export, heal or audit wrote"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _weights(folder: Path, writer: Receipt | HealLog, base: str | None) -> Iterator[str]:
    whose = name_of(writer)
    try:
        if Checkpoint.open(folder).fingerprint() != writer.result.fingerprint:
            yield f"the weights' fingerprint is not the {whose}'s"
    except LayerpruneError as error:
        yield one_line(error)
    if base is not None and Checkpoint.open(locate(base).path).fingerprint() != writer.base.fingerprint:
        yield f"{base} is not the base model of this checkpoint: its weights' fingerprint is not the {whose}'s"


def _earlier_rounds(receipt: Receipt) -> Iterator[str]:
    """Work the figures of earlier rounds' audits out again; that their documents fit is checked as they are read."""
    for number, one in enumerate(receipt.rounds, 1):
        if one.audit is not None:
            yield from (f"round {number}: {problem}" for problem in _figures(one.audit, one.receipt, one.heal))


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
        if not _alike(found, written):
            yield f"audit: the figures of {written.data.task} do not follow from its items' outcomes"
    everything = overall(tasks)
    if not _alike(everything, audit.overall):
        yield "audit: the overall figures do not follow from the tasks'"
    if audit.layerwise is not None and not _layers_follow(audit, tasks):
        yield "audit: the layerwise figures do not follow from their items' outcomes"
    if audit.generation is not None:
        counted = counts(audit.generation.continuations)
        if any(getattr(audit.generation, name) != value for name, value in counted.items()):
            yield "audit: the count of faulty texts does not follow from the texts' faults"
    for one in audit.own_answers:
        if not _answers_follow(one, audit.seed):
            yield f"audit: what is kept of the base's own answers to {one.task} does not follow from their outcomes"
    if audit.removal is None:
        said = foreign_verdict(audit.base, audit.pruned, tasks, audit.generation, audit.own_answers)
    else:
        unlooked = not_looked_for(receipt, log, (task.data.task for task in tasks))
        said = verdict(audit.removal, audit.base.layers, tasks, audit.generation, unlooked, audit.own_answers)
    if audit.verdict != said:
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
    return found is not None and _alike(found, written)


def _answers_follow(written: OwnAnswers, seed: int) -> bool:
    every = [written.base_outcomes, *(found.outcomes for found in written.models.values())]
    known = [values for one in every for values in (one.answer, one.agreed)]
    if any(values is None or len(values) != len(written.fingerprints) for values in known):
        return False
    models = {label: followed(written.base_outcomes, one.outcomes, seed) for label, one in written.models.items()}
    return _alike(models, written.models)


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
    """Compare nested data, numbers to nine digits: another numpy may round differently."""
    if isinstance(a, Part) and isinstance(b, Part):
        return _alike(a.model_dump(), b.model_dump())
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_alike(a[key], b[key]) for key in a)
    if isinstance(a, Sequence) and isinstance(b, Sequence) and not isinstance(a, str):
        return len(a) == len(b) and all(map(_alike, a, b))
    if isinstance(a, float) and isinstance(b, int | float):
        return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-12)
    return a == b


def _card(folder: Path) -> Iterator[str]:
    """The card must say what the documents say, in its metadata as in its generated part."""
    if not (folder / CARD).exists():
        yield f"{CARD}: missing"
        return
    try:
        for fault in card_faults(folder):
            yield f"{CARD}: {fault}"
    except LayerpruneError as error:
        yield one_line(error)


def _report(folder: Path, audit: Audit | None) -> Iterator[str]:
    path = folder / REPORT
    if audit is not None and not path.exists():
        yield f"{REPORT}: missing"
    elif path.exists() and (audit is None or not _holds(path, render_report(folder).encode())):
        yield f"{REPORT}: not what the documents give"


def _holds(path: Path, content: bytes) -> bool:
    """Whether a file holds these bytes; one of another length is not read."""
    return path.stat().st_size == len(content) and path.read_bytes() == content
