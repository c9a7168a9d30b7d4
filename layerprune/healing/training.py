"""The training loop behind LoRA, partial fine-tuning and distillation, in one process or several, by accelerate."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, Field
from torch import nn

from layerprune.artifacts import LossPoint
from layerprune.checkpoint.writer import flush_to_disk
from layerprune.data.corpus import Corpus, Windows
from layerprune.errors import DocumentError, TrainingError, UsageError, one_line
from layerprune.files import writing
from layerprune.healing.base import HealContext
from layerprune.healing.losses import Head, NextToken, mean_nats
from layerprune.util import SILENT, Advance, Progress

if TYPE_CHECKING:
    from accelerate import PartialState
    from transformers import PreTrainedModel


# The training loop behind LoRA, partial fine-tuning and distillation: accelerate carries it, one process or several.
#
# A step is a fixed set of windows, whatever the number of processes: they share it out, so the loss curve is the same.
# The loop keeps its state on disk: a run that is killed goes on where it was and ends in the same weights.


Tensor = torch.Tensor
Weights = Mapping[str, nn.Parameter]
Precision = Literal["bfloat16", "float32"]

BETAS = (0.9, 0.95)  # what language models are commonly trained with; short runs want the shorter memory
LOWEST = 0.1  # share of the learning rate that the cosine ends at
DIVERGED = 1.0  # nats/token of held-out loss above where the run began: it is not coming back
SAVE_SECONDS = 300.0  # between two states at most, beside those at measurements
SPEAK_SECONDS = 60.0  # between two words on the training loss


@dataclass(frozen=True)
class Training:
    """How to train. What changes a weight is here; where it runs is not."""

    steps: int
    lr: float
    batch: int = 8  # windows of a step, over all processes
    micro: int = 2  # windows of one forward pass, per process
    warmup: int = 0  # steps in which the learning rate rises to lr; a cosine falls from there to LOWEST of it
    measures: int = 5  # of the held-out loss, evenly spread, the last one after the last step
    patience: int = 2  # measurements without improvement after which it stops
    clip: float = 1.0  # largest norm of the gradient
    decay: float = 0.0  # weight decay
    precision: Precision = "bfloat16"  # of matrix products; trained weights are float32 always
    recompute: bool = False  # activations on the way back (gradient checkpointing): slower, far less memory
    seed: int = 0
    loaded: str = ""  # what is trained and by which method: fresh adapters look alike in every model of one shape

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        share = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (LOWEST + (1 - LOWEST) * 0.5 * (1 + math.cos(math.pi * share)))

    def measured(self, step: int) -> bool:
        """Whether the held-out loss is measured once ``step`` steps are done."""
        marks = {round(self.steps * (number + 1) / self.measures) for number in range(self.measures)}
        return step in marks or step == self.steps


def make_trainable(model: nn.Module, names: set[str], precision: Precision = "float32") -> dict[str, nn.Parameter]:
    """Make the named weights float32 and trainable; fix the others, in bfloat16 where products are made in it.

    Returns the trainable ones by name, a tied one once.
    """
    for name, weight in model.named_parameters():
        weight.requires_grad_(name in names)
        if name in names:
            weight.data = weight.data.float()
        elif precision == "bfloat16":  # or autocast would convert them at every use
            weight.data = weight.data.bfloat16()
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def train(
    model: PreTrainedModel, goal: NextToken, text: Corpus, options: Training, folder: Path, progress: Progress = SILENT
) -> TrainingState:
    """Train the weights of ``model`` that require a gradient; leave it with those of the lowest held-out loss.

    ``folder`` holds the run's states; a run with the same settings goes on there. Works in one process, or in several
    under ``accelerate launch`` (data parallel). Raises ``TrainingError`` when the loss is not a number or runs away,
    and ``KeyboardInterrupt`` after Ctrl-C, once the state is saved.
    """
    run = _Run(model, goal, text, options, folder, progress)
    run.restore()
    left = (options.steps - run.state.step) * options.batch * text.train.window
    with progress.task("training", left, "tokens") as advance, interruptible() as interrupt:
        while run.state.step < options.steps and not run.state.stopped:
            run.step(advance, interrupt)
    return run.finish()


class ModelWithLoss(nn.Module):
    """A model with its loss, so that data parallelism wraps both: windows in, the loss summed over their tokens out."""

    def __init__(self, model: PreTrainedModel, goal: NextToken, precision: Precision) -> None:
        super().__init__()
        self.model, self.goal, self.precision = model, goal, precision
        self.head = Head(model)

    def forward(self, rows: Tensor, ids: Tensor, counted: Tensor) -> Tensor:
        """``rows`` are the windows' numbers; ``ids`` and ``counted`` (windows, tokens)."""
        wanted = counted[:, 1:]
        labels = ids[:, 1:][wanted]  # (places,)
        with self.autocast(ids.device):
            of_logits = self.goal.prepare(rows, ids, wanted, labels)
            hidden = self.head.hidden(ids)[:, :-1][wanted]  # (places, hidden)
            return self.head.loss(hidden, of_logits) + self.goal.auxiliary_loss(wanted)

    def autocast(self, device: torch.device) -> Any:
        """Matrix products in the precision asked for."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bfloat16")


def order(windows: int, batch: int, step: int, seed: int) -> list[int]:
    """Return which windows a step trains on: every window once in a random order, then again in another."""
    places = (divmod(place, windows) for place in range(step * batch, (step + 1) * batch))
    return [int(_shuffled(windows, epoch, seed)[number]) for epoch, number in places]


@lru_cache(maxsize=2)  # a step may end one epoch and begin the next
def _shuffled(windows: int, epoch: int, seed: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng((seed, epoch)).permutation(windows)


class _Run:
    """One sitting of a training run."""

    def __init__(
        self, model: PreTrainedModel, goal: NextToken, text: Corpus, options: Training, folder: Path, progress: Progress
    ) -> None:
        from accelerate import Accelerator, DistributedDataParallelKwargs

        self.options, self.text, self.progress = options, text, progress
        # A router may send no token of a step to an expert. Precision is the objective's own affair.
        routed = any("expert" in name for name, _ in model.named_parameters())
        spare = DistributedDataParallelKwargs(find_unused_parameters=routed)
        on_cpu = model.device.type == "cpu"
        self.accelerator = Accelerator(mixed_precision="no", cpu=on_cpu, kwargs_handlers=[spare])
        check_processes(self.accelerator, options)
        self.model, self.device = model, self.accelerator.device if not on_cpu else torch.device("cpu")
        self.weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.saved_states = SavedStates(folder / _key_of(options, goal, text, self.weights)[:16])
        self.state = TrainingState()
        self.optimizer = torch.optim.AdamW(
            self.weights.values(), lr=options.lr, betas=BETAS, weight_decay=options.decay, fused=True
        )
        if options.recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.objective = ModelWithLoss(model, goal, options.precision)
        with self.objective.autocast(self.device):
            self.objective.head.check(self._tensor(text.train.ids[:1, :16]))
        self.wrapped = self.accelerator.prepare(self.objective)
        self.saved = self.spoken = time.monotonic()

    def restore(self) -> None:
        """Go on from the last state, or measure where the run begins."""
        found = self.saved_states.restore(self.weights, self.optimizer)
        self.accelerator.wait_for_everyone()
        if found is None:
            self._measure()
            self._save()
            return
        if found.step > self.options.steps:
            raise self.saved_states.damaged(self.saved_states.last, ValueError(f"it is of step {found.step}"))
        self.state = found
        if found.step:
            self._note(f"going on from step {found.step} of {self.options.steps}")

    def step(self, advance: Advance, interrupt: threading.Event) -> None:
        """Train on the windows of one step; measure, save and stop as it is due."""
        number, options = self.state.step, self.options
        for group in self.optimizer.param_groups:
            group["lr"] = options.rate(number)
        loss = self._accumulate(order(len(self.text.train), options.batch, number, options.seed))
        norm = self.accelerator.clip_grad_norm_(self.weights.values(), options.clip)
        loss, asked = self._together(loss, float(interrupt.is_set()))
        if not (math.isfinite(loss) and math.isfinite(float(norm))):
            raise self._stopped(f"the loss of step {number + 1} is {loss:.4g}, its gradient's norm {float(norm):.4g}")
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.state.losses.append(loss)
        self.state.step += 1
        self.state.tokens += options.batch * self.text.train.window
        advance(options.batch * self.text.train.window)
        if options.measured(self.state.step):
            self._measure()
            self._save()
        elif asked or time.monotonic() - self.saved > SAVE_SECONDS:
            self._save()
        if time.monotonic() - self.spoken > SPEAK_SECONDS:
            self._note(f"step {self.state.step} of {options.steps}: loss {loss:.4f}")
        if asked:
            self._note(f"stopped after step {self.state.step}; the same command goes on from there")
            raise KeyboardInterrupt

    def finish(self) -> TrainingState:
        """Put the best weights in place."""
        if self.state.best_step != self.state.step:
            self.saved_states.restore_best(self.weights)
        self.accelerator.wait_for_everyone()  # whoever leads may remove the states now
        if self.options.recompute:
            self.model.gradient_checkpointing_disable()
        self.model.eval()
        return self.state

    def _accumulate(self, chosen: list[int]) -> float:
        """Leave the gradient of the step's mean loss in the weights; return this process's share of the loss."""
        windows, micro, processes = self.text.train, self.options.micro, self.accelerator.num_processes
        counted = int(windows.counted[chosen][:, 1:].sum())
        with self.accelerator.split_between_processes(chosen) as mine:
            parts = [mine[start : start + micro] for start in range(0, len(mine), micro)]
        torch.manual_seed(self.options.seed + processes * self.state.step + self.accelerator.process_index)
        self.model.train()
        total = 0.0
        for place, rows in enumerate(parts):
            last = place == len(parts) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                loss = self.wrapped(
                    torch.tensor(rows), self._tensor(windows.ids[rows]), self._tensor(windows.counted[rows])
                )
                self.accelerator.backward(loss * (processes / counted))  # gradients are averaged over the processes
            total += float(loss.detach()) / counted
        return total

    def _measure(self) -> None:
        """Measure the held-out loss, keep the weights if they are the best so far, judge whether to stop."""
        self.model.eval()
        heldout, state = self.text.heldout, self.state
        with self.accelerator.split_between_processes(list(range(len(heldout)))) as mine:
            part = Windows(heldout.ids[mine], heldout.counted[mine])
        count = int(part.counted[:, 1:].sum())
        with self.objective.autocast(self.device):
            nats = mean_nats(self.model, part) if count else 0.0
        total, counted = self._together(nats * count, float(count))
        measured = total / counted
        training = sum(state.losses) / len(state.losses) if state.losses else None
        state.losses.clear()
        said = "" if training is None else f"loss {training:.4f}, "
        self._note(f"step {state.step} of {self.options.steps}: {said}held-out {measured:.4f} nats/token")
        began = state.curve[0].heldout if state.curve else None
        if not math.isfinite(measured) or (began is not None and measured > began + DIVERGED):
            raise self._stopped(f"the held-out loss is {measured:.4g} nats/token after step {state.step}")
        state.curve.append(LossPoint(step=state.step, tokens=state.tokens, loss=training, heldout=measured))
        if state.best is None or measured < state.best:
            state.best, state.best_step, state.worse = measured, state.step, 0
            if self.accelerator.is_main_process:
                self.saved_states.keep_best(self.weights)
        else:
            state.worse += 1
            state.stopped = state.worse >= self.options.patience

    def _save(self) -> None:
        self.saved = time.monotonic()
        if self.accelerator.is_main_process:
            self.saved_states.save(self.state, self.weights, self.optimizer)

    def _stopped(self, why: str) -> TrainingError:
        return TrainingError(
            f"{why}: training has run away and was stopped; use a lower learning rate than {self.options.lr:g}. The "
            f"best weights so far, of step {self.state.best_step}, are kept in {self.saved_states.best}"
        )

    def _together(self, *values: float) -> tuple[float, ...]:
        """Return each value summed over the processes."""
        summed = self.accelerator.reduce(torch.tensor(values, dtype=torch.float64, device=self.device), "sum")
        return tuple(summed.tolist())

    def _tensor(self, array: np.ndarray[Any, Any]) -> Tensor:
        return torch.from_numpy(array).to(self.device)

    def _note(self, message: str) -> None:
        self.spoken = time.monotonic()
        if self.accelerator.is_main_process:
            self.progress.note(message)


def check_processes(accelerator: Any, options: Training) -> None:
    """Raise ``UsageError`` where the processes were not launched to train data parallel, or cannot share a batch."""
    kind, processes = str(accelerator.distributed_type).rpartition(".")[2], accelerator.num_processes
    if processes > 1 and not kind.startswith("MULTI_"):
        raise UsageError(f"training runs data parallel and was launched as {kind}; use accelerate launch --multi_gpu")
    if options.batch % processes:
        raise UsageError(f"a batch of {options.batch} windows cannot be shared by {processes} processes")


# Where a training run stands, on disk: the weights it trains, the optimiser's moments, the curve so far.
#
# Each file is renamed into place when it is complete: a run killed at any moment finds a whole one.


SAMPLE = 1024  # elements of each weight that tell one model from another


class TrainingState(BaseModel):
    """How far a run has come, in plain figures."""

    step: int = Field(default=0, ge=0)  # steps done
    tokens: int = Field(default=0, ge=0)
    curve: list[LossPoint] = []
    losses: list[float] = []  # of the steps since the last measurement
    best: float | None = None  # lowest held-out loss so far, nats per token
    best_step: int = 0
    worse: int = 0  # measurements since the best one
    stopped: bool = False  # early, by the held-out loss


class SavedStates:
    """The states of one run in one folder: the last one, and the best weights by the held-out loss."""

    def __init__(self, folder: Path) -> None:
        self.last, self.best = folder / "last.pt", folder / "best.safetensors"

    def save(self, state: TrainingState, weights: Weights, optimizer: torch.optim.Optimizer) -> None:
        """Replace the last state."""
        values = {name: weight.detach().cpu() for name, weight in weights.items()}  # on a CPU no copy
        content = {"state": state.model_dump(), "weights": values, "optimizer": optimizer.state_dict()}
        # into a file of Python's: torch's own writer does not say that a disk is full
        with _replacing(self.last, RuntimeError) as path, path.open("wb") as file:
            torch.save(content, file)

    def keep_best(self, weights: Weights) -> None:
        """Keep these weights as the best so far."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        with _replacing(self.best, SafetensorError) as path:
            save_file({name: weight.detach().cpu().contiguous() for name, weight in weights.items()}, path)

    def restore(self, weights: Weights, optimizer: torch.optim.Optimizer) -> TrainingState | None:
        """Put the last state's weights and moments in place and return where the run stood.

        None for a run that has not begun; raises ``DocumentError`` for a damaged state.
        """
        if not self.last.is_file():
            return None
        try:
            content = torch.load(self.last, map_location="cpu", weights_only=True, mmap=True)
            if not isinstance(content, dict):
                raise ValueError(f"it holds {type(content).__name__}")
            state, values, moments = (content[name] for name in ("state", "weights", "optimizer"))
            state = TrainingState.model_validate(state)
            if {name: value.shape for name, value in values.items()} != {n: w.shape for n, w in weights.items()}:
                raise ValueError("it holds other weights")
        except (
            OSError, EOFError, ValueError, LookupError, RuntimeError, TypeError, AttributeError, pickle.UnpicklingError
        ) as error:  # fmt: skip
            raise self.damaged(self.last, error) from error
        _set_weights(weights, values)  # what fails from here on, such as for want of memory, is no damage
        try:
            optimizer.load_state_dict(moments)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise self.damaged(self.last, error) from error
        return state

    def restore_best(self, weights: Weights) -> None:
        """Put the best weights in place."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            values = load_file(self.best)
            if {name: value.shape for name, value in values.items()} != {n: w.shape for n, w in weights.items()}:
                raise ValueError("it holds other weights")
        except (OSError, ValueError, SafetensorError) as error:
            raise self.damaged(self.best, error) from error
        _set_weights(weights, values)

    def damaged(self, path: Path, error: Exception) -> DocumentError:
        """Return the error that names a damaged file and says what helps."""
        return DocumentError(f"{path} is damaged ({one_line(error)}); remove {path.parent} to begin anew")


@contextmanager
def _replacing(path: Path, *others: type[Exception]) -> Iterator[Path]:
    """Yield a file to write that takes the place of ``path`` when the block ends well; ``others``: see ``writing``."""
    fresh = path.with_name(f"{path.name}.partial")
    try:
        with writing(path, *others):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield fresh
            flush_to_disk(fresh)
            fresh.replace(path)
    finally:
        fresh.unlink(missing_ok=True)


@torch.no_grad()
def _set_weights(weights: Weights, saved: Mapping[str, Tensor]) -> None:
    for name, weight in weights.items():
        weight.copy_(saved[name])


def _key_of(options: Training, goal: NextToken, text: Corpus, weights: Weights) -> str:
    """Return a hash of all that decides what a run ends in; runs with different ones keep apart."""
    digest = hashlib.sha256(json.dumps([asdict(options), goal.key], sort_keys=True).encode())
    for array in (text.train.ids, text.train.counted, text.heldout.ids):
        digest.update(np.ascontiguousarray(array).tobytes())
    for name, weight in weights.items():
        digest.update(f"{name} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().flatten()[:SAMPLE].contiguous().numpy().tobytes())
    return digest.hexdigest()


# Ctrl-C as a request: the work at hand is finished and saved first; a second one stops at once.


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """While open, the first SIGINT only sets the event. Outside the main thread it does nothing."""
    asked = threading.Event()

    def ask(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, ask) if in_main else None
    try:
        yield asked
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)


# Several processes under ``accelerate launch``: which one leads, and where each computes.


# That processes wait for each other. torch gives up after 10 minutes on NCCL and 30 on gloo; the base may take hours to
# write answers, or to be asked about every window, while the others wait for the leading process.
PATIENCE = timedelta(days=7)


def is_main_process() -> bool:
    """Whether this process is the one that speaks and writes: the only one, or the first of those launched together."""
    return int(os.environ.get("RANK", "0")) == 0


def main_process_first() -> AbstractContextManager[None]:
    """A block that the leading process carries out before the others enter it."""
    return _state().main_process_first() if _together() else nullcontext()


def on_own_device(case: HealContext) -> HealContext:
    """Return the case on this process's own device, where several processes were launched."""
    if not _together():
        return case
    return replace(case, device=str(_state(cpu=case.device == "cpu" or not torch.cuda.is_available()).device))


def _state(cpu: bool = False) -> PartialState:
    """Return what accelerate knows of the processes; the first call brings them together, and only its words count."""
    from accelerate import PartialState

    return PartialState(cpu=cpu, timeout=PATIENCE)


def _together() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1
