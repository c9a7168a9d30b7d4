"""Healing without gradients: ``linear``, ridge regression into the layer before a cut, and ``rescale``."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from layerprune.data.corpus import Windows
from layerprune.errors import ModelError, RefusedError
from layerprune.healing.base import Changed, HealContext, Healer, StoredWeights, cuts
from layerprune.healing.losses import id_batches
from layerprune.healing.projections import CHECK_TOKENS, Projection, Stream, down_projection, output_projections, probe
from layerprune.models.model import LoadedModel
from layerprune.registry import option
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
class Linear(Healer):
    """Refits the down projection before each cut, in closed form, to hand on what the removed layers would have."""

    fit: Literal["weights", "map"] = option(
        "weights", "weights: all of the projection's; map: a linear map on its output, as ReplaceMe has it"
    )
    ridge: Literal["auto"] | float = option(
        "auto", "relative to the mean square of the inputs; auto: by windows left out", (0, 10**6)
    )
    tokens: int = option(65_536, "of the corpus that are read", (1, 10**9))
    needs = ("text", "base")
    cost = "one forward pass of base and pruned model over the tokens, fitted layers twice"
    source = "arXiv:2505.02819"

    def heal(self, case: HealContext) -> Iterator[Changed]:
        """Yield the refitted projections, first to last."""
        places = self._places(case)
        windows = case.text.train.first(max(2, -(-self.tokens // case.text.train.window)))
        loaded, base = case.load_model(streams=True), case.load_base()
        projections = probe(loaded, windows, places, down_projection)
        wanted = [name for each in projections.values() for name in each.weights]
        stored = StoredWeights.of(loaded.model, case.folder, wanted)
        case.record.tokens = windows.tokens
        last = max(places)
        with case.progress.task("fitting down projections", last + 1, "layers") as advance:
            healed, intact = Stream(loaded, id_batches(windows)), Stream(base, id_batches(windows))
            while healed.depth <= last:
                layer = healed.depth
                if layer in places:
                    _follow(intact, healed, places[layer], first=min(places))
                    correction = self._correction(projections[layer], healed, intact, case)
                    yield from self._corrected(projections[layer], correction.cpu(), stored, loaded)
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
        hidden, inputs = projection.matrix.shape
        biased = self.fit == "weights" and len(projection.weights) == 2
        width, device = hidden if self.fit == "map" else inputs + biased, healed.states[0].device
        pair = Sums.of(width, hidden, device), Sums.of(width, hidden, device)
        seen: dict[str, torch.Tensor] = {}
        window = 0

        def watch(module: nn.Module, args: Any, output: torch.Tensor) -> None:
            seen["features"] = output if self.fit == "map" else args[0]

        with projection.module.register_forward_hook(watch):
            for number, output in healed.outputs():
                features = seen["features"].reshape(*output.shape[:2], -1)  # (windows, tokens, features)
                missed = intact.states[number].to(output).sub(output)
                if biased:
                    features = nn.functional.pad(features, (0, 1), value=1.0)
                for row in range(len(output)):
                    pair[window % HELD_OUT == 0].add(features[row], missed[row])
                    window += 1
        return pair

    @torch.no_grad()
    def _corrected(
        self, projection: Projection, correction: torch.Tensor, stored: StoredWeights, loaded: LoadedModel
    ) -> Iterator[Changed]:
        """Add the correction to the weights as they are on disk, in float64; give the model in memory the same."""
        for name in projection.weights:
            value = stored.read(name).double()
            turned = projection.transposed and value.dim() == 2
            matrix = value.T if turned else value  # (out, in); a bias (out,)
            if self.fit == "map":
                change = correction.T @ matrix
            else:
                change = correction[-1] if matrix.dim() == 1 else correction[: matrix.shape[1]].T
            value = value + (change.T if turned else change)
            loaded.change(name, value)
            yield from stored.changed(name, value)


def _follow(intact: Stream, healed: Stream, depth: int, first: int) -> None:
    """Carry the base's stream to ``depth``; as far as both models are the same, the healed one's is taken over."""
    if healed.depth == first and intact.depth == 0 and _same(intact.loaded, healed.loaded, first):
        intact.states = [states.clone() for states in healed.states]
        intact.depth = first
    while intact.depth < depth:
        intact.advance()


def _same(one: LoadedModel, other: LoadedModel, layers: int) -> bool:
    """Whether two models do the same up to a layer: equal embeddings and equal layers."""

    def equal(a: nn.Module, b: nn.Module) -> bool:
        pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
        return all(torch.equal(x, y) for x, y in pairs)

    for layer in range(layers):
        with one.layer(layer) as a, other.layer(layer) as b:
            if not equal(a, b):
                return False
    return equal(one.model.get_input_embeddings(), other.model.get_input_embeddings())


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
class Rescale(Healer):
    """Makes the stream behind each cut as long as it was, by dividing what later layers write."""

    tokens: int = option(16_384, "of the corpus that are read", (1, 10**9))
    needs = ("text", "base")
    cost = "one forward pass of the base over the tokens"
    source = "arXiv:2507.18212"

    def heal(self, case: HealContext) -> Iterator[Changed]:
        """Yield the output projections behind the first cut, each divided by the factors of the cuts before it."""
        removed = case.removal
        if not removed:
            raise RefusedError("nothing was removed from this checkpoint, so there is nothing to heal")
        loaded = case.load_model("float32")
        windows = case.text.train.first(max(1, -(-self.tokens // case.text.train.window)))
        kept = removed.kept(case.plan.model.layers)
        behind = [layer for layer, unit in enumerate(kept) if unit > min(removed)]  # the first cut
        weights = {
            name: (weight, layer)
            for layer, found in probe(loaded, windows, behind, output_projections).items()
            for projection in found
            for name, weight in projection.weights.items()
        }
        stored = StoredWeights.of(loaded.model, case.folder, weights)
        factors = self._factors(case, windows)
        divisors = divisors_of(factors, removed, case.plan.model.layers)
        if all(divisor == 1 for divisor in divisors):
            raise RefusedError(
                "only the last layers were removed, and the final norm makes any length one: nothing to do"
            )
        for layer in removed:
            case.record.found[f"factor_{layer}"] = round(factors[layer], 6)
        few = torch.from_numpy(windows.ids[:1, :CHECK_TOKENS])
        _check(loaded, [(weight, divisors[layer]) for weight, layer in weights.values()], divisors, few)
        for name, (_, layer) in weights.items():
            if divisors[layer] != 1:
                yield from stored.changed(name, stored.read(name).double() / divisors[layer])

    @torch.no_grad()
    def _factors(self, case: HealContext, windows: Windows) -> list[float]:
        """Return for each layer of the base the geometric mean over tokens of |out| / |in|.

        Raises ``ModelError`` where a mean is not a number.
        """
        base = case.load_base()
        logs = torch.zeros(len(base.layers), dtype=torch.float64)

        def make(index: int, original: Any) -> Any:
            def forward(*args: Any, **kwargs: Any) -> Any:
                before = split_hidden(args, kwargs)[0].double().norm(dim=-1)  # (rows, tokens), first: layers may write
                output = original(*args, **kwargs)
                hidden = output[0] if isinstance(output, tuple | list) else output
                logs[index] += (hidden.double().norm(dim=-1).to(before.device) / before).log().sum().cpu()
                return output

            return forward

        case.record.tokens = windows.tokens
        label = "reading text with the base"
        with replaced_forwards(base.layers, make), case.progress.task(label, windows.tokens, "tokens") as advance:
            for ids in id_batches(windows):
                base.model(input_ids=ids.to(base.device), use_cache=False)
                advance(ids.numel())
        factors = (logs / windows.tokens).exp()
        if not factors.isfinite().all():
            raise ModelError(
                "the layers' average effect is not a number: the model's states overflow; try --dtype float32"
            )
        return factors.tolist()


def divisors_of(factors: list[float], removed: Removal, depth: int) -> list[float]:
    """Return for each layer that is left the product of the factors of all removed layers before it."""
    return [math.prod(factors[unit] for unit in removed if unit < layer) for layer in removed.kept(depth)]


@torch.no_grad()
def _check(
    loaded: LoadedModel, weights: list[tuple[nn.Parameter, float]], divisors: list[float], ids: torch.Tensor
) -> None:
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
    kept = [weight.clone() for weight, _ in weights]
    for weight, divisor in weights:
        weight.div_(divisor)
    folded = loaded.model(input_ids=ids, use_cache=False).logits.double()
    for (weight, _), before in zip(weights, kept, strict=True):
        weight.copy_(before)
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
