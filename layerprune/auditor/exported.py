"""An exported folder's documents, the one check that they belong together, and what else an audit has to fit."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from layerprune.checkpoint.locator import learn
from layerprune.documents import PRUNED, UNHEALED, Audit, HealLog, ModelRef, Plan, Receipt
from layerprune.documents.chain import audit_faults, chain_faults
from layerprune.errors import DocumentError, TaskError, UsageError
from layerprune.paths import check_plain
from layerprune.report.card import unlike_the_card
from layerprune.tasks import Questions

RESERVED = ("base", PRUNED, UNHEALED)


@dataclass(frozen=True)
class Exported:
    """The documents of an exported folder, found to belong together; there may be no healing and no audit yet."""

    folder: Path
    plan: Plan
    receipt: Receipt
    heal: HealLog | None = None
    audit: Audit | None = None

    @property
    def result(self) -> ModelRef:
        """The model whose weights lie in the folder."""
        return self.receipt.result if self.heal is None else self.heal.result

    @property
    def seen(self) -> frozenset[str]:
        """Every item that had a say, in this round of pruning or an earlier one, or stood in a text that healed."""
        return self.plan.seen | self.receipt.seen_before | (self.heal.met if self.heal else frozenset())

    @classmethod
    def read(cls, folder: Path) -> Exported:
        """Read the documents; every command that reads an exported folder does it here.

        Raises ``DocumentError`` for a folder export did not write, and where one document contradicts another or is not
        the one that the card names: something was edited or mixed up. Raises ``CheckpointError`` for a folder with
        links or special files: it would be read, or written, elsewhere.
        """
        folder = Path(folder)
        inside = folder / "layerprune"
        if not (inside / Receipt.filename).is_file():
            what = "has no layerprune/receipt.json" if folder.is_dir() else "does not exist"
            raise DocumentError(
                f"{folder} is not an exported checkpoint: it {what}; make one with layerprune export PLAN -o FOLDER"
            )
        check_plain(folder)
        learn(inside)
        plan, receipt = Plan.load(inside / Plan.filename), Receipt.load(inside / Receipt.filename)
        if receipt.plan_sha256 != plan.sha256():
            raise DocumentError(
                f"{inside / Plan.filename} is not the plan that was carried out: its sha256 is {short(plan.sha256())}, "
                f"the receipt says {short(receipt.plan_sha256)}; export the plan again"
            )
        log = HealLog.load(inside / HealLog.filename) if (inside / HealLog.filename).exists() else None
        if log is not None and log.receipt_sha256 != receipt.sha256():
            raise DocumentError(
                f"{inside / HealLog.filename} is not of this checkpoint: it names a receipt with sha256 "
                f"{short(log.receipt_sha256)}, not {short(receipt.sha256())}; heal the checkpoint again"
            )
        audit = Audit.load(inside / Audit.filename) if (inside / Audit.filename).exists() else None
        # not the audit: one that was cut off has renewed the card before its document
        for fault in (*chain_faults(plan, receipt, log), *unlike_the_card(folder, plan, receipt, log)):
            raise DocumentError(
                f"{folder}: {fault}; a document was edited: put it back, or make the checkpoint again "
                "(layerprune verify lists every problem)"
            )
        for fault in audit_faults(audit, plan, receipt, log) if audit else ():
            raise DocumentError(f"{inside / Audit.filename}: {fault}; put it back, or remove it to audit again")
        return cls(folder, plan, receipt, log, audit)


def seen_items(*plans: Plan) -> frozenset[str]:
    """Return the fingerprints of every item that had a say in any of the plans."""
    return frozenset(mark for plan in plans for mark in plan.seen)


def check_unseen(questions: Questions, seen: Collection[str]) -> None:
    """Raise ``TaskError`` when an item had a say in a plan: an audit of such items would be no audit."""
    for task in questions.tasks.values():
        shared = [item.fingerprint for item in task.items if item.fingerprint in seen]
        if shared:
            raise TaskError(f"task {task.name!r}: {len(shared)} items have been seen by a plan, {shared[0]} for one")


def check_compared(compare: Mapping[str, Plan], receipt: Receipt) -> Mapping[str, Plan]:
    """Return the plans to compare with when each is for the same base; raises ``DocumentError`` or ``UsageError``."""
    for label, plan in compare.items():
        if label in RESERVED:
            raise UsageError(f"a compared plan cannot be called {label!r}; choose another label")
        if plan.model.fingerprint != receipt.base.fingerprint:
            raise DocumentError(
                f"the compared plan {label!r} is for another model: {plan.model.id} with weights "
                f"{short(plan.model.fingerprint)}, not {receipt.base.id} with {short(receipt.base.fingerprint)}"
            )
    return compare


def columns(compare: Mapping[str, Plan], exported: Exported) -> Mapping[str, Plan]:
    """Return the plans whose removals are examined beside the folder: those asked for, its own first if it was healed.

    The base with a plan's layers bypassed is the exported checkpoint before healing: no other copy of it is needed.
    """
    checked = check_compared(compare, exported.receipt)
    return checked if exported.heal is None else {UNHEALED: exported.plan, **checked}


def short(digest: str) -> str:
    """Return the first 12 hex digits of a sha256 for a message."""
    return f"{digest.removeprefix('sha256:')[:12]}..."
