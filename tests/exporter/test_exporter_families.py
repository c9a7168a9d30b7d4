"""Each family, exported and reloaded by stock transformers: the same logits as the base with those layers bypassed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from families import FAMILIES, make_plan, save_tiny
from layerprune.architecture import load_config, read_architecture
from layerprune.exporter import export
from layerprune.models.bypass import bypassed
from layerprune.removal import Removal

REMOVALS = {"one": (2,), "several": (1, 3, 4), "first": (0,), "last": (5,)}


@pytest.fixture(scope="module", params=FAMILIES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(request.param, tmp_path_factory.mktemp(request.param) / "base")


@pytest.mark.parametrize("units", REMOVALS.values(), ids=REMOVALS)
def test_reloaded_equals_bypassed_base(base: Path, units: tuple[int, ...], tmp_path: Path) -> None:
    removal = Removal.of(*units)
    receipt = export(make_plan(base, removal), tmp_path / "out")

    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert {key: set(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")} == {
        "missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set(),
    }  # fmt: skip
    model.eval()
    tokens = torch.arange(3, 35).view(2, 16)
    intact = AutoModelForCausalLM.from_pretrained(base).eval()
    architecture = read_architecture(load_config(str(base)))
    layers = list(intact.get_submodule(architecture.stack))
    with torch.no_grad():
        whole = intact(tokens, use_cache=False).logits
        with bypassed(intact, layers, removal):
            expected = intact(tokens, use_cache=False).logits
        actual = model(tokens, use_cache=False).logits
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    assert (whole - expected).abs().max() > 1e-3, "the removed layers did nothing, so this test shows nothing"
    assert receipt.proof is not None
    assert receipt.proof.max_difference <= 1e-5
    assert receipt.result.layers == architecture.depth - len(units)

    common = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = model.generate(tokens, use_cache=True, **common)
    assert torch.equal(cached, model.generate(tokens, use_cache=False, **common))
    assert cached.shape == (2, 22)
