"""Shards written: tensors copied as byte ranges, never decoded."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from layerprune.checkpoint.folder import write_file
from layerprune.checkpoint.header import DTYPE_BITS, LENGTH_BYTES, METADATA, Tensor
from layerprune.checkpoint.hub_file import File
from layerprune.checkpoint.opened import INDEX, WEIGHTS
from layerprune.errors import CheckpointError, WriteError
from layerprune.output import write_all, writing
from layerprune.progress import SILENT, Advance, Progress

DEFAULT_SHARD_BYTES = 5 * 10**9  # what the Hub's own library has long split at
BUFFER_BYTES = 2**20  # of the portable copy; measured: 8 MiB takes two to six times as long
KERNEL_COPY_BYTES = 64 * 2**20  # per copy_file_range call, so that progress moves
SMALL_RANGE_BYTES = 64 * 2**10  # shorter ones are gathered in memory, a system call each would cost more
NO_KERNEL_COPY = {errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM, errno.EBADF}


Range = tuple[File, int, int]  # file, start, stop


@dataclass(frozen=True)
class Part:
    """One tensor to write: the name it gets, its dtype and shape, and the byte ranges that make it up, in order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    ranges: Iterable[Range]
    nbytes: int

    @classmethod
    def of(cls, tensor: Tensor, name: str) -> Part:
        return cls(name, tensor.dtype, tensor.shape, ((tensor.file, tensor.start, tensor.stop),), tensor.nbytes)

    @classmethod
    def slices(cls, tensor: Tensor, name: str, axis: int, slices: int, kept: Sequence[int]) -> Part:
        """Keep some of the ``slices`` equal slices along an axis of a tensor, in the order of ``kept``.

        Raises ``CheckpointError`` when the axis does not divide into that many.
        """
        side, bits = tensor.shape[axis], DTYPE_BITS[tensor.dtype]
        width = math.prod(tensor.shape[axis:]) // slices * bits // 8  # bytes of one slice of one row
        if side % slices or math.prod(tensor.shape[axis:]) // slices * bits % 8:
            raise CheckpointError(f"{tensor.file}: axis {axis} of tensor {tensor.name!r} is not {slices} equal slices")
        shape = (*tensor.shape[:axis], side // slices * len(kept), *tensor.shape[axis + 1 :])
        rows = math.prod(tensor.shape[:axis])
        ranges = _Slices(tensor, rows, width, slices, tuple(kept))
        return cls(name, tensor.dtype, shape, ranges, rows * width * len(kept))


@dataclass(frozen=True)
class _Slices:
    """Byte ranges of slices of every row, made as they are needed: a quarter million rows are common."""

    tensor: Tensor
    rows: int
    width: int
    slices: int
    kept: tuple[int, ...]

    def __iter__(self) -> Iterator[Range]:
        for row in range(self.rows):
            start = self.tensor.start + row * self.slices * self.width
            for index in self.kept:
                yield self.tensor.file, start + index * self.width, start + (index + 1) * self.width


@dataclass(frozen=True)
class Shard:
    """One file to write."""

    filename: str
    parts: tuple[Part, ...]


def plan_shards(parts: Sequence[Part], max_bytes: int | None = None) -> list[Shard]:
    """Return the files to write, each of at most ``max_bytes`` of data (default 5 GB) or a single larger tensor."""
    limit = DEFAULT_SHARD_BYTES if max_bytes is None else max_bytes
    groups: list[list[Part]] = [[]]
    filled = 0
    for part in parts:
        if groups[-1] and filled + part.nbytes > limit:
            groups.append([])
            filled = 0
        groups[-1].append(part)
        filled += part.nbytes
    if len(groups) == 1:
        return [Shard(WEIGHTS, _aligned(groups[0]))]
    stem, count = WEIGHTS.removesuffix(".safetensors"), len(groups)
    return [Shard(f"{stem}-{i:05d}-of-{count:05d}.safetensors", _aligned(group)) for i, group in enumerate(groups, 1)]


def write_shards(
    folder: Path, shards: Sequence[Shard], metadata: dict[str, str], progress: Progress = SILENT
) -> Iterator[str]:
    """Write the shards and, for more than one, their index; yield each file's name once it is written.

    The bytes may still be on their way to the disk (``flush_to_disk``), so that the next shard does not wait for them.
    """
    total = sum(part.nbytes for shard in shards for part in shard.parts)
    with progress.task("copying weights", total, "B") as advance:
        for shard in shards:
            _write_shard(folder / shard.filename, shard, metadata, advance)
            yield shard.filename
    if len(shards) > 1:
        names = {part.name: shard.filename for shard in shards for part in shard.parts}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(names.items()))}
        write_file(folder / INDEX, (json.dumps(index, indent=2) + "\n").encode())
        yield INDEX


def header_bytes(shard: Shard, metadata: dict[str, str]) -> bytes:
    """Return the safetensors length prefix and header of a shard, padded so that the data starts at a multiple of 8."""
    content: dict[str, object] = {METADATA: metadata}
    position = 0
    for part in shard.parts:
        content[part.name] = {
            "dtype": part.dtype, "shape": list(part.shape), "data_offsets": [position, position + part.nbytes],
        }  # fmt: skip
        position += part.nbytes
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def _aligned(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Order wide dtypes first (stable), as the safetensors library does, so that every tensor stays aligned."""
    return tuple(sorted(parts, key=lambda part: -DTYPE_BITS[part.dtype]))


def _write_shard(path: Path, shard: Shard, metadata: dict[str, str], advance: Advance) -> None:
    sources: dict[File, IO[bytes]] = {}
    try:
        with path.open("wb", buffering=0) as target:
            _write_all(target, header_bytes(shard, metadata))
            gathered = bytearray()
            for file, start, stop in _merged(shard.parts):
                if file not in sources:
                    sources[file] = file.open("rb", buffering=0)
                small = stop - start < SMALL_RANGE_BYTES
                while small and start < stop:
                    data = _read(sources[file], start, stop - start)
                    gathered += data
                    start += len(data)
                if gathered and (not small or len(gathered) >= BUFFER_BYTES):
                    _flush(gathered, target, advance)
                _copy_range(sources[file], start, stop, target, advance)
            _flush(gathered, target, advance)
    finally:
        for source in sources.values():
            source.close()


def _flush(gathered: bytearray, target: IO[bytes], advance: Advance) -> None:
    _write_all(target, gathered)
    advance(len(gathered))
    gathered.clear()


def _merged(parts: Sequence[Part]) -> Iterator[Range]:
    """Join neighbouring byte ranges of one file: one long copy in place of many short ones."""
    run: Range | None = None
    for piece in (piece for part in parts for piece in part.ranges):
        if run is not None and run[0] == piece[0] and run[2] == piece[1]:
            run = (run[0], run[1], piece[2])
            continue
        if run is not None:
            yield run
        run = piece
    if run is not None:
        yield run


def _copy_range(source: IO[bytes], start: int, stop: int, target: IO[bytes], advance: Advance) -> None:
    """Append bytes [start, stop) of ``source`` to ``target``; inside the kernel where it can, else through a buffer."""
    position = start
    if hasattr(os, "copy_file_range"):
        position = _kernel_copy(source, start, stop, target, advance)
    while position < stop:
        data = _read(source, position, min(BUFFER_BYTES, stop - position))
        _write_all(target, data)
        position += len(data)
        advance(len(data))


def _read(source: IO[bytes], start: int, length: int) -> bytes:
    source.seek(start)
    data = source.read(length)
    if not data:
        raise OSError(errno.EIO, f"the file ended at byte {start}", source.name)
    return data


def _write_all(target: IO[bytes], data: bytes | bytearray) -> None:
    with writing(Path(target.name)):
        write_all(target, data)


def _kernel_copy(source: IO[bytes], start: int, stop: int, target: IO[bytes], advance: Advance) -> int:
    """Copy as much as the kernel can and return how far it came; ``start`` where the file systems do not support it."""
    position = start
    while position < stop:
        try:
            count = os.copy_file_range(
                source.fileno(), target.fileno(), min(KERNEL_COPY_BYTES, stop - position), offset_src=position
            )
        except OSError as error:
            if error.errno in NO_KERNEL_COPY:
                return position
            raise WriteError(error.errno, error.strerror, target.name) from error
        if count == 0:  # some kernels answer 0 for file systems they cannot copy from; the portable loop decides
            return position
        position += count
        advance(count)
    return position
