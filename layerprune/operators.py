"""What stands in for a removed layer while removals are judged: nothing, or the layer's average effect on the stream.

Skipping a layer also takes away what it does to every token alike: it makes the residual stream longer, and shifts it.
Part of what a plain skip costs may be that gap alone, which a scale or a constant closes without the layer
(Prune&Comp, arXiv:2507.18212, scales; mean ablation is the usual operator of interpretability). The averages are taken
over tokens of the intact model, in such a way that they hold for runs of layers too: the factors of neighbours
multiply, and their mean updates add up, to those of the run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from layerprune.engine.walk import replaced_forwards, split_hidden
from layerprune.errors import ModelError
from layerprune.metrics.base import Data
from layerprune.metrics.reading import read, spread
from layerprune.subject import Subject

Correction = Literal["rescale", "mean"]  # documents.common.Operator without "skip", which corrects nothing

# Texts that are read at most, evenly spread over the items: some thousands of tokens. Their standard error on a factor
# is given in docs/notes/2026-11-25-objectives.md.
TEXTS = 128


@dataclass(frozen=True)
class Passage:
    """What each layer of an intact model does to the residual stream, on average over tokens; float64, on the CPU."""

    factors: torch.Tensor  # (layers,) geometric mean of |out| / |in|: a few enormous tokens do not decide it
    updates: torch.Tensor  # (layers, hidden) mean of out - in
    tokens: int  # how many tokens were averaged over


def average_passage(subject: Subject, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Passage:
    """Run the intact model and average over tokens.

    ``batches`` are pairs of token ids, (rows, tokens), and which of them count (padding does not), bool of that shape.
    Raises ``ModelError`` where an average is not a number.
    """
    depth, width = len(subject.layers), int(subject.model.config.get_text_config().hidden_size)
    logs, updates = torch.zeros(depth, dtype=torch.float64), torch.zeros(depth, width, dtype=torch.float64)
    count = 0
    with torch.no_grad():
        for ids, counted in batches:
            count += int(counted.sum())

            def make(index: int, original: Any, counted: torch.Tensor = counted) -> Any:
                def forward(*args: Any, **kwargs: Any) -> Any:
                    hidden = split_hidden(args, kwargs)[0]
                    before = hidden[counted.to(hidden.device)].double()  # (tokens, hidden), a copy: layers may write
                    output = original(*args, **kwargs)
                    hidden = output[0] if isinstance(output, tuple | list) else output
                    after = hidden[counted.to(hidden.device)].double().to(before.device)
                    logs[index] += (after.norm(dim=-1) / before.norm(dim=-1)).log().sum().cpu()
                    updates[index] += (after - before).sum(dim=0).cpu()
                    return output

                return forward

            with replaced_forwards(subject.layers, make):
                subject.model(input_ids=ids, use_cache=False)
    found = Passage((logs / count).exp(), updates / count, count)
    if not (found.factors.isfinite().all() and found.updates.isfinite().all()):
        raise ModelError("the layers' average effect is not a number: the model's states overflow; try --dtype float32")
    return found


@dataclass(frozen=True)
class StandIn:
    """Takes the place of removed layers (a ``bypass.PassOn``)."""

    passage: Passage
    correction: Correction
    mark: str  # stands for the correction and the texts it was measured on: part of the key of what is measured with it

    def __call__(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """Return what the removed layer hands on, given what comes in, (..., hidden)."""
        if self.correction == "rescale":
            return hidden * float(self.passage.factors[layer])
        return hidden + self.passage.updates[layer].to(hidden)


def stand_in(subject: Subject, correction: Correction, data: Data) -> StandIn:
    """Measure the intact model on up to ``TEXTS`` of the texts and return the correction."""
    texts = spread(data.texts, TEXTS)
    batches = read(subject, data, f"what {correction} needs to know of the layers", texts=texts)
    passage = average_passage(subject, ((batch.ids, batch.places("all")) for batch in batches))
    written = json.dumps([list(text) for text in texts], separators=(",", ":"))
    return StandIn(passage, correction, f"{correction} {hashlib.sha256(written.encode()).hexdigest()[:16]}")
