"""Single layers against the whole removal: figures by hand, and what a tiny model really does without them."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import audit_samples as samples
import audit_tiny as tiny
from audit_samples import task
from layerprune.artifacts import PRUNED, Audit, Candidate, Round, Scores
from layerprune.auditor import audit
from layerprune.auditor.layerwise import ITEMS, chosen, layerwise, parts_of, recorded_ranking
from layerprune.auditor.verification import verify
from layerprune.errors import DocumentError
from layerprune.exporter import export
from layerprune.stats import counted_interval

GOOD, HALF = "1" * 40, "1" * 20 + "0" * 20


def figures(base, singles, whole, **more):
    tasks = [task("t", base, pruned=(whole,), **more)]
    correct = {(unit,): {"t": own} for unit, own in singles.items()}
    return layerwise(correct, [(unit,) for unit in singles], tasks, PRUNED)


def test_layers_that_stand_in_for_each_other_cost_more_together_than_alone():
    found = figures(GOOD, {3: "0" + "1" * 39, 7: "10" + "1" * 38}, HALF).compensation
    (own,) = found.tasks
    assert (own.alone, own.together, own.excess) == pytest.approx((2 / 40, 20 / 40, 18 / 40))
    assert own.relevance_alone == pytest.approx(2 / 40 / 0.75)  # of the 75 points above chance
    assert own.relevance_together == pytest.approx(20 / 40 / 0.75)
    per_item = np.array([0, 0, *[0] * 18, *[1] * 20]) - np.array([0] * 40)
    per_item[:2] -= 1
    assert own.interval == counted_interval(per_item)
    assert found.verdict == (
        "Taken out one at a time, these 2 cost 5.0 points in sum; taken out together they cost 50.0 points (difference "
        f"+45.0, 95 % CI {100 * own.interval[0]:+.1f} … {100 * own.interval[1]:+.1f}): they stand in for each other, "
        "so single-layer scores understate what this removal costs."
    )


def test_layers_that_harm_the_same_answers_cost_less_together():
    found = figures(GOOD, {3: HALF, 7: HALF}, HALF).compensation
    assert found.excess == pytest.approx(-0.5)
    assert "single-layer scores overstate" in found.verdict


def test_a_difference_within_its_uncertainty_is_called_so():
    found = figures(GOOD, {3: "0" + "1" * 39, 7: "10" + "1" * 38}, "00" + "1" * 38).compensation
    assert found.excess == 0
    assert found.interval[0] < 0 < found.interval[1]
    assert "told the truth" in found.verdict


def test_relevance_stops_at_chance_and_accuracy_does_not():
    found = figures(GOOD, {3: "0" * 40, 7: GOOD}, "0" * 40).compensation
    assert (found.tasks[0].relevance_alone, found.tasks[0].relevance_together) == (1, 1)
    assert found.tasks[0].together == 1


def test_a_task_at_chance_has_no_relevance_and_no_say():
    guessing = "1" * 10 + "0" * 30
    found = figures(guessing, {3: "0" * 40, 7: guessing}, "0" * 40)
    assert found.compensation.tasks[0].relevance_alone is None
    assert found.compensation.excess is found.path[-1].difference is None
    assert "cannot be said" in found.compensation.verdict


def test_the_path_leads_from_the_first_unit_to_the_whole_removal():
    found = figures(GOOD, {7: "0" + "1" * 39, 3: GOOD}, HALF)
    assert [(one.units, one.difference) for one in found.path] == [
        ((7,), pytest.approx(-1 / 40)),
        ((3, 7), pytest.approx(-0.5)),
    ]
    assert found.path[-1].interval[0] < -0.5 < found.path[-1].interval[1]


def test_a_layer_that_cannot_go_by_itself_leaves_the_path_alone():
    tasks = [task("t", GOOD, pruned=(HALF,))]
    found = layerwise({(3,): {"t": HALF}}, [(3,), (7,)], tasks, PRUNED)  # the architecture does not allow 7 alone
    assert found.compensation is None
    assert [one.units for one in found.path] == [(3,), (3, 7)]


def test_at_most_so_many_items_are_asked_and_always_the_same():
    marks = [f"{number:016x}" for number in range(3 * ITEMS)]
    places = chosen(marks)
    assert len(places) == ITEMS
    assert places == sorted(places)
    assert {marks[place] for place in places} == {marks[::-1][place] for place in chosen(marks[::-1])}
    assert chosen(marks[:5]) == [0, 1, 2, 3, 4]


def test_layers_that_can_only_go_together_count_as_one():
    class Architecture:
        together = (frozenset({1, 2}), frozenset({5, 6}))

    plan = samples.plan(removal=(1, 2, 4), order=(2, 4, 1))
    assert parts_of(plan, Architecture) == ((1, 2), (4,))


def test_the_counted_interval_covers_what_it_says():
    rng = np.random.default_rng(0)
    values, odds = np.array([-2, -1, 0, 1, 2]), np.array([0.01, 0.04, 0.85, 0.08, 0.02])
    truth, covered = float(values @ odds), 0
    for _ in range(2000):
        low, high = counted_interval(rng.choice(values, size=120, p=odds))
        covered += low <= truth <= high
    assert 0.935 <= covered / 2000 <= 0.98
    low, high = counted_interval([0] * 50)
    assert low < 0 < high  # no flips do not mean no doubt


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny model without layers 4 and 1, exported and audited."""
    folder = tmp_path_factory.mktemp("made")
    base = tiny.base_model(folder / "base")
    tasks = tiny.eval_set(base, folder / "tasks", test=40)
    plan = samples.plan(model=tiny.reference(base), removal=(1, 4), order=(4, 1), ranking=(), data=())
    export(plan, folder / "out")
    audit(folder / "out", ["toy"], include_path=[tasks], generation=False)
    return folder


@torch.no_grad()
def answers_without(base, tasks, layer):
    """Which items a model rebuilt without one layer gets right: no engine, no bypass."""
    out = tiny.pruned_by_hand(base, base.parent / f"without-{layer}", layer)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), PreTrainedTokenizerFast.from_pretrained(out)
    correct = ""
    for line in (tasks / "toy-test.jsonl").read_text().splitlines():
        doc = json.loads(line)
        prompt = tokenizer(doc["question"], return_tensors="pt").input_ids
        sums = []
        for choice in doc["choices"]:
            answer = tokenizer(" " + choice, return_tensors="pt").input_ids
            logs = model(torch.cat([prompt, answer], 1)).logits[0, prompt.shape[1] - 1 : -1].log_softmax(-1)
            sums.append(float(logs.gather(1, answer[0][:, None]).sum()))
        correct += str(int(sums.index(max(sums)) == doc["gold"]))
    return correct


def test_each_single_layer_is_what_a_model_rebuilt_without_it_does(made):
    document = Audit.load(made / "out" / "layerprune" / "audit.json")
    found = document.layerwise
    assert found.items == {"toy": 40}
    assert [one.units for one in found.alone] == [(4,), (1,)]
    for one in found.alone:
        assert one.correct["toy"] == answers_without(made / "base", made / "tasks", one.units[0])
    assert [one.units for one in found.path] == [(4,), (1, 4)]
    assert found.path[-1].correct["toy"] == document.tasks[0].models[PRUNED].outcomes.correct
    assert found.path[-1].difference == pytest.approx(document.tasks[0].models[PRUNED].difference)
    assert len(document.rankings[0].ranking) == tiny.DEPTH


def test_recorded_scores_are_taken_for_the_same_base_alone(made):
    def scores(fingerprint, *removals):
        return Scores(
            model=tiny.reference(made / "base").model_copy(update={"fingerprint": fingerprint}),
            metric=samples.plan().metric, data=(), seed=0, versions={},
            rounds=(Round(removed=(), candidates=tuple(Candidate(removal=r, score=sum(r)) for r in removals)),),
        )  # fmt: skip

    base = tiny.reference(made / "base")
    found = recorded_ranking(scores(base.fingerprint, (0,), (2,), (3, 4)), base)
    assert [(one.unit, one.score) for one in found.ranking] == [(0, 0), (2, 2)]
    with pytest.raises(DocumentError, match="of another model"):
        recorded_ranking(scores("sha256:" + "0" * 64, (0,)), base)
    with pytest.raises(DocumentError, match="hold no single layer"):
        recorded_ranking(scores(base.fingerprint, (0, 1)), base)


def test_forged_layerwise_figures_are_found(made, tmp_path):
    def forged(change):
        layers = document.layerwise.model_copy(update=change)
        document.model_copy(update={"layerwise": layers}).save(path)
        return verify(made / "out").problems

    path = made / "out" / "layerprune" / "audit.json"
    before = path.read_bytes()
    document = Audit.load(path)
    try:
        compensation = document.layerwise.compensation.model_copy(update={"verdict": "All is well."})
        assert any("layerwise" in problem for problem in forged({"compensation": compensation}))
        flipped = document.layerwise.alone[0].model_copy(update={"correct": {"toy": "1" * 40}})
        assert any("layerwise" in problem for problem in forged({"alone": (flipped, *document.layerwise.alone[1:])}))
        short = document.layerwise.alone[0].model_copy(update={"correct": {"toy": "1"}})
        assert any("layerwise" in problem for problem in forged({"alone": (short, *document.layerwise.alone[1:])}))
    finally:
        path.write_bytes(before)
    assert verify(made / "out").problems == ()
