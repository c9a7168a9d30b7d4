"""One run at a time in a run folder."""

import time

import pytest

from disk import held
from layerprune.errors import UsageError
from layerprune.files import locked


def test_a_folder_that_another_process_holds_is_refused_until_it_is_killed(tmp_path):
    with held(tmp_path / "run") as process:
        with pytest.raises(UsageError, match="another layerprune is at work in "), locked(tmp_path / "run"):
            pytest.fail("entered")
        assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
        process.kill()  # as -9 does: the system lets go, and the file that is left keeps nobody out
        process.wait()
        with locked(tmp_path / "run"):
            pass
    assert list((tmp_path / "run").iterdir()) == []  # the folder was not made here


def test_blocks_nest_and_leave_no_trace_of_their_own(tmp_path):
    folder = tmp_path / "a" / "b"
    with locked(folder):
        with locked(folder):
            assert (folder / ".lock").exists()
        assert (folder / ".lock").exists()
    assert list(tmp_path.iterdir()) == []
    with locked(folder):
        (folder / "scores.json").write_text("{}")
    assert [path.name for path in folder.iterdir()] == ["scores.json"]
    with locked(None):
        pass


def test_a_thread_that_comes_second_is_refused_too(tmp_path):
    from threading import Thread

    said = []

    def second():
        try:
            with locked(tmp_path):
                said.append("held")
        except UsageError as error:
            said.append(str(error))

    with locked(tmp_path):
        thread = Thread(target=second)
        thread.start()
        thread.join()
    assert "another layerprune is at work" in said[0]


def test_what_was_held_is_free_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), locked(tmp_path):
        raise ZeroDivisionError
    start = time.monotonic()
    with locked(tmp_path):
        assert time.monotonic() - start < 1
