"""``offload``: layers on disk or in CPU memory that come in as they run, and give what a model in memory gives."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

import audit_tiny
import cli_tiny
from engine_requests import multiple_choice
from families import FAMILIES, tiny_model
from layerprune.errors import ModelError, UsageError
from layerprune.models import offload
from layerprune.models.bypass import pruned_view
from layerprune.models.model import LoadedModel
from layerprune.models.placement import placed
from layerprune.removal import Removal
from layerprune.scoring.engine import Engine
from layerprune.scoring.metrics.base import Data
from layerprune.scoring.metrics.proxies import Magnitude, Taylor

VOCABULARY = 60


def saved(folder: Path, kind: str = "llama", dtype: torch.dtype = torch.float32) -> str:
    torch.manual_seed(0)
    tiny_model(kind).to(dtype).save_pretrained(folder)
    return str(folder)


def loaded(folder: str, where: str, dtype: str = "float32") -> LoadedModel:
    return LoadedModel.load(folder, offload=where, dtype=dtype, device="cpu", reads_text=False)


def logits(model: LoadedModel, *layers: int) -> torch.Tensor:
    ids = torch.arange(24).reshape(2, 12) % 50 + 3
    with torch.no_grad(), model.without(Removal.of(*layers)) as without:
        return without(input_ids=ids, use_cache=False).logits


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_model_on_disk_answers_as_in_memory_to_the_last_bit(tmp_path, kind):
    folder = saved(tmp_path, kind)
    there, away = loaded(folder, "none"), loaded(folder, "disk")
    assert there.stream is None
    assert away.stream is not None
    assert all(parameter.is_meta for layer in away.layers for parameter in layer.parameters())
    assert torch.equal(logits(there), logits(away))
    assert torch.equal(logits(there, 1), logits(away, 1))
    requests, groups = multiple_choice(VOCABULARY)
    removals = [Removal(()), *map(Removal.of, range(len(there.layers)))]
    found = []
    for model in (there, away):
        engine = Engine(model)
        engine.choose_path(requests, groups)
        found.append((engine.path.name, *engine.measure(requests, groups, removals)))
    assert found[0][0] == found[1][0]
    assert np.array_equal(found[0][1], found[1][1])
    assert np.array_equal(found[0][2], found[1][2])


def test_a_walk_reads_each_layer_once_whatever_the_removals(tmp_path):
    model = loaded(saved(tmp_path), "disk")
    requests, groups = multiple_choice(VOCABULARY, count=30)
    engine = Engine(model, tokens=64)
    engine.choose_path(requests, groups)
    depth = len(model.layers)
    everything = [Removal(()), *map(Removal.of, range(depth)), Removal.of(0, 2), Removal.of(1, depth - 1)]
    batches, run = [], engine.path.run

    def counted(rows, removals):
        batches.append(len(rows))
        return run(rows, removals)

    engine.path.run = counted
    engine.measure(requests, groups, [Removal(())])  # what a path holds is measured on its first items
    for removals in ([Removal(())], everything):
        batches.clear()
        engine.path.walk.base_states = None  # what an earlier round has left would not be computed again
        model.stream.reads[:] = [0] * depth
        engine.measure(requests, groups, removals)
        assert len(batches) > 2
        assert model.stream.reads[1:] == [len(batches)] * (depth - 1)
        assert abs(model.stream.reads[0] - len(batches)) <= 1  # read ahead by the batch before, and for the next one


def test_a_layer_that_is_bypassed_is_not_read_again_and_again(tmp_path):
    model = loaded(saved(tmp_path), "disk")
    with torch.no_grad(), model.without(Removal.of(1)) as without:
        for number in range(6):
            without(input_ids=torch.tensor([[3, 4, 5]]), use_cache=False)
            if number == 0:  # once, to see in what form it answers; and the order that it leaves is new
                model.stream.reads[:] = [0] * len(model.layers)
    assert model.stream.reads[1] <= 1
    assert model.stream.reads[2] >= 5


def test_two_layers_at_most_are_in_memory(tmp_path, monkeypatch):
    model = loaded(saved(tmp_path), "disk")
    layers = len(model.layers)
    arrived: list[list[weakref.ref]] = []
    most = 0
    read = model.stream.read

    def watched(index):
        nonlocal most
        found = read(index)
        arrived.append([weakref.ref(tensor) for tensor in found.tensors.values()])
        most = max(most, sum(any(tensor() is not None for tensor in own) for own in arrived))
        return found

    monkeypatch.setattr(model.stream, "read", watched)
    gc.disable()  # what only the collector would free counts
    try:
        logits(model)
        logits(model)
    finally:
        gc.enable()
    assert len(arrived) >= 2 * layers - 1  # and one was read ahead when the model was loaded
    assert most <= 2


def test_weights_come_in_the_dtype_that_was_asked_for(tmp_path):
    folder = saved(tmp_path)
    there, away = loaded(folder, "none", "bfloat16"), loaded(folder, "disk", "bfloat16")
    assert torch.equal(logits(there), logits(away))
    assert logits(away).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3"])
def test_a_view_without_layers_writes_the_same(tmp_path, kind):
    folder = saved(tmp_path, kind)
    written = []
    for where in ("none", "disk"):
        model = loaded(folder, where)
        view = pruned_view(model.model, model.architecture, Removal.of(1))
        ids = torch.tensor([[5, 6, 7, 8]])
        written.append(view.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False))
    assert torch.equal(*written)


def test_a_changed_weight_stays_changed(tmp_path):
    folder = saved(tmp_path)
    there, away = loaded(folder, "none"), loaded(folder, "disk")
    before = logits(there)
    name = f"{there.architecture.stack}.1.mlp.down_proj.weight"
    value = there.model.get_parameter(name).detach().double() + 0.25
    with away.layer(0):
        pass  # layer 1 is read ahead, as it was
    for model in (there, away):
        model.change(name, value)
    with away.layer(1) as layer:
        assert torch.equal(layer.get_parameter("mlp.down_proj.weight"), value.float())
    assert not torch.equal(before, logits(there))
    assert torch.equal(logits(there), logits(away))
    assert torch.equal(logits(there), logits(away))  # read ahead or not


def test_metrics_of_weights_read_them_where_they_are(tmp_path):
    folder = saved(tmp_path)
    removals = [Removal.of(layer) for layer in range(4)]
    there, away = (Magnitude().score(loaded(folder, where), removals, Data()) for where in ("none", "disk"))
    assert [candidate.score for candidate in there] == [candidate.score for candidate in away]
    with pytest.raises(UsageError, match="gradients need all layers in memory"):
        Taylor().score(loaded(folder, "disk"), removals, Data())


def test_a_copy_shares_the_stream(tmp_path):
    model = loaded(saved(tmp_path), "disk")
    assert copy.deepcopy(model.stream) is model.stream


def test_a_file_that_goes_while_the_model_runs_is_named(tmp_path):
    model = loaded(saved(tmp_path), "disk")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        logits(model)


def test_layers_in_cpu_memory_come_from_there(tmp_path, monkeypatch):
    """On a card; here the CPU stands for one that the weights are not on."""
    folder = saved(tmp_path)
    there, away = loaded(folder, "none"), loaded(folder, "none")
    sources = [offload.sources_of(layer, "", {}, torch.device("meta")) for layer in away.layers]
    assert all(parameter.is_meta for layer in away.layers for parameter in layer.parameters())
    away.stream = offload.LayerStream(torch.device("cpu"), sources)
    away.stream.attach(away.layers)
    assert torch.equal(logits(there), logits(away))


GB = 10**9


@pytest.mark.parametrize(
    ("device", "asked", "weights", "cards", "expected"),
    [
        ("cpu", "auto", 10 * GB, [], ("cpu", None)),
        ("cpu", "auto", 17 * GB, [], ("cpu", "disk")),
        ("cpu", "none", 17 * GB, [], ("cpu", None)),
        ("cpu", "disk", 1 * GB, [], ("cpu", "disk")),
        ("auto", "auto", 17 * GB, [], ("cpu", "disk")),
        ("auto", "auto", 10 * GB, [8 * GB, 16 * GB], ("cuda:1", None)),
        ("auto", "auto", 15 * GB, [8 * GB, 16 * GB], ("auto", None)),
        ("auto", "auto", 15 * GB, [8 * GB], ("cuda:0", "cpu")),
        ("auto", "auto", 30 * GB, [8 * GB, 16 * GB], ("cuda:1", "disk")),
        ("auto", "none", 30 * GB, [8 * GB, 16 * GB], ("auto", None)),
        ("auto", "cpu", 1 * GB, [8 * GB, 16 * GB], ("cuda:1", "cpu")),
        ("cuda:0", "auto", 15 * GB, [8 * GB, 16 * GB], ("cuda:0", "cpu")),
        ("cuda:0", "auto", 6 * GB, [8 * GB, 16 * GB], ("cuda:0", None)),
    ],
)
def test_layers_stay_elsewhere_where_the_model_does_not_fit(monkeypatch, device, asked, weights, cards, expected):
    def free(card):
        return cards[torch.device(card).index], 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(cards))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))
    monkeypatch.setattr(torch.cuda, "mem_get_info", free)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 20 * GB, "total": 32 * GB}))
    assert placed(device, asked, weights) == expected


def test_layers_in_cpu_memory_need_a_card(tmp_path):
    with pytest.raises(UsageError, match="use disk"):
        loaded(saved(tmp_path), "cpu")


def test_the_command_line_takes_it(tmp_path):
    model = audit_tiny.base_model(tmp_path / "model")
    for name, where in (("a", "none"), ("b", "disk")):
        cli_tiny.done("score", model, "--metric", "magnitude", "--offload", where, "-o", tmp_path / name)
    assert (tmp_path / "a" / "scores.json").read_bytes() == (tmp_path / "b" / "scores.json").read_bytes()
    assert "not one of auto, none, cpu, disk" in cli_tiny.refused(
        "score", model, "--offload", "elsewhere", "-o", tmp_path / "c"
    )
    assert not (tmp_path / "c").exists()
