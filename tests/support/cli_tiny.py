"""What tests of the command line stand on: a tiny model, its questions, and commands run through click's runner."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner, Result

import audit_tiny
from layerprune.cli.command import app


def make(folder: Path) -> Path:
    """Lay out ``base/`` (a six-layer llama), ``tasks/`` with the tasks ``toy`` (it is good at) and ``odd`` (chance)."""
    audit_tiny.base_model(folder / "base")
    audit_tiny.eval_set(folder / "base", folder / "tasks", "toy")
    audit_tiny.eval_set(folder / "base", folder / "tasks", "odd", known=0.25)
    return folder


def layerprune(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def done(*words: object) -> Result:
    result = layerprune(*words)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.stderr
    return result


def refused(*words: object) -> str:
    """Run a command that must fail as a user's fault does; return its one line without the prefix."""
    result = layerprune(*words)
    assert result.exit_code == 2, (result.exit_code, result.stdout, result.stderr, result.exception)
    last = result.stderr.splitlines()[-1]
    assert last.startswith("layerprune: "), result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    return last.removeprefix("layerprune: ")


def last_line(*words: object) -> str:
    """Run a command that fails after it has shown progress; return its last line without the prefix."""
    result = layerprune(*words)
    assert result.exit_code == 2, (result.exit_code, result.stderr, result.exception)
    return result.stderr.splitlines()[-1].removeprefix("layerprune: ")
