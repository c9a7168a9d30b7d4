"""Shapley values: a layer's share of what all layers achieve together, fair to layers that stand in for each other."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from layerprune.documents import Candidate
from layerprune.engine.exam import not_finite
from layerprune.judgement import failures_last
from layerprune.metrics.base import Data, Needs, Scope
from layerprune.metrics.losses import predicted_tokens, text_losses
from layerprune.metrics.reading import candidate, spread
from layerprune.removal import Removal
from layerprune.subject import Subject

Gone = frozenset[int]
Game = Callable[[Sequence[Gone]], Sequence[float]]  # what it costs when these players are gone


@dataclass(frozen=True)
class Shapley:
    """Mean rise of the loss when the layer goes, over random orders in which all layers go one after the other.

    The values of all layers add up to the loss without any layer minus the loss of the intact model. A set of layers
    is worth the sum of its layers.
    """

    permutations: int = field(default=8, metadata={"help": "random orders; the interval shrinks with their root"})
    texts: int = field(default=64, metadata={"help": "texts read at most, evenly spread over the items"})

    unit: ClassVar[str] = "nats/token, shared out"
    scope: ClassVar[Scope] = "any set"
    needs: ClassVar[Needs] = "text"
    cost: ClassVar[str] = "permutations x layers forward passes over the texts, half of each on average"
    source: ClassVar[str] = "arXiv:2409.14381"
    search: ClassVar[str] = "one-shot"

    def __post_init__(self) -> None:
        if self.permutations < 2 or self.texts < 1:
            raise ValueError(f"needed are 2 permutations and 1 text, got {self.permutations} and {self.texts}")

    def score(self, subject: Subject, removals: Sequence[Removal], data: Data) -> list[Candidate]:
        """Let all layers go in random orders; the 95 % interval covers the choice of orders, not of texts."""
        asked_about = [list(removal.layers) for removal in removals]
        texts = spread(data.texts, self.texts)

        failed = set[Gone]()

        def losses(sets: Sequence[Gone]) -> Sequence[float]:
            asked = [Removal.from_layers(gone) for gone in sets]
            found = text_losses(subject, texts, asked, data, "Shapley values").sum(axis=1) / predicted_tokens(texts)
            known = np.isfinite(found)
            if not known[sets.index(frozenset())]:
                raise not_finite(subject, "losses")
            failed.update(gone for gone, fine in zip(sets, known, strict=True) if not fine)
            return np.where(known, found, found[known].max()).tolist()  # without a finite loss: as bad as the worst

        orders = drawn_orders(len(subject.layers), self.permutations, data.seed)
        rises = marginal_rises(losses, orders)  # (permutations, layers)
        breaking = breaking_players(orders, failed)
        found = []
        for removal, layers in zip(removals, asked_about, strict=True):
            own = rises[:, layers].sum(axis=1)
            value, half = float(own.mean()), half_width(own)
            interval = (round(value - half, 6), round(value + half, 6))
            found.append(candidate(removal, value, interval, failed=not breaking.isdisjoint(layers)))
        return failures_last(found)


def breaking_players(orders: Sequence[Sequence[int]], failed: Collection[Gone]) -> set[int]:
    """Return the players whose going made a cost no finite number; ``failed`` are the sets that have none."""
    return {
        player
        for order in orders
        for turn, player in enumerate(order)
        if frozenset(order[: turn + 1]) in failed and frozenset(order[:turn]) not in failed
    }


def half_width(sample: np.ndarray) -> float:
    """Return half the width of the 95 % interval of a mean, by Student's t: there are few orders."""
    from scipy.stats import t

    return float(t.ppf(0.975, len(sample) - 1) * sample.std(ddof=1) / np.sqrt(len(sample)))


def drawn_orders(players: int, count: int, seed: int) -> list[list[int]]:
    """Draw ``count`` orders in which the players go."""
    rng = random.Random(seed)
    return [rng.sample(range(players), players) for _ in range(count)]


def marginal_rises(game: Game, orders: Sequence[Sequence[int]]) -> np.ndarray:
    """Return what each player's going adds to the cost in each order, (orders, players); every set is asked once.

    The mean over all orders there are is the Shapley value; over a sample of orders it is an unbiased estimate whose
    sum over the players is exact.
    """
    paths = [[frozenset(order[:count]) for count in range(len(order) + 1)] for order in orders]
    sets = sorted({gone for path in paths for gone in path}, key=lambda gone: (len(gone), sorted(gone)))
    cost = dict(zip(sets, game(sets), strict=True))
    rises = np.empty((len(orders), len(orders[0])))
    for number, (order, path) in enumerate(zip(orders, paths, strict=True)):
        for turn, player in enumerate(order):
            rises[number, player] = cost[path[turn + 1]] - cost[path[turn]]
    return rises
