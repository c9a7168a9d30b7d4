"""heal.json: what was done to the weights after removal, on which text, and what it won back."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from layerprune.artifacts.base import Computed, Document, Files, ModelRef, Part


class HealerRef(Part):
    """A healing method as it was run."""

    name: str
    spec: str = Field(description="what the command line takes, defaults left out: 'linear:ridge=0.01'")
    options: dict[str, str | int | float | bool | None]
    gradients: bool = Field(description="whether weights were trained; false: forward passes only")
    owner: str = Field(description="distribution that ships the method, with its version")


class CorpusOverlap(Part):
    """Items of one audit task that were found in the corpus; the documents that held them were not read."""

    split: str
    items: int = Field(description="items that were looked for")
    unlooked: int = Field(description="items too short to be told from ordinary prose")
    found: tuple[str, ...] = Field(description="fingerprints of the items found")


class CorpusRef(Part):
    """The text that a healing method read."""

    source: str = Field(description="file, folder or Hub dataset as it was named, without the folders above it")
    fingerprint: str = Field(description="sha256 over the documents that were kept, in the order they were read")
    documents: int = Field(description="kept for healing, held-out ones not counted")
    heldout_documents: int
    dropped_documents: int = Field(description="left out because an item of an audit task stands in them")
    overlap: dict[str, CorpusOverlap] = Field(default_factory=dict, description="by audit task that was looked for")
    window: int = Field(description="tokens of a window; every window is full")
    windows: int
    heldout_windows: int = Field(description="what the held-out loss was measured on")
    counted: int = Field(description="tokens of the windows whose loss counts; fewer than all of them for chats")
    answers_only: bool = Field(description="chat data: the loss is on the assistant's tokens alone")


class LossPoint(Part):
    """One point of a loss curve."""

    step: int
    tokens: int = Field(description="tokens seen so far")
    loss: float | None = Field(default=None, description="training loss, nats per token")
    heldout: float | None = Field(default=None, description="held-out loss, nats per token")


class HeldOut(Part):
    """Mean negative log-likelihood on the held-out windows, nats per token."""

    before: float = Field(description="of the checkpoint that was healed")
    after: float = Field(description="of the healed checkpoint as written, loaded anew")
    base: float | None = Field(default=None, description="of the intact base; None where it was not at hand")

    @property
    def recovered(self) -> float | None:
        """Share of the lost nats that was won back; None where nothing was lost or no base was at hand."""
        if self.base is None or self.before <= self.base:
            return None
        return (self.before - self.after) / (self.before - self.base)


class HealLog(Computed, Document):
    """Healing's account of itself; it stands beside the plan and the receipt of the checkpoint it healed."""

    filename: ClassVar[str] = "heal.json"
    kind: Literal["heal"] = "heal"
    format: Literal[1] = 1
    method: HealerRef
    base: ModelRef
    unhealed: ModelRef = Field(description="the checkpoint that was healed: the receipt's result, or earlier.result")
    result: ModelRef
    plan_sha256: str
    receipt_sha256: str
    earlier: HealLog | None = Field(default=None, description="the healing that this one went on from")
    corpus: CorpusRef | None = Field(default=None, description="None for a method that reads no text")
    heldout: HeldOut | None = None
    changed: tuple[str, ...] = Field(description="names of the tensors that differ from the unhealed checkpoint's")
    files: Files = Field(description="of the healed folder; the receipt's are the unhealed one's")
    tokens: int = Field(description="tokens the method read, each time it read them")
    seconds: float = Field(description="of the method alone: no loading, writing or measuring")
    curve: tuple[LossPoint, ...] = ()
    found: dict[str, str | int | float | bool] = Field(
        default_factory=dict, description="what the method settled on by itself, such as the ridge"
    )
    notes: tuple[str, ...] = ()
    dtype: str
    device: str
    seed: int
    versions: dict[str, str]

    @property
    def headline(self) -> str:
        said = f"{self.method.spec}: {len(self.changed)} tensors changed in {self.seconds:.1f} s"
        if self.heldout is not None:
            said += f"; held-out loss {self.heldout.before:.3f} to {self.heldout.after:.3f} nats per token"
        return said

    def records(self) -> list[dict[str, Any]]:
        """Return a row for each point of the curve that training left."""
        return [point.model_dump() for point in self.curve]

    @property
    def steps(self) -> tuple[HealLog, ...]:
        """Every healing of this checkpoint, first to last."""
        return (*(self.earlier.steps if self.earlier else ()), self)

    @property
    def corpora(self) -> tuple[CorpusRef, ...]:
        """Every text that a healing of this checkpoint read."""
        return tuple(step.corpus for step in self.steps if step.corpus)

    @property
    def met(self) -> frozenset[str]:
        """Fingerprints of every item that stood in a corpus, though the documents that held it were not read."""
        return frozenset(mark for read in self.corpora for overlap in read.overlap.values() for mark in overlap.found)
