"""The statistics every claim rests on: exact tests, paired intervals, relevance, rank agreement. No torch."""

from layerprune.stats.certify import Certificate, Step, certify, draw_mixture, items_needed, loss_p_value
from layerprune.stats.exact import McNemar, above_chance, as_bits, holm, mcnemar
from layerprune.stats.intervals import (
    Bounds,
    bootstrap_interval,
    counted_interval,
    mean_interval,
    paired_interval,
    paired_intervals,
    quantile,
)
from layerprune.stats.ranks import Agreement, Overlap, confusion, correlations, overlap, rank_agreement
from layerprune.stats.relevance import clipped, displayed, relevance, relevance_interval, relevance_intervals
from layerprune.stats.reliability import TARGET, Losses, Reliability, mean_losses, resampled_losses, split_half, stepped

__all__ = [
    "TARGET",
    "Agreement",
    "Bounds",
    "Certificate",
    "Losses",
    "McNemar",
    "Overlap",
    "Reliability",
    "Step",
    "above_chance",
    "as_bits",
    "bootstrap_interval",
    "certify",
    "clipped",
    "confusion",
    "correlations",
    "counted_interval",
    "displayed",
    "draw_mixture",
    "holm",
    "items_needed",
    "loss_p_value",
    "mcnemar",
    "mean_interval",
    "mean_losses",
    "overlap",
    "paired_interval",
    "paired_intervals",
    "quantile",
    "rank_agreement",
    "relevance",
    "relevance_interval",
    "relevance_intervals",
    "resampled_losses",
    "split_half",
    "stepped",
]
