"""What the fields of a config mean per layer, and their values after layers are gone."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from layerprune.errors import RefusedError
from layerprune.removal import LayerMap

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

# Names of the field that says how deep the decoder is, first match wins; the decoder's before the ambiguous ones.
DEPTH_KEYS = ("decoder_layers", "num_decoder_layers", "num_hidden_layers", "n_layer", "n_layers", "num_layers")
# Fields that repeat the depth under another name.
ALSO_DEPTH = ("num_blocks",)
# Multi-token-prediction heads read hidden states of the intact stack, at layer numbers that are written in code.
MTP_KEYS = ("num_nextn_predict_layers", "mtp_num_hidden_layers")


def edits(fields: dict[str, Any], sources: LayerMap) -> dict[str, Any]:
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
                "name it in layerprune.architecture.config_fields.FIELDS"
            )
        elif key in MTP_KEYS and value:
            changed[key] = 0
    return changed


def _looks_per_layer(key: str, value: Any, depth: int) -> bool:
    return isinstance(value, list) and len(value) == depth and depth > 1 and key not in NOT_PER_LAYER


def _revalued(key: str, value: Any, kind: Kind, sources: LayerMap) -> Any:
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


# The few model types whose layers are bound to their place by more than a config field: data and small rules.


# No removal from these can be written down in their config.
REFUSED = {
    "blt": "it has three transformers (local encoder, global, local decoder) that count on each other",
    "hrm_text": "its two stacks share one depth and run in cycles",
    "inkling2_text": "its layers attend to the states of earlier blocks of layers (n_layers_per_attn_res_block)",
    "reformer": "its layers are reversible: each needs the two streams of the one before",
    "xlm": "its layers are spread over parallel lists (attentions, layer_norm1, ffns, layer_norm2)",
}

KEEP_FIRST = {
    "modernbert-decoder": "layer 0 alone has no attention norm",
    "rwkv": "layer 0 alone has pre_ln, the norm of the embeddings",
    "zaya": "layer 0 alone has a router without router_states_scale",
}
KEEP_LAST = {
    "gemma4": "the config makes the last layer full attention",
    "gemma4_text": "the config makes the last layer full attention",
    "gemma4_unified": "the config makes the last layer full attention",
    "gemma4_unified_text": "the config makes the last layer full attention",
    "gpt_neox_japanese": "the last layer alone has attention.dense_bias",
}
# A constant of each layer is computed from its index, so a layer cannot move; the last ones can still go.
TAIL_ONLY = {
    "beam": "depth_scaled_residual_add scales by the layer's index",
    "big_bird": "the random blocks of its sparse attention are seeded by the layer's index",
    "diffllama": "lambda_init is computed from the layer's index",
}
# Mixing layers over time without attention; generation asks a cache of attention layers for the length.
RECURRENT = {"linear_attention", "mamba", "recurrent", "conv"}


@dataclass
class TypeLimits:
    """Constraints of one model, to become fields of ``Architecture``."""

    must_keep: set[int] = field(default_factory=set)
    together: list[frozenset[int]] = field(default_factory=list)
    keep_one: list[frozenset[int]] = field(default_factory=list)
    tail_only: bool = False
    remarks: list[str] = field(default_factory=list)


def limits(model_type: str, fields: dict[str, Any], depth: int) -> TypeLimits:
    """Return the constraints of a model from its decoder's config fields.

    Raises ``RefusedError`` with the reason when no layer of this type can be removed.
    """
    if model_type in REFUSED:
        raise RefusedError(f"layers of a {model_type} model cannot be removed: {REFUSED[model_type]}")
    found = TypeLimits()
    for table, layer in ((KEEP_FIRST, 0), (KEEP_LAST, depth - 1)):
        if model_type in table:
            found.must_keep.add(layer)
            found.remarks.append(table[model_type])
    _tail(found, model_type, fields)
    _periods(found, fields, depth)
    _hybrids(found, fields, depth)
    _shared(found, model_type, fields, depth)
    return found


def _tail(found: TypeLimits, model_type: str, fields: dict[str, Any]) -> None:
    if model_type in TAIL_ONLY:
        found.tail_only = True
        found.remarks.append(f"{TAIL_ONLY[model_type]}, so only the last layers can go")
    if fields.get("scale_attn_by_inverse_layer_idx"):
        found.tail_only = True
        found.remarks.append("scale_attn_by_inverse_layer_idx divides by the index: only the last layers can go")


def _periods(found: TypeLimits, fields: dict[str, Any], depth: int) -> None:
    """Jamba's kinds of layers follow from the index modulo two periods: whole periods go, counted from the start."""
    if "expert_layer_period" not in fields or "attn_layer_period" not in fields:
        return
    period = math.lcm(fields["attn_layer_period"], fields["expert_layer_period"])
    if period > 1:
        found.together += [frozenset(range(start, min(start + period, depth))) for start in range(0, depth, period)]
        found.remarks.append(f"attn_layer_period and expert_layer_period: {period} layers go together")


def _hybrids(found: TypeLimits, fields: dict[str, Any], depth: int) -> None:
    kinds = _kinds(fields, depth)
    if kinds is None:
        return
    attention = frozenset(layer for layer, kind in enumerate(kinds) if kind not in RECURRENT | {"moe", "mlp"})
    if attention and len(attention) < depth and RECURRENT & set(kinds):
        found.keep_one.append(attention)
        found.remarks.append("a hybrid keeps at least one attention layer")


def _kinds(fields: dict[str, Any], depth: int) -> list[str] | None:
    for key in ("layer_types", "layers_block_type"):
        kinds = fields.get(key)
        if isinstance(kinds, list) and len(kinds) == depth:
            return kinds
    return _expanded(fields, depth) if "block_types" in fields else None


def _expanded(fields: dict[str, Any], depth: int) -> list[str]:
    """RecurrentGemma repeats ``block_types`` up to the depth."""
    pattern = fields["block_types"]
    return [pattern[layer % len(pattern)] for layer in range(depth)]


def _shared(found: TypeLimits, model_type: str, fields: dict[str, Any], depth: int) -> None:
    """Layers that hold what other layers use."""
    if model_type in ("zamba", "zamba2"):
        hybrid = {layer for layer, kind in enumerate(fields["layers_block_type"]) if kind == "hybrid"}
        found.must_keep |= hybrid
        found.remarks.append("the hybrid layers share one transformer block between them and stay")
    count = fields.get("num_kv_shared_layers") or 0
    if count:
        for kind in sorted(set(fields["layer_types"])):
            own = [layer for layer in range(depth - count) if fields["layer_types"][layer] == kind]
            found.must_keep.add(own[-1])
        found.remarks.append(f"num_kv_shared_layers={count}: the layers whose keys and values the last ones reuse stay")


def repeating(fields: dict[str, Any], depth: int) -> dict[str, list[bool]]:
    """Return which layers have experts where a step says so and no list does, by name of the step."""
    found = {}
    if (step := fields.get("decoder_sparse_step") or 1) > 1:
        dense = fields.get("mlp_only_layers") or []
        found["decoder_sparse_step"] = [layer not in dense and (layer + 1) % step == 0 for layer in range(depth)]
    if (step := fields.get("moe_layer_interval") or 1) > 1:
        start, end = _experts_between(fields, depth)
        found["moe_layer_interval"] = [(n + 1) % step == 0 and start <= n <= end for n in range(depth)]
    return found


def _experts_between(fields: dict[str, Any], depth: int) -> tuple[int, int]:
    start, end = fields["moe_layer_start_index"], fields["moe_layer_end_index"]
    return start, depth - 1 if end < 0 else end


def type_edits(model_type: str, fields: dict[str, Any], sources: LayerMap) -> dict[str, Any]:
    """Return further config changes that a type needs; raises ``RefusedError`` where there are none that would do."""
    changed: dict[str, Any] = {}
    if model_type == "minicpm3":  # residuals are scaled by scale_depth / sqrt(depth)
        changed["scale_depth"] = fields["scale_depth"] * math.sqrt(len(sources) / sources.depth)
    if model_type == "recurrent_gemma":
        kinds = _expanded(fields, sources.depth)
        changed["block_types"] = [kinds[layer] for layer in sources.layers]
    if model_type == "gpt_neo":
        kinds = [fields["attention_layers"][layer] for layer in sources.layers]
        changed["attention_types"] = [[[kind], 1] for kind in kinds]
    changed.update(_kimi_lists(fields, sources))
    changed.update(_sparse_step(fields, sources))
    changed.update(_moe_interval(fields, sources))
    _check_indexers(fields, sources)
    return changed


def _kimi_lists(fields: dict[str, Any], sources: LayerMap) -> dict[str, Any]:
    """Kimi Linear's linear_attn_config lists its layers by kind, counted from one."""
    given = fields.get("linear_attn_config")
    if not isinstance(given, dict):
        return {}
    lists = {key: set(given[key]) for key in ("kda_layers", "full_attn_layers") if isinstance(given.get(key), list)}
    new = {key: [n + 1 for n, layer in enumerate(sources.layers) if layer + 1 in on] for key, on in lists.items()}
    return {"linear_attn_config": {**given, **new}} if new else {}


def _sparse_step(fields: dict[str, Any], sources: LayerMap) -> dict[str, Any]:
    """Every decoder_sparse_step-th layer has experts: write the dense ones down instead."""
    step = fields.get("decoder_sparse_step")
    if not step or step == 1:
        return {}
    listed = fields.get("mlp_only_layers") or []
    dense = [new for new, layer in enumerate(sources.layers) if layer in listed or (layer + 1) % step]
    return {"decoder_sparse_step": 1, "mlp_only_layers": dense}


def _moe_interval(fields: dict[str, Any], sources: LayerMap) -> dict[str, Any]:
    """ERNIE 4.5: every moe_layer_interval-th layer between two bounds has experts; what is left must be one run."""
    step = fields.get("moe_layer_interval")
    if not step or step == 1:
        return {}
    start, end = _experts_between(fields, sources.depth)
    sparse = [new for new, layer in enumerate(sources.layers) if (layer + 1) % step == 0 and start <= layer <= end]
    for every in range(1, len(sources) + 1):
        for first in sparse[:1]:
            if sparse == [n for n in range(first, sparse[-1] + 1) if (n + 1) % every == 0]:
                return {"moe_layer_interval": every, "moe_layer_start_index": first, "moe_layer_end_index": sparse[-1]}
    raise RefusedError(f"moe_layer_interval={step} cannot say which of the remaining layers have experts ({sparse})")


def _check_indexers(fields: dict[str, Any], sources: LayerMap) -> None:
    kinds = fields.get("indexer_types")
    if kinds and kinds[sources.layers[0]] == "shared":
        first = sources.layers[0]
        raise RefusedError(f"indexer_types: layer {first} reuses tokens that an earlier layer selects, but is first")
