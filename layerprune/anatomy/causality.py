"""Whether a model is causal: change the last token of a text, and the logits of the tokens before it must not move.

Tried on a tiny random model with the same config, so that an encoder is refused before any weight is read.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from layerprune.anatomy.tiny import twin_config, with_noise
from layerprune.errors import RefusedError, one_line

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

TOKENS = 8
# Largest change of an earlier logit, as a share of the largest change at the last token. Over the causal-LM types of
# transformers 5.23 (tiny, random): at most 1.5e-4 where attention is causal, at least 1.4e-2 where it is not.
MOVED = 2e-3
# In half precision rounding alone moves logits: experts whose share of the tokens changes multiply in other groups.
MOVED_HALF = 5e-2
# Config fields that make attention bidirectional, with the value that does.
FLAGS = {"is_decoder": False, "is_causal": False, "use_bidirectional_attention": True, "bidirectional": True,
         "attn_type": "bi", "causal": False}  # fmt: skip


def sees_ahead(model: nn.Module) -> bool:
    """Return whether the logits of a token depend on tokens behind it; the model is run on two short texts.

    One at a time: rows of one batch may be multiplied in blocks of another size, which rounds otherwise.
    """
    import torch

    table = model.get_input_embeddings()  # type: ignore[operator]
    draw = torch.Generator().manual_seed(0)
    row = torch.randint(3, int(table.weight.shape[0]) - 1, (TOKENS,), generator=draw)
    other = row.clone()
    other[-1] += 1
    with torch.no_grad():
        before, after = (model(text[None].to(table.weight.device), use_cache=False).logits[0] for text in (row, other))
    moved = (before.double() - after.double()).abs().amax(-1)  # (tokens,), over the vocabulary
    share = MOVED_HALF if before.dtype in (torch.float16, torch.bfloat16) else MOVED
    return bool(moved[:-1].max() > share * moved[-1])


def refuse_when_seen_ahead(model: nn.Module, config: PretrainedConfig) -> None:
    """Raise ``RefusedError`` for a model, loaded or tiny, that ``sees_ahead``."""
    if sees_ahead(model):
        raise RefusedError(_not_causal(config))


def check_causal(config: PretrainedConfig, path: tuple[str, ...] = (), *, trust_remote_code: bool = False) -> str:
    """Raise ``RefusedError`` for the config of a model that is not causal.

    ``path`` leads to the decoder's config inside a composite one. Returns why it could not be tried, empty when it
    was: some configs suit no tiny model, and are tried when the model is loaded.
    """
    seen, untried = _tried(_Config(config), path, trust_remote_code)
    if seen:
        raise RefusedError(_not_causal(config))
    return untried


class _Config:
    """A config as a key: two of the same class and content are one."""

    def __init__(self, config: PretrainedConfig) -> None:
        self.config = config
        self.key = (type(config), config.to_json_string(use_diff=False))

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Config) and self.key == other.key


@lru_cache(maxsize=32)
def _tried(wrapped: _Config, path: tuple[str, ...], trust_remote_code: bool) -> tuple[bool, str]:
    """Return whether a tiny model sees ahead, and why it could not be tried; the same config is tried once a process.

    The state of torch's random numbers is put back.
    """
    import torch

    try:
        with torch.random.fork_rng(devices=[]):
            return sees_ahead(tiny_twin(twin_config(wrapped.config, path), trust_remote_code)), ""
    except Exception as error:  # noqa: BLE001  strict config classes and modelling code raise what they like
        return False, one_line(error)


def tiny_twin(config: PretrainedConfig, trust_remote_code: bool) -> nn.Module:
    """Return a random float32 model of a config from ``twin_config``, with noise on every parameter."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return with_noise(
        AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    )


def _not_causal(config: PretrainedConfig) -> str:
    said = f"this {config.model_type} model is not causal: changing the last token moves the logits of earlier ones"
    decoder: Any = config.get_text_config(decoder=True)
    flags = [name for name, value in FLAGS.items() if getattr(decoder, name, None) == value]
    named = f" ({flags[0]} is {getattr(decoder, flags[0])!r})" if flags else ""
    if flags[:1] == ["is_decoder"]:
        advice = 'only a model trained as a decoder can be pruned, with "is_decoder": true in its config.json'
    else:
        advice = "layers are removed from causal language models only"
    return f"{said}{named}, so it would see the answers that it is asked for; {advice}"
