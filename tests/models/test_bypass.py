"""Bypassing in place: the same as weights that do nothing, and gone when the block ends."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from families import tiny_model
from layerprune.architecture import find_stack
from layerprune.errors import UsageError
from layerprune.models.bypass import bypassed
from layerprune.removal import Removal

TOKENS = torch.arange(3, 35).view(2, 16)


def stack_of(model: nn.Module) -> list[nn.Module]:
    return list(model.get_submodule(find_stack(model, model.config)))


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


@pytest.fixture
def llama() -> Iterator[nn.Module]:
    model = tiny_model("llama")
    before = logits(model)
    yield model
    assert torch.equal(logits(model), before), "the model was not put back as it was"
    assert not any("forward" in vars(module) for module in model.modules())


def silence(model: nn.Module, *gone: int) -> None:
    """Make layers add nothing, by their weights: the slow, obvious way."""
    layers = stack_of(model)
    for index in gone:
        nn.init.zeros_(layers[index].mlp.down_proj.weight)
        nn.init.zeros_(layers[index].self_attn.o_proj.weight)


@pytest.mark.parametrize("gone", [(2,), (0, 5), (1, 2), ()])
def test_equals_weights_that_do_nothing(llama: nn.Module, gone: tuple[int, ...]) -> None:
    reference = tiny_model("llama")
    silence(reference, *gone)
    with bypassed(llama, stack_of(llama), Removal.from_layers(gone)):
        torch.testing.assert_close(logits(llama), logits(reference), rtol=0, atol=1e-5)


@pytest.mark.parametrize("model_type", ["gpt2", "bert", "bloom", "rwkv", "zaya", "mixtral", "opt", "xlnet"])
def test_layers_that_answer_with_tuples(model_type: str) -> None:
    """The stand-in answers in the layer's own form, the first time and when it no longer asks the layer."""
    model = tiny_model(model_type)
    layers = stack_of(model)
    before = logits(model)
    with bypassed(model, layers, Removal.of(2, 3)):
        first, second = logits(model), logits(model)
    assert torch.equal(first, second)
    assert not torch.equal(first, before)
    assert torch.equal(logits(model), before)


def test_put_back_after_an_exception(llama: nn.Module) -> None:
    with pytest.raises(KeyError), bypassed(llama, stack_of(llama), Removal.of(1, 2)):
        raise KeyError


def test_blocks_nest(llama: nn.Module) -> None:
    layers = stack_of(llama)
    with bypassed(llama, layers, Removal.of(1, 3)):
        together = logits(llama)
    with bypassed(llama, layers, Removal.of(1)):
        one = logits(llama)
        with bypassed(llama, layers, Removal.of(3)):
            assert torch.equal(logits(llama), together)
        assert torch.equal(logits(llama), one)


def test_hooks_still_run(llama: nn.Module) -> None:
    layers, seen = stack_of(llama), []
    handle = layers[2].register_forward_hook(lambda *args: seen.append("called"))
    with bypassed(llama, layers, Removal.of(2)):
        logits(llama)
    handle.remove()
    assert seen == ["called"]


def test_a_layer_that_does_not_exist(llama: nn.Module) -> None:
    said = "{1, 6} names a layer that does not exist: the model has layers 0 to 5"
    with pytest.raises(UsageError, match=said), bypassed(llama, stack_of(llama), Removal.of(1, 6)):
        pytest.fail("the block must not run")
