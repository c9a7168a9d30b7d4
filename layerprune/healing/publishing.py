"""Writing a healed checkpoint: the unhealed one byte for byte, but for the tensors that a method changed."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import torch

from layerprune.checkpoint import Checkpoint, Tensor, write_shards
from layerprune.checkpoint.entries import entry_of
from layerprune.checkpoint.opened import INDEX
from layerprune.checkpoint.writer import Part, Shard
from layerprune.documents import FileEntry
from layerprune.errors import ExportError, ModelError
from layerprune.output import write_all, writing
from layerprune.paths import checked_name, listed, same_file
from layerprune.progress import SILENT, Progress
from layerprune.report.card import OURS
from layerprune.report.page import REPORT

RESERVED = frozenset(name.casefold() for name in (*OURS, REPORT))  # what is written after the attachments
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass
class Spool:
    """New values of tensors, waiting on disk in the dtype of the checkpoint: no second model in memory."""

    checkpoint: Checkpoint
    path: Path
    file: IO[bytes]
    places: dict[str, tuple[int, int]] = field(default_factory=dict)  # name -> bytes [start, stop) of the file

    def put(self, name: str, value: torch.Tensor) -> None:
        """Take one tensor; raises ``ModelError`` for one that is not finite or not the checkpoint's."""
        old = self.checkpoint.tensors.get(name)
        if old is None:
            raise ModelError(f"healing changed {name!r}, which the checkpoint does not hold")
        if name in self.places:
            raise ModelError(f"healing gave {name!r} twice")
        if old.shape != tuple(value.shape) or old.dtype not in DTYPES:
            raise ModelError(f"healing gave {name!r} as {tuple(value.shape)}; it is {old.dtype} {old.shape} on disk")
        new = value.detach().to("cpu", DTYPES[old.dtype]).contiguous()
        if not torch.isfinite(new).all():
            raise ModelError(f"healing made {name!r} infinite or not a number in {old.dtype}; nothing was written")
        start = self.file.tell()
        with writing(self.path):
            write_all(self.file, memoryview(new.flatten().view(torch.uint8).numpy()))
        self.places[name] = (start, self.file.tell())

    def part(self, tensor: Tensor) -> Part:
        """Return what is written under a tensor's name: its new value, or the old bytes."""
        if tensor.name not in self.places:
            return Part.of(tensor, tensor.name)
        start, stop = self.places[tensor.name]
        return Part(tensor.name, tensor.dtype, tensor.shape, ((self.path, start, stop),), stop - start)


@contextmanager
def spooled(checkpoint: Checkpoint, path: Path, changed: Iterable[tuple[str, torch.Tensor]]) -> Iterator[Spool]:
    """Write the changed tensors to ``path`` as they come; leaving the block removes it, and its folder if empty."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with writing(path):
            file = path.open("wb", buffering=0)
        with file:
            spool = Spool(checkpoint, path, file)
            for name, value in changed:
                spool.put(name, value)
        yield spool
    finally:
        path.unlink(missing_ok=True)
        if not any(path.parent.iterdir()):
            path.parent.rmdir()


def write_healed(
    spool: Spool, carried: Iterable[str], attachments: Path, folder: Path, progress: Progress = SILENT
) -> dict[str, FileEntry]:
    """Write weights (in files of the same names), carried files and attachments; return the hash of each.

    ``carried``: files of the unhealed folder to copy. Raises ``ExportError`` where an attachment has a carried file's
    name or is no regular file, or what was written has not exactly the tensors, shapes and dtypes of the unhealed
    checkpoint.
    """
    source = spool.checkpoint
    shards = [
        Shard(file.name, tuple(spool.part(tensor) for tensor in source.tensors.values() if tensor.file == file))
        for file in source.files
    ]
    written = list(write_shards(folder, shards, source.metadata, progress))
    for name in carried:
        if name not in written and name != INDEX:
            _copy(source.path / name, folder / name)
            written.append(name)
    for name in attached(attachments):
        if (folder / name).exists() or same_file([*written, name]) or name.casefold() in RESERVED:
            raise ExportError(f"the healing method leaves a file {name!r}, a name that the checkpoint uses itself")
        _copy(attachments / name, folder / name)
        written.append(name)
    _check_alike(source, Checkpoint.open(folder))
    return {name: entry_of(folder / name) for name in sorted(written)}


def attached(attachments: Path) -> list[str]:
    """Return the files that a healing method leaves; raises ``ExportError`` for a link and for a name that is none."""
    if not attachments.is_dir():
        return []
    names = []
    for name, fault in listed(attachments):
        try:
            names.append(checked_name(name))
        except ValueError as error:
            raise ExportError(f"the healing method leaves {name!r}, {error}") from None
        if fault:
            raise ExportError(f"the healing method leaves {name!r}, {fault}")
    return names


def _copy(source: Path, target: Path) -> None:
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


def _check_alike(old: Checkpoint, new: Checkpoint) -> None:
    def kinds(checkpoint: Checkpoint) -> dict[str, tuple[str, tuple[int, ...]]]:
        return {name: (tensor.dtype, tensor.shape) for name, tensor in checkpoint.tensors.items()}

    if kinds(old) != kinds(new):
        different = sorted(dict(kinds(old).items() ^ kinds(new).items()))
        raise ExportError(f"the healed checkpoint differs in the form of {different[0]}; please report the method")
