"""The statistics every claim rests on: exact tests, paired intervals, relevance, rank agreement. No torch."""

from layerprune.stats.certify import Certificate, Step, certify, draw_mixture, loss_p_value
from layerprune.stats.exact import McNemar, above_chance, as_bits, holm, mcnemar
from layerprune.stats.intervals import Bounds, bootstrap_interval, mean_interval, paired_interval, paired_intervals
from layerprune.stats.ranks import Agreement, rank_agreement
from layerprune.stats.relevance import relevance, relevance_interval, relevance_intervals

__all__ = [
    "Agreement",
    "Bounds",
    "Certificate",
    "McNemar",
    "Step",
    "above_chance",
    "as_bits",
    "bootstrap_interval",
    "certify",
    "draw_mixture",
    "holm",
    "loss_p_value",
    "mcnemar",
    "mean_interval",
    "paired_interval",
    "paired_intervals",
    "rank_agreement",
    "relevance",
    "relevance_interval",
    "relevance_intervals",
]
