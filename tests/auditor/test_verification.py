"""Tampering with any byte is found; honest folders pass."""

import json
import shutil

import pytest
import yaml

import audit_tiny as tiny
from layerprune.artifacts import PRUNED, Audit, Continuation, Generation, Plan
from layerprune.auditor.comparison import verdict
from layerprune.auditor.verification import verify
from layerprune.report.card import read_card, write_card


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An audited folder, made once; tests copy it."""
    return tiny.audited(tmp_path_factory.mktemp("made"), 40).parent


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


def test_a_prettier_verdict_is_found(out):
    tiny.rewrite(out, verdict="17 % of layers removed (1 of 6); accuracy 0.0 points")
    assert verify(out).problems == ("audit: the verdict does not follow from the figures",)


def test_a_prettier_accuracy_is_found(out):
    document = Audit.load(out / "layerprune" / "audit.json")
    task = document.tasks[0]
    model = task.models[PRUNED].model_copy(update={"accuracy": 0.99})
    tiny.rewrite(out, tasks=(task.model_copy(update={"models": {PRUNED: model}}),))
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
        tiny.rewrite(out, generation=generation, verdict=verdict(*parts))
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
    tiny.rewrite(out, plan_sha256="0" * 64)
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


def test_a_task_that_stands_there_twice_is_found(out):
    task = Audit.load(out / "layerprune" / "audit.json").tasks[0]
    tiny.rewrite(out, tasks=(task, task))
    assert "audit: one of its tasks stands there twice" in verify(out).problems
