"""Scores laid into a run folder: what was planned from those that stood there before goes with them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from layerprune.checkpoint.locator import record
from layerprune.documents import Front, Plan, Scores
from layerprune.documents.front import FOLDER, PLOT, TABLE
from layerprune.errors import DocumentError
from layerprune.output import published_together
from layerprune.paths import refuse_link
from layerprune.progress import SILENT, Progress

Planned = TypeVar("Planned", Plan, Front)


@contextmanager
def laid(
    scores: Scores, run_folder: Path, progress: Progress = SILENT, *, before: type[Plan] | type[Front] | None = None
) -> Iterator[Path]:
    """Yield a folder for the documents made from ``scores``; at the end they stand in ``run_folder``, scores first.

    All of them or, where the block fails, none. The plan and the front made from scores that were there before, if
    those were others, are removed; ``before`` names the document that the block writes anew, and so replaces by itself.
    """
    refuse_link(run_folder / FOLDER)
    stale = _planned_from(run_folder, scores, before)
    with published_together(run_folder) as new:
        scores.save(new / Scores.filename)
        yield new
        for path in stale:  # a full disk would have shown by now
            path.unlink(missing_ok=True)
    record(run_folder, scores.model)
    if stale:
        more = f" and {len(stale) - 1} more" if len(stale) > 1 else ""
        progress.note(f"removed: {stale[0]}{more}, planned from the scores that stood there before")


def lay(scores: Scores, run_folder: Path, progress: Progress = SILENT) -> None:
    """Save ``scores`` alone; see ``laid``."""
    with laid(scores, run_folder, progress):
        pass


def _planned_from(run_folder: Path, scores: Scores, spared: type[Plan] | type[Front] | None) -> list[Path]:
    """Return the files planned from the scores in the folder, where other ones are about to take their place.

    A document that cannot be read is not known to be theirs, nor is a plan in the front's folder that it does not name.
    """
    try:
        old = Scores.load(run_folder / Scores.filename).sha256()
    except DocumentError:
        return []
    if old == scores.sha256():
        return []
    found, folder = list[Path](), run_folder / FOLDER
    if spared is not Plan and _planned(Plan, run_folder / Plan.filename, old):
        found.append(run_folder / Plan.filename)
    if spared is not Front and (front := _planned(Front, folder / Front.filename, old)):
        plans = [folder / point.plan for point in front.points]
        files = [*plans, folder / TABLE, folder / PLOT, folder / Front.filename]  # what names the others goes last
        found += [path for path in files if path.is_file()]
    return found


def _planned(kind: type[Planned], path: Path, scores: str) -> Planned | None:
    try:
        made = kind.load(path)
    except DocumentError:
        return None
    return made if made.scores_sha256 == scores else None
