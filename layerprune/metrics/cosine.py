"""Cosine score: how little a layer turns its input. The cheap baseline that everyone uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from layerprune.documents import Candidate
from layerprune.engine.trees import batches, chains
from layerprune.engine.walk import replaced_forwards, split_hidden
from layerprune.metrics.base import Data, Needs, Scope, check_scope
from layerprune.removal import Removal
from layerprune.subject import Subject
from layerprune.tasks.items import Request

BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Cosine:
    """1 - cos(layer input, layer output), mean over tokens: how much the layer turns the hidden states."""

    tokens: Literal["all", "last"] = field(
        default="all", metadata={"help": "average over all tokens of each text, or take its last token only"}
    )

    unit: ClassVar[str] = "1-cos"
    scope: ClassVar[Scope] = "single layers"
    needs: ClassVar[Needs] = "text"
    cost: ClassVar[str] = "one forward pass over the text for all layers"
    source: ClassVar[str] = "ShortGPT, arXiv:2403.03853"
    search: ClassVar[str] = "one-shot"

    def score(self, subject: Subject, removals: Sequence[Removal], data: Data) -> list[Candidate]:
        """Read the texts once; states are taken before the final norm, padding is not counted."""
        check_scope("cosine", self.scope, removals)
        scores = self.of_layers(subject, data)
        return [Candidate(removal=removal.units, score=scores[removal.layers[0]]) for removal in removals]

    def of_layers(self, subject: Subject, data: Data) -> list[float]:
        """Return the score of every layer."""
        rows = chains([Request((*text, 0), 1) for text in data.texts])  # a row reads all tokens of its text
        sums = torch.zeros(len(subject.layers), dtype=torch.float64)
        count = 0
        with data.progress.task("cosine", sum(row.length for row in rows), "tokens") as advance:
            for batch in batches(rows, BATCH_TOKENS):
                lengths = torch.tensor([row.length for row in batch])
                ids = torch.zeros(len(batch), int(lengths.max()), dtype=torch.long)
                for number, row in enumerate(batch):
                    ids[number, : row.length] = torch.from_numpy(row.tokens)
                places = torch.arange(ids.shape[1])[None]
                wanted = places < lengths[:, None] if self.tokens == "all" else places == lengths[:, None] - 1
                sums += _turned(subject, ids.to(subject.device), wanted.to(subject.device))
                count += int(wanted.sum())
                advance(int(lengths.sum()))
        return [float(f"{value:.9g}") for value in (sums / count).tolist()]


@torch.no_grad()
def _turned(subject: Subject, ids: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return per layer the sum over the wanted tokens of 1 - cos(input, output); ``ids`` is (rows, tokens)."""
    turned = torch.zeros(len(subject.layers), dtype=torch.float64)

    def make(index: int, original: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            before = split_hidden(args, kwargs)[0][wanted].double()  # (tokens, hidden); a view may be written to below
            output = original(*args, **kwargs)
            after = (output[0] if isinstance(output, tuple) else output)[wanted].double()
            turned[index] = (1 - torch.cosine_similarity(before, after, dim=-1)).sum().cpu()
            return output

        return forward

    with replaced_forwards(subject.layers, make):
        # Right padding needs no mask: causal attention never looks to the right.
        subject.model(input_ids=ids, use_cache=False)
    return turned
