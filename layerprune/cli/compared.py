"""Two rankings side by side, as tables for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from layerprune.cli.tables import figure, names, table

if TYPE_CHECKING:
    from layerprune.comparison import Comparison
    from layerprune.documents import Scores


def sources(found: Comparison, first: Scores, second: Scores) -> Table:
    """Return what the two rankings were made from: what differs here may be why they differ."""
    made = table("what is compared", "", "1", "2", "alike", wrapped=["1", "2"])
    for what, one, other in (
        ("model", first.model.id, second.model.id),
        ("weights", first.model.fingerprint[:12], second.model.fingerprint[:12]),
        ("judged by", first.metric.words, second.metric.words),
        ("items", _items(first), _items(second)),
        ("seed", str(first.seed), str(second.seed)),
        ("layerprune", *(scores.versions.get("layerprune", "not recorded") for scores in (first, second))),
    ):
        made.add_row(what, one, other, "yes" if one == other else "no")
    made.add_row("items in both", str(found.shared_items), "", "")
    return made


def _items(scores: Scores) -> str:
    """Return how many items of which tasks were looked at, and whether a race saw fewer for some layers."""
    told = [f"{data.items} of {data.task} ({data.split})" for data in scores.data]
    raced = any(candidate.stopped for entry in scores.rounds for candidate in entry.candidates)
    return ", ".join(told + ["fewer for layers that left a race"] * raced) or "none"


def layers(found: Comparison, specs: tuple[str, str]) -> Table:
    """Return every layer with its score and rank in two documents."""
    left, right = specs if specs[0] != specs[1] else (f"{specs[0]} (1)", f"{specs[1]} (2)")
    columns = ["layer", left, f"rank by {left}", right, f"rank by {right}"]
    made = table("layers in both rankings (rank 1 is removed first)", *columns, numbers=columns)
    for pair in found.pairs:
        scores, ranks = pair.scores, pair.ranks
        made.add_row(str(pair.unit), figure(scores[0]), str(ranks[0]), figure(scores[1]), str(ranks[1]))
    return made


def agreement(found: Comparison) -> Table:
    """Return how far two rankings agree, beside what two unrelated rankings would show."""
    made = table("agreement", "measure", "seen", "by chance", numbers=("seen", "by chance"))
    seen = found.agreement
    for name, value in (("Spearman", seen.spearman), ("Kendall", seen.kendall), ("Pearson", seen.pearson)):
        chance = f"0 ± {seen.spearman_spread:.2f}" if name == "Spearman" else "0"
        made.add_row(name, "one is constant" if value is None else f"{value:.2f}", chance)
    made.add_row("rank positions misplaced", f"{seen.misplaced_share:.0%}", f"{seen.misplaced_by_chance:.0%}")
    for overlap in found.overlaps:
        name = f"of the first {overlap.count} to remove, in both"
        made.add_row(name, f"{overlap.shared:g}", f"{overlap.by_chance:.1f}")
    if found.only_in_one:
        made.add_row("judged in one of the two only", names(found.only_in_one), "")
    return made
