"""A healed checkpoint, written: the unhealed one byte for byte, but for the tensors that a method changed."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from layerprune.artifacts import FileEntry, HealLog, Plan, Receipt
from layerprune.auditor.inputs import ExportedFolder
from layerprune.checkpoint import Checkpoint, Tensor, write_shards
from layerprune.checkpoint.companions import companions, left_out
from layerprune.checkpoint.location import record
from layerprune.checkpoint.safetensors import INDEX
from layerprune.checkpoint.writer import Shard, TensorPart, entry_of
from layerprune.errors import ExportError, ModelError
from layerprune.files import checked_name, listed, same_file, write_all, writing
from layerprune.healing.base import FLOATS, Changed
from layerprune.report.card import OURS, write_card
from layerprune.report.page import REPORT
from layerprune.util import Progress

FOLDER = "layerprune"
CARD = "README.md"
RESERVED = frozenset(name.casefold() for name in (*OURS, REPORT))  # what is written after the attachments


@contextmanager
def spooled(checkpoint: Checkpoint, path: Path, changed: Iterable[Changed]) -> Iterator[dict[str, Tensor]]:
    """Write the changed tensors to ``path`` as they come, in the dtypes of the checkpoint, and yield where each lies.

    They wait on the disk, so that no second model is in memory; leaving the block removes the file, and its folder if
    empty. Raises ``ModelError`` for a tensor that is not finite or not the checkpoint's.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with writing(path):
            file = path.open("wb", buffering=0)
        places: dict[str, Tensor] = {}
        with file:
            for name, value in changed:
                if name in places:
                    raise ModelError(f"healing gave {name!r} twice")
                new, start = _as_stored(checkpoint, name, value), file.tell()
                with writing(path):
                    write_all(file, memoryview(new.flatten().view(torch.uint8).numpy()))
                places[name] = replace(checkpoint.tensors[name], file=path, start=start, stop=file.tell())
                del new, value  # not held while the folder is written and measured
        yield places
    finally:
        path.unlink(missing_ok=True)
        if not any(path.parent.iterdir()):
            path.parent.rmdir()


def _as_stored(checkpoint: Checkpoint, name: str, value: torch.Tensor) -> torch.Tensor:
    """Return a new value in the dtype of the tensor that it replaces, on the CPU."""
    old = checkpoint.tensors.get(name)
    if old is None:
        raise ModelError(f"healing changed {name!r}, which the checkpoint does not hold")
    if old.shape != tuple(value.shape) or old.dtype not in FLOATS:
        raise ModelError(f"healing gave {name!r} as {tuple(value.shape)}; it is {old.dtype} {old.shape} on disk")
    new = value.detach().to("cpu", FLOATS[old.dtype]).contiguous()
    if not torch.isfinite(new).all():
        raise ModelError(f"healing made {name!r} infinite or not a number in {old.dtype}; nothing was written")
    return new


def write_healed(
    source: Checkpoint,
    changed: Mapping[str, Tensor],
    carried: Iterable[str],
    attachments: Path,
    folder: Path,
    progress: Progress,
) -> dict[str, FileEntry]:
    """Write weights (in files of the same names), carried files and attachments; return the hash of each.

    ``carried``: files of the unhealed folder to copy. Raises ``ExportError`` where an attachment has a carried file's
    name or is no regular file, or what was written has not exactly the tensors, shapes and dtypes of the unhealed
    checkpoint.
    """
    shards = []
    for file in source.files:
        here = [tensor for tensor in source.tensors.values() if tensor.file == file]
        parts = tuple(TensorPart.of(changed.get(tensor.name, tensor), tensor.name) for tensor in here)
        shards.append(Shard(file.name, parts))
    written = list(write_shards(folder, shards, source.metadata, progress))
    for name in carried:
        if name not in written and name != INDEX:
            _copy(source.path / name, folder / name)
            written.append(name)
    for name, fault in listed(attachments) if attachments.is_dir() else ():
        try:
            checked_name(name)
        except ValueError as error:
            fault = str(error)
        if fault:
            raise ExportError(f"the healing method leaves {name!r}, {fault}")
        if (folder / name).exists() or same_file([*written, name]) or name.casefold() in RESERVED:
            raise ExportError(f"the healing method leaves a file {name!r}, a name that the checkpoint uses itself")
        _copy(attachments / name, folder / name)
        written.append(name)
    old, new = (
        {name: (tensor.dtype, tensor.shape) for name, tensor in checkpoint.tensors.items()}
        for checkpoint in (source, Checkpoint.open(folder))
    )
    if old != new:
        different = sorted(dict(old.items() ^ new.items()))
        raise ExportError(f"the healed checkpoint differs in the form of {different[0]}; please report the method")
    return {name: entry_of(folder / name) for name in sorted(written)}


def _copy(source: Path, target: Path) -> None:
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


def carried_files(exported: ExportedFolder, checkpoint: Checkpoint, progress: Progress) -> list[str]:
    """Return the files of the unhealed folder that belong to the model, and say which an older export copied beside."""
    found = companions(exported.folder, exported.receipt.files, checkpoint.names)
    for note in [*found.notes, *([left_out(found.left)] if found.left else [])]:
        progress.note(note)
    return sorted({*exported.receipt.files} - {CARD, *found.left})  # the card is written anew


def add_documents(unhealed: Path, folder: Path, log: HealLog) -> None:
    """Put plan, receipt and log beside the weights, and renew the card."""
    inside = folder / FOLDER
    inside.mkdir(exist_ok=True)
    for kind in (Plan, Receipt):
        shutil.copyfile(unhealed / FOLDER / kind.filename, inside / kind.filename)
    log.save(inside / HealLog.filename)
    record(inside, log.base)
    if (unhealed / CARD).is_file():  # licence, language and a person's own words
        shutil.copyfile(unhealed / CARD, folder / CARD)
    write_card(folder)
