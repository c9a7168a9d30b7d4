"""Parts that several documents hold: which model, which metric, which items, which tools."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from layerprune.documents.base import Part
from layerprune.paths import checked_name, same_file
from layerprune.removal import Removal

Layer = Annotated[int, BeforeValidator(lambda value: _layer(value))]
Units = tuple[Layer, ...]  # layers of the base, 0-based
Interval = tuple[float, float]  # 95 % unless a field says otherwise
FileName = Annotated[str, AfterValidator(lambda name: _file_name(name))]  # of a file inside the document's folder


def _layer(value: object) -> object:
    if isinstance(value, float) and not value.is_integer():
        raise ValueError(f"{value} is not a whole layer")
    return value


def _file_name(name: str) -> str:
    try:
        return checked_name(name)
    except ValueError as error:
        raise ValueError(f"it names {name!r}, {error}") from None


class FileEntry(Part):
    """One file of the exported folder."""

    sha256: str
    bytes: int


def _apart(files: dict[str, FileEntry]) -> dict[str, FileEntry]:
    if alike := same_file(files):
        raise ValueError(f"it names {alike[0]!r} and {alike[1]!r}, which are one file where case does not count")
    return files


Files = Annotated[dict[FileName, FileEntry], AfterValidator(_apart)]


class ModelRef(Part):
    """One exact model: where it was read from and a fingerprint of its weights."""

    id: str = Field(description="Hub id, or the name of a local folder; where that lies is no part of it")
    revision: str | None = Field(default=None, description="Hub commit hash; None for a local folder")
    fingerprint: str = Field(description="see checkpoint.Checkpoint.fingerprint")
    model_type: str
    layers: int = Field(ge=1, description="depth of the decoder stack")
    parameters: int = Field(ge=1, description="of the model in memory: one that is used or stored twice counts once")


class Objective(Part):
    """What a removal costs over several tasks, and what no task may lose; see ``layerprune.judgement.objective``."""

    name: Literal["mean", "worst", "weighted"] = "mean"
    weights: dict[str, float] = Field(default_factory=dict, description="by task, for 'weighted'; others count 1")
    floors: dict[str, float] = Field(
        default_factory=dict,
        description="by task: share of the intact accuracy above chance, or of own answers' tokens, that it must keep",
    )

    @model_validator(mode="after")
    def _weights_belong_to_weighted(self) -> Self:
        if bool(self.weights) != (self.name == "weighted"):
            raise ValueError(f"weights are for the objective 'weighted', which needs some; got {self.name!r}")
        for what, given, most in (("weight", self.weights, math.inf), ("floor", self.floors, 1.0)):
            for task, value in given.items():
                if not 0 <= value <= most:
                    limits = "at least 0" if most > 1 else "from 0 to 1"
                    raise ValueError(f"the {what} of {task!r} is {value}; needed is a number {limits}")
        return self

    @property
    def words(self) -> str:
        """The objective for titles: ``worst task``, ``weights piqa=2``; empty for the plain mean."""
        given = {"worst": "worst task", "weighted": f"weights {_pairs(self.weights)}", "mean": ""}[self.name]
        return ", ".join(part for part in (given, f"floors {_pairs(self.floors)}" if self.floors else "") if part)


MEAN = Objective()


def _pairs(given: dict[str, float]) -> str:
    return ",".join(f"{name}={value:g}" for name, value in given.items())


class MetricRef(Part):
    """A relevance metric as it was run."""

    name: str
    spec: str = Field(description="what the command line takes, defaults left out: 'cosine:tokens=last'")
    options: dict[str, str | int | float | bool | None]
    unit: str
    scope: str
    owner: str = Field(description="distribution that ships the metric, with its version")
    objective: Objective = Field(default=MEAN, description="what a removal costs over the tasks")

    @property
    def words(self) -> str:
        """How removals were judged, for titles: ``ablation (worst task)``."""
        return f"{self.spec} ({self.objective.words})" if self.objective.words else self.spec


class Ranked(Part):
    """One unit in the order in which it would be removed."""

    unit: Layer
    score: float
    interval: Interval | None = None


class Prompting(Part):
    """How an item becomes a prompt, in lm-eval's terms; the default is plain text."""

    apply_chat_template: bool | str = Field(
        default=False, description="whether the tokenizer's chat template is applied; the name of one of several"
    )
    fewshot_as_multiturn: bool = Field(
        default=False, description="few-shot examples as turns of their own, not as one user message"
    )
    system_instruction: str | None = None


PLAIN = Prompting()
OWN_ANSWER = "own_answer"  # TaskData.metric where the intact model's own answers are read, see Outcomes.answer


class TaskData(Part):
    """The items of one task that a step has seen."""

    task: str
    split: str = Field(description="which items: 'train', or 'half of test'")
    items: int = Field(ge=1)
    fingerprints: tuple[str, ...] = Field(description="one per item, in the order of the outcomes")
    num_fewshot: int
    metric: str = Field(description="acc_norm, acc or exact_match: the figure that accuracy stands for")
    chance: float = Field(description="accuracy of guessing, mean over the items")
    prompting: Prompting = PLAIN


class Outcomes(Part):
    """What happened item by item, in the order of TaskData.fingerprints."""

    correct: str = Field(description="'1' right, '0' wrong, one character an item")
    gold_probability: tuple[float, ...] | None = Field(
        default=None, description="probability of the gold answer among the choices, per item"
    )
    margin: tuple[float, ...] | None = Field(
        default=None,
        description="log-likelihood of the gold answer minus that of the best wrong one, per item: nats a character of "
        "the answer where the accuracy is acc_norm, else nats; only where it is the metric's signal",
    )
    answer: tuple[float, ...] | None = Field(
        default=None,
        description="log-likelihood of the intact model's own answer, nats per token, end of text included; only of "
        "tasks whose accuracy is own_answer: an item is right where every token of it is the most likely one",
    )
    agreed: tuple[float, ...] | None = Field(
        default=None, description="share of the tokens of the intact model's own answer that are the most likely ones"
    )
    not_finite: int = Field(
        default=0, ge=0, description="items with a log-likelihood that is no finite number: counted wrong"
    )

    @model_validator(mode="after")
    def _is_of_one_list_of_items(self) -> Self:
        if not set(self.correct) <= {"0", "1"}:
            raise ValueError(f"correct holds {sorted(set(self.correct) - {'0', '1'})[0]!r}; needed are 0 and 1 alone")
        for name in ("gold_probability", "margin", "answer", "agreed"):
            values = getattr(self, name)
            if values is not None and len(values) != len(self.correct):
                raise ValueError(f"{name} is of {len(values)} items and correct of {len(self.correct)}")
        return self

    @property
    def accuracy(self) -> float:
        return self.correct.count("1") / len(self.correct)

    @property
    def mean_gold_probability(self) -> float | None:
        return None if self.gold_probability is None else sum(self.gold_probability) / len(self.gold_probability)


def as_removal(units: Units) -> Removal:
    """Turn a document's list of units into a Removal."""
    return Removal.from_layers(units)
