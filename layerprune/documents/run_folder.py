"""Scores and plans read together with what stands beside them: a document that was edited is not used in silence."""

from __future__ import annotations

from pathlib import Path

from layerprune.documents.front import FOLDER, Front
from layerprune.documents.plan import Plan
from layerprune.documents.scores import Scores
from layerprune.errors import DocumentError


def read_scores(path: Path) -> Scores:
    """Read a scores.json; raises ``DocumentError`` where the plan or the front beside it was made from other scores."""
    scores = Scores.load(path)
    for kind, place in ((Plan, Plan.filename), (Front, f"{FOLDER}/{Front.filename}")):
        other = Path(path).parent / place
        if Path(path).name == Scores.filename and other.exists():
            _check(kind.load(other), other, scores, Path(path))
    return scores


def read_plan(path: Path) -> Plan:
    """Read a plan; raises ``DocumentError`` where the scores.json beside it, or beside its front, are other ones.

    A plan may be edited by hand; the scores that it names must still be those.
    """
    plan, folder = Plan.load(path), Path(path).resolve().parent
    scores = (folder.parent if (folder / Front.filename).exists() else folder) / Scores.filename
    if plan.scores_sha256 is not None and scores.exists():
        _check(plan, Path(path), Scores.load(scores), scores)
    return plan


def _check(made: Plan | Front, path: Path, scores: Scores, source: Path) -> None:
    if made.scores_sha256 != scores.sha256():
        raise DocumentError(
            f"{source} are not the scores that {path} was made from: their sha256 is {scores.sha256()[:12]}..., it "
            f"names {str(made.scores_sha256)[:12]}...; put them back, or remove {path} to plan again"
        )
