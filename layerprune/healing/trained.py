"""What all methods that train have in common: their options, how the model is made ready, what is written down."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch

from layerprune.checkpoint import Checkpoint
from layerprune.errors import UsageError
from layerprune.healing.base import Case, Changed, Needs
from layerprune.healing.goals import Goal
from layerprune.healing.names import names_on_disk, stored_as
from layerprune.healing.processes import own_place
from layerprune.healing.state import Standing
from layerprune.healing.training import Precision, Text, Training, make_trainable, train
from layerprune.subject import Subject, fast_bfloat16

Choose = Callable[[Subject], set[str]]
MakeGoal = Callable[[Subject], Goal]

# Tokens of one forward pass. Measured on two cores: more is no faster; a GPU wants more.
MICRO_TOKENS = {"cpu": 1024, "cuda": 8192}
HELDOUT_TOKENS = 8192  # that a measurement on the way reads: it must not cost more than it tells


def option(default: Any, words: str) -> Any:
    """A dataclass field with its line in the help."""
    return field(default=default, metadata={"help": words})


@dataclass(frozen=True)
class Trained:
    """The options of every method that trains."""

    lr: float = option(2e-4, "learning rate, at its height")
    epochs: float = option(1.0, "how many times the text is read; less than 1: a part of it")
    steps: int | None = option(None, "how many steps, instead of epochs")
    batch: int = option(4, "windows of a step, over all processes")
    micro: int | None = option(None, "windows of one forward pass; none: as many as 1,024 tokens on a CPU, 8,192 else")
    warmup: float = option(0.05, "share of the steps in which the learning rate rises; then it falls as a cosine")
    decay: float = option(0.0, "weight decay")
    clip: float = option(1.0, "largest norm of the gradient")
    measures: int = option(5, "how many times the held-out loss is measured on the way")
    patience: int = option(2, "measurements without improvement after which it stops")
    recompute: bool = option(False, "gradient checkpointing: slower, far less memory")

    gradients: ClassVar[bool] = True
    needs: ClassVar[Needs] = "text"

    def __post_init__(self) -> None:
        for name in ("lr", "epochs", "batch", "clip", "measures", "patience"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)} and has to be above 0")
        if (self.steps is not None and self.steps < 1) or (self.micro is not None and self.micro < 1):
            raise ValueError("steps and micro are at least 1")
        if not 0 <= self.warmup < 1 or self.decay < 0:
            raise ValueError("warmup is a share from 0 to below 1, decay at least 0")

    def forward_windows(self, case: Case, subject: Subject) -> int:
        """Return how many windows one forward pass takes."""
        tokens = MICRO_TOKENS.get(subject.device.type, MICRO_TOKENS["cpu"])
        return self.micro or max(1, tokens // case.text.train.window)

    def training(self, case: Case, subject: Subject, precision: Precision) -> Training:
        """Return the run that these options ask for on this text and machine."""
        windows = case.text.train
        steps = self.steps or max(1, math.ceil(self.epochs * len(windows) / self.batch))
        return Training(
            steps=steps,
            lr=self.lr,
            batch=self.batch,
            micro=self.forward_windows(case, subject),
            warmup=round(self.warmup * steps),
            measures=min(self.measures, steps),
            patience=self.patience,
            clip=self.clip,
            decay=self.decay,
            precision=precision,
            recompute=self.recompute,
            seed=case.seed,
            subject=f"{self!r} of {subject.ref.fingerprint}, receipt {case.receipt.sha256()}",
        )


def ready(case: Case) -> tuple[Subject, Precision]:
    """Load the unhealed checkpoint for training, and say what its products are made in.

    Weights are loaded as they are stored, so that those that are trained lose nothing. Raises ``UsageError`` for
    float16, which gradients do not fit.
    """
    if case.dtype == "float16":
        raise UsageError("gradients do not fit float16; train in --dtype bfloat16 or float32")
    precision = precision_of(case)
    stored = {tensor.dtype for tensor in Checkpoint.open(case.folder).tensors.values()}
    dtype = "bfloat16" if precision == "bfloat16" and stored <= {"BF16"} else "float32"
    return own_place(case).subject(dtype), precision


def precision_of(case: Case) -> Precision:
    """Return what matrix products are made in: as asked, else bfloat16 where it is fast."""
    if case.dtype in ("bfloat16", "float32"):
        return cast(Precision, case.dtype)
    on_gpu = torch.cuda.is_available() and case.device != "cpu"
    return "bfloat16" if on_gpu or fast_bfloat16() else "float32"


def run(case: Case, subject: Subject, goal: Goal, training: Training) -> Standing:
    """Train what requires a gradient in the subject's model, and write down how it went."""
    corpus, record = case.text, case.record
    few = max(1, HELDOUT_TOKENS // corpus.heldout.window)
    text = Text(corpus.train, corpus.heldout.spread(few))
    standing = train(subject.model, goal, text, training, case.work / "training", case.progress)
    record.tokens += standing.tokens
    record.curve += standing.curve
    record.found |= {"steps": standing.step, "best_step": standing.best_step, "precision": training.precision}
    record.dtype, record.device = training.precision, str(subject.device)
    if standing.stopped:
        record.notes.append(f"stopped at step {standing.step} of {training.steps}: the held-out loss no longer fell")
    return standing


def heal_weights(case: Case, method: Trained, choose: Choose, goal: MakeGoal) -> Iterator[Changed]:
    """Train the weights that ``choose`` names towards ``goal`` and yield them under their names on disk."""
    subject, precision = ready(case)
    weights = make_trainable(subject.model, choose(subject), torch.bfloat16 if precision == "bfloat16" else None)
    stored = names_on_disk(subject.model, Checkpoint.open(case.folder), weights)
    case.record.found["trained"] = sum(weight.numel() for weight in weights.values())
    run(case, subject, goal(subject), method.training(case, subject, precision))
    for name, weight in weights.items():
        yield from stored_as(stored[name], weight.detach())
