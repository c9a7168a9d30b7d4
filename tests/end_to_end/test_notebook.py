"""The notebook in examples/: its cells run on a tiny model, and it holds the outputs of a run on a real one."""

import json
import re

import pytest

import cli_tiny
from checkout import ROOT

NOTEBOOK = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text())
CELLS = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def source(cell):
    return "".join(cell["source"])


def test_its_cells_run(tmp_path, monkeypatch):
    home = cli_tiny.make(tmp_path)
    monkeypatch.chdir(tmp_path)
    names = {}
    for cell in CELLS:
        if "parameters" in cell["metadata"].get("tags", []):
            exec(source(cell), names)  # then other values for the same names
            names |= {"MODEL": str(home / "base"), "TASKS": ["toy"], "OPTIONS": {"include_path": home / "tasks"}}
            names |= {"LIMIT": 12, "DROP": 2}
        else:
            exec(source(cell), names)
    assert names["audit"].heal_sha256 == names["log"].sha256()
    assert len(names["plan"].removal) == 2


def test_it_holds_the_outputs_of_a_run_in_order_and_no_place_of_a_machine():
    assert [cell["execution_count"] for cell in CELLS] == [*range(1, len(CELLS) + 1)]
    shown = [output for cell in CELLS for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in shown)
    assert any("<table" in str(output.get("data", {}).get("text/html")) for output in shown)
    assert not [output for output in shown if output["output_type"] == "error"]
    assert not re.search(r'"/(root|work|tmp|home)/', json.dumps(NOTEBOOK))


@pytest.mark.parametrize("verb", ["score", "plan", "export", "heal", "audit", "verify"])
def test_it_shows_each_step(verb):
    assert any(f"lp.{verb}(" in source(cell) for cell in CELLS)
