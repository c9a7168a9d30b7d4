"""audit.json: base against pruned, item by item, on items no earlier step has seen."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    Field,
    PositiveInt,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from layerprune.artifacts.base import Computed, Document, Interval, ModelRef, Outcomes, Part, Ranked, TaskData, Units

# The part of an audit that goes layer by layer: what each removed layer costs alone, and what the path to it cost.


class Without(Part):
    """The base without some units, on the layerwise items."""

    units: Units
    correct: dict[str, str] = Field(description="by task: '1' right, '0' wrong, in the order of the task's items")
    difference: float | None = Field(description="accuracy - base accuracy, mean of the informative tasks, if any")
    interval: Interval | None


class Compensated(Part):
    """One task: what the removed units cost one at a time, and what they cost together."""

    task: str
    items: int
    alone: float = Field(description="sum over the units of the accuracy lost when one alone is gone (0.01 = a point)")
    together: float = Field(description="accuracy lost when all are gone")
    excess: float = Field(description="together - alone; positive: single-layer scores understate the loss")
    interval: Interval = Field(description="95 % of the excess, paired: normal, one item of +1 and one of -1 added")
    relevance_alone: float | None = Field(
        description="sum of the single relevances, each at most 1; None for an uninformative task"
    )
    relevance_together: float | None


class Compensation(Part):
    """Whether single-layer scores tell the truth about this removal."""

    tasks: tuple[Compensated, ...]
    alone: float | None = Field(description="mean of the informative tasks, if any, as all here")
    together: float | None
    excess: float | None
    interval: Interval | None
    verdict: str = Field(description="one plain sentence")


class Layerwise(Part):
    """The base without one unit at a time, and along the order of the plan, on some of the audit's items."""

    items: dict[str, int] = Field(description="by task: how many of its items, chosen by hash")
    parts: tuple[Units, ...] = Field(description="what of the removal goes by itself, in the plan's order")
    alone: tuple[Without, ...] = Field(description="each part by itself, as far as the architecture allows")
    path: tuple[Without, ...] = Field(description="the first 1, 2, ... parts, the last one: all")
    compensation: Compensation | None = Field(description="None for a single part, or one that cannot go by itself")


class LayerRanking(Part):
    """What one metric says of every layer, to be seen beside the plan's own."""

    metric: str = Field(description="spec, such as 'cosine'")
    unit: str
    source: str = Field(description="which items it was measured on")
    ranking: tuple[Ranked, ...]


PRUNED = "pruned"  # the label of the audited checkpoint itself among the compared models
UNHEALED = "unhealed"  # the label of a healed checkpoint before it was healed, among the compared models


class Flips(Part):
    """Items whose answer changed, and the exact McNemar test of "both ways alike"."""

    right_to_wrong: int
    wrong_to_right: int
    p_value: float
    p_adjusted: float = Field(description="Holm over the informative tasks of this model; the p-value itself elsewhere")


class Comparison(Part):
    """One smaller model against the base on one task."""

    accuracy: float
    difference: float = Field(description="accuracy - base accuracy (0.01 = one point)")
    interval: Interval = Field(description="95 %, of the paired difference: Tango's score interval")
    flips: Flips
    gold_probability: float | None
    gold_probability_change: float | None
    gold_probability_interval: Interval | None = Field(description="95 %, paired; BCa bootstrap over the items")
    outcomes: Outcomes


class FlippedItem(Part):
    """An item whose answer changed, as the models were asked it."""

    fingerprint: str
    fixed: bool = Field(description="whether wrong became right; else right became wrong")
    question: str = Field(description="the end of the prompt, shortened")
    answers: tuple[str, ...] = Field(description="those offered; empty for free text")
    gold: tuple[int, ...] = Field(description="indices of the right ones")
    base_gold_probability: float | None
    gold_probability: float | None


class AuditedTask(Part):
    """One task: its items, the base on them, and each smaller model against the base."""

    data: TaskData
    excluded: int = Field(description="items left out because a plan or healing had seen them")
    informative: bool = Field(description="whether the base is above chance at 5 %, one-sided exact")
    p_above_chance: float
    base_accuracy: float
    base_gold_probability: float | None
    base_outcomes: Outcomes
    models: dict[str, Comparison] = Field(description="by label; 'pruned' is the audited checkpoint")
    written: bool = Field(default=False, description="whether the answers are text that the models wrote")
    flipped: tuple[FlippedItem, ...] = Field(
        default=(), description="those of the pruned checkpoint, most changed first, a limited number each way"
    )


class Overall(Part):
    """One smaller model over all informative tasks."""

    items: int
    base_accuracy: float = Field(description="mean of the tasks")
    accuracy: float = Field(description="mean of the tasks")
    difference: float = Field(description="mean of the tasks' paired differences")
    interval: Interval = Field(description="95 %, stratified by task: the tasks' intervals joined by MOVER")
    pooled_difference: float = Field(description="each item counts alike, whichever task it is from")
    pooled_interval: Interval
    flips: Flips = Field(description="all items pooled")


class Compared(Part):
    """Another plan for the same base, run as removals of the base on the same items."""

    removal: Units
    plan_sha256: str
    metric: str = Field(description="spec of the metric it was planned by")


class TextLoss(Part):
    """Both models on running text."""

    source: str
    windows: int
    tokens: int
    base_nats: float = Field(description="mean negative log-likelihood, nats per token")
    nats: float
    unhealed_nats: float | None = Field(default=None, description="of a healed checkpoint before it was healed")
    difference: float = Field(description="nats per token; positive: the pruned model is worse")
    interval: Interval = Field(description="95 %, paired by window; BCa bootstrap")
    kl: float = Field(description="mean KL(base || pruned) of the next-token distribution, nats per token")
    top1_agreement: float = Field(description="share of positions where both models' likeliest token is the same")


class Continuation(Part):
    """What both models wrote after one prompt, greedily."""

    prompt: str
    base: str
    pruned: str
    shared_tokens: int = Field(description="length of the common beginning of both continuations")
    faults: tuple[str, ...] = Field(description="of the pruned model: empty, early stop, repeats, broken, unlikely")
    base_faults: tuple[str, ...]
    nats: float | None = Field(description="nats per token the base gives the pruned model's text; None: no text")
    base_nats: float | None


class Generation(Part):
    """Whether the pruned model still writes: greedy continuations of fixed prompts."""

    prompts: int
    max_new_tokens: int
    faulty: int = Field(description="continuations of the pruned model with at least one fault")
    base_faulty: int
    agreement: float = Field(description="mean share of the continuation's tokens before the models part")
    healthy: bool
    continuations: tuple[Continuation, ...]


class AnswerAgreement(Part):
    """How one smaller model reads the base's own answers."""

    nats: float = Field(description="log-likelihood the answers lose, nats per token, mean over them; positive: worse")
    interval: Interval | None = Field(description="95 %, paired by answer; BCa bootstrap; None of a single answer")
    agreed: float = Field(description="share of an answer's tokens that this model finds most likely, mean over them")
    agreed_interval: Interval | None = Field(description="95 %; BCa bootstrap over the answers")
    outcomes: Outcomes


class OwnAnswers(Part):
    """What the base wrote to prompts no earlier step has seen, read token by token (teacher forcing) by each model."""

    task: str = Field(description="whose prompts; 'sample prompts': those of the continuations")
    fingerprints: tuple[str, ...] = Field(min_length=1, description="one per prompt, in the order of the outcomes")
    tokens: int = Field(ge=1, description="of all answers together")
    base_outcomes: Outcomes = Field(description="the base that reads its own answers: rounding is all that it loses")
    models: dict[str, AnswerAgreement] = Field(description="by label, as in the tasks")


class MeasuredSpeed(Part):
    """A figure repeated: the median, and the spread between the quartiles."""

    median: float
    low: float
    high: float


FIGURES = ("prefill_tokens_per_s", "decode_tokens_per_s", "first_token_s")


def _figures(found: dict[str, MeasuredSpeed]) -> dict[str, MeasuredSpeed]:
    for name in FIGURES:
        if name not in found or not found[name].median > 0:
            raise ValueError(f"{name} is missing, or no time and no rate at all")
    return found


Figures = Annotated[dict[str, MeasuredSpeed], AfterValidator(_figures)]


class BatchSpeed(Part):
    """Both models timed on so many sequences at once, or why they were not."""

    batch_size: int = Field(ge=1)
    base: Figures | None = Field(default=None, description="tokens of all sequences together; None: left out")
    pruned: Figures | None = None
    repeats: int | None = Field(default=None, ge=1, description="of each model")
    left_out: str | None = Field(default=None, description="why nothing was measured; None where it was")

    @model_validator(mode="after")
    def _is_measured_or_left_out(self) -> Self:
        if {part is None for part in (self.base, self.pruned, self.repeats)} != {self.left_out is not None}:
            raise ValueError(f"batch size {self.batch_size} has figures of both models, or says why it was left out")
        return self


LATER = ("engine", "threads", "batches")  # parts of Speed that documents of older versions lack


class Speed(Part):
    """Both models timed alternately on one machine; ``base`` and ``pruned`` with one sequence at a time."""

    device: str
    dtype: str
    repeats: int = Field(ge=1)
    prompt_tokens: int
    new_tokens: int
    base: Figures = Field(description="prefill_tokens_per_s, decode_tokens_per_s, first_token_s")
    pruned: Figures
    peak_bytes: dict[str, int] | None = Field(description="by model, on an accelerator; None where it cannot be told")
    layers_kept: float = Field(description="share of layers kept: the ideal for time per token")
    engine: str | None = Field(default=None, description="what ran the models, with its version")
    threads: int | None = Field(default=None, description="of torch; None where another process computes")
    batches: tuple[BatchSpeed, ...] | None = Field(default=None, description="larger batches; None: not asked for")

    @property
    def by_batch(self) -> tuple[BatchSpeed, ...]:
        """The speed at every batch size, one sequence first; empty where larger batches were not asked for."""
        alone = BatchSpeed(batch_size=1, base=self.base, pruned=self.pruned, repeats=self.repeats)
        return () if self.batches is None else (alone, *self.batches)

    @model_serializer(mode="wrap")
    def _as_older_versions_wrote_it(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out the later parts where they are not there, so that an older document keeps its hash."""
        written: dict[str, Any] = handler(self)
        return {name: value for name, value in written.items() if value is not None or name not in LATER}


class Audit(Computed, Document):
    """What a checkpoint lost and gained beside its base."""

    filename: ClassVar[str] = "audit.json"
    kind: Literal["audit"] = "audit"
    format: Literal[1] = 1
    verdict: str = Field(description="one sentence to act on")
    base: ModelRef
    pruned: ModelRef
    removal: Units | None = Field(default=None, description="None for a checkpoint that layerprune did not export")
    plan_sha256: str | None = Field(default=None, description="None, as all that an export would have left")
    receipt_sha256: str | None = None
    adapter: str | None = Field(
        default=None, description="kind of the peft adapter that was merged into the base in memory, such as LORA"
    )
    heal_sha256: str | None = Field(default=None, description="of the healing log; None for a checkpoint as exported")
    compared: dict[str, Compared] = Field(default_factory=dict)
    tasks: tuple[AuditedTask, ...] = Field(min_length=1)
    overall: dict[str, Overall] = Field(description="by label; empty when no task is informative")
    bytes_before: int = Field(ge=1)
    bytes_after: int = Field(ge=1)
    cache_bytes_per_token: tuple[PositiveInt, PositiveInt] | None = Field(
        default=None, description="KV cache of base and pruned in the audit's dtype; None where layers keep other state"
    )
    text: TextLoss | None = None
    generation: Generation | None = None
    own_answers: tuple[OwnAnswers, ...] = Field(default=(), description="one entry for each source of prompts")
    speed: Speed | None = None
    layerwise: Layerwise | None = None
    rankings: tuple[LayerRanking, ...] = Field(default=(), description="beside the plan's own, layer by layer")
    confidence: float = 0.95
    dtype: str
    device: str
    limit: int | None
    seed: int = Field(ge=0)
    versions: dict[str, str]

    @model_serializer(mode="wrap")
    def _without_none(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave out what is not said of most audits, so that they keep the hash they had before it could be."""
        data: dict[str, Any] = serialize(self)
        return {name: data[name] for name in data if data[name] is not None or name not in ("attention", "adapter")}

    @property
    def headline(self) -> str:
        return self.verdict

    @property
    def foreign(self) -> bool:
        """Whether it is of a checkpoint that layerprune did not export: there is no plan, receipt or removal."""
        return self.receipt_sha256 is None

    def records(self) -> list[dict[str, Any]]:
        """Return a row for each task and model: accuracies, their paired difference with its 95 % interval, flips."""
        return [
            {
                "task": task.data.task, "model": label, "items": task.data.items, "base": task.base_accuracy,
                "accuracy": own.accuracy, "difference": own.difference, "low": own.interval[0],
                "high": own.interval[1], "right to wrong": own.flips.right_to_wrong,
                "wrong to right": own.flips.wrong_to_right,
            }
            for task in self.tasks
            for label, own in task.models.items()
        ]  # fmt: skip

    @model_validator(mode="after")
    def _names_plan_and_receipt_or_neither(self) -> Self:
        if len({one is None for one in (self.removal, self.plan_sha256, self.receipt_sha256)}) > 1:
            raise ValueError("removal, plan_sha256 and receipt_sha256 are given together, or none of them is")
        if self.foreign and (self.heal_sha256 or self.layerwise or self.rankings):
            raise ValueError("heal_sha256, layerwise and rankings belong to a checkpoint with a plan and a receipt")
        if self.adapter is not None and not self.foreign:
            raise ValueError("adapter belongs to a checkpoint without a plan and a receipt")
        return self

    @model_validator(mode="after")
    def _speaks_of_the_same_models_throughout(self) -> Self:
        known, labels = {PRUNED, *self.compared}, set(self.tasks[0].models)
        if PRUNED not in labels or not labels <= known:
            raise ValueError(f"tasks are about {sorted(labels)}; needed is 'pruned', known are {sorted(known)}")
        spoken = [(task.data.task, set(task.models)) for task in self.tasks]
        spoken += [(f"the reading of own answers to {one.task}", set(one.models)) for one in self.own_answers]
        if self.overall:  # empty where no task is informative
            spoken.append(("overall", set(self.overall)))
        for where, found in spoken:
            if found != labels:
                raise ValueError(f"{where} is about {sorted(found)}, the first task about {sorted(labels)}")
        return self
