"""Names of files and what stands behind them: one rule, whoever wrote the name."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from layerprune.errors import CheckpointError, UsageError
from layerprune.files import check_plain, checked_name, contained, listed, refuse_link, same_file

BAD = (
    "", "/", "/etc/passwd", "//server/share", "..", "../x", "a/../b", "a/..", ".", "./a", "a/./b", "a//b", "a/", "a\\b",
    "..\\x", "C:/x", "c:x", "a\0b", "a\nb", "a\x1bb", "a\x7fb", "\ud800", "a ", "a /b", "a.", "a./b", "...", "x" * 256,
    "é" * 128, "a/" * 600 + "a",
)  # fmt: skip
GOOD = ("config.json", ".gitattributes", "a/b/c.json", "1_Pooling/config.json", "mit lizenz.txt", "é.txt", "x" * 255, "a..b", "..a")  # fmt: skip # noqa: E501


@pytest.mark.parametrize("name", BAD, ids=ascii)
def test_what_is_no_name_of_a_file_inside_a_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="which is"):
        checked_name(name)
    with pytest.raises(CheckpointError, match="refused") as error:
        contained(tmp_path, name, source=Path("index.json"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", GOOD)
def test_what_is_one(name: str, tmp_path: Path) -> None:
    assert checked_name(name) == name
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("x")
    assert contained(tmp_path, name) == tmp_path / name
    check_plain(tmp_path)


def special(kind: str, path: Path, outside: Path) -> None:
    """Put something that is no regular file of its folder at ``path``; ``outside`` is a folder with a file ``x``."""
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        here = Path.cwd()
        os.chdir(path.parent)  # the names of sockets are short
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
        os.chdir(here)
    elif kind == "link in":
        (path.parent / "beside").write_text("beside")
        path.symlink_to("beside")
    else:
        targets = {"link out": outside / "x", "dangling": outside / "none", "device": "/dev/zero", "folder": outside}
        path.symlink_to(targets[kind])


@pytest.mark.parametrize("kind", ["pipe", "socket", "link in", "link out", "dangling", "device", "folder"])
def test_what_is_not_a_regular_file_of_the_folder(kind: str, tmp_path: Path) -> None:
    """Nothing is opened: a pipe would block."""
    outside, home = tmp_path / "outside", tmp_path / "home"
    outside.mkdir()
    home.mkdir()
    (outside / "x").write_text("secret")
    special(kind, home / "it", outside)
    for name in ("it", *(["it/x"] if kind == "folder" else [])):
        with pytest.raises(CheckpointError, match="refused"):
            contained(home, name)
        with pytest.raises(CheckpointError, match="refused"):
            check_plain(home, [name])
    with pytest.raises(CheckpointError, match=r"/it, .*refused"):
        check_plain(home)
    assert [name for name, fault in listed(home) if fault] == ["it"]


def test_a_folder_is_no_file_and_an_absent_file_is_plain(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match="not a regular file but a folder"):
        contained(tmp_path, "folder")
    with pytest.raises(CheckpointError, match="does not exist"):
        contained(tmp_path, "nothing/here")
    check_plain(tmp_path, ["nothing", "nothing/here"])


def test_the_hub_s_cache_is_made_of_links(tmp_path: Path) -> None:
    cache = tmp_path / "models--org--name"
    home = cache / "snapshots" / "abc"
    (home / "1_Pooling").mkdir(parents=True)
    (cache / "blobs").mkdir()
    (cache / "blobs" / "123").write_text("{}")
    (home / "config.json").symlink_to("../../blobs/123")
    (home / "1_Pooling" / "config.json").symlink_to("../../../blobs/123")
    check_plain(home)
    assert contained(home, "1_Pooling/config.json").read_text() == "{}"
    (tmp_path / "secret").write_text("secret")
    (cache / "blobs" / "456").symlink_to(tmp_path / "secret")
    (home / "README.md").symlink_to("../../blobs/456")
    with pytest.raises(CheckpointError, match=r"README\.md, a symbolic link out of the folder; refused"):
        check_plain(home)
    (home / "README.md").unlink()
    (home / "sub").symlink_to("../../blobs", target_is_directory=True)
    with pytest.raises(CheckpointError, match="sub, a symbolic link out of the folder; refused"):
        check_plain(home)


def test_what_git_and_the_hub_keep_is_not_listed(tmp_path: Path) -> None:
    for name in (".git/objects/ab/cd", ".cache/huggingface/x", "sub/.git/config", "a"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert [name for name, _ in listed(tmp_path)] == ["a", "sub/.git/config"]


def test_names_that_are_one_file_elsewhere() -> None:
    assert same_file(["a", "b", "A"]) == ("a", "A")
    assert same_file(["a", "b", "a/A"]) is None


def test_a_folder_to_write_into_is_no_link(tmp_path: Path) -> None:
    (tmp_path / "front").symlink_to(tmp_path)
    with pytest.raises(UsageError, match="is a symbolic link"):
        refuse_link(tmp_path / "front")
    refuse_link(tmp_path / "none")


def test_a_folder_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As lost+found on a disk of its own: it is no part of a model, and no reason to stop."""
    (tmp_path / "lost").mkdir()
    (tmp_path / "a").write_text("x")
    scan = os.scandir

    def refuse(path: str | Path) -> object:
        if Path(path).name == "lost":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert list(listed(tmp_path)) == [("a", ""), ("lost", "not a regular file but a folder")]
    with pytest.raises(CheckpointError, match=r"cannot read .*none"):
        list(listed(tmp_path / "none"))
