"""Progress in logs and on terminals, and how figures are spelled."""

import io
import re
import sys

import pytest

from layerprune.cli.console import Console, PlainProgress, duration, number, state, table


class Clock:
    """A clock that tests move."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def plain():
    clock, stream = Clock(), io.StringIO()
    return PlainProgress(stream, clock), clock, stream


def test_a_log_gets_a_line_every_ten_seconds_with_the_time_left(plain):
    progress, clock, stream = plain
    with progress.task("scoring", 100, "layers") as advance:
        for _ in range(25):
            clock.now += 1
            advance()
    assert stream.getvalue().splitlines() == [
        "scoring: 10/100 layers, 10 %, 1 layers/s, 1 min 30 s left",
        "scoring: 20/100 layers, 20 %, 1 layers/s, 1 min 20 s left",
        "scoring: 25/100 layers in 25 s",
    ]


def test_short_inner_tasks_leave_no_line_in_a_log(plain):
    progress, clock, stream = plain
    with progress.task("rounds", 2) as advance:
        for _ in range(2):
            with progress.task("inner", 3) as inner:
                inner(3)
            clock.now += 1
            advance()
    assert stream.getvalue() == "rounds: 2/2 in 2.0 s\n"


def test_a_task_that_fails_is_not_reported_as_done(plain):
    progress, _, stream = plain
    with pytest.raises(ValueError, match="broken"), progress.task("scoring", 3):
        raise ValueError("broken")
    assert stream.getvalue() == ""


def test_remarks_go_to_the_log_as_they_are(plain):
    progress, _, stream = plain
    progress.note("path: [tree] of 3")
    assert stream.getvalue() == "path: [tree] of 3\n"


def test_bars_show_and_nest(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    progress = Console().progress
    with progress.task("outer [x]", 2, "layers") as advance:
        with progress.task("inner", None) as inner:
            inner(5)
        progress.note("a remark [in brackets]")
        advance(2)
    progress.note("after")
    shown = capsys.readouterr().err
    assert "outer [x]" in shown
    assert "2/2 layers, 100 %" in shown
    assert "a remark [in brackets]" in shown
    assert shown.endswith("after\n")


def test_quiet_shows_nothing(capsys):
    progress = Console(-1).progress
    with progress.task("scoring", 1) as advance:
        advance()
    progress.note("remark")
    assert capsys.readouterr() == ("", "")


def test_results_are_not_cut_off_in_a_pipe(capsys):
    Console().print("x" * 300, "[not markup]")
    assert capsys.readouterr().out == "x" * 300 + " [not markup]\n"


def test_figures_are_not_cut_off_on_a_narrow_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "40")
    tasks = [f"task_{number}" for number in range(12)]
    made = table("many tasks", *tasks)
    made.add_row(*(f"-0.{number:04d} … 0.9999" for number in range(12)))
    Console().print(made)
    shown = capsys.readouterr().out
    assert all(f"-0.{number:04d} … 0.9999" in shown for number in range(12))


def test_words_wrap_on_a_narrow_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "40")
    made = table("words", "name", "what", wrapped=["what"])
    made.add_row("cosine", "how much a layer turns the hidden states that go through it")
    Console().print(made)
    lines = re.sub(r"\x1b\[\d+m", "", capsys.readouterr().out).splitlines()
    assert max(map(len, lines)) <= 40
    assert "through it" in " ".join(" ".join(lines).split())


@pytest.mark.parametrize(
    ("done", "total", "seconds", "text"),
    [
        (0, 30, 5, "0/30 layers, 0 %"),
        (12, 30, 6, "12/30 layers, 40 %, 2 layers/s, 9.0 s left"),
        (1, 4, 60, "1/4 layers, 25 %, 1 min 0 s each, 3 min 0 s left"),
        (30, 30, 10, "30/30 layers, 100 %, 3 layers/s"),
        (7, None, 2, "7 layers, 3.5 layers/s"),
    ],
)
def test_state_in_words(done, total, seconds, text):
    assert state(done, total, seconds, "layers") == text


def test_figures_are_short():
    figures = {0.25: "0.25", 3: "3", 31400: "31,400", 4.2e6: "4.2 M", 7e9: "7.0 G", 2e12: "2.0 T"}
    assert {value: number(value) for value in figures} == figures
    times = {0.44: "0.4 s", 14.2: "14 s", 59.6: "1 min 0 s", 200: "3 min 20 s", 7500: "2 h 5 min"}
    assert {seconds: duration(seconds) for seconds in times} == times


def test_what_is_shown_moves_no_cursor(plain, capsys):
    progress, _, stream = plain
    progress.note("\x1b[31mred")
    assert stream.getvalue() == "\\x1b[31mred\n"
    Console().print("\x1b[31mred", table("\x1b[2J", "one", rows=[["\x1b[1mbold"]]))
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "\\x1b[31mred" in shown
    assert "\\x1b[2J" in shown
    assert "\\x1b[1mbold" in shown
