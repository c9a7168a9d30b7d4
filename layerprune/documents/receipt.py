"""receipt.json: what export wrote, file by file, and how it was checked."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from layerprune.documents.base import Document, Part
from layerprune.documents.common import FileName, Files, ModelRef, Units
from layerprune.sizes import in_words

if TYPE_CHECKING:
    from layerprune.documents.earlier import Earlier


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
    notes: tuple[str, ...] = Field(default=(), description="what could not be checked in full, and why")
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
