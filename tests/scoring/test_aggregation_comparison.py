"""Two rankings side by side, against counts made by hand."""

import json

import pytest
from click.testing import CliRunner

import scores_samples
from audit_samples import scores
from layerprune.artifacts import Candidate, Objective, Round, Scores
from layerprune.cli.command import app
from layerprune.errors import UsageError
from layerprune.scoring.aggregation import compare_scores, rejudged


def ranking(values, ties=None, **changes):
    candidates = tuple(
        Candidate(removal=(unit,), score=score, tie_break=(ties or {}).get(unit, 0.0)) for unit, score in values.items()
    )
    return scores(rounds=(Round(removed=(), candidates=candidates),), **changes)


def test_ranks_overlaps_and_agreement():
    ours = ranking({0: 0.9, 1: 0.1, 2: 0.2, 3: 0.4, 5: 0.0})
    theirs = ranking({0: 9.0, 1: 2.0, 2: 1.0, 3: 4.0, 4: 0.0})
    found = compare_scores(ours, theirs)
    assert [(pair.unit, pair.ranks) for pair in found.pairs] == [(0, (4, 4)), (1, (1, 2)), (2, (2, 1)), (3, (3, 3))]
    assert [(o.count, o.shared, o.by_chance) for o in found.overlaps] == [(1, 0, 0.25), (2, 2, 1.0)]
    assert found.agreement.spearman == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert found.agreement.misplaced_share == 0.5
    assert found.only_in_one == (4, 5)


def test_equal_scores_are_ranked_as_a_plan_ranks_them():
    found = compare_scores(ranking({0: 1.0, 1: 1.0}, ties={0: 0.5}), ranking({0: 1.0, 1: 1.0}))
    assert [pair.ranks for pair in found.pairs] == [(2, 1), (1, 2)]


def test_later_rounds_and_groups_have_no_say():
    first = ranking({0: 0.0, 1: 1.0})
    extra = Round(removed=(0,), candidates=(Candidate(removal=(0, 1), score=-5.0),))
    again = Round(removed=(), candidates=(Candidate(removal=(0,), score=9.0, stopped=True),))  # in another race
    found = compare_scores(first.model_copy(update={"rounds": (*first.rounds, extra, again)}), first)
    assert [pair.scores for pair in found.pairs] == [(0.0, 0.0), (1.0, 1.0)]


def test_models_of_other_depth_are_refused():
    deeper = scores().model.model_copy(update={"layers": 40})
    with pytest.raises(UsageError, match=r"cannot compare scores of 30 layers .* with scores of 40"):
        compare_scores(ranking({0: 0, 1: 1}), ranking({0: 0, 1: 1}, model=deeper))


def test_rankings_with_nothing_in_common_are_refused():
    with pytest.raises(UsageError, match="judge 1 layers in common"):
        compare_scores(ranking({0: 0, 1: 1}), ranking({1: 0, 2: 1}))


def test_documents_of_another_run_and_objective_are_compared(tmp_path):
    """Scores beside others by all that can differ, of another model as deep."""
    old = scores_samples.scores()
    old.save(tmp_path / "old.json")
    worst = rejudged(old, Objective(name="worst", floors={"toy": 0.4}))
    metric = worst.metric.model_copy(update={"spec": "ablation:signal=margin"})
    data = tuple(one.model_copy(update={"fingerprints": one.fingerprints[:7]}) for one in worst.data)
    model = worst.model.model_copy(update={"id": "another of six layers", "fingerprint": "f" * 64})
    new = worst.model_copy(update={"metric": metric, "model": model, "data": data, "config": "{}"})
    new.save(tmp_path / "new.json")
    shown = CliRunner().invoke(app, ["compare", str(tmp_path / "old.json"), str(tmp_path / "new.json")])
    assert shown.exit_code == 0, shown.stderr
    lines = {line.split("  ")[0].strip(): line for line in shown.stdout.splitlines()}
    assert lines["model"].split()[-1] == lines["weights"].split()[-1] == lines["judged by"].split()[-1] == "no"
    assert "ablation:signal=margin (worst task, floors toy=0.4)" in lines["judged by"]
    assert lines["seed"].split() == ["seed", "0", "0", "yes"]
    assert "8 of toy (train), 8 of more (train)" in lines["items"]
    assert lines["items in both"].split() == ["items", "in", "both", "14"]
    found = compare_scores(old, Scores.load(tmp_path / "new.json"))
    assert found.agreement.n == 6
    below = [unit for unit in range(6) if worst.rounds[0].candidates[unit].below_floor]
    assert 0 < len(below) < 6
    assert min(pair.ranks[1] for pair in found.pairs if pair.unit in below) == 6 - len(below) + 1


def test_a_format_of_the_future_is_refused_in_one_line(tmp_path):
    data = json.loads(scores().save(tmp_path / "old.json").read_text()) | {"format": 2}
    (tmp_path / "new.json").write_text(json.dumps(data))
    shown = CliRunner().invoke(app, ["compare", str(tmp_path / "old.json"), str(tmp_path / "new.json")])
    assert shown.exit_code == 2
    assert shown.stderr.splitlines()[-1].endswith("new.json has format 2; this layerprune reads format 1")


def test_the_command_prints_both_tables(tmp_path):
    ranking({0: 0.9, 1: 0.1, 2: 0.2}).save(tmp_path / "a.json")
    ranking({0: 0.0, 1: 0.0, 2: 0.0}).save(tmp_path / "b.json")
    shown = CliRunner().invoke(app, ["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    assert shown.exit_code == 0, shown.stderr
    assert "Spearman" in shown.stdout
    assert "one is constant" in shown.stdout
    assert "0.9000" in shown.stdout
