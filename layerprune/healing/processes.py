"""Several processes under ``accelerate launch``: which one leads, and where each computes."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

from layerprune.healing.base import Case


def leads() -> bool:
    """Whether this process is the one that speaks and writes: the only one, or the first of those launched together."""
    return int(os.environ.get("RANK", "0")) == 0


def leader_first() -> AbstractContextManager[None]:
    """A block that the leading process carries out before the others enter it."""
    from accelerate import PartialState

    return PartialState().main_process_first() if _together() else nullcontext()


def own_place(case: Case) -> Case:
    """Return the case on this process's own device, where several processes were launched."""
    import torch
    from accelerate import PartialState

    if not _together():
        return case
    state = PartialState(cpu=case.device == "cpu" or not torch.cuda.is_available())
    return replace(case, device=str(state.device))


def _together() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1
