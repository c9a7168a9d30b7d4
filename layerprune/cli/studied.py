"""From the options of ``layerprune study`` to its folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from layerprune.analysis import WORK, StudyRequest, check_room, study, verdict_of, write_study
from layerprune.cli import options as opt
from layerprune.planning import ScoreRequest
from layerprune.progress import Progress


def studied(model: str, output: Path, progress: Progress, options: Mapping[str, Any]) -> tuple[str, list[Path]]:
    """Do a study and write it; return its summary and the files to look at."""
    told = opt.given(options)
    own = {name: told.pop(name) for name in {field.name for field in fields(StudyRequest)} & told.keys()}
    request = StudyRequest(score=ScoreRequest(model=model, **told), **own)
    check_room(output)
    found = study(request, output / WORK, progress=progress)
    return verdict_of(found), write_study(found, output)
