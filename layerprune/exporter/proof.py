"""The logits proof: the base with the removed layers bypassed against the checkpoint that was written, reloaded."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerprune.anatomy import Anatomy
from layerprune.documents import LogitsProof
from layerprune.errors import ExportError, ModelError, one_line
from layerprune.removal import Removal

if TYPE_CHECKING:
    import torch
    from torch import nn

WINDOWS, WINDOW_TOKENS = 4, 32
# Same kernels on the same numbers: the difference is 0, but where a config scale had to be rounded (minicpm3).
TOLERANCE = {"torch.float32": 1e-4, "torch.float64": 1e-6, "torch.bfloat16": 2e-2, "torch.float16": 5e-3}
TEXT = (
    "The tower is 324 metres tall, about the same height as an 81-storey building, and the tallest structure in the "
    "city. Its base is square, measuring 125 metres on each side. During its construction it became the tallest "
    "man-made structure in the world, a title it held for 41 years until another one was finished in 1930. It was the "
    "first structure to reach a height of 300 metres. Because of an aerial added at the top in 1957, it is now taller "
    "by 5.2 metres. Not counting transmitters, it is the second tallest free-standing structure in the country."
)


@dataclass(frozen=True)
class Loaded:
    """What transformers said about a checkpoint it loaded."""

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()


class CannotLoadError(ModelError):
    """transformers cannot load the checkpoint on this machine: a quantisation kernel is missing, memory ends."""


def load(folder: Path, *, trust_remote_code: bool, device: str | None = None) -> tuple[nn.Module, Loaded]:
    """Load a checkpoint in its own dtype; raises ``CannotLoadError`` when transformers cannot."""
    from transformers import AutoModelForCausalLM

    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", output_loading_info=True, use_safetensors=True, trust_remote_code=trust_remote_code,
            **({} if device is None else {"device_map": device}),
        )  # fmt: skip
    except Exception as error:  # the loaders of 190 types raise what they like
        raise CannotLoadError(f"transformers cannot load {folder}: {one_line(error)}") from error
    keys = (tuple(sorted(map(str, info[key]))) for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval(), Loaded(*keys)


def prove(
    base: Path, result: Path, anatomy: Anatomy, removal: Removal, *, trust_remote_code: bool = False
) -> tuple[LogitsProof, Loaded]:
    """Compare base-with-bypass and result on a few windows of tokens; both are loaded whole, one after the other.

    The base may lack weights that the removal takes away. Raises ``ModelError`` when it lacks others, ``ExportError``
    when a logit differs by more than rounding, or a key of the result is missing, unexpected or of another shape.
    """
    model, base_info = load(base, trust_remote_code=trust_remote_code)
    lacking = [key for key in base_info.missing if not _removed(key, anatomy, removal)]
    if lacking or base_info.mismatched:
        fault = (*lacking, *base_info.mismatched)[0]
        raise ModelError(f"the base {base} is itself incomplete: transformers does not find {fault}")
    tokens = windows(base, _vocabulary(model))
    with bypasser(anatomy, removal)(model):
        expected = logits(model, tokens)
    del model
    gc.collect()
    model, info = load(result, trust_remote_code=trust_remote_code)
    check_keys(info, base_info)
    return compare(expected, logits(model, tokens), "whole models", tokens), info


def _removed(key: str, anatomy: Anatomy, removal: Removal) -> bool:
    """Return whether a weight, named as in memory, belongs to a layer that is removed."""
    inside = key.startswith(f"{anatomy.stack}.")
    return inside and int(key[len(anatomy.stack) + 1 :].partition(".")[0]) in removal


def check_keys(info: Loaded, base: Loaded) -> None:
    """Raise ``ExportError`` for keys that the result misses, or has and the model does not know."""
    stray = tuple(key for key in info.unexpected if key not in base.unexpected)
    for what, keys in (("missing", info.missing), ("unexpected", stray), ("mismatched", info.mismatched)):
        if keys:
            raise ExportError(f"the written checkpoint does not load: {len(keys)} {what} keys, {keys[0]} for one")


def compare(expected: torch.Tensor, actual: torch.Tensor, method: str, tokens: torch.Tensor) -> LogitsProof:
    """Return the proof; raises ``ExportError`` with both figures when the logits differ by more than rounding."""
    import torch

    dtype = str(expected.dtype)
    scale = expected.double().abs().max().item()
    difference = (expected.double() - actual.double()).abs().max().item()
    if not torch.isfinite(expected).all():
        raise ExportError("the base without the removed layers gives logits that are not finite; nothing to prove")
    if not difference <= TOLERANCE[dtype] * max(scale, 1.0):
        raise ExportError(
            f"the written checkpoint is not the base without those layers: a logit differs by {difference:.3g} "
            f"(largest logit {scale:.3g}); please report the model type"
        )
    return LogitsProof(
        method=method, windows=tokens.shape[0], tokens=tokens.numel(), dtype=dtype.removeprefix("torch."),
        max_difference=difference, scale=scale,
    )  # fmt: skip


def logits(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Return the logits of token windows, (windows, tokens, vocabulary), without a cache."""
    import torch

    with torch.no_grad():
        return model(tokens.to(model.device), use_cache=False).logits.cpu()


def windows(folder: Path, vocabulary: int) -> torch.Tensor:
    """Return token windows, (WINDOWS, WINDOW_TOKENS): English text where there is a tokenizer.json, else drawn."""
    import torch

    needed = WINDOWS * WINDOW_TOKENS
    ids = _text_ids(folder, vocabulary)
    if len(ids) < needed:
        draws = torch.randint(vocabulary, (needed - len(ids),), generator=torch.Generator().manual_seed(0))
        ids = [*ids, *draws.tolist()]
    return torch.tensor(ids[:needed]).view(WINDOWS, WINDOW_TOKENS)


def _text_ids(folder: Path, vocabulary: int) -> list[int]:
    file = folder / "tokenizer.json"
    if not file.exists():
        return []
    from tokenizers import Tokenizer

    return [token for token in Tokenizer.from_file(str(file)).encode(TEXT).ids if token < vocabulary]


def _vocabulary(model: nn.Module) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


def bypasser(anatomy: Anatomy, removal: Removal) -> Callable[[nn.Module], Any]:
    """Return a function from a loaded base model to the context in which the removed layers are bypassed."""
    from layerprune.bypass import bypassed

    return lambda model: bypassed(model, list(model.get_submodule(anatomy.stack).children()), removal)
