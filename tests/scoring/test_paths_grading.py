"""Grading of answers: it never waits for the device, and of equally likely tokens the first is the greedy one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine_requests import multiple_choice, plainly, tiny_loaded
from families import tiny_config, tiny_model
from layerprune.architecture import read_architecture
from layerprune.data.items import Request
from layerprune.models.model import LoadedModel
from layerprune.removal import Removal
from layerprune.scoring import paths
from layerprune.scoring.paths import BeginningPath, ChainPath, TreePath

# What makes the host wait: a number or a size that depends on values, or a comparison.
WAITS = ("aten._local_scalar_dense", "aten.nonzero", "aten.is_nonzero", "aten.equal", "aten.masked_select")


class Waits(TorchDispatchMode):
    """Counts the operations that make the host wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += str(func).startswith(WAITS)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["llama", "gemma3", "mixtral"])
@pytest.mark.parametrize("path", [ChainPath, TreePath, BeginningPath])
def test_the_host_waits_as_often_whatever_the_removals(kind, path):
    loaded = tiny_loaded(kind)
    requests, groups = multiple_choice(loaded.vocabulary, count=12)
    depth = len(loaded.layers)
    removals = [Removal.of(one, other) for one in range(depth) for other in range(one + 1, depth)]
    made = path(loaded)
    made.piece = 5
    rows = made.layout(requests, groups)
    rows = [row for row in rows if row.beginning == rows[0].beginning]
    waited = []
    for count in (1, 3, len(removals)):
        with Waits() as waits:
            made.run(rows, removals[:count])
        waited.append(waits.count)
    assert len(set(waited)) == 1
    assert waited[0] <= 2  # for the masks that a model makes of its own inputs


def test_a_wait_is_counted():
    with Waits() as waits:
        torch.nonzero(torch.ones(3))
        float(torch.ones(1))
    assert waits.count == 2


@pytest.mark.parametrize("path", [ChainPath, TreePath])
def test_of_equal_logits_the_first_token_is_the_greedy_one(path):
    """Two tokens with the same embedding have the same logit everywhere; argmax, as lm-eval has it, names the first."""
    loaded = tiny_loaded("llama")
    requests, _ = multiple_choice(loaded.vocabulary)
    context = requests[-1].tokens[:-1]
    best = int(loaded.model(input_ids=torch.tensor([context])).logits[0, -1].argmax())
    head = loaded.model.get_output_embeddings().weight
    twin = best + 1 if best + 1 < len(head) else best - 1
    with torch.no_grad():
        head[twin] = head[best]
    asked = [Request((*context, token), 1) for token in (best, twin)]
    made = path(loaded)
    members, (sums, greedy) = made.run(made.layout(asked, [[0, 1]]), [Removal(())])
    found = dict(zip(members, zip(sums[0], greedy[0], strict=True), strict=True))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-6)
    assert [found[0][1], found[1][1]] == ([1, 0] if best < twin else [0, 1])


def test_pieces_of_the_head_change_nothing():
    """Answers of several tokens, some read at one place, cut into pieces at every place there is."""
    loaded = tiny_loaded("llama")
    requests, groups = multiple_choice(loaded.vocabulary, count=4)
    removals = [Removal(()), Removal.of(1), Removal.of(0, 3)]
    expected = plainly(loaded, requests, removals)
    for piece in (1, 2, 3, 7, 1000):
        path = TreePath(loaded)
        path.piece = piece
        members, (sums, greedy) = path.run(path.layout(requests, groups), removals)
        np.testing.assert_allclose(sums, expected[:, members], atol=2e-4)
        assert greedy.shape == sums.shape


def test_a_head_that_looks_at_masks_is_given_none():
    loaded = tiny_loaded("llama")
    assert ChainPath(loaded).walk.masked_head
    requests, groups = multiple_choice(loaded.vocabulary)
    removals = [Removal.of(1)]
    expected = plainly(loaded, requests, removals)
    forward = loaded.model.forward

    def other(*args, attention_mask=None, **kwargs):
        found = forward(*args, attention_mask=attention_mask, **kwargs)
        if attention_mask is not None:
            found.logits = found.logits + torch.arange(found.logits.shape[-1])
        return found

    loaded.model.forward = other
    path = ChainPath(loaded)
    assert not path.walk.masked_head
    members, (sums, _) = path.run(path.layout(requests, groups), removals)
    np.testing.assert_allclose(sums, expected[:, members], atol=2e-4)


@pytest.mark.parametrize("path", [ChainPath, TreePath])
def test_a_head_behind_a_projection_is_given_what_leaves_the_layers(path):
    """OPT-350m: the stack is wider than the embeddings that head and input share."""
    loaded = LoadedModel(tiny_model("opt", word_embed_proj_dim=16).eval(), None, None, None)
    assert loaded.model.get_output_embeddings().weight.shape[1] == 16
    loaded.architecture = read_architecture(tiny_config("opt", word_embed_proj_dim=16))
    requests, groups = multiple_choice(loaded.vocabulary)
    removals = [Removal(()), Removal.of(1)]
    made = path(loaded)
    members, (sums, _) = made.run(made.layout(requests, groups), removals)
    np.testing.assert_allclose(sums, plainly(loaded, requests, removals)[:, members], atol=2e-4)


def test_parts_that_a_cache_holds_change_nothing(monkeypatch):
    loaded = tiny_loaded("llama")
    requests, groups = multiple_choice(loaded.vocabulary, count=12)
    removals = [Removal.of(1), Removal.of(0, 2)]
    found = []
    for rows in (1, 2, 5, 10**6):
        monkeypatch.setattr(paths, "CACHE_BYTES", 4 * loaded.vocabulary * rows)
        path = TreePath(loaded)
        path.piece = 7
        found.append(path.run(path.layout(requests, groups), removals))
    for members, (sums, greedy) in found[1:]:
        assert members == found[0][0]
        np.testing.assert_allclose(sums, found[0][1][0], atol=1e-5)
        np.testing.assert_array_equal(greedy, found[0][1][1])
    np.testing.assert_allclose(found[0][1][0], plainly(loaded, requests, removals)[:, found[0][0]], atol=2e-4)
