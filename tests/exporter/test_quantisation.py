"""Quantised checkpoints: bytes as they are, layer paths in the quantisation config renumbered, proof on a twin."""

from __future__ import annotations

import fnmatch
import json
import re
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from families import make_plan, save_tiny
from layerprune.checkpoint import Checkpoint
from layerprune.errors import ExportError, RefusedError
from layerprune.exporter import dry_run, export, proof, quantisation
from layerprune.exporter.contents import pruned_config
from layerprune.removal import LayerMap, Removal

DROP = Removal.of(1, 4)
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "modules_in_block_to_quantize": [["self_attn.q_proj"]],
        "dynamic": {"-:model\\.layers\\.1\\..*": {}, "+:model\\.layers\\.5\\..*": {"bits": 8}}}  # fmt: skip
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm",
       "modules_to_not_convert": ["model.layers.4.mlp", "model.layers.5.mlp.gate_proj"]}  # fmt: skip
FP8 = {"quant_method": "fp8", "weight_block_size": [16, 16], "modules_to_not_convert": [
    "lm_head", "model.layers.1.mlp.down_proj", "model.layers.2.mlp.down_proj", "model.layers.5.self_attn"]}  # fmt: skip
COMPRESSED = {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": [
    "lm_head", "re:.*lm_head", "model.layers.4.self_attn.q_proj", "re:model\\.layers\\.3\\.mlp\\..*"],
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4}}}}  # fmt: skip
BITSANDBYTES = {"quant_method": "bitsandbytes", "load_in_4bit": True, "llm_int8_skip_modules": ["model.layers.3.mlp"]}


def gptq(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    rows, columns = weight.shape
    packed = torch.randint(-(2**31), 2**31 - 1, (columns // 8, rows), dtype=torch.int32)
    return {f"{name}.qweight": packed, f"{name}.scales": torch.rand(columns // 16, rows).half(),
            f"{name}.g_idx": torch.arange(columns, dtype=torch.int32)}  # fmt: skip


def awq(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    rows, columns = weight.shape
    sizes = ((columns, rows // 8), (columns // 16, rows // 8))
    packed = [torch.randint(-(2**31), 2**31 - 1, size, dtype=torch.int32) for size in sizes]
    return {f"{name}.qweight": packed[0], f"{name}.qzeros": packed[1],
            f"{name}.scales": torch.rand(columns // 16, rows).half()}  # fmt: skip


def fp8(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": weight.to(torch.float8_e4m3fn), f"{name}.weight_scale_inv": torch.rand(2, 2)}


def bnb(name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": torch.randint(255, (weight.numel() // 2, 1), dtype=torch.uint8),
            f"{name}.weight.absmax": torch.rand(weight.numel() // 64),
            f"{name}.weight.quant_state.bitsandbytes__nf4": torch.randint(255, (88,), dtype=torch.uint8)}  # fmt: skip


def quantised(folder: Path, pack: Any, settings: dict[str, Any]) -> Path:
    save_tiny("llama", folder)
    tensors: dict[str, torch.Tensor] = {}
    for name, value in load_file(folder / "model.safetensors").items():
        linear = value.ndim == 2 and ".layers." in name
        tensors.update(pack(name.removesuffix(".weight"), value) if linear else {name: value})
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "quantization_config": settings}))
    (folder / "quantize_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(
    ("pack", "settings", "expected"),
    [
        (gptq, GPTQ, {"dynamic": {"+:model\\.layers\\.3\\..*": {"bits": 8}}}),
        (awq, AWQ, {"modules_to_not_convert": ["model.layers.3.mlp.gate_proj"]}),
        (fp8, FP8, {"modules_to_not_convert": ["lm_head", "model.layers.1.mlp.down_proj", "model.layers.3.self_attn"]}),
        (bnb, COMPRESSED, {"ignore": ["lm_head", "re:.*lm_head", "re:model\\.layers\\.2\\.mlp\\..*"]}),
        (bnb, BITSANDBYTES, {"llm_int8_skip_modules": ["model.layers.2.mlp"]}),
    ],
    ids=["gptq", "awq", "fp8", "compressed-tensors", "bitsandbytes"],
)
def test_bytes_and_paths(tmp_path: Path, pack: Any, settings: dict[str, Any], expected: dict[str, Any]) -> None:
    base = quantised(tmp_path / "base", pack, settings)
    receipt = export(make_plan(base, DROP), tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert written == {**settings, **expected}
    assert json.loads((tmp_path / "out" / "quantize_config.json").read_text()) == written
    old, new = load_file(base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    for layer, source in enumerate((0, 2, 3, 5)):
        for name in [name for name in old if name.startswith(f"model.layers.{source}.")]:
            other = new.pop(name.replace(f".{source}.", f".{layer}.", 1))
            assert other.dtype == old[name].dtype
            assert other.view(torch.uint8).equal(old[name].view(torch.uint8)), name
    assert set(new) == {name for name in old if ".layers." not in name}
    assert receipt.proof is not None
    assert receipt.proof.max_difference == 0
    if pack is fp8:  # transformers dequantises it where there is no GPU
        assert receipt.proof.method == "whole models"
    else:
        assert receipt.proof.method == proof.METHOD
        assert "whole models were not compared: this machine cannot run the quantised model" in receipt.notes[0]


def test_model_larger_than_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = psutil.virtual_memory()._replace(available=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    base = save_tiny("gemma2", tmp_path / "base")
    receipt = export(make_plan(base, DROP), tmp_path / "out")
    assert receipt.proof is not None
    assert receipt.proof.method == proof.METHOD
    assert receipt.proof.scale > 0.1
    assert "0.0 GB are free" in receipt.notes[0]
    assert receipt.missing_keys == ()


def test_twin_sees_a_wrong_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were layer_types cut at the end instead of where layers went, the twin would answer differently."""
    from layerprune.architecture import load_config, read_architecture

    config = load_config(str(save_tiny("gemma3_text", tmp_path / "base", sliding_window=4)))
    architecture = read_architecture(config)
    assert proof.prove_on_twin(config, architecture, DROP).max_difference == 0
    right = proof.rebuilt

    def wrong(config: Any, content: dict[str, Any]) -> Any:
        return right(config, {**content, "layer_types": config.layer_types[:4]})

    monkeypatch.setattr(proof, "rebuilt", wrong)
    with pytest.raises(ExportError, match="a logit differs by"):
        proof.prove_on_twin(config, architecture, Removal.of(0, 2))


SOURCES = LayerMap.after(DROP, 6)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("model.layers.0.mlp", "model.layers.0.mlp"),
        ("model.layers.1.mlp", None),
        ("model.layers.5", "model.layers.3"),
        ("layers.2.mlp.down_proj", "layers.1.mlp.down_proj"),
        ("re:.*layers\\.3\\.mlp.*", "re:.*layers\\.2\\.mlp.*"),
        ("re:.*layers\\.\\d+\\.mlp", "re:.*layers\\.\\d+\\.mlp"),
        ("re:.*layers\\..*\\.mlp", "re:.*layers\\..*\\.mlp"),
        ("*.layers.5.mlp", "*.layers.3.mlp"),
        ("lm_head", "lm_head"),
        ("Linear", "Linear"),
        ("vision.blocks.5.mlp", "vision.blocks.5.mlp"),
    ],
)
def test_layer_paths(path: str, expected: str | None) -> None:
    assert quantisation.RuleRewriter("model.layers", SOURCES, {}).renumbered(path) == expected


@pytest.mark.parametrize("pattern", ["re:.*layers\\.[0-3]\\..*", "re:layers.(0|1).mlp", "re:layers\\.1[0-9]\\..*"])
def test_patterns_over_layer_numbers_are_refused(pattern: str) -> None:
    with pytest.raises(RefusedError, match="list them one by one"):
        quantisation.RuleRewriter("model.layers", SOURCES, {}).renumbered(pattern)


# Rules are held against the modules of a model whose experts are numbered, too, as its layers are.
NAMES = [
    *(f"model.layers.{layer}.{module}.weight" for layer in range(12) for module in (
        "self_attn.q_proj", "self_attn.k_proj", "mlp.gate_proj", "mlp.down_proj", "mlp.experts.1.down_proj")),
    "model.embed_tokens.weight", "lm_head.weight", "model.vision.blocks.7.attn.weight",
]  # fmt: skip
GONE = Removal.of(2, 3)  # of 12 layers


def rewrite(settings: dict[str, Any], removal: Removal = GONE) -> Any:
    sources = LayerMap.after(removal, 12)
    return quantisation.RuleRewriter("model.layers", sources, modules(sources)).rewritten(settings)


def modules(sources: LayerMap) -> quantisation.Names:
    return quantisation.module_names((name, sources.renamed(name, "model.layers")) for name in NAMES)


def transformers_skips(rule: str, name: str) -> bool:
    from transformers.quantizers.quantizers_utils import should_convert_module

    return not should_convert_module(name, [rule])


def compressed_tensors_matches(rule: str, name: str) -> bool:
    from compressed_tensors.utils.match import match_name

    return bool(match_name(name, rule))


def gptqmodel_matches(rule: str, name: str) -> bool:
    return re.match(rule.removeprefix("+:").removeprefix("-:"), name) is not None


def torchao_matches(rule: str, name: str) -> bool:
    return bool(re.fullmatch(rule[3:], name)) if rule.startswith("re:") else rule == name


def autoround_matches(rule: str, name: str) -> bool:
    return rule == name or bool(re.search(rule, name))


Reader = Any  # of a rule and a name: whether one matches the other


@pytest.mark.parametrize(
    ("field", "reader", "rule", "expected"),
    [
        ("dynamic", gptqmodel_matches, "+:.*\\.4\\..*gate.*", "+:.*\\.2\\..*gate.*"),
        ("dynamic", gptqmodel_matches, "-:.*\\.11\\..*down.*", "-:.*\\.9\\..*down.*"),
        ("dynamic", gptqmodel_matches, "-:.*\\.0\\..*", "-:.*\\.0\\..*"),
        ("dynamic", gptqmodel_matches, "+:.*\\.3\\..*gate.*", None),  # of what is gone alone
        ("dynamic", gptqmodel_matches, ".*\\.(4|5)\\.mlp\\.gate_proj", ".*\\.(2|3)\\.mlp\\.gate_proj"),
        ("dynamic", gptqmodel_matches, ".*\\.(3|5)\\.mlp\\.gate_proj", ".*\\.((?!)|3)\\.mlp\\.gate_proj"),
        ("dynamic", gptqmodel_matches, "-:.*layers\\.[0-4]\\.mlp.*", "-:.*layers\\.[0-2]\\.mlp.*"),
        ("dynamic", gptqmodel_matches, "-:.*layers\\.1[01]\\.mlp.*", "-:.*layers\\.(?:8|9)\\.mlp.*"),
        ("dynamic", gptqmodel_matches, "-:model\\.layers\\.1", "-:model\\.layers\\.(?:1|8|9)(?!\\d)"),  # and 10, and 11
        ("dynamic", gptqmodel_matches, "-:.*\\.\\d+\\.mlp.*", "-:.*\\.\\d+\\.mlp.*"),
        ("ignore", compressed_tensors_matches, "re:.*\\.4\\..*q_proj", "re:.*\\.2\\..*q_proj"),
        ("ignore", compressed_tensors_matches, "re:.*layers.11.mlp.*", "re:.*layers.9.mlp.*"),
        ("ignore", compressed_tensors_matches, "model.layers.5.mlp.gate_proj", "model.layers.3.mlp.gate_proj"),
        ("targets", compressed_tensors_matches, "re:.*\\.(8|9|10)\\.mlp.*", "re:.*\\.(6|7|8)\\.mlp.*"),
        ("targets", compressed_tensors_matches, "Linear", "Linear"),
        ("modules_to_not_convert", transformers_skips, "5.mlp.gate_proj", "3.mlp.gate_proj"),  # the end of a name
        ("modules_to_not_convert", transformers_skips, "layers.5.mlp.gate_proj", "layers.3.mlp.gate_proj"),
        ("modules_to_not_convert", transformers_skips, "model.layers.1", "model.layers.1"),
        ("modules_to_not_convert", transformers_skips, "model.layers.*.self_attn", "model.layers.*.self_attn"),
        ("modules_to_not_convert", transformers_skips, ".*.4.mlp", ".*.2.mlp"),
        ("llm_int8_skip_modules", transformers_skips, ".*\\.10\\..*gate_proj", ".*\\.8\\..*gate_proj"),
        ("linear_weights_not_to_quantize", transformers_skips, "model.layers.4.mlp.gate_proj.weight",
         "model.layers.2.mlp.gate_proj.weight"),
        ("ignored_layers", transformers_skips, "model.layers.3.mlp", None),
        ("module_fqn_to_config", torchao_matches, "re:.*\\.4\\..*q_proj", "re:.*\\.2\\..*q_proj"),
        ("fqn_to_config", torchao_matches, "model.layers.4.mlp.gate_proj", "model.layers.2.mlp.gate_proj"),
        ("fqn_to_config", torchao_matches, "_default", "_default"),
        ("extra_config", autoround_matches, "\\.4\\..*gate", "\\.2\\..*gate"),
        ("extra_config", autoround_matches, "model.layers.4.mlp.gate_proj", "model.layers.2.mlp.gate_proj"),
        ("layer_quant_config", fnmatch.fnmatchcase, "*.4.mlp.*", "*.2.mlp.*"),
        ("exclude_modules", fnmatch.fnmatchcase, "model.layers.10.self_attn*", "model.layers.8.self_attn*"),
        ("config_for_layers", str.__eq__, "model.layers.4.mlp.gate_proj", "model.layers.2.mlp.gate_proj"),
        ("tune_metadata", str.__eq__, "model.layers.2.mlp.gate_proj", None),
        ("unheard_of", autoround_matches, ".*\\.4\\..*gate.*", ".*\\.2\\..*gate.*"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("keys", [False, True], ids=["list", "keys"])
def test_a_rule_speaks_of_the_same_modules(
    field: str, reader: Reader, rule: str, expected: str | None, keys: bool
) -> None:
    content: dict[str, Any] = {field: {rule: {"bits": 8}} if keys else [rule]}
    (found,) = rewrite({"bits": 4, "version": "0.5.1", **content})[field] or [None]
    assert found == expected
    sources = LayerMap.after(GONE, 12)
    swapped = reader is fnmatch.fnmatchcase  # which takes the name first
    for old, new in modules(sources).items():
        if new is not None:
            hit = reader(old, rule) if swapped else reader(rule, old)
            again = expected is not None and (reader(new, expected) if swapped else reader(expected, new))
            assert bool(hit) == bool(again), old


@pytest.mark.parametrize(
    ("field", "rule"),
    [
        ("dynamic", "-:.*\\.1\\..*down.*"),  # of layer 1, and of every layer's expert 1
        ("dynamic", "+:.*\\.7\\..*"),  # and of a part of the vision tower
        ("modules_to_not_convert", "1.mlp.gate_proj"),  # and of layer 11's
        ("extra_config", "model.layers.1.mlp|model.layers.[02468].mlp"),
    ],
)
def test_a_rule_that_cannot_be_rewritten_is_refused_by_name(field: str, rule: str) -> None:
    with pytest.raises(RefusedError, match=rf"rule {re.escape(repr(rule))} \({field}\) would speak of other modules"):
        rewrite({field: [rule]}, Removal.of(0, 3, 5))


def test_names_that_stand_in_one_string_or_with_a_shape() -> None:
    assert rewrite({"to_quant_block_names": "model.layers.0,model.layers.3,model.layers.4"}) == {
        "to_quant_block_names": "model.layers.0,model.layers.2"
    }
    shapes = {f"model.layers.{layer}.mlp.gate_proj.dense_weights.shape": layer for layer in (2, 4)}
    assert rewrite({"shapes": shapes}) == {"shapes": {"model.layers.2.mlp.gate_proj.dense_weights.shape": 4}}


def test_gptqmodels_rules_by_bare_number(tmp_path: Path) -> None:
    dynamic = {"+:.*\\.4\\..*gate.*": {"bits": 8}, "-:.*\\.1\\..*down.*": {}}
    base = quantised(tmp_path / "base", gptq, {"quant_method": "gptq", "bits": 4, "group_size": 16, "dynamic": dynamic})
    export(make_plan(base, Removal.of(2, 3)), tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert written["dynamic"] == {"+:.*\\.2\\..*gate.*": {"bits": 8}, "-:.*\\.1\\..*down.*": {}}
    assert json.loads((tmp_path / "out" / "quantize_config.json").read_text()) == written


def test_rules_are_held_against_the_names_on_disk(tmp_path: Path) -> None:
    """Experts are numbered there and fused in memory: a number can mean an expert or a layer."""
    base = save_tiny("qwen2_moe", tmp_path / "base")
    content = json.loads((base / "config.json").read_text())
    rules = {"quant_method": "gptq", "bits": 4, "dynamic": {"-:.*\\.1\\.down_proj": {}, "-:.*\\.5\\..*up_proj": {}}}
    (base / "config.json").write_text(json.dumps({**content, "quantization_config": rules}))
    dry_run(base, Removal.of(0))
    drawn = pruned_config(base, Removal.of(0), checkpoint=Checkpoint.open(base))
    assert list(drawn.config["quantization_config"]["dynamic"]) == ["-:.*\\.1\\.down_proj", "-:.*\\.4\\..*up_proj"]
    rules["dynamic"] = {"-:.*\\.1\\..*": {}}  # layer 1, and every expert 1
    (base / "config.json").write_text(json.dumps({**content, "quantization_config": rules}))
    with pytest.raises(RefusedError, match=r"would speak of other modules without these layers"):
        dry_run(base, Removal.of(0))


@pytest.mark.parametrize("key", ["quantization_config", "compression_config", "quantization"])
def test_rules_of_the_decoder_in_a_composite_config(tmp_path: Path, key: str) -> None:
    base = save_tiny("gemma3", tmp_path / "base")
    content = json.loads((base / "config.json").read_text())
    content["text_config"][key] = {"ignore": ["re:.*language_model.*\\.4\\..*q_proj"]}
    (base / "config.json").write_text(json.dumps(content))
    new = pruned_config(base, Removal.of(1)).config["text_config"][key]
    assert new == {"ignore": ["re:.*language_model.*\\.3\\..*q_proj"]}
