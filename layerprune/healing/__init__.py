"""Ways to win back what removal took, from free to expensive, each behind one contract (``base.Healer``)."""

from __future__ import annotations

from layerprune.registry import Registry

HEALERS = Registry(
    kind="healing method",
    group="layerprune.healers",
    builtin={
        "distill": "layerprune.healing.distill:Distill",
        "linear": "layerprune.healing.linear:Linear",
        "lora": "layerprune.healing.lora:Lora",
        "partial": "layerprune.healing.partial:Partial",
        "rescale": "layerprune.healing.rescale:Rescale",
        "seams": "layerprune.healing.partial:Seams",
    },
)
