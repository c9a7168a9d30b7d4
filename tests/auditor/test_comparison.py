import numpy as np
import pytest
from scipy import stats as scipy_stats

import audit_samples as samples
from audit_samples import task
from layerprune.artifacts import PRUNED, Audit, Continuation, Generation
from layerprune.auditor.comparison import adjusted, overall, verdict
from layerprune.errors import DocumentError


def test_one_task_by_hand():
    base = "1" * 30 + "0" * 10
    pruned = "1" * 22 + "0" * 8 + "1" * 2 + "0" * 8
    gold_before, gold_after = tuple(np.linspace(0.3, 0.9, 40)), tuple(np.linspace(0.2, 0.8, 40))
    found = task("t", base, gold=gold_before, pruned=(pruned, gold_after))
    it = found.models[PRUNED]
    assert (found.base_accuracy, it.accuracy) == (0.75, 0.6)
    assert it.difference == pytest.approx(-0.15)
    assert (it.flips.right_to_wrong, it.flips.wrong_to_right) == (8, 2)
    assert it.flips.p_value == pytest.approx(scipy_stats.binomtest(2, 10).pvalue)
    assert it.interval[0] < -0.15 < it.interval[1]
    assert it.gold_probability_change == pytest.approx(-0.1)
    assert it.gold_probability_interval == pytest.approx((-0.1, -0.1), abs=1e-9)  # every item lost alike
    assert found.informative
    assert found.excluded == 3
    assert found.p_above_chance == pytest.approx(scipy_stats.binomtest(30, 40, 0.25, alternative="greater").pvalue)


def test_a_base_at_chance_is_marked_and_stays_out_of_the_mean():
    guessing = task("guess", "1" * 10 + "0" * 30, pruned=("0" * 40,))
    knowing = task("know", "1" * 30 + "0" * 10, pruned=("1" * 28 + "0" * 12,))
    assert not guessing.informative
    all_of_it = overall(adjusted([guessing, knowing]))[PRUNED]
    assert all_of_it.items == 40
    assert all_of_it.difference == pytest.approx(-0.05)
    assert overall([guessing]) == {}


def test_holm_runs_over_the_informative_tasks_of_each_model():
    good, small_loss, loss = "1" * 40, "1" * 34 + "0" * 6, "1" * 20 + "0" * 20
    tasks = adjusted(
        [
            task("a", good, pruned=(small_loss,), other=(good,)),
            task("b", good, pruned=(loss,), other=(loss,)),
            task("c", "1" * 10 + "0" * 30, pruned=("0" * 40,), other=("0" * 40,)),
        ]
    )
    p_small, p_loss, p_guess = (scipy_stats.binomtest(0, n).pvalue for n in (6, 20, 10))
    assert tasks[0].models[PRUNED].flips.p_adjusted == pytest.approx(p_small)
    assert tasks[1].models[PRUNED].flips.p_adjusted == pytest.approx(2 * p_loss)
    assert tasks[2].models[PRUNED].flips.p_adjusted == pytest.approx(p_guess)  # not informative: not in the family
    assert tasks[0].models["other"].flips.p_adjusted == 1
    assert tasks[1].models["other"].flips.p_adjusted == pytest.approx(2 * p_loss)


def test_overall_is_the_mean_of_tasks_and_pooled_is_the_mean_of_items():
    small = task("small", "1" * 10, pruned=("1" * 5 + "0" * 5,))
    large = task("large", "1" * 90, pruned=("1" * 90,))
    it = overall([small, large])[PRUNED]
    assert it.difference == pytest.approx(-0.25)
    assert it.pooled_difference == pytest.approx(-0.05)
    assert it.interval[0] < -0.25 < it.interval[1]
    assert it.pooled_interval[0] < -0.05 < it.pooled_interval[1]
    assert (it.flips.right_to_wrong, it.flips.wrong_to_right, it.items) == (5, 0, 100)


def test_the_verdict_is_the_designs_sentence():
    base = "1" * 3000 + "0" * 1812
    pruned = "1" * 2900 + "0" * 100 + "1" * 13 + "0" * 1799
    tasks = [task("t", base, pruned=(pruned,))]
    said = verdict((1, 2, 3, 4, 5, 6), 30, tasks)
    assert said == (
        "20 % of layers removed (6 of 30); accuracy −1.8 points (95 % CI −2.3 … −1.4) on 4,812 unseen items; "
        "not looked at: generated text"
    )


def test_the_verdict_says_when_nothing_is_known():
    tasks = [task("guess", "1" * 10 + "0" * 30, pruned=("0" * 40,))]
    said = verdict((3,), 30, tasks)
    assert said == (
        "3 % of layers removed (1 of 30); what that cost is not known: the base model is not above chance on guess; "
        "not looked at: generated text"
    )
    mixed = [*tasks, task("know", "1" * 40, pruned=("1" * 40,))]
    assert "guess left out (base at chance)" in verdict((3,), 30, mixed)


def generation(faulty, healthy):
    piece = Continuation(
        prompt="p", base="b", pruned="x", shared_tokens=1, faults=("repeats",), base_faults=(), nats=1.0, base_nats=None
    )
    return Generation(
        prompts=8,
        max_new_tokens=48,
        faulty=faulty,
        base_faulty=0,
        agreement=0.3,
        healthy=healthy,
        continuations=(piece,),
    )


def test_a_model_that_keeps_its_accuracy_and_babbles_is_called_so():
    tasks = [task("t", "1" * 40, pruned=("1" * 40,))]
    said = verdict((3,), 30, tasks, generation(7, healthy=False))
    assert "accuracy 0.0 points" in said
    assert "it no longer writes reliably: 7 of 8 sample texts are faulty (base: 0)" in said
    assert "8 of 8 sample texts are sound" in verdict((3,), 30, tasks, generation(0, healthy=True))


def document(**changes):
    tasks = adjusted(
        [
            task("know", "1" * 30 + "0" * 10, pruned=("1" * 28 + "0" * 12,), cosine=("1" * 20 + "0" * 20,)),
            task("guess", "1" * 10 + "0" * 30, pruned=("0" * 40,), cosine=("0" * 40,)),
        ]
    )
    plan, receipt = samples.plan(), samples.receipt()
    fields = {
        "verdict": verdict(plan.removal, 30, tasks),
        "base": plan.model,
        "pruned": receipt.result,
        "removal": plan.removal,
        "plan_sha256": plan.sha256(),
        "receipt_sha256": receipt.sha256(),
        "compared": {"cosine": {"removal": (4, 5), "plan_sha256": "9" * 64, "metric": "cosine"}},
        "tasks": tasks,
        "overall": overall(tasks),
        "bytes_before": 100,
        "bytes_after": 80,
        "dtype": "float32",
        "device": "cpu",
        "limit": None,
        "seed": 0,
        "versions": {},
    }
    return Audit(**(fields | changes))


def test_the_document_comes_back_from_disk_as_it_was(tmp_path):
    written = document()
    path = written.save(tmp_path / "audit.json")
    assert Audit.load(path) == written
    assert Audit.load(path).sha256() == written.sha256()
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(DocumentError, match="format 2"):
        Audit.load(path)


def test_the_card_shows_the_audit_and_its_figures_reach_the_hub(tmp_path):
    from huggingface_hub import ModelCard

    from layerprune.report.card import write_card

    written = document()
    written.save(samples.exported(tmp_path) / "layerprune" / "audit.json")
    path = write_card(tmp_path)
    text = path.read_text(encoding="utf-8")
    assert f"**{written.verdict}**" in text
    assert "Not audited" not in text
    assert "| know | 40 | 25.0 | 75.0 | 70.0 | −5.0 (" in text
    assert "| guess (not informative) | 40 | 25.0 | 25.0 | 0.0 |" in text
    assert "| cosine (`cosine`) | layers 4 and 5 | 50.0 | −25.0 (" in text
    assert written.sha256() in text
    results = ModelCard.load(path).data.eval_results
    assert [(r.dataset_type, r.metric_type, r.metric_value) for r in results] == [
        ("know", "acc", 0.7),
        ("guess", "acc", 0.0),
    ]
    (tmp_path / "layerprune" / "audit.json").unlink()
    write_card(tmp_path)
    assert ModelCard.load(path).data.eval_results is None  # an audit that is gone leaves no figures behind
