"""What every search shares: it asks a judge about removals and returns what it found. It never sees a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from layerprune.artifacts import Candidate, Ranked, Round
from layerprune.errors import RefusedError, UsageError
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
    """What a search may ask beside its judge; whoever runs the search gives it to ``bound``."""

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


class Search(Protocol):
    """Looks for the removal of ``drop`` units that harms least. Same judge, constraints and seed: same answer.

    A class attribute ``nested`` says that every beginning of ``SearchResult.order`` is a removal the search stood at. A
    method ``next_to_go(drop) -> int | None`` says how many of a round's candidates matter, so that the judge may race
    them. One that asks other metrics is ``Asking``.
    """

    def __call__(
        self, judge: Judge, constraints: Constraints, drop: int, *, seed: int = 0, watch: Watch | None = None
    ) -> SearchResult: ...


def next_to_go(search: Search, drop: int) -> int | None:
    """Return how many of a round's candidates matter, so that others may be stopped early; None where all do."""
    ask = getattr(search, "next_to_go", None)
    return None if ask is None else ask(drop)


class Asking(ABC):
    """A search that asks other metrics, too, and runs once it is bound to them: a search itself never sees a model."""

    by: str  # specs of the metrics, joined by +

    @property
    def asks(self) -> tuple[str, ...]:
        """The specs of the metrics that it asks."""
        return tuple(dict.fromkeys(self.by.split("+")))

    @abstractmethod
    def look(
        self, others: Others, judge: Judge, constraints: Constraints, drop: int, *, seed: int, watch: Watch | None
    ) -> SearchResult:
        """Search as ``Search`` does, with the others at hand."""

    def bind(self, others: Others) -> Search:
        """Return the search that has the others at hand."""

        def search(
            judge: Judge, constraints: Constraints, drop: int, *, seed: int = 0, watch: Watch | None = None
        ) -> SearchResult:
            return self.look(others, judge, constraints, drop, seed=seed, watch=watch)

        return search

    def __call__(
        self, judge: Judge, constraints: Constraints, drop: int, *, seed: int = 0, watch: Watch | None = None
    ) -> SearchResult:
        name = type(self).__name__.lower()
        raise UsageError(f"the search {name!r} asks {self.by} for proposals: plan from the model")


def bound(search: Search, others: Others) -> Search:
    """Return the search with what it asks beside its judge at hand."""
    return search.bind(others) if isinstance(search, Asking) else search


def asks(search: Search) -> tuple[str, ...]:
    """Return the specs of the other metrics that a search asks."""
    return search.asks if isinstance(search, Asking) else ()


def judged(judge: Judge, removals: Sequence[Removal]) -> tuple[Candidate, ...]:
    """Ask the judge and check that it answered what was asked; a judge that does not is a bug, not a user's fault."""
    candidates = tuple(judge(removals))
    asked, answered = [r.layers for r in removals], [c.removal for c in candidates]
    if asked != answered:
        raise ValueError(f"the judge was asked about {asked} and answered about {answered}")
    return candidates


def by_importance(candidate: Candidate) -> tuple[int, bool, float, float, tuple[int, ...]]:
    """Sort key, least harm first: the score, then its tie-break, then the lowest units.

    One that left a race early stands before or after all that finished, by what the race said of it, whatever its score
    on the few items it has seen, and one with a task below its floor after all that keep the floors.
    """
    return standing(candidate), bool(candidate.below_floor), candidate.score, candidate.tie_break, candidate.removal


def standing(candidate: Candidate) -> int:
    """Return 0 for a candidate that a race let in early, 2 for one that it put out, 1 for one that saw all items.

    3 for one without which the model's figures are not finite: it does the most harm, whatever the others do.
    """
    if candidate.not_finite:
        return 3
    return 0 if candidate.accepted else 2 if candidate.stopped else 1


def order_moves(moves: Sequence[Move], candidates: Sequence[Candidate], score_before: float = 0.0) -> list[int]:
    """Return the positions of ``moves`` ordered by harm, least first.

    Where moves differ in size (layers that go together), harm is counted per layer: a pair that costs 0.3 goes before
    a single layer that costs 0.2. With equal sizes the scores are compared as they are.
    """
    same_size = len({len(move) for move in moves}) <= 1

    def key(position: int) -> tuple[int, bool, float, float, Move]:
        move, candidate = moves[position], candidates[position]
        behind = standing(candidate), bool(candidate.below_floor)
        if same_size:
            return *behind, candidate.score, candidate.tie_break, move
        share = 1 / len(move)
        return *behind, (candidate.score - score_before) * share, candidate.tie_break * share, move

    return sorted(range(len(moves)), key=key)


def require_floors(candidates: Sequence[Candidate], removed: Removal = NOTHING) -> None:
    """Raise ``RefusedError`` when every candidate of a round leaves some task below its floor, or none is finite."""
    require_one_finite(candidates, removed)
    if all(candidate.below_floor for candidate in candidates):
        nearest = min(candidates, key=lambda candidate: (max(candidate.below_floor.values()), candidate.removal))
        what = f"{_nothing_goes(removed)} within the floors"
        raise RefusedError(f"{what}; the nearest: {shortfall(nearest)}; lower --floor or --drop")


def require_one_finite(candidates: Sequence[Candidate], removed: Removal = NOTHING) -> None:
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


def ranked(moves: Sequence[Move], candidates: Sequence[Candidate]) -> tuple[Ranked, ...]:
    """Return the first round as a ranking, unit by unit; layers that go together share one score."""
    return tuple(
        Ranked(unit=unit, score=candidates[position].score, interval=candidates[position].interval)
        for position in order_moves(moves, candidates)
        for unit in moves[position]
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
