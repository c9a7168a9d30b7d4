"""Planning with exchange, on a tiny model: what is written down, what a race leaves to be judged, planning again."""

import pytest

import audit_tiny
from cli_tiny import done, refused
from layerprune.artifacts import Plan, Scores
from layerprune.search import by_importance


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return audit_tiny.model_and_task(tmp_path_factory.mktemp("exchange"), train=120)


def plan(home, out, search, *words):
    data = ["--tasks", "toy", "--include-path", home / "tasks", "--limit", 120]
    return ["plan", home / "base", *data, "--search", search, "-o", out, *words]


def test_what_a_raced_exchange_found_is_judged_on_all_items(home, tmp_path):
    done(*plan(home, tmp_path / "run", "exchange:by=cosine+angular", "--drop", 3))
    scores, made = Scores.load(tmp_path / "run" / "scores.json"), Plan.load(tmp_path / "run" / "plan.json")
    assert any(one.stopped for entry in scores.rounds for one in entry.candidates)
    stood = scores.rounds[-1].candidates
    assert all((one.stopped, one.tasks["toy"].items) == (False, 96) for one in stood)  # the fifth is held back
    assert made.removal == min(stood, key=by_importance).removal
    assert not any("race had put" in warning for warning in made.warnings)


def test_its_rounds_are_told_by_the_whole_removals_they_found_best(home, tmp_path):
    from layerprune.cli.plan import rounds

    done(*plan(home, tmp_path / "run", "exchange", "--drop", 3))
    scores, made = Scores.load(tmp_path / "run" / "scores.json"), Plan.load(tmp_path / "run" / "plan.json")
    judged = [entry for entry in scores.rounds if len(entry.candidates[0].removal) == 3]
    assert 2 <= len(judged) < len(scores.rounds)  # others judge single layers, and what is left when one is put back
    shown = list(rounds(scores, made).columns[2].cells)
    assert shown == [", ".join(map(str, min(entry.candidates, key=by_importance).removal)) for entry in judged]


def test_a_metric_of_blocks_proposes_its_best_block(home, tmp_path):
    words = ("--drop", 3, "--protect", 4)  # by its single layers angular would remove 5, too, which has no neighbour
    done(*plan(home, tmp_path / "block", "blocks", "--metric", "angular", *words))
    done(*plan(home, tmp_path / "run", "exchange:by=angular,most=0", *words, "--no-racing"))
    block = Plan.load(tmp_path / "block" / "plan.json").removal
    one_shot = tuple(sorted(entry.unit for entry in Plan.load(tmp_path / "run" / "plan.json").ranking[:3]))
    starts = [one.removal for one in Scores.load(tmp_path / "run" / "scores.json").rounds[1].candidates]
    assert starts == list(dict.fromkeys([one_shot, block]))


def test_a_race_changes_nothing_but_the_price(home, tmp_path):
    done(*plan(home, tmp_path / "raced", "exchange", "--drop", 3))
    done(*plan(home, tmp_path / "whole", "exchange", "--drop", 3, "--no-racing"))
    raced, whole = (Plan.load(tmp_path / name / "plan.json") for name in ("raced", "whole"))
    assert raced.removal == whole.removal
    for name, stopped in (("raced", True), ("whole", False)):
        rounds = Scores.load(tmp_path / name / "scores.json").rounds
        assert any(one.stopped for entry in rounds for one in entry.candidates) is stopped


@pytest.mark.parametrize("drop", [2, 3])
@pytest.mark.parametrize("racing", ["--racing", "--no-racing"])
def test_its_scores_are_planned_from_by_their_ranking(home, tmp_path, drop, racing):
    done(*plan(home, tmp_path / "run", "exchange", "--drop", drop, racing))
    scores = tmp_path / "run" / "scores.json"
    assert len(Scores.load(scores).rounds) >= drop  # as many as a greedy search has
    done("plan", "--scores", scores, "--drop", drop, "-o", tmp_path / "again")
    again, first = Plan.load(tmp_path / "again" / "plan.json"), Plan.load(tmp_path / "run" / "plan.json")
    assert again.search.name == "one-shot"
    assert again.order == tuple(entry.unit for entry in first.ranking[:drop])
    said = refused("plan", "--scores", scores, "--drop", drop, "--search", "exchange", "-o", tmp_path / "no")
    assert "asks cosine for proposals: plan from the model" in said


def test_a_proposer_that_is_not_there_and_a_front_are_refused_before_anything_is_measured(home, tmp_path):
    assert "unknown metric 'foo'" in refused(*plan(home, tmp_path / "no", "exchange:by=foo", "--drop", 2))
    said = refused(*plan(home, tmp_path / "no", "exchange:by=ablation", "--metric", "perplexity", "--drop", 2))
    assert "asks the metric 'ablation', which answers items, and 'perplexity' answers none" in said
    said = refused(*plan(home, tmp_path / "no", "exchange", "--front"))
    assert "--front follows one path, and the search 'exchange' lays none" in said
    assert not (tmp_path / "no" / "plan.json").exists()
