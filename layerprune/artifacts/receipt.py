"""receipt.json: what export wrote, how it was checked, and the earlier rounds it stands on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, ValidationError, model_validator

from layerprune.artifacts.audit import Audit
from layerprune.artifacts.base import Document, FileName, Files, ModelRef, Part, Units
from layerprune.artifacts.heal_log import HealLog
from layerprune.artifacts.plan import Plan
from layerprune.errors import DocumentError
from layerprune.formatting import in_words

# receipt.json: what export wrote, file by file, and how it was checked.


class Change(Part):
    """One config field that differs from the base."""

    before: Any = None
    after: Any = None


class LogitsProof(Part):
    """The exported model against the base with the removed units bypassed."""

    method: str = Field(description="'whole models', or how a model larger than memory was compared")
    windows: int
    tokens: int
    dtype: str
    max_difference: float = Field(description="largest absolute difference of any logit")
    scale: float = Field(description="largest absolute logit of the bypassed base")


class DroppedHeads(Part):
    """Multi-token-prediction heads that were left out."""

    tensors: int
    bytes: int

    @property
    def words(self) -> str:
        """One sentence, for a plan's warnings and the card."""
        return (
            f"its multi-token-prediction head is left out: {self.tensors} tensors, {in_words(self.bytes)}; it reads "
            "the intact stack, so speculative decoding with it is no longer possible"
        )


class Receipt(Document):
    """Export's account of itself."""

    filename: ClassVar[str] = "receipt.json"
    kind: Literal["receipt"] = "receipt"
    format: Literal[1] = 1
    base: ModelRef
    result: ModelRef
    removal: Units
    plan_sha256: str
    files: Files
    dropped_tensors: int
    dropped_files: tuple[FileName, ...] = Field(
        default=(), description="files of the base that were not carried along, e.g. pickles"
    )
    bytes_before: int = Field(ge=1)
    bytes_after: int = Field(ge=1)
    config_changes: dict[str, Change]
    missing_keys: tuple[str, ...] = ()
    unexpected_keys: tuple[str, ...] = ()
    proof: LogitsProof | None = None
    notes: tuple[str, ...] = Field(default=(), description="what was not checked in full or not measured, and why")
    dropped_heads: DroppedHeads | None = Field(
        default=None, description="multi-token-prediction heads of the base, which read the intact stack"
    )
    earlier: Earlier | None = Field(default=None, description="the pruning that the base came from, if it was one")
    versions: dict[str, str]

    @property
    def headline(self) -> str:
        return (
            f"{self.base.id} without layers {', '.join(map(str, self.removal))}: {self.base.layers} to "
            f"{self.result.layers} layers, {self.bytes_before:,} to {self.bytes_after:,} bytes"
        )

    def records(self) -> list[dict[str, Any]]:
        """Return a row for each file that was written."""
        return [{"file": name, "bytes": one.bytes, "sha256": one.sha256} for name, one in self.files.items()]

    @property
    def rounds(self) -> tuple[Earlier, ...]:
        """The earlier rounds of pruning, first to last; empty where the base was not pruned before."""
        return () if self.earlier is None else (*self.earlier.receipt.rounds, self.earlier)

    @property
    def seen_before(self) -> frozenset[str]:
        """Fingerprints of every item that had a say in an earlier round: an audit must not use them."""
        return frozenset(mark for one in self.rounds for mark in one.seen)

    @property
    def first_base(self) -> ModelRef:
        """The model that the first round began with."""
        return self.rounds[0].receipt.base if self.rounds else self.base

    @model_validator(mode="after")
    def _goes_on_from_the_earlier_round(self) -> Self:
        if self.earlier is not None:
            changed = self.earlier.result.fingerprint != self.base.fingerprint
            if changed != self.earlier.changed or self.earlier.result.layers != self.base.layers:
                raise ValueError("earlier is not the round that left the base: its result is another model")
        return self


# A round of pruning that the base of a later one came from, with all its documents.


class Earlier(Part):
    """The documents that stood beside a base which had been pruned before; its receipt holds the round before it."""

    plan: Plan
    receipt: Receipt
    heal: HealLog | None = None
    audit: Audit | None = None
    changed: bool = Field(default=False, description="whether other tools changed the weights before the next round")

    @property
    def result(self) -> ModelRef:
        """The model that this round left."""
        return self.heal.result if self.heal else self.receipt.result

    @property
    def seen(self) -> frozenset[str]:
        """Fingerprints of every item that this round's plan chose by, or that stood in the text that healed."""
        return self.plan.seen | (self.heal.met if self.heal else frozenset())

    @model_validator(mode="after")
    def _belongs_together(self) -> Self:
        audited = audit_faults(self.audit, self.plan, self.receipt, self.heal) if self.audit else ()
        for fault in (*chain_faults(self.plan, self.receipt, self.heal), *audited):
            raise ValueError(f"an earlier round's documents do not belong together: {fault}")
        return self

    @classmethod
    def read(cls, folder: Path, base: ModelRef) -> Earlier | None:
        """Return the last round of the base in ``folder``; None where no export wrote it.

        Raises ``DocumentError`` for documents that cannot be read or do not belong together.
        """
        if not (folder / Receipt.filename).exists():
            return None
        plan, receipt = Plan.load(folder / Plan.filename), Receipt.load(folder / Receipt.filename)
        log = HealLog.load(folder / HealLog.filename) if (folder / HealLog.filename).exists() else None
        audit = Audit.load(folder / Audit.filename) if (folder / Audit.filename).exists() else None
        result = log.result if log else receipt.result
        try:
            return cls(plan=plan, receipt=receipt, heal=log, audit=audit,
                       changed=result.fingerprint != base.fingerprint)  # fmt: skip
        except ValidationError as error:
            said = error.errors()[0]["msg"].removeprefix("Value error, ")
            raise DocumentError(f"{folder}: {said}; put them back, or take the folder {folder.name} away") from error


def not_looked_for(receipt: Receipt | None, log: HealLog | None, tasks: Iterable[str]) -> tuple[str, ...]:
    """Return the tasks whose items may stand in a text that healed, in this round or an earlier one: nobody looked."""
    logs = [*(one.heal for one in (receipt.rounds if receipt else ())), log]
    read = [corpus for one in logs if one is not None for corpus in one.corpora]
    return tuple(task for task in tasks if any(task not in corpus.overlap for corpus in read))


Receipt.model_rebuild(_types_namespace={"Earlier": Earlier})


# Do the documents of one checkpoint belong together? Every reader of a folder asks here.


def chain_faults(plan: Plan | None, receipt: Receipt | None, log: HealLog | None) -> Iterator[str]:
    """Yield where plan, receipt and healing log contradict each other; one that is None is passed over."""
    if plan and receipt:
        yield from _differ(
            ("receipt.plan_sha256", receipt.plan_sha256, "the plan's", plan.sha256()),
            ("receipt.base", receipt.base, "the plan's model", plan.model),
            ("receipt.removal", receipt.removal, "the plan's", plan.removal),
        )
    if receipt:
        left = receipt.base.layers - len(receipt.removal)
        yield from _differ(("receipt.result.layers", receipt.result.layers, f"the {left} that are left", left))
    before = receipt.result if receipt else None
    for step in log.steps if log else ():  # each healing went on from what the step before it left
        if plan:
            yield from _differ(("heal.plan_sha256", step.plan_sha256, "the plan's", plan.sha256()))
        if receipt:
            yield from _differ(
                ("heal.receipt_sha256", step.receipt_sha256, "the receipt's", receipt.sha256()),
                ("heal.base", step.base, "the receipt's", receipt.base),
            )
        if before is not None:
            yield from _differ(("heal.unhealed", step.unhealed, "the result of the step before", before))
        for field in ("model_type", "layers", "parameters"):
            value, kept = getattr(step.result, field), getattr(step.unhealed, field)
            yield from _differ((f"heal.result.{field}", value, "that of the unhealed checkpoint", kept))
        before = step.result


def audit_faults(audit: Audit, plan: Plan | None, receipt: Receipt | None, log: HealLog | None) -> Iterator[str]:
    """Yield where an audit contradicts the documents of the folder it stands in."""

    def shared(marks: frozenset[str], how: str) -> Iterator[str]:
        if count := sum(mark in marks for task in audit.tasks for mark in task.data.fingerprints):
            yield f"audit: {count} of its items {how}"

    if plan:
        yield from _differ(("audit.plan_sha256", audit.plan_sha256, "the plan's", plan.sha256()))
        yield from shared(plan.seen, "have been seen by the plan")
    if receipt:
        yield from _differ(
            ("audit.receipt_sha256", audit.receipt_sha256, "the receipt's", receipt.sha256()),
            ("audit.base", audit.base, "the receipt's", receipt.base),
            ("audit.removal", audit.removal, "the receipt's", receipt.removal),
            ("audit.bytes_before", audit.bytes_before, "the receipt's", receipt.bytes_before),
            ("audit.bytes_after", audit.bytes_after, "the receipt's", receipt.bytes_after),
        )
        yield from shared(receipt.seen_before, "have been seen by an earlier round of pruning")
    if log:
        yield from shared(log.met, "stood in the text that healed")
    if writer := log or receipt:
        yield from _differ(
            ("audit.pruned", audit.pruned, f"the {name_of(writer)}'s", writer.result),
            ("audit.heal_sha256", audit.heal_sha256, "the healing log's", log.sha256() if log else None),
        )


def name_of(writer: Receipt | HealLog) -> str:
    """Return what messages call the document that names a folder's files."""
    return "receipt" if isinstance(writer, Receipt) else "healing log"


def _differ(*pairs: tuple[str, object, str, object]) -> Iterator[str]:
    for field, value, whose, other in pairs:
        if value != other:
            yield f"{field} is not {whose}"
