"""Files hashed while they are written: the hash is of the finished file, and nobody waits for a writer that failed."""

from __future__ import annotations

import hashlib
import threading
import time
from pathlib import Path

import pytest

from layerprune.checkpoint import writer
from layerprune.checkpoint.writer import following


def write_slowly(path: Path, pieces: list[bytes]) -> None:
    with path.open("wb", buffering=0) as file:
        for piece in pieces:
            file.write(piece)
            time.sleep(0.01)  # longer than a poll: the reader comes to the end many times before it is the end


def test_the_hash_is_that_of_the_finished_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "CHUNK_BYTES", 100)
    flushed = []
    monkeypatch.setattr(writer, "flush_to_disk", lambda path: flushed.append(path.name))
    paths = [tmp_path / "a", tmp_path / "b", tmp_path / "empty"]
    contents = [[bytes([n]) * (70 * n) for n in range(1, 9)], [b"b" * 1000, b"", b"c"], []]
    with following(paths) as followed:
        for path, pieces in zip(paths, contents, strict=True):
            write_slowly(path, pieces)
            followed.complete(path)
        found = followed.entries()
    assert sorted(flushed) == ["a", "b", "empty"]
    for path, pieces in zip(paths, contents, strict=True):
        whole = b"".join(pieces)
        assert (found[path].sha256, found[path].bytes) == (hashlib.sha256(whole).hexdigest(), len(whole))


def test_a_writer_that_fails_is_not_waited_for(tmp_path: Path) -> None:
    said = []

    def fail() -> None:
        try:
            with following([tmp_path / "a", tmp_path / "b"]):
                (tmp_path / "a").write_bytes(b"half")
                raise OSError("the disk is gone")
        except OSError as error:
            said.append(str(error))

    thread = threading.Thread(target=fail, daemon=True)
    thread.start()
    thread.join(20)
    assert said == ["the disk is gone"]


def test_what_waits_to_be_flushed_is_not_flushed_for_a_writer_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed, going, abandoned = [], threading.Event(), threading.Event()
    real = writer.FollowedFile.abandon

    def slow(path: Path) -> None:
        flushed.append(path.name)
        going.set()
        abandoned.wait(20)

    def abandon(followed: writer.FollowedFile) -> None:
        real(followed)
        abandoned.set()

    monkeypatch.setattr(writer, "flush_to_disk", slow)
    monkeypatch.setattr(writer.FollowedFile, "abandon", abandon)
    paths = [tmp_path / name for name in "abcd"]

    def write() -> None:
        with following(paths) as followed:
            for path in paths:
                path.write_bytes(b"data")
                followed.complete(path)
            assert going.wait(20)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert flushed == ["a"]  # it was under way


def test_a_flush_that_fails_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(writer, "flush_to_disk", full)
    (tmp_path / "a").write_bytes(b"data")
    with following([tmp_path / "a"]) as followed:
        followed.complete(tmp_path / "a")
        with pytest.raises(OSError, match="No space"):
            followed.entries()
