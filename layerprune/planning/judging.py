"""A metric as a judge that answers each question once, and writes down what no journal would keep otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from layerprune.documents import Candidate
from layerprune.engine.journal import Journal, journal_key
from layerprune.metrics.base import Data, Metric
from layerprune.planners import Judge
from layerprune.progress import SILENT, Progress
from layerprune.registry import Entry
from layerprune.removal import Removal
from layerprune.specs import spec_of
from layerprune.subject import Subject
from layerprune.versions import source_of

Question = tuple[Removal, ...]


def text_key(subject: Subject, data: Data, entry: Entry, metric: Metric) -> str:
    """Return the journal key of what a metric says of the texts in ``data``: its code and owner are in it."""
    return journal_key(
        subject, data.questions, metric=spec_of(entry.name, metric), owner=entry.owner, code=source_of(type(metric)),
        seed=data.seed, rows=data.rows, memory=data.memory,
    )  # fmt: skip


def say_failures(candidates: Sequence[Candidate], progress: Progress, said: set[Removal]) -> None:
    """Note that the model's figures are not finite without a removal, unless it was noted of a part of it already."""
    for one in candidates:
        removal = Removal(one.removal)
        if one.not_finite and not any(set(other) <= set(removal) for other in said):
            said.add(removal)
            progress.note(f"without {removal} the model's figures are not finite: it counts as the most harmful")


@dataclass
class Remembered:
    """Asks ``judge`` and remembers; ``journal`` is for metrics whose work the examiner's journal does not hold.

    A question is a whole batch: what a race says of one removal depends on those it ran against. ``progress`` hears of
    removals without which the model's figures are not finite.
    """

    judge: Judge
    journal: Journal | None = None
    known: dict[Question, list[Candidate]] = field(default_factory=dict)
    progress: Progress = SILENT
    said: set[Removal] = field(default_factory=set)

    def __post_init__(self) -> None:
        for entry in self.journal.entries if self.journal else []:
            question = tuple(Removal.from_layers(units) for units in entry["removals"])
            self.known[question] = [Candidate.model_validate(candidate) for candidate in entry["candidates"]]

    def __call__(self, removals: Sequence[Removal]) -> list[Candidate]:
        question = tuple(removals)
        if question not in self.known:
            self.known[question] = list(self.judge(removals))
            if self.journal:
                asked = [list(removal.layers) for removal in removals]
                answered = [candidate.model_dump(mode="json") for candidate in self.known[question]]
                self.journal.append({"removals": asked, "candidates": answered})
        say_failures(self.known[question], self.progress, self.said)
        return self.known[question]
