"""Any metric, any search, on one model and one set of items; what was measured once is not measured again."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from layerprune.engine import JOURNAL
from layerprune.engine.journal import Journal
from layerprune.metrics import METRICS, cheapest_search
from layerprune.metrics.base import Data
from layerprune.planners import SEARCHES, Constraints, Found, Judge, Others, bound, next_to_go
from layerprune.planning.judging import Remembered, text_key
from layerprune.specs import build
from layerprune.subject import Subject


@dataclass(frozen=True)
class Scorer:
    """One model and the data that its layers are judged on.

    Metrics that answer items are remembered by the examiner in ``data``; what the others say is kept in ``folder``.
    """

    subject: Subject
    data: Data
    folder: Path | None = None

    def judge(self, spec: str, *, seed: int | None = None, keep: int | None = None) -> Judge:
        """Return a metric's judgements; ``keep`` lets it stop candidates that are not among the next to go."""
        entry, metric = build(METRICS, spec)
        data = replace(self.data, keep=keep, seed=self.data.seed if seed is None else seed)
        if metric.needs == "items":
            return Remembered(lambda removals: metric.score(self.subject, removals, data), progress=data.progress)
        journal = None  # what reads nothing costs nothing to ask again
        if metric.needs == "text" and self.folder is not None:
            journal = Journal(self.folder / JOURNAL, text_key(self.subject, data, entry, metric))
        return Remembered(lambda removals: metric.score(self.subject, removals, data), journal, progress=data.progress)

    def find(
        self, metric: str, search: str, constraints: Constraints, drop: int, *, seed: int | None = None,
        racing: bool = True,
    ) -> Found:  # fmt: skip
        """Return what a search finds by a metric when ``drop`` units are to go."""
        _, look = build(SEARCHES, search)
        races = racing and len({len(move) for move in constraints.moves}) == 1

        def own(keep: int | None) -> Judge:
            return self.judge(metric, seed=seed, keep=keep if races else None)

        def choose(spec: str, within: Constraints, count: int) -> Found:
            return self.find(spec, cheapest_search(spec), within, count, seed=seed, racing=racing)

        others = Others(choose, own)
        first = self.data.seed if seed is None else seed
        return bound(look, others)(own(next_to_go(look, drop)), constraints, drop, seed=first)
