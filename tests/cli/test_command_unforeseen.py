"""The last resort: a fault that nothing foresaw ends in one line, and in a file with what is needed to mend it."""

import re
from pathlib import Path

import pytest

from cli_tiny import layerprune, refused
from layerprune import api


class Panic(BaseException):
    """What a library in Rust raises is no Exception."""


FAULTS = [KeyError("path"), RecursionError("maximum"), Panic("unwrap\non None"), MemoryError()]


@pytest.mark.parametrize("error", FAULTS)
def test_it_ends_in_one_line_that_names_command_fault_and_file(monkeypatch, tmp_path, error):
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(api, "inspect", fail)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    said = refused("inspect", "somewhere")
    assert said.startswith(f"inspect stopped at what it does not expect: {type(error).__name__}: ")
    told = Path(re.fullmatch(r".*report it with (\S+)", said)[1]).read_text()
    assert "layerprune 0." in told
    assert "Traceback (most recent call last)" in told
    assert "in fail" in told


def test_no_token_goes_into_the_file_and_a_disk_that_takes_none_is_no_second_fault(monkeypatch, tmp_path):
    def fail(*args, **options):
        raise KeyError("https://me:hf_secretsecret@host/x \ud800")

    monkeypatch.setattr(api, "inspect", fail)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert "secret" not in refused("inspect", "somewhere")
    assert "secret" not in "".join(path.read_text() for path in tmp_path.iterdir())
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    said = refused("inspect", "somewhere")
    assert "run it again with -vv and report what it says (no file could be written: [Errno 2]" in said


def test_twice_verbose_shows_the_traceback_too(monkeypatch, tmp_path):
    def fail(*args, **options):
        raise KeyError("path")

    monkeypatch.setattr(api, "inspect", fail)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    result = layerprune("inspect", "somewhere", "-vv")
    assert result.exit_code == 2
    assert "Traceback (most recent call last)" in result.stderr


def test_names_are_shown_without_what_moves_the_cursor(tmp_path):
    said = refused("inspect", f"{tmp_path}/\x1b[31mred\nline")
    assert said == f"{tmp_path}/\\x1b[31mred\\nline does not exist; expected a local folder or a Hub id like 'org/name'"


def test_a_token_in_what_was_typed_is_not_repeated():
    assert "secret" not in refused("inspect", "https://me:hf_secretsecret@host/org/name")
