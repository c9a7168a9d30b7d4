"""Auditing a healed checkpoint: three models on the same items, none of which stood in the text that healed."""

import pytest

import audit_samples as samples
import audit_tiny
import heal_tiny
from layerprune.artifacts import PRUNED, UNHEALED, Audit, CorpusOverlap, CorpusRef, HealerRef, HealLog, not_looked_for
from layerprune.auditor import audit
from layerprune.auditor.verification import verify
from layerprune.healing import HEALERS
from layerprune.healing.healer import heal
from layerprune.report.card import write_card
from layerprune.report.page import write_report


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("healed")
    heal_tiny.pruned(folder, 2, 4)
    audit_tiny.eval_set(folder / "base", folder / "tasks", "toy", test=20)
    return folder


@pytest.fixture
def healed(home, tmp_path, monkeypatch):
    monkeypatch.setitem(HEALERS.builtin, "scaling", "heal_tiny:Scaling")
    heal(home / "pruned-2-4", tmp_path / "out", method="scaling:factor=0")
    return tmp_path / "out"


def corpus(**overlap):
    return CorpusRef(
        source="prose.txt", fingerprint="sha256:0", documents=9, heldout_documents=1, dropped_documents=1, window=8,
        overlap={task: CorpusOverlap(split="test", items=20, unlooked=0, found=n) for task, n in overlap.items()},
        windows=9, heldout_windows=1, counted=72, answers_only=False,
    )  # fmt: skip


def log(**changes):
    receipt = samples.receipt()
    fields = {
        "method": HealerRef(name="x", spec="x", options={}, gradients=False, owner="layerprune"),
        "base": receipt.base, "unhealed": receipt.result, "result": receipt.result, "plan_sha256": "1" * 64,
        "receipt_sha256": "2" * 64, "changed": (), "files": {}, "tokens": 1000, "seconds": 3.0, "dtype": "float32",
        "device": "cpu", "seed": 0, "versions": {},
    }  # fmt: skip
    return HealLog(**(fields | changes))


def test_items_met_by_any_step_count_and_tasks_that_one_step_did_not_look_for_are_named():
    first, second = log(corpus=corpus(a=("1", "2"), b=())), log(corpus=corpus(a=("3",)))
    chain = second.model_copy(update={"earlier": first})
    assert chain.met == {"1", "2", "3"}
    assert not_looked_for(None, chain, ["a", "b", "c"]) == ("b", "c")
    assert not_looked_for(None, log(), ["a"]) == ()  # a method that reads no text


def test_items_that_stood_in_the_text_are_left_out_and_verify_holds_it_to_that(home, healed):
    options = {"include_path": [home / "tasks"], "generation": False, "layerwise": False}
    every = audit(healed, ["toy"], **options).tasks[0].data.fingerprints
    path = healed / "layerprune" / "heal.json"
    known = HealLog.load(path)
    (healed / "layerprune" / "audit.json").unlink()
    known.model_copy(update={"corpus": corpus(toy=every[:3])}).save(path)
    write_card(healed)  # or it would name the log of before, and no audit would be made
    found = audit(healed, ["toy"], **options).tasks[0]
    assert found.excluded == 3
    assert found.data.fingerprints == every[3:]
    assert verify(healed).problems == ()
    known.model_copy(update={"corpus": corpus(toy=every[5:6])}).save(path)
    assert "audit: 1 of its items stood in the text that healed" in verify(healed).problems


def test_a_task_nobody_looked_for_in_the_text_is_named_in_card_and_report(home, healed):
    path = healed / "layerprune" / "heal.json"
    HealLog.load(path).model_copy(update={"corpus": corpus(other=())}).save(path)
    write_card(healed)
    found = audit(healed, ["toy"], include_path=[home / "tasks"], generation=False, layerwise=False)
    assert "on 20 items, those of toy perhaps met in healing" in found.verdict
    assert verify(healed).problems == ()
    assert "whether items of toy stand in the text it was healed on" in write_card(healed).read_text()
    page = write_report(healed).read_text()
    assert "items of toy may stand in that text" in page
    assert "nobody looked whether those of toy stand in the text that healed" in page
    assert "no earlier step has seen" not in page
    assert "unseen items" not in page


def test_text_and_single_layers_are_set_against_the_checkpoint_before_healing(home, healed, tmp_path):
    text = tmp_path / "held-out.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    options = {"include_path": [home / "tasks"], "generation": False, "text": text}
    found = audit(healed, ["toy"], **options)
    audit(home / "pruned-2-4", ["toy"], **options)
    alone = Audit.load(home / "pruned-2-4" / "layerprune" / "audit.json")
    assert found.text.unhealed_nats == pytest.approx(alone.text.nats, rel=1e-5)
    assert found.text.nats != pytest.approx(alone.text.nats, rel=1e-3)
    assert alone.text.unhealed_nats is None
    assert found.layerwise == alone.layerwise
    assert found.layerwise.path[-1].correct["toy"] == found.tasks[0].models[UNHEALED].outcomes.correct
    assert found.tasks[0].models[UNHEALED].outcomes.correct == alone.tasks[0].models[PRUNED].outcomes.correct
