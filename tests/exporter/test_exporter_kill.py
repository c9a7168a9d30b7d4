"""kill -9 at random moments of an export: either nothing stands at the place, or the whole folder."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from families import make_plan, save_tiny
from layerprune.artifacts import Plan, Receipt
from layerprune.checkpoint import Checkpoint
from layerprune.removal import Removal

# Forks for every line. With torch imported once, an export is over in a blink and all of it runs in the process that
# is killed; without, it starts others for what needs torch, as the command line does.
SERVER = """
import os, sys
from pathlib import Path
if sys.argv[2] == "here":
    import torch, transformers
    torch.set_num_threads(1)
from layerprune.artifacts import Plan
from layerprune.exporter import export
plan = Plan.load(Path(sys.argv[1]))
print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        export(plan, Path(line.strip()), base=sys.argv[3])
        os._exit(0)
    print(child, flush=True)
    os.waitpid(child, 0)
    print("over", flush=True)
"""

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="kill -9 and fork are POSIX")


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    base = save_tiny("llama", tmp_path / "base")
    return make_plan(base, Removal.of(1, 4)).save(tmp_path / Plan.filename)


@pytest.fixture
def server(plan_file: Path, place: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, plan_file, place, plan_file.parent / "base"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    with process:
        yield process
        process.kill()


def attempt(server: subprocess.Popen[str], out: Path, seconds: float | None) -> float:
    """Start an export and kill it after ``seconds`` (None: let it finish); return how long it lived."""
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(f"{out}\n")
    server.stdin.flush()
    child, start = int(server.stdout.readline()), time.monotonic()
    if seconds is not None:
        time.sleep(seconds)
        with suppress(ProcessLookupError):  # it was done before
            os.kill(child, signal.SIGKILL)
    assert server.stdout.readline() == "over\n"
    return time.monotonic() - start


def check_whole(out: Path) -> None:
    receipt = Receipt.load(out / "layerprune" / "receipt.json")
    assert Checkpoint.open(out).fingerprint() == receipt.result.fingerprint
    assert all((out / name).stat().st_size == entry.bytes for name, entry in receipt.files.items())
    assert (out / "README.md").stat().st_size > 0


@pytest.mark.parametrize(
    ("attempts", "place"),
    [(4, "here"), *(pytest.param(20, place, marks=pytest.mark.slow) for place in ("here", "apart"))],
)
def test_killed_exports(server: subprocess.Popen[str], tmp_path: Path, attempts: int) -> None:
    out, moments = tmp_path / "out", random.Random(0)
    whole = max(attempt(server, tmp_path / f"warm{i}", None) for i in range(2))
    shutil.rmtree(tmp_path / "warm0")
    shutil.rmtree(tmp_path / "warm1")
    nothing = 0
    for number in range(attempts):
        attempt(server, out, whole * (number + moments.random()) / attempts)
        if out.exists():
            check_whole(out)
            shutil.rmtree(out)
        else:
            nothing += 1
    assert nothing >= attempts // 4, "hardly any export was hit while it ran, so this shows nothing"

    attempt(server, out, None)
    check_whole(out)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "out", "plan.json"}, "what killed exports left stays"
