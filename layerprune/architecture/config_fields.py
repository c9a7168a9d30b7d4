"""What the fields of a config mean per layer, and their values after layers are gone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from layerprune.errors import RefusedError
from layerprune.removal import LayerMap

Kind = Literal["list", "indices", "first", "last", "end", "keyed"]

# The fields that say something of single layers, by what they say.
KINDS: dict[Kind, tuple[str, ...]] = {
    "list": (  # one entry per layer
        "layer_types", "attention_layers", "attn_layers", "layers_block_type", "indexer_types", "layer_rope_theta",
        "hybrid_layer_pattern", "no_rope_layers", "num_attention_heads_per_layer", "mlp_layer_types",
        "activation_sparsity_pattern", "intermediate_size", "is_moe_layer", "moe_layer_freq",
    ),
    "indices": (  # the layers something applies to
        "attn_layer_indices", "cross_attention_layers", "full_attn_idxs", "hybrid_layer_ids", "ple_layer_ids",
        "mlp_only_layers", "moe_layers",
    ),
    # applies to the first n layers
    "first": ("max_window_layers", "first_k_dense_replace", "num_dense_layers", "moe_layer_start_index"),
    "end": ("moe_layer_end_index",),  # index of the last layer something applies to
    "last": ("num_kv_shared_layers",),  # applies to the last n layers
    "keyed": ("per_layer_config",),  # a map from layer index to settings
}  # fmt: skip
FIELDS = {name: kind for kind, names in KINDS.items() for name in names}

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


def depth_key(fields: Mapping[str, Any]) -> str | None:
    """Return the name of the field that says how deep the decoder is; None where these fields do not say."""
    return next((key for key in DEPTH_KEYS if key in fields), None)


def full_lists(fields: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the fields that are lists of one entry per layer."""
    return {key: fields[key] for key in KINDS["list"] if isinstance(fields.get(key), list)}


def per_layer(fields: Mapping[str, Any], key: str, depth: int) -> list[Any]:
    """Return what a field says of each layer: its entry, or whether it is among the indices; [] where it does not."""
    value = fields.get(key)
    if isinstance(value, list) and FIELDS[key] == "indices":
        return [layer in value for layer in range(depth)]
    return value if isinstance(value, list) and len(value) == depth else []


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
        elif isinstance(value, list) and len(value) == sources.depth > 1 and key not in NOT_PER_LAYER:
            raise RefusedError(
                f"the config field {key!r} has {len(value)} entries, one per layer, and its meaning is not known; "
                "name it in layerprune.architecture.config_fields.KINDS"
            )
        elif key in MTP_KEYS and value:
            changed[key] = 0
    return changed


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
            if not value:
                return value
            settings = {int(key): entry for key, entry in value.items()}
            left = {new: settings[layer] for new, layer in enumerate(origin) if layer in settings}
            width = len(str(max(left, default=0)))  # transformers pads the keys so that they sort
            return {str(new).zfill(width): entry for new, entry in left.items()}


def _below(origin: tuple[int, ...], boundary: int) -> int:
    return sum(layer < boundary for layer in origin)


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
    """Constraints of one model: the fields of ``Architecture`` of these names."""

    must_keep: frozenset[int] = frozenset()
    together: tuple[frozenset[int], ...] = ()
    keep_one: tuple[frozenset[int], ...] = ()
    tail_only: bool = False
    remarks: tuple[str, ...] = ()


def limits(model_type: str, fields: dict[str, Any], depth: int) -> TypeLimits:
    """Return the constraints of a model from its decoder's config fields.

    Raises ``RefusedError`` with the reason when no layer of this type can be removed.
    """
    if model_type in REFUSED:
        raise RefusedError(f"layers of a {model_type} model cannot be removed: {REFUSED[model_type]}")
    found = TypeLimits()
    for table, layer in ((KEEP_FIRST, 0), (KEEP_LAST, depth - 1)):
        if model_type in table:
            found.must_keep |= {layer}
            found.remarks += (table[model_type],)
    if model_type in TAIL_ONLY:
        found.tail_only = True
        found.remarks += (f"{TAIL_ONLY[model_type]}, so only the last layers can go",)
    if fields.get("scale_attn_by_inverse_layer_idx"):
        found.tail_only = True
        found.remarks += ("scale_attn_by_inverse_layer_idx divides by the index: only the last layers can go",)
    _periods(found, fields, depth)
    _hybrids(found, fields, depth)
    _shared(found, model_type, fields, depth)
    return found


def _periods(found: TypeLimits, fields: dict[str, Any], depth: int) -> None:
    """Jamba's kinds of layers follow from the index modulo two periods: whole periods go, counted from the start."""
    if "expert_layer_period" not in fields or "attn_layer_period" not in fields:
        return
    period = math.lcm(fields["attn_layer_period"], fields["expert_layer_period"])
    if period > 1:
        found.together += tuple(frozenset(range(n, min(n + period, depth))) for n in range(0, depth, period))
        found.remarks += (f"attn_layer_period and expert_layer_period: {period} layers go together",)


def _hybrids(found: TypeLimits, fields: dict[str, Any], depth: int) -> None:
    kinds = per_layer(fields, "layer_types", depth) or per_layer(fields, "layers_block_type", depth)
    if not kinds and "block_types" in fields:
        kinds = _expanded(fields, depth)
    attention = frozenset(layer for layer, kind in enumerate(kinds) if kind not in RECURRENT | {"moe", "mlp"})
    if attention and len(attention) < depth and RECURRENT & set(kinds):
        found.keep_one += (attention,)
        found.remarks += ("a hybrid keeps at least one attention layer",)


def _expanded(fields: dict[str, Any], depth: int) -> list[str]:
    """RecurrentGemma repeats ``block_types`` up to the depth."""
    pattern = fields["block_types"]
    return [pattern[layer % len(pattern)] for layer in range(depth)]


def _shared(found: TypeLimits, model_type: str, fields: dict[str, Any], depth: int) -> None:
    """Layers that hold what other layers use."""
    if model_type in ("zamba", "zamba2"):
        hybrid = {layer for layer, kind in enumerate(fields["layers_block_type"]) if kind == "hybrid"}
        found.must_keep |= hybrid
        found.remarks += ("the hybrid layers share one transformer block between them and stay",)
    count = fields.get("num_kv_shared_layers") or 0
    if count:
        for kind in sorted(set(fields["layer_types"])):
            own = [layer for layer in range(depth - count) if fields["layer_types"][layer] == kind]
            found.must_keep |= {own[-1]}
        reused = "the layers whose keys and values the last ones reuse stay"
        found.remarks += (f"num_kv_shared_layers={count}: {reused}",)


def repeating(fields: dict[str, Any], depth: int) -> dict[str, list[bool]]:
    """Return which layers have experts where a step says so and no list does, by name of the step."""
    found = {}
    if (step := fields.get("decoder_sparse_step") or 1) > 1:
        dense = fields.get("mlp_only_layers") or []
        found["decoder_sparse_step"] = [layer not in dense and (layer + 1) % step == 0 for layer in range(depth)]
    if (step := fields.get("moe_layer_interval") or 1) > 1:
        start, end = fields["moe_layer_start_index"], fields["moe_layer_end_index"]
        end = depth - 1 if end < 0 else end
        found["moe_layer_interval"] = [(n + 1) % step == 0 and start <= n <= end for n in range(depth)]
    return found


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
    experts = repeating(fields, sources.depth)
    if sparse := experts.get("decoder_sparse_step"):  # every so many layers have experts: write the dense ones down
        dense = [new for new, layer in enumerate(sources.layers) if not sparse[layer]]
        changed |= {"decoder_sparse_step": 1, "mlp_only_layers": dense}
    if sparse := experts.get("moe_layer_interval"):
        changed |= _moe_interval(fields, [new for new, layer in enumerate(sources.layers) if sparse[layer]])
    if (kinds := fields.get("indexer_types")) and kinds[first := sources.layers[0]] == "shared":
        raise RefusedError(f"indexer_types: layer {first} reuses tokens that an earlier layer selects, but is first")
    return changed | _kimi_lists(fields, sources)


def _kimi_lists(fields: dict[str, Any], sources: LayerMap) -> dict[str, Any]:
    """Kimi Linear's linear_attn_config lists its layers by kind, counted from one."""
    given = fields.get("linear_attn_config")
    if not isinstance(given, dict):
        return {}
    lists = {key: set(given[key]) for key in ("kda_layers", "full_attn_layers") if isinstance(given.get(key), list)}
    new = {key: [n + 1 for n, layer in enumerate(sources.layers) if layer + 1 in on] for key, on in lists.items()}
    return {"linear_attn_config": {**given, **new}} if new else {}


def _moe_interval(fields: dict[str, Any], sparse: list[int]) -> dict[str, Any]:
    """ERNIE 4.5: every moe_layer_interval-th layer between two bounds has experts; what is left must be one run."""
    for every in range(1, max(sparse, default=0) + 2):
        if sparse and sparse == [n for n in range(sparse[0], sparse[-1] + 1) if (n + 1) % every == 0]:
            return {"moe_layer_interval": every, "moe_layer_start_index": sparse[0], "moe_layer_end_index": sparse[-1]}
    step = fields["moe_layer_interval"]
    raise RefusedError(f"moe_layer_interval={step} cannot say which of the remaining layers have experts ({sparse})")
