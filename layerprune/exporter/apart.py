"""What needs torch, done in a process of its own, so that the one that copies weights stays small.

Importing torch and transformers takes most of 400 MB, and the proof a whole model's memory; copying takes none. The
process is given back before the copy begins. Where torch is loaded already there is nothing to save: it is done here.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import IO, Any

from layerprune.errors import ExportError, LayerpruneError

# The path is handed over before anything is imported: -c alone would look into the working directory first.
CHILD = "import sys; sys.path[:] = sys.argv[2:]; from layerprune.exporter.apart import answer; answer(sys.argv[1])"


def apart(function: Callable[..., dict[str, Any]], **arguments: Any) -> dict[str, Any]:
    """Return ``function(**arguments)``, called in a process of its own unless this one has torch already.

    Arguments and result are what JSON can say. A ``LayerpruneError`` raised there is raised here. A process that is
    killed (out of memory) is an ``ExportError``.
    """
    if "torch" in sys.modules:
        return _plain(function(**arguments))
    request = json.dumps({"function": f"{function.__module__}:{function.__qualname__}", "arguments": arguments})
    command = [sys.executable, "-c", CHILD, request, *sys.path]
    # Its stdin stays open and silent: it is how the process knows that this one still lives.
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8") as child:
        assert child.stdout is not None
        try:
            said = child.stdout.read()
            child.wait()  # before its stdin is closed, which would end it
        except BaseException:
            child.kill()
            raise
    if not said:
        raise _silent(function.__name__, child.returncode)
    told: dict[str, Any] = json.loads(said)
    if "error" in told:
        module, kind, message = told["error"]
        raise getattr(importlib.import_module(module), kind)(message)
    result: dict[str, Any] = told["result"]
    return result


def answer(request: str) -> None:
    """Answer one request on stdout and end; runs in the process that ``apart`` starts."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both; the one who asked ends this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with _kept_stdout() as out:
        asked = json.loads(request)
        module, _, name = asked["function"].partition(":")
        try:
            told = {"result": _plain(getattr(importlib.import_module(module), name)(**asked["arguments"]))}
        except LayerpruneError as error:
            told = {"error": [type(error).__module__, type(error).__name__, str(error)]}
        json.dump(told, out)


def _plain(result: dict[str, Any]) -> dict[str, Any]:
    """Return the result as it arrives over the pipe, so that both ways give the same."""
    plain: dict[str, Any] = json.loads(json.dumps(result))
    return plain


def _silent(name: str, code: int) -> Exception:
    if code < 0:
        how = f"was killed by {signal.Signals(-code).name}, most likely for want of memory"
        return ExportError(f"the process that was to {name} {how}; nothing was left behind")
    return RuntimeError(f"the process that was to {name} ended with exit code {code}; what it said stands above")


def _end_with_parent() -> None:
    os.read(0, 1)  # returns when the other end is closed: kill -9 closes it, too
    os.kill(os.getpid(), signal.SIGTERM)


def _kept_stdout() -> IO[str]:
    """Return the real stdout, and let what libraries print go to stderr instead."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return out
