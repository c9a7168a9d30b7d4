"""Scoring: what each single removal costs, and the document that says so."""

from __future__ import annotations

from pathlib import Path

from layerprune.config import ScoreConfig
from layerprune.documents import Round, Scores
from layerprune.errors import UsageError
from layerprune.judgement.stability import no_halves
from layerprune.lock import locked
from layerprune.metrics import METRICS
from layerprune.planners.base import require_one_finite
from layerprune.planning.desk import Desk
from layerprune.planning.slices import Shares
from layerprune.progress import SILENT, Progress
from layerprune.removal import Removal
from layerprune.specs import build
from layerprune.subject import Subject


def score_model(
    request: ScoreConfig,
    *,
    run_folder: Path | None = None,
    progress: Progress = SILENT,
    stability: bool = False,
    subject: Subject | None = None,
) -> Scores:
    """Score every single removal the architecture allows; ``run_folder`` keeps what is measured, for going on.

    ``stability``: refuse, before anything slow, a metric whose ranking does not stand on answered items, and a choice
    of so few layers that it cannot be told. ``subject``: the model, where it is loaded already.
    """
    entry, metric = build(METRICS, request.metric)
    if stability and metric.needs != "items":
        raise UsageError(f"--stability splits answered items, and the metric {entry.name!r} answers none; use ablation")
    with locked(run_folder, request.model):
        desk = Desk.open(request, run_folder, progress, subject=subject)
        removals = [Removal.of(*move) for move in desk.constraints.moves]
        if stability and len(removals) < 3:
            raise UsageError(no_halves(entry.name))
        desk.bring_items(Shares())
        candidates = tuple(desk.judge()(removals))
        require_one_finite(candidates)
        return desk.scores((Round(removed=(), candidates=candidates),))
