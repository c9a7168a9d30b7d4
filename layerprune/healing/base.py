"""The contract of a healing method, and what it may look at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

import torch

from layerprune.corpus import Corpus
from layerprune.documents import LossPoint, Plan, Receipt, as_removal
from layerprune.errors import UsageError
from layerprune.progress import SILENT, Progress
from layerprune.removal import Removal

if TYPE_CHECKING:
    from layerprune.subject import Subject

Needs = Literal["text", "nothing"]
Changed = tuple[str, torch.Tensor]  # name on disk, new value; shape as on disk, any floating dtype


@dataclass
class Record:
    """What a method writes down about its own work; it goes into heal.json."""

    tokens: int = 0  # read, each time they were read
    curve: list[LossPoint] = field(default_factory=list)
    found: dict[str, str | int | float | bool] = field(default_factory=dict)  # what it settled on by itself
    notes: list[str] = field(default_factory=list)
    dtype: str = ""  # of the last model that was loaded
    device: str = ""


@dataclass
class Case:
    """One checkpoint to heal, and all a method may look at."""

    folder: Path  # the unhealed checkpoint, never written to
    plan: Plan
    receipt: Receipt
    work: Path  # for files of a long run (made by the method); kept when it is cut off, removed when it is done
    name: str  # of the unhealed checkpoint, as documents call it
    corpus: Corpus | None = None  # None for ``needs = "nothing"``
    base: str | None = None  # the intact model, located; None only where ``needs_base`` is false
    base_revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0
    trust_remote_code: bool = False
    record: Record = field(default_factory=Record)
    progress: Progress = SILENT

    @property
    def removal(self) -> Removal:
        """The units that are gone, in the base's numbering."""
        return as_removal(self.receipt.removal)

    @property
    def attachments(self) -> Path:
        """Folder in ``work``: what a method leaves here is published in the healed folder, under the same names.

        It is empty when a method begins, one that goes on included.
        """
        return self.work / "attachments"

    @property
    def text(self) -> Corpus:
        """The corpus; ``UsageError`` where none was given."""
        if self.corpus is None:
            raise UsageError("this method reads text: give it a corpus with --corpus")
        return self.corpus

    def subject(self, dtype: str | None = None) -> Subject:
        """Load the unhealed checkpoint."""
        return self._load(str(self.folder), None, dtype)

    def base_subject(self, dtype: str | None = None) -> Subject:
        """Load the intact base model; ``UsageError`` where it is not at hand."""
        if self.base is None:
            raise UsageError("this method looks at the base model: say where it is with --base")
        return self._load(self.base, self.base_revision, dtype)

    def _load(self, model: str, revision: str | None, dtype: str | None) -> Subject:
        from layerprune.subject import Subject

        loaded = Subject.load(
            model,
            revision=revision,
            dtype=dtype or self.dtype,
            device=self.device,
            trust_remote_code=self.trust_remote_code,
        )
        self.record.dtype = str(loaded.dtype).removeprefix("torch.")
        self.record.device = loaded.device.type
        return loaded


class Healer(Protocol):
    """Changes weights of a pruned checkpoint, never its tensors' names, shapes or dtypes.

    A healer is a frozen dataclass whose fields are its options. The class attributes are shown by
    ``layerprune healers`` and decide what has to be at hand.
    """

    gradients: ClassVar[bool]  # whether weights are trained
    needs: ClassVar[Needs]
    needs_base: ClassVar[bool]
    cost: ClassVar[str]  # in words
    source: ClassVar[str]  # paper, or where it comes from

    def heal(self, case: Case) -> Iterator[Changed]:
        """Yield each tensor that changes, once, by its name on disk (``names.names_on_disk``: a tied one may have two).

        What it read and settled on goes into ``case.record``. Raises ``RefusedError``, naming what stands in the way,
        before anything slow.
        """
        ...
