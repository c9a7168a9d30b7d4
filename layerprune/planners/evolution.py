"""Evolutionary search: whole removals of the wanted size, improved by exchanging layers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from layerprune.documents import Candidate, Round
from layerprune.errors import RefusedError
from layerprune.planners.base import Found, Judge, Watch, by_harm, judged
from layerprune.planners.constraints import Constraints
from layerprune.planners.shapes import Move
from layerprune.removal import Removal

Genome = tuple[Move, ...]  # the strokes a removal is made of, sorted
ATTEMPTS = 100  # random draws that run into a dead end before the constraints are called unsatisfiable


@dataclass(frozen=True)
class Evolution:
    """Mutate the best removal by putting layers back and taking others out instead. Source: EvoPress, arXiv:2410.14649.

    Each generation judges ``offspring`` new removals; the best of them replaces its parent when it harms less.
    """

    generations: int = field(default=40, metadata={"help": "rounds of offspring"})
    offspring: int = field(default=16, metadata={"help": "removals judged in a generation"})
    exchanges: int = field(default=3, metadata={"help": "at most so many layers are exchanged at once"})

    def __post_init__(self) -> None:
        for name in ("generations", "offspring", "exchanges"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    def __call__(
        self, judge: Judge, constraints: Constraints, drop: int, *, seed: int = 0, watch: Watch | None = None
    ) -> Found:
        constraints.require(drop)
        rng = random.Random(seed)
        known: dict[Genome, Candidate] = {}
        rounds: list[Round] = []
        children = _distinct([_random_genome(constraints, drop, rng) for _ in range(self.offspring)])
        best: Genome | None = None
        for _ in range(self.generations):
            fresh = [genome for genome in children if genome not in known]
            if fresh:
                candidates = judged(judge, [_removal(genome) for genome in fresh])
                known.update(zip(fresh, candidates, strict=True))
                rounds.append(Round(removed=(), candidates=candidates))
            best = min([*children, *([best] if best else [])], key=lambda genome: by_harm(known[genome]))
            if watch:
                watch(_removal(best), known[best])
            children = _distinct([self._mutated(best, constraints, drop, rng) for _ in range(self.offspring)])
        assert best is not None
        return Found(_removal(best).units, tuple(rounds), (), known[best], nested=False)

    def _mutated(self, parent: Genome, constraints: Constraints, drop: int, rng: random.Random) -> Genome:
        """Exchange some strokes; few exchanges are likelier than many (the smaller of two draws, as in EvoPress)."""
        most = min(self.exchanges, len(parent))
        count = min(rng.randint(1, most), rng.randint(1, most))
        for _ in range(ATTEMPTS):
            out = set(rng.sample(range(len(parent)), count))
            rest = tuple(move for position, move in enumerate(parent) if position not in out)
            child = _completed(rest, constraints, drop, rng)
            if child is not None:
                return child
        return parent  # the parent itself fits, so there is always something to return


def _random_genome(constraints: Constraints, drop: int, rng: random.Random) -> Genome:
    for _ in range(ATTEMPTS):
        genome = _completed((), constraints, drop, rng)
        if genome is not None:
            return genome
    raise RefusedError(f"no removal of {drop} layers that the constraints allow was found in {ATTEMPTS} draws")


def _completed(genome: Genome, constraints: Constraints, drop: int, rng: random.Random) -> Genome | None:
    """Add random allowed strokes until ``drop`` units are gone; None where that ends in a dead end."""
    while sum(map(len, genome)) < drop:
        try:
            genome = (*genome, rng.choice(constraints.open_moves(_removal(genome), drop)))
        except RefusedError:
            return None
    return tuple(sorted(genome))


def _removal(genome: Genome) -> Removal:
    return Removal.from_units(unit for move in genome for unit in move)


def _distinct(genomes: Sequence[Genome]) -> list[Genome]:
    return list(dict.fromkeys(genomes))
