"""A recipe's run: the same documents as the single commands, and nothing done twice after an interruption."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest

import cli_tiny
from cli_tiny import done, layerprune, refused
from layerprune.artifacts import Audit, Plan, Recipe

STEPS = ("layerprune.planner.plan_model", "layerprune.exporter.export", "layerprune.auditor.audit")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = cli_tiny.make(tmp_path_factory.mktemp("recipes"))
    (folder / "recipe.yaml").write_text(
        f"model: {folder / 'base'}\n"
        f"include_path: [{folder / 'tasks'}]\n"
        "seed: 0\n"
        "score:\n"
        "  tasks: toy\n"
        "plan:\n"
        "  drop: 2\n"
        "  protect: [0]\n"
        "audit:\n"
        "  limit: 40\n"
        "  generation: false\n"
    )
    done("run", folder / "recipe.yaml", "-o", folder / "run")
    return folder


def files(folder):
    """Content of every file below a run folder but the journal, whose lines may come in other portions."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "journal.jsonl"
    }


def forbid(monkeypatch, *names):
    for name in names:

        def called(*args, name=name, **kwargs):
            raise AssertionError(f"{name} was called again")

        monkeypatch.setattr(name, called)


def test_a_run_does_what_the_single_commands_do(home, tmp_path):
    words = ["--tasks", "toy", "--include-path", home / "tasks"]
    done("plan", home / "base", *words, "--drop", 2, "--protect", "0", "-o", tmp_path / "run")
    done("export", tmp_path / "run", "-o", tmp_path / "smaller")
    done("audit", tmp_path / "smaller", *words, "--limit", 40, "--no-generation")
    for name in ("scores.json", "plan.json"):
        assert (tmp_path / "run" / name).read_bytes() == (home / "run" / name).read_bytes()
    folders = (tmp_path / "smaller", home / "run" / "checkpoint")
    ours, theirs = (Audit.load(path / "layerprune" / "audit.json") for path in folders)
    assert ours.tasks == theirs.tasks
    assert ours.limit == 40
    assert Recipe.load(home / "run" / "recipe.json") == Recipe.load(home / "recipe.yaml")


def test_a_finished_run_does_nothing_and_says_the_same(home, monkeypatch):
    before = files(home / "run")
    forbid(monkeypatch, *STEPS)
    again = done("run", home / "recipe.yaml", "-o", home / "run")
    assert files(home / "run") == before
    assert Audit.load(home / "run/checkpoint/layerprune/audit.json").verdict in again.stdout
    for word in ("score, plan: done before", "export: done before", "audit: done before"):
        assert word in again.stderr


@pytest.mark.parametrize("step", range(3))
def test_a_run_that_is_interrupted_in_a_step_goes_on_from_there(home, tmp_path, monkeypatch, step):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(STEPS[step], interrupted)
        first = layerprune("run", home / "recipe.yaml", "-o", tmp_path / "run")
    assert first.exit_code == 130
    assert "interrupted; run the same command again: finished steps are kept" in first.stderr
    forbid(monkeypatch, *STEPS[:step])
    done("run", home / "recipe.yaml", "-o", tmp_path / "run")
    ours, theirs = files(tmp_path / "run"), files(home / "run")
    assert ours.keys() == theirs.keys()
    same = [name for name in theirs if not name.endswith(("receipt.json", "audit.json", "README.md"))]
    assert {name: ours[name] == theirs[name] for name in same} == dict.fromkeys(same, True)
    assert verdict(ours) == verdict(theirs)  # receipt and audit also name the folder they lie in


def verdict(content):
    return json.loads(content["checkpoint/layerprune/audit.json"])["verdict"]


def test_kill_dash_nine_while_scoring_loses_nothing_that_was_measured(home, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "layerprune", "run", home / "recipe.yaml", "-o", run]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (run / "journal.jsonl").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    measured = (run / "journal.jsonl").read_bytes()
    whole = measured[: measured.rfind(b"\n") + 1]
    done("run", home / "recipe.yaml", "-o", run)
    assert (run / "journal.jsonl").read_bytes().startswith(whole)
    assert files(run)["scores.json"] == files(home / "run")["scores.json"]
    assert files(run)["plan.json"] == files(home / "run")["plan.json"]


def test_a_changed_recipe_needs_another_folder(home):
    before = files(home / "run")
    said = refused("run", home / "recipe.yaml", "--set", "plan.drop=3", "--set", "audit.limit=9", "-o", home / "run")
    assert said == (
        f"{home / 'run'} is a run of another recipe (audit.limit: 40 -> 9; plan.drop: 2 -> 3); "
        "give another folder with -o"
    )
    assert files(home / "run") == before


def test_a_step_that_has_left_nothing_yet_can_be_put_right(home, tmp_path, monkeypatch):
    from layerprune.healing import HEALERS

    folder = tmp_path / "run"
    shutil.copytree(home / "run", folder)
    text = (home / "recipe.yaml").read_text()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{text}heal:\n  method: rescale\n  corpus: {home / 'none.txt'}\n")
    assert "heal.corpus" in refused("run", recipe, "-o", folder)
    recipe.write_text(f"{text}heal:\n  method: nosuch\n")
    refused("run", recipe, "-o", folder)
    recipe.write_text(f"{text}heal:\n  method: scaling:factor=0.5\n  corpus: builtin\n  window: 32\n")
    monkeypatch.setitem(HEALERS.builtin, "scaling", "heal_tiny:Scaling")
    forbid(monkeypatch, "layerprune.planner.plan_model", "layerprune.exporter.export")
    done("run", recipe, "-o", folder)
    assert Recipe.load(folder / "recipe.json").heal.window == 32
    said = refused("run", recipe, "--set", "heal.window=16", "-o", folder)  # now it has left something
    assert "heal.window: 32 -> 16" in said


def test_a_damaged_record_of_a_run_is_said_in_one_line(home, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.json").write_text('{"kind": "recipe", ')
    said = refused("run", home / "recipe.yaml", "-o", tmp_path / "run")
    assert "recipe.json" in said


def test_a_folder_with_other_documents_is_left_alone(home, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    shutil.copy(home / "run" / "plan.json", folder)
    assert "plan.json exists and is of no recipe" in refused("run", home / "recipe.yaml", "-o", folder)
    assert [path.name for path in folder.iterdir()] == ["plan.json"]


def test_a_plan_edited_by_hand_is_not_mixed_with_what_came_from_another(home, tmp_path):
    folder = shutil.copytree(home / "run", tmp_path / "run")
    plan = Plan.load(folder / "plan.json")
    plan.model_copy(update={"removal": plan.removal[:1], "order": plan.removal[:1]}).save(folder / "plan.json")
    said = cli_tiny.last_line("run", home / "recipe.yaml", "-o", folder)
    assert f"{folder / 'checkpoint'} was not exported from the run's plan.json; remove it to export again" in said
    shutil.rmtree(folder / "checkpoint")
    done("run", home / "recipe.yaml", "-o", folder)
    assert json.loads((folder / "checkpoint" / "config.json").read_text())["num_hidden_layers"] == 5


def test_faults_of_form_and_of_values_are_reported_together(home, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "model: m\n"
        "include_path: [nowhere]\n"
        "score:\n"
        "  metric: cosin:tokens=last\n"
        "  tasks: [toy]\n"
        "plan:\n"
        "  drop: most\n"
        "  search: greedy:width=2\n"
        "  protect: one\n"
        "export:\n"
        "  max_shard_size: big\n"
        "audti: {}\n"
    )
    result = layerprune("run", recipe, "-o", tmp_path / "run")
    assert result.exit_code == 2
    first, *told = result.stderr.splitlines()
    assert first == f"layerprune: {recipe} has 7 faults"
    assert [line.removeprefix(f"{recipe}:").split(": ")[0] for line in told] == ["2", "4", "7", "8", "9", "11", "12"]
    assert "Did you mean 'cosine'?" in told[1]
    assert "Did you mean 'audit'?" in told[6]
    assert not (tmp_path / "run").exists()


def test_the_audit_of_a_recipe_is_looked_at_before_anything_slow_starts(home, tmp_path, monkeypatch):
    forbid(monkeypatch, *STEPS)
    words = ["run", home / "recipe.yaml", "-o", tmp_path / "run"]
    assert "unknown task 'od'. Did you mean 'odd'?" in refused(*words, "--set", "audit.tasks=od")
    assert "audit.text: the file nowhere.txt does not exist" in refused(*words, "--set", "audit.text=nowhere.txt")
    assert not (tmp_path / "run").exists()


def test_a_recipe_that_cannot_be_carried_out_says_so_in_one_line(home, tmp_path):
    said = refused("run", home / "recipe.yaml", "--set", "plan.drop=6", "-o", tmp_path / "run")
    assert said.startswith("--drop 6: the model has 6 layers")
    assert not (tmp_path / "run").exists()  # so that the recipe, put right, can have the folder


def test_a_recipe_heals_and_audits_what_was_healed(home, tmp_path, monkeypatch):
    import heal_tiny
    from layerprune.artifacts import HealLog
    from layerprune.healing import HEALERS

    monkeypatch.setitem(HEALERS.builtin, "scaling", "heal_tiny:Scaling")
    text = (home / "recipe.yaml").read_text()
    recipe = tmp_path / "recipe.yaml"
    prose = heal_tiny.prose(tmp_path / "prose.txt")
    recipe.write_text(f"{text}heal:\n  method: scaling:factor=0.5\n  corpus: {prose}\n  window: 32\n")
    said = done("run", recipe, "-o", tmp_path / "run").stdout
    log = HealLog.load(tmp_path / "run" / "healed" / "layerprune" / "heal.json")
    audit = Audit.load(tmp_path / "run" / "healed" / "layerprune" / "audit.json")
    assert audit.heal_sha256 == log.sha256()
    assert set(log.corpus.overlap) == {"toy"}
    assert "scaling:factor=0.5: 1 tensors changed" in said
    assert not (tmp_path / "run" / "checkpoint" / "layerprune" / "audit.json").exists()
    forbid(monkeypatch, *STEPS, "layerprune.healing.healer.heal")
    done("run", recipe, "-o", tmp_path / "run")
    recipe.write_text(f"{text}heal:\n  method: scalign\n")
    assert "heal.method: unknown healing method 'scalign'. Did you mean" in refused("run", recipe, "-o", tmp_path / "x")
    recipe.write_text(f"{text}heal:\n  method: scaling\n  corpus: {tmp_path}/none.txt\n")
    assert "heal.corpus: the corpus" in refused("run", recipe, "-o", tmp_path / "x")
