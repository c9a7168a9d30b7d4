"""Do the documents of one checkpoint belong together? Every reader of a folder asks here."""

from __future__ import annotations

from collections.abc import Iterator

from layerprune.documents.audit import Audit
from layerprune.documents.heal_log import HealLog
from layerprune.documents.plan import Plan
from layerprune.documents.receipt import Receipt


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
    if log:
        yield from _healing_faults(log, plan, receipt)


def _healing_faults(log: HealLog, plan: Plan | None, receipt: Receipt | None) -> Iterator[str]:
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
        for field in ("model_type", "layers", "parameters"):
            value, kept = getattr(step.result, field), getattr(step.unhealed, field)
            yield from _differ((f"heal.result.{field}", value, "that of the unhealed checkpoint", kept))
        before = step.result


def audit_faults(audit: Audit, plan: Plan | None, receipt: Receipt | None, log: HealLog | None) -> Iterator[str]:
    """Yield where an audit contradicts the documents of the folder it stands in."""
    writer = log or receipt
    if plan:
        yield from _differ(("audit.plan_sha256", audit.plan_sha256, "the plan's", plan.sha256()))
        shared = sum(mark in plan.seen for task in audit.tasks for mark in task.data.fingerprints)
        if shared:
            yield f"audit: {shared} of its items have been seen by the plan"
    if receipt:
        yield from _differ(
            ("audit.receipt_sha256", audit.receipt_sha256, "the receipt's", receipt.sha256()),
            ("audit.base", audit.base, "the receipt's", receipt.base),
            ("audit.removal", audit.removal, "the receipt's", receipt.removal),
            ("audit.bytes_before", audit.bytes_before, "the receipt's", receipt.bytes_before),
            ("audit.bytes_after", audit.bytes_after, "the receipt's", receipt.bytes_after),
        )
        shared = sum(mark in receipt.seen_before for task in audit.tasks for mark in task.data.fingerprints)
        if shared:
            yield f"audit: {shared} of its items have been seen by an earlier round of pruning"
    if log:
        met = sum(mark in log.met for task in audit.tasks for mark in task.data.fingerprints)
        if met:
            yield f"audit: {met} of its items stood in the text that healed"
    if writer:
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
