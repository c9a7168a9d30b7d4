"""Any metric under any search on one model and one set of items; what was measured once is not measured again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from layerprune.artifacts import Candidate
from layerprune.errors import UsageError
from layerprune.models.model import LoadedModel
from layerprune.registry import Entry, build, spec_of
from layerprune.removal import Removal
from layerprune.scoring.aggregation import additive
from layerprune.scoring.cached_evaluator import JOURNAL, Journal, journal_key
from layerprune.scoring.metrics import METRICS, cheapest_search
from layerprune.scoring.metrics.base import Data, Metric
from layerprune.search import SEARCHES, Constraints, Judge, Others, SearchResult, Watch
from layerprune.util import source_of


@dataclass
class SearchRunner:
    """One model and the data that its layers are judged on.

    Metrics that answer items are remembered by the evaluator in ``data``; what others read off texts is kept in a
    journal in ``folder``, and what reads nothing costs nothing to ask again. ``data.progress`` hears of removals
    without which the model's figures are not finite.
    """

    loaded: LoadedModel
    data: Data
    folder: Path | None = None
    judges: dict[tuple[str, int, int | None], Judge] = field(default_factory=dict)  # by metric, seed and ``keep``
    not_finite: set[Removal] = field(default_factory=set)  # named already

    def judge(self, spec: str, *, seed: int | None = None, keep: int | None = None) -> Judge:
        """Return a metric as a judge that answers each question once, in this run and the ones it goes on from.

        ``keep`` lets it stop candidates that are not among so many to go next.
        """
        seed = self.data.seed if seed is None else seed
        if (spec, seed, keep) not in self.judges:
            self.judges[spec, seed, keep] = self._cached(spec, replace(self.data, seed=seed, keep=keep))
        return self.judges[spec, seed, keep]

    def _cached(self, spec: str, data: Data) -> Judge:
        """Return the judge; a question is a whole batch: what a race says depends on those that ran against it."""
        entry, metric = build(METRICS, spec)
        known: dict[tuple[Removal, ...], list[Candidate]] = {}
        journal, fresh = None, False
        if "text" in metric.needs and self.folder is not None:
            fresh = not (self.folder / JOURNAL).exists()
            journal = Journal(self.folder / JOURNAL, text_key(self.loaded, data, entry, metric))
            for line in journal.entries:
                question = tuple(Removal.from_layers(units) for units in line["removals"])
                known[question] = [Candidate.model_validate(candidate) for candidate in line["candidates"]]

        def judge(removals: Sequence[Removal]) -> list[Candidate]:
            question = tuple(removals)
            if question not in known:
                try:
                    known[question] = list(metric.score(self.loaded, removals, data))
                except UsageError:  # the search asks for more than the metric can score: nothing is left of such a run
                    alone = {one for one, *_ in self.judges} == {spec}  # and no other metric's work is in it
                    if fresh and alone and journal is not None:
                        journal.path.unlink(missing_ok=True)
                    raise
                if journal is not None:
                    asked = [list(removal.layers) for removal in removals]
                    answered = [candidate.model_dump(mode="json") for candidate in known[question]]
                    journal.append({"removals": asked, "candidates": answered})
            self._name_not_finite(known[question])
            return known[question]

        return judge

    def _name_not_finite(self, candidates: Sequence[Candidate]) -> None:
        """Note that the model's figures are not finite without a removal, unless it was of a part of it already."""
        for one in candidates:
            removal = Removal(one.removal)
            if one.not_finite and not any(set(other) <= set(removal) for other in self.not_finite):
                self.not_finite.add(removal)
                self.data.progress.note(
                    f"without {removal} the model's figures are not finite: it counts as the most harmful"
                )

    def find(
        self, metric: str, search: str, constraints: Constraints, drop: int, *, seed: int | None = None,
        racing: bool = True, watch: Watch | None = None,
    ) -> SearchResult:  # fmt: skip
        """Return what a search finds by a metric when ``drop`` units are to go.

        Rounds are raced where ``racing`` allows it and the race knows what is compared: not moves of different sizes,
        which are compared per layer, nor floors and the worst task.
        """
        seed = self.data.seed if seed is None else seed
        alike = len({len(move) for move in constraints.moves}) == 1
        races = racing and alike and additive(self.data.objective)
        looking = build(SEARCHES, search)[1]

        def own(keep: int | None) -> Judge:
            return self.judge(metric, seed=seed, keep=keep if races else None)

        def choose(spec: str, within: Constraints, count: int) -> SearchResult:
            return self.find(spec, cheapest_search(spec), within, count, seed=seed, racing=False)

        look = partial(
            looking.find, constraints=constraints, drop=drop, seed=seed, watch=watch, others=Others(choose, own)
        )
        found: SearchResult = look(own(looking.next_to_go(drop)))
        if races and found.eliminated:  # constraints passed over winners of the race: all have to be ranked
            found = look(own(None))
        return found


def text_key(loaded: LoadedModel, data: Data, entry: Entry, metric: Metric) -> str:
    """Return the journal key of what a metric says of the texts in ``data``: its code and owner are in it."""
    return journal_key(
        loaded, data.eval_set, metric=spec_of(entry.name, metric), owner=entry.owner, code=source_of(type(metric)),
        seed=data.seed, rows=data.rows, memory=data.memory,
    )  # fmt: skip
