"""The fast ways of measuring against the slow, obvious one: an ordinary forward per request and removal."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from engine_requests import multiple_choice, plainly, tiny_loaded
from families import FAMILIES
from layerprune.architecture import read_architecture
from layerprune.artifacts import ModelRef
from layerprune.data.items import Request
from layerprune.models.model import LoadedModel
from layerprune.removal import Removal
from layerprune.scoring.engine import Engine, Trial
from layerprune.scoring.paths import BeginningPath, ChainPath, PlainPath, TreePath


@pytest.mark.parametrize("kind", FAMILIES)
def test_all_removals_at_once_equal_one_plain_forward_each(kind):
    loaded = tiny_loaded(kind)
    depth = len(loaded.layers)
    requests, groups = multiple_choice(loaded.vocabulary)
    removals = [Removal(()), *(Removal.of(layer) for layer in range(depth)), Removal.of(0, depth - 1)]
    engine = Engine(loaded, tokens=64)
    sums, _ = engine.measure(requests, groups, removals)
    np.testing.assert_allclose(sums, plainly(loaded, requests, removals), atol=2e-4)
    assert engine.path.name == "trees", engine.remarks


@pytest.mark.parametrize("kind", FAMILIES)
def test_examples_before_every_question_are_read_once_and_looked_back_at(kind):
    loaded = tiny_loaded(kind)
    depth = len(loaded.layers)
    requests, groups = multiple_choice(loaded.vocabulary, count=4)
    rng = random.Random(1)
    head = [rng.randrange(3, loaded.vocabulary) for _ in range(70)]
    requests = [Request((*head, *request.tokens), request.scored) for request in requests]
    removals = [Removal(()), *(Removal.of(layer) for layer in range(depth)), Removal.of(0, depth - 1)]
    engine = Engine(loaded, tokens=64)
    sums, _ = engine.measure(requests, groups, removals)
    np.testing.assert_allclose(sums, plainly(loaded, requests, removals), atol=2e-4)
    assert engine.path.name == "beginnings", engine.remarks
    states = depth - 1 + depth * (depth - 1) // 2 + depth - 2  # as a walk has them; 0 and last removed: the middle
    tokens = 70 + sum(row.length for row in engine.path.layout(requests, groups))  # those of the examples once
    assert engine.account.computed < 1.6 * states * tokens  # the rest is padding


@pytest.mark.parametrize("path", [TreePath, ChainPath, PlainPath])
def test_each_path_alone_gives_sums_and_greedy_flags(path):
    loaded = tiny_loaded("llama")
    requests, groups = multiple_choice(loaded.vocabulary)
    ids = torch.tensor([requests[0].tokens[:-1]])
    top = int(loaded.model(input_ids=ids).logits[0, -1].argmax())
    requests[0] = Request((*requests[0].tokens[: -requests[0].scored], top), 1)
    ids = torch.tensor([requests[0].tokens[:-1]])
    best = int(loaded.model(input_ids=ids).logits[0, -1].argmax())
    requests[0] = Request((*requests[0].tokens[:-1], best), 1)
    made = path(loaded)
    members, (sums, greedy) = made.run(made.layout(requests, groups), [Removal(())])
    assert sorted(members) == list(range(len(requests)))
    np.testing.assert_allclose(sums[0], plainly(loaded, requests, [Removal(())])[0, members], atol=2e-4)
    assert greedy[0, members.index(0)]
    assert not greedy[0].all()


def test_work_is_shared_down_to_the_prefix_tree_of_removals():
    loaded = tiny_loaded("llama")
    depth = len(loaded.layers)
    requests, groups = multiple_choice(loaded.vocabulary, count=1)
    removals = [Removal.of(layer) for layer in range(depth)]
    engine = Engine(loaded)
    engine.choose_path(requests, groups)
    engine.path.walk.work.computed = 0  # without the self-test's share
    engine.measure(requests, groups, removals)
    tree = engine.path.layout(requests, groups)[0].length
    shared = depth - 1  # the intact prefix, layer by layer, as far as the last removal needs it
    own = sum(depth - 1 - layer for layer in range(depth))  # above its removed layer every removal is alone
    assert engine.account.computed == tree * (shared + own)
    assert engine.account.naive == sum(len(r.tokens) - 1 for r in requests) * depth * (depth - 1)


def test_results_do_not_depend_on_what_is_measured_beside_them():
    loaded = tiny_loaded("qwen3")
    requests, groups = multiple_choice(loaded.vocabulary)
    removals = [Removal.of(layer) for layer in range(len(loaded.layers))]
    together, _ = Engine(loaded).measure(requests, groups, removals)
    for number, removal in enumerate(removals):
        alone, _ = Engine(loaded).measure(requests, groups, [removal])
        assert (alone[0] == together[number]).all()  # bit for bit: a resumed run must write the same bytes


def test_removals_are_measured_in_portions_when_memory_is_short(monkeypatch):
    loaded = tiny_loaded("llama")
    requests, groups = multiple_choice(loaded.vocabulary)
    removals = [Removal.of(layer) for layer in range(len(loaded.layers))]
    whole, _ = Engine(loaded).measure(requests, groups, removals)
    engine, portions = Engine(loaded, memory=200_000), []
    engine.choose_path(requests, groups)
    run = engine.path.run
    monkeypatch.setattr(engine.path, "run", lambda rows, part: portions.append(len(part)) or run(rows, part))
    scarce, _ = engine.measure(requests, groups, removals)
    assert min(portions) < len(removals)
    np.testing.assert_allclose(scarce, whole, atol=2e-4)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gemma4"] if "gemma4" in FAMILIES else ["llama", "gemma3"])
def test_later_rounds_find_the_intact_states_of_earlier_ones(kind):
    loaded = tiny_loaded(kind)
    depth = len(loaded.layers)
    requests, groups = multiple_choice(loaded.vocabulary)
    engine, fresh = Engine(loaded), Engine(loaded)
    engine.measure(requests, groups, [Removal.of(layer) for layer in range(depth)])
    assert engine.path.walk.work.found == 0
    second = [Removal.of(layer, depth - 1) for layer in range(depth - 1)]
    sums, _ = engine.measure(requests, groups, second)
    expected, _ = fresh.measure(requests, groups, second)
    assert (sums == expected).all()
    spared = engine.path.walk.work.found
    tokens = sum(row.length for row in engine.path.layout(requests, groups))
    assert spared >= tokens * (depth - 2)  # the intact states up to the last layer that a removal keeps


def test_the_states_that_are_kept_stay_within_the_memory():
    loaded = tiny_loaded("llama")
    requests, groups = multiple_choice(loaded.vocabulary, count=40)
    engine = Engine(loaded, memory=2_000_000)
    engine.measure(requests, groups, [Removal.of(1), Removal.of(2)])
    cache = engine.path.walk.base_states
    assert cache is not None
    kept = [state.hidden for states in cache.by_batch.values() for state in states]
    assert kept
    assert sum(hidden.numel() * hidden.element_size() for hidden in kept) == cache.used <= 500_000


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("made for the test"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
])  # fmt: skip
def test_out_of_memory_splits_removals_first_and_more_is_tried_again_later(monkeypatch, error):
    loaded = tiny_loaded("llama")
    requests, groups = multiple_choice(loaded.vocabulary, count=12)
    removals = [Removal.of(layer) for layer in range(len(loaded.layers))]
    expected, _ = Engine(loaded, rows=2).measure(requests, groups, removals)
    monkeypatch.setattr("layerprune.scoring.engine.PATIENCE", 2)
    engine, sizes = Engine(loaded, rows=2), []
    engine.choose_path(requests, groups)
    run, room = engine.path.run, [2]

    def crowded(rows, part):
        sizes.append((len(rows), len(part)))
        if len(part) > room[0]:
            raise error
        return run(rows, part)

    monkeypatch.setattr(engine.path, "run", crowded)
    sums, _ = engine.measure(requests, groups, removals)
    assert (sums == expected).all()  # bit for bit: rows stay together
    assert engine.fits is None
    assert engine.beside is not None
    refused = sum(part > room[0] for _, part in sizes)
    assert 0 < refused < len(sizes) / 3  # what was too much once is not asked for with every batch
    room[0] = 100
    sizes.clear()
    for _ in range(30):
        engine.measure(requests, groups, removals)
    assert max(part for _, part in sizes) == len(removals)


@pytest.mark.parametrize("rows", [None, 5])
def test_a_batch_that_does_not_fit_is_halved_and_nothing_is_lost(monkeypatch, rows):
    loaded = tiny_loaded("llama")
    requests, groups = multiple_choice(loaded.vocabulary, count=12)  # several rows
    removals = [Removal(()), Removal.of(1)]
    expected, _ = Engine(loaded).measure(requests, groups, removals)
    engine = Engine(loaded, rows=rows)
    engine.choose_path(requests, groups)
    run, refused = engine.path.run, []

    def crowded(rows, removals):
        if len(rows) > 1:
            refused.append(len(rows))
            raise torch.cuda.OutOfMemoryError("made for the test")
        return run(rows, removals)

    monkeypatch.setattr(engine.path, "run", crowded)
    sums, _ = engine.measure(requests, groups, removals)
    assert refused
    assert engine.fits
    assert engine.tokens == Engine(loaded).tokens  # what was asked for, and stands in a journal's key
    np.testing.assert_allclose(sums, expected, atol=2e-4)


class Absolute(nn.Module):
    """Wraps a model so that it ignores positions and masks it is given, as some types do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def forward(self, input_ids, use_cache=False, **ignored):
        return self.model(input_ids=input_ids, use_cache=use_cache)


def test_a_model_that_ignores_masks_is_found_out_and_measured_another_way():
    loaded = tiny_loaded("llama")
    intact = loaded.model
    requests, groups = multiple_choice(loaded.vocabulary)
    removals = [Removal(()), Removal.of(1)]
    expected = plainly(loaded, requests, removals)
    loaded.model = Absolute(intact)  # type: ignore[assignment]
    loaded.model.base_model = loaded.model  # type: ignore[misc]
    path, remarks = Trial.of(Engine(loaded), requests, groups).choose()
    assert path.name == "chains"
    assert "differ" in remarks[0]
    assert remarks[0].startswith("trees")
    engine = Engine(loaded)
    sums, _ = engine.measure(requests, groups, removals)
    np.testing.assert_allclose(sums, expected, atol=2e-4)


def test_questions_with_two_sets_of_examples_take_the_path_that_reads_each_once():
    loaded = tiny_loaded("llama")
    rng = random.Random(2)
    requests, groups = multiple_choice(loaded.vocabulary, count=6)
    heads = [[rng.randrange(3, loaded.vocabulary) for _ in range(70)] for _ in range(2)]
    requests = [Request((*heads[i // 9], *request.tokens), request.scored) for i, request in enumerate(requests)]
    removals = [Removal(()), Removal.of(1)]
    engine = Engine(loaded)
    sums, _ = engine.measure(requests, groups, removals)
    assert len({row.beginning for row in engine.path.layout(requests, groups)}) == 2
    assert engine.path.name == "beginnings", engine.remarks
    np.testing.assert_allclose(sums, plainly(loaded, requests, removals), atol=2e-4)


def test_the_longest_request_is_tested_wherever_it_stands():
    """A window shows in it alone: the largest tree here holds many short requests, the smallest one short one."""
    wide = [Request(tuple(range(start, start + 6)), 2) for start in range(0, 90, 3)]
    narrow = [Request(tuple(range(length)), 1) for length in range(8, 26)]
    requests = [*wide, *narrow]
    groups = [list(range(len(wide))), *([len(wide) + number] for number in range(len(narrow)))]
    for few in (groups, [groups[0], *groups[:0:-1]]):
        tested = Trial.of(Engine(tiny_loaded("llama")), requests, few).requests
        assert narrow[-1] in tested
    assert max(groups, key=lambda group: len(group)) == groups[0]


def test_forwards_are_given_back_after_an_error():
    loaded = tiny_loaded("llama")
    walk = TreePath(loaded).walk
    ids = torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(IndexError):
        walk.hidden({"input_ids": ids}, [frozenset()], torch.tensor([5]), torch.tensor([9]))
    assert all("forward" not in vars(layer) for layer in loaded.layers)


def mistral() -> LoadedModel:
    """A Mistral whose layers all look back over four tokens."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=4,
    )  # fmt: skip
    ref = ModelRef(id="mistral", fingerprint="mistral", model_type="mistral", layers=4, parameters=1)
    return LoadedModel(MistralForCausalLM(config).eval(), None, read_architecture(config), ref)


def test_a_mask_of_a_kind_that_a_model_does_not_take_is_no_remark_where_another_fits():
    """Mistral takes one mask for all its layers, which slide alike, and no dictionary of masks by kind of layer."""
    path, remarks = Trial.of(Engine(mistral()), *multiple_choice(96)).choose()
    assert (path.name, path.windows, remarks) == ("trees", "everywhere", [])


def test_what_fails_in_every_kind_of_mask_is_said_once_in_plain_words(monkeypatch):
    from layerprune.scoring import engine as selftest
    from layerprune.scoring import paths

    class Refusing(paths.TreePath):
        def inputs(self, rows):
            raise AttributeError("'dict' object has no attribute 'ndim'")

    monkeypatch.setattr(selftest, "TreePath", Refusing)
    path, remarks = Trial.of(Engine(mistral()), *multiple_choice(96)).choose()
    assert path.name == "chains"
    assert remarks == [
        "trees: the model's code does not take such inputs (AttributeError: 'dict' object has no attribute 'ndim')"
    ]


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt_neox"])
def test_rows_that_are_no_trees_are_given_no_mask(kind):
    """Answers of one token: the rows of a task's questions are ordinary ones, of different lengths."""
    loaded = tiny_loaded(kind)
    trees, groups = multiple_choice(60)
    asked = [trees[group[0]].tokens[: -trees[group[0]].scored] for group in groups]
    requests = [Request((*tokens, answer), 1) for tokens in asked for answer in (5, 6, 7)]
    removals = [Removal(()), *map(Removal.of, range(len(loaded.layers)))]
    path, given = TreePath(loaded), []
    inputs = path.inputs
    path.inputs = lambda rows: given.append(inputs(rows)) or given[-1]
    engine = Engine(loaded)
    engine.measure_along(path, requests, groups, removals)  # what a path holds is tried before its first batch
    given.clear()
    found = engine.measure_along(path, requests, groups, removals)[0]
    assert given
    assert all(one.keys() == {"input_ids"} for one in given)
    np.testing.assert_allclose(found, plainly(loaded, requests, removals), atol=2e-4)
    given.clear()
    engine.measure_along(path, trees, groups, removals)
    assert any("attention_mask" in one for one in given)


def test_plain_forwards_run_rows_of_one_length_together():
    loaded = tiny_loaded("mixtral")
    requests, groups = multiple_choice(60)
    removals = [Removal(()), Removal.of(1)]
    path, calls, engine = PlainPath(loaded), [], Engine(loaded)
    engine.measure_along(path, requests, groups, removals)  # what a path holds is tried before its first batch
    handle = loaded.model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    found = engine.measure_along(path, requests, groups, removals)[0]
    handle.remove()
    lengths = {len(request.tokens) - 1 for request in requests}
    assert {length for _, length in calls} == lengths
    assert len(calls) < len(removals) * len({request.tokens[:-1] for request in requests})
    np.testing.assert_allclose(found, plainly(loaded, requests, removals), atol=2e-4)


def test_ordinary_rows_are_packed_behind_a_beginning_and_masked_beside_a_window():
    questions = [Request((*range(3, 83), number, number + 1, 9), 1) for number in range(3, 40)]
    groups = [[number] for number in range(len(questions))]
    loaded = tiny_loaded("gemma3_text")
    for windows, keys in (("none", {"input_ids"}), ("everywhere", {"input_ids", "attention_mask", "position_ids"})):
        path = TreePath(loaded, windows)
        rows = path.layout([Request(request.tokens[80:], 1) for request in questions], groups)
        assert len(rows) == len(questions)
        assert path.inputs(rows).keys() == keys
    behind = BeginningPath(loaded).layout(questions, groups)
    assert {len(row.beginning) for row in behind} == {80}
    assert len(behind) < len(questions) / 4  # every row would bring a copy of the beginning's keys and values
