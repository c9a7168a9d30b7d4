"""The plan document, put together from what a search found."""

from __future__ import annotations

from layerprune.documents import Limits, Plan, Prediction, Scores, Search
from layerprune.planners import Found
from layerprune.planning.caveats import caveats, ends
from layerprune.removal import Removal


def written(
    scores: Scores,
    found: Found,
    search: Search,
    limits: Limits,
    requested: str,
    predicted: Prediction | None,
    warnings: tuple[str, ...],
) -> Plan:
    """Return the plan that removes what ``found`` says, with where it comes from."""
    return Plan(
        model=scores.model,
        metric=scores.metric,
        search=search,
        limits=limits,
        requested=requested,
        removal=found.removal.layers,
        order=found.order,
        ranking=found.ranking,
        scores_sha256=scores.sha256(),
        data=scores.data,
        predicted=predicted,
        warnings=(
            *warnings,
            *ends(scores, found.removal.layers, limits),
            *put_out(found),
            *unordered(found, limits),
            *caveats(scores, predicted),
        ),
        seed=scores.seed,
        versions=scores.versions,
    )


def put_out(found: Found) -> tuple[str, ...]:
    """Return a warning where layers are to go that a race had put out, on a part of the items, as not among the next.

    Recorded scores of a race for fewer layers lead there, and constraints that skip those that won: in the one round of
    a one-shot search any that goes, in a round of a path the removal that was taken from it, of a search that lays no
    path the whole removal.
    """
    order, steps = found.order, len(found.rounds)
    whole = [] if found.cost is None else [found.cost]
    asked = [one for entry in found.rounds for one in entry.candidates] if found.nested else whole
    gone = [
        one.removal
        for one in asked
        if one.stopped and not one.accepted
        if set(one.removal) <= set(order if steps == 1 else order[: len(one.removal)])
    ]
    if not gone:
        return ()
    named = ", ".join(str(Removal.from_layers(units)) for units in sorted(gone))
    return (
        f"a race had put {named} out after a part of the items, whose scores say little of their places: "
        "score with --no-racing to choose among all",
    )


def unordered(found: Found, limits: Limits) -> tuple[str, ...]:
    """Return a warning where fewer layers go than a race was run for: it told the best from the rest, and no more.

    A layer that is clearly among the best stops there, so that scores of such layers are of different items.
    """
    if not found.nested or len(found.rounds) != 1:
        return ()
    gone, free = set(found.order), set(limits.protect)
    best = [one.removal for one in found.rounds[0].candidates if one.accepted]
    left = [units for units in best if not set(units) <= gone and not set(units) & free]
    if not left:
        return ()
    named = ", ".join(str(Removal.from_layers(units)) for units in sorted(left))
    return (
        f"a race for more layers had {named} among those to go after a part of the items, and says little of their "
        "order: score with --no-racing, or for this --drop, to choose fewer",
    )
