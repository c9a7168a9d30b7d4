"""Tiny random models of every causal-LM type, to try an architecture without its weights.

What a type needs beyond the common sizes stands in ``HINTS``, as data; a type that needs nothing is not named.
"""

from __future__ import annotations

from functools import reduce
from operator import getitem
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from torch import nn
    from transformers import PretrainedConfig


DEPTH = 6
VOCABULARY = 96
NOISE = 0.05  # standard deviation added to every parameter

# Applied wherever a config, or a config inside it, has the field.
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": DEPTH,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
    "d_model": 32, "n_embd": 32, "n_layer": DEPTH, "n_head": 4, "n_heads": 4, "n_layers": DEPTH, "num_heads": 4,
    "num_layers": DEPTH, "decoder_layers": DEPTH, "decoder_ffn_dim": 48, "decoder_attention_heads": 4,
    "encoder_layers": 2, "encoder_ffn_dim": 48, "encoder_attention_heads": 4, "ffn_dim": 48, "d_inner": 48,
    "num_decoder_layers": DEPTH, "num_encoder_layers": 2, "num_decoder_attention_heads": 4,
    "num_encoder_attention_heads": 4, "n_positions": 128, "n_ctx": 128, "n_inner": 48,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "num_experts_per_token": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "n_group": 1,
    "topk_group": 1, "num_expert_group": 1, "n_shared_experts": 1,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "index_topk": 8, "index_head_dim": 8, "index_n_heads": 2,
    "linear_head_dim": 8, "linear_num_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8, "mamba_dt_rank": 4,
    "mamba_d_ssm": 64, "state_size": 8, "time_step_rank": 4, "sliding_window": 8, "attention_window_size": 8,
    "lru_width": 32, "rotary_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "is_decoder": True,
    "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8,
}  # fmt: skip

# Of these, what is compared with the length of a text: how far a layer looks back, how many tokens it selects.
LENGTHS = frozenset({
    "max_position_embeddings", "n_positions", "n_ctx", "sliding_window", "attention_window_size", "index_topk",
    "indexer_budget", "local_attn_chunk_length", "lsh_attn_chunk_length",
})  # fmt: skip

_SQUARE_MLA = {"num_key_value_heads": 4}  # latent attention has as many key heads as query heads
_THIRD = {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2}

_DOTS3 = {
    "num_key_value_heads": 4,
    "head_dim": 16,  # of the sliding layers: qk_nope_head_dim + qk_rope_head_dim
    "per_layer_config": {str(layer): {"num_attention_heads": 2, "num_key_value_heads": 2} for layer in (2, 3, 4)},
}
_GEMMA3N = {
    **_THIRD, "num_kv_shared_layers": 3, "intermediate_size": [48] * 6, "laurel_rank": 4,
    "activation_sparsity_pattern": [0.5] * 3 + [0.0] * 3,
}  # fmt: skip
_QWEN4 = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "layer_types": ["linear_attention", "linear_attention", "indexed_attention"] * 2, "hc_count": 2, "hc_lowrank": 8,
}  # fmt: skip

HINTS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("axk1", "axk2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "kimi_linear", "minicpm3",
         "youtu"), _SQUARE_MLA,
    ),
    "bailing_hybrid": {**_SQUARE_MLA, "layer_group_size": 3},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "bamba": {"attn_layer_indices": [2, 4]},
    "beam": {**_THIRD, "num_experts": 8},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "cpmant": {"dim_head": 8, "dim_ff": 48, "prompt_types": 4, "prompt_length": 8, "segment_types": 4},
    "ctrl": {"dff": 48},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 48},
    },
    "deepseek_v2": {**_SQUARE_MLA, "first_k_dense_replace": 2},
    "dots1": {"n_shared_experts": 1, "first_k_dense_replace": 2, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "dots3_note": {
        "text_config": _DOTS3,
        "vision_config": {"num_hidden_layers": 42, "adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "dots3_note_text": _DOTS3,
    "ernie4_5_moe": {"moe_k": 2, "moe_layer_end_index": 4},
    "falcon_h1": {"mamba_expand": 2},
    "gemma3n_text": _GEMMA3N,
    "gemma4_unified": {"vision_config": {"mm_embed_dim": 32, "mm_posemb_size": 16, "patch_size": 4}},
    "gpt_neo": {"attention_types": [[["global", "local"], 3]]},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 3},
    "jamba": {"num_hidden_layers": 12, "attn_layer_period": 4, "attn_layer_offset": 2},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention"] * 2},
    "longcat_flash": {
        "ffn_hidden_size": 48, "expert_ffn_hidden_size": 16, "zero_expert_num": 2, "moe_topk": 2, **_SQUARE_MLA,
    },
    "mamba2": {"num_heads": 8, "n_groups": 1, "chunk_size": 8},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "linear_attention", "full_attention"],
        "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8,
        "moe_shared_expert_intermediate_size": 32,
    },
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "reformer": {
        "axial_pos_embds_dim": [8, 24], "axial_pos_shape": [8, 16], "attention_head_size": 8, "feed_forward_size": 48,
        "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4, "attn_layers": ["local"] * 6,
    },
    "roc_bert": {
        "pronunciation_vocab_size": 16, "shape_vocab_size": 16, "pronunciation_embed_dim": 8, "shape_embed_dim": 8,
    },
    "xlm": {"emb_dim": 32},
    "xlnet": {"d_head": 8},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2, "attention_hidden_size": 64,
        "attention_head_dim": 16, "num_key_value_heads": 4,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2, "mamba_ngroups": 1,
        "attention_hidden_size": 64, "attention_head_dim": 16, "num_key_value_heads": 4, "chunk_size": 8,
        "mamba_headdim": 8,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 8},
}  # fmt: skip


def types() -> tuple[str, ...]:
    """Return every model type in transformers' causal-LM mapping."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str, **changes: Any) -> PretrainedConfig:
    """Return a config of this type with a few hundred thousand parameters at most; ``changes`` win over the hints."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    return kind(**_sizes(kind, {**HINTS.get(model_type, {}), **changes}))


def tiny_model(model_type: str, *, seed: int = 0, **changes: Any) -> nn.Module:
    """Return a randomly initialised causal LM of this type in float32, in evaluation mode."""
    return random_model(tiny_config(model_type, **changes), seed=seed)


def random_model(config: PretrainedConfig, *, seed: int = 0, trust_remote_code: bool = False) -> nn.Module:
    """Return a random float32 model of a config, with noise on every parameter."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    return with_noise(
        AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
    )


def with_noise(model: nn.Module) -> nn.Module:
    """Add noise to every parameter of a new model, in place, and return the model in evaluation mode.

    It makes layers differ where initialisation would not: norms, biases, gates.
    """
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=NOISE)
    return model.eval()


def save_tiny(model_type: str, folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    """Save a tiny model as the type is published, with the composite config where it has one; return ``folder``."""
    tiny_model(model_type, seed=seed, **changes).save_pretrained(folder)
    config = tiny_config(model_type, **changes)
    if config.get_text_config() is not config:
        config.save_pretrained(folder)
    return folder


def twin_config(
    config: PretrainedConfig, path: tuple[str, ...] = (), *, keep: Collection[str] = ()
) -> PretrainedConfig:
    """Return a config with the layers of ``config``, every kind and pattern of them, and the sizes of a tiny model.

    ``path`` leads to the decoder's config inside a composite one. Fields in ``keep`` stay as they are. Weights are not
    quantised. Raises whatever the config class raises when these sizes do not suit it.
    """
    from layerprune.architecture.config_fields import ALSO_DEPTH, DEPTH_KEYS, FIELDS

    content = config.to_dict()
    content.pop("quantization_config", None)
    decoder = reduce(getitem, path, content)
    hints = HINTS.get(config.model_type, {})  # its dicts and lists are of a model with DEPTH layers
    sizes = {**SIZES, **{key: value for key, value in hints.items() if not isinstance(value, dict | list)}}
    kept = {*DEPTH_KEYS, *ALSO_DEPTH, *FIELDS, "is_decoder", "attention_types"} - {"intermediate_size"}
    for key, value in sizes.items():
        if decoder.get(key) is not None and key not in kept and key not in keep:
            decoder[key] = [value] * len(decoder[key]) if isinstance(decoder[key], list) else value
    for key in ("rope_parameters", "rope_scaling"):
        if key in decoder:
            decoder[key] = _fewer_factors(decoder[key])
    for part in [content[key] for key in config.sub_configs if key not in path and isinstance(content.get(key), dict)]:
        part.update({key: 1 for key in (*DEPTH_KEYS, *ALSO_DEPTH) if isinstance(part.get(key), int)})  # towers, not run
    return type(config).from_dict(content)


def _fewer_factors(rope: Any) -> Any:
    """Return rotary settings with as many long-rope factors as a tiny head has frequencies."""
    if not isinstance(rope, dict):
        return rope
    count = int(SIZES["head_dim"] * rope.get("partial_rotary_factor", 1)) // 2
    cut = {key: rope[key][:count] for key in ("short_factor", "long_factor") if isinstance(rope.get(key), list)}
    return {key: _fewer_factors(value) for key, value in {**rope, **cut}.items()}


def _sizes(kind: type[PretrainedConfig], hints: dict[str, Any]) -> dict[str, Any]:
    """Return the common sizes that the config class ``kind`` and its parts have, the hints over them."""
    from transformers import CONFIG_MAPPING, AutoConfig

    own = {name for base in kind.__mro__ for name in getattr(base, "__annotations__", {})}
    wanted = {key: value for key, value in SIZES.items() if key in own}
    for key, part in kind.sub_configs.items():
        given = hints.get(key, {})
        if isinstance(given, dict) and part is not AutoConfig:
            wanted[key] = _sizes(part, given)
        elif isinstance(given, dict):  # a part that names its class only by a model type
            named = given.get("model_type") or kind.sub_configs_defaults[key].model_type
            wanted[key] = {"model_type": named, **_sizes(CONFIG_MAPPING[named], given)}
    return {**wanted, **{key: value for key, value in hints.items() if key not in kind.sub_configs}}
