"""Metrics from the model's predictions on text: perplexity, output distance, Taylor scores, Shapley values."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from layerprune.artifacts import Candidate
from layerprune.data.items import Request
from layerprune.errors import ModelError
from layerprune.models.model import LoadedModel
from layerprune.removal import Removal
from layerprune.scoring.aggregation import failures_last
from layerprune.scoring.engine import MEMORY, Engine
from layerprune.scoring.evaluator import not_finite
from layerprune.scoring.metrics.base import Batch, Data, Needs, Scope, Tokens, candidate, finite, read, spread
from layerprune.scoring.walk import replaced_forwards, split_hidden
from layerprune.stats import bootstrap_interval

# The loss on text under many removals: what ``perplexity`` and ``shapley`` ask.


INTACT = Removal(())


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
class Perplexity:
    """Rise of the mean loss over all tokens of the text; e to its power is the factor by which perplexity grows."""

    unit: ClassVar[str] = "nats/token"
    scope: ClassVar[Scope] = "any set"
    needs: ClassVar[Needs] = "text"
    cost: ClassVar[str] = "one forward pass per removal, shared work computed once"
    source: ClassVar[str] = "SLEB, arXiv:2402.09025; Shortened LLaMA, arXiv:2402.02834"
    search: ClassVar[str] = "greedy"

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
class Output:
    """Distance between the predictions of the intact and the smaller model, mean over tokens."""

    by: Distance = field(
        default="kl",
        metadata={"help": "KL(intact || smaller) in nats, 1 - cosine of the logits, or their Euclidean distance"},
    )
    tokens: Tokens = field(
        default="all", metadata={"help": "average over all tokens of each text, or take its last token only"}
    )

    unit: ClassVar[str] = "distance"
    scope: ClassVar[Scope] = "any set"
    needs: ClassVar[Needs] = "text"
    cost: ClassVar[str] = "one forward pass per removal"
    source: ClassVar[str] = "EvoPress, arXiv:2410.14649; FinerCut, arXiv:2405.18218"
    search: ClassVar[str] = "greedy"

    def score(self, loaded: LoadedModel, removals: Sequence[Removal], data: Data) -> list[Candidate]:
        """Run every batch intact and under each removal; logits are compared in float32."""
        most = min(LOGIT_BYTES, (data.memory or MEMORY) // LOGIT_TENSORS)
        budget = max(1, most // (4 * loaded.vocabulary))
        sums, count = [0.0] * len(removals), 0
        for batch in read(loaded, data, "output distance", budget):
            wanted = batch.places(self.tokens)
            count += int(wanted.sum())
            intact = _logits(loaded, Removal(()), batch.ids, wanted)
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


# Taylor scores: the first-order guess of what a layer's removal costs, for all layers from one backward pass.


# Tokens whose activations are kept for a backward pass; they take some 30 times the memory of a forward alone.
BATCH_TOKENS = 1024


@dataclass(frozen=True)
class Taylor:
    """What the loss on the text rises by, to first order, as the layers fade out; of a set: the sum over its layers."""

    of: Literal["update", "weights"] = field(
        default="update",
        metadata={
            "help": "fade the layer's update of the stream (signed), or each of its weights (sum of absolute values)"
        },
    )

    unit: ClassVar[str] = "nats/token, first order"
    scope: ClassVar[Scope] = "any set"
    needs: ClassVar[Needs] = "text"
    cost: ClassVar[str] = "one forward and one backward pass over the text for all layers"
    source: ClassVar[str] = "Shortened LLaMA, arXiv:2402.02834 (of=weights)"
    search: ClassVar[str] = "one-shot"

    def score(self, loaded: LoadedModel, removals: Sequence[Removal], data: Data) -> list[Candidate]:
        """Read the texts once, forward and backward, and add up the layers of each removal."""
        asked_about = [removal.layers for removal in removals]
        values = update_slopes(loaded, data) if self.of == "update" else weight_slopes(loaded, data)
        return [
            Candidate(
                removal=removal.layers,
                score=finite(sum(values[layer] for layer in layers), "the Taylor score of", removal),
            )
            for removal, layers in zip(removals, asked_about, strict=True)
        ]


def update_slopes(loaded: LoadedModel, data: Data) -> list[float]:
    """Return per layer -dL/da, nats/token, where the layer's update of the stream is scaled by 1 + a, at a = 0.

    L is the mean loss per predicted token. Taking a to -1 is skipping the layer: the slope is the guess of its cost.
    """
    depth = len(loaded.layers)
    totals = torch.zeros(depth, dtype=torch.float64)
    scales = [torch.zeros((), device=loaded.device, requires_grad=True) for _ in range(depth)]

    def make(index: int, original: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            before = split_hidden(args, kwargs)[0].clone()  # a layer may write to its input
            output = original(*args, **kwargs)
            after = output[0] if isinstance(output, tuple) else output
            scaled = after + scales[index].to(after) * (after - before.to(after))
            return (scaled, *output[1:]) if isinstance(output, tuple) else scaled

        return forward

    for batch in read(loaded, data, "Taylor", BATCH_TOKENS):
        with torch.enable_grad(), replaced_forwards(loaded.layers, make):
            slopes = torch.autograd.grad(summed_loss(loaded, batch), scales)
        totals -= torch.stack([slope.double().cpu() for slope in slopes])
    return [float(value) for value in totals / predicted_tokens(data.texts)]


def weight_slopes(loaded: LoadedModel, data: Data) -> list[float]:
    """Return per layer the sum over its weights of |w dL/dw|, nats/token; L is the mean loss per predicted token."""
    weights = [[w for w in layer.parameters() if w.dim() >= 2] for layer in loaded.layers]
    flat = [weight for own in weights for weight in own]
    if not flat or not all(weight.is_floating_point() for weight in flat):
        raise ModelError("the layers hold packed (quantised) weights: taylor:of=weights needs them as plain numbers")
    learned = [weight.requires_grad for weight in flat]
    sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in flat]
    try:
        for weight in flat:
            weight.requires_grad_(True)
        for batch in read(loaded, data, "Taylor", BATCH_TOKENS):
            with torch.enable_grad():  # weights that this text never reached (experts) have no slope
                slopes = torch.autograd.grad(summed_loss(loaded, batch), flat, allow_unused=True)
            for total, slope in zip(sums, slopes, strict=True):
                if slope is not None:
                    total += slope
    finally:
        for weight, before in zip(flat, learned, strict=True):
            weight.requires_grad_(before)
    products = iter([float((w.detach().double() * s).abs().sum()) for w, s in zip(flat, sums, strict=True)])
    return [sum(next(products) for _ in own) / predicted_tokens(data.texts) for own in weights]


def summed_loss(loaded: LoadedModel, batch: Batch) -> torch.Tensor:
    """Return the loss of a batch in nats, summed over every token of the texts but their first."""
    logits = loaded.model(input_ids=batch.ids, use_cache=False).logits[:, :-1]
    asked = batch.ids[:, 1:].to(logits.device)
    wanted = batch.places("all")[:, 1:].to(logits.device)
    return torch.nn.functional.cross_entropy(logits[wanted].float(), asked[wanted], reduction="sum")


# Shapley values: a layer's share of what all layers achieve together, fair to layers that stand in for each other.


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

    def score(self, loaded: LoadedModel, removals: Sequence[Removal], data: Data) -> list[Candidate]:
        """Let all layers go in random orders; the 95 % interval covers the choice of orders, not of texts."""
        asked_about = [list(removal.layers) for removal in removals]
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
