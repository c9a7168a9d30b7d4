"""config.json as other readers take it: the older names of the rotary embedding, patterns beside lists, the period."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from families import make_plan, save_tiny, tiny_config, types
from layerprune.architecture import compatibility, layer_patterns, load_config, read_architecture
from layerprune.architecture.stack import reread
from layerprune.artifacts import Receipt
from layerprune.errors import RefusedError
from layerprune.exporter import export
from layerprune.exporter.contents import pruned_config
from layerprune.planner.session import SearchRules
from layerprune.removal import Removal

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
FACTORS = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
DEFAULT = {"rope_type": "default"}


def pruned(model_type: str, removal: Removal, **changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a type's config.json, as transformers writes it, and the decoder's part of it after a removal."""
    config = tiny_config(model_type, **changes)
    architecture = read_architecture(config)
    before = config.to_dict()
    after = architecture.prune_config(before, removal)
    for key in architecture.path:
        before, after = before[key], after[key]
    return before, after


@pytest.mark.parametrize(
    ("model_type", "parameters", "expected"),
    [
        ("llama", {"rope_type": "default", "rope_theta": 5e5}, {"rope_theta": 5e5, "rope_scaling": None}),
        ("llama", LLAMA3, {"rope_theta": 5e5, "rope_scaling": {
            **{key: value for key, value in LLAMA3.items() if key != "rope_theta"}, "type": "llama3"}}),
        ("stablelm", {**DEFAULT, "rope_theta": 1e4, "partial_rotary_factor": 0.5},
         {"rope_theta": 1e4, "rope_scaling": None, "partial_rotary_factor": 0.5}),
        ("gpt_neox", {**DEFAULT, "rope_theta": 2e4, "partial_rotary_factor": 0.5},
         {"rotary_emb_base": 2e4, "rotary_pct": 0.5, "rope_scaling": None}),
        ("phi3", {"rope_type": "longrope", "rope_theta": 1e4, **FACTORS},
         {"rope_theta": 1e4, "rope_scaling": {"type": "longrope", **FACTORS}}),
        ("gemma3_text", {FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                         SLIDING: {**DEFAULT, "rope_theta": 2e4}},
         {"rope_theta": 1e6, "rope_local_base_freq": 2e4,
          "rope_scaling": {"rope_type": "linear", "factor": 8.0, "type": "linear"}}),
        ("modernbert-decoder", {FULL: {**DEFAULT, "rope_theta": 1e6}, SLIDING: {**DEFAULT, "rope_theta": 2e4}},
         {"global_rope_theta": 1e6, "local_rope_theta": 2e4}),
        ("olmo3", {FULL: {**YARN, "rope_theta": 5e5}, SLIDING: {**DEFAULT, "rope_theta": 5e5}},
         {"rope_theta": 5e5, "rope_scaling": {**YARN, "type": "yarn"}}),
    ],
)  # fmt: skip
def test_the_rotary_embedding_stands_under_its_older_names_too(
    model_type: str, parameters: dict[str, Any], expected: dict[str, Any]
) -> None:
    before, after = pruned(model_type, Removal.of(2), rope_parameters=parameters)
    assert "rope_theta" not in before
    assert {key: after[key] for key in expected} == expected
    assert after["rope_parameters"] == before["rope_parameters"]


@pytest.mark.parametrize(
    ("model_type", "parameters"),
    [
        ("gemma3_text", {FULL: {**YARN, "rope_theta": 1e6}, SLIDING: {**YARN, "rope_theta": 2e4}}),
        ("olmo3", {FULL: {**DEFAULT, "rope_theta": 5e5}, SLIDING: {**DEFAULT, "rope_theta": 1e4}}),
    ],
)
def test_a_rotary_embedding_that_the_older_names_cannot_say_is_left_and_warned_of(
    model_type: str, parameters: dict[str, Any]
) -> None:
    before, after = pruned(model_type, Removal.of(5), rope_parameters=parameters)
    assert not {"rope_theta", "rope_scaling", "rope_local_base_freq"} & after.keys()
    assert after["rope_parameters"] == before["rope_parameters"]
    warnings = read_architecture(tiny_config(model_type, rope_parameters=parameters)).misread(Removal.of(5))
    assert f"the rotary embedding of this {model_type} model stands in rope_parameters" in warnings[-1]


def test_a_file_in_the_older_words_alone_keeps_them() -> None:
    old = {"num_hidden_layers": 6, "rope_theta": 5e5, "rope_scaling": None}
    new = read_architecture(tiny_config("llama")).prune_config(old, Removal.of(2))
    assert new == {**old, "num_hidden_layers": 5}


def test_a_contradicting_older_field_takes_the_value_that_transformers_goes_by(tmp_path: Path) -> None:
    folder = save_tiny("llama", tmp_path / "base", rope_parameters=LLAMA3)
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "rope_theta": 123.0}))
    config = load_config(str(folder))
    assert config.rope_parameters["rope_theta"] == 5e5
    receipt = export(make_plan(folder, Removal.of(2)), tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["rope_theta"], written["rope_scaling"]["factor"]) == (5e5, 8.0)
    assert (receipt.config_changes["rope_theta"].before, receipt.config_changes["rope_theta"].after) == (123.0, 5e5)
    assert receipt.config_changes["rope_scaling"].before is None
    assert Receipt.load(tmp_path / "out" / "layerprune" / "receipt.json") == receipt
    again = load_config(str(tmp_path / "out")).rope_parameters
    assert {key: value for key, value in again.items() if key != "type"} == config.rope_parameters


def test_transformers_reads_the_same_with_the_older_names_as_without() -> None:
    """Of every type that can be built here."""
    said = 0
    for model_type in types():
        try:
            config = tiny_config(model_type).get_text_config(decoder=True)
        except Exception:  # noqa: BLE001  the zoo says why
            continue
        added = compatibility.legacy_rope_fields(config)
        if added:
            said += 1
            before, after = reread(type(config), config.to_dict()), reread(type(config), {**config.to_dict(), **added})
            assert before is not None
            assert after is not None
            rest = {key: value for key, value in after.items() if key not in added or key in before}
            assert untyped(rest) == untyped(before), model_type
    assert said > 100


def untyped(parameters: Any) -> Any:
    """Without ``type``, the older name of ``rope_type``."""
    if not isinstance(parameters, dict):
        return parameters
    return {key: untyped(value) for key, value in parameters.items() if key != "type"}


QWEN = {"num_hidden_layers": 8, "full_attention_interval": 4}
LLAMA4 = {"interleave_moe_layer_step": 2, "no_rope_layer_interval": 4}
EXAONE = {"num_hidden_layers": 8, "sliding_window": 8, "layer_types": [*[SLIDING] * 3, FULL] * 2}


@pytest.mark.parametrize(
    ("model_type", "added", "units", "expected"),
    [
        ("qwen3_next", QWEN, (4, 5, 6, 7), {"full_attention_interval": 4}),
        ("qwen3_next", QWEN, (1, 5), {"full_attention_interval": 3}),
        ("qwen3_next", QWEN, (1,), {}),
        ("qwen3_5_text", QWEN, (1, 5), {"full_attention_interval": 3}),
        ("qwen3_5_moe_text", QWEN, (0,), {}),
        ("qwen3_next", {"num_hidden_layers": 8}, (1, 5), {"full_attention_interval": 3}),  # mlx-lm would take 4
        ("qwen3_next", {"num_hidden_layers": 8}, (4, 5, 6, 7), {}),
        ("gemma3_text", {"num_hidden_layers": 12, "sliding_window_pattern": 6}, (3, 8), {"sliding_window_pattern": 5}),
        ("gemma3_text", {"num_hidden_layers": 12, "sliding_window_pattern": 6}, (3,), {}),
        ("gemma3_text", {"num_hidden_layers": 12, "_sliding_window_pattern": 6}, (3,), {}),
        ("cohere2", {"num_hidden_layers": 8, "sliding_window_pattern": 4}, (1,), {}),
        ("cohere2", {"num_hidden_layers": 8, "sliding_window_pattern": 4}, (4, 5, 6, 7), {"sliding_window_pattern": 4}),
        ("exaone4", {**EXAONE, "sliding_window_pattern": "LLLG"}, (0, 4), {"sliding_window_pattern": "LLG"}),
        ("exaone4", {**EXAONE, "sliding_window_pattern": "LLLG"}, (0,), {"sliding_window_pattern": "LLGLLLG"}),
        ("exaone4", {**EXAONE, "sliding_window_pattern": "LGGG"}, (0,), {}),  # contradicts the base already
        ("exaone4", {**EXAONE, "sliding_window_pattern": 4}, (0,), {}),
        ("smollm3", {"num_hidden_layers": 8, "no_rope_layer_interval": 4}, (0,), {}),
        ("smollm3", {"num_hidden_layers": 8, "no_rope_layer_interval": 4}, (0, 4), {"no_rope_layer_interval": 3}),
        ("afmoe", {"num_hidden_layers": 8, "global_attn_every_n_layers": 4}, (0,), {}),
        ("llama4_text", {"num_hidden_layers": 8, **LLAMA4}, (0,), {}),
        ("llama4_text", {"num_hidden_layers": 8, **LLAMA4}, (0, 1, 2, 3), LLAMA4),
        ("bailing_hybrid", {"layer_group_size": 3}, (0, 3), {"layer_group_size": 2}),
        ("modernbert-decoder", {"num_hidden_layers": 8, "global_attn_every_n_layers": 4}, (3,), {}),
        ("glm_moe_dsa", {"index_topk_freq": 3, "index_skip_topk_offset": 2}, (1,),
         {"index_topk_freq": 3, "index_skip_topk_offset": 1}),
        ("glm_moe_dsa", {"index_topk_pattern": "FFSFSS"}, (1,), {"index_topk_pattern": "FSFSS"}),
        ("zamba", {"layers_block_type": [LINEAR, LINEAR, "hybrid", LINEAR, LINEAR, LINEAR, "hybrid", LINEAR],
                   "num_hidden_layers": 8, "attn_layer_period": 4, "attn_layer_offset": 3}, (0,), {}),
    ],
)  # fmt: skip
def test_a_pattern_agrees_with_the_list_beside_it_or_goes(
    model_type: str, added: dict[str, Any], units: tuple[int, ...], expected: dict[str, Any]
) -> None:
    config = tiny_config(model_type, **added)
    architecture = read_architecture(config)
    old = {**config.to_dict(), **added}
    new = architecture.prune_config(old, Removal.of(*units))
    names = {key for key in [*added, "full_attention_interval", "sliding_window_pattern"] if key not in LISTS}
    assert {key: new[key] for key in names & new.keys()} == expected
    read = reread(type(config), new)
    assert read is not None
    for name, value in layer_patterns.lists_of(new).items():
        assert read[name] == value  # what decides for transformers


LISTS = {"num_hidden_layers", "sliding_window", "layer_types", "layers_block_type"}


def test_lists_that_the_config_class_translates_are_cut_too() -> None:
    old = {"num_hidden_layers": 6, "is_moe_layer": [False, *[True] * 5], "hybrid_layer_pattern": [0, 1, 1, 0, 1, 1]}
    new = read_architecture(tiny_config("exaone_moe")).prune_config(old, Removal.of(0))
    assert (new["is_moe_layer"], new["hybrid_layer_pattern"]) == ([True] * 5, [1, 1, 0, 1, 1])


@pytest.mark.parametrize(
    ("model_type", "changes", "words"),
    [
        ("granitemoehybrid", {}, {LINEAR: "mamba", FULL: "attention"}),
        ("lfm2", {"layer_types": ["conv", FULL] * 3}, {"conv": "conv", FULL: FULL}),
    ],
)
def test_a_list_is_cut_in_the_words_of_the_file(
    model_type: str, changes: dict[str, Any], words: dict[str, str]
) -> None:
    """transformers 5 has other words for some kinds of layer than published configs and their other readers."""
    config = tiny_config(model_type, **changes)
    old = {**config.to_dict(), "layer_types": [words[kind] for kind in config.layer_types]}
    read = type(config).from_dict(dict(old))
    assert read.layer_types == config.layer_types
    new = read_architecture(read).prune_config(old, Removal.of(0))
    assert new["layer_types"] == old["layer_types"][1:]


def test_kimis_layers_by_kind_are_counted_from_one() -> None:
    linear = {"kda_layers": [1, 2, 3, 5], "full_attn_layers": [4, 6], "num_heads": 2, "head_dim": 8}
    config = tiny_config("kimi_linear", linear_attn_config=linear)
    new = read_architecture(config).prune_config(config.to_dict(), Removal.of(1))
    assert new["linear_attn_config"] == {**linear, "kda_layers": [1, 2, 4], "full_attn_layers": [3, 5]}
    assert new["layer_types"] == [LINEAR, LINEAR, FULL, LINEAR, FULL]


def test_layers_that_keep_a_copy_of_a_pattern_are_the_same_layers(tmp_path: Path) -> None:
    """EXAONE 4's attention does, and goes by layer_types."""
    folder = save_tiny("exaone4", tmp_path / "base", sliding_window=8)
    drawn = pruned_config(folder, Removal.of(0)).config
    assert drawn["sliding_window_pattern"] == 3  # 4 in the base


def case(folder: Path, model_type: str, **old: Any) -> Path:
    """Write a config as published before transformers had lists of layer types."""
    content = tiny_config(model_type, num_hidden_layers=old.pop("depth")).to_dict()
    content.pop("layer_types")
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**content, **old}))
    return folder


def test_qwen3_next_as_published(tmp_path: Path) -> None:
    folder = case(tmp_path / "base", "qwen3_next", depth=8, full_attention_interval=4)
    drawn = pruned_config(folder, Removal.of(1, 5)).config
    assert drawn["layer_types"] == [LINEAR, LINEAR, FULL] * 2
    assert drawn["full_attention_interval"] == 3
    architecture = read_architecture(load_config(str(folder)))
    refuses = SearchRules(keep_period=True).check(architecture)
    refuses(Removal.of(0, 1, 2, 3))
    refuses(Removal.of(2, 3, 4, 5))
    with pytest.raises(RefusedError, match="layer_types of this qwen3_next model repeats every 4 layers"):
        refuses(Removal.of(1, 5))


def test_gemma3_as_published_in_2025(tmp_path: Path) -> None:
    folder = case(tmp_path / "base", "gemma3_text", depth=12, sliding_window_pattern=6)
    drawn = pruned_config(folder, Removal.of(3, 8)).config
    assert drawn["layer_types"] == [*[SLIDING] * 4, FULL] * 2
    assert drawn["sliding_window_pattern"] == 5
    broken = pruned_config(folder, Removal.of(3)).config
    assert "sliding_window_pattern" not in broken
    warnings = read_architecture(load_config(str(folder))).misread(Removal.of(3))
    assert {warning.partition(" ")[0] for warning in warnings} == {"llama.cpp", "mlx-lm"}


@pytest.mark.parametrize(
    ("model_type", "changes", "kept", "broken"),
    [
        ("olmo3", {"num_hidden_layers": 8}, (0, 1, 2, 3), (0, 4)),
        ("cohere2", {"num_hidden_layers": 12, "layer_types": [SLIDING, FULL] * 6}, (3, 4), (3,)),  # as it is, not 4
        ("gemma3_text", {}, (), (0,)),  # a period as long as the stack
        ("granite_swa", {"num_hidden_layers": 8}, (1, 2, 3, 4), (1,)),  # the first of four is the other one
        ("qwen3_moe", {"decoder_sparse_step": 2}, (2, 3), (2,)),
        ("ernie4_5_moe", {"moe_layer_interval": 2, "moe_layer_end_index": 5}, (4, 5), (0, 1, 3)),
        ("gpt_neo", {}, (1, 2), (1,)),
        ("flint", {"num_hidden_layers": 12}, (5, 6, 7, 8), (2,)),  # the first two and the last are of their own
        ("lfm2", {"layer_types": [*["conv", "conv", FULL, "conv", FULL], *["conv"] * 4, FULL]}, (0, 3), None),
        ("llama", {}, (1, 3), None),
        ("deepseek_v3", {"first_k_dense_replace": 2}, (0, 3), None),
    ],
)  # fmt: skip
def test_the_period_is_the_configs_own(
    model_type: str, changes: dict[str, Any], kept: tuple[int, ...], broken: tuple[int, ...] | None
) -> None:
    depth = len(changes.get("layer_types", [])) or changes.get("num_hidden_layers", 6)
    architecture = read_architecture(tiny_config(model_type, **{**changes, "num_hidden_layers": depth}))
    check = SearchRules(keep_period=True).check(architecture)
    check(Removal.of(*kept))
    if broken is not None:
        with pytest.raises(RefusedError, match="--keep-period: "):
            check(Removal.of(*broken))
