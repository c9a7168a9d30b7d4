"""Anatomy: the stack without a table, config fields per layer, constraints, and who would misread the result."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from families import tiny_config
from layerprune.architecture import LayerMap, build_on_meta, find_stack, positions, read_architecture
from layerprune.architecture.config_fields import edits
from layerprune.architecture.tiny import tiny_model
from layerprune.errors import ModelError, RefusedError, UsageError
from layerprune.removal import Removal


def after(depth: int, *units: float) -> LayerMap:
    return LayerMap.after(Removal.of(*units), depth)


@pytest.mark.parametrize(
    ("model_type", "stack"),
    [
        ("llama", "model.layers"), ("gpt2", "transformer.h"), ("bert", "bert.encoder.layer"),
        ("gemma3", "model.language_model.layers"), ("bart", "model.decoder.layers"), ("git", "git.encoder.layer"),
        ("mamba", "backbone.layers"), ("cpmant", "cpmant.encoder.layers"), ("mixtral", "model.layers"),
        ("phi4_multimodal", "model.layers"), ("xlnet", "transformer.layer"),
    ],
)  # fmt: skip
def test_stack_is_found(model_type: str, stack: str) -> None:
    config = tiny_config(model_type)
    assert find_stack(build_on_meta(config), config) == stack


def test_models_without_a_stack() -> None:
    from torch import nn

    with pytest.raises(ModelError, match="it has no list of layers"):
        find_stack(nn.Linear(2, 2), tiny_config("llama"))
    with pytest.raises(ModelError, match="is the likeliest list, and unlikely"):
        find_stack(nn.ModuleDict({"vision": nn.ModuleList([nn.Linear(2, 2)])}), tiny_config("llama"))


@pytest.mark.parametrize(
    ("fields", "units", "expected"),
    [
        ({"layer_types": list("abcd")}, (1,), {"layer_types": list("acd")}),
        ({"mlp_only_layers": [0, 2, 3]}, (0, 2), {"mlp_only_layers": [1]}),
        ({"moe_layers": [0, 1, 2, 3]}, (1,), {"moe_layers": [0, 1, 2]}),  # indices, and as many as layers
        ({"first_k_dense_replace": 2}, (1,), {"first_k_dense_replace": 1}),
        ({"first_k_dense_replace": 2}, (3,), {}),
        ({"max_window_layers": 4}, (0,), {"max_window_layers": 3}),
        ({"max_window_layers": 28}, (0,), {"max_window_layers": 27}),
        ({"num_kv_shared_layers": 2}, (3,), {"num_kv_shared_layers": 1}),
        ({"num_kv_shared_layers": 2}, (0,), {}),
        ({"moe_layer_end_index": 2}, (1,), {"moe_layer_end_index": 1}),
        ({"moe_layer_end_index": -1}, (1,), {}),
        ({"num_nextn_predict_layers": 1}, (1,), {"num_nextn_predict_layers": 0}),
        ({"per_layer_config": {"1": {"a": 1}, "3": {"a": 3}}}, (1,), {"per_layer_config": {"2": {"a": 3}}}),
        ({"intermediate_size": [1, 2, 3, 4]}, (0,), {"intermediate_size": [2, 3, 4]}),
        ({"intermediate_size": 48, "no_rope_layers": None, "eos_token_id": [1, 2, 3, 4]}, (0,), {}),
        ({"layer_types": list("abcd"), "mlp_layer_types": list("efgh")}, (1,),
         {"layer_types": list("acd"), "mlp_layer_types": list("egh")}),
    ],
)  # fmt: skip
def test_fields(fields: dict[str, Any], units: tuple[int, ...], expected: dict[str, Any]) -> None:
    assert edits(fields, after(4, *units)) == expected


def test_unknown_list_is_refused_and_a_list_of_the_wrong_length_too() -> None:
    with pytest.raises(RefusedError, match="'moods' has 4 entries, one per layer, and its meaning is not known"):
        edits({"moods": [1, 2, 3, 4]}, after(4, 1))
    assert edits({"moods": [1, 2, 3]}, after(4, 1)) == {}
    with pytest.raises(RefusedError, match="'layer_types' has 3 entries for 4 layers"):
        edits({"layer_types": list("abc")}, after(4, 1))


def test_only_what_has_to_change_changes() -> None:
    config = tiny_config("gemma3")
    before = {"model_type": "gemma3", "mine": 1, "text_config": {"vocab_size": 96}, "vision_config": {"depth": 2}}
    new = read_architecture(config).prune_config(before, Removal.of(2))
    assert new["text_config"].pop("num_hidden_layers") == 5
    kinds = config.text_config.layer_types
    assert new["text_config"].pop("layer_types") == [*kinds[:2], *kinds[3:]]
    assert new["text_config"].pop("sliding_window_pattern") == 5  # mlx-lm would take 6
    assert new == before
    assert read_architecture(config).prune_config(before, Removal.of()) == before


def test_encoder_decoder_configs_lose_decoder_layers() -> None:
    new = read_architecture(tiny_config("bart")).prune_config({"encoder_layers": 2, "decoder_layers": 6}, Removal.of(1))
    assert new == {"encoder_layers": 2, "decoder_layers": 5}


@pytest.mark.parametrize(
    ("word", "expected"),
    [("ME*-M*", "E*-M*"), ("ME*-*M", None)],
    ids=["as the list has it", "another than the list"],
)
def test_a_word_of_all_layers_and_a_depth_that_the_class_only_counts_follow_the_list(word, expected) -> None:
    """Nemotron-H as published: mlx-lm, vLLM and its own code read hybrid_override_pattern and num_hidden_layers."""
    architecture = read_architecture(tiny_config("nemotron_h"))
    kinds = architecture.fields["layers_block_type"]
    limit = [0.0, {"__float__": "Infinity"}]  # as config.json has it
    before = {"hybrid_override_pattern": word, "num_hidden_layers": 6, "time_step_limit": limit}
    new = architecture.prune_config({**before, **({} if expected else {"layers_block_type": kinds})}, Removal.of(0))
    assert new.get("hybrid_override_pattern") == expected
    assert new["num_hidden_layers"] == 5
    assert new["layers_block_type"] == kinds[1:]
    assert new["time_step_limit"] == limit


def test_sparse_steps_become_a_list() -> None:
    config = tiny_config("qwen2_moe", decoder_sparse_step=2)
    new = read_architecture(config).prune_config({}, Removal.of(0))
    assert (new["decoder_sparse_step"], new["mlp_only_layers"]) == (1, [1, 3])


def test_moe_interval_is_refused_where_it_cannot_be_said() -> None:
    architecture = read_architecture(tiny_config("ernie4_5_moe", moe_layer_interval=2, moe_layer_end_index=5))
    architecture.check(Removal.of(4, 5))
    with pytest.raises(RefusedError, match="moe_layer_interval=2 cannot say"):
        architecture.check(Removal.of(2))


def test_layers_that_do_not_exist() -> None:
    with pytest.raises(UsageError, match="layer 6 does not exist: the model has layers 0 to 5"):
        read_architecture(tiny_config("llama")).check(Removal.of(6))


STEP = {"interleave_moe_layer_step": 2, "num_hidden_layers": 8}


@pytest.mark.parametrize(
    ("model_type", "changes", "units", "says"),
    [
        ("gemma2", {}, (1,), "llama.cpp takes layer_types of gemma2 to repeat every 2 layers"),
        ("gemma2", {}, (2, 3), ""),
        ("gemma2", {}, (5,), ""),
        ("gemma2", {"num_hidden_layers": 46}, (44, 45), "gives gemma2 models of 46 layers, and no others, their own"),
        ("gemma3_text", {"num_hidden_layers": 62}, (61,), "gives gemma3_text models of 62 layers"),
        ("exaone4", {"num_hidden_layers": 64}, (63,), "gives exaone4 models of 64 layers"),
        ("exaone4", {"num_hidden_layers": 65}, (64,), "gives exaone4 models of 64 layers"),
        ("exaone4", {"num_hidden_layers": 30}, (3,), ""),
        ("smollm3", {}, (1,), "llama.cpp takes no_rope_layers of smollm3 to repeat every 4 layers"),
        ("gpt_oss", {}, (0,), "vLLM takes layer_types of gpt_oss"),
        ("llama4_text", STEP, (0,), "vLLM takes moe_layers of llama4_text to repeat every 2 layers"),
        ("llama4_text", STEP, (0, 1, 2, 3), ""),
        ("llama4_text", {"num_hidden_layers": 8}, (7,), ""),
        ("llama4_text", {**STEP, "moe_layers": [1, 2, 3]}, (6, 7), "it misreads the base, too"),
        ("qwen3_next", {"num_hidden_layers": 8}, (1,), "mlx-lm takes layer_types of qwen3_next to repeat every 4"),
        ("qwen3_next", {"num_hidden_layers": 8}, (1, 5), ""),  # every 3 layers then, and the field says so
        ("qwen3_next", {"num_hidden_layers": 8}, (4, 5, 6, 7), ""),
        ("qwen3_5", {"text_config": {"num_hidden_layers": 8}}, (0,), "mlx-lm takes layer_types of qwen3_5"),
        ("gemma3_text", {"num_hidden_layers": 12}, (3,), "mlx-lm takes layer_types of gemma3_text to repeat every 6"),
        ("cohere2", {"num_hidden_layers": 8}, (1,), "mlx-lm takes layer_types of cohere2 to repeat every 4 layers"),
        ("bailing_hybrid", {}, (0,), "mlx-lm takes layer_types of bailing_hybrid to repeat every 3 layers"),
        ("bailing_hybrid", {}, (0, 3), ""),
        ("llama4", {}, (0,), "mlx-lm takes no_rope_layers of llama4 to repeat every 4 layers"),
        ("llama", {}, (1,), ""),
    ],
)
def test_misreaders(model_type: str, changes: dict[str, Any], units: tuple[int, ...], says: str) -> None:
    warnings = read_architecture(tiny_config(model_type, **changes)).misread(Removal.of(*units))
    assert bool(warnings) == bool(says)
    assert any(says in warning for warning in warnings) or not says


@pytest.mark.parametrize("units", [(0,), (5,), (1, 2)])
def test_vllm_finds_as_many_windowed_layers_as_layers_where_the_base_has_so(units: tuple[int, ...]) -> None:
    config = tiny_config("qwen2", use_sliding_window=True, max_window_layers=6, sliding_window=4)
    new = read_architecture(config).prune_config(config.to_dict(), Removal.of(*units))
    assert new["max_window_layers"] == new["num_hidden_layers"] == 6 - len(units)


def test_importing_the_room_needs_no_torch() -> None:
    heavy = "{'torch', 'transformers'}"
    code = f"import sys, layerprune.architecture, layerprune.checkpoint; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "gpt_neo", "roberta", "xlm-roberta", "gptj"])
def test_a_model_reads_as_many_tokens_as_it_has_positions_and_no_more(model_type: str) -> None:
    """Roberta's kind count behind the padding."""
    model = tiny_model(model_type).eval()
    most = positions(model)
    assert most in (127, 128)
    with torch.no_grad():
        assert model(input_ids=torch.full((1, most), 5)).logits.shape[1] == most
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, most + 1), 5))


def test_a_config_that_names_no_positions_sets_no_limit() -> None:
    assert positions(tiny_model("mamba")) is None
