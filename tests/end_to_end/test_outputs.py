"""Where commands write: tried before anything slow, nothing half done on a full disk, every fault names its file."""

from __future__ import annotations

import errno
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch

import cli_tiny
import heal_tiny
from cli_tiny import done, refused
from disk import held, limited, tree
from layerprune.artifacts import Plan, Scores
from layerprune.checkpoint import new_folder, try_new_folder
from layerprune.errors import ExportError, LayerpruneError, WriteError
from layerprune.files import writing
from layerprune.healing.distill import TeacherCache
from layerprune.healing.training import SavedStates, TrainingState
from layerprune.scoring.cached_evaluator import Journal


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = cli_tiny.make(tmp_path_factory.mktemp("outputs"))
    heal_tiny.pruned(folder, 2, 4)
    heal_tiny.prose(folder / "prose.txt")
    done("score", folder / "base", "--metric", "random", "-o", folder / "run")
    words = ["--tasks", "toy", "--include-path", folder / "tasks", "--no-generation", "--no-layerwise"]
    done("audit", shutil.copytree(folder / "pruned-2-4", folder / "audited"), *words)  # and datasets keeps the items
    tasks = f"include_path: [{folder / 'tasks'}]\nscore:\n  tasks: toy\n"
    (folder / "recipe.yaml").write_text(f"model: {folder / 'base'}\n{tasks}plan:\n  drop: 2\n")
    (folder / "study.yaml").write_text(f"model: {folder / 'base'}\nstudy:\n  tasks: toy\n")
    return folder


def commands(home, out):
    """Every command that writes to a folder which it makes or fills, by name."""
    tasks = ["--tasks", "toy", "--include-path", home / "tasks"]
    plan = done("plan", "--scores", home / "run" / "scores.json", "--drop", 1, "-o", home / "planned", "--force")
    assert plan.exit_code == 0
    return {
        "score": ["score", home / "base", *tasks, "-o", out],
        "plan": ["plan", home / "base", *tasks, "--drop", 1, "-o", out],
        "plan from scores": ["plan", "--scores", home / "run" / "scores.json", "--drop", 1, "-o", out],
        "front": ["plan", home / "base", *tasks, "--front", "-o", out],
        "export": ["export", home / "planned", "-o", out],
        "heal": ["heal", home / "pruned-2-4", "--method", "linear", "--corpus", home / "prose.txt", "-o", out],
        "run": ["run", home / "recipe.yaml", "-o", out],
        "run a study": ["run", home / "study.yaml", "-o", out],
        "study": ["study", home / "base", *tasks, "-o", out],
    }


SLOW = (
    "layerprune.models.model.LoadedModel.load", "layerprune.exporter.exporter.locate",
    "layerprune.auditor.inputs.locate",
    "layerprune.analysis.measurements.locate", "layerprune.healing.healer.build_corpus",
    "layerprune.planner.session.locate",
)  # fmt: skip


@pytest.fixture
def nothing_slow(monkeypatch):
    for name in SLOW:

        def called(*args, name=name, **kwargs):
            pytest.fail(f"{name} was called before the output was tried")

        monkeypatch.setattr(name, called)


NAMES = ("score", "plan", "plan from scores", "front", "export", "heal", "run", "run a study", "study")


@pytest.mark.parametrize("name", NAMES)
def test_a_file_in_the_way_of_the_output_is_said_before_anything_slow(home, tmp_path, name, request):
    (tmp_path / "file").write_text("mine")
    words = commands(home, tmp_path / "file" / "deep" / "out")[name]
    request.getfixturevalue("nothing_slow")
    assert str(tmp_path / "file") in refused(*words)
    words[-1] = tmp_path / "file"
    assert str(tmp_path / "file") in refused(*words)
    assert (tmp_path / "file").read_text() == "mine"
    assert tree(tmp_path) == ["file"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_an_output_that_cannot_be_written_is_said_at_once(home, tmp_path, name, number, request, monkeypatch):
    """A full disk and a read-only one, as the system calls tell of them; root may write anywhere."""
    words = commands(home, tmp_path / "deep" / "out")[name]
    request.getfixturevalue("nothing_slow")
    failing_below(monkeypatch, tmp_path, number)
    said = refused(*words)
    assert os.strerror(number) in said
    assert str(tmp_path / "deep") in said
    assert tree(tmp_path) == []


def failing_below(monkeypatch, place, number):
    """Let no file below ``place`` be written: folders and empty files can be made, as on a full disk."""
    if number == errno.ENOSPC:
        real = os.fsync

        def fsync(handle):
            if Path(f"/proc/self/fd/{handle}").resolve().is_relative_to(place):
                raise OSError(number, os.strerror(number))
            return real(handle)

        monkeypatch.setattr(os, "fsync", fsync)
        return
    mkdir = os.mkdir

    def refuse(path, *args, **kwargs):
        if Path(path).is_relative_to(place):
            raise OSError(number, os.strerror(number), str(path))
        return mkdir(path, *args, **kwargs)

    monkeypatch.setattr(os, "mkdir", refuse)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_an_audit_tries_its_folder_first(home, tmp_path, number, monkeypatch, nothing_slow):
    pruned = shutil.copytree(home / "pruned-2-4", tmp_path / "pruned")
    before = tree(pruned)
    words = ["audit", pruned, "--tasks", "toy", "--include-path", home / "tasks"]
    if number == errno.ENOSPC:
        failing_below(monkeypatch, pruned, number)
    else:
        opened = os.open

        def refuse(path, flags, *args, **kwargs):
            if flags & os.O_CREAT and Path(path).is_relative_to(pruned):
                raise OSError(number, os.strerror(number), str(path))
            return opened(path, flags, *args, **kwargs)

        monkeypatch.setattr(os, "open", refuse)
    said = refused(*words)
    assert os.strerror(number) in said
    assert str(pruned) in said
    assert tree(pruned) == before


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_without_locks_is_said_in_one_line(home, tmp_path, number, monkeypatch, nothing_slow):
    import fcntl

    def none(*args):
        raise OSError(number, os.strerror(number))

    words = commands(home, tmp_path / "deep" / "out")
    pruned = shutil.copytree(home / "pruned-2-4", tmp_path / "pruned")
    before = tree(tmp_path)
    monkeypatch.setattr(fcntl, "flock", none)
    for name, command in words.items():
        said = refused(*command)
        assert os.strerror(number) in said, name
        assert str(tmp_path / "deep") in said, name
        assert tree(tmp_path) == before, name
    said = refused("audit", pruned, "--tasks", "toy", "--include-path", home / "tasks")
    assert said == f"{pruned / '.lock'} cannot be locked: {os.strerror(number)}; give a folder on a local disk with -o"
    assert tree(tmp_path) == before


@pytest.mark.parametrize("place", ["", "run", "deep/er/run"])
def test_an_output_in_a_models_own_folder_is_refused(home, tmp_path, place, nothing_slow):
    base = home / "base"
    before = tree(base)
    for name in ("score", "plan", "front", "run", "study", "run a study"):
        said = refused(*commands(home, base / place)[name])
        assert said.endswith(f"the folder of the model {base}; give another folder with -o"), name
    for source in ("export", "heal"):
        out = (base if source == "export" else home / "pruned-2-4") / (place or "out")
        assert "lies inside the folder of the model" in refused(*commands(home, out)[source])
    assert tree(base) == before


def test_a_folder_that_an_export_makes_is_tried_for_room_too(tmp_path):
    with limited(1000), pytest.raises(ExportError, match="nothing was left behind"):
        try_new_folder(tmp_path / "deep" / "out")
    assert tree(tmp_path) == []


def test_a_journal_whose_disk_is_full_keeps_what_it_had(tmp_path):
    path = tmp_path / "run" / "journal.jsonl"
    with limited(2000), pytest.raises(WriteError) as told:
        Journal(path, "k").append({"text": "x" * 3000})
    assert told.value.filename == str(path)
    assert not path.exists()
    journal = Journal(path, "k")
    journal.append({"number": 1})
    before = path.read_bytes()
    with limited(2000), pytest.raises(WriteError):
        journal.append({"text": "x" * 3000})
    assert path.read_bytes() == before
    journal.append({"number": 2})
    assert [entry["number"] for entry in Journal(path, "k").entries] == [1, 2]
    assert len(journal.entries) == 2
    path.write_bytes(path.read_bytes() + b"3\n")
    with pytest.raises(LayerpruneError, match="is damaged"):
        Journal(path, "k")


def test_a_state_of_training_whose_disk_is_full_leaves_the_one_before(tmp_path):
    states = SavedStates(tmp_path / "states")
    weights = {"w": torch.nn.Parameter(torch.zeros(8))}
    optimizer = torch.optim.Adam(weights.values())
    states.save(TrainingState(step=1), weights, optimizer)
    large = {"w": torch.nn.Parameter(torch.zeros(5000))}
    grown = torch.optim.Adam(large.values())
    with limited(8000), pytest.raises(WriteError, match=r"File too large.*last\.pt"):
        states.save(TrainingState(step=2), large, optimizer)
    large["w"].grad = torch.zeros(5000)
    grown.step()
    with limited(8000), pytest.raises(WriteError, match=r"File too large.*last\.pt"):
        states.save(TrainingState(step=2), weights, grown)
    assert tree(tmp_path / "states") == ["last.pt"]
    states.keep_best(weights)
    with limited(8000), pytest.raises(WriteError, match=r"File too large.*best\.safetensors"):
        states.keep_best(large)
    assert states.restore(weights, optimizer).step == 1
    states.restore_best(weights)
    assert tree(tmp_path / "states") == ["best.safetensors", "last.pt"]


def test_room_for_a_teachers_answers_is_taken_at_once(tmp_path):
    kept = TeacherCache(tmp_path / "kept", 4, 1.0)
    with limited(100_000), pytest.raises(WriteError, match=r"top\.npy"):
        kept.make_room(100, 99)
    kept.make_room(10, 9)
    size = (tmp_path / "kept" / "top.npy").stat()
    assert size.st_blocks * 512 >= size.st_size


@pytest.mark.parametrize("room", [400, 4500])
def test_a_disk_that_fills_up_while_a_command_works_leaves_nothing(home, tmp_path, room):
    """Room for the trial and the first lines of the journal, or not even that; no weight file fits."""
    for name in ("score", "plan", "front", "run", "export"):
        with limited(room):
            said = refused(*commands_room(home, tmp_path / "out", name))
        assert os.strerror(errno.EFBIG) in said
        assert str(tmp_path / "out") in said
        left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
        assert left <= {"journal.jsonl", "recipe.json"}, name
        for journal in tmp_path.rglob("journal.jsonl"):
            assert journal.read_bytes().endswith(b"\n")
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        assert tree(tmp_path) == []


def commands_room(home, out, name):
    with_room = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (with_room[1], with_room[1]))
    try:
        return commands(home, out)[name]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, with_room)


def test_healing_on_a_full_disk_names_what_it_wrote(home, tmp_path):
    with limited(9000):
        said = refused(*commands_room(home, tmp_path / "out", "heal"))
    assert f"{tmp_path / '.out.healing' / 'changed.bin'}" in said
    assert tree(tmp_path) == []


def test_an_audit_on_a_full_disk_leaves_the_folder_as_it_was(home, tmp_path):
    pruned = shutil.copytree(home / "pruned-2-4", tmp_path / "pruned")
    before = {path: path.read_bytes() for path in pruned.rglob("*") if path.is_file()}
    words = ["audit", pruned, "--tasks", "toy", "--include-path", home / "tasks", "--no-generation"]
    with limited(5000):  # the card fits, the report does not
        said = refused(*words)
    assert f"'{pruned / 'report.html'}'" in said
    after = {path: path.read_bytes() for path in pruned.rglob("*") if path.is_file()}
    assert after == before
    done(*words)


def test_a_plan_that_cannot_be_saved_takes_nothing_of_what_was_there(home, tmp_path, monkeypatch):
    shutil.copytree(home / "run", tmp_path / "run")
    done("plan", "--scores", tmp_path / "run" / "scores.json", "--drop", 1, "-o", tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    real = Plan.save

    def full(self, path):
        with writing(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Plan, "save", full)
    words = ["plan", home / "base", "--metric", "reverse-order", "--drop", 1, "--force", "-o", tmp_path / "run"]
    said = refused(*words, "--tasks", "toy", "--include-path", home / "tasks")
    assert "No space left on device" in said
    after = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert after == before
    monkeypatch.setattr(Plan, "save", real)
    assert Scores.load(tmp_path / "run" / "scores.json").metric.name == "random"


@pytest.mark.parametrize(
    ("name", "place"),
    [("plan", "plan.json/"), ("score", "scores.json/"), ("front", "front"), ("front", "front/front.csv/"),
     ("study", "plots"), ("study", "study.html/"), ("run a study", "tables")],
)  # fmt: skip
def test_what_lies_in_a_files_place_is_seen_before_anything_slow(home, tmp_path, name, place, request):
    words = commands(home, tmp_path / "out")[name]
    if name in ("plan", "score", "front"):
        words.append("--force")
    there = tmp_path / "out" / place
    (there if place.endswith("/") else there.parent).mkdir(parents=True)
    if not place.endswith("/"):
        there.write_text("mine")
    before = tree(tmp_path)
    request.getfixturevalue("nothing_slow")
    assert refused(*words).startswith(f"{there} is a ")
    assert tree(tmp_path) == before


def test_an_audit_sees_a_folder_in_its_reports_place_before_it_measures(home, tmp_path, nothing_slow):
    pruned = shutil.copytree(home / "pruned-2-4", tmp_path / "pruned")
    (pruned / "report.html").mkdir()
    said = refused("audit", pruned, "--tasks", "toy", "--include-path", home / "tasks")
    assert said == f"{pruned / 'report.html'} is a folder, and a file of that name is to be written; move it"


def test_a_lock_of_the_kernel_that_fails_leaves_no_partial_folder(tmp_path, monkeypatch):
    import fcntl

    def none(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.raises(ExportError, match="No locks available"), new_folder(tmp_path / "deep" / "out"):
        pytest.fail("the block must not run")
    assert tree(tmp_path) == []


def test_a_folder_that_another_process_holds_is_refused_in_one_line(tmp_path):
    folder = cli_tiny.make(tmp_path / "home")
    with held(tmp_path / "run"):
        words = ["plan", folder / "base", "--metric", "random", "--drop", 1, "-o", tmp_path / "run"]
        said = refused(*words)
        other = "wait until it is done, or give another folder with -o"
        assert said == f"another layerprune is at work in {tmp_path / 'run'}; {other}"
        recipe = tmp_path / "recipe.yaml"
        tasks = f"include_path: [{folder / 'tasks'}]\nscore:\n  metric: random\n  tasks: toy\n"
        recipe.write_text(f"model: {folder / 'base'}\n{tasks}plan:\n  drop: 1\n")
        assert "another layerprune is at work" in refused("run", recipe, "-o", tmp_path / "run")
        score = ["score", folder / "base", "--metric", "random", "-o", tmp_path / "run"]
        assert "another layerprune is at work" in refused(*score)
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    done(*words)
    assert not (tmp_path / "run" / ".lock").exists()
