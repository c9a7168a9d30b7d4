"""The searches: one-shot, greedy, blocks and exchange."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from layerprune.artifacts import Candidate, Round
from layerprune.errors import RefusedError, UsageError
from layerprune.registry import option
from layerprune.removal import Removal
from layerprune.search.base import (
    NOTHING,
    Judge,
    Others,
    Search,
    SearchResult,
    Watch,
    ask_moves,
    by_importance,
    judged,
    order_moves,
    ranked,
    require_floors,
    require_one_finite,
)
from layerprune.search.constraints import Constraints, Move

# The two searches that build a removal layer by layer: one-shot scores once, greedy again after each removal.


@dataclass(frozen=True)
class OneShot(Search):
    """Score every layer once, alone, and remove the lowest."""

    nested = True
    cost = "each layer once"
    source = "ShortGPT, arXiv:2403.03853"

    def next_to_go(self, drop: int) -> int:
        """Return how many of a round's candidates matter: the judge may stop the others early."""
        return drop

    def find(
        self, judge: Judge, constraints: Constraints, drop: int, *, seed: int = 0, watch: Watch | None = None,
        others: Others | None = None,
    ) -> SearchResult:  # fmt: skip
        constraints.require(drop)
        found = ask_moves(judge, NOTHING, constraints.moves)
        require_one_finite(found.values())
        preference = order_moves(found)
        removed, order = NOTHING, list[int]()
        while len(removed) < drop:
            move = constraints.first_open(preference, removed, drop)
            removed = removed.add(*move)
            order.extend(move)
        only_round = Round(removed=(), candidates=tuple(found.values()))
        cost = next((one for one in found.values() if one.removal == removed.layers), None)
        if watch and cost:
            watch(removed, cost)
        return SearchResult(tuple(order), (only_round,), ranked(found), cost)


# Moves that a lazy round judges at a time: they share the walk up to where they differ, so one alone is dear.
LAZY_BATCH = 4


@dataclass(frozen=True)
class Greedy(Search):
    """Remove the layer that harms least, score the others again without it, and so on.

    Lazily, a round asks about the layers that promised least harm when they were judged last, and ends once the best of
    them does less harm than any other had promised: right where the harm of removing a layer never falls as others go
    (Minoux 1978, the accelerated greedy algorithm), and an approximation where it does. In a race a layer promises by
    the lower end of its interval, or by what the one did that it was behind, and the best of a round sees all items.
    """

    nested = True
    cost = "each layer once for every layer that goes; lazily a part of that"
    source = "arXiv:2605.14075"

    lazy: bool = option(False, "judge a layer again only while its last harm could make it the next to go")

    def next_to_go(self, drop: int) -> int:
        """Return how many of a round's candidates matter: the judge may stop the others early."""
        return 1

    def find(
        self, judge: Judge, constraints: Constraints, drop: int, *, seed: int = 0, watch: Watch | None = None,
        others: Others | None = None,
    ) -> SearchResult:  # fmt: skip
        constraints.require(drop)
        removed, order, rounds = NOTHING, list[int](), list[Round]()
        cost: Candidate | None = None
        ranking = None
        promised: dict[Move, float] = {}
        while len(removed) < drop:
            moves = constraints.open_moves(removed, drop)
            before = cost.score if cost else 0.0
            seen = self._round(judge, removed, moves, promised, before)
            require_floors(seen.values(), removed)
            rounds.append(Round(removed=removed.layers, candidates=tuple(seen.values())))
            ranking = ranking or ranked(seen)
            best = order_moves(seen, before)[0]
            least = _importance(seen[best], best, before)
            promised |= {move: _promise(one, move, before, least, promised) for move, one in seen.items()}
            removed, cost = removed.add(*best), seen[best]
            order.extend(best)
            if watch:
                watch(removed, cost)
        return SearchResult(tuple(order), tuple(rounds), ranking or (), cost)

    def _round(
        self, judge: Judge, removed: Removal, moves: Sequence[Move], promised: dict[Move, float], before: float
    ) -> dict[Move, Candidate]:
        """Judge the moves of one round, all of them or as many as may hold the best."""
        if not self.lazy:
            return ask_moves(judge, removed, moves)
        # in the order of asking: what was never judged first, then the least harm promised
        fresh = [move for move in moves if move not in promised]
        known = sorted((move for move in moves if move in promised), key=lambda move: (promised[move], move))
        batches = [known[start : start + LAZY_BATCH] for start in range(0, len(known), LAZY_BATCH)]
        seen: dict[Move, Candidate] = {}
        best: Move | None = None
        settled = set[Move]()
        for batch in [fresh, *batches] if fresh else batches:
            if best and not seen[best].below_floor and _importance(seen[best], best, before) <= promised[batch[0]]:
                break
            # The best so far runs along, for the race to be against it; its verdict on all the items stands.
            answers = ask_moves(judge, removed, [*([best] if best else []), *batch])
            seen |= {move: one for move, one in answers.items() if move != best}
            best = order_moves(seen, before)[0]
            while seen[best].stopped and best not in settled:  # accepted early: how it does on all items is to be seen
                settled.add(best)
                seen |= ask_moves(judge, removed, [best])
                best = order_moves(seen, before)[0]
        return {move: seen[move] for move in moves if move in seen}


def _importance(candidate: Candidate, move: Move, before: float) -> float:
    return (candidate.score - before) / len(move)


def _promise(one: Candidate, move: Move, before: float, least: float, promised: dict[Move, float]) -> float:
    """Return the least harm that a candidate may do in a later round, where harm never falls.

    What a race stopped early was clearly behind another, and so does more harm than ``least``, the best of its round.
    """
    if not one.stopped:
        return _importance(one, move, before)
    low = least if one.interval is None else (one.interval[0] - before) / len(move)
    return max(least, low, promised.get(move, least))


# Contiguous blocks: the run of neighbouring layers that harms least when it is taken out in one piece.


@dataclass(frozen=True)
class Blocks(Search):
    """Judge every run of as many neighbouring layers as are to go, and remove the best."""

    cost = "each run of layers once"
    source = "The Unreasonable Ineffectiveness of the Deeper Layers, arXiv:2403.17887"

    def find(
        self, judge: Judge, constraints: Constraints, drop: int, *, seed: int = 0, watch: Watch | None = None,
        others: Others | None = None,
    ) -> SearchResult:  # fmt: skip
        constraints.require(drop)
        runs = allowed_runs(constraints, drop)
        candidates = judged(judge, runs)
        best: Candidate = min(candidates, key=by_importance)
        if watch:
            watch(Removal(best.removal), best)
        return SearchResult(best.removal, (Round(removed=(), candidates=candidates),), (), best, nested=False)


def allowed_runs(constraints: Constraints, drop: int) -> list[Removal]:
    """Return every contiguous run of ``drop`` units that may go; raises ``RefusedError`` when there is none."""
    movable = {unit for move in constraints.moves for unit in move}
    reason, runs = "", list[Removal]()
    for start in sorted(movable):
        units = {start + step for step in range(drop)}
        split = any(set(move) & units and not set(move) <= units for move in constraints.moves)
        if not units <= movable or split:
            continue
        run = Removal.from_layers(units)
        refusal = constraints.refusal(run)
        reason = reason or refusal
        if not refusal:
            runs.append(run)
    if not runs:
        why = f"; {reason}" if reason else ": layers that have to stay interrupt every run"
        raise RefusedError(f"no {drop} neighbouring layers may go together{why}")
    return runs


# Exchange: whole removals that several metrics propose, and one layer exchanged for another while that helps.


@dataclass(frozen=True)
class Exchange(Search):
    """Judge whole removals that other metrics and the own one-shot ranking propose, and better the best by exchanges.

    An exchange puts one layer back and judges whatever could go in its place; the layer whose return helps most is
    tried first. It ends where no exchange of one layer does less harm, or after ``most`` exchanges: the oscillating
    search of feature selection with swings of one, from given starts.
    """

    cost = "each layer once, then every exchange of one layer, until none helps"
    source = "oscillating search, Somol and Pudil, ICPR 2000"
    by: str = option("cosine", "specs of the metrics that propose, joined by +")
    most: int = option(20, "exchanges made at most", (0, 10**6))

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(self.asks):
            raise ValueError(f"by names metrics joined by +, got {self.by!r}")

    @property
    def asks(self) -> tuple[str, ...]:
        """The specs of the metrics that it asks."""
        return tuple(dict.fromkeys(self.by.split("+")))

    def next_to_go(self, drop: int) -> int:
        """Return how many of a round's candidates matter: whatever the round, its best."""
        return 1

    def find(
        self, judge: Judge, constraints: Constraints, drop: int, *, seed: int = 0, watch: Watch | None = None,
        others: Others | None = None,
    ) -> SearchResult:  # fmt: skip
        if others is None:
            raise UsageError(f"the search 'exchange' asks {self.by} for proposals: plan from the model")
        constraints.require(drop)
        proposed = [self._proposed(others, metric, constraints, drop) for metric in self.asks]  # cheap: refused first
        own = OneShot().find(others.own(drop), constraints, drop, seed=seed)
        walk = _ExchangeWalk(judge, constraints, drop, list(own.rounds))
        best: Candidate | None = walk.visit(walk.ask(NOTHING, list(dict.fromkeys([own.removal, *proposed]))))
        for _ in range(self.most):
            if watch and best:
                watch(walk.current, best)
            best = walk.exchange()
            if best is None:
                break
        # races may have erred: all that was visited is judged on all items, and the best of it stands
        walk.judge = others.own(len(walk.visited))
        cost = walk.visit(walk.ask(NOTHING, walk.visited))
        if watch:
            watch(walk.current, cost)
        place = {entry.unit: number for number, entry in enumerate(own.ranking)}
        order = tuple(sorted(walk.current.layers, key=place.__getitem__))
        return SearchResult(order, tuple(walk.rounds), own.ranking, cost, nested=False)

    def _proposed(self, others: Others, metric: str, constraints: Constraints, drop: int) -> Removal:
        try:
            return others.choose(metric, constraints, drop).removal
        except (RefusedError, UsageError) as error:
            what = f"the metric {metric!r} proposes nothing here: {error}"
            raise UsageError(f"{what}; name others with --search exchange:by=") from error


@dataclass
class _ExchangeWalk:
    """Where the search stands, and what it has looked at."""

    judge: Judge
    constraints: Constraints
    drop: int
    rounds: list[Round]
    visited: list[Removal] = field(default_factory=list)

    @property
    def current(self) -> Removal:
        return self.visited[-1]

    def ask(self, removed: Removal, removals: Sequence[Removal]) -> tuple[Candidate, ...]:
        """Judge whole removals as one round."""
        candidates = judged(self.judge, removals)
        self.rounds.append(Round(removed=removed.layers, candidates=candidates))
        return candidates

    def visit(self, candidates: Sequence[Candidate]) -> Candidate:
        """Go on from the least harmful."""
        best = min(candidates, key=by_importance)
        self.visited.append(Removal(best.removal))
        return best

    def exchange(self) -> Candidate | None:
        """Exchange one stroke of what is removed for a better one; None where every exchange does more harm."""
        for returned in self._returns():
            rest = Removal.from_layers(unit for unit in self.current if unit not in returned)
            moves = [move for move in self.constraints.open_moves(rest, self.drop) if len(move) == len(returned)]
            if moves == [returned]:
                continue
            # what is here runs along: in a race nobody's score can be held against another round's
            candidates = self.ask(rest, [rest.add(*move) for move in moves])
            best = min(candidates, key=by_importance)
            if Removal(best.removal) not in self.visited:  # a race may err: nowhere twice, so that the walk ends
                return self.visit([best])
        return None

    def _returns(self) -> Iterator[Move]:
        """Yield what may be put back, the one whose return helps most first; a race says little of the order behind."""
        moves = [move for move in self.constraints.moves if set(move) <= set(self.current)]
        if len(self.current) == len(moves[0]):  # nothing would be left to judge
            yield from moves
            return
        fewer = [Removal.from_layers(unit for unit in self.current if unit not in move) for move in moves]
        found = dict(zip(moves, self.ask(NOTHING, fewer), strict=True))
        yield from sorted(moves, key=lambda move: by_importance(found[move]))
