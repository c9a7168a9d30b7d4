"""One walk through the stack that serves many removals: nothing two of them have in common is computed twice.

At layer j the removals that have lost the same layers below j share one state (hidden states of the batch). A state is
carried through layer j once if any of them keeps j, and handed on as it is to those that drop j. The model's own
forward makes masks, rotary embeddings, the final norm and the head's scaling; only its layers' ``forward`` is replaced
while the walk lasts, on the instances, so that no table of architectures is needed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

if TYPE_CHECKING:
    from layerprune.scoring.prefix_tree import SharedBeginning


Tensor = torch.Tensor
Stage = tuple[str, int]  # what is being done, and at which layer: -1 before the first, the depth after the last


@dataclass
class WalkState:
    """What a set of removals has in common after the layers so far."""

    hidden: Tensor  # (rows, tokens, hidden)
    shared: dict[str, dict[Any, Any]] = field(default_factory=dict)  # mappings layers write to, by keyword (shared KV)

    def storages(self) -> dict[int, int]:
        """Return the memory that it holds: addresses and bytes."""
        held = [tensor.untyped_storage() for tensor in tensors_in([self.hidden, self.shared])]
        return {storage.data_ptr(): storage.nbytes() for storage in held}


@dataclass
class Work:
    """Tokens x layers, padding included.

    What an earlier round has left is counted as if it were computed: how much is left depends on where a run was killed
    and taken up again, and documents must not.
    """

    computed: int = 0
    found: int = 0  # of these, what an earlier round has left


@contextmanager
def replaced_forwards(layers: Sequence[nn.Module], make: Callable[[int, Any], Any]) -> Iterator[None]:
    """Give each layer instance the forward ``make(index, original)`` for a while."""
    originals = [layer.forward for layer in layers]
    own = ["forward" in vars(layer) for layer in layers]  # e.g. wrapped by accelerate's device hooks
    try:
        for index, layer in enumerate(layers):
            layer.forward = make(index, originals[index])  # type: ignore[method-assign]
        yield
    finally:
        for layer, original, keep in zip(layers, originals, own, strict=True):
            if keep:
                layer.forward = original  # type: ignore[method-assign]
            else:
                vars(layer).pop("forward", None)


def wrapped_layers(layers: Sequence[nn.Module], forward: Callable[..., Any]) -> AbstractContextManager[None]:
    """Call ``forward(index, original, *args, **kwargs)`` in the place of each layer's own for a while."""
    return replaced_forwards(layers, lambda index, original: partial(forward, index, original))


class Walk:
    """Runs batches through a model for many removals at once."""

    def __init__(
        self, model: nn.Module, layers: Sequence[nn.Module],
        held: Callable[[int], AbstractContextManager[None]] = lambda index: nullcontext(),
    ) -> None:  # fmt: skip
        """``held(index)`` is open while a layer runs, for all removals: its weights stay in memory for so long."""
        self.model, self.layers, self.held = model, layers, held
        self.wraps: list[Callable[[Tensor], Any]] = []  # how each layer returns its hidden states
        self.masked_head = False  # the head's forward is given a mask, though no layer looks at it
        self.shares = False  # layers hand each other more than hidden states, through mappings that they write to
        self.work = Work()
        self.base_states: BaseStateCache | None = None  # what is left of earlier batches; None: nothing is kept
        self.stage: Stage = ("inputs", 0)
        self.handed_on: dict[int, int] = {}  # bytes of the state that each layer made last

    def learn_outputs(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Run the intact model once on a small input to see in what form each layer returns its result.

        Returns what leaves the last layer, (rows, tokens, hidden).
        """
        left: list[Tensor] = []
        wraps: dict[int, Callable[[Tensor], Any]] = {}

        def forward(index: int, original: Any, *args: Any, **kwargs: Any) -> Any:
            self.shares |= any(map(_is_shared, kwargs.values()))
            output = original(*args, **kwargs)
            wraps[index] = _wrapper(output)
            left[:] = [output[0] if isinstance(output, tuple) else output]
            return output

        with torch.no_grad(), wrapped_layers(self.layers, forward):
            self.model(**inputs, use_cache=False)
        self.wraps = [wraps[index] for index in range(len(self.layers))]
        return left[0]

    @torch.no_grad()
    def learn_head(self, hidden: Tensor) -> None:
        """See whether the head takes a mask that is made: a model that makes its own waits for the device to do so.

        ``hidden`` is (places, hidden), of the last layer.
        """
        expected = self.logits(hidden)
        self.masked_head = True
        try:
            self.masked_head = torch.equal(self.logits(hidden), expected)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError):  # it makes its own, then
            self.masked_head = False

    @torch.no_grad()
    def hidden(
        self,
        inputs: Mapping[str, Any],
        drops: Sequence[frozenset[int]],
        rows: Tensor,
        nodes: Tensor,
        beginning: SharedBeginning | None = None,
    ) -> list[Tensor]:
        """Return for each set of dropped layers the last layer's output at given places.

        ``inputs`` go to the model's forward; ``rows`` and ``nodes`` (both (places,)) say which row and which token.
        Each result is (places, hidden), before the final norm. ``beginning``: what the inputs follow on; one that is
        still open is written by this walk.
        """
        states: dict[frozenset[int], WalkState] = {}
        last = len(self.layers) - 1
        what = "read" if beginning is not None and not beginning.length else "run"
        known = None  # of this batch; a beginning that is being written needs every layer to run
        if self.base_states is not None and what == "run":
            known = self.base_states.of(dict(inputs), beginning.tokens if beginning is not None else ())
        self.stage = what, -1

        def forward(index: int, original: Any, *args: Any, **kwargs: Any) -> Any:
            incoming, args, kwargs = split_hidden(args, kwargs)
            self.stage = what, index
            if index == 0:
                states[frozenset()] = WalkState(incoming, {k: dict(v) for k, v in kwargs.items() if _is_shared(v)})
            wanted = wanted_after(index, drops)
            fresh: dict[Key, WalkState] = {}
            with self.held(index):
                for key in list(states):
                    state = states.pop(key)  # it goes as soon as it is carried
                    if beginning is not None:
                        beginning.key = key
                    for way, new in ways(key, index, wanted):
                        through = way == "through"
                        left = None if key else known
                        fresh[new] = self._through(index, original, args, kwargs, state, left) if through else state
            states.update(fresh)
            self.stage = what, index + 1
            return self.wraps[index](incoming if index < last else next(iter(states.values())).hidden)

        with wrapped_layers(self.layers, forward):
            self._call_body({**inputs, "past_key_values": beginning} if beginning is not None else inputs)
        device = states[drops[0]].hidden.device  # the last layer's, where a model is spread over several
        rows, nodes = rows.to(device), nodes.to(device)
        found = {drop: states.pop(drop).hidden[rows, nodes] for drop in set(drops)}  # a state goes as it is read
        return [found[drop] for drop in drops]

    @torch.no_grad()
    def through(self, index: int, hidden: Tensor, inputs: Mapping[str, Any]) -> Tensor:
        """Return what one layer makes of hidden states, (rows, tokens, hidden).

        ``inputs`` go to the model's forward, which makes masks and positions of them; its other layers do not run.
        """
        found: list[Tensor] = []

        def forward(number: int, original: Any, *args: Any, **kwargs: Any) -> Any:
            incoming, args, kwargs = split_hidden(args, kwargs)
            if number == index:
                output = original(hidden, *args, **kwargs)
                found.append(output[0] if isinstance(output, tuple | list) else output)
            return self.wraps[number](incoming)

        with wrapped_layers(self.layers, forward):
            self._call_body(inputs)
        return found[0]

    def _call_body(self, inputs: Mapping[str, Any]) -> None:
        """Run the model's forward for the sake of its layers, with as little of the head as it allows."""
        body = getattr(self.model, "base_model", None)  # without the head: its logits would not be used
        body = self.model if body is None else body
        body(**inputs, use_cache="past_key_values" in inputs)

    def _through(
        self, index: int, original: Any, args: tuple[Any, ...], kwargs: dict[str, Any], state: WalkState,
        known: list[WalkState] | None,
    ) -> WalkState:  # fmt: skip
        """Carry a state through a layer, or take what an earlier round has left: ``known``, of the intact model."""
        if known is not None and index < len(known):
            size = known[index].hidden.shape[0] * known[index].hidden.shape[1]
            self.work.computed += size
            self.work.found += size
            return known[index]
        for name, content in state.shared.items():
            kwargs[name].clear()
            kwargs[name].update(content)
        output = original(state.hidden, *args, **kwargs)
        hidden = output[0] if isinstance(output, tuple | list) else output
        self.work.computed += hidden.shape[0] * hidden.shape[1]
        found = WalkState(hidden, {name: dict(kwargs[name]) for name in state.shared})
        self.handed_on[index] = sum(found.storages().values())
        if known is not None and self.base_states is not None:
            self.base_states.keep(known, index, found)
        return found

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Return what the model's own final norm, head and scaling make of last-layer states.

        ``hidden`` is (places, hidden); the result (places, vocabulary).
        """
        last = len(self.layers) - 1
        rows = hidden.unsqueeze(1)  # (places, 1, hidden): every place a row of one token

        def forward(index: int, original: Any, *args: Any, **kwargs: Any) -> Any:
            incoming, _, _ = split_hidden(args, kwargs)
            return self.wraps[index](rows if index == last else incoming)

        ids = torch.zeros(len(hidden), 1, dtype=torch.long, device=self.model.device)  # type: ignore[arg-type]
        mask = {"attention_mask": hidden.new_zeros(len(hidden), 1, 1, 1)} if self.masked_head else {}
        with wrapped_layers(self.layers, forward):
            return self.model(input_ids=ids, use_cache=False, **mask).logits[:, 0]


def _wrapper(output: Any) -> Callable[[Tensor], Any]:
    if isinstance(output, tuple):
        rest = output[1:]
        return lambda hidden: (hidden, *rest)
    if not isinstance(output, torch.Tensor):
        raise TypeError(f"a layer returns {type(output).__name__}")
    return lambda hidden: hidden


def split_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """Separate the hidden states, first argument of every decoder layer, from the rest."""
    if args:
        return args[0], args[1:], kwargs
    rest = dict(kwargs)
    return rest.pop("hidden_states"), (), rest


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested lists, tuples and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(part)


def _is_shared(value: Any) -> bool:
    return isinstance(value, dict)


# The intact model's hidden states of batches seen before: what later rounds of a search need not compute again.
#
# A greedy search asks about the same items round after round, and below its first removed layer every removal still has
# the intact model's states. They are kept, batch by batch and layer by layer from the bottom, as far as the memory
# goes.


@dataclass
class BaseStateCache:
    """All batches' states, up to ``most`` bytes."""

    most: int
    used: int = 0
    by_batch: dict[str, list[WalkState]] = field(default_factory=dict)  # of each batch, ``[j]`` leaves layer j

    def of(self, inputs: dict[str, Any], beginning: tuple[int, ...]) -> list[WalkState]:
        """Return the states of a batch; ``inputs`` and the tokens before them tell batches apart."""
        digest = hashlib.sha256(repr(beginning).encode())
        for name in sorted(inputs):
            digest.update(_bytes(inputs[name]))
        return self.by_batch.setdefault(digest.hexdigest(), [])

    def keep(self, states: list[WalkState], layer: int, state: WalkState) -> None:
        """Remember what leaves ``layer`` of a batch; no gaps are left, and nothing is kept beyond the memory."""
        if layer != len(states):
            return
        own, known = state.storages(), states[-1].storages() if states else {}
        size = sum(size for place, size in own.items() if place not in known)
        if self.used + size <= self.most:
            self.used += size
            states.append(state)


def _bytes(value: Any) -> bytes:
    if isinstance(value, dict):
        return b"".join(_bytes(value[name]) for name in sorted(value))
    return repr(tuple(value.shape)).encode() + value.cpu().contiguous().view(torch.uint8).numpy().tobytes()


# Which states a walk carries through which layer: what the walk does, and what memory is counted by.


Key = frozenset[int]  # layers that are removed below a layer
Way = Literal["through", "past"]


def wanted_after(index: int, drops: Sequence[Key]) -> frozenset[Key]:
    """Return what the removals have lost after layer ``index``: one state is needed for each."""
    return frozenset(frozenset(layer for layer in drop if layer <= index) for drop in drops)


def ways(key: Key, index: int, wanted: frozenset[Key]) -> Iterator[tuple[Way, Key]]:
    """Yield what becomes of one state at a layer: how it is carried, and what it has lost afterwards."""
    if key in wanted:
        yield "through", key
    if key | {index} in wanted:
        yield "past", key | {index}


@dataclass(frozen=True)
class Traffic:
    """The states of a walk for one set of removals."""

    alive: tuple[int, ...]  # (depth + 1,) most states alive while a layer runs, embeddings included; last: at the end
    runs: tuple[int, ...]  # (depth,) how many states are carried through a layer
    removals: int


@lru_cache(maxsize=256)
def traffic(depth: int, drops: tuple[Key, ...]) -> Traffic:
    """Follow the states of a walk."""
    held = {frozenset[int](): 0}  # which tensor each state is; 0 are the embeddings, which the model's forward keeps
    made, alive, runs = 0, [], []
    for index in range(depth):
        wanted, fresh, most, before = wanted_after(index, drops), dict[Key, int](), 0, made
        for key in list(held):
            current = held.pop(key)
            for way, new in ways(key, index, wanted):
                most = max(most, len({0, current, *held.values(), *fresh.values()}))
                made += way == "through"
                fresh[new] = made if way == "through" else current
        held = fresh
        alive.append(most)
        runs.append(made - before)
    return Traffic((*alive, len({0, *held.values()})), tuple(runs), len(drops))
