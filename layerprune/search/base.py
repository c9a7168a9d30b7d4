"""What every search shares: it asks a judge about removals and returns what it found. It never sees a model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from layerprune.artifacts import Candidate, Ranked, Round, Units
from layerprune.errors import RefusedError
from layerprune.registry import Plugin
from layerprune.removal import Removal
from layerprune.search.constraints import Constraints, Move
from layerprune.stats import clipped

NOTHING = Removal(())

OVERFLOW = "half precision may overflow where --dtype float32 does not"

Judge = Callable[[Sequence[Removal]], Sequence[Candidate]]
"""Scores whole removals (what is already gone included), one candidate each, in the order asked."""

Watch = Callable[[Removal, Candidate], None]
"""Told the best removal so far and its score, after every round."""


@dataclass(frozen=True)
class Others:
    """What a search may ask beside its judge."""

    choose: Callable[[str, Constraints, int], SearchResult]  # what another metric removes by the cheapest search it has
    own: Callable[[int], Judge]  # the search's own metric, where so many candidates of a round matter


@dataclass(frozen=True)
class SearchResult:
    """What a search ends with."""

    order: tuple[int, ...]  # in the order of choosing
    rounds: tuple[Round, ...]  # everything that was judged
    ranking: tuple[Ranked, ...]  # the first round, least harm first
    cost: Candidate | None = None  # the judge's word on the whole removal; None where it was never asked
    nested: bool = True  # every beginning of ``order`` is a removal the search stood at

    @property
    def removal(self) -> Removal:
        """The units to remove."""
        return Removal.from_layers(self.order)

    @property
    def eliminated(self) -> list[Units]:
        """What goes although a race had eliminated it, on a part of the items, as not among the next.

        Recorded scores of a race for fewer layers lead there, and constraints that skip those that won: in the one
        round of a one-shot search any that goes, in a round of a path the removal that was taken from it, of a search
        that lays no path the whole removal.
        """
        whole = [] if self.cost is None else [self.cost]
        asked = [one for entry in self.rounds for one in entry.candidates] if self.nested else whole
        return sorted(
            one.removal
            for one in asked
            if one.stopped and not one.accepted
            if set(one.removal) <= set(self.order if len(self.rounds) == 1 else self.order[: len(one.removal)])
        )

    def accepted_but_kept(self, protect: Collection[int]) -> list[Units]:
        """Return what a race accepted and is not to go, and not for being protected: fewer go than it was run for.

        A race told the best from the rest, and no more. A layer that is clearly among the best stops there, so that
        scores of such layers are of different items.
        """
        if not self.nested or len(self.rounds) != 1:
            return []
        best = [one.removal for one in self.rounds[0].candidates if one.accepted]
        return sorted(units for units in best if not set(units) <= set(self.order) and not set(units) & set(protect))


class Search(Plugin):
    """Looks for the removal of ``drop`` units that harms least. Same judge, constraints and seed: same answer.

    A search is a frozen dataclass whose fields are its options, and never sees a model.
    """

    nested: ClassVar[bool] = False  # every beginning of ``SearchResult.order`` is a removal the search stood at

    @property
    def asks(self) -> tuple[str, ...]:
        """The specs of the other metrics that it asks through ``others``."""
        return ()

    def next_to_go(self, drop: int) -> int | None:
        """Return how many of a round's candidates matter, so that a race may stop others early; None where all do."""
        return None

    @abstractmethod
    def find(
        self, judge: Judge, constraints: Constraints, drop: int, *, seed: int = 0, watch: Watch | None = None,
        others: Others | None = None,
    ) -> SearchResult:  # fmt: skip
        """Return what to remove; raises ``RefusedError`` where the constraints leave no way to ``drop`` units."""


def judged(judge: Judge, removals: Sequence[Removal]) -> tuple[Candidate, ...]:
    """Ask the judge and check that it answered what was asked; a judge that does not is a bug, not a user's fault."""
    candidates = tuple(judge(removals))
    asked, answered = [r.layers for r in removals], [c.removal for c in candidates]
    if asked != answered:
        raise ValueError(f"the judge was asked about {asked} and answered about {answered}")
    return candidates


def ask_moves(judge: Judge, removed: Removal, moves: Sequence[Move]) -> dict[Move, Candidate]:
    """Return the judge's word on each of ``moves`` with ``removed`` already gone."""
    return dict(zip(moves, judged(judge, [removed.add(*move) for move in moves]), strict=True))


def last_layers_first(removals: Sequence[Removal]) -> list[Candidate]:
    """Judge without a model: the nearer to the end of the stack, the less harm."""
    return [Candidate(removal=one.layers, score=-float(sum(one.layers))) for one in removals]


def by_importance(candidate: Candidate, before: float = 0.0, size: int = 1) -> tuple[int, bool, float, float, Units]:
    """Sort key, least harm first: the score, then its tie-break, then the lowest units.

    One that left a race early stands before or after all that finished, by what the race said of it, whatever its score
    on the few items it has seen, and one with a task below its floor after all that keep the floors. One without which
    the model's figures are not finite comes last: it does the most harm, whatever the others do.
    """
    place = 3 if candidate.not_finite else 0 if candidate.accepted else 2 if candidate.stopped else 1
    share = 1 / size
    harm, tie_break = (candidate.score - before) * share, candidate.tie_break * share
    return place, bool(candidate.below_floor), harm, tie_break, candidate.removal


def order_moves(found: Mapping[Move, Candidate], score_before: float = 0.0) -> list[Move]:
    """Return the moves that were judged in one round ordered by harm, least first.

    Where moves differ in size (layers that go together), harm is counted per layer: a pair that costs 0.3 goes before
    a single layer that costs 0.2. With equal sizes the scores are compared as they are.
    """
    if len({len(move) for move in found}) <= 1:
        return sorted(found, key=lambda move: by_importance(found[move]))
    return sorted(found, key=lambda move: by_importance(found[move], score_before, len(move)))


def require_floors(candidates: Collection[Candidate], removed: Removal = NOTHING) -> None:
    """Raise ``RefusedError`` when every candidate of a round leaves some task below its floor, or none is finite."""
    require_one_finite(candidates, removed)
    if all(candidate.below_floor for candidate in candidates):
        nearest = min(candidates, key=lambda candidate: (max(candidate.below_floor.values()), candidate.removal))
        what = f"{_nothing_goes(removed)} within the floors"
        raise RefusedError(f"{what}; the nearest: {shortfall(nearest)}; lower --floor or --drop")


def require_one_finite(candidates: Collection[Candidate], removed: Removal = NOTHING) -> None:
    """Raise ``RefusedError`` when the model's figures are finite without none of the candidates."""
    if all(candidate.not_finite for candidate in candidates):
        raise RefusedError(f"{_nothing_goes(removed)}: whatever does, the model's figures are not finite; {OVERFLOW}")


def require_finite(found: SearchResult) -> None:
    """Raise ``RefusedError`` when the figures without what is to go, or one of its layers alone, are not finite."""
    asked = [found.cost] if found.cost is not None else found.rounds[0].candidates
    failed = [one.removal for one in asked if one.not_finite and set(one.removal) <= set(found.order)]
    if failed:
        said = f"without {Removal.from_layers(failed[0])} the model's figures are not finite"
        raise RefusedError(f"{said}, and nothing better is left to remove: lower --drop; {OVERFLOW}")


def _nothing_goes(removed: Removal) -> str:
    return f"with {removed} gone, nothing more can go" if len(removed) else "nothing can go"


def shortfall(candidate: Candidate) -> str:
    """Say in words which floor a removal misses most, and by how much."""
    task, missed = max(candidate.below_floor.items(), key=lambda entry: entry[1])
    own = candidate.tasks[task]
    kept = 1 - clipped(own.relevance)
    what = "its accuracy above chance" if own.outcomes.agreed is None else "the tokens of the model's own answers"
    return (
        f"without {Removal.from_layers(candidate.removal)} {task} keeps {kept:.3f} of {what}, "
        f"its floor is {kept + missed:.3g}"
    )


def ranked(found: Mapping[Move, Candidate]) -> tuple[Ranked, ...]:
    """Return the first round as a ranking, unit by unit; layers that go together share one score."""
    return tuple(
        Ranked(unit=unit, score=found[move].score, interval=found[move].interval)
        for move in order_moves(found)
        for unit in move
    )


def table_judge(rounds: Iterable[Round]) -> Judge:
    """Return a judge that answers from recorded rounds; asked beyond them it raises ``KeyError`` with the removal.

    A removal that ran in several races is what the first of them says: that is the one it was asked in by itself.
    """
    table: dict[tuple[int, ...], Candidate] = {}
    for entry in rounds:
        for candidate in entry.candidates:
            table.setdefault(candidate.removal, candidate)

    def judge(removals: Sequence[Removal]) -> list[Candidate]:
        return [table[removal.layers] for removal in removals]

    return judge
