"""The ablation engine: log-likelihoods of many requests under many removals; a self-test chooses its path."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import numpy as np
import torch

from layerprune.architecture.tiny import LENGTHS, VOCABULARY, twin_config, with_noise
from layerprune.data.items import Request
from layerprune.errors import LayerpruneError, ModelError, one_line
from layerprune.models.model import LoadedModel
from layerprune.models.placement import out_of_memory
from layerprune.removal import Removal
from layerprune.scoring.memory import Allowance, default_memory, default_tokens, kinds
from layerprune.scoring.paths import BeginningPath, ChainPath, EvaluationPath, Grades, Groups, PlainPath, TreePath
from layerprune.scoring.prefix_tree import BEGINNING_GROUPS, Row, batches, beginnings, chains, tree_size
from layerprune.scoring.walk import BaseStateCache

# The ablation engine: log-likelihoods of many requests under many removals, at a fraction of the price.


# The share that the intact model's states from earlier rounds may fill; the rest is for the removals of one batch.
KEPT_SHARE = 0.25
PATIENCE = 8  # batches that must fit, after the device ran out of memory, before larger ones are tried; then twice that


@dataclass
class Account:
    """Tokens x layers: what was computed, and what one evaluation per removal would have computed."""

    computed: int = 0
    naive: int = 0

    @property
    def avoided(self) -> float:
        """Share of the naive work that was not done."""
        return 1 - self.computed / self.naive if self.naive else 0.0


class Engine:
    """Measures requests under removals by the fastest path that a self-test has found right for this model."""

    def __init__(
        self, loaded: LoadedModel, *, tokens: int | None = None, rows: int | None = None, memory: int | None = None
    ) -> None:
        """``memory``: bytes of all tensors beside the weights, at any time; by default what the machine has for it."""
        self.loaded = loaded
        self.memory = memory or default_memory(loaded)
        self.tokens = tokens or default_tokens(loaded)
        self.rows = rows  # --batch-size: a fixed number of rows instead of a number of tokens
        # Removals and tokens of a batch that the device had room for, once it ran out. Apart from what was asked for,
        # which stands in journals' keys: a run that is taken up again has not run out yet.
        self.beside: int | None = None
        self.fits: int | None = None
        self._patience, self._fitted = PATIENCE, 0  # batches that must fit before more is tried; those that have
        self.account = Account()
        self.path: EvaluationPath = PlainPath(loaded)
        self.remarks: list[str] = []  # why faster paths were not taken
        self._last: Allowance | None = None  # of the path measured along last
        self.longest = 0  # tokens of the longest request the self-test has seen; 0: it has not run

    def choose_path(self, requests: Sequence[Request], groups: Groups) -> None:
        """Compare the fast paths with plain forwards on a few of the requests and keep the first that agrees.

        Raises ``UsageError`` where the memory is too little for plain forwards, ``ModelError`` where the device has no
        room for a single one.
        """
        self.path, self.remarks = Trial.of(self, requests, groups).choose()
        self.path.walk.work.computed = 0  # the self-test's own work is nobody's
        self.path.walk.base_states = BaseStateCache(int(KEPT_SHARE * self.memory))
        self.longest = max(len(request.tokens) for request in requests)

    def measure(
        self,
        requests: Sequence[Request],
        groups: Groups,
        removals: Sequence[Removal],
        done: Callable[[int], None] = lambda tokens: None,
    ) -> Grades:
        """Return (sums of log-probabilities in nats, how many tokens are greedy), both (removals, requests).

        ``groups`` are the indices of requests that belong to one question; ``done`` hears of finished requests x
        removals. Raises ``UsageError`` where the memory does not hold one item under one removal.
        """
        if max(len(request.tokens) for request in requests) > self.longest:
            self.choose_path(requests, groups)  # a window may show only in requests longer than those tested
        found = self.measure_along(self.path, requests, groups, removals, done)
        tokens = sum(row.length for row in chains(requests))
        self.account.naive += sum(tokens * (len(self.loaded.layers) - len(removal)) for removal in removals)
        self.account.computed += self.path.walk.work.computed
        self.path.walk.work.computed = 0
        return found

    def measure_along(
        self,
        path: EvaluationPath,
        requests: Sequence[Request],
        groups: Groups,
        removals: Sequence[Removal],
        done: Callable[[int], None] = lambda tokens: None,
    ) -> Grades:
        """Measure along one path, in batches and portions of the removals that stay within the memory."""
        # the first requests asked about along a path hold the longest
        if self._last is None or self._last.path is not path:
            longest = max(len(request.tokens) - 1 for request in requests)
            self._last = Allowance(path, self.memory, KEPT_SHARE, longest, own=path.loaded is self.loaded)
        allowance = self._last
        rows = path.layout(requests, groups, allowance.longest_row)
        allowance.check(rows)
        sums = np.full((len(removals), len(requests)), np.nan)
        greedy = np.zeros((len(removals), len(requests)), dtype=np.int64)
        tokens, most = (self.tokens, self.rows) if self.fits is None else (min(self.tokens, self.fits), None)
        for section in _sections(list(batches(rows, tokens, most, allowance.fits))):
            for part in allowance.portions(section, removals):
                for batch in section:
                    for members, numbers, (s, g) in self._run(path, batch, removals, part):
                        sums[np.ix_(numbers, members)], greedy[np.ix_(numbers, members)] = s, g
                        done(len(members) * len(numbers))
        return sums, greedy

    def _run(
        self, path: EvaluationPath, batch: list[Row], removals: Sequence[Removal], part: list[int]
    ) -> Iterator[tuple[list[int], list[int], Grades]]:
        """Measure a batch under a part of the removals; out of device memory, do it in halves.

        Yields (requests, numbers of removals, their grades). Removals are halved first, which changes no figure; rows
        only under a single one. What comes next is no larger, until enough of it has fitted.
        """
        tokens = batch[0].length * len(batch)
        crowded = self.beside is not None and len(part) > self.beside
        large = self.fits is not None and tokens > self.fits and len(batch) > 1
        if not crowded and not large:
            try:
                members, grades = path.run(batch, [removals[number] for number in part])
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                if len(batch) == len(part) == 1:
                    length, device = batch[0].length, path.loaded.device
                    raise ModelError(f"a single row of {length} tokens does not fit on {device}") from error
            else:
                self._has_fitted()
                yield members, part, grades
                return
            path.read = None
            self._patience, self._fitted = 2 * self._patience, 0
            crowded = len(part) > 1
            if crowded:
                self.beside = len(part) // 2
            else:
                self.fits = max(len(batch) // 2 * batch[0].length, 1)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        if crowded:
            half = min(len(part) // 2, self.beside or 1)
            halves = [(batch, part[:half]), (batch, part[half:])]
        else:
            half = len(batch) // 2
            halves = [(batch[:half], part), (batch[half:], part)]
        for rows, numbers in halves:
            yield from self._run(path, rows, removals, numbers)

    def _has_fitted(self) -> None:
        """Try twice as much again, once enough batches have fitted: the device may have been full of others' work."""
        self._fitted += 1
        if self._fitted >= self._patience:
            self._fitted = 0
            self.beside, self.fits = (None if most is None else 2 * most for most in (self.beside, self.fits))


def _sections(made: Sequence[list[Row]]) -> Iterator[list[list[Row]]]:
    """Put batches that follow on the same beginning together: what is kept of it serves all of them."""
    for beginning, own in groupby(made, key=lambda batch: batch[0].beginning):
        own = list(own)
        yield from [own] if beginning else [[batch] for batch in own]


# Before a fast path is trusted with a model, it must give what plain forwards give, on the user's own requests.
#
# In float32 that is one comparison. In half precision rounding would hide a path that is wrong in structure, so there
# the structure is tested first, in float64 on a tiny model with the same layers (``twin``), and the real model then
# shows whether rounding stays within bounds.


# Largest difference of a log-likelihood from a plain forward, in nats per graded token. In float32 rounding alone gives
# 3e-5 (measured on SmolLM2-135M, five removals), a wrong mask or position a thousand times that and more. In float64 on
# tiny random models right paths differ by up to 5e-7, where a model computes in float32 on its way (mamba, gemma2), and
# wrong ones by 2e-3 and more (measured on the types of docs/notes/2026-11-28-engine.md).
EXACT = {torch.float64: 1e-5, torch.float32: 1e-3}
# In half precision the same forward in another batch shape moves single answers by up to 0.4 and the median by 0.01 to
# 0.07 (measured, bfloat16, layer 0 removed the worst), so means are compared: chains, which have no mask or position to
# get wrong, with a fixed limit, and what they show as noise is the limit for trees.
HALF_MEAN = 0.1
HALF_NOISE = 2.0  # times the chains' mean difference ...
HALF_FLOOR = 0.01  # ... plus this

Kind = Callable[[LoadedModel], EvaluationPath]


class WrongPath(Exception):
    """Why a path cannot be right for a model, in words."""


class Trial:
    """A few of the user's requests, and what plain forwards say of them under several removals."""

    def __init__(
        self, engine: Engine, loaded: LoadedModel, requests: list[Request], groups: list[list[int]],
        removals: list[Removal],
    ) -> None:  # fmt: skip
        """Ask the plain path. ``loaded`` is the engine's model, or its twin; the engine keeps to its memory."""
        self.engine, self.loaded = engine, loaded
        self.requests, self.groups, self.removals = requests, groups, removals
        self.structure: Trial | None = None  # the same asked of a tiny twin in float64; None: the comparison is exact
        self.expected = self._ask(PlainPath(loaded))  # (removals, requests) nats

    @classmethod
    def of(cls, engine: Engine, requests: Sequence[Request], groups: Groups) -> Trial:
        """Ask the plain path about a sample of the groups."""
        few: list[Request] = []
        own: list[list[int]] = []
        for group in sample(requests, groups):
            own.append(list(range(len(few), len(few) + len(group))))
            few += [requests[index] for index in group]
        return cls(engine, engine.loaded, few, own, trial_removals(engine.loaded))

    def on_twin(self) -> Trial:
        """Ask the same of a tiny model in float64; raises ``NoTwin`` where there is none, or it cannot run."""
        twin = twin_of(self.loaded)
        try:
            return Trial(self.engine, twin, renamed(self.requests), self.groups, self.removals)
        except LayerpruneError:  # too little memory is no property of the model
            raise
        except Exception as error:  # modelling code that casts to float32 on its way, or wants sizes of its own
            raise NoTwin(f"a tiny model of this config does not run: {_in_short(error)}") from error

    def choose(self) -> tuple[EvaluationPath, list[str]]:
        """Return the fastest path that agrees, and why faster ones were not taken."""
        try:
            self.structure = None if self.loaded.dtype in EXACT else self.on_twin()
            chain, differences = self.compared(ChainPath)
            reason = self.excess(differences, HALF_MEAN)
        except NoTwin as error:
            reason = f"{error}; in {self.loaded.dtype} no other test is sharp enough, in --dtype float32 there is one"
        except WrongPath as error:
            reason = str(error)
        if reason is not None:
            return PlainPath(self.loaded), [f"trees and chains: {reason}"]
        if (flash := _flash(self.loaded)) is not None:  # not tried: a kernel misled about lengths may end the process
            return chain, [f"trees: {flash} takes no mask"]
        limit = HALF_NOISE * float(differences.mean()) + HALF_FLOOR
        reasons: dict[str, None] = {}
        shared = any(tokens for tokens, _ in beginnings(self.requests, self.groups))
        for kind in [BeginningPath, TreePath] if shared else [TreePath]:
            wrong, failed = list[str](), list[str]()  # one of the windows fits: the others are no fault of the model
            for windows in TreePath.masks(self.loaded, max(len(request.tokens) - 1 for request in self.requests)):
                try:
                    path, differences = self.compared(partial(kind, windows=windows))
                except WrongPath as error:
                    failed.append(str(error))
                    continue
                if (reason := self.excess(differences, limit)) is None:
                    return path, list(reasons)
                wrong.append(reason)
            reasons[f"{kind.name}: {(wrong or failed)[-1]}"] = None
        return chain, list(reasons)

    def fault(self, kind: Kind) -> str | None:
        """Return what is wrong with a path where comparison is exact; None: nothing."""
        try:
            return self.excess(self.compared(kind)[1], 0.0)
        except WrongPath as error:
            return str(error)

    def compared(self, kind: Kind) -> tuple[EvaluationPath, np.ndarray]:
        """Return a path and |difference| from plain forwards in nats per graded token, (removals, requests).

        Raises ``WrongPath`` where it cannot be right.
        """
        if self.structure is not None and (fault := self.structure.fault(kind)) is not None:
            raise WrongPath(f"on a tiny model of this config in float64, {fault}")
        try:
            path = kind(self.loaded)
            found = self._ask(path)
        except Exception as error:  # a model's own code may fail in any way on inputs it was not made for
            raise WrongPath(f"the model's code does not take such inputs ({_in_short(error)})") from error
        overflow = ~np.isfinite(found) & ~np.isfinite(self.expected)  # a removal may make both so: that is agreement
        with np.errstate(invalid="ignore"):
            apart = np.where(overflow, 0.0, np.abs(found - self.expected))
        return path, apart / np.array([request.scored for request in self.requests])

    def excess(self, differences: np.ndarray, half_limit: float) -> str | None:
        """Return by how much the differences are too large, in words; ``half_limit`` is for half precision."""
        exact = EXACT.get(self.loaded.dtype)
        seen, limit = (differences.max(), exact) if exact is not None else (differences.mean(), half_limit)
        if seen <= limit:  # NaN is not
            return None
        return f"log-likelihoods differ by {seen:.2g} nats per token from plain forwards (limit {limit:.2g})"

    def _ask(self, path: EvaluationPath) -> np.ndarray:
        return self.engine.measure_along(path, self.requests, self.groups, self.removals)[0]


def sample(requests: Sequence[Request], groups: Groups, count: int = 4) -> list[list[int]]:
    """Return the largest group, the smallest, some between, that of the longest request, and some that begin alike.

    A mask with a window shows in long requests, and a large group may be one of many short ones.
    """
    ordered = sorted(groups, key=lambda group: tree_size(requests[i].tokens[:-1] for i in group))
    picks = sorted({round(i * (len(ordered) - 1) / max(1, count - 1)) for i in range(count)})
    chosen = [list(ordered[pick]) for pick in picks]
    longest = list(max(groups, key=lambda group: max(len(requests[i].tokens) for i in group)))
    shared, alike = max(beginnings(requests, groups), key=lambda pair: pair[0])
    more = [longest, *(alike[:BEGINNING_GROUPS] if shared else [])]
    return chosen + [group for number, group in enumerate(more) if group not in (*chosen, *more[:number])]


def trial_removals(loaded: LoadedModel) -> list[Removal]:
    """Return the intact model and removals at the start, in the middle, at the end, of several layers, of each kind."""
    depth = len(loaded.layers)
    sets = [(), (0,), (depth // 2,), (depth - 1,), (depth // 3, depth - 1)]
    removable = [layer for layer in range(depth) if layer not in loaded.architecture.must_keep]
    like = kinds(loaded)
    sets += [(layer,) for layer in sorted({like[layer]: layer for layer in removable}.values())]  # the last of each
    return [Removal.from_layers(set(units)) for units in dict.fromkeys(sets) if len(set(units)) < depth]


def _in_short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


# A tiny random model in float64 with the layers of a loaded one: there a wrong path cannot pass for rounding.
#
# Masks, positions, windows and what layers hand each other do not depend on sizes or weights. So they are tested where
# a right path agrees to the last digits; on the real weights in half precision rounding would hide a small error.


FIRST_TOKEN = 3  # of the twin's vocabulary: padding, beginning and end have the numbers below
OTHER_DEPTHS = ("num_hidden_layers", "num_layers", "depth", "encoder_layers")  # of a vision or audio tower


class NoTwin(ModelError):
    """A model of which no tiny one can be built, or whose tiny one does not run."""


def twin_of(loaded: LoadedModel) -> LoadedModel:
    """Return a tiny float64 model of the loaded model's class, with its layers and the lengths it distinguishes.

    On the CPU, with the attention implementation of the loaded model, or eager where that is flash attention, which
    knows no float64. Raises ``NoTwin`` where it cannot be built.
    """
    kind, config = type(loaded.model), loaded.model.config
    path = loaded.architecture.path if config.get_text_config(decoder=True) is not config else ()
    try:
        small = twin_config(config, path, keep=LENGTHS)
        for name in set(small.sub_configs) - set(path):  # vision and audio towers, which see nothing here
            tower = getattr(small, name)
            for depth in OTHER_DEPTHS:
                if isinstance(getattr(tower, depth, None), int):
                    setattr(tower, depth, 1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = kind._from_config(
                small, dtype=torch.float64,
                attn_implementation=config._attn_implementation if _flash(loaded) is None else "eager",
                experts_implementation="eager",  # grouped products of experts know no float64
            )  # fmt: skip
            return LoadedModel(with_noise(model), loaded.tokenizer, loaded.architecture, loaded.ref)
    except Exception as error:  # strict config classes and modelling code raise what they like
        raise NoTwin(f"no tiny {config.model_type} could be built: {one_line(error)}") from error


def _flash(loaded: LoadedModel) -> str | None:
    """Return the model's attention implementation where it is one of flash attention; None: it is another."""
    name = str(loaded.model.config._attn_implementation)
    return name if "flash" in name else None


def renamed(requests: Sequence[Request]) -> list[Request]:
    """Return the requests in the twin's small vocabulary: the same lengths, the same tokens in common.

    Tokens are numbered as they appear, so that answers that part do so still.
    """
    numbers: dict[int, int] = {}
    room = VOCABULARY - FIRST_TOKEN
    return [
        Request(tuple(FIRST_TOKEN + numbers.setdefault(t, len(numbers)) % room for t in request.tokens), request.scored)
        for request in requests
    ]
