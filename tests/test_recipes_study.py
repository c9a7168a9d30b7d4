"""A recipe of a study: the same figures as the command, once, and its faults by line."""

import pytest

import cli_tiny
from cli_tiny import done, refused
from layerprune.artifacts import Study


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = cli_tiny.make(tmp_path_factory.mktemp("recipes"))
    write(folder)
    return folder


def write(folder, study="  tasks: toy\n  metrics: [ablation]\n  audit_limit: 12\n  counts: [1]\n", more=""):
    path = folder / "recipe.yaml"
    path.write_text(f"model: {folder / 'base'}\ninclude_path: [{folder / 'tasks'}]\n{more}study:\n{study}")
    return path


def test_a_study_recipe_is_the_command(home):
    said = done("run", write(home), "-o", home / "run").stdout
    by_hand = ["study", home / "base", "--tasks", "toy", "--include-path", home / "tasks", "--metric", "ablation",
               "--audit-limit", 12, "--counts", 1, "-o", home / "by-hand"]  # fmt: skip
    assert done(*by_hand).stdout.splitlines()[0] == said.splitlines()[0]
    assert Study.load(home / "run" / "study.json") == Study.load(home / "by-hand" / "study.json")
    again = done("run", home / "recipe.yaml", "-o", home / "run")
    assert "study: done before" in again.stderr
    assert again.stdout == said
    message = refused("run", home / "recipe.yaml", "--set", "study.audit_limit=13", "-o", home / "run")
    assert "study.audit_limit: 12 -> 13" in message
    pruning = home / "prune.yaml"
    pruning.write_text(f"model: {home / 'base'}\nscore:\n  tasks: toy\nplan:\n  drop: 1\n")
    said = refused("run", pruning, "-o", home / "run")
    assert said == f"{home / 'run'} is a run of another recipe, a 'study-recipe'; give another folder with -o"
    assert "is of no recipe" in refused("run", home / "recipe.yaml", "-o", home / "by-hand")


def test_faults_are_found_before_anything_starts(home, tmp_path):
    path = write(tmp_path, "  tasks: [toy]\n  metrics: [cosin]\n  greedy: 0\n  text: none.txt\n  metric: x\n")
    result = cli_tiny.layerprune("run", path, "-o", tmp_path / "out")
    assert result.exit_code == 2
    for said in ("Did you mean 'cosine'", "--greedy 0", "the file none.txt does not exist", "study.metric"):
        assert said in result.stderr
    odd = write(home, "  tasks: odd\n")
    assert "at chance" in cli_tiny.last_line("run", odd, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()
