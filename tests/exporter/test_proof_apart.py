"""What needs torch runs in processes of its own, and answers as if it had run here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from checkout import ROOT, SUPPORT
from families import make_plan, save_tiny
from layerprune.artifacts import Plan, Receipt
from layerprune.errors import ExportError, RefusedError
from layerprune.exporter import export
from layerprune.removal import Removal
from layerprune.util import apart

LARGEST = 300  # MB; the bar for what copies
MODULES = 20  # of the package, at most, whose functions an export runs


@pytest.fixture
def torchless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)


def test_here_where_torch_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", sys)
    assert apart("apart_functions:report", words=["a"]) == {"words": ["a", "ü"], "process": os.getpid()}


@pytest.mark.usefixtures("torchless")
def test_in_another_process_where_it_is_not(capfd: pytest.CaptureFixture[str]) -> None:
    told = apart("apart_functions:report", words=["a"])
    assert told["words"] == ["a", "ü"]
    assert told["process"] != os.getpid()
    out, err = capfd.readouterr()
    assert (out, err) == ("", "libraries talk\n")


@pytest.mark.usefixtures("torchless")
def test_errors_arrive() -> None:
    with pytest.raises(RefusedError, match="layer_types stands in the way"):
        apart("apart_functions:refuse", field="layer_types")
    with pytest.raises(RuntimeError, match="that was to break_down ended with exit code 1"):
        apart("apart_functions:break_down")


@pytest.mark.usefixtures("torchless")
@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX")
def test_a_process_that_is_killed_is_an_error() -> None:
    with pytest.raises(ExportError, match="run_out_of_memory was killed by SIGKILL, most likely for want of memory"):
        apart("apart_functions:run_out_of_memory")


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
def test_it_does_not_outlive_the_one_who_asked(tmp_path: Path, how: signal.Signals) -> None:
    mark = tmp_path / "mark"
    code = "from layerprune.util import apart; import signal, sys; "
    code += "signal.signal(signal.SIGINT, signal.default_int_handler); "  # a background job of a shell ignores it
    code += "apart('apart_functions:dawdle', mark=sys.argv[1])"
    paths = os.pathsep.join([str(SUPPORT), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": paths}
    asking = subprocess.Popen([sys.executable, "-c", code, str(mark)], env=environment, stderr=subprocess.PIPE)
    assert wait_for(lambda: mark.exists() and mark.read_text())
    asking.send_signal(how)
    asking.communicate()
    assert wait_for(lambda: not alive(int(mark.read_text())))


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for(done: object, seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not done():  # type: ignore[operator]
        time.sleep(0.05)
    return bool(done())  # type: ignore[operator]


EXPORT = """
import json, sys
from pathlib import Path
from layerprune.artifacts import Plan
from layerprune.errors import RefusedError
from layerprune.exporter import export
plan, ran = Plan.load(Path(sys.argv[1])), set()
sys.setprofile(lambda frame, event, _: ran.add(frame.f_globals.get("__name__", "")) if event == "call" else None)
export(plan, Path(sys.argv[2]), base=sys.argv[3])
sys.setprofile(None)
status = Path("/proc/self/status").read_text()
peak = int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024
ours = [name for name in sys.modules if name.partition(".")[0] == "layerprune"]
ran = [name for name in ran if name.partition(".")[0] == "layerprune"]
print(json.dumps({"torch": "torch" in sys.modules, "peak": peak, "ours": ours, "ran": ran}))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak of memory from /proc")
def test_the_process_that_copies_needs_no_torch(tmp_path: Path) -> None:
    base = save_tiny("llama", tmp_path / "base")
    plan = make_plan(base, Removal.of(1, 4)).save(tmp_path / "plan.json")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", EXPORT, str(plan), str(tmp_path / "out"), str(base)]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    told = json.loads(done.stdout)
    assert told["torch"] is False
    assert told["peak"] < LARGEST
    assert len(told["ran"]) <= MODULES, sorted(told["ran"])
    assert not {"layerprune.exporter.proof", "layerprune.architecture", "layerprune.models"} & {*told["ours"]}
    export(Plan.load(plan), tmp_path / "here" / "out")
    outs = (tmp_path / "out", tmp_path / "here" / "out")
    receipts = [Receipt.load(out / "layerprune" / "receipt.json") for out in outs]
    assert receipts[0] == receipts[1]
