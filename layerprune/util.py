"""Small things that every room uses: progress, the versions of tools, and a function run in a process of its own."""

from __future__ import annotations

import inspect
import json
import os
import pkgutil
import platform
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from layerprune import __version__
from layerprune.errors import ExportError, LayerpruneError, UsageError

# Which tools made a figure.


JUDGING = ("torch", "transformers", "lm_eval", "datasets")  # have a say in every judgement of a removal


def tool_versions(*packages: str) -> dict[str, str]:
    """Return the versions of layerprune, of Python and of ``packages`` (those that judge removals, unless named)."""
    tools = {name: version(name) for name in packages or JUDGING}
    return {"layerprune": __version__, "python": platform.python_version(), **tools}


def source_of(value: Any) -> str | None:
    """Return the name of a function or class and the text of the file it stands in; None for what stands in none.

    The whole file: it may call what stands beside it. What that file imports is not in it.
    """
    try:
        file = inspect.getsourcefile(value)
        return value.__qualname__ + "\n" + Path(file).read_text(errors="replace") if file else None
    except (TypeError, OSError, AttributeError):
        return None


# How long work tells whoever waits for it where it is; the command line shows it, a library user may ignore it.


class Advance(Protocol):
    """Called with the amount of work that was just finished, in the unit of the task's total."""

    def __call__(self, amount: float = 1) -> None: ...


class Progress(Protocol):
    """Shows named pieces of work, each with a total, and remarks between them."""

    def task(self, description: str, total: float | None, unit: str = "") -> AbstractContextManager[Advance]: ...

    def note(self, message: str) -> None: ...


class Silent:
    """A progress that shows nothing: the default for library use."""

    def task(self, description: str, total: float | None, unit: str = "") -> AbstractContextManager[Advance]:
        return nullcontext(lambda amount=1: None)

    def note(self, message: str) -> None:
        return None


SILENT = Silent()


class Bars:
    """Bars of tqdm: on a terminal and in a notebook. Bars of inner tasks go away when they end."""

    def __init__(self) -> None:
        self._open = 0

    @contextmanager
    def task(self, description: str, total: float | None, unit: str = "") -> Iterator[Advance]:
        from tqdm.auto import tqdm

        bar = tqdm(total=total, desc=description, unit=f" {unit}" if unit else "", leave=self._open == 0)
        self._open += 1
        try:
            yield lambda amount=1: bar.update(amount)
        finally:
            self._open -= 1
            bar.close()

    def note(self, message: str) -> None:
        from tqdm.auto import tqdm

        tqdm.write(message, file=sys.stderr)


# What may never end: a template or a pattern that came with a model.


@contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Raise ``UsageError``, naming ``what``, where the block takes longer.

    By a signal, which only the main thread of a Unix process gets: elsewhere there is no limit.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or not hasattr(signal, "setitimer") or signal.getitimer(signal.ITIMER_REAL)[0]:
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise UsageError(f"{what} has not ended after {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# What needs torch, done in a process of its own, so that the one that copies weights stays small.
#
# Importing torch and transformers takes most of 400 MB, and the proof a whole model's memory; copying takes none. The
# process is given back before the copy begins. Where torch is loaded already there is nothing to save: it is done here.


# The path is handed over before anything is imported: -c alone would look into the working directory first.
CHILD = "import sys; sys.path[:] = sys.argv[2:]; from layerprune.util import answer; answer(sys.argv[1])"


def apart(function: str, **arguments: Any) -> dict[str, Any]:
    """Return ``function(**arguments)``, called in a process of its own unless this one has torch already.

    ``function`` is named as ``module:name``, so that its module is imported only there. Arguments and result are what
    JSON can say. A ``LayerpruneError`` raised there is raised here. A process that is killed (out of memory) is an
    ``ExportError``.
    """
    if "torch" in sys.modules:
        return _call(function, arguments)
    request = json.dumps({"function": function, "arguments": arguments})
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
        asked, code = f"the process that was to {function.partition(':')[2]}", child.returncode
        if code >= 0:
            raise RuntimeError(f"{asked} ended with exit code {code}; what it said stands above")
        how = f"was killed by {signal.Signals(-code).name}, most likely for want of memory"
        raise ExportError(f"{asked} {how}; nothing was left behind")
    told: dict[str, Any] = json.loads(said)
    if "error" in told:
        kind, message = told["error"]
        raise pkgutil.resolve_name(kind)(message)
    result: dict[str, Any] = told["result"]
    return result


def answer(request: str) -> None:
    """Answer one request on stdout and end; runs in the process that ``apart`` starts."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both; the one who asked ends this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)  # what libraries print goes to stderr, instead of the real stdout
        try:
            told = {"result": _call(**json.loads(request))}
        except LayerpruneError as error:
            told = {"error": [f"{type(error).__module__}:{type(error).__qualname__}", str(error)]}
        json.dump(told, out)


def _call(function: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the result as it arrives over the pipe, so that both ways give the same."""
    plain: dict[str, Any] = json.loads(json.dumps(pkgutil.resolve_name(function)(**arguments)))
    return plain


def _end_with_parent() -> None:
    os.read(0, 1)  # returns when the other end is closed: kill -9 closes it, too
    os.kill(os.getpid(), signal.SIGTERM)
