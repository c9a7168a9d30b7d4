"""``linear``: what a removed run did to the residual stream, as far as the layer before it can do it in its place.

Removing base layers i+1 ... i+n leaves layer i to hand its output straight to layer i+n+1, which expects the stream
as it stood behind the run. Layer i writes ``W z`` into the stream last, with W its down projection and z what enters
it; the rest of its output, y, does not pass through W. So no weight of a stock architecture can apply a linear map to
the whole stream: a map can be folded into W only as far as it acts on ``W z``. ReplaceMe (arXiv:2505.02819) therefore
looks for the T that minimises ``|T W z + y - s|^2`` over tokens, s being the base's stream behind the run, and stores
``T W`` (``fit=map``: hidden x hidden unknowns). But T W is a matrix of the same shape as W whatever T is, so W itself
may be looked for: ``|V z + y - s|^2`` (``fit=weights``: hidden x intermediate unknowns, of which T W is a special
case).

Both are least squares with a closed form. With r = s - (W z + y), what the layer misses, the unknown is a correction:
``V = W + D^T``, or ``T = 1 + D^T``, and D minimises ``|D^T x - r|^2 + ridge |D|^2`` with x = z, or x = W z. The ridge
thus pulls towards the weights as they are. A bias takes part as one more entry of x; where there is none, none is
invented.

Cuts are healed from the first to the last, each on the stream of the model healed so far. Only sums over tokens are
kept (float64), and one state per token at one depth. Fitting the layers behind the cut to the base's stream, too,
helped a little for the first such layer and lost that again with more (docs/notes/2026-11-25-healing.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import nn

from layerprune.checkpoint import Checkpoint
from layerprune.errors import RefusedError
from layerprune.healing.base import Case, Changed, Needs
from layerprune.healing.least_squares import Sums, best
from layerprune.healing.losses import id_batches
from layerprune.healing.names import Stored, names_on_disk, read_tensor, stored_as
from layerprune.healing.places import cuts
from layerprune.healing.projections import Projection, down_projection
from layerprune.healing.streams import CHECK_TOKENS, Stream, watching
from layerprune.subject import Subject

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

    def heal(self, case: Case) -> Iterator[Changed]:
        """Yield the refitted projections, first to last."""
        places = self._places(case)
        windows = case.text.train.first(max(2, -(-self.tokens // case.text.train.window)))
        subject, base = case.subject(), case.base_subject()
        projections = _projections(subject, id_batches(windows)[0][:1, :CHECK_TOKENS], list(places))
        checkpoint = Checkpoint.open(case.folder)
        wanted = [name for each in projections.values() for name in each.weights()]
        names = names_on_disk(subject.model, checkpoint, wanted)
        case.record.tokens = windows.tokens
        last = max(places)
        with case.progress.task("fitting down projections", last + 1, "layers") as advance:
            healed, intact = Stream(subject, id_batches(windows)), Stream(base, id_batches(windows))
            while healed.depth <= last:
                layer = healed.depth
                if layer in places:
                    _follow(intact, healed, places[layer], first=min(places))
                    correction = self._correction(projections[layer], healed, intact, case)
                    yield from self._put(projections[layer], correction.cpu(), checkpoint, names)
                healed.advance()
                advance()

    def _places(self, case: Case) -> dict[int, int]:
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

    def _correction(self, projection: Projection, healed: Stream, intact: Stream, case: Case) -> torch.Tensor:
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


def _projections(subject: Subject, ids: torch.Tensor, layers: list[int]) -> dict[int, Projection]:
    """Find every projection on a few tokens, (rows, tokens): a refusal must not come after minutes of reading."""
    stream, found = Stream(subject, [ids]), {}
    while stream.depth <= max(layers):
        if stream.depth in layers:
            found[stream.depth] = down_projection(stream)
        stream.advance()
    return found


def _follow(intact: Stream, healed: Stream, depth: int, first: int) -> None:
    """Carry the base's stream to ``depth``; as far as both models are the same, the healed one's is taken over."""
    if healed.depth == first and intact.depth == 0 and _same(intact.subject, healed.subject, first):
        intact.states = [states.clone() for states in healed.states]
        intact.depth = first
    while intact.depth < depth:
        intact.advance()


def _same(one: Subject, other: Subject, layers: int) -> bool:
    """Whether two models do the same up to a layer: equal embeddings and equal layers."""

    def parts(subject: Subject) -> list[nn.Module]:
        return [subject.model.get_input_embeddings(), *subject.layers[:layers]]

    def equal(a: nn.Module, b: nn.Module) -> bool:
        pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
        return all(torch.equal(x, y) for x, y in pairs)

    return all(equal(a, b) for a, b in zip(parts(one), parts(other), strict=True))
