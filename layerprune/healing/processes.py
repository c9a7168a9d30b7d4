"""Several processes under ``accelerate launch``: which one leads, and where each computes."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

from layerprune.healing.base import Case

if TYPE_CHECKING:
    from accelerate import PartialState

# That processes wait for each other. torch gives up after 10 minutes on NCCL and 30 on gloo; the base may take hours to
# write answers, or to be asked about every window, while the others wait for the leading process.
PATIENCE = timedelta(days=7)


def leads() -> bool:
    """Whether this process is the one that speaks and writes: the only one, or the first of those launched together."""
    return int(os.environ.get("RANK", "0")) == 0


def leader_first() -> AbstractContextManager[None]:
    """A block that the leading process carries out before the others enter it."""
    return _state().main_process_first() if _together() else nullcontext()


def own_place(case: Case) -> Case:
    """Return the case on this process's own device, where several processes were launched."""
    import torch

    if not _together():
        return case
    return replace(case, device=str(_state(cpu=case.device == "cpu" or not torch.cuda.is_available()).device))


def _state(cpu: bool = False) -> PartialState:
    """Return what accelerate knows of the processes; the first call brings them together, and only its words count."""
    from accelerate import PartialState

    return PartialState(cpu=cpu, timeout=PATIENCE)


def _together() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1
