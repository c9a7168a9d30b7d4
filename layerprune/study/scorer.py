"""Any metric, any search, on one model and one set of items; what was measured once is not measured again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from layerprune import __version__
from layerprune.documents import Candidate
from layerprune.engine.journal import Journal
from layerprune.metrics import METRICS
from layerprune.metrics.base import Data, Metric
from layerprune.planners import SEARCHES, Constraints, Found, Judge
from layerprune.planners.cascade import Cascade
from layerprune.removal import Removal
from layerprune.specs import build
from layerprune.subject import Subject

JUDGED = "judged.jsonl"  # what metrics said that keep no journal of their own


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
        _, metric = build(METRICS, spec)
        data = replace(self.data, keep=keep, seed=self.data.seed if seed is None else seed)
        if metric.needs == "items":
            return lambda removals: metric.score(self.subject, removals, data)
        journal = self._journal(spec, data) if metric.needs == "text" else None  # the rest costs nothing to ask again
        return Remembered(metric, self.subject, data, journal)

    def find(
        self, metric: str, search: str, constraints: Constraints, drop: int, *, seed: int | None = None,
        racing: bool = True,
    ) -> Found:  # fmt: skip
        """Return what a search finds by a metric when ``drop`` units are to go."""
        _, look = build(SEARCHES, search)
        races = racing and hasattr(look, "next_to_go") and len({len(move) for move in constraints.moves}) == 1
        judge = self.judge(metric, seed=seed, keep=look.next_to_go(drop) if races else None)
        bound = look.proposed_by(self.judge(look.by, seed=seed)) if isinstance(look, Cascade) else look
        return bound(judge, constraints, drop, seed=self.data.seed if seed is None else seed)  # type: ignore[no-any-return]

    def _journal(self, spec: str, data: Data) -> Journal | None:
        if self.folder is None:
            return None
        settings = {
            "layerprune": __version__,
            "model": self.subject.ref.fingerprint,
            "dtype": str(self.subject.dtype),
            "device": self.subject.device.type,
            "metric": spec,
            "seed": data.seed,
            "texts": hashlib.sha256(json.dumps(data.texts).encode()).hexdigest(),
        }
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
        return Journal(self.folder / JUDGED, key)


class Remembered:
    """A metric's judgements on one set of texts, each asked for once and written down as it comes."""

    def __init__(self, metric: Metric, subject: Subject, data: Data, journal: Journal | None) -> None:
        self.metric, self.subject, self.data, self.journal = metric, subject, data, journal
        entries = journal.entries if journal else []
        judged = [Candidate.model_validate(one) for entry in entries for one in entry["candidates"]]
        self.known = {candidate.removal: candidate for candidate in judged}

    def __call__(self, removals: Sequence[Removal]) -> list[Candidate]:
        fresh = [removal for removal in dict.fromkeys(removals) if removal.units not in self.known]
        if fresh:
            candidates = self.metric.score(self.subject, fresh, self.data)
            if self.journal:
                self.journal.append({"candidates": [one.model_dump(mode="json") for one in candidates]})
            self.known |= {candidate.removal: candidate for candidate in candidates}
        return [self.known[removal.units] for removal in removals]
