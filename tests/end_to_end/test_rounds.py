"""A checkpoint that was pruned more than once: every round is named, checked and left out of the audit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

import audit_tiny
from families import make_plan
from layerprune.artifacts import Audit, Plan, Receipt, TaskData
from layerprune.auditor import audit
from layerprune.auditor.inputs import ExportedFolder
from layerprune.auditor.verification import verify
from layerprune.errors import DocumentError
from layerprune.exporter import export
from layerprune.healing.healer import heal
from layerprune.hub import push
from layerprune.removal import Removal
from layerprune.report.card import write_card
from layerprune.report.page import commands


def planned(folder: Path, *units: float, seen: tuple[TaskData, ...] = ()) -> Plan:
    return make_plan(folder, Removal.of(*units)).model_copy(update={"data": seen})


def items(home: Path, folder: Path, count: int) -> tuple[TaskData, ...]:
    """Return the first test items of the task, as a plan that chose by them would record them."""
    import lm_eval.tasks  # noqa: F401  the questions are lm-eval's

    from layerprune.data.tasks import load_eval_set
    from layerprune.models.model import LoadedModel

    encoder = LoadedModel.load(str(folder), device="cpu").encoder
    found = load_eval_set(["toy"], encoder, use="evaluation", include_path=[home / "tasks"], limit=count)
    return found.data()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lay out a base, its first round (healed and audited) and a second round made from that."""
    folder = tmp_path_factory.mktemp("rounds")
    audit_tiny.base_model(folder / "base")
    audit_tiny.eval_set(folder / "base", folder / "tasks", "toy", train=8, test=40)
    first = planned(folder / "base", 1, 4, seen=items(folder, folder / "base", 6))
    export(first, folder / "once")
    heal(folder / "once", folder / "healed", method="linear", corpus="builtin", tasks=(), device="cpu")
    audit(folder / "healed", ["toy"], include_path=[folder / "tasks"], device="cpu", generation=False, layerwise=False)
    export(planned(folder / "healed", 2), folder / "twice")
    return folder


def test_the_receipt_holds_every_document_of_the_round_before(home: Path) -> None:
    receipt = Receipt.load(home / "twice/layerprune/receipt.json")
    (one,) = receipt.rounds
    before = ExportedFolder.read(home / "healed")
    assert (one.plan, one.receipt, one.heal) == (before.plan, before.receipt, before.heal)
    assert one.audit == Audit.load(home / "healed/layerprune/audit.json")
    assert receipt.base.fingerprint == one.result.fingerprint
    assert receipt.first_base.id == "base"
    assert verify(home / "twice").problems == ()


def test_the_card_tells_rounds_and_totals_in_layers_of_the_first_base(home: Path) -> None:
    card = (home / "twice/README.md").read_text()
    assert "# base, 3 of 6 layers removed in 2 rounds" in card
    assert "| 1 | base | layers 1 and 4 | 6 → 4 |" in card
    assert "| 2 | healed | layer 2 | 4 → 3 |" in card
    assert "| **all** | base | 3 layers | 6 → 3 |" in card
    assert "What is left are layers 0, 2, 5 of base." in card
    assert "`linear`" in card


def test_a_third_round_goes_on_from_the_second(home: Path, tmp_path: Path) -> None:
    receipt = export(planned(home / "twice", 0), tmp_path / "thrice")
    assert [one.receipt.removal for one in receipt.rounds] == [(1, 4), (2,)]
    assert "What is left are layers 2, 5 of base." in (tmp_path / "thrice/README.md").read_text()
    assert verify(tmp_path / "thrice").problems == ()


def test_an_audit_leaves_out_what_any_round_has_seen(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "twice", tmp_path / "twice")
    made = audit(
        tmp_path / "twice", ["toy"], include_path=[home / "tasks"], device="cpu", generation=False, layerwise=False
    )
    seen = Plan.load(home / "healed/layerprune/plan.json").seen
    assert len(seen) == 6
    (task,) = made.tasks
    assert not seen & {*task.data.fingerprints}
    assert (task.data.items, task.excluded) == (34, 6)
    assert verify(tmp_path / "twice").problems == ()
    report = (tmp_path / "twice/report.html").read_text()
    assert "Round 1 of 2 removed layers 1 and 4 of the 6 layers of base and healed what was left" in report
    receipt = Receipt.load(tmp_path / "twice/layerprune/receipt.json")
    plan = Plan.load(tmp_path / "twice/layerprune/plan.json")
    lines = commands(plan, made, None, receipt.rounds)
    assert [line.partition(" --")[0] for line in lines] == [
        "layerprune plan base/",
        "layerprune export run/plan.json -o smaller/",
        "layerprune heal smaller/ -o healed/",
        "layerprune plan healed/",
        "layerprune export run/plan.json -o smaller/",
        "layerprune audit smaller/",
        "layerprune verify .",
        "layerprune audit .",
    ]


def test_a_healing_of_an_earlier_round_that_nobody_looked_into_is_named_in_the_verdict(home: Path) -> None:
    """The text that healed the first round was not searched for the items of toy: they may have been met there."""
    assert "those of toy perhaps met in healing" in Audit.load(home / "healed/layerprune/audit.json").verdict


def test_verify_finds_an_audit_that_uses_items_of_an_earlier_round(home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "twice"
    shutil.copytree(home / "twice", folder)
    audit(folder, ["toy"], include_path=[home / "tasks"], device="cpu", generation=False, layerwise=False)
    path = folder / "layerprune/audit.json"
    content = json.loads(path.read_text())
    content["tasks"][0]["data"]["fingerprints"][0] = sorted(Plan.load(home / "healed/layerprune/plan.json").seen)[0]
    Audit.parse(content, "it").save(path)
    assert "audit: 1 of its items have been seen by an earlier round of pruning" in verify(folder).problems


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda one: one["plan"].update(seed=99), "receipt.plan_sha256 is not the plan's"),
        (lambda one: one["receipt"].update(dropped_tensors=7), "heal.receipt_sha256 is not the receipt's"),
        (lambda one: one["heal"].update(seed=99), "audit.heal_sha256 is not the healing log's"),
        (lambda one: one["heal"]["result"].update(fingerprint="sha256:0"), "earlier round's documents do not belong"),
        (lambda one: one.update(changed=True), "earlier is not the round that left the base"),
    ],
)
def test_an_edited_earlier_round_is_found_by_whoever_reads_the_folder(home: Path, change, says, tmp_path: Path) -> None:
    folder = tmp_path / "twice"
    shutil.copytree(home / "twice", folder)
    path = folder / "layerprune/receipt.json"
    content = json.loads(path.read_text())
    change(content["earlier"])
    path.write_text(json.dumps(content))
    with pytest.raises(DocumentError, match=says):
        ExportedFolder.read(folder)
    assert any(says in problem for problem in verify(folder).problems)


def test_an_earlier_audit_whose_figures_do_not_follow_is_found(home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "twice"
    shutil.copytree(home / "twice", folder)
    path = folder / "layerprune/receipt.json"
    content = json.loads(path.read_text())
    content["earlier"]["audit"]["verdict"] = "nothing was lost"
    Receipt.parse(content, "it").save(path)
    write_card(folder)
    assert verify(folder).problems == ("round 1: audit: the verdict does not follow from the figures",)


def test_weights_that_other_tools_changed_between_rounds_are_said(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "healed", tmp_path / "tuned")
    file = tmp_path / "tuned/model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.5
    save_file(tensors, file, metadata={"format": "pt"})
    receipt = export(planned(tmp_path / "tuned", 2), tmp_path / "out")
    assert receipt.earlier is not None
    assert receipt.earlier.changed
    assert any("its weights were changed by other tools since" in note for note in receipt.notes)
    assert "weights changed by other tools since" in (tmp_path / "out/README.md").read_text()
    assert verify(tmp_path / "out").problems == ()


def test_documents_of_a_base_that_cannot_be_read_stop_the_export(home: Path, tmp_path: Path) -> None:
    shutil.copytree(home / "healed", tmp_path / "broken")
    (tmp_path / "broken/layerprune/plan.json").write_text("{}")
    with pytest.raises(DocumentError, match=r"plan\.json"):
        export(planned(tmp_path / "broken", 2), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_card_names_the_nearest_model_that_is_on_the_hub(home: Path, tmp_path: Path) -> None:
    """An own folder between two rounds is in nobody's model tree: the Hub is told the base before it."""
    from layerprune.report.card import card_metadata

    receipt = Receipt.load(home / "twice/layerprune/receipt.json")
    assert "base_model" not in card_metadata(receipt, None)
    on_hub = receipt.earlier.receipt.base.model_copy(update={"id": "org/base", "revision": "abc"})  # type: ignore[union-attr]
    first = receipt.earlier.receipt.model_copy(update={"base": on_hub})  # type: ignore[union-attr]
    round_one = receipt.earlier.model_copy(update={"receipt": first})  # type: ignore[union-attr]
    known = receipt.model_copy(update={"earlier": round_one})
    assert card_metadata(known, None)["base_model"] == "org/base"
    named = known.model_copy(update={"base": known.base.model_copy(update={"id": "org/once", "revision": "abc"})})
    assert card_metadata(named, None)["base_model"] == "org/once"


def test_a_push_publishes_no_path_of_any_round(home: Path) -> None:
    pushed = push(home / "twice", "me/twice", allow_unaudited=True, dry_run=True)
    assert pushed.url is None
    assert "layerprune/locator.json" not in pushed.files
    for file in pushed.files:
        if file.endswith((".json", ".md")):
            assert str(home) not in (home / "twice" / file).read_text(), file
    receipt = Receipt.load(home / "twice/layerprune/receipt.json")
    assert (receipt.base.id, receipt.first_base.id) == ("healed", "base")
    assert yaml.safe_load((home / "twice/README.md").read_text().split("---")[1]).get("base_model") is None
