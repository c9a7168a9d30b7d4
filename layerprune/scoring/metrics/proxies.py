"""Proxies: scores read off the intact model, with no layer removed, and the baselines they have to beat."""

from __future__ import annotations

import math
import random
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from layerprune.artifacts import Candidate
from layerprune.errors import ModelError, UsageError
from layerprune.formatting import in_words, rounded_up
from layerprune.models.model import LoadedModel
from layerprune.registry import option
from layerprune.removal import Removal
from layerprune.scoring.memory import GRADE, LiveBytes, default_memory
from layerprune.scoring.metrics.base import (
    TOKENS_HELP,
    Batch,
    Data,
    Metric,
    Tokens,
    candidates,
    check_scope,
    finite,
    read,
)
from layerprune.scoring.metrics.loss import predicted_tokens
from layerprune.scoring.walk import split_hidden, wrapped_layers

# Hidden states: how far a layer, or a block of neighbouring layers, moves what goes through it.

Span = tuple[int, int]  # first and last layer of a block, both in it


@dataclass(frozen=True)
class HiddenStateMetric(Metric):
    """How far the hidden states in front of a block and behind it are apart, mean over tokens.

    A metric of this kind is its declaration and its formula, ``distance``.
    """

    tokens: Tokens = option("all", TOKENS_HELP)

    figure: ClassVar[str]  # what progress and errors call it
    scope = "single layers"
    cost = "one forward pass over the text for all layers"

    @abstractmethod
    def distance(self, before: Tensor, after: Tensor) -> Tensor:
        """Return each token's distance; both (tokens, hidden) in float64, the result (tokens,)."""

    def score(self, loaded: LoadedModel, removals: Sequence[Removal], data: Data) -> list[Candidate]:
        """Read the texts once; states are taken before the final norm, padding is not counted."""
        check_scope(type(self).__name__.lower(), self.scope, removals)
        spans = [(removal.layers[0], removal.layers[-1]) for removal in removals]
        return candidates(removals, state_distances(self, loaded, data, spans), self.figure)


@dataclass(frozen=True)
class Cosine(HiddenStateMetric):
    """1 - cos(layer input, layer output), mean over tokens: how much the layer turns the hidden states."""

    figure = "cosine"
    unit = "1-cos"
    source = "ShortGPT, arXiv:2403.03853"

    def distance(self, before: Tensor, after: Tensor) -> Tensor:
        return 1 - torch.cosine_similarity(before, after, dim=-1)


@dataclass(frozen=True)
class Angular(HiddenStateMetric):
    """arccos(cos(block input, block output)) / pi, mean over texts: 0 the same direction, 1 the opposite one."""

    tokens: Tokens = option("last", "take the last token of each text, as the paper does, or average over all")

    figure = "angular distance"
    unit = "angle/pi"
    scope = "contiguous blocks"
    cost = "one forward pass over the text for all blocks"
    source = "arXiv:2403.17887"
    search = "blocks"

    def distance(self, before: Tensor, after: Tensor) -> Tensor:
        """Return the angle from the unit vectors' sum and difference: arccos loses half the digits at small angles."""
        a, b = before / before.norm(dim=-1, keepdim=True), after / after.norm(dim=-1, keepdim=True)
        return 2 * torch.atan2((a - b).norm(dim=-1), (a + b).norm(dim=-1)) / math.pi


@dataclass(frozen=True)
class Relative(HiddenStateMetric):
    """|layer output - layer input| / |layer input|, mean over tokens: the size of the layer's update of the stream."""

    figure = "relative update"
    unit = "update/stream"
    source = "arXiv:2505.13898"

    def distance(self, before: Tensor, after: Tensor) -> Tensor:
        return (after - before).norm(dim=-1) / before.norm(dim=-1)


@torch.no_grad()
def state_distances(metric: HiddenStateMetric, loaded: LoadedModel, data: Data, spans: Sequence[Span]) -> list[float]:
    """Return for each block the mean over tokens of the distance between what goes in and what comes out, in one pass.

    What comes out of the last layer is taken before the final norm. States are compared in float64; one is kept while a
    block that began there is open.
    """
    sums, count = dict.fromkeys(spans, 0.0), 0
    ends = {first: max(last for start, last in spans if start == first) for first, _ in spans}
    held: dict[int, Tensor] = {}

    def forward(index: int, original: Any, *args: Any, **kwargs: Any) -> Any:
        if index in ends:
            hidden = split_hidden(args, kwargs)[0]
            held[index] = hidden[wanted.to(hidden.device)]  # (tokens, hidden), a copy: layers may write to it
        output = original(*args, **kwargs)
        for first in [start for start in held if (start, index) in sums]:
            hidden = output[0] if isinstance(output, tuple) else output
            after = hidden[wanted.to(hidden.device)].to(held[first].device)
            sums[first, index] += float(metric.distance(held[first].double(), after.double()).sum())
        for first in [start for start in held if ends[start] == index]:
            del held[first]
        return output

    for batch in read(loaded, data, metric.figure):
        wanted = batch.places(metric.tokens)
        count += int(wanted.sum())
        with wrapped_layers(loaded.layers, forward):
            loaded.model(input_ids=batch.ids, use_cache=False)
    return [finite(sums[span] / count, metric.figure, span) for span in spans]


# Weight magnitude: layers with small weights go first. Needs no data and knows nothing about them.


@dataclass(frozen=True)
class Magnitude(Metric):
    """Norm of all weight matrices of the removed layers together (biases and norm weights left out)."""

    norm: Literal["l1", "l2"] = option("l1", "sum of absolute values, or root of the sum of squares")

    unit = "weight norm"
    needs = ()
    cost = "none"
    source = "Shortened LLaMA, arXiv:2402.02834"

    def score(self, loaded: LoadedModel, removals: Sequence[Removal], data: Data) -> list[Candidate]:
        """Add up the weights of every layer asked about once; raises ``ModelError`` where they are not numbers."""
        power = 1 if self.norm == "l1" else 2
        sums = {}
        for layer in {layer for removal in removals for layer in removal}:
            with loaded.layer(layer) as module:
                (matrices,) = weight_matrices([module], "magnitude")
                sums[layer] = sum(float(weight.detach().double().abs().pow(power).sum()) for weight in matrices)
        norms = [sum(sums[i] for i in removal.layers) ** (1 / power) for removal in removals]
        return candidates(removals, norms, "magnitude")


def weight_matrices(layers: Iterable[nn.Module], metric: str) -> list[list[nn.Parameter]]:
    """Return each layer's weight matrices; raises ``ModelError`` where they are not plain numbers."""
    matrices = [[weight for weight in layer.parameters() if weight.dim() >= 2] for layer in layers]
    flat = [weight for own in matrices for weight in own]
    if not flat or not all(weight.is_floating_point() for weight in flat):
        raise ModelError(f"the layers hold packed (quantised) weights: {metric} needs them as plain numbers")
    return matrices


# Baselines every comparison should show: no metric is worth its price that does not beat these.


@dataclass(frozen=True)
class Random(Metric):
    """A number drawn with the seed: what a ranking without any information gives."""

    unit = "random"
    needs = ()
    cost = "none"
    source = "baseline"

    def score(self, loaded: LoadedModel, removals: Sequence[Removal], data: Data) -> list[Candidate]:
        """Draw one number for each removal; it depends on the seed and the removal only."""
        drawn = [round(random.Random(f"{data.seed}:{removal}").random(), 6) for removal in removals]
        return candidates(removals, drawn, "random")


@dataclass(frozen=True)
class ReverseOrder(Metric):
    """Layers from the end first, the last one kept: how deep the layer lies, counted from the end."""

    unit = "layers from the end"
    scope = "single layers"
    needs = ()
    cost = "none"
    source = "baseline"

    def score(self, loaded: LoadedModel, removals: Sequence[Removal], data: Data) -> list[Candidate]:
        """Score a layer by its distance from the end; the last layer, which shapes the output, scores highest."""
        check_scope("reverse-order", self.scope, removals)
        depth = len(loaded.layers)
        places = [depth - 1 - layer or depth for removal in removals for layer in removal.layers]
        return candidates(removals, places, "reverse-order")


# Taylor scores: the first-order guess of what a layer's removal costs, for all layers from one backward pass.


# Tokens whose activations are kept for a backward pass; they take some 30 times the memory of a forward alone.
BACKWARD_TOKENS = 1024


@dataclass(frozen=True)
class Taylor(Metric):
    """What the loss on the text rises by, to first order, as the layers fade out; of a set: the sum over its layers."""

    of: Literal["update", "weights"] = field(
        default="update",
        metadata={
            "help": "fade the layer's update of the stream (signed), or each of its weights (sum of absolute values)"
        },
    )

    unit = "nats/token, first order"
    cost = "one forward and backward pass over the text for all layers; of=weights takes more if --memory is small"
    source = "Shortened LLaMA, arXiv:2402.02834 (of=weights)"

    def score(self, loaded: LoadedModel, removals: Sequence[Removal], data: Data) -> list[Candidate]:
        """Read the texts once, forward and backward, and add up the layers of each removal."""
        if loaded.stream is not None:
            raise UsageError("taylor: gradients need all layers in memory, where this model does not fit; use ablation")
        values = update_slopes(loaded, data) if self.of == "update" else weight_slopes(loaded, data)
        sums = [sum(values[layer] for layer in removal.layers) for removal in removals]
        return candidates(removals, sums, "the Taylor score of")


def update_slopes(loaded: LoadedModel, data: Data) -> list[float]:
    """Return per layer -dL/da, nats/token, where the layer's update of the stream is scaled by 1 + a, at a = 0.

    L is the mean loss per predicted token. Taking a to -1 is skipping the layer: the slope is the guess of its cost.
    """
    depth = len(loaded.layers)
    totals = torch.zeros(depth, dtype=torch.float64)
    scales = [torch.zeros((), device=loaded.device, requires_grad=True) for _ in range(depth)]

    def forward(index: int, original: Any, *args: Any, **kwargs: Any) -> Any:
        before = split_hidden(args, kwargs)[0].clone()  # a layer may write to its input
        output = original(*args, **kwargs)
        after = output[0] if isinstance(output, tuple) else output
        scaled = after + scales[index].to(after) * (after - before.to(after))
        return (scaled, *output[1:]) if isinstance(output, tuple) else scaled

    for batch in read(loaded, data, "Taylor", BACKWARD_TOKENS):
        with torch.enable_grad(), wrapped_layers(loaded.layers, forward):
            slopes = torch.autograd.grad(summed_loss(loaded, batch), scales)
        totals -= torch.stack([slope.double().cpu() for slope in slopes])
    return [float(value) for value in totals / predicted_tokens(data.texts)]


# Elements of a weight that are multiplied with their slopes at once, and the most bytes that takes of each.
SLICE, SLICE_BYTES = 2**20, 24
SLICE_SHARE = 0.25  # of the memory, at most, for that
BATCH_SHARE = 0.5  # of the memory, at most, for what a batch keeps for its backward pass; sums take the rest

Portion = dict[nn.Parameter, slice]  # which elements of which weights, flattened


def weight_slopes(loaded: LoadedModel, data: Data) -> list[float]:
    """Return per layer the sum over its weights of |w dL/dw|, nats/token; L is the mean loss per predicted token.

    A gradient is used up as soon as it is there, so that one is held at a time, and all there is beside the weights
    stays within ``data.memory``. Slopes are added up over the batches in float32; where that takes more than there is
    for all weights at once, the texts are read again for each portion of them. Raises ``UsageError`` where the memory
    does not hold the longest text alone.
    """
    memory = data.memory or default_memory(loaded)
    layers = weight_matrices(loaded.layers, "taylor:of=weights")
    weights = list(dict.fromkeys(weight for own in layers for weight in own))  # one may serve several layers
    size = max(1, min(SLICE, int(SLICE_SHARE * memory) // SLICE_BYTES))
    longest = max(map(len, data.texts))
    with _nothing_learned(loaded.model):
        row = _bytes_of_row(loaded, max(data.texts, key=len), weights)
        rows = min(int(BATCH_SHARE * memory) // row, max(1, BACKWARD_TOKENS // longest))
        if not rows:
            raise UsageError(
                f"--memory {in_words(memory)} does not hold a text of {longest} tokens with its backward pass "
                f"(taylor:of=weights); the least that does is {rounded_up(math.ceil(row / BATCH_SHARE))}"
            )
        tokens = BACKWARD_TOKENS if rows == max(1, BACKWARD_TOKENS // longest) else rows * longest
        alone = len(data.texts) == 1 or len(data.texts) * longest <= tokens  # one batch: nothing is to be added up
        room = memory - rows * row - size * SLICE_BYTES
        totals = dict.fromkeys(weights, 0.0)
        for portion in portions(weights, sum(map(nn.Parameter.numel, weights)) if alone else max(1, room // 4)):
            for weight, total in _weights_times_slopes(loaded, data, tokens, portion, size, alone=alone).items():
                totals[weight] += total
    return [sum(totals[weight] for weight in own) / predicted_tokens(data.texts) for own in layers]


def _weights_times_slopes(
    loaded: LoadedModel, data: Data, tokens: int, portion: Portion, size: int, *, alone: bool
) -> dict[nn.Parameter, float]:
    """Return the sum of |w dL/dw| over a portion of each weight, ``size`` elements at a time.

    ``alone``: the texts are one batch of up to ``tokens`` tokens, and no sum over batches is kept.
    """
    totals = dict.fromkeys(portion, 0.0)
    slopes = {} if alone else {w: torch.zeros(own.stop - own.start, device=w.device) for w, own in portion.items()}

    def multiply(weight: nn.Parameter, part: slice, slope: Tensor) -> None:
        totals[weight] += float((weight.detach().view(-1)[part].double() * slope).abs_().sum())

    def use(weight: nn.Parameter) -> None:
        assert weight.grad is not None
        for place, part in _parts(portion[weight], size):
            slope = weight.grad.view(-1)[part].float()
            if alone:
                multiply(weight, part, slope)
            else:
                slopes[weight][place] += slope

    for batch in read(loaded, data, "Taylor", tokens):
        _backward(loaded, batch, list(portion), use)
    for weight, slope in slopes.items():
        for place, part in _parts(portion[weight], size):
            multiply(weight, part, slope[place])
    return totals


def _parts(whole: slice, size: int) -> Iterator[tuple[slice, slice]]:
    """Yield parts of up to ``size`` elements: their places in ``whole``, and beyond it."""
    for start in range(0, whole.stop - whole.start, size):
        stop = min(start + size, whole.stop - whole.start)
        yield slice(start, stop), slice(whole.start + start, whole.start + stop)


def portions(weights: Sequence[nn.Parameter], most: int) -> list[Portion]:
    """Divide the elements of the weights, in order, into as few portions of up to ``most`` as there can be."""
    total = sum(weight.numel() for weight in weights)
    size = math.ceil(total / math.ceil(total / most))
    made: list[Portion] = []
    left = 0
    for weight in weights:
        start = 0
        while start < weight.numel():
            if not left:
                made.append({})
                left = size
            stop = min(weight.numel(), start + left)
            made[-1][weight] = slice(start, stop)
            start, left = stop, left - (stop - start)
    return made


def _bytes_of_row(loaded: LoadedModel, text: tuple[int, ...], weights: Sequence[nn.Parameter]) -> int:
    """Return the most bytes that are alive at once beside the weights while a text is read forward and backward."""
    ids = torch.tensor([text], device=loaded.device)
    batch = Batch(ids, torch.tensor([len(text)], device=loaded.device))
    with LiveBytes(lambda: GRADE) as counter:
        _backward(loaded, batch, weights, lambda weight: None)
    return max(event.alive for event in counter.events)


def _backward(
    loaded: LoadedModel, batch: Batch, weights: Sequence[nn.Parameter], use: Callable[[nn.Parameter], None]
) -> None:
    """Read a batch forward and backward; each weight is given to ``use`` with its gradient, which is then freed."""

    def used(weight: Tensor) -> None:
        use(weight)  # type: ignore[arg-type]  # a hook of a parameter is given the parameter
        weight.grad = None

    handles = [weight.requires_grad_(True).register_post_accumulate_grad_hook(used) for weight in weights]
    try:
        with torch.enable_grad():
            loss = summed_loss(loaded, batch)
            if loss.requires_grad:  # weights that this text never reached (experts) have no slope
                loss.backward()  # type: ignore[no-untyped-call]
    finally:
        for weight, handle in zip(weights, handles, strict=True):
            handle.remove()
            weight.requires_grad_(False)
            weight.grad = None


@contextmanager
def _nothing_learned(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient and none has one; afterwards all are as they were."""
    before = [(weight, weight.requires_grad, weight.grad) for weight in model.parameters()]
    try:
        for weight, _, _ in before:
            weight.requires_grad_(False)
            weight.grad = None
        yield
    finally:
        for weight, learned, slope in before:
            weight.requires_grad_(learned)
            weight.grad = slope


def summed_loss(loaded: LoadedModel, batch: Batch) -> Tensor:
    """Return the loss of a batch in nats, summed over every token of the texts but their first."""
    logits = loaded.model(input_ids=batch.ids, use_cache=False).logits[:, :-1]
    asked = batch.ids[:, 1:].to(logits.device)
    wanted = batch.places("all")[:, 1:].to(logits.device)
    return torch.nn.functional.cross_entropy(logits[wanted].float(), asked[wanted], reduction="sum")
