"""Scoring: what each single removal costs, and the document that says so."""

from __future__ import annotations

from pathlib import Path

from layerprune.documents import Round, Scores
from layerprune.lock import locked
from layerprune.planning.desk import Desk
from layerprune.planning.request import ScoreRequest
from layerprune.planning.slices import Shares
from layerprune.progress import SILENT, Progress
from layerprune.removal import Removal


def score_model(request: ScoreRequest, *, run_folder: Path | None = None, progress: Progress = SILENT) -> Scores:
    """Score every single removal the architecture allows; ``run_folder`` keeps what is measured, for going on."""
    with locked(run_folder):
        desk = Desk.open(request, run_folder, progress)
        desk.bring_items(Shares())
        removals = [Removal.of(*move) for move in desk.constraints.moves]
        candidates = tuple(desk.judge()(removals))
        return desk.scores((Round(removed=(), candidates=candidates),))
