"""Races and rules: where rules pass over a race's winners, all layers are ranked on all the items."""

import itertools

import pytest

import audit_tiny
from cli_tiny import done, refused
from layerprune.artifacts import Plan, Scores


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return audit_tiny.model_and_task(tmp_path_factory.mktemp("race"), train=300)


def test_layers_that_may_not_be_neighbours_are_chosen_as_without_a_race(home, tmp_path):
    words = ["plan", home / "base", "--tasks", "toy", "--include-path", home / "tasks", "--search", "one-shot",
             "--no-adjacent", "--drop", 3]  # fmt: skip
    done(*words, "-o", tmp_path / "raced")
    done(*words, "--no-racing", "-o", tmp_path / "whole")
    raced, whole = (Plan.load(tmp_path / name / "plan.json") for name in ("raced", "whole"))
    assert raced.removal == whole.removal
    assert not any("race" in warning for warning in raced.warnings)
    stopped = [one for one in Scores.load(tmp_path / "raced" / "scores.json").rounds[0].candidates if one.stopped]
    gone = set(raced.removal)
    assert not any(gone & set(one.removal) and not one.accepted for one in stopped)


def test_a_task_that_weighs_nothing_keeps_no_race_open(home, tmp_path):
    audit_tiny.eval_set(home / "base", tmp_path / "tasks", "more", train=300, test=2)
    audit_tiny.eval_set(home / "base", tmp_path / "tasks", "toy", train=300, test=2)
    done("plan", home / "base", "--tasks", "toy,more", "--include-path", tmp_path / "tasks", "--objective", "weighted",
         "--weights", "toy=1,more=0", "--drop", 1, "--search", "one-shot", "-o", tmp_path / "run")  # fmt: skip
    assert any(one.stopped for one in Scores.load(tmp_path / "run" / "scores.json").rounds[0].candidates)


def test_a_front_by_one_shot_is_cut_from_an_order_that_no_race_has_made(home, tmp_path):
    words = ["plan", home / "base", "--tasks", "toy", "--include-path", home / "tasks", "--search", "one-shot",
             "--front", "--up-to", 4, "-o", tmp_path / "run"]  # fmt: skip
    assert refused(*words, "--racing").startswith("--racing does not tell the order of one-shot's layers")
    done(*words)
    assert not any(one.stopped for one in Scores.load(tmp_path / "run" / "scores.json").rounds[0].candidates)


def test_lazy_greedy_races_and_its_scores_give_the_same_plan_again(home, tmp_path):
    lazy = ["--drop", 2, "--search", "greedy:lazy=true"]
    words = ["plan", home / "base", "--tasks", "toy", "--include-path", home / "tasks", *lazy, "-o", tmp_path / "run"]
    done(*words)
    rounds = Scores.load(tmp_path / "run" / "scores.json").rounds
    plan = Plan.load(tmp_path / "run" / "plan.json")
    gone = list(itertools.accumulate(((unit,) for unit in plan.order), lambda one, more: tuple(sorted(one + more))))
    assert any(one.stopped for entry in rounds for one in entry.candidates)
    assert not any(one.stopped for entry in rounds for one in entry.candidates if one.removal in gone)
    done("plan", "--scores", tmp_path / "run" / "scores.json", *lazy, "-o", tmp_path / "again")
    assert Plan.load(tmp_path / "again" / "plan.json").order == plan.order
    done(*words[:-1], tmp_path / "whole", "--no-racing")
    assert not any(c.stopped for e in Scores.load(tmp_path / "whole" / "scores.json").rounds for c in e.candidates)
