"""A process that runs layerprune's command line in forks of itself, so that each can be killed -9 and repeated."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SERVER = """
import json, os, signal, sys, types
import torch, transformers, lm_eval.tasks, matplotlib.figure, peft
torch.set_num_threads(1)
from layerprune.cli.command import app
from layerprune.healing import HEALERS
import layerprune.auditor, layerprune.exporter, layerprune.healing.healer, layerprune.planner, layerprune.recipes
sys.path.insert(0, sys.argv[1])
import heal_tiny
HEALERS.builtin["scaling"] = "heal_tiny:Scaling"
layerprune.healing.healer.time = types.SimpleNamespace(monotonic=lambda: 0.0)  # heal.json holds the seconds

def trapped(calls):
    from pathlib import Path
    left = [calls]
    def trap(owner, name):
        real = getattr(owner, name)
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        setattr(owner, name, call)
    for owner, name in ((os, "fsync"), (Path, "replace"), (Path, "rename"), (Path, "unlink")):
        trap(owner, name)

print("ready", flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    child = os.fork()
    if child == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(os.open(asked["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        if asked["calls"]:
            trapped(asked["calls"])
        try:
            app(asked["words"], prog_name="layerprune")
        except SystemExit as end:
            os._exit(end.code or 0)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Server:
    """Runs one command after the other."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process, self.log = process, log

    def run(self, *words: object, seconds: float | None = None, calls: int = 0) -> tuple[int, float]:
        """Return a command's exit code (-9: killed) and how long it lived.

        It is killed after so many seconds, or at so many calls that make a change on the disk lasting.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        asked = {"words": [str(word) for word in words], "calls": calls, "stderr": str(self.log)}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        child, start = int(self.process.stdout.readline()), time.monotonic()
        if seconds is not None:
            time.sleep(seconds)
            with suppress(ProcessLookupError):  # it was done before
                os.kill(child, signal.SIGKILL)
        code = int(self.process.stdout.readline())
        return code, time.monotonic() - start

    def done(self, *words: object) -> float:
        """Run a command to its end, which must be a good one; return how long it took."""
        code, seconds = self.run(*words)
        assert code == 0, self.log.read_text()
        return seconds


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """Start a server; what its commands say on stderr goes to a file in ``folder``."""
    here = Path(__file__).parent
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(here)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    with process:
        yield Server(process, folder / "stderr.txt")
        process.kill()


def contents(folder: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """Return the content of every file and hidden file below a folder whose name is wanted."""
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    return {name: path.read_bytes() for name, path in paths.items() if wanted(name)}
