"""The default of ``--memory``: a share of what the weights leave of the machine's memory, whatever is free just now."""

from __future__ import annotations

from types import SimpleNamespace

import psutil
import pytest
import torch

from engine_requests import multiple_choice, tiny_loaded
from layerprune.models import placement
from layerprune.models.placement import process_memory
from layerprune.removal import Removal
from layerprune.scoring import memory
from layerprune.scoring.engine import Engine
from layerprune.scoring.memory import default_memory, default_tokens
from layerprune.scoring.metrics.base import Data
from layerprune.scoring.metrics.loss import Perplexity
from metric_tiny import data_of, texts_of

GIB, MIB = 1024**3, 1024**2


def model_of(weights: dict[str, int], hidden_size: int = 4096, room: int = 0):
    """A model that is nothing but bytes on devices, the first one its own."""
    parts = [
        SimpleNamespace(device=torch.device(device), numel=lambda size=size: size // 2, element_size=lambda: 2)
        for device, size in weights.items()
    ]
    config = SimpleNamespace(hidden_size=hidden_size)
    config.get_text_config = lambda decoder: config
    model = SimpleNamespace(parameters=lambda: iter(parts), config=config)
    return SimpleNamespace(model=model, device=parts[0].device, stream=SimpleNamespace(room=room) if room else None)


@pytest.fixture
def box(tmp_path, monkeypatch):
    """A machine of 16 GiB without control groups; returns the file that names the process's group, and the tree."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=16 * GIB, available=1))
    own, groups = tmp_path / "own", tmp_path / "groups"
    monkeypatch.setattr(placement, "OWN_GROUP", own)
    monkeypatch.setattr(placement, "GROUPS", groups)
    return own, groups


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_without_control_groups_it_is_the_whole_machine(box):
    assert process_memory() == 16 * GIB
    box[0].write_text("0::/\n")
    assert process_memory() == 16 * GIB
    write(box[1] / "memory.max", "max\n")
    assert process_memory() == 16 * GIB
    write(box[1] / "memory.max", f"{32 * GIB}\n")
    assert process_memory() == 16 * GIB


def test_version_2_limits_a_process_by_its_group_and_those_around_it(box):
    own, groups = box
    own.write_text("0::/slice/job/step\n")
    write(groups / "slice/job/step/memory.max", "max\n")
    write(groups / "slice/memory.max", f"{6 * GIB}\n")
    write(groups / "slice/other/memory.max", f"{GIB}\n")
    assert process_memory() == 6 * GIB
    write(groups / "slice/job/step/memory.max", f"{3 * GIB}\n")
    assert process_memory() == 3 * GIB


def test_a_container_sees_its_own_group_as_the_top_of_the_tree(box):
    own, groups = box
    own.write_text("0::/docker/abc\n")  # the name outside, where no such folder is inside
    write(groups / "memory.max", f"{2 * GIB}\n")
    assert process_memory() == 2 * GIB


def test_version_1_has_a_tree_for_each_controller(box):
    own, groups = box
    own.write_text("9:name=systemd:/job\n5:cpu,cpuacct:/job\n4:memory:/job:1\n0::/\n")
    write(groups / "memory/job:1/memory.limit_in_bytes", f"{5 * GIB}\n")
    write(groups / "memory/memory.limit_in_bytes", "9223372036854771712\n")  # how it says that there is none
    write(groups / "cpu/job/memory.limit_in_bytes", f"{GIB}\n")
    assert process_memory() == 5 * GIB


@pytest.mark.parametrize(
    ("limit", "weights", "expected"),
    [
        (16 * GIB, 0, 6 * GIB),  # 6.4 rounded down
        (16 * GIB, 8 * GIB, 3 * GIB),
        (2 * GIB, GIB // 2, 9 * 64 * MIB),  # 614 MiB
        (GIB, GIB - MIB, 64 * MIB),
        (GIB, 3 * GIB, 64 * MIB),  # the weights are on disk, and paged in
        (500 * GIB, 0, 32 * GIB),
    ],
)
def test_a_cpu_gives_a_share_of_what_the_weights_leave(box, monkeypatch, limit, weights, expected):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=500 * GIB))
    box[0].write_text("0::/\n")
    write(box[1] / "memory.max", str(limit))
    loaded = model_of({"cpu": weights, "meta": 10**12})
    assert default_memory(loaded) == expected
    assert default_tokens(loaded) == memory.CPU_TOKENS


def test_a_card_gives_a_share_of_what_the_weights_leave_of_its_total(box, monkeypatch):
    cards = {0: 80 * GIB, 1: 24 * GIB}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda card: (MIB, cards[card.index]))
    assert default_memory(model_of({"cuda:0": 16 * GIB})) == 51 * GIB
    assert default_memory(model_of({"cuda:1": 16 * GIB, "cpu": 40 * GIB})) == 6 * GIB
    assert default_memory(model_of({"cuda:0": 70 * GIB, "cuda:1": 20 * GIB})) == 3 * GIB  # the fullest
    assert default_memory(model_of({"cuda:1": 24 * GIB})) == 64 * MIB
    assert default_memory(model_of({"cuda:0": 16 * GIB}, room=20 * GIB)) == 35 * GIB  # layers that come and go
    assert default_memory(model_of({"mps": 2 * GIB})) == memory.MEMORY


@pytest.mark.parametrize(
    ("width", "tokens"), [(8192, 32768), (4096, 32768), (2048, 65536), (576, 233016), (64, 262144)]
)
def test_a_narrower_model_has_more_tokens_in_a_batch_on_a_card(width, tokens):
    assert default_tokens(model_of({"cuda:0": GIB}, width)) == tokens


def test_the_engine_takes_the_machines_and_the_users_before_it(box):
    loaded = tiny_loaded("llama")
    assert Engine(loaded).memory == 6 * GIB
    assert Engine(loaded, memory=10**7).memory == 10**7
    assert Engine(loaded).tokens == memory.CPU_TOKENS


def test_figures_are_the_same_on_machines_of_different_size(box):
    """Batches have the same tokens on any CPU: what a larger one has more of goes to kept states."""
    loaded = tiny_loaded("llama")
    requests, groups = multiple_choice(loaded.vocabulary)
    removals = [Removal(()), Removal.of(1), Removal.of(0, 2)]
    large, _ = Engine(loaded).measure(requests, groups, removals)
    box[0].write_text("0::/\n")
    write(box[1] / "memory.max", str(GIB))
    assert Engine(loaded).memory < 6 * GIB
    small, _ = Engine(loaded).measure(requests, groups, removals)
    assert (large == small).all()


def test_metrics_that_are_told_nothing_keep_to_the_machine(box, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "layerprune.scoring.engine.default_memory", lambda loaded: asked.append(loaded) or default_memory(loaded)
    )
    loaded = tiny_loaded("llama")
    data: Data = data_of(texts_of((5, 6), vocabulary=loaded.vocabulary))
    Perplexity().score(loaded, [Removal.of(1)], data)
    assert asked == [loaded]
