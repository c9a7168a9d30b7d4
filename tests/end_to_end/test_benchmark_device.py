"""The benchmark of the engine on a device keeps running: the whole of it on a tiny random model and the CPU."""

import inspect
import json
import math
import runpy
import sys

import pytest
import torch

from checkout import BENCHMARKS
from layerprune.errors import UsageError
from layerprune.models.model import LoadedModel
from layerprune.removal import Removal
from layerprune.scoring.engine import Engine

PROGRAM = BENCHMARKS / "device.py"
MEASURED = {
    "self-test", "path", "items", "tokens of their prefix tree", "batches", "time", "tokens x layers", "arithmetic",
    "of the matrix rate", "waits of the host", "peak memory", "memory allowed", "share of layers", "share of grading",
    "share of the rest",
}  # fmt: skip
LM_EVAL = {
    "items", "batch size", "time of a removal and item", "the engine's", "ratio", "largest difference",
    "mean difference", "mean difference of the two removals",
}  # fmt: skip


@pytest.fixture(scope="module")
def program():
    return runpy.run_path(str(PROGRAM))


def table(program, monkeypatch, out, *words):
    """Run the program; returns its rows by section and measure."""
    monkeypatch.setattr(
        sys, "argv", list(map(str, [PROGRAM, "--shape", "tiny", "--device", "cpu", "--json", out, *words]))
    )
    program["main"]()
    rows = json.loads(out.read_text())["rows"]
    return {(row["section"], row["measure"]): row["value"] for row in rows}


def test_every_row_is_there_and_lm_eval_agrees(program, tmp_path, monkeypatch, capsys):
    words = ["--dtype", "float32", "--items", 6, "--folder", tmp_path / "model", "--offload", "disk", "--minutes", 60]
    found = table(program, monkeypatch, tmp_path / "rows.json", *words)
    for section, expected in (("zero-shot", MEASURED), ("few-shot", MEASURED), ("lm-eval", LM_EVAL)):
        assert {measure for own, measure in found if own == section} == expected
    figures = {key: value for key, value in found.items() if not isinstance(value, str)}
    assert all(math.isfinite(value) and value >= 0 for value in figures.values())
    assert found["zero-shot", "path"] == "trees"
    assert found["few-shot", "path"] == "beginnings"
    assert found["zero-shot", "peak memory"] < found["zero-shot", "memory allowed"]
    assert found["lm-eval", "largest difference"] < 1e-3
    assert found["lm-eval", "mean difference of the two removals"] > 0.05  # there is something to agree on
    assert len([measure for own, measure in found if own == "greedy"]) == 5
    if "offload" in inspect.signature(LoadedModel.load).parameters:
        assert found["offload", "largest difference"] < 1e-3
    else:
        assert ("offload", "skipped") in found
    text = capsys.readouterr().out
    assert all(f"| {section} | {measure} |" in text for section, measure in found)


def test_without_time_a_row_says_what_was_left_out(program, tmp_path, monkeypatch):
    found = table(program, monkeypatch, tmp_path / "rows.json", "--minutes", 0)
    assert {key for key in found if key[0] not in ("model", "device")} == {
        ("zero-shot", "skipped"),
        ("few-shot", "skipped"),
    }


def test_rounds_of_a_search_cost_what_the_engine_computes(program):
    """The second round's share of the first, as extrapolated, is that of tokens x layers that the engine counts."""
    loaded = program["build"](program["SHAPES"]["tiny"], "float32", torch.device("cpu"))
    items = program["zero_shot"](program["random"].Random(1), loaded.vocabulary)
    block = program["Block"].of([next(items) for _ in range(4)])
    engine, work = Engine(loaded), []
    engine.choose_path(block.requests, block.groups)
    for removals in ([(0,), (1,), (2,), (3,)], [(0, 2), (1, 2), (2, 3)]):
        before = engine.account.computed
        engine.measure(block.requests, block.groups, [Removal.from_layers(set(each)) for each in removals])
        work.append(engine.account.computed - before)
    first = program["Round"](10.0, None, work[0], None)
    section = program["Section"](block, first, 1.0, {"layers": 1.0, "grading": 0.0})
    assert program["greedy_seconds"](4, 1, section, 4) == pytest.approx(10.0)
    assert program["greedy_seconds"](4, 2, section, 4) == pytest.approx(10.0 * (1 + work[1] / work[0]))
    assert program["greedy_seconds"](4, 1, section, 12) == pytest.approx(30.0)


def test_a_model_that_has_no_room_is_not_written(program, tmp_path, monkeypatch):
    room = program["load"].__globals__["shutil"]
    monkeypatch.setattr(room, "disk_usage", lambda path: room._ntuple_diskusage(10**9, 10**9, 10**6))
    with pytest.raises(UsageError, match=r"has 1 MB free and the weights take 16\.1 GB"):
        program["load"](program["SHAPES"]["8b"], tmp_path / "model", "bfloat16", torch.device("cpu"))
    assert not (tmp_path / "model").exists()


def test_a_folder_of_another_shape_is_refused(program, tmp_path):
    shapes, device = program["SHAPES"], torch.device("cpu")
    program["load"](shapes["tiny"], tmp_path / "model", "float32", device)
    with pytest.raises(UsageError, match="holds a model with hidden_size 64, and 384 was asked for"):
        program["load"](shapes["small"], tmp_path / "model", "float32", device)
