"""Relevance metrics: what each layer's removal is worth, by many measures behind one contract."""

from __future__ import annotations

from layerprune.registry import Registry
from layerprune.specs import build

METRICS = Registry(
    kind="metric",
    group="layerprune.metrics",
    builtin={
        "ablation": "layerprune.metrics.ablation:Ablation",
        "angular": "layerprune.metrics.angular:Angular",
        "cosine": "layerprune.metrics.cosine:Cosine",
        "magnitude": "layerprune.metrics.magnitude:Magnitude",
        "output": "layerprune.metrics.output:Output",
        "perplexity": "layerprune.metrics.perplexity:Perplexity",
        "random": "layerprune.metrics.baselines:Random",
        "relative": "layerprune.metrics.relative:Relative",
        "reverse-order": "layerprune.metrics.baselines:ReverseOrder",
        "shapley": "layerprune.metrics.shapley:Shapley",
        "taylor": "layerprune.metrics.taylor:Taylor",
    },
)


def cheapest_search(spec: str) -> str:
    """Return the search that asks a metric least: one-shot, and its own where it scores no single layers."""
    _, metric = build(METRICS, spec)
    return metric.search if metric.scope == "contiguous blocks" else "one-shot"
