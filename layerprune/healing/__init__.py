"""Ways to win back what removal took, from free to expensive, each behind one contract (``base.Healer``)."""

from __future__ import annotations

from layerprune.registry import Registry

HEALERS = Registry(
    kind="healing method",
    group="layerprune.healers",
    base="layerprune.healing.base:Healer",
    builtin={
        "distill": "layerprune.healing.distill:Distill",
        "linear": "layerprune.healing.closed_form:Linear",
        "lora": "layerprune.healing.finetune:Lora",
        "partial": "layerprune.healing.finetune:Partial",
        "rescale": "layerprune.healing.closed_form:Rescale",
        "seams": "layerprune.healing.finetune:Seams",
    },
)
