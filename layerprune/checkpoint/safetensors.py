"""A checkpoint folder opened: every tensor of every shard by name, validated from the safetensors headers alone."""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import json
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any

from layerprune import parsing
from layerprune.errors import CheckpointError, one_line
from layerprune.files import checked_name, contained
from layerprune.formatting import short
from layerprune.parsing import POINTER, parse_json

# A file of a Hub repo that has not been fetched: its size is asked for, its bytes are read by ranges.


PARTIAL_CONTENT = 206  # HTTP status of an answer that is the range asked for and not the whole file
TIMEOUT = 30  # seconds without a byte, before an attempt counts as failed


@dataclass(frozen=True)
class HubFile:
    """One file at one commit of a Hub repo."""

    repo: str
    revision: str  # commit hash
    path: str  # inside the repo

    def __str__(self) -> str:
        return f"{self.repo}@{self.revision[:7]}/{self.path}"

    @property
    def name(self) -> str:
        return PurePath(self.path).name

    @cached_property
    def size(self) -> int:
        """Bytes, as the Hub says."""
        from huggingface_hub import get_hf_file_metadata

        with _as_os_error():
            size = get_hf_file_metadata(self._url).size
        if size is None:
            raise OSError(errno.EIO, "the Hub does not say how large it is")
        return int(size)

    def read(self, start: int, length: int) -> bytes:
        """Return bytes [start, start + length); fewer where the file ends. Passing faults are tried again.

        What goes wrong on the way is an ``OSError``.
        """
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

        stop = min(start + length, self.size)
        if start >= stop:
            return b""
        headers = {**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        with _as_os_error(), http_stream_backoff("GET", self._url, headers=headers, timeout=TIMEOUT) as response:
            hf_raise_for_status(response)
            if response.status_code != PARTIAL_CONTENT:
                raise OSError(errno.EIO, "the Hub sends whole files where a range is asked for; fetch the model first")
            return bytes(response.read())

    @cached_property
    def _url(self) -> str:
        from huggingface_hub import hf_hub_url

        return hf_hub_url(self.repo, self.path, revision=self.revision)


File = Path | HubFile  # where a tensor is


@contextmanager
def _as_os_error() -> Iterator[None]:
    """Turn what HTTP can raise into an ``OSError`` of one line."""
    from huggingface_hub.errors import HTTPError  # of the HTTP client that it uses, httpx or httpx2

    try:
        yield
    except (OSError, HTTPError) as error:
        if getattr(error, "errno", None) == errno.EIO:
            raise
        raise OSError(errno.EIO, one_line(error)) from error


@contextmanager
def _opened(file: File, buffering: int = -1) -> Iterator[tuple[int, Callable[[int, int], bytes]]]:
    """Yield the size of a file, and what reads a range of it as ``HubFile.read`` does."""
    if isinstance(file, HubFile):
        yield file.size, file.read
        return
    with file.open("rb", buffering) as handle:

        def read(start: int, length: int) -> bytes:
            handle.seek(start)
            return handle.read(length)

        yield handle.seek(0, os.SEEK_END), read


# The header of one safetensors file, parsed and validated without reading a tensor.
#
# The format (https://huggingface.co/docs/safetensors): 8 bytes little-endian header length, a JSON object, then the
# data, which the tensors cover without gap or overlap.


LENGTH_BYTES = 8
LARGEST_HEADER = 100_000_000  # bytes; the safetensors library refuses longer headers
LONGEST_NAME = 1000  # of a tensor
MOST_SIDES = 64  # of a shape, as many as torch takes
METADATA = "__metadata__"

DTYPE_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8,
    "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class Tensor:
    """One tensor on disk; ``start`` and ``stop`` are byte offsets from the beginning of the file."""

    name: str
    dtype: str  # as safetensors spells it: "BF16"
    shape: tuple[int, ...]
    file: File
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """What one safetensors file says about itself; tensors in the order of their data."""

    file: File
    tensors: tuple[Tensor, ...]
    metadata: dict[str, str]


def read_header(file: File) -> Header:
    """Read and validate one header; raises ``CheckpointError`` naming the file, and the tensor at fault."""
    try:
        with _opened(file) as (size, read):
            prefix = read(0, LENGTH_BYTES)
            if len(prefix) < LENGTH_BYTES:
                raise CheckpointError(f"{file} is truncated: {size} bytes, not even a safetensors header length")
            length = int.from_bytes(prefix, "little")
            if POINTER.startswith(prefix):
                raise CheckpointError(f"{file} is a git-lfs pointer in place of the weights; fetch them: git lfs pull")
            if length > LARGEST_HEADER:
                raise CheckpointError(f"{file} is not a safetensors file: it claims a header of {length} bytes")
            if LENGTH_BYTES + length > size:
                raise CheckpointError(f"{file} is truncated: a header of {length} bytes in a file of {size} bytes")
            text = read(LENGTH_BYTES, length)
    except FileNotFoundError:
        raise CheckpointError(f"{file} does not exist") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}") from error
    return _parse(file, text, data_start=LENGTH_BYTES + length, size=size)


def _parse(file: File, text: bytes, data_start: int, size: int) -> Header:
    try:
        content = parse_json(text.decode("utf-8"), repeats=False)
    except ValueError as error:
        raise CheckpointError(f"{file} has a damaged safetensors header: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} has a damaged safetensors header: a {type(content).__name__}, not an object")
    metadata = content.pop(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{file} has a damaged safetensors header: {METADATA} is not a map of strings")
    tensors = sorted(
        (_tensor(file, name, entry, data_start) for name, entry in content.items()), key=lambda t: (t.start, t.stop)
    )
    _check_cover(file, tensors, data_start, size)
    return Header(file, tuple(tensors), metadata)


def _tensor(file: File, name: str, entry: Any, data_start: int) -> Tensor:
    def fault(what: str) -> CheckpointError:
        return CheckpointError(f"{file}: tensor {short(name)} {what}")

    if len(name) > LONGEST_NAME:
        raise fault(f"has a name of {len(name)} characters; at most {LONGEST_NAME} are read")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise fault("lacks dtype, shape or data_offsets in the header")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise fault(f"has the unknown dtype {short(dtype)}; known: {', '.join(DTYPE_BITS)}")
    if not isinstance(shape, list) or len(shape) > MOST_SIDES or not all(_is_count(side) for side in shape):
        raise fault(f"has the impossible shape {short(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(offset) for offset in offsets):
        raise fault(f"has the impossible data_offsets {short(offsets)}")
    begin, end = offsets
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if end < begin or bits != 8 * (end - begin):
        raise fault(f"covers {end - begin} bytes where {dtype} of shape {shape} takes {bits // 8}")
    return Tensor(name, dtype, tuple(shape), file, data_start + begin, data_start + end)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _check_cover(file: File, tensors: list[Tensor], data_start: int, size: int) -> None:
    position, before = data_start, "the header"
    for tensor in tensors:
        if tensor.stop > size:
            raise CheckpointError(
                f"{file} is truncated: tensor {tensor.name!r} ends at byte {tensor.stop}, the file at byte {size}"
            )
        if tensor.start < position:
            raise CheckpointError(f"{file}: tensor {tensor.name!r} overlaps {before}")
        if tensor.start > position:
            stray = tensor.start - position
            raise CheckpointError(f"{file}: {stray} bytes before tensor {tensor.name!r} belong to no tensor")
        position, before = tensor.stop, f"tensor {tensor.name!r}"
    if position != size:
        raise CheckpointError(f"{file}: {size - position} bytes after {before} belong to no tensor")


# A checkpoint folder opened: every tensor of every shard by name, validated, with a fingerprint of the weights.


WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

# A fingerprint must be quick on a 140 GB checkpoint and still see any training step, which moves nearly every weight:
# up to 64 KiB of each tensor, in 16 pieces.
SAMPLE_PIECES = 16
SAMPLE_BYTES = 4096
REQUESTS = 16  # tensors sampled at a time: of those on the Hub each range is a request of its own
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
        """Stored elements, duplicates and packing as they are; what the model has is ``Architecture.parameters``."""
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
        digest, tensors = hashlib.sha256(), [self.tensors[name] for name in sorted(self.tensors)]
        with ThreadPoolExecutor(REQUESTS) as pool:
            for start in range(0, len(tensors), SAMPLED_AHEAD):
                batch = tensors[start : start + SAMPLED_AHEAD]
                for tensor, pieces in zip(batch, pool.map(_samples, batch), strict=True):
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
    content = read_json(index := contained(path, INDEX))
    listed = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(listed, dict) or not listed or not all(isinstance(file, str) for file in listed.values()):
        raise CheckpointError(f"{index} has no weight_map of tensor names to file names")
    return listed


def read_json(path: Path) -> Any:
    """Return the content of a JSON file; raises ``CheckpointError`` naming the file."""
    try:
        return parsing.read_json(path, finite=False)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {one_line(error)}") from error


def file_names(folder: Path) -> list[str]:
    """Return the files of a folder and of the folders in it, as paths from it."""
    return [path.relative_to(folder).as_posix() for place in ("*", "*/*") for path in folder.glob(place)]


def _check_index(index: Path, listed: dict[str, str], tensors: dict[str, Tensor]) -> None:
    for name, file in listed.items():
        if name not in tensors:
            raise CheckpointError(f"{index} names tensor {name!r}, which {file} does not hold")
        if tensors[name].file.name != PurePath(file).name:
            raise CheckpointError(f"{index} says tensor {name!r} is in {file}; it is in {tensors[name].file.name}")


def _samples(tensor: Tensor) -> list[bytes]:
    last = tensor.nbytes - SAMPLE_BYTES
    whole = tensor.nbytes <= SAMPLE_PIECES * SAMPLE_BYTES
    spread = [(i * last // (SAMPLE_PIECES - 1), SAMPLE_BYTES) for i in range(SAMPLE_PIECES)]
    return list(read_pieces(tensor, [(0, tensor.nbytes)] if whole else spread))


def read_pieces(tensor: Tensor, pieces: Iterable[tuple[int, int]]) -> Iterator[bytes]:
    """Yield pieces (offset, length) of a tensor's bytes, counted from its first, one at a time.

    Raises ``CheckpointError`` where the file cannot be read or has become shorter.
    """
    try:
        with _opened(tensor.file, buffering=0) as (_, read):
            for offset, length in pieces:
                piece = read(tensor.start + offset, length)
                if len(piece) != length:
                    raise CheckpointError(f"{tensor.file} ended while tensor {tensor.name!r} was read")
                yield piece
    except OSError as error:
        what = error.strerror or error
        raise CheckpointError(f"cannot read tensor {tensor.name!r} of {tensor.file}: {what}") from error


# What a folder holds that is no language model in safetensors, told by the names of its files.


ADAPTER = "adapter_config.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.msgpack", "*.h5", "*.ot")
SAVE = "load it with transformers and save it with save_pretrained"
# What a file says about the folder it is in, and what would work; the first that matches is taken.
# "{}" stands for the file.
KINDS = (
    ("model_index.json", "is a diffusers pipeline ({}), not a language model"),
    ("*.gguf", "has no safetensors weights, only {}; take the model that it was made from, or read it with "
               "transformers (gguf_file) and save it with save_pretrained"),
    ("consolidated*.safetensors", "has its weights in the vendor's own format ({}); take the transformers edition of "
                                  "the model, or convert it"),
    ("*.safetensors", "holds {} and no model.safetensors.index.json that says what is in it; download or save the "
                      "model again, whole"),
    ("*.h5", f"has no safetensors weights, only TensorFlow's {{}}; {SAVE}"),
    ("*.msgpack", f"has no safetensors weights, only Flax's {{}}; {SAVE}"),
    *((pattern, f"has no safetensors weights, only {{}}; pickles are never read, convert it first: {SAVE}")
      for pattern in PICKLES),
    ("*.onnx", "has no safetensors weights, only {}; take the model that it was made from"),
    ("openvino_model.xml", "has no safetensors weights, only {}; take the model that it was made from"),
)  # fmt: skip


def why_no_weights(names: Collection[str]) -> str:
    """Return what a folder with these files is instead of a model; the sentence goes on from the folder's name."""
    top = sorted(name for name in names if "/" not in name)
    if ADAPTER in top or fnmatch.filter(top, "adapter_model*"):
        return "holds an adapter, not a model; merge it into its base model first (peft: merge_and_unload)"
    inner = sorted(name.rpartition("/")[0] for name in names if name.endswith("/config.json"))
    if "modules.json" in top and inner and "config.json" not in top:
        return f"is a sentence-transformers model in several folders; its transformer alone is in {inner[0]}"
    for pattern, said in KINDS:
        found = fnmatch.filter(top, pattern)
        if found:
            return said.format(found[0])
    return "has neither model.safetensors nor model.safetensors.index.json"
