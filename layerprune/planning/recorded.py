"""Planning again from recorded scores: no model, so nothing that only a model can tell."""

from __future__ import annotations

from layerprune.documents import Limits, Plan, Scores, Search
from layerprune.errors import UsageError
from layerprune.planners import SEARCHES, Constraints, parse_drop, parse_protect, table_judge
from layerprune.planning.written import written
from layerprune.specs import build, options_of

UNREHEARSED = "planned without the model: whether export and other readers take the result was not looked at"


def replan(scores: Scores, drop: str, protect: str | None = None, *, search: str | None = None) -> Plan:
    """Plan from recorded scores, without a model; a search that needs what was not scored is a ``UsageError``."""
    depth = scores.model.layers
    wanted = parse_drop(drop, depth)
    moves = [candidate.removal for candidate in scores.rounds[0].candidates]
    if len({unit for move in moves for unit in move}) < sum(map(len, moves)):
        raise UsageError("scores.json holds whole sets of layers, as its search judged them; plan from the model")
    constraints = Constraints(
        depth,
        protect=parse_protect(protect, depth),
        together=tuple(frozenset(int(unit) for unit in move) for move in moves if len(move) > 1),
        units=tuple(unit for move in moves for unit in move),
    )
    spec = search or ("greedy" if len(scores.rounds) >= wanted > 1 else "one-shot")
    entry, chosen = build(SEARCHES, spec)
    try:
        found = chosen(table_judge(scores.rounds), constraints, wanted, seed=scores.seed)
    except KeyError as error:
        raise UsageError(
            f"scores.json has no score for {error.args[0]}: it was made with {len(scores.rounds)} rounds; "
            "plan from the model, or use --search one-shot"
        ) from error
    limits = Limits(protect=tuple(sorted(constraints.protect)))
    how = Search(name=entry.name, options=options_of(chosen))
    return written(scores, found, how, limits, drop, None, (UNREHEARSED,))
