"""Bad input is answered in one line with exit code 2, and nothing is written."""

import errno
import json
import os
import shutil

import pytest

import cli_tiny
from cli_tiny import done, refused
from layerprune.artifacts import Plan


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = cli_tiny.make(tmp_path_factory.mktemp("faults"))
    done("plan", folder / "base", "--metric", "reverse-order", "--drop", 2, "-o", folder / "run")
    return folder


@pytest.fixture
def out(tmp_path):
    """A folder that a refused command must not have made; checked when the test is over."""
    folder = tmp_path / "out"
    yield folder
    assert not folder.exists()
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def plan(home, out, *words, model=None, tasks="toy", drop=2):
    given = ["--tasks", tasks, "--include-path", home / "tasks"] if tasks else []
    return refused("plan", model or home / "base", *given, "--drop", drop, "-o", out, *words)


def test_an_unknown_task(home, out):
    assert "unknown task 'tyo'. Did you mean 'toy'?" in plan(home, out, tasks="tyo")


def test_a_task_folder_that_does_not_exist(home, out):
    assert "elsewhere does not exist" in plan(home, out, "--data-dir", "elsewhere")


def test_an_unknown_metric(home, out):
    assert plan(home, out, "--metric", "ablatoin").startswith("unknown metric 'ablatoin'. Did you mean 'ablation'?")


def test_an_unknown_option_of_a_metric(home, out):
    assert "cosine has no option 'token'. Did you mean 'tokens'?" in plan(home, out, "--metric", "cosine:token=last")


def test_an_unknown_search(home, out):
    assert "unknown search 'gredy'. Did you mean 'greedy'?" in plan(home, out, "--search", "gredy")


def test_an_unknown_recipe_key(home, out, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {home / 'base'}\nscore:\n  tasks: toy\n  limmit: 3\nplan:\n  drop: 1\n")
    said = refused("run", recipe, "-o", out)
    assert said.startswith(f"{recipe}:4: score.limmit: unknown key. Did you mean 'limit'?")


def test_a_metric_that_needs_items_without_tasks(home, out):
    assert "needs items: give tasks, such as --tasks" in plan(home, out, tasks=None)


def test_a_search_beyond_the_metric(home, out):
    assert "scores single layers" in plan(home, out, "--metric", "cosine", "--search", "greedy")


@pytest.mark.parametrize("model", ["nowhere", "./nowhere", "base/config.json"])
def test_a_model_path_that_does_not_exist(home, out, model, monkeypatch):
    monkeypatch.chdir(home)
    place = home / model if model == "nowhere" else model
    assert ("does not exist" if "nowhere" in model else "is a file") in plan(home, out, model=place)


@pytest.mark.parametrize("drop", ["6", "7", "100%", "0", "many"])
def test_dropping_every_layer_or_none(home, out, drop):
    assert f"{drop}" in plan(home, out, drop=drop)


def test_dropping_more_than_is_not_protected(home, out):
    said = plan(home, out, "--protect", "0,1,-1", drop=4)
    assert said == "cannot remove 4 layers: of 6 layers 3 may go (protected: 0, 1, 5)"


def test_protecting_a_layer_that_is_not_there(home, out):
    assert "layer 6 does not exist; the model has layers 0 to 5" in plan(home, out, "--protect", "6")


def test_a_task_the_model_is_at_chance_on(home, out):
    assert plan(home, out, tasks="odd").startswith("task 'odd': the intact model is at chance")


def test_an_unknown_dtype_and_device(home, out):
    assert "unknown dtype 'float8'" in plan(home, out, "--dtype", "float8")
    assert "unknown device 'gpu'" in plan(home, out, "--device", "gpu")
    assert "unknown attn_implementation 'fast'; use auto, eager" in plan(home, out, "--attn-implementation", "fast")


def test_neither_model_nor_scores(out):
    assert "name the MODEL to plan for, or give --scores" in refused("plan", "--drop", 1, "-o", out)


def test_scores_together_with_what_only_a_model_can_answer(home, out):
    scores = home / "run" / "scores.json"
    words = ["plan", "--scores", scores, "--drop", 1, "-o", out]
    assert "a MODEL cannot be given with it" in refused(*words, home / "base")
    assert "--limit cannot be given with it" in refused(*words, "--limit", 3)


def test_scores_that_do_not_reach_as_far_as_the_search(home, out):
    scores = home / "run" / "scores.json"
    said = refused("plan", "--scores", scores, "--drop", 3, "--search", "greedy", "-o", out)
    assert "scores.json has no score for (0, 4)" in said


def test_scores_of_whole_sets(home, out, tmp_path):
    done("plan", home / "base", "--metric", "random", "--drop", 2, "--search", "blocks", "-o", tmp_path / "blocks")
    said = refused("plan", "--scores", tmp_path / "blocks" / "scores.json", "--drop", 2, "-o", out)
    assert said == "scores.json holds whole sets of layers, as its search judged them; plan from the model"


def test_scores_that_are_a_plan(home, out):
    said = refused("plan", "--scores", home / "run" / "plan.json", "--drop", 3, "-o", out)
    assert "is a 'plan' document; expected 'scores'" in said


def test_a_plan_for_another_model(home, out, tmp_path):
    other = shutil.copytree(home / "base", tmp_path / "other")
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-100] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    said = refused("export", home / "run" / "plan.json", "--base", other, "-o", out)
    assert said.startswith("the plan is for base with weights sha256:")


def test_a_plan_edited_into_nonsense(home, out, tmp_path):
    data = json.loads((home / "run" / "plan.json").read_text())
    edited = tmp_path / "plan.json"
    for removal, message in (([9], "9"), ([1, 1], "named twice"), ([0, 1, 2, 3, 4, 5], "6 layers")):
        edited.write_text(json.dumps(data | {"removal": removal, "order": removal}))
        assert message in refused("export", edited, "-o", out)
    edited.write_text(json.dumps(data | {"removal": [1, 4]}))
    assert "plan.json: order names [4, 3] and removal [1, 4]" in refused("export", edited, "-o", out)


def test_a_truncated_safetensors_file(home, out, tmp_path):
    broken = shutil.copytree(home / "base", tmp_path / "broken")
    weights = broken / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1000)
    for said in (
        refused("inspect", broken),
        plan(home, out, model=broken),
        refused("export", home / "run" / "plan.json", "--base", broken, "-o", out),
    ):
        assert str(weights) in said


def test_a_full_disk_while_exporting_leaves_no_folder(home, out, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)  # where a full disk shows at the latest
    said = refused("export", home / "run" / "plan.json", "-o", out)
    assert "No space left on device" in said
    assert "nothing was left behind" in said


def test_an_export_folder_that_exists_is_left_alone(home, tmp_path):
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine.txt").write_text("mine")
    assert "exists already" in refused("export", home / "run" / "plan.json", "-o", taken)
    assert [path.name for path in taken.iterdir()] == ["mine.txt"]


def test_a_size_that_is_none(home, out):
    said = refused("export", home / "run" / "plan.json", "--max-shard-size", "5 apples", "-o", out)
    assert "Invalid value for '--max-shard-size': '5 apples' is not a size; write 5GB or 500MB" in said


def test_a_proposer_that_is_not_there_is_refused_before_the_model_is_loaded(home, out):
    assert "unknown metric 'foo'" in plan(home, out, "--search", "exchange:by=foo")
    assert not out.exists()


def test_scores_that_hold_nothing(home, tmp_path):
    data = json.loads((home / "run" / "scores.json").read_text())
    empty = tmp_path / "scores.json"
    empty.write_text(json.dumps(data | {"rounds": []}))
    assert "scores.json: rounds: Tuple should have at least 1 item" in refused(
        "plan", "--scores", empty, "--drop", 1, "-o", tmp_path / "run"
    )
    nothing = {"removed": [], "candidates": []}
    for rounds, number in (([nothing], 0), ([*data["rounds"], nothing], len(data["rounds"]))):
        empty.write_text(json.dumps(data | {"rounds": rounds}))
        said = refused("plan", "--scores", empty, "--drop", 1, "-o", tmp_path / "run")
        assert f"rounds[{number}] holds no candidate" in said


def test_scores_of_a_layer_that_is_not_there(home, tmp_path):
    data = json.loads((home / "run" / "scores.json").read_text())
    depth, edited = data["model"]["layers"], tmp_path / "scores.json"
    data["rounds"][0]["candidates"][0]["removal"] = [depth]
    edited.write_text(json.dumps(data))
    said = refused("plan", "--scores", edited, "--drop", 1, "-o", tmp_path / "run")
    assert f"rounds[0] speaks of [{depth}] and the model has layers 0 to {depth - 1}" in said


def test_documents_of_half_layers(home, tmp_path):
    """As builds before the first release wrote them."""
    why = "2.5 is not a whole layer"
    scores = json.loads((home / "run" / "scores.json").read_text())
    plan = json.loads((home / "run" / "plan.json").read_text())
    scores["rounds"][0]["candidates"][0]["removal"] = [2.5]
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    said = refused("plan", "--scores", tmp_path / "scores.json", "--drop", 1, "-o", tmp_path / "run")
    assert said == f"{tmp_path / 'scores.json'}: rounds.0.candidates.0.removal.0: {why}"
    for change, where in (
        ({"removal": [2.5], "order": [2.5]}, "removal.0"),
        ({"ranking": [{"unit": 2.5, "score": 0.1}]}, "ranking.0.unit"),
    ):
        (tmp_path / "plan.json").write_text(json.dumps(plan | change))
        said = refused("export", tmp_path / "plan.json", "-o", tmp_path / "out")
        assert said == f"{tmp_path / 'plan.json'}: {where}: {why}"
    assert not (tmp_path / "out").exists()


def test_a_label_that_compares_two_plans(home, tmp_path):
    one = f"a={home / 'run' / 'plan.json'}"
    assert "compare: 'a' is named twice" in refused("audit", tmp_path, "--compare", one, "--compare", one)


def test_a_plan_that_does_not_exist(home, out, tmp_path):
    assert "plan.json does not exist" in refused("export", tmp_path / "plan.json", "-o", out)


def test_auditing_what_was_not_exported(home):
    assert "is not an exported checkpoint" in refused("audit", home / "base", "--tasks", "toy")


def test_a_folder_that_cannot_be_written(home, tmp_path):
    file = tmp_path / "file"
    file.write_text("in the way")
    said = refused("plan", home / "base", "--metric", "random", "--drop", 1, "-o", file / "run")
    assert str(file) in said
    assert Plan.load(home / "run" / "plan.json").metric.name == "reverse-order"


@pytest.mark.parametrize(("option", "value"), [("--memory", "abc"), ("--memory", "4 GBs"), ("--batch-size", "\u00b2")])
def test_a_size_in_no_unit(home, out, option, value):
    said = plan(home, out, option, value)
    assert value in said
    assert "Traceback" not in said


def test_a_race_that_no_search_would_run(home, out):
    said = plan(home, out, "--racing", "--search", "blocks")
    assert said.startswith("--racing: the search 'blocks' compares more than the next to go; leave it out")
    assert "answers no items" in plan(home, out, "--racing", "--metric", "cosine")
