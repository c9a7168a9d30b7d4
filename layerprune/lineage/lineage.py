"""A checkpoint beside its base, layer by layer, and the sentences that say what was done to it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from layerprune.checkpoint.values import CHANGED, EQUAL, NAMES, PACKED, RESHAPED, ROUNDED

MISSING, ADDED = "missing", "added"  # a tensor that only the base, or only the checkpoint, has
UNMATCHED, UNCOMPARED = "unmatched", "not compared"  # a layer without a base layer, or of which nobody can say
RANDOM = "random?"  # the note of a layer that is none of the base's, and neither zeros nor broken
QUANTISED = "quantised"  # what notes on packed weights begin with

EMBEDDINGS, HEAD = "embeddings", "head"
NAMED = 4  # tensors that one sentence names
CYCLES = 4  # changes of place that are told one by one; beyond, the whole order is
TOGETHER = 2.0  # changes of layers that are told in one sentence are within this factor


@dataclass(frozen=True)
class LayerMatch:
    """One layer of the checkpoint and the base layer that it is."""

    layer: int  # in the checkpoint
    base: int | None
    kind: str  # "equal", "rounded", "changed", "reshaped", "unmatched" or "not compared"
    change: float = 0.0  # ||W - W'|| / ||W|| over all tensors that can be compared; NaN where that is no number
    tensors: tuple[str, ...] = ()  # those that differ, by their names in the layer; () where most do, or none
    note: str = ""  # why, or what they are instead


@dataclass(frozen=True)
class OutsideMatch:
    """One tensor outside the stack, and what became of the base's."""

    name: str  # without what leads to the stack
    role: str  # "embeddings", "head" or ""
    kind: str  # as of a layer, or "packed", "missing" or "added"
    change: float = 0.0  # of the rows that both have
    shape: tuple[int, ...] = ()
    base_shape: tuple[int, ...] = ()
    note: str = ""

    @property
    def resized(self) -> bool:
        """Whether it has other rows, one for each token, of the base's width."""
        return self.kind == RESHAPED and bool(self.role) and self.shape[1:] == self.base_shape[1:]


@dataclass(frozen=True)
class Lineage:
    """Where the layers of a checkpoint come from, and what became of the rest of its base."""

    base: str
    model_type: str
    base_type: str
    base_layers: tuple[int, ...]
    layers: tuple[LayerMatch, ...]
    outside: tuple[OutsideMatch, ...]
    tied: bool  # the head is the embeddings
    base_tied: bool
    tokenizer: tuple[str, ...]  # its files that differ

    @property
    def gone(self) -> tuple[int, ...]:
        """The base layers that no layer here was matched to."""
        there = {match.base for match in self.layers}
        return tuple(layer for layer in self.base_layers if layer not in there)

    @property
    def replaced(self) -> dict[int, int]:
        """The base layer in whose place an unmatched layer stands: between neighbours with room for as many."""
        found: dict[int, int] = {}
        run: list[int] = []
        before, end = -1, len(self.base_layers)
        for match in (*self.layers, LayerMatch(-1, end, EQUAL)):
            if match.kind == UNMATCHED:
                run.append(match.layer)
                continue
            slots = range(before + 1, end if match.base is None else match.base)
            if match.base is not None and len(slots) == len(run) and {*slots} <= {*self.gone}:
                found |= dict(zip(run, slots, strict=True))
            before, run = end if match.base is None else match.base, []
        return found

    @property
    def unrelated(self) -> bool:
        """Whether nothing here has a name and a shape of the base's, packed weights aside."""
        layers = all(
            it.kind == UNCOMPARED and it.base is None and not it.note.startswith(QUANTISED) for it in self.layers
        )
        return layers and all(
            it.kind in (MISSING, ADDED) or (it.kind == RESHAPED and not it.resized) for it in self.outside
        )

    @property
    def sentences(self) -> tuple[str, ...]:
        """What was done to the base, layers first; they are numbered as in the base where nothing else is said."""
        if self.unrelated:
            return tuple(self._strangers())
        said = [*self._type(), *self._gone(), *self._repeats(), *self._order(), *self._without_base()]
        said += [*self._changes(), *self._untouched()]
        return (*said, *_head(self), *_outside(self.outside, shared=self.tied and self.base_tied), *self._tokenizer())

    def _type(self) -> Iterator[str]:
        if self.model_type != self.base_type:
            yield f"its type is {self.model_type}, the base's {self.base_type}"

    def _strangers(self) -> Iterator[str]:
        yield (
            f"nothing can be compared with {self.base}: a {self.model_type} of {len(self.layers)} layers, the base a "
            f"{self.base_type} of {len(self.base_layers)}, and no tensor has the name and the shape of the base's"
        )
        if notes := [match.note for match in self.layers if match.note]:
            yield f"the layers: {notes[0]}"

    def _gone(self) -> Iterator[str]:
        gone = sorted({*self.gone} - {*self.replaced.values()})
        if not gone or not any(match.base is not None or match.kind == UNMATCHED for match in self.layers):
            return
        if any(match.kind == UNCOMPARED and match.base is None for match in self.layers):
            yield f"{in_words(gone)} of the base {be(gone)} none of the layers that can be compared"
        else:
            yield f"{in_words(gone)} of the base {be(gone)} gone"

    def _repeats(self) -> Iterator[str]:
        places: dict[int, list[int]] = defaultdict(list)
        for match in self.layers:
            if match.base is not None:
                places[match.base].append(match.layer)
        runs: list[list[int]] = []
        for base in sorted(base for base, found in places.items() if len(found) > 1):
            follows = [layer + 1 for layer in places[runs[-1][-1]]] if runs else []
            if follows == places[base] and runs[-1][-1] + 1 == base:
                runs[-1].append(base)
            else:
                runs.append([base])
        for run in runs:
            copies = [range(first, first + len(run)) for first in places[run[0]]]
            every = "both" if len(copies) == 2 else "all"
            here = listing([spans(copy) for copy in copies])
            yield f"layers {here} of this checkpoint are {every} the base's {in_words(run)}"

    def _order(self) -> Iterator[str]:
        order = list(dict.fromkeys(match.base for match in self.layers if match.base is not None))
        stands = dict(zip(sorted(order), order, strict=True))  # where a base layer is expected: which one is there
        found = []
        while moved := [layer for layer, there in stands.items() if layer != there]:
            cycle = [moved[0]]
            while (there := stands.pop(cycle[-1])) != cycle[0]:
                cycle.append(there)
            found.append(cycle)
        if len(found) > CYCLES:
            yield f"the layers of the base stand in another order: {', '.join(map(str, order))}"
            return
        for cycle in found:
            if len(cycle) == 2:
                yield f"{in_words(sorted(cycle))} have changed places"
            else:
                now = [layer for layer in order if layer in cycle]
                yield f"{in_words(sorted(cycle))} stand in another order: {', '.join(map(str, now))}"

    def _without_base(self) -> Iterator[str]:
        replaced, notes = self.replaced, defaultdict[tuple[str, str, int | None], list[int]](list)
        for match in self.layers:
            if match.kind in (UNMATCHED, UNCOMPARED):
                moved = replaced[match.layer] - match.layer if match.layer in replaced else None
                notes[match.kind, match.note, moved if match.kind == UNMATCHED else 0].append(match.layer)
        for (kind, note, moved), layers in notes.items():
            which = in_words(layers)
            if kind == UNCOMPARED:
                yield f"{which} cannot be compared: {note}"
                continue
            if len(layers) == len(self.layers):
                yield f"no layer is one of the base's ({'another model?' if note == RANDOM else note})"
                continue
            if moved is None:
                which = f"{which} of this checkpoint"
            elif moved:
                instead = [layer + moved for layer in layers]
                which = f"{which} of this checkpoint, in the place of the base's {in_words(instead)},"
            yield f"{which} match{'es' if len(layers) == 1 else ''} no layer of the base ({note})"

    def _changes(self) -> Iterator[str]:
        groups: list[list[LayerMatch]] = []
        for match in sorted((it for it in self.layers if it.kind in (CHANGED, RESHAPED)), key=lambda it: it.base or 0):
            home = next((group for group in groups if _alike(group, match)), None)
            if home is None:
                groups.append([match])
            else:
                home.append(match)
        for group in groups:
            first, bases = group[0], sorted({match.base for match in group if match.base is not None})
            which = in_words(bases)
            if first.kind == RESHAPED:
                also = f"; the tensors of one shape {amount(group)}" if any(it.change for it in group) else ""
                yield f"{which} of the base {be(bases)} here in other shapes: {first.note}{also}"
                continue
            only = f" (only {few(first.tensors)})" if first.tensors else ""
            past = "was" if len(bases) == 1 else "were"
            note = f"; stored in {_dtype(first.note)}" if first.note else ""
            yield f"{which} {past} changed {amount(group)}{only}{note}"

    def _untouched(self) -> Iterator[str]:
        for kind in (EQUAL, ROUNDED):
            notes: dict[str, list[int]] = defaultdict(list)
            for match in self.layers:
                if match.kind == kind and match.base is not None:
                    notes[match.note].append(match.base)
            for note, found in notes.items():
                layers, every = sorted(set(found)), len(found) == len(self.layers)
                stored = f"stored in {_dtype(note)}, equal after rounding"
                if every:
                    left = " that is left" if self.gone else ""
                    moved = "in itself, " if [*self._repeats(), *self._order()] else ""
                    yield f"{moved}every layer{left} is the base's, {'untouched' if kind == EQUAL else stored}"
                else:
                    yield f"{in_words(layers)} {be(layers)} {'untouched' if kind == EQUAL else stored}"

    def _tokenizer(self) -> Iterator[str]:
        if self.tokenizer:
            yield f"the tokenizer differs ({', '.join(self.tokenizer)})"


def _alike(group: Sequence[LayerMatch], match: LayerMatch) -> bool:
    first = group[0]
    if (first.kind, first.tensors, first.note) != (match.kind, match.tensors, match.note):
        return False
    changes = [match.change, *(each.change for each in group)]
    if not all(map(math.isfinite, changes)):
        return str(first.change) == str(match.change)
    return max(changes) <= TOGETHER * min(changes)


def _head(lineage: Lineage) -> Iterator[str]:
    if lineage.tied and not lineage.base_tied:
        yield "the head is tied to the embeddings; the base has a head of its own"
    if lineage.base_tied and not lineage.tied:
        yield "the head is its own; the base's is tied to the embeddings"


def _outside(parts: Sequence[OutsideMatch], *, shared: bool) -> Iterator[str]:
    """Yield what became of the tensors outside the layers; ``shared``: the head is the embeddings in both."""
    if parts and all(part.kind == EQUAL for part in parts):
        yield "what is outside the layers is the base's, untouched"
        return
    kinds: dict[str, list[str]] = defaultdict(list)
    for part in parts:
        if part.role and part.kind != EQUAL:
            yield _role(part, shared=shared)
        elif part.kind == CHANGED:
            kinds["{} outside the layers differ{s}"].append(f"{part.name} ({percentage(part.change)})")
        elif part.kind == ROUNDED:
            kinds[f"{{}} outside the layers {{be}} stored in {_dtype(part.note)}, equal after rounding"].append(
                part.name
            )
        elif part.kind == RESHAPED:
            shapes = f"({list(part.shape)}, the base's {list(part.base_shape)})"
            kinds["{} outside the layers ha{has} another shape"].append(f"{part.name} {shapes}")
        elif part.kind in (PACKED, MISSING, ADDED):
            end = {
                PACKED: "cannot be compared: quantised",
                MISSING: "of the base {be} gone",
                ADDED: "{be} not the base's",
            }
            kinds[f"{{}} outside the layers {end[part.kind]}"].append(part.name)
    for said, names in kinds.items():
        one = len(names) == 1
        verbs = {"s": "s" if one else "", "be": "is" if one else "are", "has": "s" if one else "ve"}
        yield said.format(few(names), **verbs)


def _role(part: OutsideMatch, *, shared: bool) -> str:
    plural = part.role == EMBEDDINGS
    which = f"the {part.role}{' and the head, which they are,' if shared and plural else ''}"
    are, differ = ("are", "differ") if plural else ("is", "differs")
    if part.kind == ROUNDED:
        return f"{which} {are} stored in {_dtype(part.note)}, equal after rounding"
    if part.kind == CHANGED:
        return f"{which} {differ} {by(part.change)}"
    if part.resized:
        same = f"differ {by(part.change)}" if part.change else "are equal"
        resized = (
            f"resized to {part.shape[0]:,} tokens, the base's {'have' if plural else 'has'} {part.base_shape[0]:,}"
        )
        return f"{which} {are} {resized}; the rows that both have {same}"
    if part.kind == RESHAPED:
        shapes = f"{list(part.shape)}, the base's {list(part.base_shape)}"
        return f"{which} {'have' if plural else 'has'} another shape: {shapes}"
    if part.kind == PACKED:
        return f"{which} cannot be compared: quantised"
    return f"{which} of the base {are} gone" if part.kind == MISSING else f"{which} {are} not in the base"


# Numbers of layers and amounts, in words.


def spans(layers: Iterable[int]) -> str:
    """Return ascending layers as people write them: ``3-9, 12``."""
    return ", ".join(_spans(layers))


def _spans(layers: Iterable[int]) -> list[str]:
    found, runs = list(layers), []
    if not found:
        return []
    starts = [0, *(at + 1 for at, (one, other) in enumerate(pairwise(found)) if other != one + 1), len(found)]
    for start, stop in pairwise(starts):
        first, last = found[start], found[stop - 1]
        runs += [str(first)] if first == last else [f"{first}-{last}"] if last > first + 1 else [str(first), str(last)]
    return runs


def listing(parts: Sequence[str]) -> str:
    """Return ``a, b and c``."""
    return f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else parts[0]


def in_words(layers: Sequence[int]) -> str:
    """Return ``layer 3``, ``layers 4 and 22``, ``layers 3-9 and 12``."""
    return f"layer{'' if len(layers) == 1 else 's'} {listing(_spans(layers))}"


def be(layers: Sequence[int]) -> str:
    """Return ``is`` or ``are``."""
    return "is" if len(layers) == 1 else "are"


def few(names: Sequence[str]) -> str:
    """Return the first of some names, and how many more there are."""
    more = len(names) - NAMED
    return listing(names) if more <= 0 else f"{', '.join(names[:NAMED])} and {more} more"


def percentage(change: float) -> str:
    """Return a relative change in per cent, with two digits, or three from 10 % on."""
    if math.isnan(change):
        return "by no number"
    if math.isinf(change):
        return "the base's is zero"
    if not change:
        return "0 %"
    return "less than 0.001 %" if change < 1e-5 else f"{100 * change:.{3 if change >= 0.1 else 2}g} %"


def by(change: float) -> str:
    """Return ``by 0.2 %``, or what there is in place of a number."""
    if math.isnan(change):
        return "in a way that is no number (packed weights, NaN or infinity)"
    return "where the base is zero" if math.isinf(change) else f"by {percentage(change)}"


def amount(group: Sequence[LayerMatch]) -> str:
    """Return ``by 0.2 %`` or ``by 0.18 to 0.23 %`` for layers that changed about as much."""
    low, high = min(match.change for match in group), max(match.change for match in group)
    if not (math.isfinite(low) and math.isfinite(high)) or percentage(low) == percentage(high):
        return by(high)
    return f"by {percentage(low).removesuffix(' %')} to {percentage(high)}"


def _dtype(note: str) -> str:
    """Return the dtypes of a note, ``BF16 F32``, in words."""
    ours, _, theirs = note.partition(" ")
    return f"{NAMES.get(ours, ours)} (the base in {NAMES.get(theirs, theirs)})"
