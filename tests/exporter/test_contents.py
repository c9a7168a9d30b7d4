"""Checkpoints as they are found: prediction heads, other prefixes, tied weights, sparse steps, composite configs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import audit_tiny
from cli_tiny import done
from families import make_plan, save_tiny, tiny_config
from layerprune.artifacts import DroppedHeads, Plan, Scores
from layerprune.checkpoint import Checkpoint
from layerprune.config import PlanConfig
from layerprune.errors import RefusedError
from layerprune.exporter import export
from layerprune.exporter.contents import find_disk_stack
from layerprune.planner import replan
from layerprune.removal import LayerMap, Removal, layer_of

DROP = Removal.of(1, 4)


def rewrite(folder: Path, rename: Any = lambda name: name, more: dict[str, torch.Tensor] | None = None) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors = {rename(name): value.clone() for name, value in tensors.items()}
    save_file({**tensors, **(more or {})}, folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder: Path, **fields: Any) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **fields}))


def exported(base: Path, out: Path, removal: Removal = DROP) -> tuple[dict[str, Any], set[str]]:
    receipt = export(make_plan(base, removal), out)
    assert receipt.proof is not None
    assert receipt.proof.max_difference <= 1e-5
    assert receipt.missing_keys == ()
    return json.loads((out / "config.json").read_text()), set(Checkpoint.open(out).tensors)


@pytest.mark.parametrize(
    ("prefix", "removal"),
    [("model.layers.6", DROP), ("mtp.layers.0", DROP), ("model.mtp.0", DROP), ("model.layers.6", Removal.of(1))],
)
def test_prediction_heads_go(tmp_path: Path, prefix: str, removal: Removal) -> None:
    base = save_tiny("deepseek_v3", tmp_path / "base")
    head = {f"{prefix}.{name}": torch.ones(4, 4) for name in ("eh_proj.weight", "enorm.weight", "mlp.gate.weight")}
    rewrite(base, more=head)
    configure(base, num_nextn_predict_layers=1)
    config, names = exported(base, tmp_path / "out", removal)
    assert config["num_nextn_predict_layers"] == 0
    assert not any(name.startswith(prefix) for name in names)


@pytest.mark.parametrize("prefix", ["model.layers.6", "mtp.layers.0"])
def test_a_dropped_prediction_head_and_its_bytes_are_said_in_plan_receipt_and_card(tmp_path: Path, prefix: str) -> None:
    base = audit_tiny.base_model(tmp_path / "base")
    save_tiny("deepseek_v3", base, vocab_size=260)
    rewrite(base, more={f"{prefix}.{name}.weight": torch.ones(8, 8) for name in ("eh_proj", "enorm")})
    configure(base, num_nextn_predict_layers=1)
    said = "its multi-token-prediction head is left out: 2 tensors, 512 B"
    done("plan", base, "--metric", "random", "--drop", 1, "-o", tmp_path / "run")
    plan = Plan.load(tmp_path / "run/plan.json")
    assert [warning for warning in plan.warnings if warning.startswith(said)]
    again = replan(Scores.load(tmp_path / "run/scores.json"), PlanConfig.of(model="", drop="1"))
    assert any("head (num_nextn_predict_layers 1) is left out" in text for text in again.warnings)
    receipt = export(plan, tmp_path / "out")
    assert receipt.dropped_heads == DroppedHeads(tensors=2, bytes=512)
    assert (tmp_path / "out/README.md").read_text().count(said) == 1
    export(make_plan(base, DROP), tmp_path / "silent")
    assert (tmp_path / "silent/README.md").read_text().count(said) == 1
    assert export(make_plan(save_tiny("llama", tmp_path / "none"), DROP), tmp_path / "plain").dropped_heads is None


def test_prediction_heads_stay_when_nothing_goes(tmp_path: Path) -> None:
    base = save_tiny("deepseek_v3", tmp_path / "base")
    rewrite(base, more={"model.layers.6.eh_proj.weight": torch.ones(4, 4)})
    _, names = exported(base, tmp_path / "out", Removal.of())
    assert "model.layers.6.eh_proj.weight" in names


def test_names_without_the_models_prefix(tmp_path: Path) -> None:
    """As the first GPT-2 checkpoints have them: h.0.attn..., not transformer.h.0.attn..."""
    base = save_tiny("gpt2", tmp_path / "base")
    rewrite(base, lambda name: name.removeprefix("transformer."))
    _, names = exported(base, tmp_path / "out")
    assert {name.split(".")[1] for name in names if name.startswith("h.")} == {"0", "1", "2", "3"}


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights(tmp_path: Path, tied: bool) -> None:
    base = save_tiny("llama", tmp_path / "base", tie_word_embeddings=tied)
    _, names = exported(base, tmp_path / "out")
    assert ("lm_head.weight" in names) is not tied


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("qwen2_moe", {"decoder_sparse_step": 2}),
        ("qwen3_moe", {"decoder_sparse_step": 3, "mlp_only_layers": [2]}),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 3, "sliding_window": 4}),
        ("deepseek_v2", {"first_k_dense_replace": 3}),
        ("smollm3", {"no_rope_layer_interval": 2}),
        ("llama4_text", {"interleave_moe_layer_step": 2}),
        ("gpt_neox", {"use_parallel_residual": False}),
        ("bloom", {}),
        ("gemma3", {}),
        ("dbrx", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)
def test_variants(tmp_path: Path, model_type: str, changes: dict[str, Any]) -> None:
    exported(save_tiny(model_type, tmp_path / "base", **changes), tmp_path / "out")


@pytest.mark.parametrize("named", ["language_model.model", "model.language_model"])
def test_composite_with_a_vision_tower_as_deep_as_the_decoder(tmp_path: Path, named: str) -> None:
    """Both ways in which files name the decoder; what is not the decoder's is carried along byte for byte."""
    base = save_tiny("gemma3", tmp_path / "base")
    rewrite(base, lambda name: re.sub("^language_model.model", named, name))
    names = set(Checkpoint.open(base).tensors)
    assert f"{named}.layers.5.mlp.up_proj.weight" in names
    assert "vision_tower.encoder.layers.5.mlp.fc1.weight" in names
    config, left = exported(base, tmp_path / "out", Removal.of(1, 4))
    assert config["text_config"]["num_hidden_layers"] == 4
    assert config["vision_config"]["num_hidden_layers"] == 6
    outside = {name for name in names if f"{named}.layers." not in name}
    assert {name for name in left if f"{named}.layers." not in name} == outside
    old, new = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    assert all(old[name].equal(new[name]) for name in outside)


def test_encoder_decoder_is_refused_and_its_decoder_is_not(tmp_path: Path) -> None:
    from transformers import BartForCausalLM, BartForConditionalGeneration

    whole = BartForConditionalGeneration(tiny_config("bart", is_encoder_decoder=True, is_decoder=False))
    whole.save_pretrained(tmp_path / "whole")
    with pytest.raises(RefusedError, match="architectures: BartForConditionalGeneration is an encoder-decoder"):
        make_plan(tmp_path / "whole", DROP)
    decoder = BartForCausalLM(whole.config)
    decoder.model.decoder.load_state_dict(whole.model.decoder.state_dict())
    decoder.save_pretrained(tmp_path / "decoder")
    config, names = exported(tmp_path / "decoder", tmp_path / "out")
    assert config["decoder_layers"] == 4
    assert {name.split(".")[3] for name in names if ".layers." in name} == set("0123")


def test_sharded_base_in_bfloat16(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(save_tiny("mixtral", tmp_path / "one"), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "base", max_shard_size="50KB")
    assert len(Checkpoint.open(tmp_path / "base").files) > 3
    receipt = export(make_plan(tmp_path / "base", DROP), tmp_path / "out", max_shard_size=100_000)
    assert receipt.proof is not None
    assert (receipt.proof.dtype, receipt.proof.max_difference) == ("bfloat16", 0)
    assert len(Checkpoint.open(tmp_path / "out").files) > 1


def checkpoint_of(folder: Path, names: dict[str, int]) -> Checkpoint:
    folder.mkdir()
    save_file({name: torch.zeros(size) for name, size in names.items()}, folder / "model.safetensors")
    return Checkpoint.open(folder)


def test_stack_on_disk(tmp_path: Path) -> None:
    layers = {f"language.blocks.{i}.w": 5 for i in range(3)}
    vision = {f"vision.layers.{i}.w": 7 for i in range(3)}
    experts = {f"language.blocks.{i}.experts.{j}.w": 1 for i in range(3) for j in range(3)}
    found = find_disk_stack(checkpoint_of(tmp_path / "a", {**layers, **vision, **experts}), "model.layers", [8, 8, 8])
    assert found == "language.blocks"
    bare = find_disk_stack(checkpoint_of(tmp_path / "b", {f"{i}.w": 5 for i in range(3)}), "layers", [5, 5, 5])
    assert bare == ""
    assert layer_of("2.w", bare) == (2, "w")
    assert LayerMap(3, (0, 2)).renamed("2.w", bare) == "1.w"
    assert layer_of("language.blocks.x.w", found) is None
    with pytest.raises(RefusedError, match=r"no tensor names in .* count the 4 layers of 'model.layers'"):
        find_disk_stack(checkpoint_of(tmp_path / "c", layers), "model.layers", [5, 5, 5, 5])
    twice = {**{f"x.layers.{i}.w": 5 for i in range(3)}, **{f"y.layers.{i}.w": 5 for i in range(3)}}
    with pytest.raises(RefusedError, match=r"may be 'y\.layers' or 'x\.layers'"):
        find_disk_stack(checkpoint_of(tmp_path / "d", twice), "model.layers", [5, 5, 5])
