"""Every reader of a folder holds its documents against each other: an edited one is refused in one line."""

from __future__ import annotations

import json
import os
import shutil

import pytest

import cli_tiny
import families
import heal_tiny
from cli_tiny import done, last_line, refused
from layerprune.artifacts import Audit, HealLog, Plan, Receipt, Scores, read_plan, read_scores
from layerprune.auditor import audit
from layerprune.auditor.auditor import renew_card
from layerprune.auditor.inputs import ExportedFolder
from layerprune.auditor.verification import verify
from layerprune.errors import CheckpointError, DocumentError
from layerprune.exporter import export
from layerprune.healing import HEALERS
from layerprune.healing.healer import heal
from layerprune.removal import Removal


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = cli_tiny.make(tmp_path_factory.mktemp("chain"))
    (folder / "base" / "README.md").write_text("---\nlicense: mit\n---\nIts card.\n")
    heal_tiny.pruned(folder, 2, 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(HEALERS.builtin, "scaling", "heal_tiny:Scaling")
        heal(folder / "pruned-2-4", folder / "healed", method="scaling:factor=0.5")
        (folder / "recipe.yaml").write_text(
            f"model: {folder / 'base'}\ninclude_path: [{folder / 'tasks'}]\nscore:\n  tasks: toy\nplan:\n  drop: 2\n"
            "heal:\n  method: scaling:factor=0.5\naudit:\n  generation: false\n  layerwise: false\n"
        )
        done("run", folder / "recipe.yaml", "-o", folder / "run")
    return folder


@pytest.fixture(autouse=True)
def scaling(monkeypatch):
    monkeypatch.setitem(HEALERS.builtin, "scaling", "heal_tiny:Scaling")


def edit(path, **changes):
    """Change fields as with an editor that keeps the form."""
    kind = next(kind for kind in (Plan, Receipt, HealLog, Audit, Scores) if kind.filename == path.name)
    document = kind.load(path)
    document.model_copy(update={name: change(document) for name, change in changes.items()}).save(path)


def readers(folder, home, tmp_path):
    """What is done with an exported folder, each by itself."""
    return {
        "audit": lambda: audit(folder, ["toy"], include_path=[home / "tasks"], generation=False),
        "heal": lambda: heal(folder, tmp_path / "again", method="scaling"),
        "recheck": lambda: audit(folder, recheck=1, include_path=[home / "tasks"]),
        "card": lambda: renew_card(folder),
        "push": lambda: ExportedFolder.read(folder),
    }


EDITS = {
    "another removal": ("receipt.json", {"removal": lambda it: (1, 4)}, "receipt.removal is not the plan's"),
    "another base": (
        "receipt.json",
        {"base": lambda it: it.base.model_copy(update={"id": "org/other"})},
        "receipt.base is not the plan's model",
    ),
    "more layers left": (
        "receipt.json",
        {"result": lambda it: it.result.model_copy(update={"layers": 5})},
        "receipt.result.layers is not the 4 that are left",
    ),
    "a prettier account of the export": (
        "receipt.json",
        {"dropped_tensors": lambda it: 0},
        "layerprune/receipt.json is not the one that README.md names",
    ),
    "another plan": ("plan.json", {"requested": lambda it: "1"}, "is not the plan that was carried out"),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_document_is_refused_by_every_reader(home, tmp_path, monkeypatch, name):
    file, changes, said = EDITS[name]
    folder = shutil.copytree(home / "pruned-2-4", tmp_path / "pruned")
    edit(folder / "layerprune" / file, **changes)
    monkeypatch.setattr(
        "layerprune.models.model.LoadedModel.load", lambda *args, **kwargs: pytest.fail("a model is loaded")
    )
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for reader, read in readers(folder, home, tmp_path).items():
        with pytest.raises(DocumentError) as told:
            read()
        assert said in str(told.value), reader
        assert "\n" not in str(told.value)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert not (tmp_path / "again").exists()
    assert not verify(folder).ok


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"found": lambda it: {"factor": 1.0}}, "layerprune/heal.json is not the one that README.md names"),
        ({"seconds": lambda it: 1e-9}, "layerprune/heal.json is not the one that README.md names"),
        ({"base": lambda it: it.base.model_copy(update={"layers": 7})}, "heal.base is not the receipt's"),
        ({"unhealed": lambda it: it.result}, "heal.unhealed is not the result of the step before"),
        (
            {"result": lambda it: it.result.model_copy(update={"parameters": 1})},
            "heal.result.parameters is not that of the unhealed checkpoint",
        ),
    ],
)
def test_an_edited_healing_log_is_in_no_new_audit(home, tmp_path, changes, said):
    folder = shutil.copytree(home / "healed", tmp_path / "healed")
    edit(folder / "layerprune" / "heal.json", **changes)
    for reader, read in readers(folder, home, tmp_path).items():
        with pytest.raises(DocumentError) as told:
            read()
        assert said in str(told.value), reader
    assert not (folder / "layerprune" / "audit.json").exists()


def test_an_audit_that_is_of_other_documents_is_refused(home, tmp_path):
    folder = shutil.copytree(home / "run" / "healed", tmp_path / "healed")
    edit(folder / "layerprune" / "audit.json", bytes_after=lambda it: 1)
    with pytest.raises(DocumentError, match="bytes_after is not the receipt's; put it back, or remove it to audit"):
        heal(folder, tmp_path / "again", method="scaling")
    assert "audit.bytes_after is not the receipt's" in verify(folder).problems


def test_a_card_of_ones_own_names_nothing_and_keeps_nobody_out(home, tmp_path):
    folder = shutil.copytree(home / "healed", tmp_path / "healed")
    (folder / "README.md").write_text("# Mine\n")
    heal(folder, tmp_path / "again", method="scaling")


def edited_scores(run):
    edit(run / "scores.json", seed=lambda it: it.seed + 1)
    return run / "scores.json"


def test_scores_that_were_edited_after_the_plan_are_not_used(home, tmp_path):
    run = shutil.copytree(home / "run", tmp_path / "run")
    scores = edited_scores(run)
    said = f"{scores} are not the scores that {run / 'plan.json'} was made from"
    for words in (
        ["plan", "--scores", scores, "--drop", 1, "-o", tmp_path / "other"],
        ["compare", scores, home / "run" / "scores.json"],
        ["compare", home / "run" / "scores.json", scores],
        ["export", run, "-o", tmp_path / "out"],
        ["export", run / "plan.json", "-o", tmp_path / "out"],
        ["audit", run / "healed", "--scores", scores],
        ["audit", run / "healed", "--compare", f"mine={run / 'plan.json'}"],
    ):
        assert said in refused(*words), words
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    assert read_scores(home / "run" / "scores.json").sha256() == read_plan(home / "run" / "plan.json").scores_sha256


def test_a_plan_of_a_front_is_held_against_the_scores_above_it(home, tmp_path):
    run = tmp_path / "run"
    words = ["--tasks", "toy", "--include-path", home / "tasks"]
    done("plan", home / "base", *words, "--front", "--up-to", 2, "-o", run)
    first = run / "front" / "plan-01.json"
    assert read_plan(first) == Plan.load(first)
    scores = edited_scores(run)
    assert f"{scores} are not the scores that {first} was made from" in refused("export", first, "-o", tmp_path / "out")
    assert "front.json was made from" in refused("compare", scores, scores)


DAMAGE = {  # of a finished run: what is changed, and what is said
    "scores": ("scores.json", "are not the scores that"),
    "the exported weights": ("checkpoint/model.safetensors", "model.safetensors: its sha256 is not the receipt's"),
    "the healed weights": ("healed/model.safetensors", "model.safetensors: its sha256 is not the healing log's"),
    "a tokenizer": ("healed/tokenizer.json", "tokenizer.json: its sha256 is not the healing log's"),
    "a config": ("checkpoint/config.json", "config.json cannot be read: "),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_run_does_not_pass_on_what_was_damaged(home, tmp_path, name):
    file, said = DAMAGE[name]
    run = shutil.copytree(home / "run", tmp_path / "run")
    if file == "scores.json":
        edited_scores(run)
    else:
        data = bytearray((run / file).read_bytes())
        data[-3] ^= 1
        (run / file).write_bytes(data)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert said in cli_tiny.last_line("run", home / "recipe.yaml", "-o", run)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_run_goes_on_from_what_is_removed_at_its_word(home, tmp_path):
    run = shutil.copytree(home / "run", tmp_path / "run")
    edited_scores(run)
    cli_tiny.last_line("run", home / "recipe.yaml", "-o", run)
    (run / "plan.json").unlink()
    done("run", home / "recipe.yaml", "-o", run)
    assert (run / "plan.json").read_bytes() == (home / "run" / "plan.json").read_bytes()


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("healed/layerprune/heal.json", {"seconds": lambda it: 9.0}, "heal.json is not the one that README.md names"),
        ("healed/layerprune/receipt.json", {"dropped_tensors": lambda it: 0}, "heal.json is not of this checkpoint"),
        ("checkpoint/layerprune/receipt.json", {"notes": lambda it: ("x",)}, "is not the one that README.md names"),
        ("healed/layerprune/audit.json", {"verdict": lambda it: "fine"}, "is not the one that README.md names"),
    ],
)
def test_a_run_holds_every_document_it_goes_on_from(home, tmp_path, file, changes, said):
    run = shutil.copytree(home / "run", tmp_path / "run")
    edit(run / file, **changes)
    assert said in cli_tiny.last_line("run", home / "recipe.yaml", "-o", run)


@pytest.mark.parametrize("left", ["no report", "an old card", "an old report", "no audit yet", "no card"])
def test_a_run_that_was_killed_while_it_wrote_its_audit_down_is_completed(home, tmp_path, left):
    run = shutil.copytree(home / "run", tmp_path / "run")
    healed, wanted = run / "healed", home / "run" / "healed"
    if left == "no report":
        (healed / "report.html").unlink()
    if left == "an old report":
        (healed / "report.html").write_text("<p>old</p>")
    if left == "an old card":
        old = shutil.copytree(home / "run" / "checkpoint", tmp_path / "old") / "README.md"
        shutil.copy(old, healed / "README.md")
        text = (healed / "README.md").read_text()
        log, receipt = (kind.load(healed / "layerprune" / kind.filename).sha256() for kind in (HealLog, Receipt))
        assert receipt in text
        assert log not in text
    if left == "no card":
        for step in ("healed", "checkpoint"):
            (run / step / "README.md").unlink()
        assert verify(healed).problems == ("README.md: missing",)
    if left == "no audit yet":
        (healed / "layerprune" / "audit.json").unlink()
    done("run", home / "recipe.yaml", "-o", run)
    for name in ("README.md", "report.html", "layerprune/audit.json"):
        assert (healed / name).read_bytes() == (wanted / name).read_bytes(), name
    assert verify(healed).problems == ()
    assert (run / "checkpoint" / "README.md").read_bytes() == (home / "run" / "checkpoint" / "README.md").read_bytes()


@pytest.mark.parametrize("step", ["write_card", "write_report"])
def test_an_audit_is_written_down_last(home, tmp_path, monkeypatch, step):
    folder = shutil.copytree(home / "pruned-2-4", tmp_path / "pruned")

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"layerprune.auditor.auditor.{step}", killed)
        with pytest.raises(KeyboardInterrupt):
            audit(folder, ["toy"], include_path=[home / "tasks"], generation=False, layerwise=False)
    assert not (folder / "layerprune" / "audit.json").exists()
    audit(folder, ["toy"], include_path=[home / "tasks"], generation=False, layerwise=False)
    assert verify(folder).problems == ()


def test_what_a_killed_healing_left_goes_when_its_folder_is_there(home, tmp_path):
    out, work = tmp_path / "healed", tmp_path / ".healed.healing"
    heal(home / "pruned-2-4", out, method="scaling")
    work.mkdir()
    (work / "changed.bin").write_bytes(b"x" * 100)
    assert "exists already" in refused("heal", home / "pruned-2-4", "-o", out, "--method", "scaling")
    assert [path.name for path in tmp_path.iterdir()] == ["healed"]
    other = tmp_path / "other"
    other.mkdir()  # not a healed folder: what a healing needs to go on stays
    (tmp_path / ".other.healing").mkdir()
    (tmp_path / ".other.healing" / "state").write_text("hours")
    assert "exists already" in refused("heal", home / "pruned-2-4", "-o", other, "--method", "scaling")
    assert (tmp_path / ".other.healing" / "state").exists()


def test_a_study_that_is_done_has_its_page_renewed_and_is_not_edited(home, tmp_path):
    recipe = tmp_path / "study.yaml"
    recipe.write_text(
        f"model: {home / 'base'}\ninclude_path: [{home / 'tasks'}]\nstudy:\n  tasks: toy\n  metrics: [ablation]\n"
        "  audit_limit: 12\n  counts: [1]\n"
    )
    run = tmp_path / "run"
    done("run", recipe, "-o", run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    (run / "study.html").unlink()
    (run / "tables" / "paths.csv").write_text("old")
    done("run", recipe, "-o", run)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    data = json.loads((run / "study.json").read_text())
    (run / "study.json").write_text(json.dumps(data | {"device": "cuda"}))
    assert f"{run / 'study.json'} is not the one that" in cli_tiny.last_line("run", recipe, "-o", run)


def test_a_run_takes_no_edited_figures_for_its_own(home, tmp_path):
    """Of figures that cannot be worked out again, only the card holds a hash: it is not written over."""
    run = shutil.copytree(home / "run", tmp_path / "run")
    edit(run / "healed" / "layerprune" / "audit.json", device=lambda it: "a faster one")
    card = (run / "healed" / "README.md").read_bytes()
    said = last_line("run", home / "recipe.yaml", "-o", run)
    assert "layerprune/audit.json is not the one that README.md names; put it back, or remove it" in said
    assert (run / "healed" / "README.md").read_bytes() == card


@pytest.mark.parametrize("name", ["checkpoint", "healed"])
def test_a_run_writes_into_no_folder_behind_a_link(home, tmp_path, name):
    run = shutil.copytree(home / "run", tmp_path / "run")
    elsewhere = (run / name).rename(tmp_path / "elsewhere")
    (run / name).symlink_to(elsewhere)
    (elsewhere / "report.html").write_text("mine")
    assert "is a symbolic link; remove it" in last_line("run", home / "recipe.yaml", "-o", run)
    assert (elsewhere / "report.html").read_text() == "mine"


def edited_log(inside):
    (inside / "audit.json").unlink()
    edit(inside / "heal.json", tokens=lambda it: it.tokens + 1)


EARLIER = {
    "edited": (lambda inside: edited_log(inside), "heal.json is not the one"),
    "audit edited": (lambda inside: edit(inside / "audit.json", seed=lambda it: 7), "audit.json is not the one"),
    "linked": (lambda inside: inside.symlink_to(inside.rename(inside.parent.parent / "away")), "a symbolic link"),
    "a pipe": (lambda inside: (inside / "receipt.json").unlink() or os.mkfifo(inside / "receipt.json"), "a named pipe"),
}


@pytest.mark.parametrize("name", EARLIER)
def test_a_round_that_was_tampered_with_goes_into_no_later_one(home, tmp_path, name):
    change, said = EARLIER[name]
    base = shutil.copytree(home / "run" / "healed", tmp_path / "base")
    plan = families.make_plan(base, Removal.of(1))
    change(base / "layerprune")
    with pytest.raises((DocumentError, CheckpointError), match=said):
        export(plan, tmp_path / "again")
    assert not (tmp_path / "again").exists()
