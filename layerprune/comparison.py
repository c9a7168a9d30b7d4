"""Two scores.json side by side: do they call the same layers removable?"""

from __future__ import annotations

from dataclasses import dataclass

from layerprune.documents import Candidate, Scores
from layerprune.errors import UsageError
from layerprune.planners import by_harm
from layerprune.stats import Agreement, Overlap, overlap, rank_agreement

SHARES = (8, 4, 2)  # the lowest eighth, quarter and half of the layers: what a plan would remove


@dataclass(frozen=True)
class Pair:
    """One unit in both rankings; rank 1 is the first to remove."""

    unit: int
    scores: tuple[float, float]
    ranks: tuple[int, int]


@dataclass(frozen=True)
class Comparison:
    """Two rankings of the same units."""

    pairs: tuple[Pair, ...]  # ordered by unit
    agreement: Agreement
    overlaps: tuple[Overlap, ...]
    only_in_one: tuple[int, ...]  # judged in one of the two, and left out
    shared_items: int  # that both have looked at


def compare_scores(first: Scores, second: Scores) -> Comparison:
    """Compare the first rounds of two documents; raises ``UsageError`` where there is nothing to compare."""
    if first.model.layers != second.model.layers:
        raise UsageError(
            f"cannot compare scores of {first.model.layers} layers ({first.model.id}) "
            f"with scores of {second.model.layers} ({second.model.id})"
        )
    ours, theirs = _single(first), _single(second)
    shared = sorted(ours.keys() & theirs.keys())
    if len(shared) < 2:
        raise UsageError(f"the two documents judge {len(shared)} layers in common; at least 2 are needed")
    ranks = [_ranks({unit: side[unit] for unit in shared}) for side in (ours, theirs)]
    pairs = tuple(
        Pair(unit, (ours[unit].score, theirs[unit].score), (ranks[0][unit], ranks[1][unit])) for unit in shared
    )
    agreement = rank_agreement([pair.scores[0] for pair in pairs], [pair.scores[1] for pair in pairs])
    counts = sorted({max(1, len(pairs) // share) for share in SHARES})
    first_ranks, second_ranks = ([pair.ranks[side] for pair in pairs] for side in (0, 1))
    overlaps = tuple(overlap(first_ranks, second_ranks, count) for count in counts)
    only_in_one = tuple(sorted(ours.keys() ^ theirs.keys()))
    return Comparison(pairs, agreement, overlaps, only_in_one, len(_seen(first) & _seen(second)))


def _seen(scores: Scores) -> set[tuple[str, str]]:
    """Return the items a document has looked at, by task and fingerprint."""
    return {(data.task, fingerprint) for data in scores.data for fingerprint in data.fingerprints}


def _single(scores: Scores) -> dict[int, Candidate]:
    """Return the judgements of single units of the intact model."""
    return {
        candidate.removal[0]: candidate for candidate in scores.rounds[0].candidates if len(candidate.removal) == 1
    }


def _ranks(candidates: dict[int, Candidate]) -> dict[int, int]:
    order = sorted(candidates, key=lambda unit: by_harm(candidates[unit]))
    return {unit: rank for rank, unit in enumerate(order, 1)}
