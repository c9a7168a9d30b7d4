"""What ``layerprune heal`` and ``run`` show of a healing."""

from __future__ import annotations

import math

from layerprune.documents import HealLog


def healed(log: HealLog) -> list[str]:
    """Return a line on the work, one on the corpus, one on what was won back, and the method's own remarks."""
    read = f", {log.tokens:,} tokens read" if log.tokens else ""
    parts = [f"{log.method.spec}: {len(log.changed)} tensors changed in {log.seconds:.1f} s{read}"]
    if log.found:
        parts.append("settled on: " + ", ".join(f"{name} {_short(value)}" for name, value in log.found.items()))
    for task, overlap in (log.corpus.overlap if log.corpus else {}).items():
        parts.append(f"in the corpus: {len(overlap.found)} of {overlap.items} items of {task}")
    return [*parts, *_heldout(log), *(f"note: {note}" for note in log.notes)]


def _heldout(log: HealLog) -> list[str]:
    loss = log.heldout
    if loss is None or log.corpus is None:
        return []
    said = f"perplexity {math.exp(loss.before):.2f} -> {math.exp(loss.after):.2f}"
    if loss.base is not None:
        said += f", base {math.exp(loss.base):.2f}"
    if loss.recovered is not None:
        said += f": {100 * loss.recovered:.0f} % of the lost nats won back"
    return [f"{said} (held out: {log.corpus.heldout_windows} windows of {log.corpus.window} tokens)"]


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
