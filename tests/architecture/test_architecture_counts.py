"""Parameters are counted one way everywhere: those of the model in memory, each once; bytes are those export writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import audit_tiny
from cli_tiny import done
from families import FAMILIES, make_plan, save_tiny, tiny_config
from layerprune.architecture import build_on_meta, read_architecture
from layerprune.artifacts import Plan
from layerprune.checkpoint import Checkpoint
from layerprune.errors import DocumentError
from layerprune.exporter import export, weigh
from layerprune.exporter.proof import rebuilt
from layerprune.inspection import inspect_model
from layerprune.models.model import LoadedModel
from layerprune.removal import Removal
from zoo import refusal, trials


@pytest.fixture(scope="module")
def stored_twice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model with tied embeddings whose head is on disk, too, as merges leave it."""
    folder = audit_tiny.base_model(tmp_path_factory.mktemp("twice") / "base")
    save_tiny("gemma", folder, vocab_size=260, bos_token_id=256, eos_token_id=257, pad_token_id=257)
    tensors = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_head_that_is_stored_twice_counts_once_in_every_document(stored_twice: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(stored_twice)
    whole = model.num_parameters()
    assert Checkpoint.open(stored_twice).parameters == whole + 260 * 32
    assert inspect_model(str(stored_twice)).parameters == whole
    assert LoadedModel.load(str(stored_twice), device="cpu").ref.parameters == whole
    layer = sum(weight.numel() for weight in model.model.layers[0].parameters())
    wanted = whole - 2 * layer
    said = done("plan", stored_twice, "--metric", "random", "-o", tmp_path / "run", "--target-params", wanted).stdout
    plan = Plan.load(tmp_path / "run" / "plan.json")
    assert plan.model.parameters == plan.target.base == whole  # type: ignore[union-attr]
    assert len(plan.removal) == 2
    assert f"target: {wanted:,} parameters of {whole:,}" in said
    receipt = export(plan, tmp_path / "out")
    assert receipt.result.parameters == wanted
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").num_parameters() == wanted
    assert f"| parameters | {whole:,} | {wanted:,} |" in (tmp_path / "out" / "README.md").read_text()


def test_bytes_are_those_of_the_files_written_the_second_copy_among_them(stored_twice: Path, tmp_path: Path) -> None:
    (weight,) = weigh(stored_twice, [Removal.of(2)])
    receipt = export(make_plan(stored_twice, Removal.of(2)), tmp_path / "out")
    written = Checkpoint.open(tmp_path / "out")
    assert "lm_head.weight" in written.tensors
    assert weight.nbytes == receipt.bytes_after == written.nbytes
    assert weight.nbytes == 4 * (weight.parameters + 260 * 32)


def test_a_plan_that_counts_what_is_stored_is_not_of_this_model(stored_twice: Path, tmp_path: Path) -> None:
    plan = make_plan(stored_twice, Removal.of(2))
    stored = plan.model.model_copy(update={"parameters": plan.model.parameters + 260 * 32})
    with pytest.raises(DocumentError, match=f"with {stored.parameters} parameters, but .* {plan.model.parameters} par"):
        export(plan.model_copy(update={"model": stored}), tmp_path / "out")


@pytest.mark.parametrize("model_type", [*FAMILIES, "gemma3n_text", "zamba2", "longcat_flash"])
def test_what_a_removal_leaves_is_what_the_pruned_model_has(model_type: str) -> None:
    """For plain layers, experts, per-layer embeddings outside the stack, and blocks that layers share."""
    config = tiny_config(model_type)
    architecture = read_architecture(config)
    assert architecture.parameters() == _parameters(config)
    tried = [removal for removal in trials(architecture) if not refusal(architecture, removal)]
    for removal in tried:
        pruned = rebuilt(config, architecture.prune_config(config.to_diff_dict(), removal))
        assert architecture.parameters(removal) == _parameters(pruned), removal
    assert tried


def _parameters(config: object) -> int:
    tensors = build_on_meta(config).state_dict(keep_vars=True).values()  # type: ignore[arg-type]
    return sum({id(tensor): tensor.numel() for tensor in tensors}.values())


def test_a_parameter_that_layers_share_counts_while_one_of_them_is_left() -> None:
    from layerprune.architecture import LayerMap
    from layerprune.architecture.architecture import count

    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList(torch.nn.Linear(2, 2, bias=False) for _ in range(4))
    model.layers[3].weight = model.layers[1].weight
    found = count(model, "layers")
    left = [found.after(LayerMap.after(Removal.of(*units), 4)) for units in ((), (1,), (3,), (1, 3), (0,))]
    assert left == [12, 12, 12, 8, 8]
