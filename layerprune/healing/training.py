"""The training loop behind LoRA, partial fine-tuning and distillation, in one process or several, by accelerate."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import nn

from layerprune.artifacts import LossPoint
from layerprune.data.corpus import Windows
from layerprune.errors import TrainingError, UsageError
from layerprune.healing.base import HealContext
from layerprune.healing.losses import Head, TrainingGoal, mean_nats
from layerprune.healing.training_state import TrainingState, TrainingStates, key_of
from layerprune.util import SILENT, Advance, Progress

if TYPE_CHECKING:
    from accelerate import PartialState
    from transformers import PreTrainedModel


# The training loop behind LoRA, partial fine-tuning and distillation: accelerate carries it, one process or several.
#
# A step is a fixed set of windows, whatever the number of processes: they share it out, so the loss curve is the same.
# The loop keeps its state on disk (``state``): a run that is killed goes on where it was and ends in the same weights.


Tensor = torch.Tensor
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


@dataclass(frozen=True)
class TrainingText:
    """Windows to train on, and those whose loss is measured."""

    train: Windows
    heldout: Windows


def make_trainable(model: nn.Module, names: set[str], frozen: torch.dtype | None = None) -> dict[str, nn.Parameter]:
    """Make the named weights float32 and trainable, the others fixed and of dtype ``frozen``.

    Returns the trainable ones by name, a tied one once.
    """
    for name, weight in model.named_parameters():
        weight.requires_grad_(name in names)
        if name in names:
            weight.data = weight.data.float()
        elif frozen is not None:  # or autocast would convert them at every use
            weight.data = weight.data.to(frozen)
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def train(
    model: PreTrainedModel,
    goal: TrainingGoal,
    text: TrainingText,
    options: Training,
    folder: Path,
    progress: Progress = SILENT,
) -> TrainingState:
    """Train the weights of ``model`` that require a gradient; leave it with those of the lowest held-out loss.

    ``folder`` holds the run's states; a run with the same settings goes on there. Works in one process, or in several
    under ``accelerate launch`` (data parallel). Raises ``TrainingError`` when the loss is not a number or runs away,
    and ``KeyboardInterrupt`` after Ctrl-C, once the state is saved.
    """
    run = _Run(model, goal, text, options, folder, progress)
    run.restore()
    left = (options.steps - run.standing.step) * options.batch * text.train.window
    with progress.task("training", left, "tokens") as advance, Interrupt() as interrupt:
        while run.standing.step < options.steps and not run.standing.stopped:
            run.step(advance, interrupt)
    return run.finish()


class ModelWithLoss(nn.Module):
    """A model with its loss, so that data parallelism wraps both: windows in, the loss summed over their tokens out."""

    def __init__(self, model: PreTrainedModel, goal: TrainingGoal, precision: Precision) -> None:
        super().__init__()
        self.model, self.goal, self.precision = model, goal, precision
        self.head = Head(model)

    def forward(self, rows: Tensor, ids: Tensor, counted: Tensor) -> Tensor:
        """``rows`` are the windows' numbers; ``ids`` and ``counted`` (windows, tokens)."""
        wanted = counted[:, 1:]
        labels = ids[:, 1:][wanted]  # (places,)
        with self.autocast(ids.device):
            grade = self.goal.prepare(rows, ids, wanted, labels)
            hidden = self.head.hidden(ids)[:, :-1][wanted]  # (places, hidden)
            return self.head.loss(hidden, grade) + self.goal.beside(wanted)

    def autocast(self, device: torch.device) -> Any:
        """Matrix products in the precision asked for."""
        return torch.autocast(device.type, torch.bfloat16) if self.precision == "bfloat16" else nullcontext()


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
        self,
        model: PreTrainedModel,
        goal: TrainingGoal,
        text: TrainingText,
        options: Training,
        folder: Path,
        progress: Progress,
    ) -> None:
        from accelerate import Accelerator, DistributedDataParallelKwargs

        self.options, self.text, self.progress = options, text, progress
        # A router may send no token of a step to an expert. Precision is the objective's own affair.
        routed = any("expert" in name for name, _ in model.named_parameters())
        spare = DistributedDataParallelKwargs(find_unused_parameters=routed)
        on_cpu = model.device.type == "cpu"
        self.accelerator = Accelerator(mixed_precision="no", cpu=on_cpu, kwargs_handlers=[spare])
        _check_processes(self.accelerator, options)
        self.model, self.device = model, self.accelerator.device if not on_cpu else torch.device("cpu")
        self.weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        arrays = (text.train.ids, text.train.counted, text.heldout.ids)
        key = key_of(asdict(options), goal.key, arrays, self.weights)
        self.states = TrainingStates(folder / key[:16])
        self.standing = TrainingState()
        self.optimizer = torch.optim.AdamW(
            self.weights.values(), lr=options.lr, betas=BETAS, weight_decay=options.decay, fused=True
        )
        if options.recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.objective = ModelWithLoss(model, goal, options.precision)
        with self.objective.autocast(self.device):
            self.objective.head.check(self._tensor(text.train.ids[:1, :16]))
        self.wrapped = self.accelerator.prepare(self.objective)
        self.saved = self.clock = self.spoken = time.monotonic()

    def restore(self) -> None:
        """Go on from the last state, or measure where the run begins."""
        found = self.states.standing()
        self.accelerator.wait_for_everyone()
        if found is None:
            self._measure()
            self._save()
            return
        self.standing = found
        self.states.restore(self.weights, self.optimizer)
        if found.step:
            self._note(f"going on from step {found.step} of {self.options.steps}")

    def step(self, advance: Advance, interrupt: Interrupt) -> None:
        """Train on the windows of one step; measure, save and stop as it is due."""
        number, options = self.standing.step, self.options
        for group in self.optimizer.param_groups:
            group["lr"] = options.rate(number)
        loss = self._accumulate(order(len(self.text.train), options.batch, number, options.seed))
        norm = self.accelerator.clip_grad_norm_(self.weights.values(), options.clip)
        loss, asked = self._together(loss, float(interrupt.asked))
        if not (math.isfinite(loss) and math.isfinite(float(norm))):
            raise self._stopped(f"the loss of step {number + 1} is {loss:.4g}, its gradient's norm {float(norm):.4g}")
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.standing.losses.append(loss)
        self.standing.step += 1
        self.standing.tokens += options.batch * self.text.train.window
        advance(options.batch * self.text.train.window)
        if options.measured(self.standing.step):
            self._measure()
            self._save()
        elif asked or time.monotonic() - self.saved > SAVE_SECONDS:
            self._save()
        if time.monotonic() - self.spoken > SPEAK_SECONDS:
            self._note(f"step {self.standing.step} of {options.steps}: loss {loss:.4f}")
        if asked:
            self._note(f"stopped after step {self.standing.step}; the same command goes on from there")
            raise KeyboardInterrupt

    def finish(self) -> TrainingState:
        """Put the best weights in place."""
        if self.standing.best_step != self.standing.step:
            self.states.restore_best(self.weights)
        self.accelerator.wait_for_everyone()  # whoever leads may remove the states now
        if self.options.recompute:
            self.model.gradient_checkpointing_disable()
        self.model.eval()
        return self.standing

    def _accumulate(self, chosen: list[int]) -> float:
        """Leave the gradient of the step's mean loss in the weights; return this process's share of the loss."""
        windows, micro, processes = self.text.train, self.options.micro, self.accelerator.num_processes
        counted = int(windows.counted[chosen][:, 1:].sum())
        with self.accelerator.split_between_processes(chosen) as mine:
            parts = [mine[start : start + micro] for start in range(0, len(mine), micro)]
        torch.manual_seed(self.options.seed + processes * self.standing.step + self.accelerator.process_index)
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
        heldout, standing = self.text.heldout, self.standing
        with self.accelerator.split_between_processes(list(range(len(heldout)))) as mine:
            part = Windows(heldout.ids[mine], heldout.counted[mine])
        count = int(part.counted[:, 1:].sum())
        with self.objective.autocast(self.device):
            nats = mean_nats(self.model, part) if count else 0.0
        total, counted = self._together(nats * count, float(count))
        measured = total / counted
        training = sum(standing.losses) / len(standing.losses) if standing.losses else None
        standing.losses.clear()
        said = "" if training is None else f"loss {training:.4f}, "
        self._note(f"step {standing.step} of {self.options.steps}: {said}held-out {measured:.4f} nats/token")
        began = standing.curve[0].heldout if standing.curve else None
        if not math.isfinite(measured) or (began is not None and measured > began + DIVERGED):
            raise self._stopped(f"the held-out loss is {measured:.4g} nats/token after step {standing.step}")
        standing.curve.append(LossPoint(step=standing.step, tokens=standing.tokens, loss=training, heldout=measured))
        if standing.best is None or measured < standing.best:
            standing.best, standing.best_step, standing.worse = measured, standing.step, 0
            if self.accelerator.is_main_process:
                self.states.keep_best(self.weights)
        else:
            standing.worse += 1
            standing.stopped = standing.worse >= self.options.patience

    def _save(self) -> None:
        now = time.monotonic()
        self.standing.seconds += now - self.clock
        self.saved = self.clock = now
        if self.accelerator.is_main_process:
            self.states.save(self.standing, self.weights, self.optimizer)

    def _stopped(self, why: str) -> TrainingError:
        standing = self.standing
        return TrainingError(
            f"{why}: training has run away and was stopped; use a lower learning rate than {self.options.lr:g}. The "
            f"best weights so far, of step {standing.best_step}, are kept in {self.states.best}"
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


def _check_processes(accelerator: Any, options: Training) -> None:
    kind, processes = str(accelerator.distributed_type).rpartition(".")[2], accelerator.num_processes
    if processes > 1 and not kind.startswith("MULTI_"):
        raise UsageError(f"training runs data parallel and was launched as {kind}; use accelerate launch --multi_gpu")
    if options.batch % processes:
        raise UsageError(f"a batch of {options.batch} windows cannot be shared by {processes} processes")


# Ctrl-C as a request: the work at hand is finished and saved first; a second one stops at once.


class Interrupt:
    """While open, the first SIGINT only sets ``asked``. Outside the main thread it does nothing."""

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


# Several processes under ``accelerate launch``: which one leads, and where each computes.


# That processes wait for each other. torch gives up after 10 minutes on NCCL and 30 on gloo; the base may take hours to
# write answers, or to be asked about every window, while the others wait for the leading process.
PATIENCE = timedelta(days=7)


def leads() -> bool:
    """Whether this process is the one that speaks and writes: the only one, or the first of those launched together."""
    return int(os.environ.get("RANK", "0")) == 0


def leader_first() -> AbstractContextManager[None]:
    """A block that the leading process carries out before the others enter it."""
    return _state().main_process_first() if _together() else nullcontext()


def own_place(case: HealContext) -> HealContext:
    """Return the case on this process's own device, where several processes were launched."""
    import torch

    if not _together():
        return case
    return replace(case, device=str(_state(cpu=case.device == "cpu" or not torch.cuda.is_available()).device))


def _state(cpu: bool = False) -> PartialState:
    """Return what accelerate knows of the processes; the first call brings them together, and only its words count."""
    from accelerate import PartialState

    return PartialState(cpu=cpu, timeout=PATIENCE)


def _together() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1
