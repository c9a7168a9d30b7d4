"""One run at a time in a run folder."""

import subprocess
import sys
import time

import pytest

import cli_tiny
from cli_tiny import done, refused
from layerprune.errors import UsageError
from layerprune.files import locked

HOLD = """
import sys, time
from pathlib import Path
from layerprune.files import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder():
    """A process that holds a folder until it is killed."""
    started = []

    def hold(folder):
        process = subprocess.Popen([sys.executable, "-c", HOLD, folder], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_folder_that_another_process_holds_is_refused_in_one_line(holder, tmp_path):
    folder = cli_tiny.make(tmp_path / "home")
    process = holder(tmp_path / "run")
    words = ["plan", folder / "base", "--metric", "random", "--drop", 1, "-o", tmp_path / "run"]
    said = refused(*words)
    assert said == (
        f"another layerprune is at work in {tmp_path / 'run'}; wait until it is done, or give another folder with -o"
    )
    recipe = tmp_path / "recipe.yaml"
    tasks = f"include_path: [{folder / 'tasks'}]\nscore:\n  metric: random\n  tasks: toy\n"
    recipe.write_text(f"model: {folder / 'base'}\n{tasks}plan:\n  drop: 1\n")
    assert "another layerprune is at work" in refused("run", recipe, "-o", tmp_path / "run")
    score = ["score", folder / "base", "--metric", "random", "-o", tmp_path / "run"]
    assert "another layerprune is at work" in refused(*score)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    process.kill()  # as -9 does: the system lets go, and the file that is left keeps nobody out
    process.wait()
    done(*words)
    assert not (tmp_path / "run" / ".lock").exists()


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
