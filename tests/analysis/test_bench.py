"""Any metric and any search on one set of items: asked once, remembered across runs, never for other data."""

from dataclasses import replace

import numpy as np
import pytest

import audit_tiny
from layerprune.analysis.measurements import answers_of, difference, mean_accuracy
from layerprune.artifacts import Outcomes
from layerprune.data.tasks import load_eval_set
from layerprune.models.model import LoadedModel
from layerprune.planner import search_runner
from layerprune.planner.search_runner import SearchRunner, text_key
from layerprune.registry import build
from layerprune.removal import Removal
from layerprune.scoring.cached_evaluator import CachedEvaluator
from layerprune.scoring.engine import Engine
from layerprune.scoring.metrics import METRICS, proxies
from layerprune.scoring.metrics.ablation import Ablation
from layerprune.scoring.metrics.base import Data
from layerprune.search import Constraints, Greedy

SINGLES = [Removal.of(layer) for layer in range(audit_tiny.DEPTH)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    audit_tiny.eval_set(audit_tiny.base_model(folder / "base"), folder / "tasks", "toy")
    loaded = LoadedModel.load(str(folder / "base"), dtype="float32", device="cpu")
    eval_set = load_eval_set(["toy"], loaded.encoder, use="selection", include_path=[folder / "tasks"], limit=15)
    return loaded, eval_set


def scorer(tiny, folder=None, **changes):
    loaded, eval_set = tiny
    data = Data(eval_set=eval_set, evaluator=CachedEvaluator(Engine(loaded), eval_set))
    return SearchRunner(loaded, replace(data, **changes), folder)


def test_a_text_metric_is_asked_once_and_remembered_by_the_next_run(tiny, tmp_path, monkeypatch):
    first = scorer(tiny, tmp_path).judge("cosine")(SINGLES)
    assert [one.score for one in first] == [one.score for one in proxies.Cosine().score(*tiny_call(tiny))]
    read = []
    monkeypatch.setattr(proxies, "state_distances", lambda *args: read.append(args[3]) or [0.5] * len(args[3]))
    assert scorer(tiny, tmp_path).judge("cosine")(SINGLES) == first
    assert read == []
    scorer(tiny, tmp_path).judge("cosine:tokens=last")(SINGLES)
    scorer(tiny, tmp_path, seed=1).judge("cosine")(SINGLES)
    other = replace(tiny[1].tasks["toy"], items=tiny[1].tasks["toy"].items[1:])
    others = replace(tiny[1], tasks={"toy": other})
    scorer(tiny, tmp_path, eval_set=others).judge("cosine")(SINGLES)
    scorer(tiny, tmp_path, memory=10**9).judge("cosine")(SINGLES)
    with monkeypatch.context() as patch:
        patch.setattr(search_runner, "source_of", lambda kind: "other code")
        scorer(tiny, tmp_path).judge("cosine")(SINGLES)
    assert read == [[(layer, layer) for layer in range(len(SINGLES))]] * 5  # each of these measured anew


def test_a_metric_of_another_version_is_another_judge(tiny):
    loaded, eval_set = tiny
    entry, metric = build(METRICS, "cosine")
    data = Data(eval_set=eval_set)
    newer = replace(entry, owner="layerprune 99")
    assert text_key(loaded, data, newer, metric) != text_key(loaded, data, entry, metric)


def tiny_call(tiny):
    loaded, eval_set = tiny
    return loaded, SINGLES, Data(eval_set=eval_set)


def test_a_search_finds_what_it_finds_without_the_scorer(tiny):
    loaded, eval_set = tiny
    data = Data(eval_set=eval_set, evaluator=CachedEvaluator(Engine(loaded), eval_set))
    plain = Greedy().find(lambda removals: Ablation().score(loaded, removals, data), Constraints(audit_tiny.DEPTH), 3)
    for racing in (False, True):
        found = scorer(tiny).find("ablation", "greedy", Constraints(audit_tiny.DEPTH), 3, racing=racing)
        assert found.order == plain.order
        assert found.ranking[0] == plain.ranking[0]


def test_exchange_gets_the_choices_of_other_metrics_and_its_own_ranking(tiny):
    where = Constraints(audit_tiny.DEPTH), 2
    own, hidden_states = (scorer(tiny).find(metric, "one-shot", *where).removal for metric in ("ablation", "cosine"))
    block = scorer(tiny).find("angular", "blocks", *where).removal
    found = scorer(tiny).find("ablation", "exchange:by=cosine+angular,most=0", *where, racing=False)
    assert [one.removal for one in found.rounds[1].candidates] == list(
        dict.fromkeys(removal.layers for removal in (own, hidden_states, block))
    )
    assert found.cost.score == min(one.score for one in found.rounds[1].candidates)


def test_seeds_reach_the_random_baseline(tiny):
    orders = {scorer(tiny).find("random", "one-shot", Constraints(6), 3, seed=seed).order for seed in range(5)}
    assert len(orders) > 1
    assert scorer(tiny).find("random", "one-shot", Constraints(6), 3, seed=0).order in orders


def outcomes(**tasks):
    return {name: Outcomes(correct=correct) for name, correct in tasks.items()}


def test_differences_are_means_over_tasks_of_paired_differences():
    base = answers_of([outcomes(a="1111", b="11")])
    other = answers_of([outcomes(a="1100", b="11")])
    assert mean_accuracy(other) == pytest.approx(0.75)
    seen, (low, high) = difference(base, other)
    assert seen == pytest.approx(-0.25)
    assert low < seen < high
    back, (low2, high2) = difference(other, base)
    assert (back, low2, high2) == pytest.approx((-seen, -high, -low))


def test_draws_of_a_baseline_are_averaged_item_by_item():
    drawn = answers_of([outcomes(a="1100" * 10), outcomes(a="1010" * 10)])
    assert drawn["a"].tolist() == [1.0, 0.5, 0.5, 0.0] * 10
    seen, (low, high) = difference(answers_of([outcomes(a="1111" * 10)]), drawn)
    assert seen == pytest.approx(-0.5)
    spread = np.std(drawn["a"]) / np.sqrt(40)
    assert high - low == pytest.approx(2 * 1.96 * spread, rel=0.15)


def test_other_tasks_cannot_be_compared():
    with pytest.raises(ValueError, match="cannot be compared"):
        difference(answers_of([outcomes(a="1")]), answers_of([outcomes(b="1")]))
