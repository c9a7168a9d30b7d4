"""Half-layers: what is left pairs up into ordinary layers, and answers like the base with those halves silenced."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest
import torch
from families import make_plan, save_tiny, tiny_config
from transformers import AutoModelForCausalLM

from layerprune.anatomy import Sources, load_config, read_anatomy
from layerprune.anatomy.halves import split
from layerprune.bypass import bypassed
from layerprune.errors import RefusedError, UsageError
from layerprune.export import export, twin
from layerprune.removal import Removal

MIXED = Removal.of(0.5, 3)


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "olmo2", "glm4", "mixtral", "deepseek_v3", "gpt2", "lfm2"])
def test_half_layers_exported(model_type: str, tmp_path: Path) -> None:
    base = save_tiny(model_type, tmp_path / "base")
    receipt = export(make_plan(base, MIXED), tmp_path / "out")
    assert receipt.proof is not None
    assert receipt.proof.max_difference <= 1e-5
    assert receipt.missing_keys == receipt.unexpected_keys == ()
    assert receipt.result.layers == 4

    intact, model = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (base, tmp_path / "out"))
    tokens = torch.arange(3, 35).view(2, 16)
    layers = list(intact.get_submodule(read_anatomy(load_config(str(base))).stack))
    with torch.no_grad(), bypassed(intact, layers, MIXED):
        torch.testing.assert_close(model(tokens).logits, intact(tokens, use_cache=False).logits, rtol=0, atol=1e-5)
    common = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(model.generate(tokens, **common), model.generate(tokens, use_cache=False, **common))


def test_config_follows_each_half(tmp_path: Path) -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention",
             "sliding_attention"]  # fmt: skip
    config = tiny_config("laguna", layer_types=kinds, mlp_layer_types=["dense", "dense", *["sparse"] * 4])
    fields = json.loads(json.dumps(config.to_dict()))
    new = read_anatomy(config).prune_config(fields, Removal.of(1.5))  # drops the MLP of 1 and the attention of 2
    assert new["layer_types"] == [kinds[layer] for layer in (0, 1, 3, 4, 5)]
    assert new["mlp_layer_types"] == ["dense", "sparse", "sparse", "sparse", "sparse"]


def test_twin_of_half_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = psutil.virtual_memory()._replace(available=1000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    base = save_tiny("qwen3", tmp_path / "base")
    receipt = export(make_plan(base, MIXED), tmp_path / "out")
    assert receipt.proof is not None
    assert (receipt.proof.method, receipt.proof.max_difference) == (twin.METHOD, 0)


@pytest.mark.parametrize(
    ("model_type", "says"),
    [
        ("cohere", "attention and MLP run in parallel"),
        ("gpt_neox", "use_parallel_residual"),
        ("falcon", "parallel_attn"),
        ("phi", "attention and MLP run in parallel"),
        ("bert", "'intermediate' of a layer belongs neither"),
        ("diffllama", "only the last layers can go"),
    ],
)
def test_types_without_halves(model_type: str, says: str) -> None:
    anatomy = read_anatomy(tiny_config(model_type))
    assert not anatomy.halves
    with pytest.raises(RefusedError) as error:
        anatomy.check(Removal.of(1.5))
    assert f"half-layers of a {model_type} model cannot be removed: " in str(error.value)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("children", "attention"),
    [
        ({"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}, {"input_layernorm", "self_attn"}),
        (
            {"input_layernorm", "self_attn", "post_attention_layernorm", "pre_feedforward_layernorm", "mlp",
             "post_feedforward_layernorm"},
            {"input_layernorm", "self_attn", "post_attention_layernorm"},
        ),
        (
            {"self_attn", "post_attention_layernorm", "mlp", "post_feedforward_layernorm"},
            {"self_attn", "post_attention_layernorm"},
        ),
        (
            {"input_layernorm", "self_attn", "post_self_attn_layernorm", "post_attention_layernorm", "mlp",
             "post_mlp_layernorm"},
            {"input_layernorm", "self_attn", "post_self_attn_layernorm"},
        ),
    ],
    ids=["llama", "gemma2", "olmo2", "glm4"],
)  # fmt: skip
def test_norms_go_with_their_half(children: set[str], attention: set[str]) -> None:
    half = split(children).half
    assert {child for child in half if half[child] == "attention"} == attention


def test_sources() -> None:
    assert Sources.after(Removal.of(1.5), 4) == Sources(4, (0, 1, 3), (0, 2, 3))
    assert Sources.after(Removal.of(0, 1.5, 2.5), 4) == Sources(4, (1,), (3,))
    assert Sources.after(Removal.of(2), 4).whole
    with pytest.raises(UsageError, match=r"layer 3\.5 does not exist"):
        Sources.after(Removal.of(3.5), 4)
