"""What all documents share: frozen, versioned, canonical JSON, hashed, written atomically; and their common parts."""

from __future__ import annotations

import hashlib
import json
import math
import os
from abc import abstractmethod
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from layerprune import parsing
from layerprune.errors import DocumentError, one_line
from layerprune.files import checked_name, same_file, shown, writing
from layerprune.formatting import CONTROL, in_words
from layerprune.parsing import MOST_BYTES, MOST_DOCUMENT_BYTES, parse_json
from layerprune.removal import Removal

if TYPE_CHECKING:
    from pandas import DataFrame

SHOWN = 60  # rows of a document's table in a notebook


class Part(BaseModel):
    """A frozen piece of a document; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Computed(Part):
    """A piece that says how figures were computed."""

    attention: str | None = Field(
        default=None, description="attention implementation that was asked for; no key where transformers chose"
    )

    @model_serializer(mode="wrap")
    def _without_none(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Leave the key out where nothing was asked for: such documents keep the hash they had before it existed."""
        data: dict[str, Any] = serialize(self)
        if self.attention is None:
            data.pop("attention", None)
        return data


class Document(Part):
    """A file that one step leaves and the next one takes. ``kind`` and ``format`` stand in every file."""

    filename: ClassVar[str]

    @property
    @abstractmethod
    def headline(self) -> str:
        """One line that says what the document is about."""

    def records(self) -> list[dict[str, Any]]:
        """Return what the document measured as rows for a table; empty where it is no table."""
        return []

    def to_pandas(self) -> DataFrame:
        """Return ``records()`` as a ``pandas.DataFrame``."""
        import pandas

        return pandas.DataFrame(self.records())

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.headline}>"

    __str__ = __repr__

    def _repr_html_(self) -> str:
        """Return the headline and the first rows for a notebook."""
        rows = self.records()
        shown = [{name: _cell(value) for name, value in row.items()} for row in rows[:SHOWN]]
        names = dict.fromkeys(name for row in shown for name in row)
        head = "".join(f"<th>{escape(name)}</th>" for name in names)
        body = "".join("<tr>" + "".join(f"<td>{row.get(name, '')}</td>" for name in names) + "</tr>" for row in shown)
        more = f"<p>and {len(rows) - SHOWN} more rows: to_pandas()</p>" if len(rows) > SHOWN else ""
        table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{more}" if rows else ""
        return f"<p><b>{type(self).__name__}</b>: {escape(self.headline)}</p>{table}"

    def canonical_json(self) -> str:
        """Return the one spelling of this document that is hashed: sorted keys, no spaces, UTF-8, no NaN."""
        return json.dumps(
            self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
        )

    def sha256(self) -> str:
        """Return the hex sha256 of the canonical JSON."""
        return hashlib.sha256(self.canonical_json().encode()).hexdigest()

    def save(self, path: Path) -> Path:
        """Write the document for people to read and diff (same bytes for the same content); never half a file.

        Raises ``DocumentError`` for one that is too large to be read back.
        """
        data = (pretty(self.model_dump(mode="json")) + "\n").encode()
        if len(data) > MOST_DOCUMENT_BYTES:
            raise DocumentError(
                f"{path} would be {in_words(len(data))} long, and {in_words(MOST_DOCUMENT_BYTES)} are read; use fewer "
                "items (--limit) or tasks"
            )
        write_atomically(path, data)
        return path

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a document; raises ``DocumentError`` naming the file and the first fault."""
        text = read_text(path, f"a {cls.filename}", MOST_DOCUMENT_BYTES)
        try:
            data = parse_json(text)
        except ValueError as error:
            raise DocumentError(f"{path} cannot be read: {error}") from error
        return cls.parse(data, source=str(path))

    @classmethod
    def parse(cls, data: Any, source: str) -> Self:
        """Validate plain data; ``source`` is the name used in errors."""
        if not isinstance(data, dict):
            raise DocumentError(f"{source} holds {type(data).__name__} where a {cls.filename} object is expected")
        expected = cls.model_fields["kind"].default
        if data.get("kind") != expected:
            raise DocumentError(f"{source} is a {data.get('kind')!r} document; expected {expected!r}")
        latest = cls.model_fields["format"].default
        if data.get("format") != latest or isinstance(data["format"], bool):
            raise DocumentError(f"{source} has format {data.get('format')!r}; this layerprune reads format {latest}")
        try:
            return cls.model_validate_json(json.dumps(data), strict=True)  # as JSON: a "1" is no number, a list a tuple
        except ValidationError as error:
            first = error.errors()[0]
            # none: the whole document
            where = [".".join(shown(str(part)) for part in first["loc"])] if first["loc"] else []
            said = first["msg"].removeprefix("Value error, ")
            raise DocumentError(": ".join([source, *where, said])) from error


def read_text(path: Path, expected: str, most: int = MOST_BYTES) -> str:
    """Return a file's text; raises ``DocumentError`` when it is not there or cannot be read."""
    try:
        return parsing.read_text(path, most)
    except FileNotFoundError:
        raise DocumentError(f"{path} does not exist; expected {expected}") from None
    except (OSError, ValueError) as error:
        raise DocumentError(f"{path} cannot be read: {one_line(error)}") from error


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, tuple | list):
        return ", ".join(_cell(part) for part in value)
    return "" if value is None else escape(str(value))


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file in full or not at all: a hidden sibling, flushed to disk, then renamed.

    The sibling has one name, so that what a killed process left of it goes with the next write. Two processes must not
    write the same file (``lock``). Raises ``WriteError``, which names the file.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)
        try:
            with partial.open("xb") as file:  # never through a link that lies there
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


def pretty(value: Any, indent: str = "") -> str:
    """Return JSON with sorted keys where lists of plain values stay on one line (a thousand items, one line)."""
    deeper = indent + "  "
    if isinstance(value, dict) and value:
        rows = [f"{deeper}{json.dumps(key, ensure_ascii=False)}: {pretty(value[key], deeper)}" for key in sorted(value)]
        return "{\n" + ",\n".join(rows) + f"\n{indent}}}"
    if isinstance(value, list) and any(isinstance(entry, dict | list) for entry in value):
        return "[\n" + ",\n".join(deeper + pretty(entry, deeper) for entry in value) + f"\n{indent}]"
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


# Parts that several documents hold: which model, which metric, which items, which tools.


def _layer(value: object) -> object:
    if isinstance(value, float) and not value.is_integer():
        raise ValueError(f"{value} is not a whole layer")
    return value


def _file_name(name: str) -> str:
    try:
        return checked_name(name)
    except ValueError as error:
        raise ValueError(f"it names {name!r}, {error}") from None


Layer = Annotated[int, BeforeValidator(_layer)]
Units = tuple[Layer, ...]  # layers of the base, 0-based
Interval = tuple[float, float]  # 95 % unless a field says otherwise
FileName = Annotated[str, AfterValidator(_file_name)]  # of a file inside the document's folder


class FileEntry(Part):
    """One file of the exported folder."""

    sha256: str
    bytes: int


def _apart(files: dict[str, FileEntry]) -> dict[str, FileEntry]:
    if alike := same_file(files):
        raise ValueError(f"it names {alike[0]!r} and {alike[1]!r}, which are one file where case does not count")
    return files


Files = Annotated[dict[FileName, FileEntry], AfterValidator(_apart)]


def _name(text: str) -> str:
    if not text or "\n" in text or CONTROL.search(text):
        raise ValueError(f"{text[:60]!a} is no name: it is empty, or holds what cannot be printed")
    return text


Name = Annotated[str, AfterValidator(_name)]


class ModelRef(Part):
    """One exact model: where it was read from and a fingerprint of its weights."""

    id: Name = Field(description="Hub id, or the name of a local folder; where that lies is no part of it")
    revision: str | None = Field(default=None, description="Hub commit hash; None for a local folder")
    fingerprint: str = Field(description="see checkpoint.Checkpoint.fingerprint")
    model_type: str
    layers: int = Field(ge=1, le=10**6, description="depth of the decoder stack")
    parameters: int = Field(ge=1, description="of the model in memory: one that is used or stored twice counts once")


class Objective(Part):
    """What a removal costs over several tasks, and what no task may lose; see ``layerprune.scoring.aggregation``."""

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
