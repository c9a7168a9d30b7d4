"""The header of one safetensors file, parsed and validated without reading a tensor.

The format (https://huggingface.co/docs/safetensors): 8 bytes little-endian header length, a JSON object, then the data,
which the tensors cover without gap or overlap.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from typing import Any

from layerprune.checkpoint.hub_file import File
from layerprune.errors import CheckpointError

LENGTH_BYTES = 8
LARGEST_HEADER = 100_000_000  # bytes; the safetensors library refuses longer headers
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
        with file.open("rb") as handle:
            size = handle.seek(0, os.SEEK_END)
            handle.seek(0)
            prefix = handle.read(LENGTH_BYTES)
            if len(prefix) < LENGTH_BYTES:
                raise CheckpointError(f"{file} is truncated: {size} bytes, not even a safetensors header length")
            length = int.from_bytes(prefix, "little")
            if length > LARGEST_HEADER:
                raise CheckpointError(f"{file} is not a safetensors file: it claims a header of {length} bytes")
            if LENGTH_BYTES + length > size:
                raise CheckpointError(f"{file} is truncated: a header of {length} bytes in a file of {size} bytes")
            text = handle.read(length)
    except FileNotFoundError:
        raise CheckpointError(f"{file} does not exist") from None
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}") from error
    return _parse(file, text, data_start=LENGTH_BYTES + length, size=size)


def _parse(file: File, text: bytes, data_start: int, size: int) -> Header:
    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=_no_repeats)
    except (ValueError, RecursionError) as error:
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


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return found


def _tensor(file: File, name: str, entry: Any, data_start: int) -> Tensor:
    def fault(what: str) -> CheckpointError:
        return CheckpointError(f"{file}: tensor {name!r} {what}")

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise fault("lacks dtype, shape or data_offsets in the header")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in DTYPE_BITS:
        raise fault(f"has the unknown dtype {dtype!r}; known: {', '.join(DTYPE_BITS)}")
    if not isinstance(shape, list) or not all(_is_count(side) for side in shape):
        raise fault(f"has the impossible shape {shape!r}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(offset) for offset in offsets):
        raise fault(f"has the impossible data_offsets {offsets!r}")
    begin, end = offsets
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if end < begin or bits != 8 * (end - begin):
        raise fault(f"covers {end - begin} bytes where {dtype} of shape {shape} takes {bits // 8}")
    return Tensor(name, dtype, tuple(shape), file, data_start + begin, data_start + end)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


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
