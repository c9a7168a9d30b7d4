"""What planning does beyond the search: warnings about other readers, export rehearsed, the period kept when asked."""

from types import SimpleNamespace

import pytest

import cli_tiny
from cli_tiny import done, last_line
from layerprune.architecture import read_architecture
from layerprune.architecture.tiny import save_tiny, tiny_config
from layerprune.artifacts import Candidate, Plan, PlanLimits, Round, Scores
from layerprune.checkpoint import Checkpoint
from layerprune.errors import RefusedError
from layerprune.planner.goals import Faster
from layerprune.planner.plan_documents import race_warnings
from layerprune.planner.session import SearchRules
from layerprune.removal import Removal
from layerprune.search import Constraints, SearchResult
from layerprune.search.searches import allowed_runs

LAST = ("--protect", "0,1,2,3,4")  # of six layers only the last may go


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A tiny gemma2, whose layers alternate and whose alternation llama.cpp guesses, with a tokenizer."""
    folder = cli_tiny.make(tmp_path_factory.mktemp("planning"))
    save_tiny("gemma2", folder / "gemma2", num_hidden_layers=6)
    for path in (folder / "base").glob("tokenizer*"):
        (folder / "gemma2" / path.name).write_bytes(path.read_bytes())
    return folder


def plan(home, out, *words):
    return ["plan", home / "gemma2", "--metric", "reverse-order", *words, "-o", out]


def test_a_plan_that_another_reader_would_misread_says_so(home, tmp_path):
    said = done(*plan(home, tmp_path / "run", "--drop", 1, "--protect", "-1")).stdout
    warnings = Plan.load(tmp_path / "run" / "plan.json").warnings
    assert len(warnings) == 1
    assert warnings[0].startswith("llama.cpp takes layer_types of gemma2 to repeat every 2 layers")
    assert f"warning: {warnings[0]}" in said


def test_a_plan_that_is_read_rightly_warns_of_nothing(home, tmp_path):
    done(*plan(home, tmp_path / "run", "--drop", 1, *LAST))
    assert Plan.load(tmp_path / "run" / "plan.json").warnings == ()


def test_the_period_is_kept_when_asked_for(home, tmp_path):
    done(*plan(home, tmp_path / "run", "--drop", 1, *LAST, "--keep-period"))
    kept = Plan.load(tmp_path / "run" / "plan.json")
    assert kept.removal == (5,)
    assert kept.limits.keep_period
    said = last_line(*plan(home, tmp_path / "no", "--drop", 1, "--protect", "-1", "--keep-period"))
    assert said.startswith("cannot remove 1 layers")
    assert "llama.cpp takes layer_types of gemma2" in said
    assert not (tmp_path / "no" / "plan.json").exists()


def test_whole_periods_may_go_from_anywhere():
    architecture = read_architecture(tiny_config("gemma2", num_hidden_layers=6))
    constraints = Constraints(6, check=SearchRules(keep_period=True).check(architecture))
    assert [run.layers for run in allowed_runs(constraints, 1)] == [(5,)]
    assert [run.layers for run in allowed_runs(constraints, 2)] == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]


def test_what_export_would_refuse_is_refused_before_a_plan_is_written(home, tmp_path, monkeypatch):
    asked = []

    def refuse(folder, removal, *, trust_remote_code):
        asked.append((folder, removal.layers, trust_remote_code))
        raise RefusedError("layers of this model do not move")

    monkeypatch.setattr("layerprune.planner.planner.dry_run", refuse)
    said = last_line(*plan(home, tmp_path / "run", "--drop", 1, *LAST, "--trust-remote-code"))
    assert said == "layers of this model do not move"
    assert asked == [(home / "gemma2", (5,), True)]
    assert not list(tmp_path.rglob("plan.json"))


def test_trust_reaches_the_reading_of_the_anatomy(home, tmp_path, monkeypatch):
    import layerprune.models.model

    trusted, real = [], layerprune.models.model.read_architecture

    def read(config, *, trust_remote_code=False):
        trusted.append(trust_remote_code)
        return real(config, trust_remote_code=trust_remote_code)

    monkeypatch.setattr("layerprune.models.model.read_architecture", read)
    done(*plan(home, tmp_path / "a", "--drop", 1, *LAST, "--trust-remote-code"))
    done(*plan(home, tmp_path / "b", "--drop", 1, *LAST))
    assert trusted == [True, False]


def rescored(home, folder, **scores_of):
    """Score every layer of the tiny gemma2 by their order, and return the file, with these scores and config put in."""
    done("score", *plan(home, folder)[1:], "--force")
    scores = Scores.load(folder / "scores.json")
    by_unit = {candidate.removal: candidate for candidate in scores.rounds[0].candidates}
    for layer, score in scores_of.get("scores", {}).items():
        by_unit[(layer,)] = by_unit[(layer,)].model_copy(update={"score": score})
    rounds = (scores.rounds[0].model_copy(update={"candidates": tuple(by_unit.values())}),)
    changed = {"rounds": rounds, "config": scores_of.get("config", scores.config)}
    return scores.model_copy(update=changed).save(folder / "scores.json")


def test_scores_hold_the_config_they_were_measured_with(home, tmp_path):
    scores = Scores.load(rescored(home, tmp_path))
    assert scores.config == (home / "gemma2" / "config.json").read_text()
    without = scores.model_copy(update={"config": None})
    assert Scores.parse(without.model_dump(mode="json"), "x").sha256() == without.sha256() != scores.sha256()


def test_planning_from_scores_without_a_config_says_what_was_not_looked_at(home, tmp_path):
    scores = rescored(home, tmp_path, config=None)
    done("plan", "--scores", scores, "--drop", 1, "-o", tmp_path / "again")
    assert "planned without the model" in Plan.load(tmp_path / "again" / "plan.json").warnings[0]
    said = last_line("plan", "--scores", scores, "--drop", 1, "--keep-period", "-o", tmp_path / "no")
    assert said.startswith("--keep-period needs the model's config")
    other = rescored(home, tmp_path, config='{"model_type": "of tomorrow"}')
    done("plan", "--scores", other, "--drop", 1, "-o", tmp_path / "tomorrow")
    assert "planned without the model" in Plan.load(tmp_path / "tomorrow" / "plan.json").warnings[0]


def test_planning_from_scores_warns_and_keeps_the_period_as_planning_from_the_model_does(home, tmp_path):
    scores = rescored(home, tmp_path, scores={2: -9.0})
    done("plan", "--scores", scores, "--drop", 1, "-o", tmp_path / "a")
    misread = Plan.load(tmp_path / "a" / "plan.json")
    assert misread.removal == (2,)
    assert misread.warnings[0].startswith("llama.cpp takes layer_types of gemma2 to repeat every 2 layers")
    done("plan", "--scores", scores, "--drop", 1, "--keep-period", "-o", tmp_path / "b")
    kept = Plan.load(tmp_path / "b" / "plan.json")
    assert (kept.removal, kept.warnings, kept.limits.keep_period) == ((5,), (), True)


def test_planning_from_scores_proposes_only_what_the_architecture_allows(home, tmp_path):
    """Layers that may go one by one and not both: the attention of a hybrid. No single score shows it."""
    kinds = ["linear_attention", "full_attention"] * 2 + ["linear_attention"] * 2
    config = tiny_config("qwen3_next", num_hidden_layers=6, layer_types=kinds)
    config.save_pretrained(tmp_path / "config")
    hybrid = (tmp_path / "config" / "config.json").read_text()
    scores = rescored(home, tmp_path, scores={1: -9.0, 3: -8.0, 0: -7.0}, config=hybrid)
    done("plan", "--scores", scores, "--drop", 2, "-o", tmp_path / "run")
    planned = Plan.load(tmp_path / "run" / "plan.json")
    assert planned.order == (1, 0)
    assert "a hybrid keeps at least one attention layer" in planned.limits.architecture


def test_a_target_is_reached_by_whole_periods_where_single_layers_may_not_go(home, tmp_path):
    """Two layers make a period, and the last may not go: removals of one and of three layers are refused."""
    words = ("--metric", "random", "--search", "blocks", "--keep-period", "--protect", "-1")
    whole = Checkpoint.open(home / "gemma2")
    layer = sum(t.elements for t in whole.tensors.values() if ".layers.3." in t.name)
    wanted = whole.parameters - layer
    done("plan", home / "gemma2", *words, "--target-params", wanted, "-o", tmp_path / "run")
    assert len(Plan.load(tmp_path / "run" / "plan.json").removal) == 2
    architecture = read_architecture(tiny_config("gemma2", num_hidden_layers=6))
    check = SearchRules(keep_period=True).check(architecture)
    session = SimpleNamespace(constraints=Constraints(6, protect=frozenset({5}), check=check))
    assert [len(removal) for removal in Faster("x", 1.5).stand_ins(session)] == [2, 4]  # of 1 to 5


def test_layers_that_a_race_had_put_out_are_named_when_they_go(home, tmp_path):
    scores = Scores.load(rescored(home, tmp_path))
    one, *others = scores.rounds[0].candidates
    raced = [other.model_copy(update={"stopped": True}) for other in others]
    rounds = (scores.rounds[0].model_copy(update={"candidates": (one.model_copy(update={"score": -9.0}), *raced)}),)
    path = scores.model_copy(update={"rounds": rounds}).save(tmp_path / "scores.json")
    done("plan", "--scores", path, "--drop", 1, "-o", tmp_path / "one")
    assert not any("race" in warning for warning in Plan.load(tmp_path / "one" / "plan.json").warnings)
    said = done("plan", "--scores", path, "--drop", 2, "-o", tmp_path / "two").stdout
    plan = Plan.load(tmp_path / "two" / "plan.json")
    (named,) = [warning for warning in plan.warnings if "race" in warning]
    assert named.startswith(f"a race had put {Removal.of(plan.order[1])} out after a part of the items")
    assert named in said


def test_the_best_of_a_race_for_more_layers_have_no_order():
    best = [Candidate(removal=(layer,), score=layer / 10, stopped=True, accepted=True) for layer in (3, 4)]
    rounds = (Round(removed=(), candidates=(*best, Candidate(removal=(2,), score=0.5))),)

    def named(*order, protect=()):
        return tuple(race_warnings(SearchResult(order, rounds, (), None), PlanLimits(protect=protect)))

    assert named(3, 4) == named(3, 4, 2) == named(3, protect=(4,)) == ()
    assert "a race for more layers had {4} among those to go after a part of the items" in named(3)[0]


def test_fewer_layers_than_a_race_was_for_are_planned_with_a_warning(home, tmp_path):
    scores = Scores.load(rescored(home, tmp_path))
    raced = [one.model_copy(update={"stopped": True, "accepted": True}) for one in scores.rounds[0].candidates[:2]]
    candidates = (*(one.model_copy(update={"score": -9.0}) for one in raced), *scores.rounds[0].candidates[2:])
    rounds = (scores.rounds[0].model_copy(update={"candidates": candidates}),)
    path = scores.model_copy(update={"rounds": rounds}).save(tmp_path / "scores.json")
    for drop, expected in ((1, 1), (2, 0)):
        done("plan", "--scores", path, "--drop", drop, "-o", tmp_path / str(drop))
        warnings = Plan.load(tmp_path / str(drop) / "plan.json").warnings
        assert sum("a race for more layers" in warning for warning in warnings) == expected


def test_a_path_is_held_against_each_rounds_race(home, tmp_path):
    def one(units, score, **how):
        return Candidate(removal=units, score=score, **how)

    def named(second):
        rounds = (
            Round(removed=(), candidates=(one((2,), 0.1, stopped=True, accepted=True), one((4,), 0.3, stopped=True))),
            Round(removed=(2,), candidates=(second, one((2, 3), 0.9))),
        )
        return tuple(race_warnings(SearchResult((2, 4), rounds, (), None), PlanLimits()))

    # put out in the first round and taken in the second, where it ran to the end: that says nothing against it
    assert named(one((2, 4), 0.2)) == ()
    assert named(one((2, 4), 0.2, stopped=True, accepted=True)) == ()
    assert "a race had put {2, 4} out" in named(one((2, 4), 0.2, stopped=True))[0]


def test_a_whole_removal_is_held_against_its_own_race_alone():
    one = Candidate(removal=(2,), score=0.3, stopped=True)
    rounds = (Round(removed=(), candidates=(one,)), Round(removed=(), candidates=(one,)))

    def named(**how):
        whole = Candidate(removal=(2, 4), score=0.2, **how)
        return tuple(race_warnings(SearchResult((2, 4), rounds, (), whole, nested=False), PlanLimits()))

    assert named() == named(stopped=True, accepted=True) == ()
    assert "a race had put {2, 4} out" in named(stopped=True)[0]
