import os
import time

import pytest

from demo.cache import STALE_SECONDS, FetchError, cache_dir, finished_folder


def test_the_cache_folder_is_the_override_else_the_xdg_one_else_below_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("LAYERPRUNE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_dir() == tmp_path / ".cache" / "layerprune"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "layerprune"
    monkeypatch.setenv("LAYERPRUNE_CACHE", "~/elsewhere")
    assert cache_dir() == tmp_path / "elsewhere"
    assert list(tmp_path.iterdir()) == []  # asking creates nothing


def test_a_finished_folder_appears_whole_and_readable(tmp_path):
    target = tmp_path / "a" / "model"
    with finished_folder(target) as partial:
        (partial / "file").write_text("x")
        assert not target.exists()
    assert (target / "file").read_text() == "x"
    assert target.stat().st_mode & 0o777 == 0o755
    assert [path.name for path in target.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("fault", [RuntimeError("x"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing(tmp_path, fault):
    def fill():
        with finished_folder(tmp_path / "model") as partial:
            (partial / "file").write_text("half")
            raise fault

    with pytest.raises(type(fault)):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    with pytest.raises(FetchError, match=r"cannot write .*model: .*No space left"), finished_folder(tmp_path / "model"):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_who_finishes_second_keeps_the_first_result(tmp_path):
    target = tmp_path / "model"
    with finished_folder(target) as slow:
        (slow / "file").write_text("slow")
        with finished_folder(target) as quick:
            (quick / "file").write_text("quick")
    assert (target / "file").read_text() == "quick"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_a_killed_process_left_is_removed_and_what_a_running_one_fills_is_not(tmp_path):
    old, running = tmp_path / ".partial-old", tmp_path / ".partial-running"
    for folder in (old, running):
        folder.mkdir()
    long_ago = time.time() - STALE_SECONDS - 1
    os.utime(old, (long_ago, long_ago))
    with finished_folder(tmp_path / "model"):
        pass
    assert not old.exists()
    assert running.exists()


def test_another_process_finishing_while_stale_folders_are_looked_for_is_no_fault(tmp_path):
    (tmp_path / ".partial-gone").symlink_to(tmp_path / "nowhere")  # listed, and not there when looked at
    with finished_folder(tmp_path / "model"):
        pass
    assert (tmp_path / "model").is_dir()


def test_a_cache_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FetchError, match=r"cannot use the cache folder .*LAYERPRUNE_CACHE"):
        finished_folder(tmp_path / "file" / "models" / "x").__enter__()
