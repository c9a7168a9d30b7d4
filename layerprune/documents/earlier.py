"""A round of pruning that the base of a later one came from, with all its documents."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar, Self

from pydantic import Field, ValidationError, model_validator

from layerprune.documents.audit import Audit
from layerprune.documents.base import Part
from layerprune.documents.common import ModelRef
from layerprune.documents.heal_log import HealLog
from layerprune.documents.plan import Plan
from layerprune.documents.receipt import Receipt
from layerprune.errors import DocumentError


class Earlier(Part):
    """The documents that stood beside a base which had been pruned before; its receipt holds the round before it."""

    gained: ClassVar[tuple[str, ...]] = ("changed",)
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
        plan, receipt, log, audit = self.plan, self.receipt, self.heal, self.audit
        pairs: list[tuple[str, object, object]] = [
            ("plan_sha256", receipt.plan_sha256, plan.sha256()),
            ("removal", receipt.removal, plan.removal),
            ("base.fingerprint", receipt.base.fingerprint, plan.model.fingerprint),
        ]
        before = receipt.result
        for step in log.steps if log else ():
            pairs += [("heal.plan_sha256", step.plan_sha256, plan.sha256()),
                      ("heal.receipt_sha256", step.receipt_sha256, receipt.sha256()),
                      ("heal.unhealed", step.unhealed.fingerprint, before.fingerprint)]  # fmt: skip
            before = step.result
        if audit is not None:
            pairs += [("audit.plan_sha256", audit.plan_sha256, plan.sha256()),
                      ("audit.receipt_sha256", audit.receipt_sha256, receipt.sha256()),
                      ("audit.heal_sha256", audit.heal_sha256, log.sha256() if log else None),
                      ("audit.pruned", audit.pruned.fingerprint, self.result.fingerprint)]  # fmt: skip
        for name, said, found in pairs:
            if said != found:
                raise ValueError(f"an earlier round's documents do not belong together: {name} is another's")
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
