"""Relevance metrics: what each layer's removal is worth, by many measures behind one contract."""

from __future__ import annotations

from layerprune.registry import Registry

METRICS = Registry(
    kind="metric",
    group="layerprune.metrics",
    builtin={
        "ablation": "layerprune.metrics.ablation:Ablation",
        "cosine": "layerprune.metrics.cosine:Cosine",
        "random": "layerprune.metrics.baselines:Random",
        "reverse-order": "layerprune.metrics.baselines:ReverseOrder",
    },
)
