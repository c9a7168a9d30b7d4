"""Benchmark items and text: lm-eval tasks, how items are judged, corpora for healing and perplexity."""
