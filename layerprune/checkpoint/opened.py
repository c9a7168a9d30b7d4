"""A checkpoint folder opened: every tensor of every shard by name, validated, with a fingerprint of the weights."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import RawIOBase
from pathlib import Path, PurePath
from typing import IO

from layerprune.checkpoint.header import Tensor, read_header
from layerprune.checkpoint.hub_file import File, HubFile
from layerprune.checkpoint.kinds import ADAPTER, why_no_weights
from layerprune.errors import CheckpointError
from layerprune.paths import checked_name, contained

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

# A fingerprint must be quick on a 140 GB checkpoint and still see any training step, which moves nearly every weight:
# up to 64 KiB of each tensor, in 16 pieces.
SAMPLE_PIECES = 16
SAMPLE_BYTES = 4096
REQUESTS = 16  # ranges asked of the Hub at a time
SAMPLED_AHEAD = 256  # tensors whose samples are held in memory: 16 MiB


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of one folder, by name in the order of the files; nothing but headers has been read.

    Files that have not been fetched from the Hub are ``HubFile``s, the others paths.
    """

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    files: tuple[File, ...]

    @classmethod
    def open(cls, path: Path, absent: Callable[[str], File] | None = None) -> Checkpoint:
        """Read the headers of all shards; raises ``CheckpointError`` naming file and tensor at the first fault.

        ``absent`` gives what to read in place of a shard that is not in the folder; without it that is a fault.
        """
        path = Path(path)
        if not path.is_dir():
            raise CheckpointError(f"{path} is not a folder; expected one with config.json and safetensors")
        if (path / ADAPTER).exists() and ((path / WEIGHTS).exists() or (path / INDEX).exists()):
            raise CheckpointError(
                f"{path} holds {ADAPTER} beside whole weights: transformers would load the adapter and its own base; "
                "take the file out if these weights are merged or have nothing to do with it, else merge them first"
            )
        listed = _weight_map(path) if absent is None or (path / INDEX).exists() else None
        names = [WEIGHTS] if listed is None else sorted(set(listed.values()))
        headers = [read_header(_shard(path, name, absent)) for name in names]
        tensors: dict[str, Tensor] = {}
        metadata: dict[str, str] = {}
        for header in headers:
            metadata = {**header.metadata, **metadata}
            for tensor in header.tensors:
                if tensor.name in tensors:
                    other = tensors[tensor.name].file
                    raise CheckpointError(f"tensor {tensor.name!r} is in both {other} and {header.file}")
                tensors[tensor.name] = tensor
        if listed is not None:
            _check_index(path / INDEX, listed, tensors)
        if not tensors:
            raise CheckpointError(f"{path} holds no tensors")
        return cls(path, tensors, metadata, tuple(header.file for header in headers))

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data, headers not counted."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def parameters(self) -> int:
        """Stored elements, duplicates and packing as they are; what the model has is ``Anatomy.parameters``."""
        return sum(tensor.elements for tensor in self.tensors.values())

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor, by name."""
        return {name: tensor.shape for name, tensor in self.tensors.items()}

    def fingerprint(self) -> str:
        """Return ``sha256:<hex>`` of the weights, the same however they are sharded and in whatever order.

        Hashed, for each tensor in the order of names: the UTF-8 line ``name dtype shape``, then its bytes when they are
        at most 64 KiB, else 16 pieces of 4 KiB spread evenly from the first byte to the last. A change that misses
        every piece is not seen; a file that is damaged in its structure is refused by ``open``.
        """
        digest = hashlib.sha256()
        for tensor, pieces in _sampled([self.tensors[name] for name in sorted(self.tensors)]):
            digest.update(json.dumps([tensor.name, tensor.dtype, list(tensor.shape)]).encode() + b"\n")
            for piece in pieces:
                digest.update(piece)
        return f"sha256:{digest.hexdigest()}"

    @property
    def names(self) -> set[str]:
        """The names of the files, inside the folder."""
        return {f.path if isinstance(f, HubFile) else f.relative_to(self.path).as_posix() for f in self.files}

    @property
    def absent(self) -> tuple[HubFile, ...]:
        """The files that have not been fetched from the Hub."""
        return tuple(file for file in self.files if isinstance(file, HubFile))


def _shard(folder: Path, name: str, absent: Callable[[str], File] | None) -> File:
    if absent is not None and not os.path.lexists(folder / name):
        try:
            return absent(checked_name(name))
        except ValueError as error:
            raise CheckpointError(f"{folder / INDEX} names {name!r}, {error}; refused") from None
    return contained(folder, name, source=folder / INDEX)


def _weight_map(path: Path) -> dict[str, str] | None:
    """Return the index's map of tensor to file, or None for a single-file checkpoint (which transformers prefers)."""
    if os.path.lexists(path / WEIGHTS):
        contained(path, WEIGHTS)
        return None
    if not os.path.lexists(path / INDEX):
        raise CheckpointError(f"{path} {why_no_weights(file_names(path))}")
    index = contained(path, INDEX)
    try:
        content = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {index}: {error}") from error
    listed = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(listed, dict) or not listed or not all(isinstance(file, str) for file in listed.values()):
        raise CheckpointError(f"{index} has no weight_map of tensor names to file names")
    return listed


def file_names(folder: Path) -> list[str]:
    """Return the files of a folder and of the folders in it, as paths from it."""
    return [path.relative_to(folder).as_posix() for place in ("*", "*/*") for path in folder.glob(place)]


def _check_index(index: Path, listed: dict[str, str], tensors: dict[str, Tensor]) -> None:
    for name, file in listed.items():
        if name not in tensors:
            raise CheckpointError(f"{index} names tensor {name!r}, which {file} does not hold")
        if tensors[name].file.name != PurePath(file).name:
            raise CheckpointError(f"{index} says tensor {name!r} is in {file}; it is in {tensors[name].file.name}")


def _sampled(tensors: list[Tensor]) -> Iterator[tuple[Tensor, list[bytes]]]:
    """Yield each tensor with its samples; from the Hub several at a time, for each range is a request of its own."""
    with ThreadPoolExecutor(REQUESTS) as pool:
        for start in range(0, len(tensors), SAMPLED_AHEAD):
            batch = tensors[start : start + SAMPLED_AHEAD]
            far = {tensor.name: pool.submit(_samples, tensor) for tensor in batch if isinstance(tensor.file, HubFile)}
            for tensor in batch:
                yield tensor, far[tensor.name].result() if tensor.name in far else _samples(tensor)


def _samples(tensor: Tensor) -> list[bytes]:
    last = tensor.nbytes - SAMPLE_BYTES
    whole = tensor.nbytes <= SAMPLE_PIECES * SAMPLE_BYTES
    spread = [(i * last // (SAMPLE_PIECES - 1), SAMPLE_BYTES) for i in range(SAMPLE_PIECES)]
    try:
        with tensor.file.open("rb", buffering=0) as handle:
            return [_piece(handle, tensor, *place) for place in ([(0, tensor.nbytes)] if whole else spread)]
    except OSError as error:
        what = error.strerror or error
        raise CheckpointError(f"cannot read tensor {tensor.name!r} of {tensor.file}: {what}") from error


def _piece(handle: IO[bytes] | RawIOBase, tensor: Tensor, offset: int, length: int) -> bytes:
    handle.seek(tensor.start + offset)
    piece = handle.read(length)
    if piece is None or len(piece) != length:
        raise CheckpointError(f"{tensor.file} ended while tensor {tensor.name!r} was read")
    return piece
