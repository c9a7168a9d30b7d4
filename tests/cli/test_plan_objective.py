"""Objectives, floors, signals and stability from the command line to the documents, on a tiny model with two tasks."""

import pytest

import audit_tiny
import cli_tiny
import scores_samples
from cli_tiny import done, last_line, refused
from layerprune.artifacts import Objective, Plan, Recipe, Scores
from layerprune.data.tasks import load_eval_set
from layerprune.errors import DocumentError
from layerprune.models.model import LoadedModel
from layerprune.recipes import read_recipe, run_recipe
from layerprune.removal import Removal
from layerprune.scoring.cached_evaluator import CachedEvaluator
from layerprune.scoring.engine import Engine


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = cli_tiny.make(tmp_path_factory.mktemp("objective"))
    audit_tiny.eval_set(folder / "base", folder / "tasks", "more", known=0.8, train=40)
    return folder


@pytest.fixture(scope="module")
def scored(home, tmp_path_factory):
    """Scores by the plain mean over both tasks."""
    out = tmp_path_factory.mktemp("scored")
    done("score", home / "base", *asked(home), "-o", out)
    return Scores.load(out / "scores.json")


def asked(home, limit=20):
    return ["--tasks", "toy,more", "--include-path", home / "tasks", "--limit", limit]


def relevances(scores):
    return [
        {task: judged.relevance for task, judged in one.tasks.items()} | {"score": one.score, "layer": one.removal[0]}
        for one in scores.rounds[0].candidates
    ]


@pytest.mark.parametrize(
    ("words", "score"),
    [
        (("--objective", "worst"), lambda r: max(r["toy"], r["more"])),
        (("--weights", "toy=3", "--weights", "more=1"), lambda r: 0.75 * r["toy"] + 0.25 * r["more"]),
        (("--objective", "weighted", "--weights", "toy=0"), lambda r: r["more"]),
    ],
)
def test_the_objective_makes_the_score_and_is_recorded(home, scored, tmp_path, words, score):
    printed = done("score", home / "base", *asked(home), *words, "-o", tmp_path).stdout
    found = Scores.load(tmp_path / "scores.json")
    expected = [score(r) for r in relevances(scored)]
    assert [one["score"] for one in relevances(found)] == pytest.approx(expected, abs=1e-6)
    assert found.metric.objective.name == ("worst" if "worst" in words else "weighted")
    assert ("(worst task)" if "worst" in words else "(weights toy=") in printed
    # without a model, from the answers that were recorded under another objective
    scored.save(tmp_path / "mean.json")
    done("plan", "--scores", tmp_path / "mean.json", *words, "--drop", 1, "-o", tmp_path / "plan")
    again, plan = Scores.load(tmp_path / "plan" / "scores.json"), Plan.load(tmp_path / "plan" / "plan.json")
    assert again.rounds == found.rounds
    assert again.metric == found.metric == plan.metric
    assert plan.scores_sha256 == again.sha256()
    least = min(relevances(found), key=lambda r: r["score"])
    assert plan.ranking[0].score == least["score"]


def test_what_is_not_said_anew_stays_as_the_scores_have_it(home, tmp_path):
    words = ("--weights", "toy=3", "--floor", "more=0.01")
    done("score", home / "base", *asked(home), *words, "-o", tmp_path)

    def again(name, *more):
        done("plan", "--scores", tmp_path / "scores.json", "--drop", 1, "-o", tmp_path / name, *more)
        return Plan.load(tmp_path / name / "plan.json").metric.objective

    weights, floors = {"toy": 3.0}, {"more": 0.01}
    assert again("floor", "--floor", "toy=0.02") == Objective(name="weighted", weights=weights, floors={"toy": 0.02})
    assert again("weights", "--weights", "more=2") == Objective(name="weighted", weights={"more": 2.0}, floors=floors)
    assert again("mean", "--objective", "mean") == Objective()


def test_another_objective_does_not_write_over_the_scores_it_is_made_from(scored, tmp_path):
    scored.save(tmp_path / "scores.json")
    said = refused("plan", "--scores", tmp_path / "scores.json", "--objective", "worst", "--drop", 1, "-o", tmp_path)
    assert said.endswith("give another folder with -o")
    assert Scores.load(tmp_path / "scores.json") == scored
    assert not (tmp_path / "plan.json").exists()


def test_a_floor_keeps_layers_from_going(tmp_path):
    scores = scores_samples.scores().save(tmp_path / "scores.json")
    done("plan", "--scores", scores, "--drop", 1, "-o", tmp_path / "free")
    assert Plan.load(tmp_path / "free" / "plan.json").removal == (1,)
    done("plan", "--scores", scores, "--floor", "toy=0.6", "--drop", 1, "-o", tmp_path / "floor")
    plan = Plan.load(tmp_path / "floor" / "plan.json")
    assert plan.removal == (3,)
    assert plan.metric.objective == Objective(floors={"toy": 0.6})
    assert [one.unit for one in plan.ranking] == [3, 5, 1, 4, 2, 0]
    assert any(warning.startswith("whether toy keeps its floor of 0.6") for warning in plan.warnings)


def test_a_floor_that_nothing_keeps_is_one_clear_error(home, tmp_path):
    words = ("--floor", "toy=1,more=1", "--drop", 4)
    said = last_line("plan", home / "base", *asked(home), *words, "-o", tmp_path / "run")
    assert "can go within the floors; the nearest: without {" in said
    assert said.endswith("its floor is 1; lower --floor or --drop")
    assert not list(tmp_path.rglob("*.json"))
    said = last_line(
        "plan", home / "base", *asked(home), "--search", "one-shot", "--floor", "toy=0.9", "--drop", 4, "-o", tmp_path
    )
    assert said.startswith("what was found breaks a floor: without {")
    assert not list(tmp_path.rglob("plan.json"))


def test_a_plan_with_a_floor_does_not_race_and_says_what_the_items_held_back_think_of_it(home, tmp_path):
    done("plan", home / "base", *asked(home), "--floor", "more=0.2", "--drop", 1, "-o", tmp_path)
    scores, plan = Scores.load(tmp_path / "scores.json"), Plan.load(tmp_path / "plan.json")
    assert not any(one.stopped for one in scores.rounds[0].candidates)
    own, chance = plan.predicted.tasks["more"], 0.25
    kept = (own.accuracy - chance) / (own.base_accuracy - chance)
    assert any("more keeps its floor of 0.2 on the items" in warning for warning in plan.warnings) is (kept < 0.2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--objective", "weighted"), "weights are for the objective 'weighted', which needs some; got 'weighted'"),
        (("--objective", "worst", "--weights", "toy=1"), "needs some; got 'worst'"),
        (("--weights", "toy=lots"), "'toy=lots' is not a task with a number"),
        (("--weights", "toy=1,toy=2"), "'toy' is named twice"),
        (("--weights", "toy=inf"), "'toy=inf' is not a task with a number"),
        (("--floor", "toy=nan"), "'toy=nan' is not a task with a number"),
        (("--floor", "toy=0.5", "--floor", "toy=0.6"), "floor: 'toy' is named twice"),
        (("--floor", "toy=1.5"), "the floor of 'toy' is 1.5; needed is a number from 0 to 1"),
        (("--metric", "cosine", "--objective", "worst"), "the metric 'cosine' does not answer tasks"),
        (("--objective", "worst", "--racing"), "--racing goes by the mean over items, which worst task is not"),
        (("--metric", "ablation:signal=luck"), "is one of 'accuracy' | 'probability' | 'margin' | 'blend'"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_loaded(home, tmp_path, words, message):
    said = refused("plan", home / "base", *asked(home), *words, "--drop", 1, "-o", tmp_path / "run")
    assert message in said
    assert not (tmp_path / "run").exists()


def test_a_floor_of_another_task_is_refused_before_anything_is_measured(home, tmp_path):
    said = last_line("score", home / "base", *asked(home), "--floor", "mor=0.5", "-o", tmp_path / "run")
    assert said.startswith("--floor names the task 'mor', which is not among those that score. Did you mean 'more'?")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("signal", ["margin", "blend"])
def test_a_signal_is_scored_by_and_recorded_as_far_as_it_needs(home, scored, tmp_path, signal):
    done("score", home / "base", *asked(home), "--metric", f"ablation:signal={signal}", "-o", tmp_path)
    scores = Scores.load(tmp_path / "scores.json")
    for entry in (scores.base["toy"].outcomes, scores.rounds[0].candidates[0].tasks["toy"].outcomes):
        assert (entry.margin is not None) is (signal == "margin")
    ours, theirs = ([one.score for one in each.rounds[0].candidates] for each in (scores, scored))
    assert ours != theirs
    assert scores.metric.spec == f"ablation:signal={signal}"


@pytest.mark.parametrize("metric", ["acc", "acc_norm"])
def test_a_margin_is_positive_where_lm_eval_says_right(home, tmp_path, metric):
    text = (home / "tasks" / "more.yaml").read_text().replace("task: more", "task: other")
    (tmp_path / "other.yaml").write_text(text.replace("metric: acc\n", f"metric: {metric}\n"))
    loaded = LoadedModel.load(str(home / "base"))
    eval_set = load_eval_set(["other"], loaded.encoder, use="evaluation", include_path=[tmp_path])
    assert eval_set.tasks["other"].metric == metric
    removals = [Removal(()), Removal.of(1), Removal.of(2, 4)]
    for found in CachedEvaluator(Engine(loaded), eval_set).outcomes(removals).values():
        own = found["other"]
        assert "".join("01"[margin > 0] for margin in own.margin) == own.correct
        assert len(set(own.margin)) > 30
        assert "0" in own.correct


def test_stability_is_told_of_all_tasks_and_of_each(home, tmp_path):
    printed = done("score", home / "base", *asked(home), "--stability", "-o", tmp_path).stdout
    table = printed.partition("stability: Spearman r between random halves")[2]
    rows = [line.split() for line in table.splitlines() if line.strip().startswith(("ablation", "toy", "more"))]
    assert [row[:2] for row in rows] == [["ablation", "40"], ["toy", "20"], ["more", "20"]]
    said = refused("score", home / "base", *asked(home), "--metric", "cosine", "--stability", "-o", tmp_path / "no")
    assert said == "--stability splits answered items, and the metric 'cosine' answers none; use ablation"


def test_stability_is_refused_before_anything_is_scored_where_nothing_can_be_split(home, tmp_path):
    few = ["--protect", f"2-{audit_tiny.DEPTH - 1}"]
    said = refused("score", home / "base", *asked(home), *few, "--stability", "-o", tmp_path)
    assert said.startswith("the stability of the ranking by ablation cannot be told: that takes three layers and two")
    assert not (tmp_path / "journal.jsonl").exists()


def test_a_plan_on_a_noisy_ranking_says_so(home, tmp_path):
    printed = done("plan", home / "base", *asked(home, 6), "--drop", 1, "-o", tmp_path).stdout
    (warning,) = [one for one in Plan.load(tmp_path / "plan.json").warnings if "noisy" in one]
    assert warning.startswith("the ranking is noisy: its split-half reliability on ")
    assert f"warning: {warning}" in printed


RECIPE = """\
model: {home}/base
include_path: [{home}/tasks]
score:
  tasks: [toy, more]
  limit: 20
  objective: worst
  floor: {{more: 0.05}}
plan:
  drop: 1
audit:
  limit: 10
  generation: false
"""


def test_a_recipe_takes_an_objective(home, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(home=home))
    plan = run_recipe(read_recipe(path), tmp_path / "run").plan
    assert plan.metric.objective == Objective(name="worst", floors={"more": 0.05})
    path.write_text(RECIPE.format(home=home).replace("objective: worst", "objective: weighted"))
    Recipe.load(path)  # its form is right, its sense is not
    with pytest.raises(DocumentError, match=r":3: score: --objective: weights are for the objective 'weighted'"):
        read_recipe(path)
