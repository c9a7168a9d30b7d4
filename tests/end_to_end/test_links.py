"""A link or a pipe where a file should be, a name that leads out: every step refuses in one line and writes nothing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import cli_tiny
import families
import heal_tiny
from cli_tiny import layerprune, refused
from layerprune.artifacts import Receipt
from layerprune.auditor.verification import verify
from layerprune.errors import CheckpointError, ExportError, LayerpruneError
from layerprune.exporter import export
from layerprune.healing import HEALERS
from layerprune.healing.healer import heal
from layerprune.hub import push
from layerprune.removal import Removal
from layerprune.report.card import write_card
from layerprune.report.page import write_report
from layerprune.util import Silent

SECRET = "the secret of another folder"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``base``, ``tasks``, and ``pruned-2-4`` with an audit."""
    folder = tmp_path_factory.mktemp("links")
    cli_tiny.make(folder)
    out = heal_tiny.pruned(folder, 2, 4)
    cli_tiny.done("audit", out, "--tasks", "toy", "--include-path", folder / "tasks", "--no-generation")
    return folder


@pytest.fixture(autouse=True)
def scaling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(HEALERS.builtin, "scaling", "heal_tiny:Scaling")


@pytest.fixture
def pruned(home: Path, tmp_path: Path) -> Path:
    return shutil.copytree(home / "pruned-2-4", tmp_path / "pruned")


@pytest.fixture
def base(home: Path, tmp_path: Path) -> Path:
    return shutil.copytree(home / "base", tmp_path / "base")


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    folder = tmp_path / "outside"
    (folder / "layerprune").mkdir(parents=True)
    (folder / "x").write_text(SECRET)
    return folder


def state(folder: Path) -> dict[str, object]:
    """Everything below a folder; links as where they lead."""
    found: dict[str, object] = {}
    for place, folders, files in os.walk(folder):
        for path in (Path(place) / name for name in (*folders, *files)):
            what = path.readlink() if path.is_symlink() else path.read_bytes() if path.is_file() else "other"
            found[str(path.relative_to(folder))] = what
    return found


def link_out(path: Path, outside: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(outside / "x")


def link_in(path: Path, outside: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to("config.json")


def pipe(path: Path, outside: Path) -> None:
    path.unlink(missing_ok=True)
    os.mkfifo(path)


STEPS: dict[str, Callable[[Path, Path], object]] = {
    "audit": lambda folder, home: refused(
        "audit", folder, "--tasks", "toy", "--include-path", home / "tasks", "--base", home / "base"
    ),
    "heal": lambda folder, home: refused("heal", folder, "--method", "scaling", "-o", folder.parent / "healed"),
    "push": lambda folder, home: cli_tiny.last_line("push", folder, "me/x", "--dry-run"),
}


@pytest.mark.parametrize("name", ["README.md", "tokenizer.json", "report.html", "layerprune/audit.json", "notes.md"])
@pytest.mark.parametrize("how", [link_out, link_in, pipe])
def test_no_step_follows_a_file_of_an_exported_folder(
    home: Path, pruned: Path, outside: Path, how: Callable[[Path, Path], None], name: str
) -> None:
    how(pruned / name, outside)
    before = state(pruned.parent)
    for step in STEPS.values():
        said = str(step(pruned, home))
        assert name in said
        assert SECRET not in said
    (problem,) = verify(pruned).problems
    assert problem.startswith(f"{name}: ")
    assert layerprune("verify", pruned).exit_code == 1
    writers = {"README.md": (write_card,), "layerprune/audit.json": (write_card, write_report)}
    for write in writers.get(name, ()):
        with pytest.raises(LayerpruneError, match=name):
            write(pruned)
    assert state(pruned.parent) == before


@pytest.mark.parametrize("name", ["layerprune", "additional_chat_templates", "extra"])
def test_no_step_follows_a_folder_in_an_exported_folder(home: Path, pruned: Path, outside: Path, name: str) -> None:
    """Documents would be written where it leads."""
    if (pruned / name).exists():
        shutil.rmtree(outside / name)
        shutil.move(pruned / name, outside / name)
    (pruned / name).symlink_to(outside / name if (outside / name).exists() else outside)
    before = state(pruned.parent)
    for step in STEPS.values():
        assert f"{name}, a symbolic link" in str(step(pruned, home)).replace(":", ",")
    assert not verify(pruned).ok
    assert state(pruned.parent) == before


@pytest.mark.parametrize("name", ["../.bashrc", "/etc/passwd", "a/../../x", "layerprune/../../x", "..\\x", "x\0y"])
def test_a_receipt_that_names_a_file_elsewhere_is_unsound(home: Path, pruned: Path, name: str) -> None:
    path = pruned / "layerprune" / "receipt.json"
    content = json.loads(path.read_text())
    (pruned.parent / ".bashrc").write_text("mine")
    content["files"][name] = content["files"]["config.json"]
    path.write_text(json.dumps(content))
    before = state(pruned.parent)
    for step in STEPS.values():
        assert "which is not a path inside the folder" in str(step(pruned, home))
    assert any("which is not a path inside the folder" in problem for problem in verify(pruned).problems)
    assert state(pruned.parent) == before


class Attaching(heal_tiny.Scaling):
    """Leaves something beside the weights."""

    leave: Callable[[Path], object] = staticmethod(lambda folder: None)

    def heal(self, case):  # type: ignore[no-untyped-def]
        case.attachments.mkdir(parents=True)
        type(self).leave(case.attachments)
        yield from super().heal(case)


@pytest.mark.parametrize(
    ("leave", "said"),
    [
        (lambda folder: (folder / "x").symlink_to("/etc/passwd"), "leaves 'x', a symbolic link out of the folder"),
        (lambda folder: (folder / "sub").symlink_to("/etc"), "leaves 'sub', a symbolic link out of the folder"),
        (lambda folder: os.mkfifo(folder / "x"), "leaves 'x', not a regular file but a named pipe"),
        (lambda folder: (folder / "a\\b").write_text("x"), r"leaves 'a\\b', which is not a path inside the folder"),
        (lambda folder: (folder / "Config.JSON").write_text("x"), "'Config.JSON', a name that the checkpoint uses"),
        (lambda folder: (folder / "readme.md").write_text("x"), "'readme.md', a name that the checkpoint uses"),
    ],
)
def test_what_a_healing_method_leaves_is_a_file_of_its_own(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, leave: Callable[[Path], object], said: str
) -> None:
    monkeypatch.setattr(heal_tiny, "Attaching", Attaching, raising=False)
    monkeypatch.setitem(HEALERS.builtin, "scaling", "heal_tiny:Attaching")
    monkeypatch.setattr(Attaching, "leave", staticmethod(leave))
    with pytest.raises(ExportError) as error:
        heal(home / "pruned-2-4", tmp_path / "healed", method="scaling")
    assert said in str(error.value)
    assert not (tmp_path / "healed").exists()


READ = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.mark.parametrize("name", [*READ, "additional_chat_templates/a.jinja", "adapter_config.json"])
@pytest.mark.parametrize("how", [link_out, pipe])
def test_a_base_is_not_read_through_a_link_or_a_pipe(
    home: Path, base: Path, outside: Path, how: Callable[[Path, Path], None], name: str
) -> None:
    plan = families.make_plan(base, Removal.of(2))
    (base / name).parent.mkdir(exist_ok=True)
    how(base / name, outside)
    before = state(base.parent)
    plan.save(outside / "plan.json")
    for words in (
        ["inspect", base], ["export", outside / "plan.json", "-o", base.parent / "out"],
        ["plan", base, "--metric", "random", "--drop", 1, "-o", base.parent / "run"],
        ["plan", base, "--tasks", "toy", "--include-path", home / "tasks", "--front", "-o", base.parent / "run"],
    ):  # fmt: skip
        assert name in refused(*words)
    (outside / "plan.json").unlink()
    assert state(base.parent) == before


@pytest.mark.parametrize("how", [link_out, pipe])
def test_a_card_that_is_none_leaves_the_new_one_without_licence_and_says_so(
    base: Path, outside: Path, tmp_path: Path, how: Callable[[Path, Path], None]
) -> None:
    (outside / "x").write_text(f"---\nlicense: mit\n---\n{SECRET}\n")
    how(base / "README.md", outside)
    said, progress = list[str](), Silent()
    progress.note = said.append  # type: ignore[method-assign]
    export(families.make_plan(base, Removal.of(2)), tmp_path / "out", progress=progress)
    assert any("README.md" in line and "add them by hand" in line for line in said)
    card = (tmp_path / "out" / "README.md").read_text()
    assert SECRET not in card
    assert "license:" not in card


@pytest.mark.parametrize("how", [link_out, pipe])
@pytest.mark.parametrize("name", ["LICENSE", "License.md", "quantize_config.json"])
def test_what_would_be_carried_along_is_refused(
    base: Path, outside: Path, tmp_path: Path, how: Callable[[Path, Path], None], name: str
) -> None:
    plan = families.make_plan(base, Removal.of(2))
    how(base / name, outside)
    with pytest.raises(CheckpointError, match=f"{name}, .*refused"):
        export(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_left_behind_may_be_anything_and_is_named(base: Path, outside: Path, tmp_path: Path) -> None:
    link_out(base / "notes.md", outside)
    pipe(base / "params.json", outside)
    (base / "data").symlink_to(outside)
    said, progress = list[str](), Silent()
    progress.note = said.append  # type: ignore[method-assign]
    receipt = export(families.make_plan(base, Removal.of(2)), tmp_path / "out", progress=progress)
    assert receipt.dropped_files == ("data", "notes.md", "params.json")
    assert "left out, not known as part of a model: data, notes.md, params.json" in said


def test_a_name_that_no_document_can_hold(base: Path, tmp_path: Path) -> None:
    plan = families.make_plan(base, Removal.of(2))
    (base / "a\nb.txt").write_text("x")
    with pytest.raises(CheckpointError, match=r"holds 'a\\nb\.txt', .*; rename or remove it"):
        export(plan, tmp_path / "out")


def test_a_folder_from_the_hub_s_cache_is_verified_and_healed(pruned: Path, tmp_path: Path) -> None:
    """Its files are links into the cache's own blobs."""
    cache = tmp_path / "models--me--smaller"
    snapshot = cache / "snapshots" / "abc"
    (cache / "blobs").mkdir(parents=True)
    for number, path in enumerate(path for path in sorted(pruned.rglob("*")) if path.is_file()):
        shutil.copyfile(path, cache / "blobs" / str(number))
        target = snapshot / path.relative_to(pruned)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(os.path.relpath(cache / "blobs" / str(number), target.parent))
    assert verify(snapshot).problems == ()
    heal(snapshot, tmp_path / "healed", method="scaling")
    assert verify(tmp_path / "healed").problems == ()
    assert not any(path.is_symlink() for path in (tmp_path / "healed").rglob("*"))
    assert push(snapshot, "me/x", dry_run=True).files.keys() == {
        *Receipt.load(pruned / "layerprune/receipt.json").files,
        *("README.md", "report.html", "layerprune/plan.json", "layerprune/receipt.json", "layerprune/audit.json"),
    }


def test_a_front_is_not_written_through_a_link(home: Path, tmp_path: Path, outside: Path) -> None:
    (outside / "plan-09.json").write_text("mine")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "front").symlink_to(outside)
    before = state(tmp_path)
    words = ["plan", home / "base", "--tasks", "toy", "--include-path", home / "tasks", "--front", "--up-to", "50%"]
    assert "run/front/front.json, a symbolic link out of the folder; refused" in refused(*words, "-o", tmp_path / "run")
    assert state(tmp_path) == before
