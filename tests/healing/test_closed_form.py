"""The training-free methods on models where the right answer is known, and against slow and obvious versions."""

import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import families
import heal_tiny
from layerprune.architecture import read_architecture
from layerprune.artifacts import HealLog
from layerprune.data.corpus import Corpus, Windows
from layerprune.errors import RefusedError, UsageError
from layerprune.exporter import export
from layerprune.healing import HEALERS
from layerprune.healing.base import HealContext
from layerprune.healing.closed_form import Linear, Rescale, Sums, best, divisors_of, solve
from layerprune.healing.projections import Stream, down_projection, output_projections
from layerprune.models.bypass import bypassed
from layerprune.models.model import LoadedModel
from layerprune.models.placement import DTYPES
from layerprune.registry import build
from layerprune.removal import Removal

DOWN, OUT = "model.layers.{}.mlp.down_proj.weight", "model.layers.{}.self_attn.o_proj.weight"


def cut(home, *units):
    """Export the tiny llama without some units, once."""
    out = home / f"without {units}"
    if not out.exists():
        export(families.make_plan(home / "plain", Removal.of(*units)), out)
    return out


def windows(count, tokens=32, vocabulary=250, seed=0):
    ids = np.random.default_rng(seed).integers(0, vocabulary, (count, tokens))
    return Windows(ids, np.ones_like(ids, dtype=bool))


def edited(source, out, change):
    """Copy a model folder with its tensors changed in place by a function."""
    shutil.copytree(source, out)
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def case(base, pruned, removal, work, count=24, dtype="float64", **changes):
    """A case as the step makes it, for a pruned folder that export wrote or a test has edited."""
    from layerprune.artifacts import Receipt

    plan = families.make_plan(base, removal)
    receipt = Receipt.load(pruned / "layerprune" / "receipt.json").model_copy(update={"removal": removal.layers})
    corpus = Corpus(windows(count), windows(2), None)
    fields = {"folder": pruned, "plan": plan, "receipt": receipt, "work": work, "corpus": corpus}
    fields |= {"name": pruned.name, "base": str(base)}
    return HealContext(**(fields | {"dtype": dtype} | changes))


@pytest.fixture(autouse=True)
def float64(monkeypatch):
    """No user needs it; an exact answer is only exact in it."""
    monkeypatch.setitem(DTYPES, "float64", torch.float64)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """``base``: a tiny llama in float64 whose layers 2 and 4 do nothing; ``pruned``: the same without them."""
    folder = tmp_path_factory.mktemp("closed")
    heal_tiny.audit_tiny.base_model(folder / "plain")
    model = AutoModelForCausalLM.from_pretrained(folder / "plain", dtype=torch.float64)
    for layer in (2, 4):
        torch.nn.init.zeros_(model.model.layers[layer].mlp.down_proj.weight)
        torch.nn.init.zeros_(model.model.layers[layer].self_attn.o_proj.weight)
    shutil.copytree(folder / "plain", folder / "base")
    model.save_pretrained(folder / "base")
    export(families.make_plan(folder / "base", Removal.of(2, 4)), folder / "pruned")
    return folder


def test_weights_that_were_lost_are_found_again(home, tmp_path):
    """The base's own down projections before the cuts are the exact answer, wherever the pruned ones begin."""
    torch.manual_seed(1)
    right = load_file(home / "pruned" / "model.safetensors")
    spoilt = edited(home / "pruned", tmp_path / "spoilt",
                    lambda tensors: [tensors[DOWN.format(layer)].normal_() for layer in (1, 2)])  # fmt: skip
    healed = dict(Linear(ridge=0.0).heal(case(home / "base", spoilt, Removal.of(2, 4), tmp_path)))
    assert sorted(healed) == [DOWN.format(1), DOWN.format(2)]  # in the pruned model's numbering: base layers 1 and 3
    for name, value in healed.items():
        torch.testing.assert_close(value, right[name], rtol=1e-6, atol=1e-6)


def test_a_map_that_was_lost_is_found_again(home, tmp_path):
    torch.manual_seed(1)
    right = load_file(home / "pruned" / "model.safetensors")[DOWN.format(1)]
    mixing = torch.eye(32, dtype=torch.float64) + 0.3 * torch.randn(32, 32, dtype=torch.float64)

    def spoil(tensors):
        tensors[DOWN.format(1)] = mixing @ tensors[DOWN.format(1)]

    spoilt = edited(home / "pruned", tmp_path / "spoilt", spoil)
    healed = dict(Linear(fit="map", ridge=0.0).heal(case(home / "base", spoilt, Removal.of(2, 4), tmp_path)))
    torch.testing.assert_close(healed[DOWN.format(1)], right, rtol=1e-6, atol=1e-6)


def test_nothing_lost_nothing_changed(home, tmp_path):
    """Layers that did nothing leave nothing to win back; whatever ridge is chosen, the weights stay."""
    before = load_file(home / "pruned" / "model.safetensors")
    job = case(home / "base", home / "pruned", Removal.of(2, 4), tmp_path)
    for name, value in Linear().heal(job):
        torch.testing.assert_close(value, before[name], rtol=0, atol=1e-9)


def states(model, ids, layer):
    """What leaves a layer and what enters and leaves its down projection, by plain hooks on a plain forward."""
    seen = {}
    module = model.model.layers[layer]
    hooks = [
        module.register_forward_hook(lambda m, a, out: seen.update(left=out[0] if isinstance(out, tuple) else out)),
        module.mlp.down_proj.register_forward_hook(lambda m, a, out: seen.update(z=a[0], mlp=out)),
    ]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: value.flatten(0, 1).double() for name, value in seen.items()}


@pytest.mark.parametrize("fit", ["weights", "map"])
def test_the_fit_is_least_squares_on_stacked_rows(home, tmp_path, fit):
    """Against the obvious way: all rows in one matrix, numpy's lstsq on rows and ridge stacked, cut after cut."""
    base = AutoModelForCausalLM.from_pretrained(home / "plain", dtype=torch.float64)
    folder = cut(home, 2, 4)
    pruned = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    job = case(home / "plain", folder, Removal.of(2, 4), tmp_path)
    ids = torch.from_numpy(job.corpus.train.ids)
    fitted = np.array([number % 8 != 0 for number in range(len(ids))]).repeat(ids.shape[1])
    expected = {}
    for layer, resumes in ((1, 3), (2, 5)):  # base layers 1 and 3; the stream in front of base layers 3 and 5
        target = states(base, ids, resumes - 1)["left"]
        seen = states(pruned, ids, layer)
        x = (seen["z"] if fit == "weights" else seen["mlp"]).numpy()[fitted]
        r = (target - seen["left"]).numpy()[fitted]
        ridge = 0.01 * np.mean(np.sum(x**2, axis=0))
        rows = np.vstack([x, np.sqrt(ridge) * np.eye(x.shape[1])])
        found = torch.from_numpy(np.linalg.lstsq(rows, np.vstack([r, np.zeros((x.shape[1], 32))]), rcond=None)[0])
        weight = pruned.model.layers[layer].mlp.down_proj.weight.data
        weight += found.T @ weight if fit == "map" else found.T
        expected[DOWN.format(layer)] = weight
    healed = dict(Linear(fit=fit, ridge=0.01).heal(job))
    assert healed.keys() == expected.keys()
    for name, value in healed.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-8)


def test_it_wins_back_on_text_it_has_not_seen(home, tmp_path):
    """The distance of the streams behind the cut falls on other windows; more so by all weights than by a map."""
    folder = cut(home, 2)
    base = AutoModelForCausalLM.from_pretrained(home / "plain")
    ids = torch.from_numpy(windows(8, seed=9).ids)
    target = states(base, ids, 2)["left"]
    distance = {}
    for fit in ("none", "map", "weights"):
        pruned = AutoModelForCausalLM.from_pretrained(folder)
        if fit != "none":
            job = case(home / "plain", folder, Removal.of(2), tmp_path, dtype="float32", count=200)
            (changed,) = Linear(fit=fit).heal(job)
            pruned.load_state_dict({changed[0]: changed[1]}, strict=False)
        distance[fit] = float((states(pruned, ids, 1)["left"] - target).square().sum())
    assert distance["weights"] < distance["map"] < 0.95 * distance["none"]


def test_a_bias_takes_part(tmp_path):
    """GPT-2 has biases and transposed weights: both are found again."""
    families.save_tiny("gpt2", tmp_path / "base")
    depth = read_architecture(AutoModelForCausalLM.from_pretrained(tmp_path / "base").config).depth
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float64)
    block = model.transformer.h[1]
    for module in (block.mlp.c_proj, block.attn.c_proj):
        torch.nn.init.zeros_(module.weight)
        torch.nn.init.zeros_(module.bias)
    torch.nn.init.normal_(model.transformer.h[0].mlp.c_proj.bias)
    model.save_pretrained(tmp_path / "base")
    export(families.make_plan(tmp_path / "base", Removal.of(1)), tmp_path / "pruned")
    right = load_file(tmp_path / "pruned" / "model.safetensors")
    weight, bias = (
        next(name for name in right if name.endswith(f"h.0.mlp.c_proj.{part}")) for part in ("weight", "bias")
    )
    spoilt = edited(tmp_path / "pruned", tmp_path / "spoilt", lambda t: (t[weight].normal_(), t[bias].normal_()))
    job = case(tmp_path / "base", spoilt, Removal.of(1), tmp_path, count=200)
    job.corpus = Corpus(windows(200, 16, vocabulary=model.config.vocab_size), windows(2), None)
    healed = dict(Linear(ridge=0.0).heal(job))
    assert depth > 1
    assert healed.keys() == {weight, bias}
    torch.testing.assert_close(healed[weight], right[weight], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(healed[bias], right[bias], rtol=1e-5, atol=1e-5)


def test_a_cut_before_the_first_layer_has_no_projection(home, tmp_path):
    folder = cut(home, 0)
    job = case(home / "plain", folder, Removal.of(0), tmp_path, dtype="float32")
    with pytest.raises(RefusedError, match=r"nothing comes before the first layer left.*; rescale needs none"):
        list(Linear().heal(job))
    folder = cut(home, 0, 3)
    job = case(home / "plain", folder, Removal.of(0, 3), tmp_path, dtype="float32")
    assert [name for name, _ in Linear().heal(job)] == [DOWN.format(1)]
    assert "nothing comes before the first layer left" in job.record.notes[0]


def first_layer(kind):
    model = families.tiny_model(kind).eval()
    return Stream(LoadedModel(model, None, read_architecture(model.config), None), [torch.arange(16)[None]])


@pytest.mark.parametrize("kind", ["gemma2", "mixtral", "olmo2"])
def test_a_type_without_a_projection_to_fold_into_is_refused_by_layer(kind):
    for find, half in ((down_projection, "MLP"), (output_projections, "attention|MLP")):
        with pytest.raises(RefusedError, match=f"the ({half}) of layer 0 of this {kind} model has no single output"):
            find(first_layer(kind))


def test_a_refusal_comes_before_the_text_is_read(tmp_path, monkeypatch):
    families.save_tiny("gemma2", tmp_path / "base")
    export(families.make_plan(tmp_path / "base", Removal.of(1)), tmp_path / "pruned")
    job = case(tmp_path / "base", tmp_path / "pruned", Removal.of(1), tmp_path, dtype="float32")
    job.corpus = Corpus(windows(2, 16, vocabulary=30), windows(2), None)
    for healer in (Linear(), Rescale()):
        with pytest.raises(RefusedError, match="has no single output projection"):
            list(healer.heal(job))
    assert job.record.tokens == 0


@pytest.mark.parametrize(
    ("kind", "attention", "mlp"),
    [
        ("llama", "self_attn.o_proj", "mlp.down_proj"),
        ("gpt2", "attn.c_proj", "mlp.c_proj"),
        ("gpt_neox", "attention.dense", "mlp.dense_4h_to_h"),  # side by side
        ("phi3", "self_attn.o_proj", "mlp.down_proj"),
        ("olmo", "self_attn.o_proj", "mlp.down_proj"),  # norms without weights
        ("apertus", "self_attn.o_proj", "mlp.down_proj"),
        ("opt", None, "fc2"),
    ],
)
def test_projections_are_found_by_what_they_do(kind, attention, mlp):
    stream = first_layer(kind)
    stack = stream.loaded.architecture.stack
    assert down_projection(stream).path == f"{stack}.0.{mlp}"
    if attention is not None:
        assert [each.path for each in output_projections(stream)] == [f"{stack}.0.{attention}", f"{stack}.0.{mlp}"]


def test_a_stream_is_the_models_own_forward():
    model = families.tiny_model("llama").eval()
    loaded = LoadedModel(model, None, read_architecture(model.config), None)
    ids = torch.from_numpy(windows(5, 16, vocabulary=30).ids)
    stream = Stream(loaded, [ids[:3], ids[3:]])
    with torch.no_grad():
        plain = model(input_ids=ids, output_hidden_states=True).hidden_states
    for depth in range(len(loaded.layers)):
        assert torch.equal(torch.cat(stream.states), plain[depth])
        stream.advance()


def test_sums_give_what_rows_give():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 7, generator=generator, dtype=torch.float64)
    r = torch.randn(200, 3, generator=generator, dtype=torch.float64)
    sums = Sums.of(7, 3)
    for part in range(0, 200, 30):
        sums.add(x[part : part + 30], r[part : part + 30])
    for ridge, found in zip((0.0, 0.1), solve(sums, (0.0, 0.1)), strict=True):
        penalty = ridge * (x**2).sum(0).mean()
        expected = torch.linalg.solve(x.T @ x + penalty * torch.eye(7, dtype=torch.float64), x.T @ r)
        torch.testing.assert_close(found, expected)
        assert sums.error(found) == pytest.approx(float((r - x @ found).square().sum()) / 200)


def test_directions_never_seen_are_left_alone():
    x = torch.zeros(50, 4, dtype=torch.float64)
    x[:, :2] = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sums = Sums.of(4, 2)
    sums.add(x, x[:, :2] * 3)
    (found,) = solve(sums, (0.0,))
    torch.testing.assert_close(found, torch.cat([3 * torch.eye(2), torch.zeros(2, 2)]).double(), rtol=0, atol=1e-9)


def test_the_ridge_is_chosen_on_rows_left_out():
    """Of pure noise nothing should be learned; of a clean relation everything."""
    generator = torch.Generator().manual_seed(0)
    ridges = (1e-6, 1e-3, 1.0, 1e3)
    for clean in (False, True):
        sums = Sums.of(20, 2), Sums.of(20, 2)
        truth = torch.randn(20, 2, generator=generator)
        for part, rows in zip(sums, (25, 500), strict=True):
            x = torch.randn(rows, 20, generator=generator)
            part.add(x, x @ truth if clean else torch.randn(rows, 2, generator=generator))
        assert best(*sums, ridges)[0] == (1e-6 if clean else 1e3)


def test_options_are_checked():
    assert build(HEALERS, "linear:ridge=0.5,fit=map")[1] == Linear(fit="map", ridge=0.5)
    for spec in ("linear:ridge=-1", "linear:ridge=some", "linear:tokens=0", "linear:fit=all", "rescale:tokens=0"):
        with pytest.raises(UsageError):
            build(HEALERS, spec)


def ratio(model, ids, layer):
    """Geometric mean over tokens of what a layer does to the length of the stream, by output_hidden_states."""
    with torch.no_grad():
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states
    return float((hidden[layer + 1].norm(dim=-1) / hidden[layer].norm(dim=-1)).log().mean().exp())


@pytest.mark.parametrize("removed", [(1,), (2, 3), (0, 4)])
def test_rescaled_weights_act_as_a_factor_at_each_cut(home, tmp_path, removed):
    """Against the base with the layers bypassed and the stream multiplied there by their measured factors."""
    folder = cut(home, *removed)
    job = case(home / "plain", folder, Removal.of(*removed), tmp_path, dtype="float32")
    healed = AutoModelForCausalLM.from_pretrained(folder)
    changed = dict(Rescale().heal(job))
    healed.load_state_dict(changed, strict=False)
    base = AutoModelForCausalLM.from_pretrained(home / "plain")
    factors = {layer: ratio(base, torch.from_numpy(job.corpus.train.ids), layer) for layer in removed}
    ids = torch.from_numpy(windows(2, seed=5).ids)
    hooks = [
        base.model.layers[layer].register_forward_pre_hook(
            lambda m, args, kwargs, factor=factors[layer]: ((args[0] * factor, *args[1:]), kwargs), with_kwargs=True
        )
        for layer in removed
    ]
    with torch.no_grad(), bypassed(base, list(base.model.layers), Removal.of()):
        for layer in removed:
            base.model.layers[layer].forward = lambda *args, **kwargs: args[0]
        expected = base(input_ids=ids, use_cache=False).logits
        actual = healed(input_ids=ids, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)
    assert job.record.found == {f"factor_{layer}": pytest.approx(factors[layer], rel=1e-4) for layer in removed}
    first = min(removed)
    assert set(changed) == {form.format(layer) for layer in range(first, 6 - len(removed)) for form in (DOWN, OUT)}


def test_factors_of_several_cuts_multiply():
    assert divisors_of([2.0, 3.0, 5.0, 7.0, 11.0], Removal.of(1, 3), 5) == [1.0, 3.0, 21.0]
    assert divisors_of([2.0, 3.0, 5.0], Removal.of(0), 3) == [2.0, 2.0]


def test_what_cannot_be_rescaled_is_refused(home, tmp_path):
    export(families.make_plan(home / "plain", Removal.of(5)), tmp_path / "out")
    with pytest.raises(RefusedError, match="only the last layers were removed"):
        list(Rescale().heal(case(home / "plain", tmp_path / "out", Removal.of(5), tmp_path, dtype="float32")))


def test_a_stream_read_without_a_norm_is_refused(home, tmp_path, monkeypatch):
    """A llama whose first norm is gone reads lengths: the check on a few tokens sees it."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    folder = cut(home, 2)
    monkeypatch.setattr(LlamaRMSNorm, "forward", lambda self, hidden: hidden.tanh())
    with pytest.raises(RefusedError, match="a llama model reads its residual stream without a norm somewhere"):
        list(Rescale().heal(case(home / "plain", folder, Removal.of(2), tmp_path, dtype="float32")))


@pytest.mark.parametrize("method", ["rescale", "linear", "linear:fit=map"])
def test_the_step_publishes_what_the_method_yields(home, tmp_path, method):
    from layerprune.auditor.verification import verify
    from layerprune.healing.healer import heal

    text = heal_tiny.prose(tmp_path / "prose.txt")
    log = heal(cut(home, 2, 4), tmp_path / "healed", method=method, corpus=str(text), window=32)
    assert HealLog.load(tmp_path / "healed" / "layerprune" / "heal.json") == log
    assert log.tokens > 0
    assert log.found
    assert verify(tmp_path / "healed", base=str(home / "plain")).ok


def test_layers_on_disk_are_healed_as_in_memory_and_read_once_for_all_windows(home, tmp_path, monkeypatch):
    """A base of its own, so that both streams run from the first layer; a changed weight is what later layers see."""
    torch.manual_seed(1)
    spoilt = edited(home / "pruned", tmp_path / "spoilt",
                    lambda tensors: [tensors[DOWN.format(layer)].normal_() for layer in (1, 2)])  # fmt: skip
    streams = []
    load = LoadedModel.load

    def noted(*args, **kwargs):
        loaded = load(*args, **kwargs)
        if loaded.stream is not None:
            loaded.stream.reads[:] = [0] * len(loaded.layers)
            streams.append(loaded.stream)
        return loaded

    monkeypatch.setattr(LoadedModel, "load", noted)
    healed, reads = {}, {}
    for where, count in (("none", 24), ("disk", 24), ("disk", 96)):
        streams.clear()
        job = case(home / "base", spoilt, Removal.of(2, 4), tmp_path, count=count, offload=where)
        healed[where, count] = dict(Linear(tokens=count * 32).heal(job))
        reads[where, count] = [sum(stream.reads) for stream in streams]
    assert healed["none", 24].keys() == healed["disk", 24].keys()
    for name, value in healed["none", 24].items():
        assert torch.equal(value, healed["disk", 24][name])
    assert reads["none", 24] == []
    assert len(reads["disk", 24]) == 2
    for few, many in zip(reads["disk", 24], reads["disk", 96], strict=True):
        assert abs(many - few) <= 4  # what was read ahead, and whether it was given up before it began


def test_a_method_that_needs_all_weights_refuses_layers_elsewhere(home, tmp_path):
    job = case(home / "base", home / "pruned", Removal.of(2, 4), tmp_path, offload="disk")
    with pytest.raises(UsageError, match="--offload none, or --method linear"):
        dict(Rescale().heal(job))
