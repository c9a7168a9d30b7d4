"""``rescale``: the stream behind a cut is as long as it was behind the removed run, by a factor folded into weights.

Layers add to the residual stream, and it grows on its way. Behind a cut it is shorter than what the next layers were
trained on, so that what they add weighs too much. Prune&Comp (arXiv:2507.18212) closes the gap with one factor, the
mean ratio of the stream's length behind the removed run to its length before it.

**Why it can be folded.** Let x be the stream at the cut, a the factor, and f_j what later layer j adds. A layer reads
the stream through an RMSNorm or LayerNorm N, and N(c x) = N(x) for every c > 0, up to the epsilon under the root.
Multiplying the stream by a at the cut gives ``a x + sum f_j`` at the end. Divide all of it by a: ``x + sum f_j / a``,
of which every norm makes the same, the final one too. So instead of scaling everything that was written *before* the
cut (embeddings and output projections, as the paper has it, which would need care where embeddings are tied to the
head), what every layer *behind* the cut writes is divided by a: the attention's and the MLP's output projection and
their biases. The factors of several cuts multiply. A cut behind the last layer needs nothing: only the final norm
follows.

A model that reads its stream without a norm somewhere is not invariant. That is not looked up but tried: the folded
weights must give the logits of the model whose stream is multiplied at the cuts, or the model is refused.

**The factor** is the geometric mean of |out| / |in| of each removed layer, over the tokens of the base, so that a few
enormous tokens do not decide it; a run's factor is the product.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from layerprune.checkpoint import Checkpoint
from layerprune.corpus import Windows
from layerprune.engine.walk import replaced_forwards, split_hidden
from layerprune.errors import ModelError, RefusedError
from layerprune.healing.base import Case, Changed, Needs
from layerprune.healing.losses import id_batches
from layerprune.healing.names import names_on_disk, read_tensor, stored_as
from layerprune.healing.projections import Projection, output_projections
from layerprune.healing.streams import CHECK_TOKENS, Stream
from layerprune.removal import Removal
from layerprune.subject import Subject

CHECK_TOLERANCE = 1e-3  # of the largest logit, float32; a norm's epsilon is not scaled along


@dataclass(frozen=True)
class Rescale:
    """Makes the stream behind each cut as long as it was, by dividing what later layers write."""

    tokens: int = field(default=16_384, metadata={"help": "of the corpus that are read"})
    gradients: ClassVar[bool] = False
    needs: ClassVar[Needs] = "text"
    needs_base: ClassVar[bool] = True
    cost: ClassVar[str] = "one forward pass of the base over the tokens"
    source: ClassVar[str] = "arXiv:2507.18212"

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"tokens is {self.tokens}; it must be at least 1")

    def heal(self, case: Case) -> Iterator[Changed]:
        """Yield the output projections behind the first cut, each divided by the factors of the cuts before it."""
        removed = case.removal
        if not removed:
            raise RefusedError("nothing was removed from this checkpoint, so there is nothing to heal")
        subject = case.subject("float32")
        windows = case.text.train.first(max(1, -(-self.tokens // case.text.train.window)))
        ids = torch.from_numpy(windows.ids[:1, :CHECK_TOKENS])
        writers = _writers(subject, case, ids)
        checkpoint = Checkpoint.open(case.folder)
        wanted = [name for layer in writers for each in layer for name in each.weights()]
        names = names_on_disk(subject.model, checkpoint, wanted)
        factors = self._factors(case, windows)
        divisors = divisors_of(factors, removed, case.plan.model.layers)
        if all(divisor == 1 for divisor in divisors):
            raise RefusedError(
                "only the last layers were removed, and the final norm makes any length one: nothing to do"
            )
        for layer in removed:
            case.record.found[f"factor_{layer}"] = round(factors[layer], 6)
        _check(subject, writers, divisors, ids)
        for layer, divisor in zip(writers, divisors, strict=True):
            for each in layer if divisor != 1 else ():
                for name in each.weights():
                    value = read_tensor(checkpoint, names[name][0]).double() / divisor
                    yield from stored_as(names[name], value)

    def _factors(self, case: Case, windows: Windows) -> list[float]:
        """Return for each layer of the base the geometric mean of |out| / |in|."""
        base = case.base_subject()
        case.record.tokens = windows.tokens
        with case.progress.task("reading text with the base", windows.tokens, "tokens") as advance:

            def read() -> Iterator[torch.Tensor]:
                for ids in id_batches(windows):
                    yield ids.to(base.device)
                    advance(ids.numel())

            return lengthening(base, read()).tolist()


@torch.no_grad()
def lengthening(subject: Subject, batches: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the geometric mean over tokens of |out| / |in| of each layer of the intact model, (layers,), float64.

    ``batches`` are token ids, (rows, tokens), without padding. Raises ``ModelError`` where a mean is not a number.
    """
    logs, count = torch.zeros(len(subject.layers), dtype=torch.float64), 0

    def make(index: int, original: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            before = split_hidden(args, kwargs)[0].double().norm(dim=-1)  # (rows, tokens), first: layers may write
            output = original(*args, **kwargs)
            hidden = output[0] if isinstance(output, tuple | list) else output
            logs[index] += (hidden.double().norm(dim=-1).to(before.device) / before).log().sum().cpu()
            return output

        return forward

    with replaced_forwards(subject.layers, make):
        for ids in batches:
            count += ids.numel()
            subject.model(input_ids=ids, use_cache=False)
    factors = (logs / count).exp()
    if not factors.isfinite().all():
        raise ModelError("the layers' average effect is not a number: the model's states overflow; try --dtype float32")
    return factors


def divisors_of(factors: list[float], removed: Removal, depth: int) -> list[float]:
    """Return for each layer that is left the product of the factors of all removed layers before it."""
    found, product = [], 1.0
    for layer in range(depth):
        if layer in removed:
            product *= factors[layer]
        else:
            found.append(product)
    return found


def _writers(subject: Subject, case: Case, ids: torch.Tensor) -> list[list[Projection]]:
    """Return what each layer writes into the stream through; none for those in front of the first cut."""
    kept = case.removal.kept(case.plan.model.layers)
    stream = Stream(subject, [ids])
    found: list[list[Projection]] = []
    while stream.depth < len(kept):
        behind = kept[stream.depth] > min(case.removal)
        found.append(output_projections(stream) if behind else [])
        stream.advance()
    return found


@torch.no_grad()
def _check(subject: Subject, writers: list[list[Projection]], divisors: list[float], ids: torch.Tensor) -> None:
    """Try on a few tokens that dividing what is written is multiplying the stream at the cuts; weights are put back."""
    ids = ids.to(subject.device)

    def make(index: int, original: Any) -> Any:
        factor = divisors[index] / (divisors[index - 1] if index else 1.0)

        def forward(*args: Any, **kwargs: Any) -> Any:
            incoming, args, kwargs = split_hidden(args, kwargs)
            return original(incoming * factor, *args, **kwargs)

        return forward

    with replaced_forwards(subject.layers, make):
        expected = subject.model(input_ids=ids, use_cache=False).logits.double()
    kept = [(each, each.matrix.clone(), each.bias_value) for layer in writers for each in layer]
    for layer, divisor in zip(writers, divisors, strict=True):
        for each in layer:
            each.put(each.matrix / divisor, None if each.bias_value is None else each.bias_value / divisor)
    folded = subject.model(input_ids=ids, use_cache=False).logits.double()
    for each, matrix, bias in kept:
        each.put(matrix, bias)
    if not (folded - expected).abs().max() <= CHECK_TOLERANCE * expected.abs().max():
        raise RefusedError(
            f"a {subject.anatomy.model_type} model reads its residual stream without a norm somewhere, or writes to it "
            "elsewhere, too: a factor cannot be folded into its weights"
        )
