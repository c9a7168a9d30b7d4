"""A removal that makes the model overflow is the worst of its round; a model that does by itself is an error."""

from contextlib import contextmanager

import pytest

import audit_tiny
import metric_tiny
from cli_tiny import done, last_line
from layerprune.artifacts import Candidate, Plan, Scores
from layerprune.data.tasks import load_eval_set
from layerprune.errors import ModelError, RefusedError
from layerprune.models.model import LoadedModel
from layerprune.removal import Removal
from layerprune.scoring import cached_evaluator
from layerprune.scoring.aggregation import failures_last
from layerprune.scoring.cached_evaluator import CachedEvaluator
from layerprune.scoring.engine import Engine
from layerprune.scoring.evaluator import evaluate
from layerprune.scoring.metrics.ablation import INTACT, Ablation
from layerprune.scoring.metrics.base import Data
from layerprune.scoring.metrics.loss import Output, Perplexity, Shapley, breaking_players
from layerprune.search import Constraints, Greedy, OneShot, by_importance, require_finite
from layerprune.util import SILENT

BROKEN = 2  # the layer without which the model overflows
MARK = 1000.0


def overflowing(loaded, layer=BROKEN):
    """Let a layer leave a mark in the stream that the next one takes away, and makes NaN of a stream without it."""
    writer, reader = loaded.layers[layer], loaded.layers[layer + 1]
    write, read = writer.forward, reader.forward

    def marked(*args, **kwargs):
        output = write(*args, **kwargs)
        hidden = (output[0] if isinstance(output, tuple) else output).clone()
        hidden[..., 0] += MARK
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    def checked(hidden, *args, **kwargs):
        hidden = hidden.clone()
        missing = hidden[..., 0] < MARK / 2
        hidden[..., 0] -= MARK
        hidden[missing] = float("nan")
        return read(hidden, *args, **kwargs)

    writer.forward, reader.forward = marked, checked
    return loaded


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return audit_tiny.model_and_task(tmp_path_factory.mktemp("finite"), train=60)


@pytest.fixture(scope="module")
def asked(home):
    loaded = overflowing(LoadedModel.load(str(home / "base")))
    return loaded, load_eval_set(["toy"], loaded.encoder, use="selection", include_path=[home / "tasks"])


SINGLE = [Removal.of(layer) for layer in range(audit_tiny.DEPTH)]


class Heard:
    """A progress that remembers what it is told."""

    def __init__(self):
        self.notes = []
        self.note = self.notes.append
        self.task = SILENT.task


def check_worst(found):
    """The broken layer alone is marked, and is the last by score and by order."""
    assert [one.removal for one in found if one.not_finite] == [(BROKEN,)]
    assert max(found, key=lambda one: one.score).removal == (BROKEN,)
    assert sorted(one.score for one in found)[-1] > sorted(one.score for one in found)[-2]
    assert sorted(found, key=by_importance)[-1].removal == (BROKEN,)


@pytest.mark.parametrize("signal", ["accuracy", "probability", "margin", "blend"])
def test_ablation_ranks_it_last(asked, signal):
    loaded, eval_set = asked
    found = Ablation(signal).score(loaded, SINGLE, Data(eval_set, CachedEvaluator(Engine(loaded), eval_set)))
    check_worst(found)
    outcomes = found[BROKEN].tasks["toy"].outcomes
    assert outcomes.correct == "0" * 60
    assert outcomes.gold_probability == (0.0,) * 60
    assert outcomes.not_finite == 60
    assert found[0].tasks["toy"].outcomes.not_finite == 0


def text_data(loaded):
    return metric_tiny.data_of(metric_tiny.texts_of())


@pytest.mark.parametrize(
    "metric", [Perplexity(), Output(), Output(by="cosine"), Output(by="l2"), Shapley(permutations=4)], ids=repr
)
def test_metrics_that_read_text_rank_it_last(metric):
    loaded = overflowing(metric_tiny.subject_of("llama"))
    singles = [Removal.of(layer) for layer in range(len(loaded.layers))]
    found = metric.score(loaded, singles, text_data(loaded))
    check_worst(found)
    healthy = metric.score(metric_tiny.subject_of("llama"), singles, text_data(loaded))
    if not isinstance(metric, Shapley):  # its sets hold several layers
        rest = [layer for layer in range(len(found)) if layer not in (BROKEN, BROKEN + 1)]  # the mark stays without it
        others = [(found[layer].score, healthy[layer].score) for layer in rest]
        assert [a for a, _ in others] == pytest.approx([b for _, b in others], rel=1e-2, abs=1e-4)


@pytest.mark.parametrize("metric", [Perplexity(), Output(), Shapley(permutations=2)], ids=repr)
def test_a_model_that_overflows_by_itself_is_an_error_of_one_line(metric):
    loaded = metric_tiny.subject_of("llama")
    read = loaded.layers[1].forward
    loaded.layers[1].forward = lambda hidden, *args, **kwargs: read(hidden * float("nan"), *args, **kwargs)
    with pytest.raises(ModelError, match=r"^l\w+ of llama itself are not finite: look for weights that are not finite"):
        metric.score(loaded, [Removal.of(3)], text_data(loaded))


def test_ablation_of_a_model_that_overflows_by_itself_is_an_error_of_one_line(home, asked):
    loaded = LoadedModel.load(str(home / "base"))
    read = loaded.layers[1].forward
    loaded.layers[1].forward = lambda hidden, *args, **kwargs: read(hidden * float("nan"), *args, **kwargs)
    with pytest.raises(ModelError, match=r"log-likelihoods of .*base itself are not finite"):
        Ablation().score(loaded, SINGLE, Data(asked[1], CachedEvaluator(Engine(loaded), asked[1])))


def test_a_race_puts_it_out_at_once(asked, monkeypatch):
    monkeypatch.setattr(cached_evaluator, "BLOCK_ITEMS", 20)
    loaded, eval_set = asked
    data = Data(eval_set, CachedEvaluator(Engine(loaded), eval_set), keep=1)
    raced = Ablation().score(loaded, SINGLE, data)
    check_worst(raced)
    assert raced[BROKEN].tasks["toy"].items == 20
    data.keep = None
    assert (
        min(raced, key=by_importance).removal == min(Ablation().score(loaded, SINGLE, data), key=by_importance).removal
    )
    data.keep = 5  # all that are left are among the five: clear from the start
    assert all(one.accepted for one in Ablation().score(loaded, SINGLE, data) if not one.not_finite)


def test_what_is_asked_for_other_purposes_counts_it_wrong_and_says_so(asked):
    loaded, eval_set = asked
    heard = Heard()
    found = evaluate(Engine(loaded), eval_set, [INTACT, *SINGLE], heard)
    assert found[SINGLE[BROKEN]]["toy"].correct == "0" * 60
    assert heard.notes == ["without {2} the log-likelihoods of 60 items are not finite: counted wrong"]


def test_its_score_is_above_those_asked_beside_it_and_alone_it_stays():
    one, two = Candidate(removal=(1,), score=-3.0, interval=(-4, -2)), Candidate(removal=(2,), score=5.0)
    failed = Candidate(removal=(0,), score=0.0, interval=(0, 1), not_finite=True)
    lifted = failures_last([failed, one, two])
    assert [(c.score, c.interval) for c in lifted] == [(13.0, None), (-3.0, (-4, -2)), (5.0, None)]
    assert failures_last([failed]) == [failed]


def test_players_that_break_a_game_are_those_after_whom_its_cost_is_not_finite():
    failed = {frozenset(each) for each in [(2,), (0, 2), (1, 2), (0, 1, 2)]}
    assert breaking_players([(0, 2, 1), (2, 1, 0)], failed) == {2}
    assert breaking_players([(0, 1, 2)], set()) == set()


def judge_with(failed):
    def judge(removals):
        return [
            Candidate(removal=r.layers, score=sum(r.layers) if not failed & set(r.layers) else 0.0,
                      not_finite=bool(failed & set(r.layers)))
            for r in removals
        ]  # fmt: skip

    return judge


@pytest.mark.parametrize("search", [OneShot(), Greedy(), Greedy(lazy=True)], ids=repr)
def test_searches_leave_it_where_they_can_and_refuse_where_nothing_else_is_left(search):
    found = search.find(judge_with({0}), Constraints(5), 2)
    assert found.removal.layers == (1, 2)
    require_finite(found)
    with pytest.raises(RefusedError, match="not finite"):
        require_finite(search.find(judge_with({0}), Constraints(3, protect=frozenset({2})), 2))
    with pytest.raises(RefusedError, match=r"^nothing can go: whatever does, the model's figures are not finite"):
        search.find(judge_with({0, 1, 2, 3, 4}), Constraints(5), 1)


@contextmanager
def loading(monkeypatch, layer=BROKEN):
    load = LoadedModel.load.__func__
    with monkeypatch.context() as patch:
        patch.setattr(LoadedModel, "load", classmethod(lambda cls, *a, **k: overflowing(load(cls, *a, **k), layer)))
        yield


@pytest.mark.parametrize("metric", ["ablation", "ablation:signal=margin", "perplexity"])
def test_the_commands_say_it_and_choose_others(home, tmp_path, monkeypatch, metric):
    words = ["--metric", metric, "--tasks", "toy", "--include-path", home / "tasks", "--dtype", "float32"]
    with loading(monkeypatch):
        ran = done("plan", home / "base", *words, "--drop", 2, "-o", tmp_path / "run")
        said = "without {2} the model's figures are not finite"
        assert ran.stderr.count(said) == 1
        assert "not finite" in done("score", home / "base", *words, "-o", tmp_path / "scores").stdout
        refusal = last_line(
            "plan", home / "base", *words, "--search", "one-shot", "--drop", 5, "-o", tmp_path / "all",
            "--protect", 4,
        )  # fmt: skip
        assert refusal.startswith(f"{said}, and nothing better is left to remove: lower --drop")
    plan = Plan.load(tmp_path / "run" / "plan.json")
    assert BROKEN not in plan.removal
    assert any(warning.startswith(said) for warning in plan.warnings)
    scores = Scores.load(tmp_path / "scores" / "scores.json")
    assert [one.removal for one in scores.rounds[0].candidates if one.not_finite] == [(BROKEN,)]
    done("plan", "--scores", tmp_path / "scores" / "scores.json", "--drop", 2, "-o", tmp_path / "again")
    assert BROKEN not in Plan.load(tmp_path / "again" / "plan.json").removal
