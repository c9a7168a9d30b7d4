"""Relevance metrics: what each layer's removal is worth, by many measures behind one contract."""

from __future__ import annotations

from layerprune.registry import Registry, build

METRICS = Registry(
    kind="metric",
    group="layerprune.metrics",
    base="layerprune.scoring.metrics.base:Metric",
    builtin={
        "ablation": "layerprune.scoring.metrics.ablation:Ablation",
        "angular": "layerprune.scoring.metrics.proxies:Angular",
        "cosine": "layerprune.scoring.metrics.proxies:Cosine",
        "magnitude": "layerprune.scoring.metrics.proxies:Magnitude",
        "output": "layerprune.scoring.metrics.loss:Output",
        "perplexity": "layerprune.scoring.metrics.loss:Perplexity",
        "random": "layerprune.scoring.metrics.proxies:Random",
        "relative": "layerprune.scoring.metrics.proxies:Relative",
        "reverse-order": "layerprune.scoring.metrics.proxies:ReverseOrder",
        "shapley": "layerprune.scoring.metrics.loss:Shapley",
        "taylor": "layerprune.scoring.metrics.proxies:Taylor",
    },
)


def cheapest_search(spec: str) -> str:
    """Return the search that asks a metric least: one-shot, and its own where it scores no single layers."""
    _, metric = build(METRICS, spec)
    return metric.search if metric.scope == "contiguous blocks" else "one-shot"
