"""``audit --recheck``: some of the recorded items asked again, by what measures an audit, and held against audit.json.

It is the strongest check a stranger can make of somebody else's figures.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from layerprune.artifacts import PRUNED, Audit, AuditedTask, Outcomes, Plan
from layerprune.auditor.foreign import ForeignCheckpoint, is_foreign
from layerprune.auditor.inputs import ExportedFolder, Loading, check_weights, columns, short
from layerprune.auditor.measurement import AuditJob, measure
from layerprune.auditor.verification import foreign_audit, verify
from layerprune.checkpoint.location import lies_at, source_of
from layerprune.config import AuditConfig
from layerprune.data.items import Encoder, EvalItem, EvalSet, EvalTask
from layerprune.data.judging import choices_of
from layerprune.data.tasks import load_eval_set
from layerprune.errors import DocumentError, UsageError
from layerprune.stats import above_chance
from layerprune.util import Progress

# Another batch shape or machine moves a probability by rounding, and may turn an item that stands on the edge.
# Measured in bfloat16 on the same machine: below 0.02. A forged outcome has to be that close to the truth to pass.
PROBABILITY_TOLERANCE = 0.05
# A decision may turn only on an item that stands on the edge: where the gold answer and the best wrong one are so close
# that rounding decides. As much rounding as the probability is allowed: 0.05 at even odds are 0.05 / (0.5 * 0.5) nats.
# In float32 far less is lost: the same margins on the same machine differ by less than 1e-4 nats.
MARGIN_TOLERANCE = {"float32": 0.002, "float64": 0.002}
MARGIN_TOLERANCE_HALF = PROBABILITY_TOLERANCE / 0.25


# How the machine computes and where things are; all else is asked as audit.json says. The seed draws the items.
TAKEN = (
    "recheck", "base", "compare", "include_path", "data_dir", "device", "batch_size", "memory", "offload", "seed",
    "trust_remote_code",
)  # fmt: skip


@dataclass(frozen=True)
class RecheckResult:
    """What came out when random audit items were asked again."""

    items: int
    decisions: int  # of all models together
    same_decisions: int
    largest_change: float | None  # of a gold answer's probability
    problems: tuple[str, ...]  # one line each
    unexplained: int = 0  # items left out that only a compared plan, which was not given, can have seen


def recheck(
    folder: str | Path,
    out: Path | None,
    config: AuditConfig,
    given: Mapping[str, Any],
    compare: Mapping[str, Plan],
    progress: Progress,
) -> RecheckResult:
    """Ask ``config.recheck`` random items of an audit again, and compare decisions and gold probabilities.

    ``folder`` is an exported folder, the one that the audit of any other model was written to, or that model, with
    ``out`` for its audit. The items go through what measures an audit. Of every task it is also looked whether it has
    the audited items, and whether any was left out that no earlier step has seen. ``given``: the options that the user
    gave; without a seed items are drawn anew each time, so that nobody can know beforehand which will be asked.
    ``compare``: compared plans of the audit, which are asked and have their items explained, too.

    What does not repeat is a problem, and returned. Raises ``DocumentError`` where the documents do not hold together
    as they are, or the models are others; ``UsageError`` for options that the audit has settled.
    """
    for name, value in given.items():
        if value not in (None, ()) and name not in TAKEN:
            said = name.replace("_", "-")
            raise UsageError(f"--recheck asks items as audit.json says they were asked: leave --{said} out")
    exported, audit = _audited(folder, out, config, progress)
    count, items = config.recheck or 0, sum(task.data.items for task in audit.tasks)
    if count > items:
        raise UsageError(f"{count} items cannot be asked again: the audit has {items}")
    for label, plan in compare.items():
        if label not in audit.compared or plan.sha256() != audit.compared[label].plan_sha256:
            raise DocumentError(f"the compared plan {label!r} is not one of the audit's: {', '.join(audit.compared)}")
    attention = audit.attention or "auto"
    asked = replace(
        config, generation=False, dtype=audit.dtype, attn_implementation=attention, limit=audit.limit, seed=audit.seed,
        layerwise=False,
    )  # fmt: skip
    job = AuditJob(
        config=asked,
        exported=exported,
        tasks=tuple(task.data.task for task in audit.tasks),
        compare=columns(compare, exported.base, exported.plan if exported.heal else None),
        prompting=audit.tasks[0].data.prompting,
        loading=Loading.of(asked),
        rankings=(),
    )
    draw = Draw(audit, count, None if given.get("seed") is None else config.seed)
    again = measure(job, progress, draw.questions, margins=True)
    problems, unexplained = _passed_over(set(audit.compared) - set(job.compare), draw.tasks)
    problems += _chances(audit, draw.tasks)
    decisions, same, changes, forged = _compare(audit, again, draw)
    largest = max(changes, default=None)
    return RecheckResult(draw.items, decisions, same, largest, (*problems, *forged), unexplained)


def _audited(
    folder: str | Path, out: Path | None, config: AuditConfig, progress: Progress
) -> tuple[ExportedFolder | ForeignCheckpoint, Audit]:
    """Return the audited checkpoint and its audit: both hold together, and the weights are those that it names."""
    place = Path(out or folder)
    if foreign_audit(place):
        audit = _verified(place, place / Audit.filename, progress)
        given = (str(folder), None) if out is not None else _source(audit, place)
        base = source_of(audit.base, config.base)
        found = ForeignCheckpoint.read(
            given[0], base[0], revision=given[1], base_revision=base[1], trust_remote_code=config.trust_remote_code
        )
        for one, named in ((found.result, audit.pruned), (found.base, audit.base)):
            if one.fingerprint != named.fingerprint:
                raise DocumentError(
                    f"{one.id} is not the {named.id} of this audit: its weights' fingerprint is "
                    f"{short(one.fingerprint)}, the audit says {short(named.fingerprint)}"
                )
        return found, audit
    if out is not None or is_foreign(folder):
        raise DocumentError(
            f"{place} holds no audit to ask again; --recheck takes the folder that layerprune export wrote, or the -o "
            "DIR of another model's audit"
        )
    exported = ExportedFolder.read(place)
    audit = _verified(place, place / "layerprune" / Audit.filename, progress)
    check_weights(exported, config.base)
    return exported, audit


def _verified(place: Path, path: Path, progress: Progress) -> Audit:
    audit, found = Audit.load(path), verify(place, progress=progress)
    if not found.ok:
        raise DocumentError(
            f"{place} is not as it was left: {found.first_problem}; no item was asked again (layerprune verify lists "
            "every problem)"
        )
    return audit


def _source(audit: Audit, place: Path) -> tuple[str, str | None]:
    """Return where the candidate of a foreign audit is, as far as the audit itself says so."""
    if audit.pruned.revision is not None:
        return audit.pruned.id, audit.pruned.revision
    if (there := lies_at(audit.pruned)) is not None:
        return str(there), None
    raise UsageError(
        f"the audit in {place} is of {audit.pruned.id}, a local folder, and nothing here says where it lies: give "
        f"layerprune audit MODEL --base MODEL -o {place} --recheck N"
    )


def _passed_over(others: Set[str], tasks: Mapping[str, MatchedItems]) -> tuple[list[str], int]:
    """Return what is wrong with the choice of items, and how many only ``others``, plans not given, can explain."""
    problems, unexplained = list[str](), 0
    for name, task in tasks.items():
        if task.missing:
            problems.append(f"{name}: {len(task.missing)} audited items are not the task's, {task.missing[0]} for one")
        if task.unexplained and not others:
            problems.append(f"{name}: {task.unexplained} items were left out that no earlier step has seen")
        unexplained += task.unexplained if others else 0
    return problems, unexplained


def _chances(audit: Audit, tasks: Mapping[str, MatchedItems]) -> Iterator[str]:
    """Yield the tasks whose chance level, or how far the base is above it, is not what their items give."""
    for task in audit.tasks:
        chances = tasks[task.data.task].chances
        if chances is None:  # said already
            continue
        p_value = above_chance(task.base_outcomes.correct, chances)
        # another scipy may round a far tail differently; what counts is on which side of 5 % it lies
        same = math.isclose(p_value, task.p_above_chance, rel_tol=1e-6, abs_tol=1e-12)
        if not same or not math.isclose(sum(chances) / len(chances), task.data.chance, abs_tol=1e-6):
            yield f"{task.data.task}: its chance level and the base's p-value do not follow from its items"


def _compare(audit: Audit, again: Audit, draw: Draw) -> tuple[int, int, list[float], list[str]]:
    """Return how many decisions there are and are the same, how far gold probabilities moved, what does not repeat."""
    decisions, same, changes, problems = 0, 0, list[float](), list[str]()
    written = {task.data.task: task for task in audit.tasks}
    for task in again.tasks:
        name, before = task.data.task, written[task.data.task]
        models = [("base", task.base_outcomes, before.base_outcomes)]
        models += [(label, one.outcomes, before.models[label].outcomes) for label, one in task.models.items()]
        for label, found, said in models:
            for number, index in enumerate(draw.places[name]):
                agrees, change = found.correct[number] == said.correct[index], 0.0
                decisions, same = decisions + 1, same + agrees
                if found.gold_probability is not None and said.gold_probability is not None:
                    change = abs(found.gold_probability[number] - said.gold_probability[index])
                    changes.append(change)
                edge = agrees or on_the_edge(draw.asked[name], number, found, audit.dtype)
                if change > PROBABILITY_TOLERANCE or not edge:
                    model = "candidate" if label == PRUNED and audit.foreign else label
                    mark = before.data.fingerprints[index]
                    problems.append(f"{name}: item {mark} does not repeat for the {model} model")
    return decisions, same, changes, problems


def on_the_edge(task: EvalTask, number: int, again: Outcomes, dtype: str) -> bool:
    """Whether rounding alone may have decided an item; one without a margin is never so excused."""
    if again.margin is None:
        return False
    tolerance = MARGIN_TOLERANCE.get(dtype, MARGIN_TOLERANCE_HALF)
    if task.metric == "acc_norm":  # its margins are in nats a character
        judge, item = getattr(task.judge, "task", None), task.items[number]
        tolerance /= max(1, min(len(answer) for answer in choices_of(judge, item.key[0].doc)))
    return abs(again.margin[number]) <= tolerance


# The items of an audit, found again among their task's own: which are there, and which the audit passed over.


@dataclass
class Draw:
    """Random items of an audit; what it found is there once ``questions`` was called."""

    audit: Audit
    count: int
    seed: int | None
    tasks: dict[str, MatchedItems] = field(default_factory=dict)  # by name, as the next two
    places: dict[str, tuple[int, ...]] = field(default_factory=dict)  # of the drawn items among the audited ones
    asked: dict[str, EvalTask] = field(default_factory=dict)  # the drawn items

    @property
    def items(self) -> int:
        return sum(map(len, self.places.values()))

    def questions(self, job: AuditJob, encoder: Encoder, progress: Progress) -> EvalSet:
        """Find the audited items and return those drawn; raises ``DocumentError`` where none of them is there."""
        seen = job.exported.seen.union(*(plan.seen for plan in job.compare.values()))
        sources = {"include_path": job.config.include_path, "data_dir": job.config.data_dir}
        for task in self.audit.tasks:
            load = partial(
                load_eval_set,
                [task.data.task],
                encoder,
                use="evaluation",
                num_fewshot=task.data.num_fewshot,
                prompting=task.data.prompting,
                **sources,
            )
            self.tasks[task.data.task] = refind(task, seen, job.config.limit, load)
        every = [(name, place) for name, one in self.tasks.items() for place, at in enumerate(one.at) if at is not None]
        if not every:
            raise DocumentError(
                f"no item of the audit is among those of {', '.join(self.tasks)} here: the data are others than the "
                "audit's; say where its own are with --include-path and --data-dir"
            )
        chosen = random.Random(self.seed).sample(every, min(self.count, len(every)))
        for name, one in self.tasks.items():
            if places := tuple(sorted(place for task, place in chosen if task == name)):
                items = tuple(one.task.items[at] for place in places if (at := one.at[place]) is not None)
                self.places[name], self.asked[name] = places, replace(one.task, items=items)
        return EvalSet(self.asked)


@dataclass(frozen=True)
class MatchedItems:
    """What became of one task's audited items."""

    task: EvalTask
    at: tuple[int | None, ...]  # place in the task of each audited item; None where it is not there
    missing: tuple[str, ...]  # fingerprints in the audit that the task does not have, or not so often
    chances: tuple[float, ...] | None  # of guessing each audited item; None where some are missing
    unexplained: int  # items that no earlier step has seen and that the audit left out all the same


def refind(task: AuditedTask, explained: Set[str], limit: int | None, load: partial[EvalSet]) -> MatchedItems:
    """Build one task's items anew, by ``load``, and find the audited ones.

    ``explained`` are the items that the audit had to leave out, ``limit`` is the audit's.
    """
    name, audited = task.data.task, task.data.fingerprints
    own = load().tasks[name]
    found = _matched(audited, own.items)
    missing = tuple(mark for mark, at in zip(audited, found, strict=True) if at is None)
    chances = None if missing else tuple(own.items[at].chance for at in found if at is not None)
    there = {at for at in found if at is not None}
    unexplained = _unexplained(own.items, there, explained, limit == len(found))
    left_out = {item.fingerprint for item in own.items} - set(audited)
    if task.data.num_fewshot and left_out and there:
        # few-shot examples are drawn item after item, so the items the audit left out have to be left out here too
        own = load(exclude=left_out).tasks[name]
        found = _matched(audited, own.items)
    return MatchedItems(own, tuple(found), missing, chances, unexplained)


def _matched(fingerprints: Sequence[str], items: Sequence[EvalItem]) -> list[int | None]:
    """Return for each fingerprint the place of its item, None where there is none; equal ones in the data's order."""
    waiting: dict[str, deque[int]] = defaultdict(deque)
    for at, item in enumerate(items):
        waiting[item.fingerprint].append(at)
    return [waiting[mark].popleft() if waiting[mark] else None for mark in fingerprints]


def _unexplained(items: Sequence[EvalItem], there: Set[int], explained: Set[str], full: bool) -> int:
    """Count the items passed over; an audit takes the first ones, so one whose limit is ``full`` ends at its last."""
    end = max(there, default=-1) + 1 if full else len(items)
    return sum(at not in there and item.fingerprint not in explained for at, item in enumerate(items[:end]))
