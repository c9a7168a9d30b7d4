"""The public edition of a folder: the same documents with the base's public name, hashed and chained anew.

Documents are chained by their hashes, so a name cannot be changed in one of them silently, and it is not: the
receipt of the public edition says what the hashes were before. Whoever holds the documents as they were made can put
the old name back and compare.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerprune.auditor.exported import Exported
from layerprune.documents import Audit, Document, Earlier, FileEntry, HealLog, Plan, Published, Receipt
from layerprune.errors import UsageError
from layerprune.hub.naming import UNCHANGED, Name, holds_paths, is_local, withheld
from layerprune.report.card import write_card
from layerprune.report.page import REPORT, write_report

FOLDER = "layerprune"
CARD = "README.md"
WRITTEN = (".json", ".md", ".html", ".txt", ".jinja", ".yaml", ".py")  # files that may hold a path in words


@dataclass(frozen=True)
class Edition:
    """The documents of a folder; there is no log of a checkpoint that was not healed, and no audit before there is."""

    plan: Plan
    receipt: Receipt
    heal: HealLog | None
    audit: Audit | None

    @classmethod
    def read(cls, folder: Path) -> Edition:
        """Read what lies in ``folder/layerprune``; raises ``DocumentError``."""
        found = Exported.read(folder)
        return cls(found.plan, found.receipt, found.heal, found.audit)

    @property
    def documents(self) -> tuple[Document, ...]:
        return tuple(one for one in (self.plan, self.receipt, self.heal, self.audit) if one is not None)

    def public(self, name: Name, left: Collection[str] = ()) -> Edition:
        """Return the documents with the base's public name and without the files ``left``, chained by their new hashes.

        ``left`` are files that an older export carried along and that are not published; they count as dropped. Bases
        of earlier rounds that were local folders go by their folders' names alone.
        """
        if self.receipt.earlier is not None:
            receipt = self.receipt.model_copy(update={"earlier": _public(self.receipt.earlier)})
            return Edition(self.plan, receipt, self.heal, self.audit)._renamed(name, left, self)
        return self._renamed(name, left, self)

    def _renamed(self, name: Name, left: Collection[str], made: Edition) -> Edition:
        """Rename the base of this round; ``made`` are the documents as they were made."""
        was = Published(
            plan_sha256=made.plan.sha256(),
            receipt_sha256=made.receipt.sha256(),
            heal_sha256=made.heal.sha256() if made.heal else None,
            audit_sha256=made.audit.sha256() if made.audit else None,
            checked=name.checked,
        )
        plan, receipt = self._chained(name, was, left)
        common = {"base": receipt.base, "plan_sha256": plan.sha256(), "receipt_sha256": receipt.sha256()}
        heal = _renamed_log(self.heal, common, left) if self.heal else None
        audit = None
        if self.audit is not None:
            audit = self.audit.model_copy(update={**common, "heal_sha256": heal.sha256() if heal else None})
        return Edition(plan, receipt, heal, audit)

    def _chained(self, name: Name, was: Published | None, left: Collection[str]) -> tuple[Plan, Receipt]:
        known = {"id": name.id, "revision": name.revision}
        plan = self.plan.model_copy(update={"model": self.plan.model.model_copy(update=known)})
        base = self.receipt.base.model_copy(update=known)
        changed: dict[str, Any] = {"base": base, "plan_sha256": plan.sha256(), "published": was}
        if gone := {*left} & {*self.receipt.files}:
            changed["files"] = _without(self.receipt.files, gone)
            changed["dropped_files"] = tuple(sorted({*self.receipt.dropped_files, *gone}))
        return plan, self.receipt.model_copy(update=changed)


def _public(one: Earlier) -> Earlier:
    """Return an earlier round without a local path; one that holds none, and none before it, is as it was."""
    if not holds_paths(one.receipt):
        return one
    base = one.receipt.base
    name = withheld(one.receipt) if is_local(one.receipt) else Name(base.id, base.revision, UNCHANGED)
    edition = Edition(one.plan, one.receipt, one.heal, one.audit).public(name)
    return Earlier(
        plan=edition.plan, receipt=edition.receipt, heal=edition.heal, audit=edition.audit, changed=one.changed
    )


def _renamed_log(log: HealLog, common: dict[str, Any], left: Collection[str]) -> HealLog:
    earlier = _renamed_log(log.earlier, common, left) if log.earlier else None
    return log.model_copy(update={**common, "earlier": earlier, "files": _without(log.files, left)})


def _without(files: dict[str, FileEntry], left: Collection[str]) -> dict[str, FileEntry]:
    return {name: entry for name, entry in files.items() if name not in left}


def publish(folder: Path, out: Path, name: Name, files: Sequence[str], left: Collection[str] = ()) -> None:
    """Lay out the public edition of ``folder`` in ``out``; ``files`` that do not change are links to the folder's.

    ``left``: files of the folder that are not published, see ``Edition.public``.
    """
    rewritten = {f"{FOLDER}/{kind.filename}" for kind in (Plan, Receipt, HealLog, Audit)} | {CARD, REPORT}
    for file in files:
        target = out / file
        target.parent.mkdir(parents=True, exist_ok=True)
        if file not in rewritten:
            target.symlink_to((folder / file).resolve())
    edition = Edition.read(folder).public(name, left)
    for document in edition.documents:
        document.save(out / FOLDER / document.filename)
    shutil.copyfile(folder / CARD, out / CARD)  # what people wrote outside the marks, and metadata of their own
    write_card(out)
    if edition.audit is not None:
        write_report(out)


def check_no_path(folder: Path, files: Sequence[str], path: str) -> None:
    """Raise ``UsageError`` when a file that is about to be published holds a local path in words.

    A path that only ends or begins like it is another one: ``some/model`` and ``/models`` are not ``/model``.
    """
    whole = re.compile(rb"(?<![\w.~*})-])" + re.escape(path.rstrip("/").encode()) + rb"(?![\w-]|\.\w)")
    for file in files:
        if file.endswith(WRITTEN) and whole.search((folder / file).read_bytes()):
            raise UsageError(f"{file} holds the path of the local folder {Path(path).name}; nothing was sent")
