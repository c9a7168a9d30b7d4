"""Where a model's weights go: in which dtype, on which device, whether its layers stay elsewhere until they run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from layerprune.errors import UsageError

Offload = Literal["cpu", "disk"]  # where the weights of decoder layers stay while they do not run

# Of the free memory of a card, or of the machine, what a model's weights may fill. Over several cards only one works at
# a time, and a model whose layers come in as they run waits for them, so that both are for models that fit nowhere.
WEIGHTS_SHARE = 0.8
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def placed(device: str, offload: str, weights: int) -> tuple[str, Offload | None]:
    """Return the device that a model of so many bytes runs on, and where its layers stay; None: there.

    The device is one, or "auto" for as many cards as hold the model. Raises ``UsageError`` for a device that is not
    here and for layers in CPU memory where the model runs on the CPU.
    """
    device = _known(device)
    spread = device == "auto" and torch.cuda.is_available()
    cards = [free_memory(f"cuda:{card}") for card in range(torch.cuda.device_count())] if spread else []
    if spread:
        device = f"cuda:{cards.index(max(cards))}"
    elif device == "auto":
        device = "cpu"
    if offload == "cpu" and device == "cpu":
        raise UsageError("offload 'cpu' keeps layers in CPU memory for a card, and the model runs on the CPU; use disk")
    if offload in ("cpu", "disk"):
        return device, offload  # type: ignore[return-value]
    if weights <= WEIGHTS_SHARE * free_memory(device):
        return device, None
    if spread and (offload == "none" or weights <= WEIGHTS_SHARE * sum(cards)):
        return "auto", None
    if offload == "none":
        return device, None
    return device, "cpu" if device != "cpu" and weights <= WEIGHTS_SHARE * free_memory("cpu") else "disk"


def _known(device: str) -> str:
    """Return a device's name as torch takes it, or auto."""
    if device == "auto":
        return device
    try:
        known = torch.device(device).type != "meta"  # which has no numbers
    except RuntimeError:
        known = False
    if not known:
        raise UsageError(f"unknown device {device!r}; use auto, cpu, cuda or cuda:0")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UsageError(f"device {device!r} was asked for but torch sees no CUDA device; use --device cpu")
    return device


def free_memory(device: str) -> float:
    """Return the free bytes of a device's memory; infinity where it does not say.

    Of main memory no more than control groups leave the process, whatever is free beside them.
    """
    if device == "cpu":
        return min(psutil.virtual_memory().available, process_memory())
    return torch.cuda.mem_get_info(device)[0] if device.startswith("cuda") else math.inf


def wanted_dtype(dtype: str, config: Any, device: str) -> torch.dtype:
    """Return the dtype that weights are loaded in.

    auto is the checkpoint's own, except that a CPU without fast bfloat16 gets float32.
    """
    if dtype in DTYPES:
        return DTYPES[dtype]
    if dtype != "auto":
        raise UsageError(f"unknown dtype {dtype!r}; use auto, {', '.join(DTYPES)}")
    own = getattr(config, "dtype", None) or torch.float32
    if own == torch.float32 or (torch.cuda.is_available() and device != "cpu"):
        return own  # type: ignore[no-any-return]
    return torch.bfloat16 if fast_bfloat16() else torch.float32


def fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware (measured with AMX: 7 to 8 times float32's rate)."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def asked_attention(name: str) -> dict[str, str]:
    """Return what transformers is told, nothing for its own choice; raises ``UsageError`` for what it does not know.

    Names of Hub repos, whose code it would fetch and run, are not among those.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    known = ["eager", *sorted(key for key in ALL_ATTENTION_FUNCTIONS.valid_keys() if not key.startswith("paged|"))]
    if name != "auto" and name not in known:
        raise UsageError(f"unknown attn_implementation {name!r}; use auto, {', '.join(known)}")
    return {} if name == "auto" else {"attn_implementation": name}


# Where the memory of a process is limited, by Linux's control groups: the process's own group, and the mounted tree.
OWN_GROUP, GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
LIMITS = {"": "memory.max", "memory": "memory.limit_in_bytes"}  # by controller: version 2 names none, version 1 each


def process_memory() -> int:
    """Return the most bytes this process may use: the machine's memory, or less where a control group limits it."""
    return min([psutil.virtual_memory().total, *_limits()])


def _limits() -> Iterator[int]:
    """Yield the limits of this process's control groups and of those around them."""
    try:
        lines = OWN_GROUP.read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux, or no such file in this sandbox
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        for controller in controllers.split(","):
            if (name := LIMITS.get(controller)) is None:
                continue
            top = GROUPS / controller
            # in a container the tree may begin at the process's own group, whose name is the one outside
            folder = top / group.lstrip("/")
            for place in [folder, *(parent for parent in folder.parents if parent.is_relative_to(top))]:
                with suppress(OSError, ValueError):  # no such file at this level, or "max"
                    yield int((place / name).read_text(encoding="utf-8"))


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device has no room left; some of those are plain ``RuntimeError``."""
    from accelerate.utils.memory import should_reduce_batch_size

    if isinstance(error, torch.OutOfMemoryError | MemoryError) or should_reduce_batch_size(error):
        return True
    return "CUBLAS_STATUS_ALLOC_FAILED" in str(error)  # a matrix product that finds no room for its workspace
