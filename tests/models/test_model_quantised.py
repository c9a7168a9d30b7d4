"""Quantised models that transformers can run without a GPU: scored, planned and exported like any other.

The oracle is the same model with its weights unpacked by hand into an ordinary checkpoint.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import cli_tiny
from cli_tiny import done, last_line
from layerprune.artifacts import Plan, Receipt, Scores

BLOCK, GROUP = 16, 8
KEPT = "model.layers.4.self_attn.q_proj"  # stays as it is
Tensors = dict[str, torch.Tensor]
Packed = tuple[Tensors, torch.Tensor]  # what stands in the file, and the weight that it means


def fp8(weight: torch.Tensor) -> Packed:
    rows, columns = weight.shape
    blocks = weight.view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK)
    scale = blocks.abs().amax((1, 3), keepdim=True) / 448  # the largest float8_e4m3fn
    packed = (blocks / scale).to(torch.float8_e4m3fn)
    parts = {"weight": packed.view(rows, columns), "weight_scale_inv": scale.view(rows // BLOCK, columns // BLOCK)}
    return parts, (packed.float() * scale).view(rows, columns)


def int4(weight: torch.Tensor) -> Packed:
    """As compressed-tensors packs it: eight numbers from -8 to 7, moved to 0 to 15, in an int32, lowest bits first."""
    rows, columns = weight.shape
    groups = weight.view(rows, columns // GROUP, GROUP)
    scale = groups.abs().amax(2, keepdim=True) / 7
    numbers = (groups / scale).round().clamp(-8, 7)
    nibbles = (numbers.view(rows, columns // 8, 8) + 8).long() << torch.arange(0, 32, 4)
    parts = {
        "weight_packed": nibbles.sum(2).to(torch.int32),
        "weight_scale": scale.view(rows, -1),
        "weight_shape": torch.tensor([rows, columns]),
    }
    return parts, (numbers * scale).view(rows, columns)


KINDS: dict[str, tuple[Callable[[torch.Tensor], Packed], dict[str, Any]]] = {
    "fp8": (fp8, {
        "quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "modules_to_not_convert": ["lm_head", KEPT],
    }),
    "compressed-tensors": (int4, {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "ignore": ["lm_head", KEPT], "config_groups": {"group_0": {"targets": ["Linear"], "weights": {
            "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}}},
    }),
}  # fmt: skip


def quantise(kind: str, base: Path, packed: Path, plain: Path) -> None:
    """Write a model twice: packed, and as an ordinary model with the weights that the packed one means."""
    pack, settings = KINDS[kind]
    small, meant = Tensors(), Tensors()
    for name, weight in load_file(base / "model.safetensors").items():
        small[name] = meant[name] = weight
        if weight.ndim == 2 and ".layers." in name and not name.startswith(KEPT):
            parts, meant[name] = pack(small.pop(name))
            small.update({f"{name.removesuffix('weight')}{part}": value.contiguous() for part, value in parts.items()})
    for folder, tensors, more in ((packed, small, {"quantization_config": settings}), (plain, meant, {})):
        folder.mkdir()
        for path in base.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((base / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **more}))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cli_tiny.make(tmp_path_factory.mktemp("quantised"))


def plan(home: Path, model: Path, run: Path) -> Scores:
    # Layer 4 stays, and with it the weight that is not quantised: its path has to follow it to another number.
    tasks = ["--tasks", "toy", "--include-path", home / "tasks", "--search", "one-shot", "--protect", "3,4,5"]
    done("plan", model, "--metric", "ablation", *tasks, "--drop", 2, "-o", run)
    return Scores.load(run / "scores.json")


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_the_weights_that_are_meant(home: Path, tmp_path: Path, kind: str) -> None:
    if kind == "compressed-tensors":
        pytest.importorskip("compressed_tensors")
    quantise(kind, home / "base", tmp_path / "packed", tmp_path / "plain")
    found, expected = (plan(home, tmp_path / name, tmp_path / f"{name}-run") for name in ("packed", "plain"))
    original = plan(home, home / "base", tmp_path / "run")
    for own, other in zip(found.rounds[0].candidates, expected.rounds[0].candidates, strict=True):
        assert own.removal == other.removal
        assert own.tasks["toy"].outcomes.correct == other.tasks["toy"].outcomes.correct
        probabilities = [candidate.tasks["toy"].outcomes.gold_probability for candidate in (own, other)]
        assert probabilities[0] == pytest.approx(probabilities[1], abs=1e-4)
    assert found.base["toy"].gold_probability != pytest.approx(original.base["toy"].gold_probability, abs=1e-5)

    done("export", tmp_path / "packed-run" / "plan.json", "-o", tmp_path / "out")
    receipt = Receipt.load(tmp_path / "out" / "layerprune" / "receipt.json")
    assert receipt.removal == Plan.load(tmp_path / "plain-run" / "plan.json").removal
    assert receipt.proof is not None
    assert (receipt.proof.method, receipt.proof.max_difference) == ("whole models", 0)
    assert receipt.notes == ()
    written = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert "model.layers.2.self_attn.q_proj" in written.get("ignore", written.get("modules_to_not_convert"))


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_what_cannot_run_here_is_one_line(home: Path, tmp_path: Path, method: str) -> None:
    """Kernels for these need a GPU; such a model can be exported by a plan from elsewhere, and says so when scored."""
    model = tmp_path / method
    shutil.copytree(home / "base", model)
    config = json.loads((model / "config.json").read_text())
    settings = {"quant_method": method, "bits": 4, "group_size": 16}
    (model / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    said = last_line("score", model, "--metric", "reverse-order", "-o", tmp_path / "run")
    assert said.startswith(f"{model} cannot be loaded: ")
    assert said.endswith(f"its weights are quantised ({method}), which may take a package or a device that is not here")


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes(home: Path, tmp_path: Path, bits: int) -> None:
    """Where bitsandbytes is installed, which the tests do not ask for: it is large."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from families import save_tiny

    base = save_tiny("llama", tmp_path / "base", vocab_size=260, hidden_size=64, head_dim=16, intermediate_size=128)
    settings = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    model = AutoModelForCausalLM.from_pretrained(base, quantization_config=settings, device_map="cpu")
    model.save_pretrained(tmp_path / "packed")
    for path in (home / "base").glob("tokenizer*"):
        (tmp_path / "packed" / path.name).write_bytes(path.read_bytes())
    common = ["--tasks", "toy", "--include-path", home / "tasks", "--drop", 2]
    done("plan", tmp_path / "packed", "--metric", "cosine", *common, "-o", tmp_path / "run")
    done("export", tmp_path / "run" / "plan.json", "-o", tmp_path / "out")
    receipt = Receipt.load(tmp_path / "out" / "layerprune" / "receipt.json")
    assert receipt.proof is not None
    assert (receipt.proof.method, receipt.proof.max_difference) == ("whole models", 0)
