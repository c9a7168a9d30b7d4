"""Which evaluation path is trusted with a model: never one that is wrong in structure, whatever the dtype hides."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from engine_requests import multiple_choice
from families import tiny_config, tiny_model
from layerprune.architecture import read_architecture
from layerprune.artifacts import ModelRef
from layerprune.data.items import Request
from layerprune.errors import ModelError
from layerprune.models.model import LoadedModel
from layerprune.removal import Removal
from layerprune.scoring.engine import Engine, Trial, WrongPath, renamed, trial_removals, twin_of
from layerprune.scoring.paths import BeginningPath, ChainPath, PlainPath, TreePath
from layerprune.scoring.prefix_tree import batches

CONV = {"layer_types": ["conv", "conv", "full_attention"] * 2}


def subject_of(kind: str, dtype: torch.dtype = torch.bfloat16, seed: int = 0, **changes) -> LoadedModel:
    model = tiny_model(kind, seed=seed, **changes).to(dtype)
    if dtype == torch.float64:
        model.set_experts_implementation("eager")  # the default one knows no float64
    architecture = read_architecture(tiny_config(kind, **changes))
    ref = ModelRef(id=kind, fingerprint=kind, model_type=kind, layers=architecture.depth, parameters=1)
    return LoadedModel(model, None, architecture, ref)  # type: ignore[arg-type]  # no text is read here


def after(head: int, requests: list[Request]) -> list[Request]:
    return [Request((*range(3, 3 + head), *request.tokens), request.scored) for request in requests]


def asked(path, requests, groups, removals) -> np.ndarray:
    found = np.full((len(removals), len(requests)), np.nan)
    for batch in batches(path.layout(requests, groups), 10**6):
        members, (sums, _) = path.run(batch, removals)
        found[:, members] = sums
    return found


# The type, what changes in its tiny config, and the path that is right for questions without and with examples.
PATHS = [
    ("llama", {}, "trees", "beginnings"),
    ("mistral", {}, "trees", "beginnings"),  # every layer has a window
    ("gemma3_text", {}, "trees", "beginnings"),  # some have
    ("deepseek_v3", {}, "trees", "beginnings"),
    ("gpt_neo", {}, "trees", "chains"),  # a row of several questions is longer than its 128 positions
    ("lfm2", CONV, "chains", "chains"),  # a convolution looks at neighbours, whatever the mask
    ("falcon_h1", {}, "chains", "chains"),  # attention and a recurrence side by side
    ("mpt", {}, "chains", "chains"),  # positions are distances in the row
]


@pytest.mark.parametrize("head", [0, 70])
@pytest.mark.parametrize(("kind", "changes", "without", "with_examples"), PATHS, ids=[case[0] for case in PATHS])
def test_half_precision_hides_no_wrong_path(kind, changes, without, with_examples, head):
    """The path chosen in bfloat16 gives what plain forwards give in float64, on other weights and other questions."""
    loaded = subject_of(kind, **changes)
    requests, groups = multiple_choice(90)
    engine = Engine(loaded)
    engine.choose_path(after(head, requests), groups)
    assert engine.path.name == (with_examples if head else without), engine.remarks
    exact = subject_of(kind, torch.float64, seed=1, **changes)
    requests, groups = multiple_choice(90, seed=1)
    requests = after(head, requests)
    removals = [Removal(()), *(Removal.of(layer) for layer in range(len(exact.layers)))]
    made = {"chains": ChainPath}.get(engine.path.name) or partial(type(engine.path), windows=engine.path.windows)
    found = asked(made(exact), requests, groups, removals)
    np.testing.assert_allclose(found, asked(PlainPath(exact), requests, groups, removals), atol=1e-5)


def test_a_path_that_is_refused_for_its_structure_says_so():
    engine = Engine(subject_of("lfm2", **CONV))
    engine.choose_path(*multiple_choice(90))
    assert engine.remarks == [remark for remark in engine.remarks if remark.startswith("trees: on a tiny model")]
    assert "differ" in engine.remarks[0]


@pytest.mark.parametrize("kind", [TreePath, BeginningPath])
def test_what_rounding_hides_shows_on_the_twin(kind):
    """The same wrong path on the same model: within the limits of bfloat16, far beyond those of float64."""
    loaded = subject_of("falcon_h1")
    requests, groups = multiple_choice(90)
    trial = Trial.of(Engine(loaded), requests, groups)
    (_, trees), (_, chains) = trial.compared(kind), trial.compared(ChainPath)
    assert trial.excess(trees, 2 * float(chains.mean()) + 0.01) is None
    assert "differ by" in trial.on_twin().fault(kind)


def test_without_a_twin_half_precision_takes_the_slow_path_and_says_so(monkeypatch):
    loaded, exact = subject_of("llama"), subject_of("llama", torch.float32)

    def strict(*args, **kwargs):
        raise ValueError("made for the test: hidden_size must be 4096")

    monkeypatch.setattr(type(loaded.model), "_from_config", strict)
    engine = Engine(loaded)
    engine.choose_path(*multiple_choice(90))
    assert engine.path.name == "plain"
    assert "hidden_size must be 4096" in engine.remarks[0]
    assert "--dtype float32" in engine.remarks[0]
    wide = Engine(exact)
    wide.choose_path(*multiple_choice(90))
    assert wide.path.name == "trees", "float32 needs no twin"


def test_the_twin_has_the_layers_and_lengths_of_the_model_and_the_sizes_of_a_tiny_one():
    config = {"hidden_size": 48, "sliding_window": 23, "max_position_embeddings": 777, "vocab_size": 500}
    twin = twin_of(subject_of("gemma3_text", **config))
    assert twin.dtype == torch.float64
    small = twin.model.config
    assert (small.hidden_size, small.vocab_size) == (32, 96)
    assert (small.sliding_window, small.max_position_embeddings) == (23, 777)
    assert small.layer_types == tiny_config("gemma3_text").layer_types


def test_making_a_twin_draws_nothing_from_the_callers_random_numbers():
    loaded = subject_of("llama")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    twin_of(loaded)
    assert (torch.rand(3) == expected).all()


def test_a_model_that_is_no_transformers_model_has_no_twin():
    loaded = subject_of("llama")
    inner = loaded.model
    loaded.model = torch.nn.Sequential()  # type: ignore[assignment]
    loaded.model.config = inner.config  # type: ignore[assignment]
    with pytest.raises(ModelError, match="no tiny llama"):
        twin_of(loaded)


def test_requests_keep_their_lengths_and_what_they_have_in_common():
    requests, _ = multiple_choice(50_000)
    short = renamed(requests)
    for one, other in zip(requests, short, strict=True):
        assert (len(one.tokens), one.scored) == (len(other.tokens), other.scored)
        assert 3 <= min(other.tokens) <= max(other.tokens) < 96
    assert short[0].tokens[: -short[0].scored] == short[1].tokens[: -short[1].scored]
    assert len({request.tokens for request in short}) == len({request.tokens for request in requests})


def test_a_layer_of_every_kind_is_removed():
    kinds = ["conv", "conv", "conv", "full_attention", "conv", "conv"]
    removed = {removal.layers for removal in trial_removals(subject_of("lfm2", layer_types=kinds))}
    assert (3,) in removed
    mixed = trial_removals(subject_of("deepseek_v3", first_k_dense_replace=2))
    assert (1,) in {removal.layers for removal in mixed}, "the last of the dense layers"
    assert len(trial_removals(subject_of("llama"))) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_that_others_depend_on_are_not_removed_for_their_kind(dtype):
    loaded = subject_of("gemma3n_text", dtype)  # without layers whose keys and values are reused it cannot run
    assert loaded.architecture.must_keep
    engine = Engine(loaded)
    engine.choose_path(*multiple_choice(90))
    assert engine.path.name == "plain"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_implementations_that_take_masks_agree_on_path_and_figures(dtype):
    requests, groups = multiple_choice(90)
    found = {}
    for name in ("eager", "sdpa"):
        loaded = subject_of("llama", dtype)
        loaded.model.set_attn_implementation(name)
        engine = Engine(loaded)
        sums, _ = engine.measure(requests, groups, [Removal(()), Removal.of(2)])
        found[name] = engine.path.name, sums
        assert twin_of(loaded).model.config._attn_implementation == name
    assert found["eager"][0] == found["sdpa"][0] == "trees"
    tolerance = 1e-3 if dtype == torch.float32 else 0.5
    np.testing.assert_allclose(found["eager"][1], found["sdpa"][1], atol=tolerance)


def flash_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Causal, half precision only, and no mask but one of padding: like the kernels."""
    assert attention_mask is None or attention_mask.ndim == 2, "a mask of four dimensions"
    assert query.dtype != torch.float64, "float64"
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flash_attention_goes_along_chains_and_is_given_no_mask(dtype, monkeypatch):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", flash_attention)
    requests, groups = multiple_choice(90)
    removals = [Removal(()), Removal.of(2)]
    loaded = subject_of("llama", dtype)
    expected, _ = Engine(loaded).measure(requests, groups, removals)
    loaded.model.config._attn_implementation = "flash_attention_2"
    engine = Engine(loaded)
    found, _ = engine.measure(requests, groups, removals)
    assert (engine.path.name, engine.remarks) == ("chains", ["trees: flash_attention_2 takes no mask"])
    np.testing.assert_allclose(found, expected, atol=1e-3 if dtype == torch.float32 else 0.5)
    with pytest.raises(WrongPath, match="a mask of four dimensions"):
        Trial(engine, loaded, requests, groups, removals).compared(TreePath)
