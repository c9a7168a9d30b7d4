"""What the fields of a config mean per layer, and their values after layers are gone.

Data, not code: a new model type usually needs a line in ``FIELDS`` or nothing. A list with one entry per layer that is
not named here is refused, never guessed at.
"""

from __future__ import annotations

from typing import Any, Literal

from layerprune.anatomy.sources import Sources
from layerprune.errors import RefusedError

Kind = Literal["list", "indices", "first", "last", "end", "keyed"]

# list: one entry per layer.  indices: the layers something applies to.  first: applies to the first n layers.
# last: to the last n.  end: index of the last layer something applies to.  keyed: a map from layer index to settings.
FIELDS: dict[str, Kind] = {
    "layer_types": "list",
    "attention_layers": "list",
    "attn_layers": "list",
    "layers_block_type": "list",
    "indexer_types": "list",
    "layer_rope_theta": "list",
    "hybrid_layer_pattern": "list",
    "no_rope_layers": "list",
    "num_attention_heads_per_layer": "list",
    "mlp_layer_types": "list",
    "activation_sparsity_pattern": "list",
    "intermediate_size": "list",
    "is_moe_layer": "list",
    "moe_layer_freq": "list",
    "attn_layer_indices": "indices",
    "cross_attention_layers": "indices",
    "full_attn_idxs": "indices",
    "hybrid_layer_ids": "indices",
    "ple_layer_ids": "indices",
    "mlp_only_layers": "indices",
    "moe_layers": "indices",
    "max_window_layers": "first",
    "first_k_dense_replace": "first",
    "num_dense_layers": "first",
    "moe_layer_start_index": "first",
    "moe_layer_end_index": "end",
    "num_kv_shared_layers": "last",
    "per_layer_config": "keyed",
}

# Lists that can be as long as a shallow stack is deep and have nothing to do with layers.
NOT_PER_LAYER = {
    "block_types",  # RecurrentGemma's repeats: special.edits
    "architectures", "axial_pos_embds_dim", "axial_pos_shape", "begin_suppress_tokens", "suppress_tokens",
    "eos_token_id", "encoder_hash_byte_group_size", "H_cycles", "L_bp_cycles", "languages", "mlp_multipliers",
    "mtp_layers_block_type", "ssm_multipliers", "time_step_limit", "attention_types", "bad_words_ids",
    "forced_decoder_ids",
}  # fmt: skip

# What config files said before transformers had the fields above; the config class translates them when it reads the
# file, and the translation is what is written.
SUPERSEDED = {"attn_layer_indices", "attention_types"}

# Weights outside the stack that hold one slice per layer along an axis (Gemma 3n, Gemma 4): last names, axis.
PACKED = {"embed_tokens_per_layer.weight": 1, "per_layer_model_projection.weight": 0}

# Names of the field that says how deep the decoder is, first match wins; the decoder's before the ambiguous ones.
DEPTH_KEYS = ("decoder_layers", "num_decoder_layers", "num_hidden_layers", "n_layer", "n_layers", "num_layers")
# Fields that repeat the depth under another name.
ALSO_DEPTH = ("num_blocks",)
# Multi-token-prediction heads read hidden states of the intact stack, at layer numbers that are written in code.
MTP_KEYS = ("num_nextn_predict_layers", "mtp_num_hidden_layers")


def edits(fields: dict[str, Any], sources: Sources) -> dict[str, Any]:
    """Return the fields of a decoder config that change, with their new values; the depth itself is not among them.

    Raises ``RefusedError`` for a list of one entry per layer whose meaning is not known, naming the key.
    """
    changed: dict[str, Any] = {}
    for key, value in fields.items():
        if key in FIELDS:
            new = _revalued(key, value, FIELDS[key], sources)
            if new != value:
                changed[key] = new
        elif _looks_per_layer(key, value, sources.depth):
            raise RefusedError(
                f"the config field {key!r} has {len(value)} entries, one per layer, and its meaning is not known; "
                "name it in layerprune.anatomy.fields.FIELDS"
            )
        elif key in MTP_KEYS and value:
            changed[key] = 0
    return changed


def _looks_per_layer(key: str, value: Any, depth: int) -> bool:
    return isinstance(value, list) and len(value) == depth and depth > 1 and key not in NOT_PER_LAYER


def _revalued(key: str, value: Any, kind: Kind, sources: Sources) -> Any:
    origin = sources.layers
    match kind:
        case "list":
            if not isinstance(value, list):  # intermediate_size is a list in Gemma 3n and a number elsewhere
                return value
            if len(value) != sources.depth:
                raise RefusedError(f"the config field {key!r} has {len(value)} entries for {sources.depth} layers")
            return [value[layer] for layer in origin]
        case "indices":
            return value if value is None else [new for new, layer in enumerate(origin) if layer in value]
        case "first":
            return value if value is None else _below(origin, value) + max(0, value - sources.depth)
        case "last":
            return value if not value else sum(layer >= sources.depth - value for layer in origin)
        case "end":
            return value if value is None or value < 0 else _below(origin, value + 1) - 1
        case "keyed":
            return _rekeyed(value, origin)


def _below(origin: tuple[int, ...], boundary: int) -> int:
    return sum(layer < boundary for layer in origin)


def _rekeyed(value: dict[Any, Any] | None, origin: tuple[int, ...]) -> dict[str, Any] | None:
    if not value:
        return value
    settings = {int(key): entry for key, entry in value.items()}
    kept = {new: settings[layer] for new, layer in enumerate(origin) if layer in settings}
    width = len(str(max(kept, default=0)))  # transformers pads the keys so that they sort
    return {str(new).zfill(width): entry for new, entry in kept.items()}
