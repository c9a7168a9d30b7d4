"""Parameters of a model in memory and the tensors on disk that they were read from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn

from layerprune.checkpoint import Checkpoint, Tensor
from layerprune.errors import RefusedError

Stored = dict[str, tuple[str, ...]]  # parameter -> names of the tensors on disk that hold it

FLOATS = ("F64", "F32", "BF16", "F16")  # dtypes a healed value can be written in


def names_on_disk(model: nn.Module, checkpoint: Checkpoint, wanted: Iterable[str]) -> Stored:
    """Return for each wanted parameter name the names of the tensors that it is stored as; all hold the same value.

    A tied parameter is stored under the name of its twin, or under both: a healed value belongs under each, or the two
    differ and are tied no more on loading. The prefix of a layer's name may differ between memory and disk. Raises
    ``RefusedError`` where a parameter has no floating tensor of its own and the same shape on disk (fused experts,
    transposed or quantised weights).
    """
    twins: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        twins.setdefault(id(parameter), []).append(name)
    found: Stored = {}
    for name in wanted:
        parameter = model.get_parameter(name)
        names = dict.fromkeys([name, *twins[id(parameter)]])
        tensors = {hit.name: hit for each in names for hit in _stored(each, checkpoint)}
        if not tensors:
            raise RefusedError(f"{name} is stored under no name of its own in {checkpoint.path}; it cannot be changed")
        for tensor in tensors.values():
            if tensor.shape != tuple(parameter.shape) or tensor.dtype not in FLOATS:
                raise RefusedError(
                    f"{name} is {tuple(parameter.shape)} in memory and {tensor.dtype} {tensor.shape} on disk; only "
                    "floating weights of the same shape can be changed"
                )
        found[name] = tuple(tensors)
    return found


def _stored(name: str, checkpoint: Checkpoint) -> Iterator[Tensor]:
    """Yield the tensor of this name, or the only one whose name ends alike from the layer's number on."""
    if name in checkpoint.tensors:
        yield checkpoint.tensors[name]
        return
    parts = name.split(".")
    number = next((place for place, part in enumerate(parts) if part.isdigit()), 0)
    if number < 1:
        return
    end = "." + ".".join(parts[number - 1 :])  # ".layers.3.mlp.down_proj.weight"
    hits = [tensor for other, tensor in checkpoint.tensors.items() if f".{other}".endswith(end)]
    if len(hits) == 1:
        yield hits[0]


def stored_as(names: Iterable[str], value: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a healed value under each of the names that ``names_on_disk`` found for its parameter."""
    for name in names:
        yield name, value


def read_tensor(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """Return one tensor as it is on disk, on the CPU."""
    from safetensors import safe_open

    with safe_open(checkpoint.tensors[name].file, framework="pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
    return tensor
