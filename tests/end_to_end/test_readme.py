"""The README's console blocks, run word for word: on a tiny model in place of the one they name."""

import re
import shlex
import shutil

import pytest

import audit_tiny
import cli_tiny
from checkout import ROOT
from layerprune.artifacts import PRUNED, Audit, Plan
from layerprune.data import tasks

README = (ROOT / "README.md").read_text()
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
TASKS = ("arc_easy", "hellaswag", "piqa")


def commands() -> list[list[str]]:
    blocks = re.findall(r"^```console\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    return [shlex.split(line[2:]) for block in blocks for line in block.splitlines() if line.startswith("$ ")]


def manager_of(home):
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(home / "tasks"), include_defaults=False)
    return lambda names, include_path: manager


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """Run every command in order in one folder; the model's name is a folder there, the tasks' names are tiny tasks."""
    home = tmp_path_factory.mktemp("readme")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audit_tiny, "DEPTH", 10)
        base = audit_tiny.base_model(home / MODEL)
        audit_tiny.pruned_by_hand(base, home / "tuned", 3)  # somebody else's
        for name in TASKS:
            audit_tiny.eval_set(base, home / "tasks", name)
        patch.setattr(tasks, "task_manager", manager_of(home))
        shutil.copytree(ROOT / "recipes", home / "recipes")
        patch.chdir(home)
        return home, [cli_tiny.done(*words[1:]).stdout for words in commands()]


def test_there_are_commands_and_all_are_ours():
    assert len(commands()) >= 6
    assert {words[0] for words in commands()} == {"layerprune"}
    assert ["layerprune", "export", "run/plan.json", "-o", "smaller/"] in commands()


def test_every_command_says_something(said):
    assert all(said[1])


def test_they_leave_what_the_text_promises(said):
    home, _ = said
    assert len(Plan.load(home / "run" / "plan.json").removal) == 6
    assert len(Plan.load(home / "run3" / "plan.json").removal) == 3
    for name in ("plan.json", "receipt.json", "audit.json"):
        assert (home / "smaller" / "layerprune" / name).is_file()
    audit = Audit.load(home / "smaller" / "layerprune" / "audit.json")
    assert audit.overall[PRUNED].items == 120
    assert audit.verdict in (home / "smaller" / "README.md").read_text()
    assert (home / "quickstart" / "plan.json").is_file()
    assert Audit.load(home / "audit" / "audit.json").foreign
    assert (home / "audit" / "card.md").is_file()


def test_the_python_lines_run(said, monkeypatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    home, _ = said
    monkeypatch.chdir(home.parent)
    (home.parent / "tasks").symlink_to(home / "tasks")
    monkeypatch.setattr(tasks, "task_manager", manager_of(home))
    (block,) = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    names = {"MODEL": str(home / MODEL), "model": AutoModelForCausalLM.from_pretrained(home / MODEL)}
    names["tokenizer"] = AutoTokenizer.from_pretrained(home / MODEL)
    exec(block, names)
    assert len(names["plan"].removal) == 2
    assert (home.parent / "healed" / "layerprune" / "audit.json").is_file()


def test_every_file_and_make_target_it_names_is_there():
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (ROOT / link).exists(), link
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z]+)", README))
    assert named <= targets
    assert {"demo", "test"} <= named


def test_no_machine_path_and_no_registry_is_named():
    for file in ("README.md", "Makefile", "constraints.txt", "pyproject.toml", ".ci/run", "CHANGELOG.md"):
        text = (ROOT / file).read_text()
        assert not re.search(r"/(root|work|tmp|home)/|pypi\.|index-url|download\.pytorch", text), file
