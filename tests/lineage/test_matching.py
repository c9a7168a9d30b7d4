"""Checkpoints made from a base by one change each, of many types: what is said of them is what was done."""

import json
import shutil
import tracemalloc

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import families
from layerprune.architecture import load_config, read_architecture
from layerprune.checkpoint import Checkpoint, locate
from layerprune.lineage import trace
from layerprune.lineage.matching import CheckpointParts, match_layers
from layerprune.removal import Removal

DEPTH = 6


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Return a function that saves a tiny random model of a type."""
    home = tmp_path_factory.mktemp("bases")

    def save(model_type):
        path = home / model_type
        if not path.exists():
            families.save_tiny(model_type, path)
        return path

    return save


def copy_of(base, folder, change, **fields):
    """Copy a checkpoint with its weights as ``change`` makes them: {layer or None: {name: array}} to the same."""
    shutil.copytree(base, folder)
    weights = load_file(base / "model.safetensors")
    stack = stack_of(weights)
    parts = {None: {}}
    for name, array in weights.items():
        number, dot, rest = name.removeprefix(f"{stack}.").partition(".")
        inside = name.startswith(f"{stack}.") and dot and number.isdecimal()
        parts.setdefault(int(number) if inside else None, {})[rest if inside else name] = array
    parts = change(parts)
    out = {
        name if layer is None else f"{stack}.{layer}.{name}": np.ascontiguousarray(array)
        for layer, tensors in parts.items()
        for name, array in tensors.items()
    }
    save_file(out, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    return folder


def stack_of(names):
    return next(
        name.partition(f".{mark}.0.")[0] + f".{mark}"
        for name in names
        for mark in ("layers", "h", "blocks")
        if f".{mark}.0." in name
    )


def compared(model, base):
    return trace(locate(str(model)), locate(str(base)))


def layers_in_order(*order):
    """Return a change after which the layers are those of the base in this order."""
    return lambda parts: {None: parts[None], **{at: parts[layer] for at, layer in enumerate(order)}}


def drawn(array, seed=0):
    return np.random.default_rng(seed).normal(0, 0.05, array.shape).astype(array.dtype)


def noisy(array, share, seed=0):
    noise = np.random.default_rng(seed).normal(0, 1, array.shape)
    norm = np.linalg.norm(noise) or 1
    return (array + share * np.linalg.norm(array) / norm * noise).astype(array.dtype)


def with_layer(layer, make):
    return lambda parts: parts | {layer: {name: make(array) for name, array in parts[layer].items()}}


FAMILY = pytest.mark.parametrize("model_type", families.FAMILIES)
OUTSIDE = "what is outside the layers is the base's, untouched"


@FAMILY
def test_a_copy_is_untouched(bases, tmp_path, model_type):
    base = bases(model_type)
    found = compared(copy_of(base, tmp_path / "copy", lambda parts: parts), base)
    assert found.sentences == ("every layer is the base's, untouched", OUTSIDE)
    assert [match.base for match in found.layers] == list(range(DEPTH))


@FAMILY
def test_the_stack_is_the_one_of_the_architecture(bases, model_type):
    base = bases(model_type)
    parts = CheckpointParts.of(base, Checkpoint.open(base))
    architecture = read_architecture(load_config(str(base)))
    assert [*parts.layers] == list(range(architecture.depth))
    assert parts.part("embeddings") is not None


@FAMILY
def test_layers_that_changed_places(bases, tmp_path, model_type):
    base = bases(model_type)
    found = compared(copy_of(base, tmp_path / "copy", layers_in_order(0, 4, 2, 3, 1, 5)), base)
    assert found.sentences == (
        "layers 1 and 4 have changed places", "in itself, every layer is the base's, untouched", OUTSIDE,
    )  # fmt: skip


@FAMILY
def test_layers_that_are_gone_and_the_rest_renumbered(bases, tmp_path, model_type):
    base = bases(model_type)
    found = compared(copy_of(base, tmp_path / "copy", layers_in_order(0, 1, 4, 5), num_hidden_layers=4), base)
    assert found.sentences == (
        "layers 2 and 3 of the base are gone", "every layer that is left is the base's, untouched", OUTSIDE,
    )  # fmt: skip


@FAMILY
def test_a_layer_that_is_missing_leaves_the_numbers_of_the_others(bases, tmp_path, model_type):
    base = bases(model_type)
    found = compared(copy_of(base, tmp_path / "copy", lambda p: {k: v for k, v in p.items() if k != 3}), base)
    assert [(match.layer, match.base) for match in found.layers] == [(at, at) for at in (0, 1, 2, 4, 5)]
    assert found.sentences[0] == "layer 3 of the base is gone"


@FAMILY
def test_a_layer_of_random_numbers(bases, tmp_path, model_type):
    base = bases(model_type)
    found = compared(copy_of(base, tmp_path / "copy", with_layer(4, drawn)), base)
    assert found.sentences == (
        "layer 4 matches no layer of the base (random?)", "layers 0-3 and 5 are untouched", OUTSIDE,
    )  # fmt: skip
    zeros = compared(copy_of(base, tmp_path / "zeros", with_layer(4, np.zeros_like)), base)
    assert "layer 4 matches no layer of the base (all zeros)" in zeros.sentences


@FAMILY
@pytest.mark.parametrize("share", [0.002, 0.3])
def test_layers_that_were_trained(bases, tmp_path, model_type, share):
    """Changed by a known share of each tensor's norm, and so of the layer's."""
    base = bases(model_type)

    def change(parts):
        return {
            at: {name: noisy(array, share, seed=n) for n, (name, array) in enumerate(tensors.items())}
            if at in (2, 3, 4)
            else tensors
            for at, tensors in parts.items()
        }

    found = compared(copy_of(base, tmp_path / "copy", change), base)
    assert [match.base for match in found.layers] == list(range(DEPTH))
    assert [match.change for match in found.layers] == pytest.approx([0, 0, share, share, share, 0], rel=0.02)
    assert found.sentences[0].startswith("layers 2-4 were changed by ")
    assert found.sentences[0].endswith(" %")
    assert found.sentences[1:] == ("layers 0, 1 and 5 are untouched", OUTSIDE)


@FAMILY
def test_a_layer_that_is_there_twice(bases, tmp_path, model_type):
    base = bases(model_type)
    found = compared(copy_of(base, tmp_path / "copy", layers_in_order(0, 1, 2, 3, 3, 4, 5), num_hidden_layers=7), base)
    assert found.sentences == (
        "layers 3 and 4 of this checkpoint are both the base's layer 3",
        "in itself, every layer is the base's, untouched",
        OUTSIDE,
    )


def test_a_run_of_layers_that_is_there_twice(bases, tmp_path):
    base = bases("llama")
    found = compared(copy_of(base, tmp_path / "copy", layers_in_order(0, 1, 2, 3, 1, 2, 3, 4, 5)), base)
    assert found.sentences[0] == "layers 1-3 and 4-6 of this checkpoint are both the base's layers 1-3"


def test_a_pruned_export_with_a_layer_healed(bases, tmp_path):
    base, gone = bases("llama"), Removal.of(1, 2)

    def change(parts):
        parts = layers_in_order(*gone.kept(DEPTH))(parts)
        parts[1]["mlp.down_proj.weight"] = noisy(parts[1]["mlp.down_proj.weight"], 0.05)
        return parts

    found = compared(copy_of(base, tmp_path / "copy", change, num_hidden_layers=4), base)
    assert found.gone == (1, 2)
    assert found.layers[1].tensors == ("mlp.down_proj.weight",)
    assert found.sentences[1].startswith("layer 3 was changed by ")
    assert found.sentences[1].endswith("(only mlp.down_proj.weight)")
    weights = load_file(base / "model.safetensors")
    squares = {n: float((a.astype("f8") ** 2).sum()) for n, a in weights.items() if n.startswith("model.layers.3.")}
    moved = 0.05**2 * squares["model.layers.3.mlp.down_proj.weight"]
    assert found.layers[1].change == pytest.approx((moved / sum(squares.values())) ** 0.5, rel=1e-4)


def test_only_the_attention_is_the_base_s(bases, tmp_path):
    base = bases("llama")

    def change(parts):
        mlp = {name: drawn(array) for name, array in parts[2].items() if name.startswith("mlp.")}
        return parts | {2: parts[2] | mlp}

    found = compared(copy_of(base, tmp_path / "copy", change), base)
    assert found.layers[2].base == 2
    assert {*found.layers[2].tensors} == {f"mlp.{part}_proj.weight" for part in ("down", "gate", "up")}


def embedding_of(parts):
    return next(name for name, array in parts.items() if "embed" in name and array.ndim == 2)


def test_embeddings_that_were_resized_or_changed(bases, tmp_path):
    base = bases("llama")

    def grown(parts):
        outside = dict(parts[None])
        for name in (embedding_of(outside), "lm_head.weight"):
            if name in outside:
                outside[name] = np.concatenate([outside[name], drawn(outside[name][:8])])
        return parts | {None: outside}

    found = compared(copy_of(base, tmp_path / "grown", grown, vocab_size=104), base)
    assert any("are resized to 104 tokens, the base's have 96; the rows that both have are equal" in s
               for s in found.sentences)  # fmt: skip

    def changed(parts):
        name = embedding_of(parts[None])
        return parts | {None: parts[None] | {name: noisy(parts[None][name], 0.1)}}

    said = compared(copy_of(base, tmp_path / "changed", changed), base).sentences
    assert said[0] == "every layer is the base's, untouched"
    assert any("embeddings" in s and s.endswith("by 10 %") for s in said)


def test_a_head_of_its_own(bases, tmp_path):
    """An untied copy of the head is told from a tied one, and a changed head is said."""
    base = copy_of(bases("llama"), tmp_path / "base", untied)
    changed = copy_of(base, tmp_path / "changed", with_head(lambda head: noisy(head, 0.02)))
    assert "the head differs by 2 %" in compared(changed, base).sentences
    tied = copy_of(base, tmp_path / "tied", lambda parts: parts | {None: without(parts[None], "lm_head.weight")})
    assert "the head is tied to the embeddings; the base has a head of its own" in compared(tied, base).sentences
    assert "the head is its own; the base's is tied to the embeddings" in compared(base, tied).sentences


def test_a_tied_head_that_is_stored_is_still_tied(bases, tmp_path):
    def stored(parts):
        return parts | {None: parts[None] | {"lm_head.weight": parts[None][embedding_of(parts[None])]}}

    def unstored(parts):
        return parts | {None: without(parts[None], "lm_head.weight")}

    base, copy = (copy_of(bases("llama"), tmp_path / each.__name__, each) for each in (unstored, stored))
    assert compared(copy, base).sentences == ("every layer is the base's, untouched", OUTSIDE)


def untied(parts):
    return parts | {None: parts[None] | {"lm_head.weight": drawn(parts[None][embedding_of(parts[None])])}}


def with_head(make):
    return lambda parts: parts | {None: parts[None] | {"lm_head.weight": make(parts[None]["lm_head.weight"])}}


def without(tensors, name):
    return {each: array for each, array in tensors.items() if each != name}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_same_weights_in_another_dtype(bases, tmp_path, dtype):
    import torch
    from safetensors.torch import load_file as load
    from safetensors.torch import save_file as save

    base, half = bases("llama"), tmp_path / "half"
    shutil.copytree(base, half)
    weights = {name: tensor.to(getattr(torch, dtype)) for name, tensor in load(base / "model.safetensors").items()}
    save(weights, half / "model.safetensors", metadata={"format": "pt"})
    said = compared(half, base).sentences
    assert said[0] == f"every layer is the base's, stored in {dtype} (the base in float32), equal after rounding"
    back = compared(base, half).sentences
    assert back[0] == f"every layer is the base's, stored in float32 (the base in {dtype}), equal after rounding"


def test_quantised_layers_cannot_be_compared(bases, tmp_path):
    base = bases("llama")

    def packed(parts):
        def pack(name, array):
            if array.ndim < 2:
                return {name: array}
            stem = name.removesuffix("weight")
            scales = np.ones((array.shape[0], 1), np.float32)
            return {
                f"{stem}qweight": np.zeros((array.shape[0], array.shape[1] // 8), np.int32),
                f"{stem}scales": scales,
            }

        return parts | {
            at: {name: part for key, array in parts[at].items() for name, part in pack(key, array).items()}
            for at in (1, 2)
        }

    copy = copy_of(base, tmp_path / "packed", packed)
    said = compared(copy, base).sentences
    assert "layers 1 and 2 cannot be compared: quantised (I32)" in said
    assert "layers 0 and 3-5 are untouched" in said
    assert not any("gone" in text for text in said)
    assert compared(copy, copy).sentences == ("every layer is the base's, untouched", OUTSIDE)
    back = compared(base, copy).sentences
    assert "layers 1 and 2 cannot be compared: quantised base" in back


def test_another_width_is_said_and_what_has_one_shape_is_matched(bases, tmp_path):
    base = bases("llama")

    def wider(parts):
        def widen(name, array):
            if "gate_proj" in name or "up_proj" in name:
                return np.concatenate([array, array[:16]])
            return np.concatenate([array, array[:, :16]], 1) if "down_proj" in name else array

        return {
            at: {n: widen(n, a) for n, a in tensors.items()} for at, tensors in layers_in_order(1, 0)(parts).items()
        }

    found = compared(copy_of(base, tmp_path / "wide", wider, intermediate_size=64, num_hidden_layers=2), base)
    assert [match.base for match in found.layers] == [1, 0]
    assert "layers 0 and 1 have changed places" in found.sentences
    assert any("in other shapes: mlp.down_proj.weight is [32, 64], the base's [32, 48]" in s for s in found.sentences)


def test_models_that_have_nothing_in_common_are_told_apart(bases, tmp_path):
    found = compared(bases("gpt2"), bases("llama"))
    assert found.unrelated
    assert found.sentences[0].startswith(
        "nothing can be compared with llama: a gpt2 of 6 layers, the base a llama of 6"
    )
    other = compared(
        families.save_tiny("qwen3", tmp_path / "qwen3", seed=1), bases("llama")
    )  # the same shapes, other weights
    assert not other.unrelated
    assert "no layer is one of the base's (another model?)" in other.sentences
    assert "its type is qwen3, the base's llama" in other.sentences


def test_another_tokenizer_is_said_by_content(bases, tmp_path):
    base, copy = (copy_of(bases("llama"), tmp_path / name, lambda parts: parts) for name in ("base", "copy"))
    (base / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    (copy / "tokenizer.json").write_text('{"model":{"vocab":{"a":0}}}')
    assert not compared(copy, base).tokenizer
    (copy / "tokenizer.json").write_text('{"model":{"vocab":{"a":1}}}')
    assert compared(copy, base).sentences[-1] == "the tokenizer differs (tokenizer.json)"


def sparse(folder, config, layers, rows, columns, mark):
    """Write a checkpoint of zeros, a hole in the file, but for a few values of each matrix that tell it apart."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    header, at, size = {}, 0, rows * columns * 4
    for layer in range(layers):
        header[f"model.layers.{layer}.mlp.up_proj.weight"] = {
            "dtype": "F32", "shape": [rows, columns], "data_offsets": [at, at + size],
        }  # fmt: skip
        at += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        start = file.tell()
        file.truncate(start + at)
        for layer in range(layers):
            file.seek(start + layer * size)
            file.write(np.random.default_rng(mark(layer)).normal(size=64).astype("<f4").tobytes())
    return folder


def test_a_large_tensor_is_never_in_memory_as_a_whole(tmp_path):
    """Of 200 MB in four matrices no more than 40 MB are held, less than one of them, whatever is read or made of it."""
    config = {"model_type": "llama", "num_hidden_layers": 4}
    base = sparse(tmp_path / "base", config, 4, 3200, 4096, lambda layer: layer)
    copy = sparse(tmp_path / "copy", config, 4, 3200, 4096, lambda layer: (1, 0, 2, 9)[layer])
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(-4 - 3200 * 4096 * 4, 2)
        file.write(np.float32(0.5).tobytes())  # the end of layer 2, which is so compared by its values, whole
    assert (base / "model.safetensors").stat().st_size > 200e6
    ours, theirs = (CheckpointParts.of(folder, Checkpoint.open(folder)) for folder in (copy, base))
    tracemalloc.start()
    try:
        layers = match_layers(ours, theirs)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 40e6
    assert layers[2].change > 0
    assert [match.base for match in layers] == [1, 0, 2, None]
