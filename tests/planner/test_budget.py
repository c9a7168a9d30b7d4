"""--budget: how many items fit, what is said of them, and that a run that goes on keeps its number."""

import json
import time

import pytest

import cli_tiny
import layerprune as lp
from layerprune.artifacts import Scores
from layerprune.errors import DocumentError, UsageError
from layerprune.option_types import duration
from layerprune.planner import budget
from layerprune.planner.budget import FIRST, RESERVE, TimeBudget, evaluations
from layerprune.removal import Removal
from layerprune.search import Constraints, Greedy, OneShot
from layerprune.search.searches import Blocks, Exchange
from layerprune.util import SILENT


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return cli_tiny.make(tmp_path_factory.mktemp("budget"))


class Told(list):
    def note(self, message):
        self.append(message)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("20m", 1200), ("1h30m", 5400), (45, 45), ("2h", 7200), (0.5, 0.5)]
)
def test_times_are_read_as_people_write_them(text, seconds):
    assert duration.read(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "m20", "20 minutes", "-5", "1.5h", "9" * 400, None, True, 10**30, -1.0])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(ValueError, match="is not a time; write 20m, 1h30m or 90s"):
        duration.read(text)


def test_a_search_is_counted_by_what_it_asks():
    free = Constraints(6)
    assert evaluations(OneShot(), free, 2) == 6 + 1  # and what it found
    assert evaluations(Greedy(), free, 3) == 6 + 5 + 4
    assert evaluations(Greedy(lazy=True), free, 3) == 6 + 5 + 4
    assert evaluations(Blocks(), free, 2) == 5
    with pytest.raises(UsageError, match="asks other metrics"):
        evaluations(Exchange(), free, 2)


def fitting(tmp_path, seconds, evaluations=30):
    return TimeBudget(seconds, time.monotonic(), evaluations, {"model": "m"}, tmp_path, Told())


def test_the_number_follows_from_the_speed(tmp_path, monkeypatch):
    """An item of each task takes 0.1 s under each of the ten removals of a round and the intact model."""
    measured = []

    def timed(self, eval_set, engine, removals, answers):
        measured.append(eval_set)
        return 0.0, 0.1

    monkeypatch.setattr(TimeBudget, "seconds_of", timed)
    removals = [Removal.of(layer) for layer in range(10)]
    fit = fitting(tmp_path, 3600)
    count = fit.items(lambda items: items, None, removals, answers=False)
    assert count == pytest.approx(3600 * (1 - RESERVE) / (0.1 * 30), abs=1)
    assert measured == [FIRST, budget.BLOCK, budget.BLOCK]
    assert fitting(tmp_path, 3600).items(None, None, removals, answers=False) == count  # not measured again
    other = fitting(tmp_path, 3600, evaluations=60)
    other.asked["model"] = "another"
    assert other.items(lambda items: items, None, removals, answers=False) == pytest.approx(count / 2, abs=1)
    measured.clear()
    fitting(tmp_path / "slow", 200).items(lambda items: items, None, removals, answers=False)
    assert measured == [FIRST, 9, 9]  # of 1.1 s; a whole block would have taken more than a twentieth of the budget
    measured.clear()
    monkeypatch.setattr(TimeBudget, "seconds_of", lambda self, items, *rest: (1.0, 0.1))
    count = fitting(tmp_path / "writes", 3600).items(lambda items: items, None, removals, answers=True)
    assert count == pytest.approx(3600 * (1 - RESERVE) / (1.0 + 0.1 * 30), abs=1)  # written once, read under each


def test_a_budget_that_holds_too_few_says_what_would_do(tmp_path, monkeypatch):
    monkeypatch.setattr(TimeBudget, "seconds_of", lambda self, *rest: (0.0, 5.0))
    with pytest.raises(UsageError, match=r"a budget of 1 min holds \d items.*give --budget (\d+)m or more") as caught:
        fitting(tmp_path, 60).items(lambda items: items, None, [Removal.of(0)], answers=False)
    assert not (tmp_path / "budget.json").exists()
    minutes = int(str(caught.value).partition("--budget ")[2].partition("m")[0])
    fitting(tmp_path, 60 * minutes).items(lambda items: items, None, [Removal.of(0)], answers=False)


def test_a_damaged_record_is_told(tmp_path):
    (tmp_path / "budget.json").write_text("[" * 100_000)
    with pytest.raises(DocumentError, match=r"budget\.json cannot be read: .*; remove it to measure anew"):
        fitting(tmp_path, 60).items(None, None, [], answers=False)


@pytest.mark.parametrize("items", [True, 1, 2.5, "40", None])
def test_a_number_that_nobody_would_have_written_is_measured_anew(tmp_path, monkeypatch, items):
    monkeypatch.setattr(TimeBudget, "seconds_of", lambda self, *rest: (0.0, 0.1))
    asked = (fitting(tmp_path, 3600), lambda count: count, None, [Removal.of(0)])
    expected = asked[0].items(*asked[1:], answers=False)
    path = tmp_path / "budget.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"items": items}))
    assert fitting(tmp_path, 3600).items(*asked[1:], answers=False) == pytest.approx(expected, abs=1)


def test_a_run_takes_what_fits_and_goes_on_with_it(home, tmp_path, monkeypatch):
    toy = {"tasks": ["toy"], "include_path": home / "tasks"}
    real = TimeBudget.seconds_of
    monkeypatch.setattr(TimeBudget, "seconds_of", lambda self, *rest: (real(self, *rest)[0] * 0, 0.5 / 6))
    told = Told()
    told.task = SILENT.task
    seconds = 1400  # 0.5 s an item under six removals: 0.9 * 1400 / 0.5 = 2,520 items, and the task has fewer
    scores = lp.score(home / "base", budget=f"{seconds}s", out=tmp_path, progress=told, **toy)
    every = lp.score(home / "base", **toy).data[0].items
    assert scores.data[0].items == every
    assert any(f"{every} items in all, each under 6 removals; two removals whose" in note for note in told)
    kept = json.loads((tmp_path / "budget.json").read_text())["items"]
    monkeypatch.setattr(TimeBudget, "seconds_of", None)  # it is not measured again
    assert lp.score(home / "base", budget=f"{seconds}s", out=tmp_path, progress=told, **toy) == scores
    assert any(note.endswith(f"{kept:,} items of each task, as this run began with") for note in told)
    few = tmp_path / "few"
    monkeypatch.setattr(TimeBudget, "seconds_of", lambda self, *rest: (0.0, 0.5 / 6))
    cli_tiny.done(
        "plan", home / "base", "--tasks", "toy", "--include-path", home / "tasks", "--search", "one-shot", "--drop", 1,
        "--budget", "8s", "-o", few,
    )  # fmt: skip
    assert 10 <= Scores.load(few / "scores.json").data[0].items < every


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--metric", "cosine", "--drop", 1), "--budget: the metric 'cosine' answers no items; use --limit"),
        (("--max-drop", "2%"), "--budget: how many items certify --max-drop has to be fixed beforehand"),
        (("--search", "exchange", "--drop", 1), "--budget: this search asks other metrics"),
    ],
)
def test_what_a_budget_cannot_do_is_refused(home, tmp_path, words, message):
    asked = ["plan", home / "base", "--tasks", "toy", "--include-path", home / "tasks", "--budget", "5m"]
    assert message in cli_tiny.last_line(*asked, *words, "-o", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_study_divides_its_budget_between_choosing_and_judging(home, tmp_path, monkeypatch):
    monkeypatch.setattr(TimeBudget, "seconds_of", lambda self, *rest: (0.0, 0.001))
    study = lp.study(
        home / "base", tmp_path / "study", tasks=["toy"], include_path=home / "tasks", metrics=["ablation", "cosine"],
        counts=[1, 2], budget="6s",
    )  # fmt: skip
    assert study.selection[0].items == 20  # all that the task's training split has
    assert study.audit[0].items == 60  # as its test split has
    kept = json.loads((tmp_path / "study" / "work" / "selection" / "budget.json").read_text())
    assert kept["items"] > 60
    assert kept["asked"]["evaluations"] == 6 * 2 + (2 + 1 + 3) * (2 + 3)
