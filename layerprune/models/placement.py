"""Where a model's weights go: in which dtype, on which device, and whether its layers stay elsewhere until they run."""

from __future__ import annotations

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
    if device == "auto" and not torch.cuda.is_available():
        device = "cpu"
    spread = device == "auto"
    free = _free(device)
    if spread:
        cards = [torch.cuda.mem_get_info(card)[0] for card in range(torch.cuda.device_count())]
        free = max(cards)
        device = f"cuda:{cards.index(free)}"
    if offload == "cpu" and device == "cpu":
        raise UsageError("offload 'cpu' keeps layers in CPU memory for a card, and the model runs on the CPU; use disk")
    if offload in ("cpu", "disk"):
        return device, offload  # type: ignore[return-value]
    if offload == "none" or free is None or weights <= WEIGHTS_SHARE * free:
        fits = free is None or weights <= WEIGHTS_SHARE * free
        return device if fits or not spread else "auto", None
    if spread and weights <= WEIGHTS_SHARE * sum(cards):
        return "auto", None
    return device, "cpu" if device != "cpu" and weights <= WEIGHTS_SHARE * psutil.virtual_memory().available else "disk"


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


def _free(device: str) -> int | None:
    """Return the free bytes of a device's memory; None where it does not say."""
    if device == "cpu":
        return int(psutil.virtual_memory().available)
    return int(torch.cuda.mem_get_info(device)[0]) if device.startswith("cuda") else None


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
