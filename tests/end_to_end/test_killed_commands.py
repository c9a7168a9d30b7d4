"""kill -9 at any moment of audit, heal, run and plan --front: repeated, the command leaves the same files."""

from __future__ import annotations

import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

import audit_tiny
import cli_tiny
import heal_tiny
from kill_server import Server, contents, serving
from layerprune.auditor.verification import verify

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kill -9 and fork are POSIX")

COMMANDS = ("audit", "heal", "run", "front")
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in COMMANDS]
ATTEMPTS = 20
FINISHED = "exists"  # what a command that had finished before the kill says when it is repeated


@dataclass(frozen=True)
class Killable:
    """One command: its words, the folder it starts from, and the one it works in."""

    words: list[object]
    start: Path
    work: Path
    checkpoints: tuple[str, ...]  # exported folders below ``work`` that must verify

    def begin(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.start, self.work)

    def files(self) -> dict[str, bytes]:
        """All but the journal, whose lines may come in other portions."""
        return contents(self.work, lambda name: not name.endswith("journal.jsonl"))

    def check(self, wanted: dict[str, bytes]) -> None:
        found = self.files()
        assert found.keys() == wanted.keys()
        assert [name for name in wanted if found[name] != wanted[name]] == []
        for name in self.checkpoints:
            assert verify(self.work / name).problems == ()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = cli_tiny.make(tmp_path_factory.mktemp("killed"))
    heal_tiny.pruned(folder, 2, 4)
    prose = heal_tiny.prose(folder / "prose.txt")
    audit_tiny.eval_set(folder / "base", folder / "tasks", "few", test=24, train=60)
    (folder / "recipe.yaml").write_text(
        f"model: {folder / 'base'}\ninclude_path: [{folder / 'tasks'}]\nscore:\n  tasks: few\nplan:\n  drop: 2\n"
        f"heal:\n  method: scaling:factor=0.5\n  corpus: {prose}\n  window: 32\naudit:\n  generation: false\n"
    )
    return folder


@pytest.fixture(scope="module")
def server(home):
    with serving(home) as running:
        yield running


@pytest.fixture
def killable(home, tmp_path, request):
    start, work = tmp_path / "start", tmp_path / "work"
    start.mkdir()
    tasks = ["--include-path", home / "tasks"]
    if request.param == "audit":
        shutil.copytree(home / "pruned-2-4", start / "pruned")
        words = ["audit", work / "pruned", "--tasks", "few", "--no-generation", *tasks]
        return Killable(words, start, work, ("pruned",))
    if request.param == "heal":
        words = ["heal", home / "pruned-2-4", "-o", work / "healed", "--method", "scaling", "--tasks", "few", *tasks]
        words += ["--corpus", home / "prose.txt", "--window", 32]
        return Killable(words, start, work, ("healed",))
    if request.param == "run":
        words = ["run", home / "recipe.yaml", "-o", work / "run"]
        return Killable(words, start, work, ("run/checkpoint", "run/healed"))
    words = ["plan", home / "base", "--tasks", "few", "--front", "--up-to", 3, *tasks, "-o", work / "run"]
    return Killable(words, start, work, ())


def repeat(server: Server, killable: Killable, wanted: dict[str, bytes]) -> None:
    """Run a command that was killed again; one that had written everything may say that this is there."""
    code, _ = server.run(*killable.words)
    said = server.log.read_text()
    assert code == 0 or (code == 2 and FINISHED in said), said
    killable.check(wanted)


@pytest.mark.parametrize("killable", SLOW, indirect=True)
def test_killed_at_a_random_moment(server, killable):
    killable.begin()
    whole = server.done(*killable.words)
    wanted, moments, hit = killable.files(), random.Random(0), 0
    for number in range(ATTEMPTS):
        killable.begin()
        code, _ = server.run(*killable.words, seconds=whole * (number + moments.random()) / ATTEMPTS)
        hit += code == -9
        repeat(server, killable, wanted)
    print(f"{hit} of {ATTEMPTS} runs of {whole:.1f} s were killed")
    assert hit >= ATTEMPTS // 2, "hardly any run was hit, so this shows nothing"


@pytest.mark.parametrize(
    ("killable", "every"), [("heal", 9), *(pytest.param(name, 1, marks=pytest.mark.slow) for name in COMMANDS)],
    indirect=["killable"],
)  # fmt: skip
def test_killed_where_it_makes_a_change_last(server, killable, every):
    """At each (or some) of the calls that flush, rename or remove a file: where half a step could be left."""
    killable.begin()
    server.done(*killable.words)
    wanted, calls, hit = killable.files(), 0, 0
    while True:
        calls += every
        killable.begin()
        code, _ = server.run(*killable.words, calls=calls)
        repeat(server, killable, wanted)
        if code == 0:  # so many calls are not made
            break
        hit += 1
    print(f"killed at {hit} calls")
    assert hit > 0
