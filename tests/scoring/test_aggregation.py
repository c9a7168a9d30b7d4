"""Signals, objectives and floors on outcomes made up by hand, and what a race may stand on."""

import math

import numpy as np
import pytest
from pydantic import ValidationError

import scores_samples
from layerprune.artifacts import MEAN, Objective, Outcomes, TaskData
from layerprune.errors import RefusedError, TaskError, UsageError
from layerprune.planner.plan_documents import plan_warnings
from layerprune.removal import Removal
from layerprune.scoring.aggregation import (
    BaseOutcomes,
    asked_objective,
    can_be_split,
    check_tasks,
    combined,
    combined_losses,
    judge,
    rejudged,
    reliability_of,
    shares,
    values,
)
from layerprune.scoring.metrics.ablation import importance_of
from layerprune.search import Constraints, Greedy, OneShot, by_importance, require_floors
from layerprune.search.base import order_moves

CHANCES = {"a": 0.25, "b": 0.5}


def outcomes(rng, items, right):
    probability = rng.uniform(0.01, 0.99, items)
    return Outcomes(
        correct="".join("01"[int(rng.random() < right)] for _ in range(items)),
        gold_probability=tuple(probability.round(5).tolist()),
        margin=tuple(rng.normal(size=items).round(3).tolist()),
    )


def drawn(seed, signal="accuracy", objective=MEAN, count=5):
    """An intact model that is good at two tasks, and candidates that are worse at them, 30 and 50 items."""
    rng = np.random.default_rng(seed)
    base = {"a": outcomes(rng, 30, 0.9), "b": outcomes(rng, 50, 0.9)}
    others = [{"a": outcomes(rng, 30, 0.7), "b": outcomes(rng, 50, 0.75)} for _ in range(count)]
    data = [TaskData(task=t, split="train", items=1, fingerprints=(), num_fewshot=0, metric="acc", chance=c)
            for t, c in CHANCES.items()]  # fmt: skip
    return BaseOutcomes.of(data, base, signal, objective), others


def mean(correct):
    return correct.count("1") / len(correct)


# signals


def test_what_an_item_is_worth():
    own = Outcomes(correct="101", gold_probability=(0.5, 0.25, 1.0), margin=(2.0, -1.0, 0.5))
    assert values("accuracy", "t", own).tolist() == [1, 0, 1]
    assert values("probability", "t", own).tolist() == [0.5, 0.25, 1.0]
    assert values("margin", "t", own).tolist() == [2.0, -1.0, 0.5]
    assert values("blend", "t", own).tolist() == [0.75, 0.125, 1.0]


@pytest.mark.parametrize("signal", ["probability", "margin", "blend"])
def test_a_task_without_choices_has_no_such_signal(signal):
    with pytest.raises(TaskError, match=r"task 't' offers no choices.*use signal=accuracy"):
        values(signal, "t", Outcomes(correct="10"))


def test_scores_by_hand():
    for signal in ("accuracy", "probability", "margin", "blend"):
        intact, (own, *_) = drawn(3, signal)
        expected = []
        for task, chance in CHANCES.items():
            before, after = intact.tasks[task], own[task]
            above = mean(before.correct) - chance
            p, q = sum(before.gold_probability), sum(after.gold_probability)
            n = len(before.correct)
            if signal == "accuracy":
                expected.append((mean(before.correct) - mean(after.correct)) / above)
            elif signal == "probability":
                expected.append((p - q) / p)
            elif signal == "blend":
                expected.append((mean(before.correct) - mean(after.correct) + (p - q) / n) / 2 / above)
            else:
                spread = math.sqrt(sum((m - sum(before.margin) / n) ** 2 for m in before.margin) / n)
                expected.append((sum(before.margin) - sum(after.margin)) / n / spread)
        found = judge(intact, (1,), own)
        assert found.score == pytest.approx(sum(expected) / 2, abs=1e-6), signal
        assert found.interval[0] < found.score < found.interval[1]
        assert (found.tasks["a"].outcomes.margin is not None) is (signal == "margin")  # half the size, or not at all


def test_intervals_of_signals_cover_the_truth_as_often_as_they_say():
    rng, covered = np.random.default_rng(7), {"probability": 0, "margin": 0, "blend": 0}
    for _ in range(300):
        base = outcomes(rng, 80, 0.9)
        worse = Outcomes(
            correct="".join("0" if rng.random() < 0.2 else bit for bit in base.correct),
            gold_probability=tuple(0.8 * p for p in base.gold_probability),
            margin=tuple(m - 0.3 + 0.5 * float(rng.normal()) for m in base.margin),
        )
        for signal in covered:
            intact = BaseOutcomes({"t": base}, {"t": 0.25}, signal)
            low, high = judge(intact, (1,), {"t": worse}).interval
            scale = mean(base.correct) - 0.25
            lost_p = 0.2 * np.mean(base.gold_probability)
            truth = {
                "probability": 0.2, "margin": 0.3 / np.std(base.margin),
                "blend": (0.2 * mean(base.correct) + lost_p) / 2 / scale,
            }[signal]  # fmt: skip
            covered[signal] += low <= truth <= high
    assert covered["probability"] == 300  # every item loses alike: nothing is left to chance but the items' levels
    assert 0.91 <= covered["margin"] / 300 <= 0.98
    assert 0.91 <= covered["blend"] / 300 <= 0.99


# objectives


def test_weights_say_what_part_of_the_score_a_task_has():
    intact, (own, *_) = drawn(1, objective=Objective(name="weighted", weights={"a": 3.0}))
    alone = judge(drawn(1)[0], (1,), own)
    a, b = (alone.tasks[task].relevance for task in "ab")
    found = judge(intact, (1,), own)
    assert found.score == pytest.approx(0.75 * a + 0.25 * b, abs=1e-6)
    assert found.score != pytest.approx(alone.score, abs=1e-3)
    assert shares(Objective(name="weighted", weights={"a": 0.0}), ["a", "b"]) == [0.0, 1.0]


def test_the_worst_task_is_the_score_and_its_interval_is_of_the_largest():
    intact, others = drawn(2, objective=Objective(name="worst"))
    for own in others:
        found = judge(intact, (1,), own)
        assert found.score == max(task.relevance for task in found.tasks.values())
        assert found.interval[0] <= found.score <= found.interval[1]
        assert found.interval[1] >= max(task.interval[1] for task in found.tasks.values())  # at 97.5 % each
    losses = np.array([[[0.1, 0.5], [0.3, 0.2]]])  # (splits, tasks, removals)
    assert combined_losses(Objective(name="worst"), ["a", "b"], losses).tolist() == [[0.3, 0.5]]
    assert combined_losses(MEAN, ["a", "b"], losses) == pytest.approx(np.array([[0.2, 0.35]]))
    weighted = Objective(name="weighted", weights={"a": 3.0})
    assert combined_losses(weighted, ["a", "b"], losses) == pytest.approx(np.array([[0.15, 0.425]]))


def test_the_worst_interval_holds_the_largest_true_loss():
    rng, held = np.random.default_rng(0), 0
    truth, errors = np.array([0.1, 0.12, 0.05]), np.array([0.05, 0.08, 0.02])
    for _ in range(1000):
        seen = truth + errors * rng.normal(size=3)
        pairs = [(s - 2.394 * e, s + 2.394 * e) for s, e in zip(seen, errors, strict=True)]  # 1 - 0.05 / 3, two-sided
        low, high = combined(Objective(name="worst"), list("abc"), seen.tolist(), pairs)[1]
        held += low <= truth.max() <= high
    assert held >= 950


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("weighted", {}, {}), "weights are for the objective 'weighted', which needs some; got 'weighted'"),
        (("worst", {"a": 1.0}, {}), "weights are for the objective 'weighted', which needs some; got 'worst'"),
        ((None, {"a": -1.0}, {}), "the weight of 'a' is -1.0; needed is a number at least 0"),
        ((None, {}, {"a": 1.2}), "the floor of 'a' is 1.2; needed is a number from 0 to 1"),
        ((None, {"a": math.nan}, {}), "finite"),
    ],
)
def test_objectives_that_contradict_themselves_are_refused(words, message):
    with pytest.raises(UsageError, match=message):
        asked_objective(*words)


def test_weights_alone_mean_weighted():
    assert asked_objective(None, {"a": 2.0}, None) == Objective(name="weighted", weights={"a": 2.0})
    assert asked_objective(None, None, None) == MEAN


def test_tasks_that_are_not_there_are_named():
    with pytest.raises(UsageError, match=r"--floor names the task 'pika'.*Did you mean 'piqa'\? Tasks: piqa, arc"):
        check_tasks(Objective(floors={"pika": 0.9}), ["piqa", "arc"])
    with pytest.raises(UsageError, match="leaves every task without weight"):
        check_tasks(Objective(name="weighted", weights={"a": 0.0}), ["a"])


# races


@pytest.mark.parametrize("signal", ["accuracy", "probability", "margin", "blend"])
@pytest.mark.parametrize("objective", [MEAN, Objective(name="weighted", weights={"a": 0.2, "b": 5.0})])
def test_the_harms_of_a_race_differ_as_the_scores_do(signal, objective):
    intact, others = drawn(4, signal, objective)
    harms, harm = [], importance_of(intact)
    for own in others:
        lost = harm(own)
        assert {name: len(harms) for name, harms in lost.items()} == {name: len(o.correct) for name, o in own.items()}
        harms.append(float(np.concatenate(list(lost.values())).mean()))
    scores = [judge(intact, (1,), own).score for own in others]
    assert np.diff(harms) == pytest.approx(np.diff(scores), abs=3e-6)
    assert np.ptp(scores) > 0.02


@pytest.mark.parametrize("objective", [Objective(name="worst"), Objective(floors={"a": 0.5})])
def test_a_race_by_what_is_no_mean_over_items_is_refused(objective):
    with pytest.raises(UsageError, match="a race needs a score that is a mean over items"):
        importance_of(drawn(1, objective=objective)[0])


# floors


def below(units, score, missed=0.0, kept=0.8):
    one = judge(drawn(1)[0], units, drawn(1)[1][0])
    task = one.tasks["a"].model_copy(update={"relevance": 1 - kept})
    return one.model_copy(update={"score": score, "below_floor": {"a": missed} if missed else {}, "tasks": {"a": task}})


def test_a_floor_is_a_share_of_accuracy_above_chance():
    relevances = {}
    for floor in (0.0, 0.3, 0.6, 0.99, 1.0):
        found = judge(drawn(5, objective=Objective(floors={"a": floor}))[0], (1,), drawn(5)[1][0])
        relevances = {task: score.relevance for task, score in found.tasks.items()}
        missed = floor - (1 - relevances["a"])
        assert found.below_floor == ({"a": pytest.approx(missed, abs=1e-6)} if missed > 0 else {})
    assert 0.01 < relevances["a"] < 0.7
    exact = judge(drawn(5, objective=Objective(floors={"a": 1 - relevances["a"]}))[0], (1,), drawn(5)[1][0])
    assert exact.below_floor == {}


def test_below_a_floor_comes_after_all_that_keep_it():
    low, high, low_enough = below((1,), 0.1, missed=0.01), below((2,), 0.5), below((3,), 0.4)
    assert sorted([low, high, low_enough], key=by_importance) == [low_enough, high, low]
    assert order_moves({(1,): low, (2,): high, (3,): low_enough}) == [(3,), (2,), (1,)]
    assert order_moves({(1,): low, (2, 4): high, (3,): low_enough}) == [
        (2, 4),
        (3,),
        (1,),
    ]  # harm per layer, where sizes differ


def test_greedy_goes_round_what_breaks_a_floor_and_says_when_nothing_is_left():
    def judge_all(removals):
        return [
            below(r.layers, sum(r), missed=0.05 if 0 in r.layers or len(r) > 2 else 0.0, kept=0.85) for r in removals
        ]

    assert Greedy().find(judge_all, Constraints(5), 2).removal.layers == (1, 2)
    said = r"with \{1, 2\} gone, nothing more can go within the floors; the nearest: without \{0, 1, 2\} a keeps 0.850 "
    with pytest.raises(RefusedError, match=f"^{said}of its accuracy above chance, its floor is 0.9; lower"):
        Greedy().find(judge_all, Constraints(5), 3)
    assert OneShot().find(judge_all, Constraints(5), 1).removal.layers == (1,)


def test_the_nearest_to_the_floors_is_named():
    with pytest.raises(RefusedError, match=r"^nothing can go within the floors; the nearest: without \{4\} a keeps"):
        require_floors([below((3,), 0.1, missed=0.3), below((4,), 0.9, missed=0.1)])
    require_floors([below((3,), 0.1, missed=0.3), below((4,), 0.9)])


# judging again what is recorded


def test_answers_are_judged_again_as_they_were_judged():
    scores = scores_samples.scores()
    alike = rejudged(scores, Objective(name="weighted", weights={"toy": 2.0, "more": 2.0}))
    assert alike.rounds == scores.rounds
    worst = rejudged(scores, Objective(name="worst", floors={"more": 1.0}))
    for before, after in zip(scores.rounds[0].candidates, worst.rounds[0].candidates, strict=True):
        assert after.score == max(task.relevance for task in before.tasks.values())
        assert ("more" in after.below_floor) is (before.tasks["more"].relevance > 0)
    assert rejudged(worst, MEAN).rounds == scores.rounds
    assert rejudged(scores, MEAN) is scores


def test_below_chance_there_are_no_ties_and_a_floor_of_nothing_is_kept():
    base = {"t": Outcomes(correct="1" * 6 + "0" * 4)}
    worse, worst = ({"t": Outcomes(correct="1" * right + "0" * (10 - right))} for right in (2, 0))
    intact = BaseOutcomes(base, {"t": 0.25}, objective=Objective(floors={"t": 0.0}))
    found = [judge(intact, (layer,), own) for layer, own in enumerate((worst, worse))]
    assert [one.score for one in found] == pytest.approx([0.6 / 0.35, 0.4 / 0.35], abs=1e-6)
    assert [one.removal for one in sorted(found, key=by_importance)] == [(1,), (0,)]
    assert not any(one.below_floor for one in found)  # below chance a task keeps nothing, and not less
    assert all(one.interval[0] < one.score <= one.interval[1] for one in found)


def test_what_cannot_be_judged_again():
    scores = scores_samples.scores()
    first = scores.rounds[0]
    raced = first.model_copy(update={"candidates": (first.candidates[0].model_copy(update={"stopped": True}),)})
    with pytest.raises(UsageError, match="is of a race"):
        rejudged(scores.model_copy(update={"rounds": (raced,)}), Objective(name="worst"))
    with pytest.raises(UsageError, match="hold no answers"):
        rejudged(scores.model_copy(update={"base": {}}), Objective(name="worst"))
    with pytest.raises(UsageError, match="names the task 'other'"):
        rejudged(scores, Objective(floors={"other": 0.5}))


def test_an_objective_of_another_name_is_refused():
    with pytest.raises(ValidationError):
        Objective(name="median")


# stability


def ranked_scores(layers, items, seed, objective=MEAN, spread=0.3, stopped=None):
    """Scores of layers with true losses, every answer drawn; the base is right on all but a tenth."""
    scores = scores_samples.scores()
    rng = np.random.default_rng(seed)
    true = np.abs(np.random.default_rng(99).normal(size=(2, layers))) * spread  # the layers are the same for every seed
    base = {t: Outcomes(correct="".join("01"[int(rng.random() < 0.9)] for _ in range(items))) for t in ("toy", "more")}
    data = [one.model_copy(update={"items": items}) for one in scores.data]
    intact = BaseOutcomes.of(data, base, "accuracy", objective)
    candidates = []
    for layer in range(layers):
        own = {}
        for number, (task, before) in enumerate(base.items()):
            share = min(0.9, true[number, layer])
            kept = "".join("0" if rng.random() < share else bit for bit in before.correct)
            own[task] = Outcomes(correct=kept[: stopped if layer else None])
        candidates.append(judge(intact, (layer,), own))
    entries = {t: scores.base[t].model_copy(update={"outcomes": base[t]}) for t in base}
    metric = scores.metric.model_copy(update={"objective": objective})
    first = scores.rounds[0].model_copy(update={"candidates": tuple(candidates)})
    return scores.model_copy(update={"base": entries, "rounds": (first,), "metric": metric, "data": tuple(data)})


def agreement(one, other):
    from scipy.stats import spearmanr

    return spearmanr(*([c.score for c in s.rounds[0].candidates] for s in (one, other))).statistic


@pytest.mark.parametrize("objective", [MEAN, Objective(name="weighted", weights={"toy": 4.0}), Objective(name="worst")])
def test_reliability_is_the_agreement_with_the_ranking_by_as_many_other_items(objective):
    told, seen = [], []
    for seed in range(12):
        one, other = (ranked_scores(20, 60, seed + step, objective) for step in (0, 1000))
        told.append(reliability_of(one).whole)
        seen.append(agreement(one, other))
    assert np.mean(told) == pytest.approx(np.mean(seen), abs=0.05)
    assert 0.5 < np.mean(seen) < 0.95


def test_as_many_items_as_are_said_to_be_enough_give_what_they_should():
    needed = np.mean([reliability_of(ranked_scores(20, 60, seed)).items_needed for seed in range(15)])
    items = round(needed / 2)  # of each of the two tasks
    seen = [agreement(ranked_scores(20, items, seed), ranked_scores(20, items, 1000 + seed)) for seed in range(15)]
    assert np.mean(seen) == pytest.approx(0.9, abs=0.03)


def test_of_a_race_no_more_is_told_than_the_items_that_all_have_seen_tell():
    seen = (200, 60), (60, None), (200, None)
    raced, short, whole = (ranked_scores(20, items, 0, stopped=stopped) for items, stopped in seen)
    told = [reliability_of(one) for one in (raced, short, whole)]
    assert [one.items for one in told] == [120, 120, 400]
    assert told[0].whole == pytest.approx(told[1].whole, abs=0.1)
    assert told[0].whole < told[2].whole - 0.05
    noisy = ranked_scores(20, 12, 0, stopped=4), ranked_scores(20, 4, 0)
    (of_a_race,), (of_all,) = (plan_warnings(one, None) for one in noisy)
    assert "on the 8 items that all layers saw is" in of_a_race
    assert "on 8 items is" in of_all
    assert reliability_of(whole, "toy").items == 200


def test_what_has_no_halves_has_no_stability():
    scores = ranked_scores(20, 60, 0)
    cut = scores.rounds[0].model_copy(update={"candidates": scores.rounds[0].candidates[:2]})
    for other in (scores.model_copy(update={"base": {}}), scores.model_copy(update={"rounds": (cut,)})):
        assert not can_be_split(other)
        with pytest.raises(UsageError, match="cannot be told"):
            reliability_of(other)
    assert not can_be_split(ranked_scores(20, 60, 0, stopped=1))
    assert Removal.of(1)
