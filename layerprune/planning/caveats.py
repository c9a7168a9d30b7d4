"""What a reader of a plan has to know before trusting it: the plan's warnings."""

from __future__ import annotations

from layerprune.documents import MetricRef


def caveats(metric: MetricRef) -> tuple[str, ...]:
    """Return what is to be said about how the removals were judged."""
    if metric.operator == "skip":
        return ()
    return (
        f"judged, and predicted, with the operator {metric.operator}: export skips the layers plainly, which costs "
        "something else unless the checkpoint is healed so",
    )
