"""The contract of a healing method, and what it may look at: weights, their places, their names on disk."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from layerprune.artifacts import LossPoint, Plan, Receipt, as_removal
from layerprune.checkpoint import Checkpoint, Tensor
from layerprune.data.corpus import Corpus
from layerprune.errors import RefusedError, UsageError
from layerprune.models.model import LoadedModel
from layerprune.registry import Plugin
from layerprune.removal import Removal
from layerprune.util import SILENT, Progress

# The contract of a healing method, and what it may look at.


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
    attention: str | None = None  # its implementation, where one was asked for
    seconds: float = 0.0  # in the method's own code


@dataclass
class HealContext:
    """One checkpoint to heal, and all a method may look at."""

    folder: Path  # the unhealed checkpoint, never written to
    plan: Plan
    receipt: Receipt
    work: Path  # for files of a long run (made by the method); kept when it is cut off, removed when it is done
    name: str  # of the unhealed checkpoint, as documents call it
    corpus: Corpus | None = None  # None only where the method needs no text
    base: str | None = None  # the intact model, located; None only where the method does not need it
    base_revision: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0
    trust_remote_code: bool = False
    attn_implementation: str = "auto"
    offload: str = "auto"
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

    def load_model(self, dtype: str | None = None, *, streams: bool = False) -> LoadedModel:
        """Load the unhealed checkpoint, whole unless its layers may come and go (``streams``).

        Raises ``UsageError`` where they may not and were asked to.
        """
        if not streams and self.offload in ("cpu", "disk"):
            raise UsageError(
                f"offload {self.offload!r}: this method changes all weights in memory, where they have to be; use "
                "--offload none, or --method linear"
            )
        return self._load(str(self.folder), None, dtype, self.offload if streams else "none")

    def load_base(self, dtype: str | None = None) -> LoadedModel:
        """Load the intact base model; ``UsageError`` where it is not at hand."""
        if self.base is None:
            raise UsageError("this method looks at the base model: say where it is with --base")
        return self._load(self.base, self.base_revision, dtype, self.offload)

    def _load(self, model: str, revision: str | None, dtype: str | None, offload: str) -> LoadedModel:
        loaded = LoadedModel.load(
            model,
            revision=revision,
            dtype=dtype or self.dtype,
            device=self.device,
            attn_implementation=self.attn_implementation,
            offload=offload,
            trust_remote_code=self.trust_remote_code,
        )
        self.record.dtype = str(loaded.dtype).removeprefix("torch.")
        self.record.device, self.record.attention = loaded.device.type, loaded.attention
        return loaded


class Healer(Plugin):
    """Changes weights of a pruned checkpoint, never its tensors' names, shapes or dtypes.

    A healer is a frozen dataclass whose fields are its options.
    """

    needs: ClassVar[tuple[str, ...]] = ("text",)
    gradients: ClassVar[bool] = False  # whether weights are trained

    @abstractmethod
    def heal(self, case: HealContext) -> Iterator[Changed]:
        """Yield each tensor that changes, once, by its name on disk (``StoredWeights``: a tied one may have two).

        What it read and settled on goes into ``case.record``. Raises ``RefusedError``, naming what stands in the way,
        before anything slow.
        """


# Parameters of a model in memory and the tensors on disk that they were read from.


# Dtypes that a healed value can be written in, as safetensors names them.
FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True)
class StoredWeights:
    """Parameters of a model in memory, each with the names of the tensors on disk that hold it."""

    checkpoint: Checkpoint
    names: dict[str, tuple[str, ...]]

    @classmethod
    def of(cls, model: nn.Module, folder: Path, wanted: Iterable[str]) -> StoredWeights:
        """Find the tensors that each wanted parameter is stored as in a checkpoint; all hold the same value.

        A tied parameter is stored under the name of its twin, or under both: a healed value belongs under each, or the
        two differ and are tied no more on loading. The prefix of a layer's name may differ between memory and disk.
        Raises ``RefusedError`` where a parameter has no floating tensor of its own and the same shape on disk (fused
        experts, transposed or quantised weights).
        """
        checkpoint = Checkpoint.open(folder)
        twins: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            twins.setdefault(id(parameter), []).append(name)
        found: dict[str, tuple[str, ...]] = {}
        for name in wanted:
            parameter = model.get_parameter(name)
            names = dict.fromkeys([name, *twins[id(parameter)]])
            tensors = {hit.name: hit for each in names for hit in _stored(each, checkpoint)}
            if not tensors:
                raise RefusedError(f"{name} is stored under no name of its own in {folder}; it cannot be changed")
            for tensor in tensors.values():
                if tensor.shape != tuple(parameter.shape) or tensor.dtype not in FLOATS:
                    raise RefusedError(
                        f"{name} is {tuple(parameter.shape)} in memory and {tensor.dtype} {tensor.shape} on disk; only "
                        "floating weights of the same shape can be changed"
                    )
            found[name] = tuple(tensors)
        return cls(checkpoint, found)

    def read(self, name: str) -> torch.Tensor:
        """Return a parameter's value as it is on disk, on the CPU."""
        from safetensors import safe_open

        stored = self.names[name][0]
        with safe_open(self.checkpoint.tensors[stored].file, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(stored)
        return tensor

    def changed(self, name: str, value: torch.Tensor) -> Iterator[Changed]:
        """Yield a parameter's healed value under each of its names on disk."""
        for stored in self.names[name]:
            yield stored, value


def _stored(name: str, checkpoint: Checkpoint) -> Iterator[Tensor]:
    """Yield the tensor of this name, or the only one whose name ends alike from the layer's number on."""
    if name in checkpoint.tensors:
        yield checkpoint.tensors[name]
        return
    parts = name.split(".")
    number = next((place for place, part in enumerate(parts) if part.isdecimal()), 0)
    if number < 1:
        return
    end = "." + ".".join(parts[number - 1 :])  # ".layers.3.mlp.down_proj.weight"
    hits = [tensor for other, tensor in checkpoint.tensors.items() if f".{other}".endswith(end)]
    if len(hits) == 1:
        yield hits[0]


# Where something was removed, and what the parts of a layer are called.


# What decoder layers call their attention, or what takes its place, and their MLP.
ATTENTION = {"self_attn", "self_attention", "attn", "attention", "linear_attn", "conv", "short_conv"}
MLP = {"mlp", "feed_forward", "ffn", "block_sparse_moe", "moe", "shared_mlp"}


@dataclass(frozen=True)
class Cut:
    """A place where something was removed."""

    after: int  # layer of the pruned model whose output now skips what is gone; -1: before its first layer
    resumes: int  # layer of the base whose input that output stands for; the base's depth: what follows the stack


def cuts(removal: Removal, depth: int) -> tuple[Cut, ...]:
    """Return the places of a removal, first to last; ``depth`` is the base's."""
    ends = pairwise((-1, *removal.kept(depth), depth))
    return tuple(Cut(place, resumes) for place, (layer, resumes) in enumerate(ends, -1) if resumes != layer + 1)
