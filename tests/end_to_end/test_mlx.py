"""What mlx-lm reads of a pruned checkpoint is what transformers reads: the same logits.

Run by ``make engines``. Without mlx-lm they fail: a reader that was not asked says nothing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from families import make_plan, save_tiny
from layerprune.architecture import load_config, read_architecture
from layerprune.exporter import export
from layerprune.exporter.proof import load
from layerprune.removal import Removal

pytestmark = pytest.mark.engines

FULL, SLIDING = "full_attention", "sliding_attention"
THETA = {"rope_type": "default", "rope_theta": 500.0}  # far from what readers take where they find none
PARTIAL = {**THETA, "partial_rotary_factor": 0.5}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
GEMMA3 = {
    "num_hidden_layers": 12, "sliding_window": 8,
    "rope_parameters": {FULL: {"rope_type": "linear", "factor": 4.0, "rope_theta": 2000.0}, SLIDING: THETA},
}  # fmt: skip
# Heads as wide as mlx-lm's kernel for linear attention on the CPU wants them.
QWEN = {"num_hidden_layers": 8, "rope_parameters": {**THETA, "partial_rotary_factor": 0.25}, "head_dim": 16,
        "linear_key_head_dim": 32, "linear_value_head_dim": 32}  # fmt: skip
COHERE2 = {"num_hidden_layers": 8, "sliding_window": 8, "rope_parameters": THETA}
EXAONE4 = {
    "num_hidden_layers": 8, "head_dim": 8, "sliding_window": 8, "rope_parameters": THETA,
    "sliding_window_pattern": "LLLG", "layer_types": [*[SLIDING] * 3, FULL] * 2,
}  # fmt: skip
OLMO3 = {"num_hidden_layers": 8, "sliding_window": 8, "rope_parameters": {FULL: LLAMA3, SLIDING: THETA}}

CASES: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "llama": ("llama", {"rope_parameters": THETA}, (1, 4)),
    "llama with llama3 scaling": ("llama", {"rope_parameters": LLAMA3}, (1, 4)),
    "gpt_neox": ("gpt_neox", {"intermediate_size": 128, "rope_parameters": PARTIAL}, (1, 4)),
    "gemma3_text, another period": ("gemma3_text", GEMMA3, (3, 8)),
    "gemma3_text, the same period": ("gemma3_text", GEMMA3, (0, 1, 2, 3, 4, 5)),
    "gemma3": ("gemma3", {"text_config": GEMMA3}, (3, 8)),
    "qwen3_next, another period": ("qwen3_next", QWEN, (1, 5)),
    "qwen3_next, the same period": ("qwen3_next", QWEN, (4, 5, 6, 7)),
    "exaone4, in letters": ("exaone4", EXAONE4, (0,)),
    "olmo3": ("olmo3", OLMO3, (1, 4)),
    "cohere2, another period": ("cohere2", COHERE2, (1, 5)),
    "cohere2, the same period": ("cohere2", COHERE2, (4, 5, 6, 7)),
}


def both(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits of transformers and of mlx-lm, (1, tokens, vocabulary)."""
    import mlx.core as mx
    import numpy as np
    from mlx_lm.utils import load_model

    tokens = torch.randint(3, 90, (1, 40), generator=torch.Generator().manual_seed(0))
    model, _ = load(folder, trust_remote_code=False)
    with torch.no_grad():
        ours = model(tokens, use_cache=False).logits.float()
    other, _ = load_model(folder)
    theirs = other(mx.array(tokens.numpy()))
    return ours, torch.from_numpy(np.array(theirs.astype(mx.float32)))


@pytest.mark.parametrize("case", CASES)
def test_mlx_lm_reads_a_pruned_checkpoint_as_transformers_does(case: str, tmp_path: Path) -> None:
    model_type, changes, units = CASES[case]
    base = save_tiny(model_type, tmp_path / "base", **changes)
    if model_type == "gemma3":  # mlx-lm takes the size of the vocabulary from outside text_config
        content = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({**content, "vocab_size": content["text_config"]["vocab_size"]}))
    removal = Removal.of(*units)
    assert not [
        said for said in read_architecture(load_config(str(base))).misread(removal) if said.startswith("mlx-lm")
    ]
    export(make_plan(base, removal), tmp_path / "out")
    ours, theirs = both(tmp_path / "out")
    assert (ours - theirs).abs().max() < 1e-3 * ours.abs().max()


def out_of_step(model_type: str, changes: dict[str, Any], folder: Path) -> Path:
    """Return a checkpoint of which a plan says that mlx-lm misreads it."""
    base = save_tiny(model_type, folder / "base", **changes)
    removal = Removal.of(1)
    assert [said for said in read_architecture(load_config(str(base))).misread(removal) if said.startswith("mlx-lm")]
    export(make_plan(base, removal), folder / "out")
    return folder / "out"


@pytest.mark.parametrize(("model_type", "changes"), [("gemma3_text", GEMMA3), ("cohere2", COHERE2)])
def test_mlx_lm_does_misread_what_the_plan_warns_of(model_type: str, changes: dict[str, Any], tmp_path: Path) -> None:
    ours, theirs = both(out_of_step(model_type, changes, tmp_path))
    assert (ours - theirs).abs().max() > 1e-2 * ours.abs().max()


def test_mlx_lm_does_not_load_what_the_plan_warns_of(tmp_path: Path) -> None:
    out = out_of_step("qwen3_next", QWEN, tmp_path)
    with pytest.raises(ValueError, match="parameters"):
        both(out)


def test_mlx_lm_would_read_another_model_without_the_older_names(tmp_path: Path) -> None:
    """That the comparison above sees a wrong rotary embedding."""
    base = save_tiny("llama", tmp_path / "base", rope_parameters=THETA)
    assert "rope_theta" not in json.loads((base / "config.json").read_text())
    ours, theirs = both(base)
    assert (ours - theirs).abs().max() > 1e-2 * ours.abs().max()


def test_mlx_lm_knows_the_words_of_the_file(tmp_path: Path) -> None:
    """Granite's hybrids as published: "mamba" and "attention", where transformers 5 has other words."""
    base = save_tiny("granitemoehybrid", tmp_path / "base", rope_parameters=THETA, position_embedding_type="rope")
    content = json.loads((base / "config.json").read_text())
    words = ["attention" if kind == FULL else "mamba" for kind in content["layer_types"]]
    (base / "config.json").write_text(json.dumps({**content, "layer_types": words}))
    export(make_plan(base, Removal.of(0)), tmp_path / "out")
    ours, theirs = both(tmp_path / "out")
    assert (ours - theirs).abs().max() < 1e-3 * ours.abs().max()
