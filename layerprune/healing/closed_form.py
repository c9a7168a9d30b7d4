"""Healing without gradients: ``linear``, ridge regression into the layer before a cut, and ``rescale``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from layerprune.checkpoint import Checkpoint
from layerprune.data.corpus import Windows
from layerprune.errors import ModelError, RefusedError
from layerprune.healing.base import Changed, HealContext, Needs, Stored, cuts, names_on_disk, read_tensor, stored_as
from layerprune.healing.losses import id_batches
from layerprune.healing.projections import (
    CHECK_TOKENS,
    Projection,
    Stream,
    down_projection,
    output_projections,
    watching,
)
from layerprune.models.model import LoadedModel
from layerprune.removal import Removal
from layerprune.scoring.walk import replaced_forwards, split_hidden

# ``linear``: what a removed run did to the residual stream, as far as the layer before it can do it in its place.
#
# Removing base layers i+1 ... i+n leaves layer i to hand its output straight to layer i+n+1, which expects the stream
# as it stood behind the run. Layer i writes ``W z`` into the stream last, with W its down projection and z what enters
# it; the rest of its output, y, does not pass through W. So no weight of a stock architecture can apply a linear map to
# the whole stream: a map can be folded into W only as far as it acts on ``W z``. ReplaceMe (arXiv:2505.02819) therefore
# looks for the T that minimises ``|T W z + y - s|^2`` over tokens, s being the base's stream behind the run, and stores
# ``T W`` (``fit=map``: hidden x hidden unknowns). But T W is a matrix of the same shape as W whatever T is, so W itself
# may be looked for: ``|V z + y - s|^2`` (``fit=weights``: hidden x intermediate unknowns, of which T W is a special
# case).
#
# Both are least squares with a closed form. With r = s - (W z + y), what the layer misses, the unknown is a correction:
# ``V = W + D^T``, or ``T = 1 + D^T``, and D minimises ``|D^T x - r|^2 + ridge |D|^2`` with x = z, or x = W z. The ridge
# thus pulls towards the weights as they are. A bias takes part as one more entry of x; where there is none, none is
# invented.
#
# Cuts are healed from the first to the last, each on the stream of the model healed so far. Only sums over tokens are
# kept (float64), and one state per token at one depth. Fitting the layers behind the cut to the base's stream, too,
# helped a little for the first such layer and lost that again with more (docs/notes/2026-11-25-healing.md).


RIDGES = tuple(10 ** (-step / 2) for step in range(12, -1, -1))  # 1e-6 ... 1, of the mean of the Gram matrix's diagonal
HELD_OUT = 8  # every 8th window chooses the ridge and fits nothing


@dataclass(frozen=True)
class Linear:
    """Refits the down projection before each cut, in closed form, to hand on what the removed layers would have."""

    fit: Literal["weights", "map"] = field(
        default="weights",
        metadata={"help": "weights: all of the projection's; map: a linear map on its output, as ReplaceMe has it"},
    )
    ridge: Literal["auto"] | float = field(
        default="auto", metadata={"help": "relative to the mean square of the inputs; auto: by windows left out"}
    )
    tokens: int = field(default=65_536, metadata={"help": "of the corpus that are read"})
    gradients: ClassVar[bool] = False
    needs: ClassVar[Needs] = "text"
    needs_base: ClassVar[bool] = True
    cost: ClassVar[str] = "one forward pass of base and pruned model over the tokens, fitted layers twice"
    source: ClassVar[str] = "arXiv:2505.02819"

    def __post_init__(self) -> None:
        if self.ridge != "auto" and not 0 <= float(self.ridge) < float("inf"):
            raise ValueError(f"ridge is {self.ridge}; it is auto or a number of at least 0")
        if self.tokens < 1:
            raise ValueError(f"tokens is {self.tokens}; it must be at least 1")

    def heal(self, case: HealContext) -> Iterator[Changed]:
        """Yield the refitted projections, first to last."""
        places = self._places(case)
        windows = case.text.train.first(max(2, -(-self.tokens // case.text.train.window)))
        loaded, base = case.load_model(), case.load_base()
        projections = _projections(loaded, id_batches(windows)[0][:1, :CHECK_TOKENS], list(places))
        checkpoint = Checkpoint.open(case.folder)
        wanted = [name for each in projections.values() for name in each.weights()]
        names = names_on_disk(loaded.model, checkpoint, wanted)
        case.record.tokens = windows.tokens
        last = max(places)
        with case.progress.task("fitting down projections", last + 1, "layers") as advance:
            healed, intact = Stream(loaded, id_batches(windows)), Stream(base, id_batches(windows))
            while healed.depth <= last:
                layer = healed.depth
                if layer in places:
                    _follow(intact, healed, places[layer], first=min(places))
                    correction = self._correction(projections[layer], healed, intact, case)
                    yield from self._put(projections[layer], correction.cpu(), checkpoint, names)
                healed.advance()
                advance()

    def _places(self, case: HealContext) -> dict[int, int]:
        """Return the layers to fit, of the pruned model, and the base depth whose stream each should hand on."""
        found = {cut.after: cut.resumes for cut in cuts(case.removal, case.plan.model.layers)}
        if found.pop(-1, None) is not None:
            note = "nothing comes before the first layer left: what was removed there has no projection to fold into"
            if not found:
                raise RefusedError(f"{note}; rescale needs none")
            case.record.notes.append(note)
        if not found:
            raise RefusedError("nothing was removed from this checkpoint, so there is nothing to heal")
        return found

    def _correction(self, projection: Projection, healed: Stream, intact: Stream, case: HealContext) -> torch.Tensor:
        """Return D, (features, hidden): what is to be added for each feature of the projection."""
        fitting, choosing = self._sums(projection, healed, intact)
        ridges = RIDGES if self.ridge == "auto" else (float(self.ridge),)
        ridge, found = best(fitting, choosing, ridges)
        missed = choosing.square / choosing.rows
        case.record.found[f"ridge_{healed.depth}"] = ridge
        case.record.found[f"explained_{healed.depth}"] = round(1 - choosing.error(found) / missed, 6) if missed else 1.0
        return found

    def _sums(self, projection: Projection, healed: Stream, intact: Stream) -> tuple[Sums, Sums]:
        """Read all windows once; return the sums to fit by and those to choose the ridge by."""
        width = projection.matrix.shape[0 if self.fit == "map" else 1] + (projection.bias and self.fit == "weights")
        device = projection.matrix.device
        pair = Sums.of(width, projection.matrix.shape[0], device), Sums.of(width, projection.matrix.shape[0], device)
        window = 0
        with watching(projection.module) as seen:
            for number, output in healed.outputs():
                entered, left = seen
                features = left if self.fit == "map" else entered
                features = features.reshape(*output.shape[:2], -1)  # (windows, tokens, features)
                missed = intact.states[number].to(output).sub(output)
                if projection.bias and self.fit == "weights":
                    features = nn.functional.pad(features, (0, 1), value=1.0)
                for row in range(len(output)):
                    pair[window % HELD_OUT == 0].add(features[row], missed[row])
                    window += 1
        return pair

    def _put(
        self, projection: Projection, correction: torch.Tensor, checkpoint: Checkpoint, names: Stored
    ) -> Iterator[Changed]:
        """Add the correction to the weights as they are on disk, in float64; give the model in memory the same."""
        stored = {name: read_tensor(checkpoint, names[name][0]).double() for name in projection.weights()}
        weight, bias = stored[f"{projection.path}.weight"], stored.get(f"{projection.path}.bias")
        matrix = weight.T if projection.transposed else weight  # (out, in)
        if self.fit == "map":
            matrix = matrix + correction.T @ matrix
            bias = None if bias is None else bias + correction.T @ bias
        else:
            matrix = matrix + correction[: matrix.shape[1]].T
            bias = None if bias is None else bias + correction[-1]
        projection.put(matrix, bias)
        yield from stored_as(names[f"{projection.path}.weight"], matrix.T if projection.transposed else matrix)
        if bias is not None:
            yield from stored_as(names[f"{projection.path}.bias"], bias)


def _projections(loaded: LoadedModel, ids: torch.Tensor, layers: list[int]) -> dict[int, Projection]:
    """Find every projection on a few tokens, (rows, tokens): a refusal must not come after minutes of reading."""
    stream, found = Stream(loaded, [ids]), {}
    while stream.depth <= max(layers):
        if stream.depth in layers:
            found[stream.depth] = down_projection(stream)
        stream.advance()
    return found


def _follow(intact: Stream, healed: Stream, depth: int, first: int) -> None:
    """Carry the base's stream to ``depth``; as far as both models are the same, the healed one's is taken over."""
    if healed.depth == first and intact.depth == 0 and _same(intact.loaded, healed.loaded, first):
        intact.states = [states.clone() for states in healed.states]
        intact.depth = first
    while intact.depth < depth:
        intact.advance()


def _same(one: LoadedModel, other: LoadedModel, layers: int) -> bool:
    """Whether two models do the same up to a layer: equal embeddings and equal layers."""

    def parts(loaded: LoadedModel) -> list[nn.Module]:
        return [loaded.model.get_input_embeddings(), *loaded.layers[:layers]]

    def equal(a: nn.Module, b: nn.Module) -> bool:
        pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
        return all(torch.equal(x, y) for x, y in pairs)

    return all(equal(a, b) for a, b in zip(parts(one), parts(other), strict=True))


# ``rescale``: the stream behind a cut is as long as it was behind the removed run, by a factor folded into weights.
#
# Layers add to the residual stream, and it grows on its way. Behind a cut it is shorter than what the next layers were
# trained on, so that what they add weighs too much. Prune&Comp (arXiv:2507.18212) closes the gap with one factor, the
# mean ratio of the stream's length behind the removed run to its length before it.
#
# **Why it can be folded.** Let x be the stream at the cut, a the factor, and f_j what later layer j adds. A layer reads
# the stream through an RMSNorm or LayerNorm N, and N(c x) = N(x) for every c > 0, up to the epsilon under the root.
# Multiplying the stream by a at the cut gives ``a x + sum f_j`` at the end. Divide all of it by a: ``x + sum f_j / a``,
# of which every norm makes the same, the final one too. So instead of scaling everything that was written *before* the
# cut (embeddings and output projections, as the paper has it, which would need care where embeddings are tied to the
# head), what every layer *behind* the cut writes is divided by a: the attention's and the MLP's output projection and
# their biases. The factors of several cuts multiply. A cut behind the last layer needs nothing: only the final norm
# follows.
#
# A model that reads its stream without a norm somewhere is not invariant. That is not looked up but tried: the folded
# weights must give the logits of the model whose stream is multiplied at the cuts, or the model is refused.
#
# **The factor** is the geometric mean of |out| / |in| of each removed layer, over the tokens of the base, so that a few
# enormous tokens do not decide it; a run's factor is the product.


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

    def heal(self, case: HealContext) -> Iterator[Changed]:
        """Yield the output projections behind the first cut, each divided by the factors of the cuts before it."""
        removed = case.removal
        if not removed:
            raise RefusedError("nothing was removed from this checkpoint, so there is nothing to heal")
        loaded = case.load_model("float32")
        windows = case.text.train.first(max(1, -(-self.tokens // case.text.train.window)))
        ids = torch.from_numpy(windows.ids[:1, :CHECK_TOKENS])
        writers = _writers(loaded, case, ids)
        checkpoint = Checkpoint.open(case.folder)
        wanted = [name for layer in writers for each in layer for name in each.weights()]
        names = names_on_disk(loaded.model, checkpoint, wanted)
        factors = self._factors(case, windows)
        divisors = divisors_of(factors, removed, case.plan.model.layers)
        if all(divisor == 1 for divisor in divisors):
            raise RefusedError(
                "only the last layers were removed, and the final norm makes any length one: nothing to do"
            )
        for layer in removed:
            case.record.found[f"factor_{layer}"] = round(factors[layer], 6)
        _check(loaded, writers, divisors, ids)
        for layer, divisor in zip(writers, divisors, strict=True):
            for each in layer if divisor != 1 else ():
                for name in each.weights():
                    value = read_tensor(checkpoint, names[name][0]).double() / divisor
                    yield from stored_as(names[name], value)

    def _factors(self, case: HealContext, windows: Windows) -> list[float]:
        """Return for each layer of the base the geometric mean of |out| / |in|."""
        base = case.load_base()
        case.record.tokens = windows.tokens
        with case.progress.task("reading text with the base", windows.tokens, "tokens") as advance:

            def read() -> Iterator[torch.Tensor]:
                for ids in id_batches(windows):
                    yield ids.to(base.device)
                    advance(ids.numel())

            return lengthening(base, read()).tolist()


@torch.no_grad()
def lengthening(loaded: LoadedModel, batches: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the geometric mean over tokens of |out| / |in| of each layer of the intact model, (layers,), float64.

    ``batches`` are token ids, (rows, tokens), without padding. Raises ``ModelError`` where a mean is not a number.
    """
    logs, count = torch.zeros(len(loaded.layers), dtype=torch.float64), 0

    def make(index: int, original: Any) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            before = split_hidden(args, kwargs)[0].double().norm(dim=-1)  # (rows, tokens), first: layers may write
            output = original(*args, **kwargs)
            hidden = output[0] if isinstance(output, tuple | list) else output
            logs[index] += (hidden.double().norm(dim=-1).to(before.device) / before).log().sum().cpu()
            return output

        return forward

    with replaced_forwards(loaded.layers, make):
        for ids in batches:
            count += ids.numel()
            loaded.model(input_ids=ids, use_cache=False)
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


def _writers(loaded: LoadedModel, case: HealContext, ids: torch.Tensor) -> list[list[Projection]]:
    """Return what each layer writes into the stream through; none for those in front of the first cut."""
    kept = case.removal.kept(case.plan.model.layers)
    stream = Stream(loaded, [ids])
    found: list[list[Projection]] = []
    while stream.depth < len(kept):
        behind = kept[stream.depth] > min(case.removal)
        found.append(output_projections(stream) if behind else [])
        stream.advance()
    return found


@torch.no_grad()
def _check(loaded: LoadedModel, writers: list[list[Projection]], divisors: list[float], ids: torch.Tensor) -> None:
    """Try on a few tokens that dividing what is written is multiplying the stream at the cuts; weights are put back."""
    ids = ids.to(loaded.device)

    def make(index: int, original: Any) -> Any:
        factor = divisors[index] / (divisors[index - 1] if index else 1.0)

        def forward(*args: Any, **kwargs: Any) -> Any:
            incoming, args, kwargs = split_hidden(args, kwargs)
            return original(incoming * factor, *args, **kwargs)

        return forward

    with replaced_forwards(loaded.layers, make):
        expected = loaded.model(input_ids=ids, use_cache=False).logits.double()
    kept = [(each, each.matrix.clone(), each.bias_value) for layer in writers for each in layer]
    for layer, divisor in zip(writers, divisors, strict=True):
        for each in layer:
            each.put(each.matrix / divisor, None if each.bias_value is None else each.bias_value / divisor)
    folded = loaded.model(input_ids=ids, use_cache=False).logits.double()
    for each, matrix, bias in kept:
        each.put(matrix, bias)
    if not (folded - expected).abs().max() <= CHECK_TOLERANCE * expected.abs().max():
        raise RefusedError(
            f"a {loaded.architecture.model_type} model reads its residual stream without a norm somewhere, or writes "
            "to it elsewhere, too: a factor cannot be folded into its weights"
        )


# Ridge regression from sums alone: rows come and go, what is kept does not grow with them.


Tensor = torch.Tensor


@dataclass
class Sums:
    """The normal equations of ``rows @ map = targets``, all in float64."""

    gram: Tensor  # (features, features) sum of x x^T
    cross: Tensor  # (features, outputs) sum of x r^T
    square: float = 0.0  # sum of |r|^2
    rows: int = 0

    @classmethod
    def of(cls, features: int, outputs: int, device: torch.device | str = "cpu") -> Sums:
        """Return empty sums."""
        gram = torch.zeros(features, features, dtype=torch.float64, device=device)
        return cls(gram, torch.zeros(features, outputs, dtype=torch.float64, device=device))

    def add(self, rows: Tensor, targets: Tensor) -> None:
        """Take rows, (rows, features), and targets, (rows, outputs).

        Products within one call are in float32 (float64 for float64 rows); sums over calls are in float64.
        """
        wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
        x, r = rows.to(wide), targets.to(wide)
        self.gram += x.T @ x
        self.cross += x.T @ r
        self.square += float(r.double().square().sum())
        self.rows += len(x)

    def error(self, found: Tensor) -> float:
        """Return the mean squared distance from the targets, per row, of a map (features, outputs)."""
        fitted = (found * (self.gram @ found)).sum() - 2 * (found * self.cross).sum()
        return (self.square + float(fitted)) / self.rows


def solve(sums: Sums, ridges: Sequence[float]) -> list[Tensor]:
    """Return the map that minimises ``|rows @ map - targets|^2 + ridge * mean(diag gram) * |map|^2`` for each ridge.

    One eigendecomposition serves them all. A ridge of 0 gives the least-norm solution.
    """
    values, vectors = torch.linalg.eigh(sums.gram)
    scale = float(sums.gram.diagonal().mean())
    turned = vectors.T @ sums.cross
    floor = float(values[-1]) * len(values) * torch.finfo(torch.float64).eps  # below: rounding, not a direction
    found = []
    for ridge in ridges:
        inverse = torch.where(values > floor, 1 / (values.clamp_min(floor) + ridge * scale), 0.0)
        found.append(vectors @ (inverse[:, None] * turned))
    return found


def best(sums: Sums, heldout: Sums, ridges: Sequence[float]) -> tuple[float, Tensor]:
    """Return the ridge whose map is closest to the targets on rows it was not fitted to, and that map."""
    maps = solve(sums, ridges)
    errors = [heldout.error(found) for found in maps]
    chosen = errors.index(min(errors))
    return ridges[chosen], maps[chosen]
