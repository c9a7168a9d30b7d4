"""The benchmark of metrics and searches keeps running: the whole of it on a tiny model."""

import runpy
import sys

import pytest

import cli_tiny
from checkout import BENCHMARKS
from layerprune.search import Constraints
from layerprune.util import SILENT

PROGRAM = BENCHMARKS / "selection.py"


@pytest.fixture(scope="module")
def program():
    return runpy.run_path(str(PROGRAM))


def test_it_chooses_audits_and_goes_on_where_it_was(program, tmp_path, monkeypatch, capsys):
    home = cli_tiny.make(tmp_path)
    words = [
        PROGRAM, home / "base", home, "-o", tmp_path / "out", "--tasks", "toy,odd", "--items", 18, "--audit", 40,
        "--counts", "1,2", "--entries", "ablation/greedy", "cosine/one-shot", "random/one-shot",
        "--equal", "ablation/exchange", "--dtype", "float32",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    program["main"]()
    text = capsys.readouterr().out
    assert "odd (" in text.splitlines()[1]  # left out by name
    rows = {line.split("|")[1].strip(): line for line in text.split("\n\n")[2].splitlines()}
    assert set(rows) >= {"intact", "ablation/greedy", "cosine/one-shot", "random/one-shot", "ablation/exchange"}
    cells = rows["cosine/one-shot"]  # two counts, against intact and below the reference, who may have chosen alike
    assert cells.count("…") + cells.count("the same layers") == 4
    size = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*.jsonl"))
    program["main"]()
    assert accuracies(capsys.readouterr().out) == accuracies(text)
    assert sum(path.stat().st_size for path in (tmp_path / "out").rglob("*.jsonl")) == size  # nothing measured again


def test_items_that_are_skipped_are_not_audited(program, tmp_path, monkeypatch, capsys):
    home = cli_tiny.make(tmp_path)
    shown = []
    for number, words in enumerate((["--audit", 20], ["--audit", 10, "--skip", 10])):
        monkeypatch.setattr(sys, "argv", list(map(str, [
            PROGRAM, home / "base", home, "-o", tmp_path / str(number), "--tasks", "toy", "--items", 18, *words,
            "--counts", 1, "--entries", "cosine/one-shot", "--equal", "--reference", "cosine/one-shot",
            "--dtype", "float32",
        ])))  # fmt: skip
        bench = program["Bench"](program["arguments"](), SILENT)
        [audit] = bench.audits.values()
        shown.append([item.fingerprint for item in audit.eval_set.tasks["toy"].items])
    assert len(set(shown[0])) == 20
    assert shown[1] == shown[0][10:]


def accuracies(text):
    return text.split("\n\n")[2]


def test_equal_budgets_count_what_a_search_really_asks(program):
    constraints = Constraints(8)
    assert program["calls"]("greedy", constraints, 3) == 8 + 7 + 6
    assert program["calls"]("one-shot", constraints, 3) == 8
    assert program["calls"]("blocks", constraints, 3) == 6
