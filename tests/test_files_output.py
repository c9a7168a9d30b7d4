"""Folders that are written to: tried for room, published whole or not at all, and never behind a link."""

from __future__ import annotations

import os

import pytest

import audit_samples
from disk import limited, tree
from layerprune.errors import CheckpointError, UsageError, WriteError
from layerprune.files import READY, check_apart, locked, published_together, settle, try_folder


def test_a_folder_is_tried_for_room_too(tmp_path):
    try_folder(tmp_path)
    with limited(1000), pytest.raises(WriteError, match="File too large"):
        try_folder(tmp_path)
    assert tree(tmp_path) == []


def test_a_link_into_a_models_folder_is_seen_through(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "base")
    with pytest.raises(UsageError, match="lies inside"):
        check_apart(tmp_path / "link" / "run", tmp_path / "base")
    check_apart(tmp_path / "base-2", tmp_path / "base", "org/name", None)


def test_what_is_published_together_is_all_there_or_nothing(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "a.json").write_text("old")
    with pytest.raises(ZeroDivisionError), published_together(folder) as new:  # noqa: PT012
        (new / "a.json").write_text("new")
        raise ZeroDivisionError
    assert tree(folder) == ["a.json"]
    assert (folder / "a.json").read_text() == "old"
    with published_together(folder) as new:
        (new / "front").mkdir()
        (new / "front" / "b.json").write_text("b")
        (new / "a.json").write_text("new")
        assert (folder / "a.json").read_text() == "old"
    assert tree(folder) == ["a.json", "front", "front/b.json"]
    assert (folder / "a.json").read_text() == "new"


def test_a_run_folder_completes_what_a_killed_run_had_begun_to_publish(tmp_path):
    folder = tmp_path / "run"
    for place in (folder / READY / "front", folder / "front"):
        place.mkdir(parents=True)
    (folder / READY / "scores.json").write_text("new")
    (folder / READY / "front" / "front.json").write_text("front")
    (folder / "scores.json").write_text("old")
    with locked(folder):
        assert tree(folder) == [".lock", "front", "front/front.json", "scores.json"]
    assert (folder / "scores.json").read_text() == "new"
    (folder / ".layerprune-staged").mkdir()
    (folder / ".layerprune-staged" / "scores.json").write_text("half")
    settle(folder)
    assert tree(folder) == ["front", "front/front.json", "scores.json"]


@pytest.mark.parametrize("name", [READY, ".layerprune-staged", f"{READY}/front"])
def test_nothing_is_taken_from_or_published_behind_a_link(tmp_path, name):
    folder, other = tmp_path / "run", tmp_path / "other"
    other.mkdir()
    if name.endswith("front"):
        (folder / name).mkdir(parents=True)
        (folder / name / "front.csv").write_text("planted")
        (folder / "front").symlink_to(other)
    else:
        (other / "thesis.txt").write_text("mine")
        folder.mkdir()
        (folder / name).symlink_to(other)
    before = tree(other)
    with pytest.raises(UsageError, match="is a symbolic link; remove it"):
        settle(folder)
    assert tree(other) == before
    assert not (folder / "thesis.txt").exists()


@pytest.mark.parametrize("name", ["scores.json", "recipe.json", "journal.jsonl", "answers.jsonl", "front/front.json"])
def test_a_run_folder_whose_documents_are_elsewhere_is_refused(tmp_path, name):
    outside = tmp_path / "outside"
    outside.write_text("no line ends here")
    for make in (lambda path: path.symlink_to(outside), os.mkfifo):  # a read of a named pipe would never end
        folder = tmp_path / make.__name__.strip("<>")
        (folder / name).parent.mkdir(parents=True)
        make(folder / name)
        with pytest.raises(CheckpointError, match=f"{name}, .*(link|pipe).*; refused"), locked(folder):
            pytest.fail("entered")
    assert outside.read_text() == "no line ends here"


def test_nothing_is_published_over_a_folder(tmp_path):
    (tmp_path / "a.json").mkdir()
    with pytest.raises(UsageError, match=r"a\.json is a folder"), published_together(tmp_path) as new:
        (new / "a.json").write_text("new")
    assert tree(tmp_path) == ["a.json"]


def test_a_written_document_is_never_written_through_a_link(tmp_path):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / ".plan.json.partial").symlink_to(tmp_path / "victim")
    audit_samples.plan().save(tmp_path / "plan.json")
    assert (tmp_path / "victim").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json", "victim"]
