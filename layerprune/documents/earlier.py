"""A round of pruning that the base of a later one came from, with all its documents."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Self

from pydantic import Field, ValidationError, model_validator

from layerprune.documents.audit import Audit
from layerprune.documents.base import Part
from layerprune.documents.chain import audit_faults, chain_faults
from layerprune.documents.common import ModelRef
from layerprune.documents.heal_log import HealLog
from layerprune.documents.plan import Plan
from layerprune.documents.receipt import Receipt
from layerprune.errors import DocumentError


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
    asked = tuple(tasks)
    return tuple(task for task in asked if any(one is not None and one.not_looked_for([task]) for one in logs))


Receipt.model_rebuild(_types_namespace={"Earlier": Earlier})
