"""receipt.json: what export wrote, file by file, and how it was checked."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from layerprune.documents.base import Document, Part
from layerprune.documents.common import FileName, Files, ModelRef, Units


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


class Published(Part):
    """The public edition of a folder whose base was known by a local path: only the base's name differs."""

    plan_sha256: str = Field(description="of the plan as it was made, with the path; so below")
    receipt_sha256: str
    heal_sha256: str | None
    audit_sha256: str | None
    checked: str = Field(description="how the public name was held against the base's weights")


class Receipt(Document):
    """Export's account of itself."""

    gained: ClassVar[tuple[str, ...]] = ("published",)
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
    published: Published | None = Field(default=None, description="in the public edition alone: what it was before")
    versions: dict[str, str]
