"""A view of a model without some layers: the base model's own tensors, the smaller model's logits and texts."""

from __future__ import annotations

import pytest
import torch

from families import FAMILIES, tiny_model
from layerprune.architecture import read_architecture
from layerprune.errors import RefusedError
from layerprune.models.bypass import pruned_view
from layerprune.removal import Removal
from metric_tiny import logits, subject_of

IDS = (5, 9, 11, 3, 7, 8)


@pytest.mark.parametrize("kind", [*FAMILIES, "lfm2", "qwen3_next", "granitemoehybrid"])
def test_a_view_writes_with_a_cache_what_the_bypassed_model_writes_without(kind):
    loaded = subject_of(kind)
    removal = Removal.of(1)
    before = logits(loaded, IDS)
    view = pruned_view(loaded.model, loaded.architecture, removal)
    ids = list(IDS)
    for _ in range(6):
        ids.append(int(logits(loaded, ids, gone=(1,))[-1].argmax()))
    prompt = torch.tensor([IDS])
    found = view.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    assert found[0].tolist() == ids
    assert torch.equal(logits(loaded, IDS), before), "the base model is as it was"


def test_a_view_has_no_tensor_of_its_own():
    loaded = subject_of("gemma3_text")
    view = pruned_view(loaded.model, loaded.architecture, Removal.of(0, 3))
    own = {tensor.data_ptr() for tensor in (*loaded.model.parameters(), *loaded.model.buffers())}
    shared = [tensor.data_ptr() for tensor in (*view.parameters(), *view.buffers())]
    assert shared
    assert set(shared) <= own
    assert view.config.num_hidden_layers == loaded.model.config.num_hidden_layers - 2
    kinds = loaded.model.config.layer_types
    assert view.config.layer_types == [kind for layer, kind in enumerate(kinds) if layer not in (0, 3)]


def test_a_model_whose_cache_does_not_follow_is_refused_with_what_went_wrong():
    model = tiny_model("mamba").eval()
    with pytest.raises(RefusedError, match=r"does not generate with a cache in memory: .*past_key_values"):
        pruned_view(model, read_architecture(model.config), Removal.of(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_that_computes_by_its_number_is_refused(dtype):
    """In a view a layer's number is that of its cache entry, so what it computes by it changes."""
    loaded = subject_of("llama", dtype)

    def scaled(attention, _, output):
        return (output[0] * (1 + attention.layer_idx / 4), *output[1:])

    for layer in loaded.layers:
        layer.self_attn.register_forward_hook(scaled)
    with pytest.raises(RefusedError, match="logits differ"):
        pruned_view(loaded.model, loaded.architecture, Removal.of(1))
