"""A whole study of a tiny model through the command line: interrupted, finished, and its figures worked out again."""

import csv
import re
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest

import audit_tiny
import cli_tiny
import layerprune.analysis.measurements as studying
from layerprune.analysis import findings, write_study
from layerprune.analysis.bench import Bench
from layerprune.analysis.findings import Findings
from layerprune.artifacts import Study
from layerprune.artifacts.study import ALL_TASKS, MEAN, TEXT
from layerprune.config import StudyConfig
from layerprune.data.tasks import load_eval_set
from layerprune.models.model import LoadedModel
from layerprune.removal import Removal
from layerprune.scoring.engine import Engine
from layerprune.scoring.evaluator import evaluate
from layerprune.scoring.paths import PlainPath
from layerprune.search import Constraints
from layerprune.stats import above_chance, paired_interval, rank_agreement

METRICS = ("ablation", "cosine", "perplexity", "angular")
AUDIT = 20
DEPTH = audit_tiny.DEPTH


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = cli_tiny.make(tmp_path_factory.mktemp("study"))
    audit_tiny.eval_set(folder / "base", folder / "tasks", "other")
    (folder / "book.txt").write_text("The red fox sat under the old oak. " * 30)
    return folder


def words(home, *more):
    metrics = [word for metric in (*METRICS, "cosine", "random") for word in ("--metric", metric)]
    return ["study", home / "base", "--tasks", "toy,other", "--include-path", home / "tasks", *metrics, "--dtype",
            "float32", "--audit-limit", AUDIT, "--counts", "1,2,4", "--greedy", 2, *more]  # fmt: skip


@pytest.fixture(scope="module")
def finished(home):
    """A study that was interrupted when everything was measured, and then finished; with what it printed."""

    def interrupt():
        raise KeyboardInterrupt

    command = words(home, "--text", home / "book.txt", "-o", home / "out")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(studying, "counterexample_shown", interrupt)
        stopped = cli_tiny.layerprune(*command)
    assert stopped.exit_code == 130
    assert [path.name for path in (home / "out").iterdir()] == ["work"]
    before = journals(home / "out")
    said = cli_tiny.done(*command)
    assert journals(home / "out") == before  # nothing was measured again
    return Study.load(home / "out" / "study.json"), home / "out", said.stdout


def journals(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.jsonl")}


@pytest.fixture(scope="module")
def measured(home):
    """Outcomes of removals on the audit items by plain forwards, task by task: the slow, obvious way."""
    loaded = LoadedModel.load(str(home / "base"), dtype="float32", device="cpu")
    found = {}
    for task in ("toy", "other"):
        eval_set = load_eval_set([task], loaded.encoder, use="evaluation", include_path=[home / "tasks"], limit=AUDIT)
        engine = Engine(loaded)
        engine.path, engine.longest = PlainPath(loaded), 10**9
        found[task] = (engine, eval_set)

    @cache
    def outcomes(*units):
        removal = Removal.of(*units)
        return {
            task: evaluate(engine, eval_set, [removal])[removal][task] for task, (engine, eval_set) in found.items()
        }

    return outcomes


def accuracy(outcomes):
    return float(np.mean([one.accuracy for one in outcomes.values()]))


def test_what_judges_has_not_chosen(finished):
    study, _, _ = finished
    for chose, judged in zip(study.selection, study.audit, strict=True):
        assert chose.task == judged.task
        assert judged.items == AUDIT
        assert not set(chose.fingerprints) & set(judged.fingerprints)


def test_every_metric_is_there_once_and_the_baselines_that_can_score_at_all(finished):
    study, _, _ = finished
    assert [metric.spec for metric in study.metrics] == [*METRICS, "reverse-order", "random"]
    request = StudyConfig(model="model", tasks=("toy",), metrics=("ablation", "random"))
    pairs = SimpleNamespace(request=request, constraints=Constraints(6, together=(frozenset({2, 3}),)))
    assert Bench.specs.fget(pairs) == ["ablation", "random"]  # reverse-order scores single layers


def test_losses_are_those_of_plain_forwards(finished, measured):
    study, _, _ = finished
    intact = measured()
    for lost, data in zip(study.lost, study.audit, strict=True):
        base = intact[lost.task]
        assert study.intact[lost.task].accuracy == pytest.approx(base.accuracy, abs=1e-6)
        assert study.intact[lost.task].p_value == pytest.approx(above_chance(base.correct, [0.25] * AUDIT), rel=0.01)
        for layer in (0, 3, DEPTH - 1):
            own = measured(layer)[lost.task]
            assert lost.accuracy[layer] == pytest.approx(
                (base.accuracy - own.accuracy) / (base.accuracy - data.chance), abs=1e-5
            )
            gone = 1 - own.mean_gold_probability / base.mean_gold_probability
            assert lost.probability[layer] == pytest.approx(gone, abs=1e-3)


def test_agreement_is_between_each_ranking_and_those_losses(finished):
    study, _, _ = finished
    mean = np.mean([lost.accuracy for lost in study.lost], axis=0)
    by_task = {lost.task: lost.accuracy for lost in study.lost}
    rankings = {(one.metric, one.calibration): one.scores for one in study.rankings}
    assert {calibration for metric, calibration in rankings if metric == "cosine"} == {ALL_TASKS, "toy", "other", TEXT}
    assert {calibration for metric, calibration in rankings if metric == "ablation"} == {ALL_TASKS, "toy", "other"}
    for one in study.agreement:
        inner = slice(None) if one.ends else slice(1, -1)
        losses = mean if one.task == MEAN else by_task[one.task]
        slow = rank_agreement(rankings[one.metric, one.calibration][inner], np.array(losses)[inner])
        assert one.kendall.value == pytest.approx(slow.kendall, abs=1e-4), (one.metric, one.calibration)
    assert {one.metric for one in study.agreement} == {*METRICS, "reverse-order", "random"}


def path_of(study, metric, search):
    return next(path for path in study.paths if (path.metric, path.search) == (metric, search))


def test_one_shot_paths_take_the_lowest_scores(finished):
    study, _, _ = finished
    scores = next(r.scores for r in study.rankings if (r.metric, r.calibration) == ("cosine", ALL_TASKS))
    order = np.argsort(scores)
    for point in path_of(study, "cosine", "one-shot").points:
        assert point.removals == (tuple(sorted(order[: point.count].tolist())),)
    assert [len(p.removals[0]) for p in path_of(study, "angular", "blocks").points] == [1, 2, 4]
    block = path_of(study, "angular", "blocks").points[-1].removals[0]
    assert block[-1] - block[0] == 3
    assert [p.count for p in path_of(study, "ablation", "greedy").points] == [1, 2]
    assert 1 < len(path_of(study, "random", "one-shot").points[1].removals) <= 3


def test_points_are_accuracies_of_plain_forwards_with_paired_intervals(finished, measured):
    study, _, _ = finished
    intact = measured()
    for metric, search in (("cosine", "one-shot"), ("random", "one-shot"), ("ablation", "greedy")):
        for point in path_of(study, metric, search).points[:2]:
            found = [measured(*units) for units in point.removals]
            assert point.accuracy == pytest.approx(np.mean([accuracy(one) for one in found]), abs=1e-6)
            assert point.difference == pytest.approx(point.accuracy - accuracy(intact), abs=1e-5)
            assert point.interval[0] <= point.difference <= point.interval[1]
    point = path_of(study, "cosine", "one-shot").points[0]
    own = measured(*point.removals[0])
    limits = [paired_interval(intact[task].correct, own[task].correct) for task in own]
    widths = np.array([[own[t].accuracy - intact[t].accuracy - low, high - own[t].accuracy + intact[t].accuracy]
                       for t, (low, high) in zip(own, limits, strict=True)])  # fmt: skip
    down, up = np.sqrt((widths**2).sum(axis=0)) / 2
    assert point.interval == pytest.approx((point.difference - down, point.difference + up), abs=1e-5)


def test_contrasts_are_ablation_minus_the_other(finished):
    study, _, _ = finished
    ours = {point.count: point for point in path_of(study, "ablation", "one-shot").points}
    for one in study.contrasts:
        theirs = next(p for p in path_of(study, one.metric, one.search).points if p.count == one.count)
        assert one.difference == pytest.approx(ours[one.count].accuracy - theirs.accuracy, abs=1e-5)
        assert one.same == (theirs.removals == ours[one.count].removals)
        if one.same:
            assert one.interval == (0, 0)


def test_each_task_without_its_own_layers(finished, measured):
    study, _, _ = finished
    rankings = {(one.metric, one.calibration): one.scores for one in study.rankings}
    for one in study.calibration:
        if one.metric != "cosine" or one.count > 2:
            continue

        def lowest(calibration, count=one.count):
            return np.argsort(rankings["cosine", calibration])[:count].tolist()

        if one.calibration == "own task":
            expected = np.mean([measured(*lowest(task))[task].accuracy for task in ("toy", "other")])
        else:
            expected = accuracy(measured(*lowest(TEXT if one.calibration == "text" else ALL_TASKS)))
        assert one.accuracy == pytest.approx(expected, abs=1e-5), one.calibration
    assert {one.calibration for one in study.calibration if one.metric == "ablation"} == {"own task", "all tasks"}
    assert {one.calibration for one in study.calibration if one.metric == "perplexity"} == {
        "own task", "all tasks", "text",
    }  # fmt: skip


def test_the_counterexample_is_measured(finished):
    study, _, _ = finished
    shown = study.counterexample
    assert shown.cosine[1] == pytest.approx(shown.epsilon, rel=1e-3)
    assert min(shown.cosine) == shown.cosine[1]
    assert (shown.accuracy, shown.accuracy_without) == (1.0, (1.0, 0.0, 0.0))


def test_tables_hold_the_documents_figures(finished):
    study, folder, _ = finished
    with (folder / "tables" / "paths.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = {(row["metric"], row["search"], int(row["removed"])): float(row["accuracy"]) for row in rows}
    assert found == {(p.metric, p.search, q.count): q.accuracy for p in study.paths for q in p.points}
    with (folder / "tables" / "layers.csv").open(newline="") as file:
        layers = list(csv.DictReader(file))
    assert [float(row["accuracy lost on toy"]) for row in layers] == list(study.lost[0].accuracy)
    assert {path.name for path in folder.iterdir()} == {"study.html", "study.json", "tables", "plots", "work"}
    written = sorted((folder / "tables").iterdir())
    assert [table.suffix for table in written] == [".csv"] * 9
    for table in written:
        with table.open(newline="") as file:
            assert len({len(row) for row in csv.reader(file)}) == 1


def test_the_page_stands_alone_and_says_in_words_what_it_shows(finished):
    study, folder, said = finished
    page = (folder / "study.html").read_text()
    assert "<script" not in page
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", page)
    assert len(re.findall(r"<img ", page)) == len(re.findall(r"<img [^>]*alt=\"[^\"]{40,}\"", page)) == 5
    named = re.findall(r'<table aria-labelledby="([^"]+)"', page)
    assert len(named) == len(set(named)) == page.count("<thead>") > 8
    assert all(f'<p class="caption" id="{name}">' in page for name in named)
    one = next(a for a in study.agreement if (a.metric, a.task, a.ends) == ("cosine", MEAN, True))
    value = f"{one.spearman.value:.2f}".replace("-", "\N{MINUS SIGN}")
    for written in (page, said):
        assert value in written
    assert study.sha256() in page
    for plot in (folder / "plots").glob("*.svg"):
        assert "<text" in plot.read_text()  # text stays text


def test_the_same_study_gives_the_same_bytes(finished, home, tmp_path):
    study, folder, _ = finished
    old = tmp_path / "plots" / "of-an-earlier-study.svg"
    old.parent.mkdir()
    old.write_text("")
    write_study(study, tmp_path)
    assert not old.exists()
    for path in tmp_path.rglob("*.*"):
        assert path.read_bytes() == (folder / path.relative_to(tmp_path)).read_bytes(), path


def test_what_cannot_be_asked_is_refused_before_anything_is_measured(home, finished, tmp_path):
    out = tmp_path / "out"
    assert "exists" in cli_tiny.refused(*words(home, "-o", finished[1]))
    cases = [
        (["--counts", "1,6"], "cannot remove 6 of 6 layers"),
        (["--counts", "two"], "'two' is not a whole number from 1 to 1000000"),
        (["--greedy", "100%"], "--greedy 100% (6 layers): the model has 6 layers; between 1 and 5"),
        (["--metric", "cosin"], "Did you mean 'cosine'?"),
        (["--text", home / "none.txt"], "is not a file"),
        (["--protect", "9"], "layer 9 does not exist"),
        (["--protect", "1-3"], "1 others may go and two are needed"),
    ]
    for more, message in cases:
        assert message in cli_tiny.refused(*words(home, "-o", out, *more))
    plain = ["study", home / "base", "--tasks", "toy", "--include-path", home / "tasks", "-o", out]
    assert "leave it among the metrics" in cli_tiny.refused(*plain, "--metric", "cosine")
    assert "at chance" in cli_tiny.last_line(*words(home, "-o", out, "--tasks", "toy,odd"))
    assert not out.exists()


def test_metrics_may_be_written_in_any_way(home, tmp_path):
    """Spelt out, in another order, twice: what is measured by one spelling is looked up by it."""
    metrics = ["ablation:signal=accuracy", "cosine:tokens=all", "cosine", "shapley:texts=4,permutations=2"]
    listed = [word for metric in metrics for word in ("--metric", metric)]
    cli_tiny.done("study", home / "base", "--tasks", "toy", "--include-path", home / "tasks", *listed, "--limit", 10,
                  "--audit-limit", AUDIT, "--counts", "1,2", "--dtype", "float32", "-o", tmp_path / "out")  # fmt: skip
    study = Study.load(tmp_path / "out" / "study.json")
    named = [one.spec for one in study.metrics]
    assert named[:3] == ["ablation", "cosine", "shapley:permutations=2,texts=4"]
    assert {path.metric for path in study.paths} == set(named)


def test_what_was_not_looked_at_is_said(finished):
    study, _, _ = finished
    ended = study.paths[1].model_copy(update={"points": (), "remark": "layer 3 has to stay"})
    less = Findings(study.model_copy(update={"spread": (), "text": None, "paths": (study.paths[0], ended)}))
    (said,) = findings.on_spread(less).paragraphs
    assert said == "With a single task there is nothing to compare; give several with --tasks."
    assert any("No plain text was given" in one for one in findings.on_calibration(less).paragraphs)
    assert findings.on_paths(less).paragraphs[-1] == f"The path of {ended.metric} ends early: layer 3 has to stay"
