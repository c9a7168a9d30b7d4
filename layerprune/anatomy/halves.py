"""Which parts of a decoder layer belong to its attention and which to its MLP, by the names of its children.

Drop the run from the MLP of layer i to the attention of layer i + 1, and what is left pairs up into ordinary layers.
That works where a layer is two residual blocks, one after the other, each with its own norms.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from layerprune.errors import RefusedError

if TYPE_CHECKING:
    from torch import nn

ATTENTION = {"self_attn", "self_attention", "attn", "attention", "linear_attn", "conv", "short_conv"}
MLP = {"mlp", "feed_forward", "ffn", "block_sparse_moe", "moe", "shared_mlp"}
BEFORE_ATTENTION = {"input_layernorm", "ln_1", "norm_1", "operator_norm", "pre_attention_layernorm"}
AFTER_ATTENTION = {"post_self_attn_layernorm", "post_attn_norm"}
BEFORE_MLP = {"ln_2", "norm_2", "ffn_norm", "pre_feedforward_layernorm", "pre_mlp_layernorm"}
AFTER_MLP = {"post_feedforward_layernorm", "post_mlp_layernorm", "post_ffn_norm"}
# Before the MLP in Llama, after the attention in Gemma 2, OLMo 2 and EXAONE 4: there the MLP has norms of its own.
EITHER = "post_attention_layernorm"
MLP_HAS_ITS_OWN = BEFORE_MLP | {"post_feedforward_layernorm"}

# Built from the parts above and yet not two blocks that add to one stream.
ENTANGLED = {
    "bloom": "its attention and MLP add the residual themselves",
    "minimax": "its residual stream is taken after the norms",
    "mpt": "its attention and MLP add the residual themselves",
    "olmo_hybrid": "its checkpoints name norms otherwise than its layers do",
    "openai-gpt": "its norms stand on the residual stream itself",
}
PARALLEL_FIELDS = ("use_parallel_residual", "parallel_attn")


@dataclass(frozen=True)
class Halves:
    """The children of one layer, sorted into halves; ``outputs`` are those whose output joins the residual stream."""

    half: Mapping[str, str]  # child -> "attention" or "mlp"
    outputs: Mapping[str, tuple[str, ...]]  # half -> children


def half_of_child(name: str) -> str | None:
    """Return the half that a child belongs to in every layer, None where its name alone does not tell."""
    if name in ATTENTION | BEFORE_ATTENTION | AFTER_ATTENTION:
        return "attention"
    return "mlp" if name in MLP | BEFORE_MLP | AFTER_MLP else None


def weighted(layer: nn.Module) -> list[str]:
    """Return the names of a layer's children that have weights, and of its own weights."""
    modules = [name for name, child in layer.named_children() if next(child.parameters(), None) is not None]
    return [*modules, *(name for name, _ in layer.named_parameters(recurse=False))]


def split(children: Iterable[str]) -> Halves:
    """Sort the names of a layer's children with weights; raises ``RefusedError`` naming the one that does not fit."""
    names = set(children)
    half: dict[str, str] = {}
    for name in sorted(names):
        which = half_of_child(name)
        if which is not None:
            half[name] = which
        elif name == EITHER:
            half[name] = "attention" if names & MLP_HAS_ITS_OWN else "mlp"
        else:
            raise RefusedError(f"{name!r} of a layer belongs neither to its attention nor to its MLP")
    after = {"attention": AFTER_ATTENTION | ({EITHER} if half.get(EITHER) == "attention" else set()), "mlp": AFTER_MLP}
    cores = {"attention": ATTENTION, "mlp": MLP}
    outputs: dict[str, tuple[str, ...]] = {}
    for which in ("attention", "mlp"):
        mine = {name for name in names if half[name] == which}
        core, norms = mine & cores[which], mine - cores[which]
        if not core:
            raise RefusedError(f"a layer of {sorted(names)} has no {which} of its own")
        if not norms:
            raise RefusedError(f"the {which} of a layer has no norm of its own: attention and MLP run in parallel")
        outputs[which] = tuple(sorted(core | (mine & after[which])))
    return Halves(half, outputs)


def refusal(model_type: str, layers: Iterable[Iterable[str]], fields: Mapping[str, object]) -> str:
    """Return why half-layers cannot be removed, from each layer's children and the config; empty when they can."""
    if model_type in ENTANGLED:
        return ENTANGLED[model_type]
    for key in PARALLEL_FIELDS:
        if fields.get(key):
            return f"{key}: attention and MLP run in parallel"
    if fields.get("per_layer_config"):
        return "per_layer_config speaks of whole layers"
    try:
        for children in layers:
            split(children)
    except RefusedError as error:
        return str(error)
    return ""
