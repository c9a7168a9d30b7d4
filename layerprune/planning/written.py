"""The plan document, put together from what a search found."""

from __future__ import annotations

from layerprune.documents import Limits, Plan, Prediction, Scores, Search
from layerprune.planners import Found
from layerprune.planning.caveats import caveats


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
        removal=found.removal.units,
        order=found.order,
        ranking=found.ranking,
        scores_sha256=scores.sha256(),
        data=scores.data,
        predicted=predicted,
        warnings=(*warnings, *caveats(scores, predicted)),
        seed=scores.seed,
        versions=scores.versions,
    )
