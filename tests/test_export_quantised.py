"""Quantised checkpoints: bytes as they are, layer paths in the quantisation config renumbered, proof on a twin."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from families import make_plan, save_tiny
from safetensors.torch import load_file, save_file

from layerprune.anatomy import Sources
from layerprune.errors import ExportError, RefusedError
from layerprune.export import export, twin
from layerprune.export.extras import layer_renumberer
from layerprune.removal import Removal

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
        assert receipt.proof.method == twin.METHOD
        assert "whole models were not compared: this machine cannot run the quantised model" in receipt.notes[0]


def test_model_larger_than_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = psutil.virtual_memory()._replace(available=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    base = save_tiny("gemma2", tmp_path / "base")
    receipt = export(make_plan(base, DROP), tmp_path / "out")
    assert receipt.proof is not None
    assert receipt.proof.method == twin.METHOD
    assert receipt.proof.scale > 0.1
    assert "0.0 GB are free" in receipt.notes[0]
    assert receipt.missing_keys == ()


def test_twin_sees_a_wrong_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Were layer_types cut at the end instead of where layers went, the twin would answer differently."""
    from layerprune.anatomy import load_config, read_anatomy

    config = load_config(str(save_tiny("gemma3_text", tmp_path / "base", sliding_window=4)))
    anatomy = read_anatomy(config)
    assert twin.prove_on_twin(config, anatomy, DROP).max_difference == 0
    right = twin.rebuilt

    def wrong(config: Any, content: dict[str, Any]) -> Any:
        return right(config, {**content, "layer_types": config.layer_types[:4]})

    monkeypatch.setattr(twin, "rebuilt", wrong)
    with pytest.raises(ExportError, match="a logit differs by"):
        twin.prove_on_twin(config, anatomy, Removal.of(0, 2))


SOURCES = Sources.after(DROP, 6)
HALVES = Sources.after(Removal.of(1.5), 6)  # without the MLP of 1 and the attention of 2


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
    renumber = layer_renumberer("model.layers", SOURCES)
    assert renumber([path]) == ([] if expected is None else [expected])
    assert renumber({path: 1}) == ({} if expected is None else {expected: 1})


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("model.layers.1.self_attn", "model.layers.1.self_attn"),
        ("model.layers.1.mlp.gate_proj", None),  # silenced, and its attention is not
        ("model.layers.2.mlp.gate_proj", "model.layers.1.mlp.gate_proj"),
        ("model.layers.2.self_attn.q_proj", None),
        ("model.layers.3.mlp", "model.layers.2.mlp"),
        ("re:.*layers\\.2\\.mlp\\..*", "re:.*layers\\.1\\.mlp\\..*"),
        ("re:.*layers\\.2\\.self_attn$", None),
        ("model.layers.5", "model.layers.4"),  # both halves, and still one layer
        ("re:model\\.layers\\.3\\..*", "re:model\\.layers\\.2\\..*"),
        ("re:.*layers\\.\\d+\\.mlp", "re:.*layers\\.\\d+\\.mlp"),
    ],
)
def test_layer_paths_follow_their_half(path: str, expected: str | None) -> None:
    renumber = layer_renumberer("model.layers", HALVES)
    assert renumber([path]) == ([] if expected is None else [expected])


@pytest.mark.parametrize(
    "path",
    ["model.layers.1", "model.layers.2", "re:model\\.layers\\.1\\..*", "re:layers\\.2\\.(mlp|self_attn)\\..*",
     "model.layers.2.post_attention_layernorm"],
)  # fmt: skip
def test_a_path_to_both_halves_of_a_layer_that_parts_is_refused(path: str) -> None:
    with pytest.raises(RefusedError, match=r"halves of layer [12] part; remove whole layers, or name its attention"):
        layer_renumberer("model.layers", HALVES)({"ignore": [path]})


@pytest.mark.parametrize("pattern", ["re:.*layers\\.[0-3]\\..*", "re:layers.(0|1).mlp", "re:layers\\.1[0-9]\\..*"])
def test_patterns_over_layer_numbers_are_refused(pattern: str) -> None:
    with pytest.raises(RefusedError, match="list them one by one"):
        layer_renumberer("model.layers", SOURCES)({"ignore": [pattern]})
