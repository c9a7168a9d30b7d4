"""Shards copied as byte ranges, never decoded, into a folder that is written whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import IO

from layerprune.artifacts import FileEntry
from layerprune.artifacts.base import write_atomically
from layerprune.checkpoint.safetensors import DTYPE_BITS, INDEX, LENGTH_BYTES, METADATA, WEIGHTS, File, Tensor
from layerprune.errors import CheckpointError, ExportError, WriteError, one_line
from layerprune.files import check_apart, try_folder, write_all, writing
from layerprune.util import SILENT, Advance, Progress

# Shards written: tensors copied as byte ranges, never decoded.


DEFAULT_SHARD_BYTES = 5 * 10**9  # what the Hub's own library has long split at
BUFFER_BYTES = 2**20  # of the portable copy; measured: 8 MiB takes two to six times as long
KERNEL_COPY_BYTES = 64 * 2**20  # per copy_file_range call, so that progress moves
SMALL_RANGE_BYTES = 64 * 2**10  # shorter ones are gathered in memory, a system call each would cost more
NO_KERNEL_COPY = {errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EPERM, errno.EBADF}


Range = tuple[File, int, int]  # file, start, stop


@dataclass(frozen=True)
class TensorPart:
    """One tensor to write: the name it gets, its dtype and shape, and the byte ranges that make it up, in order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    ranges: Iterable[Range]
    nbytes: int

    @classmethod
    def of(cls, tensor: Tensor, name: str) -> TensorPart:
        return cls(name, tensor.dtype, tensor.shape, ((tensor.file, tensor.start, tensor.stop),), tensor.nbytes)

    @classmethod
    def slices(cls, tensor: Tensor, name: str, axis: int, slices: int, kept: Sequence[int]) -> TensorPart:
        """Keep some of the ``slices`` equal slices along an axis of a tensor, in the order of ``kept``.

        Raises ``CheckpointError`` when the axis does not divide into that many.
        """
        side, bits = tensor.shape[axis], DTYPE_BITS[tensor.dtype]
        width = math.prod(tensor.shape[axis:]) // slices * bits // 8  # bytes of one slice of one row
        if side % slices or math.prod(tensor.shape[axis:]) // slices * bits % 8:
            raise CheckpointError(f"{tensor.file}: axis {axis} of tensor {tensor.name!r} is not {slices} equal slices")
        shape = (*tensor.shape[:axis], side // slices * len(kept), *tensor.shape[axis + 1 :])
        rows = math.prod(tensor.shape[:axis])
        ranges = _TensorSlices(tensor, rows, width, slices, tuple(kept))
        return cls(name, tensor.dtype, shape, ranges, rows * width * len(kept))


@dataclass(frozen=True)
class _TensorSlices:
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
    parts: tuple[TensorPart, ...]


def plan_shards(parts: Sequence[TensorPart], max_bytes: int | None = None) -> list[Shard]:
    """Return the files to write, each of at most ``max_bytes`` of data (default 5 GB) or a single larger tensor."""
    limit = DEFAULT_SHARD_BYTES if max_bytes is None else max_bytes
    groups: list[list[TensorPart]] = [[]]
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
        write_atomically(folder / INDEX, (json.dumps(index, indent=2) + "\n").encode())
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


def _aligned(parts: Sequence[TensorPart]) -> tuple[TensorPart, ...]:
    """Order wide dtypes first (stable), as the safetensors library does, so that every tensor stays aligned."""
    return tuple(sorted(parts, key=lambda part: -DTYPE_BITS[part.dtype]))


def _write_shard(path: Path, shard: Shard, metadata: dict[str, str], advance: Advance) -> None:
    sources: dict[File, IO[bytes]] = {}
    with path.open("wb", buffering=0) as target, ExitStack() as opened:
        _write_all(target, header_bytes(shard, metadata))
        gathered = bytearray()
        for file, start, stop in _merged(shard.parts):
            if file not in sources:
                sources[file] = opened.enter_context(file.open("rb", buffering=0))
            small = stop - start < SMALL_RANGE_BYTES
            while small and start < stop:
                data = _read(sources[file], start, stop - start)
                gathered += data
                start += len(data)
            if gathered and (not small or len(gathered) >= BUFFER_BYTES):
                _flush(gathered, target, advance)
            _copy_range(sources[file], start, stop, target, advance)
        _flush(gathered, target, advance)


def _flush(gathered: bytearray, target: IO[bytes], advance: Advance) -> None:
    _write_all(target, gathered)
    advance(len(gathered))
    gathered.clear()


def _merged(parts: Sequence[TensorPart]) -> Iterator[Range]:
    """Join neighbouring byte ranges of one file: one long copy in place of many short ones."""
    run: Range | None = None
    for file, start, stop in (piece for part in parts for piece in part.ranges):
        if run is not None and run[0] == file and run[2] == start:
            run = (file, run[1], stop)
            continue
        if run is not None:
            yield run
        run = (file, start, stop)
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


# A folder written whole or not at all: under a hidden name until everything in it is on the disk.


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a hidden sibling of ``out`` to write into; rename it to ``out`` on success, remove it on any failure.

    Raises ``ExportError`` when ``out`` exists or cannot be made; operating-system errors inside the block (a full disk)
    become one-line ``ExportError``s. What a killed process left behind is removed by the next export to the same place.
    """
    out = Path(out).absolute()
    with _partial_folder(out) as partial:
        yield partial
        _publish(partial, out)


def try_new_folder(out: Path, *sources: str | Path | None) -> None:
    """See that ``out`` can be made and written, and leave nothing; for what takes long before its folder is begun.

    Raises ``ExportError`` as ``new_folder`` does, and ``UsageError`` when ``out`` lies inside one of the folders
    ``sources``, which a model is read from.
    """
    out = Path(out).absolute()
    check_apart(out, *sources)
    with _partial_folder(out) as partial:
        try_folder(partial)


@contextmanager
def _partial_folder(out: Path) -> Iterator[Path]:
    """Yield a new hidden sibling of ``out``, locked; it is gone at the end unless it was renamed."""
    if os.path.lexists(out):
        raise ExportError(f"{out} exists already; choose a new folder or remove it")
    missing = [folder for folder in (out.parent, *out.parent.parents) if not folder.exists()]
    partial = lock = None
    try:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(out)
            partial = Path(tempfile.mkdtemp(dir=out.parent, prefix=_prefix(out)))
            lock = _lock(partial)
        except OSError as error:
            raise ExportError(f"cannot write to {out.parent}: {error.strerror or error}") from error
        yield partial
    except OSError as error:
        raise ExportError(f"writing {out} failed, nothing was left behind: {one_line(error)}") from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        for folder in missing:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        if lock is not None:
            os.close(lock)


def flush_to_disk(path: Path) -> None:
    """Wait until a written file is on the disk; a disk that fills up only now raises ``OSError`` here."""
    with writing(path):
        _sync(path, os.O_RDWR)


def _prefix(out: Path) -> str:
    return f".{out.name}.partial-"


def _lock(folder: Path) -> int | None:
    """Hold a lock that the kernel drops when this process dies, however it dies; None where there are no such locks."""
    try:
        import fcntl
    except ImportError:  # Windows: abandoned folders stay, hidden, until someone removes them
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(handle)
        raise
    return handle


def _remove_abandoned(out: Path) -> None:
    """Remove partial folders whose writer was killed: nobody holds their lock."""
    for folder in [entry for entry in out.parent.iterdir() if entry.name.startswith(_prefix(out))]:
        try:
            lock = _lock(folder)
        except (BlockingIOError, FileNotFoundError):
            continue  # its writer is alive, or finished meanwhile
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _publish(partial: Path, out: Path) -> None:
    """Give the finished folder its name: data first, then the name, both flushed to disk."""
    umask = os.umask(0)
    os.umask(umask)
    partial.chmod(0o777 & ~umask)  # mkdtemp makes private folders; a checkpoint is for sharing
    for path in partial.rglob("*"):
        _sync_folder(path) if path.is_dir() else flush_to_disk(path)
    _sync_folder(partial)
    if os.path.lexists(out):
        raise ExportError(f"{out} appeared while it was being written; nothing was changed")
    partial.rename(out)
    _sync_folder(out.parent)


def _sync_folder(folder: Path) -> None:
    if os.name == "posix":
        _sync(folder, os.O_RDONLY)


def _sync(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# A written file as a document names it: its sha256 and its length.


CHUNK_BYTES = 4 * 2**20
POLL_SECONDS = 0.005  # a file that has been read as far as it goes is looked at again then


def entry_of(path: Path) -> FileEntry:
    """Hash a file and wait until it is on the disk."""
    with path.open("rb") as file:  # out of the page cache, before the flush lets it go
        digest = hashlib.file_digest(file, "sha256")
    flush_to_disk(path)
    return FileEntry(sha256=digest.hexdigest(), bytes=path.stat().st_size)


class FollowedFile:
    """Hashes and flushes files, one after the other, while another thread appends to them: see ``following``."""

    def __init__(self, paths: Sequence[Path], hasher: ThreadPoolExecutor, flusher: ThreadPoolExecutor) -> None:
        self._flusher = flusher
        self._complete = {path: Event() for path in paths}
        self._hashes = {path: hasher.submit(_follow, path, event) for path, event in self._complete.items()}
        self._flushes: list[Future[None]] = []

    def complete(self, path: Path) -> None:
        """Say that nothing more will be appended to a file."""
        self._complete[path].set()
        self._flushes.append(self._flusher.submit(flush_to_disk, path))

    def entries(self) -> dict[Path, FileEntry]:
        """Wait until every file is hashed and on the disk; raises what went wrong on the way."""
        for flush in self._flushes:
            flush.result()
        return {path: future.result() for path, future in self._hashes.items()}

    def abandon(self) -> None:
        """Let no thread wait for bytes that will not come, nor for the disk on account of files that will go."""
        for future in (*self._hashes.values(), *self._flushes):
            future.cancel()
        for event in self._complete.values():
            event.set()


@contextmanager
def following(paths: Sequence[Path]) -> Iterator[FollowedFile]:
    """Hash and flush files that are written meanwhile, in this order, each only ever appended to.

    The hash of a large file is there moments after its last byte: the thread that hashes reads behind the one that
    writes, and neither waits for the disk, which a third one does.
    """
    with ThreadPoolExecutor(1) as hasher, ThreadPoolExecutor(1) as flusher:
        followed = FollowedFile(paths, hasher, flusher)
        try:
            yield followed
        finally:
            followed.abandon()


def _follow(path: Path, complete: Event) -> FileEntry:
    while not path.exists():
        if complete.wait(POLL_SECONDS):
            break
    digest, size = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        while True:
            last = complete.is_set()  # asked before reading: what was appended until then is read below
            data = file.read(CHUNK_BYTES)
            digest.update(data)
            size += len(data)
            if not data:
                if last:
                    return FileEntry(sha256=digest.hexdigest(), bytes=size)
                complete.wait(POLL_SECONDS)
