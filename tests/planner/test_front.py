"""A front: one path, a plan for each step that export takes as it stands, a table and a plot. On a tiny model."""

import csv
import json

import pytest

import audit_tiny
from cli_tiny import done, refused
from layerprune.artifacts import Front, FrontPoint, Objective, Plan, PredictedTask, Receipt, Scores
from layerprune.artifacts.plan import POINTS, plan_name
from layerprune.checkpoint import Checkpoint
from layerprune.errors import DocumentError
from layerprune.planner.front import COLUMNS, named_points, path_of, write_plot
from layerprune.search import Constraints
from layerprune.search.base import SearchResult


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("front")
    audit_tiny.base_model(folder / "base")
    for name, items in (("toy", 20), ("other", 20), ("more", 60)):
        audit_tiny.eval_set(folder / "base", folder / "tasks", name, train=items, test=2)
    folder.joinpath("said.txt").write_text(done(*front(folder, folder / "run", "--up-to", "70%")).stdout)
    return folder


def front(home, out, *words, tasks="toy,other"):
    return ["plan", home / "base", "--tasks", tasks, "--include-path", home / "tasks", "--front", "-o", out, *words]


def test_each_step_has_a_plan_of_its_own_that_holds_the_last(home):
    found, scores = Front.load(home / "run/front/front.json"), Scores.load(home / "run/scores.json")
    assert [point.plan for point in found.points] == ["plan-01.json", "plan-02.json", "plan-03.json", "plan-04.json"]
    assert not (home / "run" / "plan.json").exists()
    before = frozenset()
    assert [point.plan for point in found.points] == [plan_name(len(point.removal), 6) for point in found.points]
    for count, point in enumerate(found.points, 1):
        plan = Plan.load(home / "run" / "front" / point.plan)
        assert plan.sha256() == point.plan_sha256
        assert plan.scores_sha256 == found.scores_sha256 == scores.sha256()
        assert plan.requested == "--front --up-to 70%"
        assert plan.removal == point.removal
        assert len(plan.removal) == len(plan.order) == count
        assert before < set(plan.removal)
        before = set(plan.removal)
        assert plan.predicted.tasks == point.tasks
        mean = sum(task.accuracy for task in point.tasks.values()) / 2
        assert point.accuracy == pytest.approx(mean, abs=1e-6)
        assert point.accuracy - found.accuracy == pytest.approx(point.accuracy_difference, abs=2e-6)
        assert point.interval[0] <= point.accuracy_difference <= point.interval[1]


def test_the_plans_are_those_that_drop_would_make(home, tmp_path):
    words = ["plan", home / "base", "--tasks", "toy,other", "--include-path", home / "tasks", "--drop", 3]
    done(*words, "-o", tmp_path / "run")
    alone, step = Plan.load(tmp_path / "run/plan.json"), Plan.load(home / "run/front/plan-03.json")
    assert (alone.order, alone.ranking, alone.predicted) == (step.order, step.ranking, step.predicted)


def test_a_plan_of_a_front_is_exported_as_it_stands_and_weighs_what_it_said(home, tmp_path):
    point = Front.load(home / "run/front/front.json").points[1]
    done("export", home / "run" / "front" / point.plan, "-o", tmp_path / "smaller")
    receipt = Receipt.load(tmp_path / "smaller" / "layerprune" / "receipt.json")
    assert (receipt.result.parameters, receipt.bytes_after) == (point.parameters, point.bytes)


def test_a_shorter_front_in_its_place_leaves_no_plan_of_the_longer_and_is_the_same_as_alone(home, tmp_path):
    done(*front(home, tmp_path / "run", "--up-to", 4))
    done(*front(home, tmp_path / "run", "--up-to", 2, "--force"))
    done(*front(home, tmp_path / "alone", "--up-to", 2))
    names = {path.name for path in (tmp_path / "run" / "front").iterdir()}
    assert names == {path.name for path in (tmp_path / "alone" / "front").iterdir()}
    for name in ("scores.json", "front/front.json", "front/plan-02.json"):  # the work of the longer is not counted
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def test_the_table_has_the_same_figures(home):
    found = Front.load(home / "run/front/front.json")
    rows = list(csv.DictReader((home / "run/front/front.csv").read_text().splitlines()))
    assert tuple(rows[0]) == COLUMNS
    assert rows[0]["parameters"] == str(Checkpoint.open(home / "base").parameters)
    assert float(rows[0]["accuracy"]) == found.accuracy
    for row, point in zip(rows[1:], found.points, strict=True):
        assert [int(layer) for layer in row["layers"].split()] == list(point.removal)
        assert (float(row["difference"]), int(row["bytes"])) == (point.accuracy_difference, point.bytes)
    said = (home / "said.txt").read_text()
    assert all(point.plan in said for point in found.points)
    assert f"{100 * found.points[0].accuracy_difference:+.1f}" in said


def test_the_plot_is_a_picture_the_same_for_the_same_front(home, tmp_path):
    drawn = (home / "run/front/front.png").read_bytes()
    assert drawn.startswith(b"\x89PNG")
    assert len(drawn) > 10_000
    write_plot(Front.load(home / "run/front/front.json"), tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == drawn


def test_what_a_front_cannot_be_is_refused_before_a_model_is_loaded(home, tmp_path):
    out = tmp_path / "out"
    said = refused(*front(home, out, "--search", "exchange"))
    assert said == "--front follows one path, and the search 'exchange' lays none: use greedy or one-shot"
    assert "--drop and --front are given" in refused(*front(home, out, "--drop", 2))
    assert "belongs to --max-drop, and --front is given" in refused(*front(home, out, "--confidence", "90%"))
    assert "--up-to 0: at least one layer goes and one stays" in refused(*front(home, out, "--up-to", 0))
    assert "give tasks" in refused("plan", home / "base", "--metric", "random", "--front", "-o", out)
    scores = home / "run" / "scores.json"
    assert "leave --scores out" in refused("plan", "--scores", scores, "--front", "-o", out)
    assert not out.exists()
    said = refused(*front(home, home / "run"))
    assert said.startswith(f"{home / 'run' / 'front' / 'front.json'} exists; give another folder with -o, or --force")


def test_a_cheap_metric_has_a_front_too_and_protected_layers_shorten_it(home, tmp_path):
    done(*front(home, tmp_path / "run", "--metric", "cosine", "--protect", "0,1,2", "--no-adjacent", tasks="more"))
    found = Front.load(tmp_path / "run/front/front.json")
    assert len(found.points) == 2  # of layers 3, 4 and 5
    assert found.search.name == "one-shot"
    assert found.limits.no_adjacent


def test_layers_that_go_together_are_one_step():
    constraints = Constraints(6, together=(frozenset({1, 2}),))
    path = path_of(SearchResult(order=(4, 1, 2, 0), rounds=(), ranking=()), constraints)
    assert [step.removal.layers for step in path] == [(4,), (1, 2, 4), (0, 1, 2, 4)]


@pytest.mark.parametrize("command", [["score"], ["plan", "--drop", 1, "--search", "one-shot"]])
def test_scores_that_are_replaced_take_the_front_made_from_them_along(home, tmp_path, command):
    out, (verb, *rest) = tmp_path / "run", command
    done(*front(home, out, "--up-to", 2))
    kept = out / "front" / "plan-01-reviewed.json"
    kept.write_text("the front does not name it")
    said = done(verb, home / "base", *rest, "--metric", "reverse-order", "-o", out, "--force").stderr
    assert f"removed: {out / 'front' / 'plan-01.json'} and 4 more, planned from the scores that stood there" in said
    assert list((out / "front").iterdir()) == [kept]


def test_a_front_takes_the_plan_made_from_the_scores_before_along(home, tmp_path):
    out = tmp_path / "run"
    done("plan", home / "base", "--metric", "reverse-order", "--drop", 1, "--search", "one-shot", "-o", out)
    said = done(*front(home, out, "--up-to", 2, "--force")).stderr
    assert f"removed: {out / 'plan.json'}, planned from the scores that stood there before" in said
    assert not (out / "plan.json").exists()


def test_what_is_written_anew_is_not_said_to_be_removed_along(home, tmp_path):
    one_shot = ["--drop", 1, "--search", "one-shot", "-o", tmp_path / "plan", "--force"]
    done("plan", home / "base", "--metric", "reverse-order", *one_shot)
    assert "removed: " not in done("plan", home / "base", "--metric", "random", *one_shot).stderr
    done(*front(home, tmp_path / "front", "--up-to", 2))
    other = front(home, tmp_path / "front", "--up-to", 2, "--force", tasks="toy")
    assert "removed: " not in done(*other).stderr
    assert (tmp_path / "front" / "front" / "plan-02.json").exists()


def step(removed, *, toy=0.0, other=0.0, nats=None, agreed=None):
    """A point that loses so much of its tasks' accuracies, and of own answers where ``nats`` is given."""
    choices = {"toy": toy, "other": other}
    tasks = {
        name: PredictedTask(base_accuracy=0.5, accuracy=0.5 + d, difference=d, interval=(d, d), items=9)
        for name, d in choices.items()
    }
    if nats is not None:
        own = {"nats": nats, "base_agreed": 0.99, "agreed": agreed}
        tasks["own"] = PredictedTask(base_accuracy=1, accuracy=0, difference=-1, interval=(-1, -1), items=9, **own)
    return FrontPoint(
        removal=tuple(range(removed)), plan=plan_name(removed, 6), plan_sha256="", parameters=1, bytes=1, accuracy=0.5,
        accuracy_difference=(toy + other) / 2, interval=(-1, 1), tasks=tasks,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("points", "objective", "named"),
    [
        ([step(1, toy=-0.1), step(2, toy=0.2), step(3), step(4, toy=-0.2)], Objective(), (2, 3)),
        ([step(1, toy=-0.1), step(2, toy=-0.1)], Objective(), (2, None)),  # of equal ones the smaller model
        ([step(1, toy=0.1), step(2, toy=0.3, other=-0.2)], Objective(), (2, 2)),
        ([step(1, toy=0.1), step(2, toy=0.3, other=-0.2)], Objective(name="worst"), (1, 1)),
        (
            [step(1, toy=-0.1), step(2, toy=0.3, other=-0.2)],
            Objective(name="weighted", weights={"other": 3}),
            (1, None),
        ),
        ([step(1, nats=0.1, agreed=0.98), step(2, nats=0.3, agreed=0.98)], Objective(), (1, None)),
        ([step(1, toy=0.1, nats=0, agreed=0.99), step(2, nats=0.1, agreed=0.9)], Objective(), (1, 1)),
        ([step(1, toy=-0.1, nats=0, agreed=0.99)], Objective(), (1, None)),  # every answer the same, but choices lost
    ],
)
def test_named_points_are_the_least_loss_and_the_farthest_without_any(points, objective, named):
    expected = dict(zip(POINTS, named, strict=True))
    assert named_points(points, objective) == {name: plan_name(n, 6) for name, n in expected.items() if n is not None}


def test_names_are_in_the_front_the_table_and_the_csv(home):
    found = Front.load(home / "run/front/front.json")
    best = max(found.points, key=lambda point: (point.accuracy, len(point.removal)))
    free = [point.plan for point in found.points if point.accuracy_difference >= 0]
    assert found.named == {"best": best.plan, **({"most-at-no-loss": free[-1]} if free else {})}
    rows = list(csv.DictReader((home / "run/front/front.csv").read_text().splitlines()))
    assert {row["plan"]: row["point"] for row in rows[1:]} == {
        point.plan: ", ".join(name for name in POINTS if found.named.get(name) == point.plan) for point in found.points
    }
    said = (home / "said.txt").read_text().replace("\n", "")
    assert f"best: {home / 'run' / 'front' / best.plan}" in said
    assert ("most-at-no-loss: none" in said) is (not free)
    assert f"export {home / 'run' / 'front' / (free[-1] if free else best.plan)} -o smaller/" in said


def test_a_front_that_names_a_plan_of_no_point_is_refused(home, tmp_path):
    path = tmp_path / "front.json"
    data = json.loads((home / "run/front/front.json").read_text())
    path.write_text(json.dumps({**data, "named": {"best": "plan-05.json"}}))
    with pytest.raises(DocumentError, match=r"named calls plan-05\.json 'best', and no point has that plan"):
        Front.load(path)
    path.write_text(json.dumps({**data, "named": {"fastest": "plan-01.json"}}))
    with pytest.raises(DocumentError, match=r"named\.fastest"):
        Front.load(path)
