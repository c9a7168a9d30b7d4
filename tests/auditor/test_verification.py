"""Tampering with any byte is found; honest folders pass."""

import hashlib
import json
import shutil
from types import SimpleNamespace

import pytest
import yaml

import audit_tiny as tiny
from layerprune.artifacts import PRUNED, Audit, Compared, Continuation, FileEntry, Generation, Outcomes, Plan, Receipt
from layerprune.auditor import audit
from layerprune.auditor.comparison import adjusted, compare_models, overall, verdict
from layerprune.auditor.rerun import on_the_edge, repeat
from layerprune.auditor.verification import verify
from layerprune.data.items import EvalItem, EvalTask
from layerprune.errors import UsageError
from layerprune.models.model import LoadedModel
from layerprune.report.card import read_card, write_card
from layerprune.report.page import write_report
from layerprune.stats import above_chance


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An audited folder, made once; tests copy it."""
    folder = tmp_path_factory.mktemp("made")
    base = tiny.base_model(folder / "base")
    tiny.eval_set(base, folder / "tasks", test=40)
    out = tiny.exported(base, folder / "out")
    receipt = Receipt.load(out / "layerprune" / "receipt.json")
    files = {
        path.name: FileEntry(sha256=hashlib.sha256(path.read_bytes()).hexdigest(), bytes=path.stat().st_size)
        for path in out.iterdir()
        if path.is_file()
    }
    receipt.model_copy(update={"files": files}).save(out / "layerprune" / "receipt.json")
    audit(out, ["toy"], include_path=[folder / "tasks"], generation=False)
    return folder


@pytest.fixture
def out(made, tmp_path):
    return shutil.copytree(made / "out", tmp_path / "out")


def test_an_honest_folder_passes(out, made):
    found = verify(out, base=str(made / "base"))
    assert found.problems == ()
    assert found.ok
    assert found.audited
    assert found.files >= 4
    assert found.bytes == sum(
        p.stat().st_size for p in out.iterdir() if p.is_file() and p.name not in ("README.md", "report.html")
    )
    assert found.digests["plan"] == Plan.load(out / "layerprune" / "plan.json").sha256()


WEIGHTS_AND_CONFIG = ("model.safetensors", "config.json", "tokenizer.json")
DOCUMENTS = ("README.md", "report.html", "layerprune/plan.json", "layerprune/receipt.json", "layerprune/audit.json")


@pytest.mark.parametrize("name", [*WEIGHTS_AND_CONFIG, *DOCUMENTS])
@pytest.mark.parametrize("place", [0.02, 0.31, 0.5, 0.77, 0.98])
def test_a_changed_byte_anywhere_is_found(out, name, place):
    path = out / name
    data = bytearray(path.read_bytes())
    position = int(place * len(data))
    if name == "README.md":  # outside its marks the card belongs to the owner
        start, stop = data.index(b"# "), data.index(b"<!-- layerprune: end")
        position = start + int(place * (stop - start))
    data[position] = (data[position] + 1) % 128
    path.write_bytes(data)
    assert not verify(out).ok, data[max(0, position - 30) : position + 30]


def test_whitespace_in_a_document_is_found(out):
    path = out / "layerprune" / "plan.json"
    path.write_text(path.read_text() + "\n")
    assert any("plan.json: the file's bytes" in problem for problem in verify(out).problems)


def test_missing_and_added_files_are_named(out):
    (out / "tokenizer.json").unlink()
    (out / "pytorch_model.bin").write_bytes(b"surprise")
    problems = verify(out).problems
    assert "tokenizer.json: missing" in problems
    assert "pytorch_model.bin: not a file that export, heal or audit wrote" in problems


def rewrite(out, **changes):
    path = out / "layerprune" / "audit.json"
    Audit.load(path).model_copy(update=changes).save(path)
    write_card(out)  # the forger is careful
    write_report(out)


def test_a_prettier_verdict_is_found(out):
    rewrite(out, verdict="17 % of layers removed (1 of 6); accuracy 0.0 points")
    assert verify(out).problems == ("audit: the verdict does not follow from the figures",)


def test_a_prettier_accuracy_is_found(out):
    document = Audit.load(out / "layerprune" / "audit.json")
    task = document.tasks[0]
    model = task.models[PRUNED].model_copy(update={"accuracy": 0.99})
    rewrite(out, tasks=(task.model_copy(update={"models": {PRUNED: model}}),))
    assert "audit: the figures of toy do not follow from its items' outcomes" in verify(out).problems


def test_a_prettier_figure_in_the_metadata_is_found_and_the_owners_own_keys_are_not(out):
    path = out / "README.md"
    metadata, _ = read_card(path)
    value = metadata["model-index"][0]["results"][0]["metrics"][0]["value"]
    text = path.read_text()
    path.write_text(text.replace(f"value: {value}", "value: 0.99").replace("---\n", "---\nthumbnail: cat.png\n", 1))
    assert verify(out).problems == ("README.md: the metadata's model-index is not what the documents say",)


def test_a_prettier_count_of_faulty_texts_is_found(out):
    text = {"base": "x", "pruned": "x", "shared_tokens": 1, "base_faults": (), "nats": 1.0, "base_nats": 1.0}
    texts = tuple(Continuation(prompt=str(n), faults=("repeats",) * (n < 3), **text) for n in range(4))
    told = {"prompts": 4, "max_new_tokens": 48, "base_faulty": 0, "agreement": 0.5, "continuations": texts}
    document = Audit.load(out / "layerprune" / "audit.json")

    def problems(**figures):
        generation = Generation(**(told | figures))
        parts = (document.removal, document.base.layers, document.tasks, generation)
        rewrite(out, generation=generation, verdict=verdict(*parts))
        return verify(out).problems

    assert problems(faulty=3, healthy=False) == ()
    said = ("audit: the count of faulty texts does not follow from the texts' faults",)
    assert problems(faulty=0, healthy=True) == problems(faulty=3, healthy=True) == said
    assert problems(faulty=3, healthy=True, base_faulty=3) == problems(faulty=3, healthy=False, prompts=9) == said


def test_figures_in_the_metadata_of_an_unaudited_folder_are_found(out):
    figures = read_card(out / "README.md")[0]["model-index"]
    (out / "layerprune" / "audit.json").unlink()
    (out / "report.html").unlink()
    path = write_card(out)
    assert verify(out).ok
    path.write_text(path.read_text().replace("---\n", "---\n" + yaml.safe_dump({"model-index": figures}), 1))
    assert verify(out).problems == ("README.md: the metadata's model-index is not what the documents say",)


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("seed", -1, "seed: Input should be greater than or equal to 0"),
        ("cache_bytes_per_token", [0, 8], "cache_bytes_per_token.0: Input should be greater than 0"),
        ("overall", {"zz": ...}, "overall is about ['zz'], the first task about ['pruned']"),
        ("tasks.0.models", {"zz": ...}, "tasks are about ['zz']; needed is 'pruned', known are ['pruned']"),
        ("tasks.0.models", {}, "tasks are about []; needed is 'pruned', known are ['pruned']"),
        ("base.layers", 0, "base.layers: Input should be greater than or equal to 1"),
        ("tasks.0.data.items", 0, "tasks.0.data.items: Input should be greater than or equal to 1"),
    ],
)
def test_an_audit_that_cannot_be_is_a_problem_and_no_traceback(out, place, value, said):
    path = out / "layerprune" / "audit.json"
    document = json.loads(path.read_text())
    *above, last = [int(part) if part.isdigit() else part for part in place.split(".")]
    inner = document
    for part in above:
        inner = inner[part]
    if isinstance(value, dict) and ... in value.values():
        value = dict.fromkeys(value, inner[last][PRUNED])
    inner[last] = value
    path.write_text(json.dumps(document))
    assert any(said in problem for problem in verify(out).problems), verify(out).problems


def test_an_audit_of_no_task_is_a_problem_and_no_traceback(out):
    path = out / "layerprune" / "audit.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tasks": []}))
    assert any("audit.json: tasks: Tuple should have at least 1 item" in problem for problem in verify(out).problems)


def test_a_report_that_is_gone_is_found(out):
    (out / "report.html").unlink()
    assert verify(out).problems == ("report.html: missing",)


def test_a_card_that_is_not_utf_8_is_a_problem_and_no_traceback(out):
    path = out / "README.md"
    path.write_bytes(path.read_bytes() + b"\xff")
    (problem,) = verify(out).problems
    assert "README.md cannot be read, a card is text in UTF-8" in problem


def test_an_audit_of_another_plan_is_found(out):
    rewrite(out, plan_sha256="0" * 64)
    assert verify(out).problems == ("audit.plan_sha256 is not the plan's",)


def test_a_foreign_base_is_found(out):
    assert any("is not the base model" in problem for problem in verify(out, base=str(out)).problems)


def test_an_unaudited_folder_passes_and_says_so(out):
    (out / "layerprune" / "audit.json").unlink()
    (out / "report.html").unlink()
    write_card(out)
    found = verify(out)
    assert (found.ok, found.audited) == (True, False)


def test_a_folder_without_documents_has_problems_not_a_traceback(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    problems = verify(tmp_path).problems
    assert any("plan.json does not exist" in problem for problem in problems)


def test_items_asked_again_give_what_the_audit_says(out, made):
    found = repeat(out, 10, include_path=[made / "tasks"], seed=3)
    assert (found.items, found.same_decisions, found.problems) == (10, 20, ())
    assert found.largest_change <= 1e-4
    with pytest.raises(UsageError, match="the audit has 40"):
        repeat(out, 41, include_path=[made / "tasks"])


@pytest.mark.parametrize("attention", [None, "eager"])
def test_items_are_asked_again_with_the_attention_of_the_audit(out, made, attention, monkeypatch):
    forge(out, the_task(out), attention=attention)
    used, load = [], LoadedModel.load
    monkeypatch.setattr(LoadedModel, "load", lambda *a, **kw: (used.append(load(*a, **kw)), used[-1])[1])
    assert repeat(out, 4, include_path=[made / "tasks"], seed=3).problems == ()
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
    rewrite(out, tasks=tasks, overall=overall(tasks), verdict=said, **changes)
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
    found = repeat(out, 8, include_path=[made / "tasks"], seed=1)
    assert len(found.problems) >= 7
    assert all("pruned model" in problem for problem in found.problems)


def test_forged_answers_beside_honest_probabilities_do_not_repeat(out, made):
    honest = the_task(out).models[PRUNED].outcomes
    forge(out, with_pruned(the_task(out), correct="1" * 40))
    found = repeat(out, 40, include_path=[made / "tasks"])
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
    assert repeat(out, 2, include_path=[made / "tasks"]).problems == (
        f"toy: {left} items were left out that no earlier step has seen",
    )
    other = Compared(removal=(4,), plan_sha256="0" * 64, metric="cosine")
    rewrite(out, compared={"cosine": other})
    found = repeat(out, 2, include_path=[made / "tasks"])
    assert (found.problems, found.unexplained) == ((), left)


def test_the_first_items_up_to_a_limit_are_all_that_a_limited_audit_has(out, made):
    forge(out, picked(the_task(out), range(30)), layerwise=None, limit=30)
    assert repeat(out, 2, include_path=[made / "tasks"]).problems == ()


def test_a_base_said_to_be_above_chance_is_looked_at_again(out, made):
    task = the_task(out)
    forge(out, task, p_above_chance=1e-9)
    said = ("toy: its chance level and the base's p-value do not follow from its items",)
    assert repeat(out, 1, include_path=[made / "tasks"]).problems == said
    forge(out, task.model_copy(update={"data": task.data.model_copy(update={"chance": 0.1})}))
    assert repeat(out, 1, include_path=[made / "tasks"]).problems == said


def test_items_that_are_not_the_tasks_are_found(out, made):
    task = the_task(out)
    foreign = ("f" * 16, *task.data.fingerprints[1:])
    forge(out, task.model_copy(update={"data": task.data.model_copy(update={"fingerprints": foreign})}), layerwise=None)
    assert repeat(out, 1, include_path=[made / "tasks"]).problems == (
        "toy: 1 audited items are not the task's, ffffffffffffffff for one",
        "toy: 1 items were left out that no earlier step has seen",
    )
    foreign = tuple(f"{number:016x}" for number in range(40))
    forge(out, task.model_copy(update={"data": task.data.model_copy(update={"fingerprints": foreign})}), layerwise=None)
    found = repeat(out, 3, include_path=[made / "tasks"])
    assert (found.items, len(found.problems)) == (0, 2)


def test_a_task_that_stands_there_twice_is_found(out):
    rewrite(out, tasks=(the_task(out), the_task(out)))
    assert "audit: one of its tasks stands there twice" in verify(out).problems


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
