"""What the engine holds beside the weights: never more than it may, and as much as its account says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from engine_requests import multiple_choice, plainly
from families import tiny_config, tiny_model
from layerprune.architecture import read_architecture
from layerprune.artifacts import ModelRef
from layerprune.data.items import Request
from layerprune.errors import ModelError, UsageError
from layerprune.formatting import parse_size, rounded_up
from layerprune.models.model import LoadedModel
from layerprune.removal import Removal
from layerprune.scoring import engine as module
from layerprune.scoring.engine import Engine
from layerprune.scoring.memory import Allowance
from layerprune.scoring.walk import traffic


class Held(TorchDispatchMode):
    """The most bytes of tensors made in the context that were alive at once: looked up after every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        given = {leaf.untyped_storage()._cdata for leaf in inputs}
        self.alive = {place: kept for place, kept in self.alive.items() if not kept[0].expired()}
        for leaf in tree_leaves(found):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in given | self.alive.keys():
                storage = leaf.untyped_storage()
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return found


def subject_of(kind: str, *, attention: str = "sdpa", dtype: torch.dtype = torch.float32, **changes) -> LoadedModel:
    model = tiny_model(kind, **changes).to(dtype)
    model.set_attn_implementation(attention)
    architecture = read_architecture(tiny_config(kind, **changes))
    ref = ModelRef(id=kind, fingerprint=kind, model_type=kind, layers=architecture.depth, parameters=1)
    return LoadedModel(model, None, architecture, ref)  # type: ignore[arg-type]  # no text is read here


def eval_set(count: int, head: int = 0) -> tuple[list[Request], list[list[int]]]:
    requests, groups = multiple_choice(90, count)
    return [Request((*range(3, 3 + head), *request.tokens), request.scored) for request in requests], groups


def letters(count: int) -> tuple[list[Request], list[list[int]]]:
    """Questions whose answers are one token each: their rows are no trees."""
    requests, groups = eval_set(count)
    asked = [requests[group[0]].tokens[: -requests[group[0]].scored] for group in groups]
    return (
        [Request((*tokens, answer), 1) for tokens in asked for answer in (5, 6, 7)],
        [list(range(3 * number, 3 * number + 3)) for number in range(count)],
    )


def menus(count: int, answers: int = 80) -> tuple[list[Request], list[list[int]]]:
    """Short questions with many answers of one token: what is found under all removals is most of what is held."""
    requests = [Request((5 + number, 7, 9, answer), 1) for number in range(count) for answer in range(3, 3 + answers)]
    return requests, [list(range(answers * number, answers * (number + 1))) for number in range(count)]


def pairs(depth: int) -> list[Removal]:
    return [Removal.of(one, other) for one in range(depth) for other in range(one + 1, depth)]


def least(loaded, requests, groups) -> int:
    """Return what the refusal of a single byte names as enough."""
    with pytest.raises(UsageError, match="--memory 1 B does not hold one item under one removal") as refused:
        Engine(loaded, memory=1).measure(requests, groups, [Removal.of(1)])
    return parse_size(str(refused.value).rpartition(" is ")[2], "")


# What makes one part of the account large: nothing, scores, logits, an MLP, windows, experts, padding.
MODELS = {
    "llama": ("llama", {}),
    "scores": ("llama", {"attention": "eager"}),
    "logits": ("llama", {"vocab_size": 3000}),
    "mlp": ("llama", {"intermediate_size": 500}),
    "half": ("llama", {"dtype": torch.bfloat16}),
    "windows": ("gemma3_text", {}),
    "experts": ("mixtral", {}),
    "convolution": ("lfm2", {"layer_types": ["conv", "conv", "full_attention"] * 2}),
    "chunks": ("qwen3_next", {}),  # a row is padded to a multiple of 64 tokens
    "fused": ("gpt_neox", {}),  # values are a part of what holds queries and keys, too
}


ASKED = {
    "four": eval_set(4),
    "ten": eval_set(10),
    "beginning": eval_set(6, 70),
    "letters": letters(12),
    "menus": menus(20),
}
# Rows within a window of eight tokens are given no mask, and the account's trials are wider: it says more than is held.
TRIALS_BEYOND_THE_WINDOW = {("windows", "menus"), ("experts", "menus")}


@pytest.mark.parametrize(
    ("model", "asked"),
    [(model, asked) for model in MODELS for asked in ASKED if (model, asked) not in TRIALS_BEYOND_THE_WINDOW],
)
def test_the_account_is_what_is_held(model, asked, monkeypatch):
    """Over tokens x removals, on the path that is taken, with nothing kept for later rounds."""
    monkeypatch.setattr(module, "KEPT_SHARE", 0.0)
    kind, changes = MODELS[model]
    loaded = subject_of(kind, **changes)
    requests, groups = ASKED[asked]
    engine = Engine(loaded)
    engine.choose_path(requests, groups)
    engine.path.read = None
    longest = max(len(request.tokens) - 1 for request in requests)
    run, accounts, allowance = engine.path.run, [], Allowance(engine.path, engine.memory, 0.0, longest)
    allowance.check(engine.path.layout(requests, groups, allowance.longest_row))  # what it tries is tried before

    def noted(batch, removals):
        accounts.append(allowance.need(batch, allowance.states_of(removals)))
        return run(batch, removals)

    monkeypatch.setattr(engine.path, "run", noted)
    depth = len(loaded.layers)
    for removals in ([Removal.of(1)], [Removal.of(layer) for layer in range(depth)], pairs(depth)):
        engine.path.read = None
        accounts.clear()
        with Held() as held:
            engine.measure(requests, groups, removals)
        assert held.peak <= max(accounts) <= 1.1 * held.peak


@pytest.mark.parametrize(
    ("model", "head"),
    [("llama", 0), ("llama", 70), ("gpt_neox", 70), ("scores", 0), ("logits", 0), ("windows", 0)],
)
def test_never_more_is_held_than_is_allowed(model, head):
    """The self-test and what is kept for later rounds counted, down to the least that holds one item."""
    kind, changes = MODELS.get(model, (model, {}))
    loaded = subject_of(kind, **changes)
    requests, groups = eval_set(8, head)
    removals = [Removal(()), *(Removal.of(layer, 5) for layer in range(5))]
    enough = least(loaded, requests, groups)
    expected = plainly(loaded, requests, removals)
    for memory in (enough, 3 * enough):
        with Held() as held:
            sums, _ = Engine(loaded, memory=memory).measure(requests, groups, removals)
        assert held.peak <= memory
        np.testing.assert_allclose(sums, expected, atol=2e-4)
    with pytest.raises(UsageError, match="the least that does"):
        Engine(loaded, memory=int(0.97 * enough)).measure(requests, groups, removals)


def test_a_fixed_number_of_rows_stays_within_the_memory():
    loaded = subject_of("llama", attention="eager")
    requests, groups = eval_set(12)
    memory = 2 * least(loaded, requests, groups)
    with Held() as held:
        Engine(loaded, rows=50, memory=memory).measure(requests, groups, pairs(len(loaded.layers)))
    assert held.peak <= memory


def test_a_batch_is_the_same_whatever_is_measured_beside_it_when_memory_is_short():
    loaded = subject_of("llama")
    requests, groups = eval_set(8)
    memory = 4 * least(loaded, requests, groups)
    removals = pairs(len(loaded.layers))
    together, _ = Engine(loaded, memory=memory).measure(requests, groups, removals)
    for number in (0, 7, 14):
        alone, _ = Engine(loaded, memory=memory).measure(requests, groups, [removals[number]])
        assert (alone[0] == together[number]).all()


def test_traffic_counts_what_a_walk_holds():
    none, first, last = frozenset(), frozenset({0}), frozenset({2})
    assert traffic(3, (none,)).runs == (1, 1, 1)
    assert traffic(3, (none,)).alive == (1, 2, 2, 2)  # the embeddings, and the state
    assert traffic(3, (none, first, last)).runs == (1, 2, 2)
    # behind layer 0 two states, one the embeddings themselves; at the end three, and the embeddings
    assert traffic(3, (none, first, last)).alive == (2, 2, 4, 4)


@pytest.mark.parametrize("size", [1, 999, 1000, 1001, 123_456, 999_999, 1_234_567, 99_950_001, 10**10 + 1, 10**13 + 1])
def test_a_size_that_is_advised_is_enough(size):
    assert size <= parse_size(rounded_up(size), "") <= size * 1.01


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()])
def test_a_self_test_that_runs_out_of_memory_is_repeated_in_smaller_pieces(monkeypatch, error):
    from layerprune.scoring.paths import TreePath

    loaded = subject_of("llama")
    requests, groups = eval_set(12)
    run, refused = TreePath.run, []

    def crowded(self, batch, removals):
        if len(batch) > 1 and len(removals) > 1:
            refused.append(len(batch))
            raise error
        if len(removals) > 2:
            raise error
        return run(self, batch, removals)

    monkeypatch.setattr(TreePath, "run", crowded)
    engine = Engine(loaded)
    removals = [Removal.of(layer) for layer in range(6)]
    sums, _ = engine.measure(requests, groups, removals)
    assert refused
    assert engine.path.name == "trees", engine.remarks
    np.testing.assert_allclose(sums, plainly(loaded, requests, removals), atol=2e-4)


def test_without_room_for_a_single_row_the_run_ends_and_says_so(monkeypatch):
    from layerprune.scoring.paths import PlainPath

    def full(self, batch, removals):
        if max(row.length for row in batch) > 16:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return run(self, batch, removals)

    loaded = subject_of("llama")
    run = PlainPath.run
    monkeypatch.setattr(PlainPath, "run", full)
    with pytest.raises(ModelError, match=r"a single row of \d+ tokens does not fit"):
        Engine(loaded).measure(*eval_set(6), [Removal.of(1)])
