"""Items of an audit asked again: what repeats, and what forgers and the forgetful left."""

import shutil
from types import SimpleNamespace

import pytest

import audit_tiny as tiny
from layerprune.artifacts import PRUNED, Audit, Compared, Outcomes
from layerprune.auditor import audit
from layerprune.auditor.comparison import adjusted, compare_models, overall, verdict
from layerprune.auditor.recheck import on_the_edge
from layerprune.auditor.verification import verify
from layerprune.data.items import EvalItem, EvalTask
from layerprune.errors import DocumentError, UsageError
from layerprune.models.model import LoadedModel
from layerprune.stats import above_chance


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An audited folder, made once; tests copy it."""
    return tiny.audited(tmp_path_factory.mktemp("made"), 40).parent


@pytest.fixture
def out(made, tmp_path):
    return shutil.copytree(made / "out", tmp_path / "out")


def again(out, made, count, **options):
    return audit(out, recheck=count, include_path=[made / "tasks"], **options)


def test_items_asked_again_give_what_the_audit_says(out, made):
    found = again(out, made, 10, seed=3)
    assert (found.items, found.decisions, found.same_decisions, found.problems) == (10, 20, 20, ())
    assert found.largest_change <= 1e-4
    with pytest.raises(UsageError, match="the audit has 40"):
        again(out, made, 41)


@pytest.mark.parametrize("attention", [None, "eager"])
def test_items_are_asked_again_with_the_attention_of_the_audit(out, made, attention, monkeypatch):
    forge(out, the_task(out), attention=attention)
    used, load = [], LoadedModel.load
    monkeypatch.setattr(LoadedModel, "load", lambda *a, **kw: (used.append(load(*a, **kw)), used[-1])[1])
    assert again(out, made, 4, seed=3).problems == ()
    assert [loaded.attention for loaded in used] == [attention] * 2


def the_task(out):
    return Audit.load(out / "layerprune" / "audit.json").tasks[0]


def forge(out, task, p_above_chance=None, **changes):
    """Write a forged task and every figure that follows from it: only asking again finds it."""
    document = Audit.load(out / "layerprune" / "audit.json")
    pruned = task.models[PRUNED].outcomes
    figures = {
        "models": compare_models(task.base_outcomes, {PRUNED: pruned}, 0),
        "base_accuracy": task.base_outcomes.accuracy,
        "base_gold_probability": task.base_outcomes.mean_gold_probability,
        "p_above_chance": p_above_chance or above_chance(task.base_outcomes.correct, [0.25] * task.data.items),
    }
    tasks = adjusted([task.model_copy(update=figures)])
    said = verdict(document.removal, document.base.layers, tasks)
    tiny.rewrite(out, tasks=tasks, overall=overall(tasks), verdict=said, **changes)
    assert verify(out).ok


def with_pruned(task, **outcomes):
    model = task.models[PRUNED]
    forged = model.model_copy(update={"outcomes": model.outcomes.model_copy(update=outcomes)})
    return task.model_copy(update={"models": {PRUNED: forged}})


def picked(task, places):
    """A task of which only some items were audited."""

    def few(outcomes):
        gold = tuple(outcomes.gold_probability[place] for place in places)
        bits = "".join(outcomes.correct[place] for place in places)
        return outcomes.model_copy(update={"correct": bits, "gold_probability": gold})

    marks = tuple(task.data.fingerprints[place] for place in places)
    data = task.data.model_copy(update={"items": len(places), "fingerprints": marks})
    model = task.models[PRUNED]
    models = {PRUNED: model.model_copy(update={"outcomes": few(model.outcomes)})}
    return task.model_copy(update={"data": data, "base_outcomes": few(task.base_outcomes), "models": models})


def test_a_forged_outcome_does_not_repeat(out, made):
    forge(out, with_pruned(the_task(out), correct="1" * 40, gold_probability=(0.9,) * 40))
    found = again(out, made, 8, seed=1)
    assert len(found.problems) >= 7
    assert all("pruned model" in problem for problem in found.problems)


def test_forged_answers_beside_honest_probabilities_do_not_repeat(out, made):
    honest = the_task(out).models[PRUNED].outcomes
    forge(out, with_pruned(the_task(out), correct="1" * 40))
    found = again(out, made, 40)
    assert len(found.problems) == honest.correct.count("0") > 5
    assert found.largest_change <= 1e-4
    assert found.same_decisions == 80 - len(found.problems)


@pytest.mark.parametrize("limited", [False, True])
def test_items_left_out_without_a_reason_are_found(out, made, limited):
    task = the_task(out)
    pairs = zip(task.base_outcomes.correct, task.models[PRUNED].outcomes.correct, strict=True)
    kept = [place for place, pair in enumerate(pairs) if pair != ("1", "0") or place == 39]
    assert len(kept) < 40
    forge(out, picked(task, kept), layerwise=None, limit=len(kept) if limited else None)
    left = max(kept) + 1 - len(kept) if limited else 40 - len(kept)
    assert again(out, made, 2).problems == (f"toy: {left} items were left out that no earlier step has seen",)
    other = Compared(removal=(4,), plan_sha256="0" * 64, metric="cosine")
    tiny.rewrite(out, compared={"cosine": other})
    found = again(out, made, 2)
    assert (found.problems, found.unexplained) == ((), left)


def test_the_first_items_up_to_a_limit_are_all_that_a_limited_audit_has(out, made):
    forge(out, picked(the_task(out), range(30)), layerwise=None, limit=30)
    assert again(out, made, 2).problems == ()


def test_a_base_said_to_be_above_chance_is_looked_at_again(out, made):
    task = the_task(out)
    forge(out, task, p_above_chance=1e-9)
    said = ("toy: its chance level and the base's p-value do not follow from its items",)
    assert again(out, made, 1).problems == said
    forge(out, task.model_copy(update={"data": task.data.model_copy(update={"chance": 0.1})}))
    assert again(out, made, 1).problems == said


def test_items_that_are_not_the_tasks_are_found(out, made):
    task = the_task(out)
    foreign = ("f" * 16, *task.data.fingerprints[1:])
    forge(out, task.model_copy(update={"data": task.data.model_copy(update={"fingerprints": foreign})}), layerwise=None)
    assert again(out, made, 1).problems == (
        "toy: 1 audited items are not the task's, ffffffffffffffff for one",
        "toy: 1 items were left out that no earlier step has seen",
    )
    foreign = tuple(f"{number:016x}" for number in range(40))
    forge(out, task.model_copy(update={"data": task.data.model_copy(update={"fingerprints": foreign})}), layerwise=None)
    with pytest.raises(DocumentError, match="no item of the audit is among those of toy here"):
        again(out, made, 3)


def test_only_an_item_on_the_edge_may_turn():
    class Judge:
        class task:
            @staticmethod
            def doc_to_choice(doc):
                return ["four", "sixteen characters"]

    def edge(margin, dtype="bfloat16", metric="acc"):
        item = EvalItem("mark", 0.5, (), key=[SimpleNamespace(doc={})])
        task = EvalTask("toy", "test", metric, 0, (item,), Judge())
        return on_the_edge(task, 0, Outcomes(correct="1", margin=None if margin is None else (margin,)), dtype)

    assert edge(0.19)
    assert edge(-0.19)
    assert not edge(0.21)
    assert not edge(0.19, "float32")
    assert edge(0.001, "float32")
    assert edge(0.04, metric="acc_norm")  # nats a character of four
    assert not edge(0.06, metric="acc_norm")
    assert not edge(None)
