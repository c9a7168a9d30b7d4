"""The values of tensors on disk, compared a chunk at a time: no tensor is in memory as a whole, nor is torch used.

Floating-point dtypes are decoded by numpy, bfloat16 by shifting its bits. Everything else (integers, packed weights,
float8, which stands beside a scale) is compared byte by byte: equal, or not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from layerprune.checkpoint.safetensors import DTYPE_BITS, Tensor, read_pieces

Array = np.ndarray[Any, Any]

FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # what numpy reads them as
NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
CHUNK = 1 << 19  # elements of two tensors that are compared at a time: some 20 MB with all that is made of them
# What the nearest layer is looked for by: 16 pieces of 128 elements, at the same places whatever the dtype.
PIECES, PIECE = 16, 128

EQUAL, ROUNDED, CHANGED, RESHAPED, PACKED = "equal", "rounded", "changed", "reshaped", "packed"


@dataclass(frozen=True)
class Difference:
    """How a tensor differs from another; ``moved`` and ``norm`` are sums of squares."""

    kind: str  # "equal", "rounded" to another dtype, "changed", "reshaped", or "packed": not comparable
    moved: float = 0.0  # of the differences
    norm: float = 0.0  # of the base's values

    @property
    def change(self) -> float:
        """||W - W'|| / ||W||: 0 for equal tensors, infinite where the base's is zero, NaN where there is no number."""
        return relative(self.moved, self.norm)


def relative(moved: float, norm: float) -> float:
    """Return the root of ``moved / norm``, which is infinite where only ``norm`` is zero."""
    if not (math.isfinite(moved) and math.isfinite(norm)):
        return math.nan
    return math.sqrt(moved / norm) if norm else (math.inf if moved else 0.0)


def decode(raw: bytes, dtype: str) -> Array:
    """Return the values of one of ``FLOATS``; bfloat16 as float32."""
    read = np.frombuffer(raw, FLOATS[dtype])
    return (read.astype("<u4") << np.uint32(16)).view("<f4") if dtype == "BF16" else read


def round_to(values: Array, dtype: str) -> Array:
    """Return float values as they are when stored in ``dtype``, rounded to the nearest, to even."""
    if dtype != "BF16":
        with np.errstate(over="ignore"):
            return values.astype(FLOATS[dtype])
    single = values.astype("<f4")
    bits = single.view("<u4")
    near = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return np.where(np.isfinite(single), (near & np.uint32(0xFFFF0000)).view("<f4"), single)


def sample(tensor: Tensor) -> Array | bytes:
    """Return up to 2,048 values spread over a tensor, or its bytes at these places where it is none of floats."""
    count, bits = tensor.elements, DTYPE_BITS[tensor.dtype]
    if count <= PIECES * PIECE:
        raw = b"".join(read_pieces(tensor, [(0, tensor.nbytes)]))
    else:
        starts = [i * (count - PIECE) // (PIECES - 1) for i in range(PIECES)]
        raw = b"".join(read_pieces(tensor, [(start * bits // 8, PIECE * bits // 8) for start in starts]))
    return decode(raw, tensor.dtype).astype("<f4") if tensor.dtype in FLOATS else raw


def distance(one: Array | bytes, other: Array | bytes) -> float:
    """Return the distance of two samples as a share of the larger norm: 0 for equal ones, 1 and more for unrelated.

    Independent values are sqrt(a² + b²) apart, which is never less than the larger norm. Bytes are equal or not.
    """
    if isinstance(one, bytes) or isinstance(other, bytes):
        return float(one is not other and one != other)
    with np.errstate(all="ignore"):
        apart = float(np.linalg.norm(one - other))
        norm = max(float(np.linalg.norm(one)), float(np.linalg.norm(other)))
    if not math.isfinite(apart):
        return 0.0 if np.array_equal(one, other, equal_nan=True) else 1.0
    return apart / norm if norm else 0.0


def first_rows(tensor: Tensor, rows: int) -> Tensor:
    """Return the first rows of a tensor, whose bytes are its first."""
    row = tensor.nbytes // tensor.shape[0]
    return replace(tensor, shape=(rows, *tensor.shape[1:]), stop=tensor.start + rows * row)


def difference(tensor: Tensor, base: Tensor) -> Difference:
    """Compare a tensor with the base's, whole; raises ``CheckpointError`` where one cannot be read."""
    if tensor.dtype == base.dtype and tensor.shape == base.shape:
        if all(ours == theirs for ours, theirs in _chunks(tensor, base)):
            return Difference(EQUAL)
        if tensor.dtype not in FLOATS:
            return Difference(CHANGED, math.nan, math.nan)
    elif tensor.dtype not in FLOATS or base.dtype not in FLOATS:
        return Difference(RESHAPED if tensor.dtype == base.dtype else PACKED)
    if tensor.shape != base.shape:
        return Difference(RESHAPED)
    moved = norm = 0.0
    ours_rounded = theirs_rounded = tensor.dtype != base.dtype
    for raw, base_raw in _chunks(tensor, base):
        ours, theirs = decode(raw, tensor.dtype), decode(base_raw, base.dtype)
        ours_rounded = ours_rounded and _same(round_to(theirs, tensor.dtype), ours)
        theirs_rounded = theirs_rounded and _same(round_to(ours, base.dtype), theirs)
        with np.errstate(all="ignore"):
            wide = theirs.astype("<f8")
            norm += float(wide @ wide)
            wide -= ours
            moved += float(wide @ wide)
    return Difference(ROUNDED if ours_rounded or theirs_rounded else CHANGED, moved, norm)


def squares(tensor: Tensor) -> float:
    """Return the sum of the squares of a tensor's values; 0 where it is none of floats."""
    if tensor.dtype not in FLOATS:
        return 0.0
    found = (decode(raw, tensor.dtype).astype("<f8") for (raw,) in _chunks(tensor))
    with np.errstate(all="ignore"):
        return sum(float(values @ values) for values in found)


def _same(one: Array, other: Array) -> bool:
    return bool(np.array_equal(one, other, equal_nan=True))


def _chunks(*tensors: Tensor) -> Iterator[tuple[bytes, ...]]:
    """Yield the bytes of tensors of one shape, the same elements of each at a time."""
    spans = [(start, min(CHUNK, tensors[0].elements - start)) for start in range(0, tensors[0].elements, CHUNK)]
    readers = []
    for tensor in tensors:
        bits = DTYPE_BITS[tensor.dtype]  # CHUNK is even: halves of bytes (F4) do not come apart
        readers.append(read_pieces(tensor, [(start * bits // 8, count * bits // 8) for start, count in spans]))
    return zip(*readers, strict=True)
