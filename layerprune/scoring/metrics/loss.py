"""Metrics from the smaller model's predictions on text: perplexity, output distance, Shapley values."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from layerprune.artifacts import Candidate
from layerprune.data.items import Request
from layerprune.models.model import LoadedModel
from layerprune.registry import option
from layerprune.removal import Removal
from layerprune.scoring.aggregation import failures_last
from layerprune.scoring.engine import Engine
from layerprune.scoring.evaluator import not_finite
from layerprune.scoring.memory import default_memory
from layerprune.scoring.metrics.base import INTACT, TOKENS_HELP, Data, Metric, Tokens, candidate, read, spread
from layerprune.stats import bootstrap_interval

# The loss on text under many removals: what ``perplexity`` and ``shapley`` ask.


def text_losses(
    loaded: LoadedModel, texts: Sequence[tuple[int, ...]], removals: Sequence[Removal], data: Data, label: str
) -> np.ndarray:
    """Return the loss of every text under every removal, in nats summed over its tokens; (removals, texts).

    Every token but a text's first is predicted. What removals have in common is computed once.
    """
    engine = Engine(loaded, rows=data.rows, memory=data.memory)
    requests = [Request(tuple(text), len(text) - 1) for text in texts]
    with data.progress.task(label, len(texts) * len(removals), "texts") as advance:
        sums, _ = engine.measure(requests, [[i] for i in range(len(texts))], removals, advance)
    return -sums


def predicted_tokens(texts: Sequence[tuple[int, ...]]) -> int:
    """Return how many tokens of the texts are predicted."""
    return sum(len(text) - 1 for text in texts)


# Perplexity: how much worse the model predicts the text itself, not the answers, when the layers are gone.


@dataclass(frozen=True)
class Perplexity(Metric):
    """Rise of the mean loss over all tokens of the text; e to its power is the factor by which perplexity grows."""

    unit = "nats/token"
    cost = "one forward pass per removal, shared work computed once"
    source = "SLEB, arXiv:2402.09025; Shortened LLaMA, arXiv:2402.02834"
    search = "greedy"

    def score(self, loaded: LoadedModel, removals: Sequence[Removal], data: Data) -> list[Candidate]:
        """Read the texts intact and under each removal; the 95 % interval is a paired bootstrap over the texts."""
        texts = data.texts
        losses = text_losses(loaded, texts, [INTACT, *removals], data, "perplexity")
        # Scaled so that the plain mean over the texts is the mean over the tokens.
        if not np.isfinite(losses[0]).all():
            raise not_finite(loaded, "losses")
        rises = (losses[1:] - losses[0]) * (len(texts) / predicted_tokens(texts))  # (removals, texts)
        found = []
        for removal, own in zip(removals, rises, strict=True):
            interval = None  # a single text says nothing about others
            if len(own) > 1 and np.isfinite(own).all():
                low, high = bootstrap_interval([own], seed=data.seed)
                interval = (round(low, 6), round(high, 6))
            found.append(candidate(removal, float(own.mean()), interval))
        return failures_last(found)


# Output distance: how far the model's predictions move when the layers are gone, whatever the right answer is.


Distance = Literal["kl", "cosine", "l2"]

# Logits of one batch may take this much in float32, and with --memory its part: so many tensors of their size are alive
# at once (the intact model's and the smaller one's as they come and in float32, both log-softmaxes and what is made of
# them).
LOGIT_BYTES = 256 * 1024**2
LOGIT_TENSORS = 8


@dataclass(frozen=True)
class Output(Metric):
    """Distance between the predictions of the intact and the smaller model, mean over tokens."""

    by: Distance = option("kl", "KL(intact || smaller) in nats, 1 - cosine of the logits, or their Euclidean distance")
    tokens: Tokens = option("all", TOKENS_HELP)

    unit = "distance"
    cost = "one forward pass per removal"
    source = "EvoPress, arXiv:2410.14649; FinerCut, arXiv:2405.18218"
    search = "greedy"

    def score(self, loaded: LoadedModel, removals: Sequence[Removal], data: Data) -> list[Candidate]:
        """Run every batch intact and under each removal; logits are compared in float32."""
        most = min(LOGIT_BYTES, (data.memory or default_memory(loaded)) // LOGIT_TENSORS)
        budget = max(1, most // (4 * loaded.vocabulary))
        sums, count = [0.0] * len(removals), 0
        for batch in read(loaded, data, "output distance", budget):
            wanted = batch.places(self.tokens)
            count += int(wanted.sum())
            intact = _logits(loaded, INTACT, batch.ids, wanted)
            if not bool(intact.isfinite().all()):
                raise not_finite(loaded, "logits")
            for number, removal in enumerate(removals):
                own = _logits(loaded, removal, batch.ids, wanted)
                sums[number] += float(distance(self.by, intact, own).double().sum())
        return failures_last([candidate(removal, total / count) for removal, total in zip(removals, sums, strict=True)])


@torch.no_grad()
def _logits(loaded: LoadedModel, removal: Removal, ids: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Return the logits at the wanted places, (tokens, vocabulary), float32."""
    with loaded.without(removal) as model:
        logits = model(input_ids=ids, use_cache=False).logits
    return logits[wanted.to(logits.device)].float()


def distance(by: Distance, intact: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Return each token's distance; both (tokens, vocabulary) logits, the result (tokens,)."""
    if by == "l2":
        return (own - intact).norm(dim=-1)
    if by == "cosine":
        return 1 - torch.cosine_similarity(intact, own, dim=-1)
    p, q = intact.log_softmax(-1), own.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


# Shapley values: a layer's share of what all layers achieve together, fair to layers that stand in for each other.


Gone = frozenset[int]
Game = Callable[[Sequence[Gone]], Sequence[float]]  # what it costs when these players are gone


@dataclass(frozen=True)
class Shapley(Metric):
    """Mean rise of the loss when the layer goes, over random orders in which all layers go one after the other.

    The values of all layers add up to the loss without any layer minus the loss of the intact model. A set of layers
    is worth the sum of its layers.
    """

    permutations: int = option(8, "random orders; the interval shrinks with their root", (2, 10_000))
    texts: int = option(64, "texts read at most, evenly spread over the items", (1, 10**6))

    unit = "nats/token, shared out"
    cost = "permutations x layers forward passes over the texts, half of each on average"
    source = "arXiv:2409.14381"

    def score(self, loaded: LoadedModel, removals: Sequence[Removal], data: Data) -> list[Candidate]:
        """Let all layers go in random orders; the 95 % interval covers the choice of orders, not of texts."""
        texts = spread(data.texts, self.texts)
        failed = set[Gone]()

        def losses(sets: Sequence[Gone]) -> Sequence[float]:
            asked = [Removal.from_layers(gone) for gone in sets]
            found = text_losses(loaded, texts, asked, data, "Shapley values").sum(axis=1) / predicted_tokens(texts)
            known = np.isfinite(found)
            if not known[sets.index(frozenset())]:
                raise not_finite(loaded, "losses")
            failed.update(gone for gone, fine in zip(sets, known, strict=True) if not fine)
            return np.where(known, found, found[known].max()).tolist()  # without a finite loss: as bad as the worst

        orders = drawn_orders(len(loaded.layers), self.permutations, data.seed)
        rises = marginal_rises(losses, orders)  # (permutations, layers)
        breaking = breaking_players(orders, failed)
        found = []
        for removal in removals:
            own = rises[:, list(removal)].sum(axis=1)
            value, half = float(own.mean()), half_width(own)
            interval = (round(value - half, 6), round(value + half, 6))
            found.append(candidate(removal, value, interval, failed=not breaking.isdisjoint(removal)))
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
        rises[number, list(order)] = np.diff([cost[gone] for gone in path])
    return rises
