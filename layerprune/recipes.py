"""Running a recipe: score, plan, export, heal, audit in one run folder, or a study; what is finished is not done again.

A run folder holds ``recipe.json`` (what was asked), ``scores.json``, ``plan.json``, ``checkpoint/`` and, where the
recipe heals, ``healed/``, which is then what is audited. Each document names the hash of the one it was made from, so a
finished step is known by its document alone, whenever the run was cut off: no other record could be out of step with
the files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import reduce
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from layerprune.artifacts import (
    Audit,
    HealLog,
    Instructions,
    Plan,
    Receipt,
    Recipe,
    Scores,
    Study,
    StudyRecipe,
    read_scores,
)
from layerprune.artifacts.recipe import (
    GOALS,
    SHARED,
    Check,
    Place,
    PlanStep,
    ScoreStep,
    difference,
    given,
    read_marked,
)
from layerprune.config import AuditConfig, Config, HealConfig, PlanConfig, PruneConfig, ScoreConfig, StudyConfig
from layerprune.errors import DocumentError, LayerpruneError, UsageError, did_you_mean
from layerprune.files import FILENAME as LOCK
from layerprune.files import locked, refuse_link
from layerprune.registry import build
from layerprune.removal import check_drop, parse_layers
from layerprune.search import SEARCHES
from layerprune.util import SILENT, Progress

ANY_DEPTH = 10**6  # a recipe is checked before its model is known; the real depth is checked when it is
CHECKPOINT = "checkpoint"
HEALED = "healed"
PLACE = "share/layerprune/recipes"  # of the shipped recipes, below where pip puts data


@dataclass(frozen=True)
class Finished:
    """What a run folder holds at the end."""

    folder: Path
    scores: Scores
    plan: Plan
    receipt: Receipt
    heal: HealLog | None
    audit: Audit


def find_recipe(name: str) -> Path:
    """Return the file of a recipe: a path, or the name of one that is shipped, such as ``quickstart``.

    Raises ``UsageError`` for a name that is neither.
    """
    path = Path(name)
    if path.is_file() or path.suffix or len(path.parts) > 1:
        return path  # what is not there is told by who reads it
    shipped = _shipped()
    if name not in shipped:
        raise UsageError(
            f"no file {name}, and no recipe of that name is shipped.{did_you_mean(name, shipped)} "
            f"Known: {', '.join(sorted(shipped))}"
        )
    return shipped[name]


def _shipped() -> dict[str, Path]:
    """Return the recipes that came with the package, by name: beside it in a checkout, else where pip put them."""
    beside = Path(__file__).parents[1]
    if (beside / "pyproject.toml").exists():
        return {path.stem: path for path in (beside / "recipes").glob("*.yaml")}
    listed = [one for one in metadata.files("layerprune") or () if one.match(f"{PLACE}/*.yaml")]
    # as pip recorded them, and below the package's own folder, where pip install --target puts them
    found = [*(Path(str(one.locate())) for one in listed), *(beside / PLACE).glob("*.yaml")]
    return {path.stem: path for path in found if path.is_file()}


def read_recipe(path: Path, changes: Sequence[str] = ()) -> Recipe | StudyRecipe:
    """Read a recipe; raises one ``DocumentError`` with every fault of its form and of its values, line by line.

    The steps say what kind it is: one with a ``study`` is a study's.
    """
    kind = StudyRecipe if "study" in read_marked(path).data else Recipe
    return kind.load(path, changes, _checks())


def prune_recipe(config: PruneConfig, options: Mapping[str, Any]) -> Recipe:
    """Return the recipe that ``prune`` carries out; ``options`` are those that were given, the others keep defaults.

    Raises ``LayerpruneError`` for what any of the steps would refuse, before the first of them begins.
    """
    from layerprune.planner import goal_of

    told = {name: getattr(config, name) for name, value in options.items() if value is not None and value != ()}
    if told.pop("front", False):
        raise UsageError("a front is many plans, and prune ends in one model; use plan --front and export one of them")

    def keys(step: Any) -> dict[str, Any]:
        return {name: value for name, value in told.items() if name in step.model_fields}

    if not config.tasks:
        raise UsageError("prune audits what it makes: give tasks, such as --tasks arc_easy")
    heal = None if config.heal is None else {"method": config.heal, "corpus": config.corpus}
    if heal is None and config.corpus is not None:
        raise UsageError("--corpus is what --heal reads: give --heal, too, such as --heal linear")
    audit = {"tasks": config.audit_tasks, "limit": config.audit_limit}
    shared = {name: told[name] for name in SHARED if name in told}
    goal_of(config)
    data = {**shared, "score": keys(ScoreStep), "plan": keys(PlanStep), "heal": heal, "audit": audit}
    for place, check in _checks().items():
        value = reduce(lambda inner, key: inner.get(key) if isinstance(inner, dict) else None, place, data)
        if value is not None:
            check(value)
    try:
        return Recipe(**data)
    except ValidationError as error:
        raise UsageError(error.errors()[0]["msg"]) from error


def run_recipe(recipe: Recipe, folder: Path, *, result: Path | None = None, progress: Progress = SILENT) -> Finished:
    """Do what is not done yet; raises ``UsageError`` when ``folder`` belongs to another recipe.

    ``result``: where the last checkpoint goes, by default into ``folder``.
    """
    folder = Path(folder)
    last = "export" if recipe.heal is None else "heal"
    places = {"plan": folder / Plan.filename, "export": folder / CHECKPOINT, "heal": folder / HEALED}
    places |= {} if result is None else {last: Path(result)}
    with _claimed(folder, recipe, places):
        scores, plan = _planned(recipe, folder, progress)
        receipt = _exported(recipe, plan, folder, places["export"], progress)
        log = _healed(recipe, receipt, places["export"], places["heal"], progress)
        audit = _audited(recipe, receipt, log, places[last], progress)
    return Finished(folder, scores, plan, receipt, log, audit)


def run_study(recipe: StudyRecipe, folder: Path, *, progress: Progress = SILENT) -> Study:
    """Do a study that is not done yet; raises ``UsageError`` when ``folder`` belongs to another recipe."""
    from layerprune.analysis import WORK, check_room, read_study, study, write_study

    folder = Path(folder)
    check_room(folder)
    with _claimed(folder, recipe, {}):
        if (folder / Study.filename).exists():
            found = read_study(folder)
            write_study(found, folder)  # its page, tables and plots follow from it
            progress.note("study: done before")
            return found
        config = StudyConfig.of(**_options(recipe, StudyConfig, recipe.study))
        found = study(config, folder / WORK, progress=progress)
        write_study(found, folder)
    return found


@contextmanager
def _claimed(folder: Path, recipe: Instructions, places: Mapping[str, Path]) -> Iterator[None]:
    """Hold a run folder: the recipe is written into a new one, or found there, with changes for steps still open alone.

    A new claim whose recipe is refused before anything was measured is taken back, so that it can be put right.
    """
    record = folder / Recipe.filename
    with locked(folder, recipe.model):
        fresh = not record.exists()
        if fresh:
            for place in (folder / Scores.filename, *places.values(), folder / Study.filename):
                if place.exists():
                    raise UsageError(f"{place} exists and is of no recipe; give another folder with -o")
            recipe.save(record)
        else:
            _take_up(record, recipe, places)
        try:
            yield
        except LayerpruneError:
            if fresh and all(entry.name in (Recipe.filename, LOCK) for entry in folder.iterdir()):
                record.unlink()
            raise


def _take_up(record: Path, recipe: Instructions, places: Mapping[str, Path]) -> None:
    kind = read_marked(record).data.get("kind")
    if kind != recipe.kind:
        raise UsageError(f"{record.parent} is a run of another recipe, a {kind!r}; give another folder with -o")
    before = type(recipe).load(record)
    # a step that has left nothing yet can be put right
    still_open = {step for step, place in places.items() if not place.exists()}
    changes = difference(before, recipe)
    if changed := [line for line in changes if re.split("[.:]", line, maxsplit=1)[0] not in still_open]:
        said = "; ".join(changed)
        raise UsageError(f"{record.parent} is a run of another recipe ({said}); give another folder with -o")
    if before != recipe:
        recipe.save(record)


def _planned(recipe: Recipe, folder: Path, progress: Progress) -> tuple[Scores, Plan]:
    from layerprune.data.tasks import load_tasks
    from layerprune.planner import plan_model

    if (folder / Plan.filename).exists():
        scores = read_scores(folder / Scores.filename)
        progress.note("score, plan: done before")
        return scores, Plan.load(folder / Plan.filename)
    for tasks in (recipe.audit.tasks, recipe.heal.tasks if recipe.heal else None):  # hours before they are asked for
        if tasks is not None:
            load_tasks(tasks, recipe.include_path or (), recipe.data_dir)
    config = PlanConfig.of(**_options(recipe, PlanConfig, recipe.score, recipe.plan))
    return plan_model(config, run_folder=folder, progress=progress)


def _exported(recipe: Recipe, plan: Plan, folder: Path, out: Path, progress: Progress) -> Receipt:
    from layerprune.auditor.inputs import ExportedFolder
    from layerprune.checkpoint import locate
    from layerprune.checkpoint.location import learn, source_of
    from layerprune.exporter import export

    refuse_link(out)
    learn(folder)
    if out.exists():
        receipt = ExportedFolder.read(out).receipt
        if receipt.plan_sha256 != plan.sha256():
            raise DocumentError(f"{out} was not exported from the run's plan.json; remove it to export again")
        base = receipt.base
        _check_whole(out, lambda: locate(*source_of(base), shards=False, weights=False).path, progress)
        progress.note("export: done before")
        return receipt
    trusted = recipe.trust_remote_code or False
    return export(plan, out, **given(recipe.export), trust_remote_code=trusted, progress=progress)


def _check_whole(out: Path, base: Callable[[], Path], progress: Progress) -> None:
    """Raise ``DocumentError`` unless a finished folder is what its documents say; its card and report are renewed.

    They follow from the documents and, for the licence, from the card in ``base``; a run that was killed may have left
    older ones.
    """
    from layerprune.auditor.auditor import renew
    from layerprune.auditor.verification import verify

    with locked(out):
        renew(out, progress, base=base)
        found = verify(out, strays=False, progress=progress)
    if not found.ok:
        raise DocumentError(
            f"{out} is not as it was left: {found.first_problem}; put that back, or remove {out} to make it again"
        )


def _healed(recipe: Recipe, receipt: Receipt, unhealed: Path, out: Path, progress: Progress) -> HealLog | None:
    from layerprune.auditor.inputs import ExportedFolder
    from layerprune.healing.healer import clear, heal

    if recipe.heal is None:
        return None
    refuse_link(out)
    if out.exists():
        log = ExportedFolder.read(out).heal
        if log is None or log.receipt_sha256 != receipt.sha256():
            raise DocumentError(f"{out} was not healed from {unhealed}; remove it to heal again")
        _check_whole(out, lambda: unhealed, progress)
        clear(out)
        progress.note("heal: done before")
        return log
    tasks = tuple(dict.fromkeys([*recipe.score.tasks, *(recipe.audit.tasks or ())]))
    options = {"tasks": tasks} | _options(recipe, HealConfig, recipe.heal)
    return heal(unhealed, out, progress=progress, **options)


def _audited(recipe: Recipe, receipt: Receipt, log: HealLog | None, out: Path, progress: Progress) -> Audit:
    from layerprune.auditor import audit

    path = out / "layerprune" / Audit.filename
    if path.exists():
        found = Audit.load(path)
        if (found.receipt_sha256, found.heal_sha256) != (receipt.sha256(), log.sha256() if log else None):
            raise DocumentError(f"{path} is not of this checkpoint; remove it to audit again")
        progress.note("audit: done before")
        return found
    options = {"tasks": recipe.score.tasks} | _options(recipe, AuditConfig, recipe.audit)
    return audit(out, progress=progress, **options)


def _options(recipe: Instructions, config: type[Config], *steps: Any) -> dict[str, Any]:
    """Return the options of ``config`` that the recipe and its steps set; what they leave out keeps its default."""
    known = {one.name for one in fields(config)}
    told = {name: value for name, value in given(recipe).items() if name in known}
    for step in steps:
        told |= given(step)
    return told


def _checks() -> Mapping[Place, Check]:
    from layerprune.data.corpus import find_source
    from layerprune.healing import HEALERS
    from layerprune.planner import goal_of
    from layerprune.scoring.aggregation import asked_objective
    from layerprune.scoring.metrics import METRICS

    def goal(name: str, **more: str) -> Check:
        return lambda value: goal_of(PlanConfig.of(model="", **more, **{name: value}))

    def folders(value: Any) -> None:
        for path in value if isinstance(value, list | tuple) else [value]:
            if isinstance(path, str | Path) and not Path(path).is_dir():
                raise UsageError(f"the folder {path} does not exist")

    def file(value: Any) -> None:
        if isinstance(value, str) and not Path(value).is_file():
            raise UsageError(f"the file {value} does not exist")

    def objective(value: Any) -> None:
        if not isinstance(value, dict):  # a fault of its own, as is a form that no Config takes
            return
        names = ("objective", "weights", "floor")
        try:
            config = ScoreConfig.of(model="", **{name: value.get(name) for name in names})
        except UsageError:
            return
        asked_objective(*(getattr(config, name) for name in names))

    def corpus(value: Any) -> None:
        method = value.get("method") if isinstance(value, dict) else None
        if isinstance(method, str) and value.get("corpus") is None:
            try:
                entry, healer = build(HEALERS, method)
            except LayerpruneError:  # said of heal.method
                return
            if "text" in healer.needs:
                raise UsageError(f"{entry.name} reads text: give a corpus, a file or builtin")

    def engine(value: Any) -> None:
        if isinstance(value, dict) and value.get("speed_engine") is not None:
            AuditConfig.of(speed=value.get("speed"), speed_engine=value["speed_engine"])

    return {
        ("score",): objective,
        ("score", "metric"): lambda value: build(METRICS, str(value)),
        ("plan", "search"): lambda value: build(SEARCHES, str(value)),
        **{("plan", name): goal(name) for name in GOALS},
        **{("plan", name): goal(name, max_drop="1%") for name in ("confidence", "up_to")},
        ("plan", "protect"): lambda value: isinstance(value, str) and parse_layers(value, ANY_DEPTH),
        ("include_path",): folders,
        ("data_dir",): folders,
        ("heal",): corpus,
        ("heal", "method"): lambda value: build(HEALERS, str(value)),
        ("heal", "corpus"): lambda value: find_source(str(value)),
        ("audit", "text"): file,
        ("audit",): engine,
        ("plan", "speed_engine"): lambda value: PlanConfig.of(model="", target_speedup="2x", speed_engine=value),
        ("study", "metrics"): lambda value: isinstance(value, list) and [build(METRICS, str(spec)) for spec in value],
        ("study", "greedy"): lambda value: check_drop(str(value), "--greedy"),
        ("study", "protect"): lambda value: isinstance(value, str) and parse_layers(value, ANY_DEPTH),
        ("study", "text"): file,
    }
