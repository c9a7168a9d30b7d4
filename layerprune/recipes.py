"""Running a recipe: score, plan, export, heal, audit in one run folder, or a study; what is finished is not done again.

A run folder holds ``recipe.json`` (what was asked), ``scores.json``, ``plan.json``, ``checkpoint/`` and, where the
recipe heals, ``healed/``, which is then what is audited. Each document names the hash of the one it was made from, so a
finished step is known by its document alone, whenever the run was cut off: no other record could be out of step with
the files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerprune.documents import (
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
from layerprune.documents.faults import Place
from layerprune.documents.marked import read_marked
from layerprune.documents.recipe import GOALS, Check, difference, recipe_error
from layerprune.errors import DocumentError, LayerpruneError, UsageError
from layerprune.lock import FILENAME as LOCK
from layerprune.lock import locked
from layerprune.paths import refuse_link
from layerprune.planners import SEARCHES, check_drop, parse_protect
from layerprune.progress import SILENT, Progress
from layerprune.sizes import parse_size
from layerprune.specs import build

ANY_DEPTH = 10**6  # a recipe is checked before its model is known; the real depth is checked when it is
CHECKPOINT = "checkpoint"
HEALED = "healed"
RULES = ("keep_period", "no_adjacent", "contiguous")


@dataclass(frozen=True)
class Finished:
    """What a run folder holds at the end."""

    folder: Path
    scores: Scores
    plan: Plan
    receipt: Receipt
    heal: HealLog | None
    audit: Audit


def read_recipe(path: Path, changes: Sequence[str] = ()) -> Recipe | StudyRecipe:
    """Read a recipe; raises one ``DocumentError`` with every fault of its form and of its values, line by line.

    The steps say what kind it is: one with a ``study`` is a study's.
    """
    kind = StudyRecipe if "study" in read_marked(path).data else Recipe
    recipe, faults = kind.examine(path, changes, _checks())
    if recipe is None or faults:
        raise recipe_error(path, faults)
    return recipe


def run_recipe(recipe: Recipe, folder: Path, *, progress: Progress = SILENT) -> Finished:
    """Do what is not done yet; raises ``UsageError`` when ``folder`` belongs to another recipe."""
    folder = Path(folder)
    with locked(folder, recipe.model):
        fresh = _claim(folder, recipe)
        try:
            scores, plan = _planned(recipe, folder, progress)
        except LayerpruneError:
            if fresh:
                _give_up(folder)
            raise
        receipt = _exported(recipe, plan, folder, progress)
        log = _healed(recipe, receipt, folder, progress)
        audit = _audited(recipe, receipt, log, folder, progress)
    return Finished(folder, scores, plan, receipt, log, audit)


def run_study(recipe: StudyRecipe, folder: Path, *, progress: Progress = SILENT) -> Study:
    """Do a study that is not done yet; raises ``UsageError`` when ``folder`` belongs to another recipe."""
    from layerprune.analysis import WORK, StudyRequest, check_room, read_study, study, write_study
    from layerprune.planning import ScoreRequest

    folder = Path(folder)
    with locked(folder, recipe.model):
        check_room(folder)
        fresh = _claim(folder, recipe)
        if (folder / Study.filename).exists():
            found = read_study(folder)
            write_study(found, folder)  # its page, tables and plots follow from it
            progress.note("study: done before")
            return found
        step = _set(recipe.study.model_dump())
        own = {name: step.pop(name) for name in ("metrics", "audit_limit", "text", "counts", "greedy") if name in step}
        own |= {"text": Path(own["text"])} if "text" in own else {}
        score = ScoreRequest(model=recipe.model, **_told(recipe, {"revision": recipe.revision, **step}))
        try:
            found = study(StudyRequest(score=score, **own), folder / WORK, progress=progress)
        except LayerpruneError:
            if fresh:
                _give_up(folder)
            raise
        write_study(found, folder)
    return found


def _claim(folder: Path, recipe: Instructions) -> bool:
    """Write the recipe into a new run folder, or find the same one there; return whether it was written."""
    record = folder / Recipe.filename
    if record.exists():
        kind = read_marked(record).data.get("kind")
        if kind != recipe.kind:
            raise UsageError(f"{folder} is a run of another recipe, a {kind!r}; give another folder with -o")
        before = type(recipe).load(record)
        changed = [line for line in difference(before, recipe) if not _still_open(folder, line)]
        if changed:
            raise UsageError(
                f"{folder} is a run of another recipe ({'; '.join(changed)}); give another folder with -o"
            )
        if before != recipe:
            recipe.save(record)
        return False
    for name in (Scores.filename, Plan.filename, CHECKPOINT, HEALED, Study.filename):
        if (folder / name).exists():
            raise UsageError(f"{folder / name} exists and is of no recipe; give another folder with -o")
    recipe.save(record)
    return True


def _still_open(folder: Path, change: str) -> bool:
    """Whether a changed line of the recipe is of a step that has left nothing yet: it can be put right, and goes on."""
    section = change.partition(".")[0].partition(":")[0]
    left = {"plan": Plan.filename, "export": CHECKPOINT, "heal": HEALED}
    return section in left and not (folder / left[section]).exists()


def _give_up(folder: Path) -> None:
    """Take back a claim whose recipe was refused before anything was measured, so that it can be put right."""
    if not any(entry.name not in (Recipe.filename, LOCK) for entry in folder.iterdir()):
        (folder / Recipe.filename).unlink()


def _planned(recipe: Recipe, folder: Path, progress: Progress) -> tuple[Scores, Plan]:
    from layerprune.planning import GOAL_OPTIONS, PlanRequest, Rules, ScoreRequest, goal_of, plan_model
    from layerprune.tasks.loading import load_tasks

    if (folder / Plan.filename).exists():
        scores = read_scores(folder / Scores.filename)
        progress.note("score, plan: done before")
        return scores, Plan.load(folder / Plan.filename)
    for tasks in (recipe.audit.tasks, recipe.heal.tasks if recipe.heal else None):  # hours before they are asked for
        if tasks is not None:
            load_tasks(tasks, recipe.include_path, Path(recipe.data_dir) if recipe.data_dir else None)
    options = _told(recipe, {"revision": recipe.revision, "protect": recipe.plan.protect, **recipe.score.model_dump()})
    score = ScoreRequest(model=recipe.model, **options)
    step = recipe.plan.model_dump(exclude_none=True)
    goal = goal_of(**{name: step[name] for name in GOAL_OPTIONS if name in step})
    rules = Rules(**{name: step[name] for name in RULES if name in step})
    request = PlanRequest(score, goal, recipe.plan.search, rules)
    return plan_model(request, run_folder=folder, progress=progress)


def _exported(recipe: Recipe, plan: Plan, folder: Path, progress: Progress) -> Receipt:
    from layerprune.auditor.exported import Exported
    from layerprune.checkpoint import locate
    from layerprune.exporter import export

    out = folder / CHECKPOINT
    refuse_link(out)
    if out.exists():
        receipt = Exported.read(out).receipt
        if receipt.plan_sha256 != plan.sha256():
            raise DocumentError(f"{out} was not exported from {folder / Plan.filename}; remove it to export again")
        base = receipt.base
        _check_whole(out, lambda: locate(base.id, base.revision, shards=False, weights=False).path, progress)
        progress.note("export: done before")
        return receipt
    limit = recipe.export.max_shard_size
    size = None if limit is None else parse_size(limit, "export.max_shard_size")
    return export(plan, out, max_shard_size=size, trust_remote_code=bool(recipe.trust_remote_code), progress=progress)


def _check_whole(out: Path, base: Callable[[], Path], progress: Progress) -> None:
    """Raise ``DocumentError`` unless a finished folder is what its documents say; its card and report are renewed.

    They follow from the documents and, for the licence, from the card in ``base``; a run that was killed may have left
    older ones.
    """
    from layerprune.auditor.auditing import renew
    from layerprune.auditor.verify import verify

    with locked(out):
        renew(out, progress, base=base)
        problems = verify(out, strays=False, progress=progress).problems
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise DocumentError(
            f"{out} is not as it was left: {problems[0]}{more}; put that back, or remove {out} to make it again"
        )


def _healed(recipe: Recipe, receipt: Receipt, folder: Path, progress: Progress) -> HealLog | None:
    from layerprune.auditor.exported import Exported
    from layerprune.healing.step import HealRequest, clear, heal

    out = folder / HEALED
    if recipe.heal is None:
        return None
    refuse_link(out)
    if out.exists():
        log = Exported.read(out).heal
        if log is None or log.receipt_sha256 != receipt.sha256():
            raise DocumentError(f"{out} was not healed from {folder / CHECKPOINT}; remove it to heal again")
        _check_whole(out, lambda: folder / CHECKPOINT, progress)
        clear(out)
        progress.note("heal: done before")
        return log
    tasks = tuple(dict.fromkeys([*recipe.score.tasks, *(recipe.audit.tasks or ())]))
    options = _told(recipe, {"tasks": tasks} | _set(recipe.heal.model_dump()))
    options.pop("batch_size", None)
    options.pop("memory", None)
    return heal(HealRequest(folder / CHECKPOINT, **options), out, progress=progress)


def _audited(recipe: Recipe, receipt: Receipt, log: HealLog | None, folder: Path, progress: Progress) -> Audit:
    from layerprune.auditor import audit

    out = folder / (CHECKPOINT if log is None else HEALED)
    path = out / "layerprune" / Audit.filename
    if path.exists():
        found = Audit.load(path)
        if (found.receipt_sha256, found.heal_sha256) != (receipt.sha256(), log.sha256() if log else None):
            raise DocumentError(f"{path} is not of this checkpoint; remove it to audit again")
        progress.note("audit: done before")
        return found
    own = recipe.audit.model_dump() | {"tasks": recipe.audit.tasks or recipe.score.tasks}
    own["text"] = None if recipe.audit.text is None else Path(recipe.audit.text)
    return audit(out, progress=progress, **_told(recipe, own))


def _told(recipe: Instructions, more: dict[str, Any]) -> dict[str, Any]:
    """Return the options that the recipe sets; what it leaves out keeps its default, where that is declared."""
    names = ("batch_size", "dtype", "device", "seed", "trust_remote_code")
    options = {name: getattr(recipe, name) for name in names} | more
    options["memory"] = None if recipe.memory is None else parse_size(recipe.memory, "memory")
    options["include_path"] = tuple(Path(path) for path in recipe.include_path)
    options["data_dir"] = None if recipe.data_dir is None else Path(recipe.data_dir)
    return _set(options)


def _set(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None and value != ()}


def _checks() -> Mapping[Place, Check]:
    from layerprune.corpus import find_source
    from layerprune.healing import HEALERS
    from layerprune.judgement import asked_objective
    from layerprune.metrics import METRICS
    from layerprune.planning import goal_of

    def goal(name: str) -> Check:
        return lambda value: goal_of(**{name: str(value)})

    def certain(name: str) -> Check:
        return lambda value: goal_of(**{"max_drop": "1%", name: str(value)})

    def folders(value: Any) -> None:
        for path in value if isinstance(value, list) else [value]:
            if isinstance(path, str) and not Path(path).is_dir():
                raise UsageError(f"the folder {path} does not exist")

    def file(value: Any) -> None:
        if isinstance(value, str) and not Path(value).is_file():
            raise UsageError(f"the file {value} does not exist")

    def objective(value: Any) -> None:
        given = [value.get(name) for name in ("weights", "floor")] if isinstance(value, dict) else [value]
        if all(each is None or isinstance(each, dict) for each in given):  # else its form is a fault of its own
            asked_objective(value.get("objective"), *given)

    def corpus(value: Any) -> None:
        method = value.get("method") if isinstance(value, dict) else None
        if isinstance(method, str) and value.get("corpus") is None:
            try:
                entry, healer = build(HEALERS, method)
            except LayerpruneError:  # said of heal.method
                return
            if healer.needs == "text":
                raise UsageError(f"{entry.name} reads text: give a corpus, a file or builtin")

    return {
        ("score",): objective,
        ("score", "metric"): lambda value: build(METRICS, str(value)),
        ("plan", "search"): lambda value: build(SEARCHES, str(value)),
        **{("plan", name): goal(name) for name in GOALS},
        **{("plan", name): certain(name) for name in ("confidence", "up_to")},
        ("plan", "protect"): lambda value: isinstance(value, str) and parse_protect(value, ANY_DEPTH),
        ("export", "max_shard_size"): lambda value: parse_size(str(value), "max_shard_size"),
        ("include_path",): folders,
        ("data_dir",): folders,
        ("heal",): corpus,
        ("heal", "method"): lambda value: build(HEALERS, str(value)),
        ("heal", "corpus"): lambda value: find_source(str(value)),
        ("audit", "text"): file,
        ("study", "metrics"): lambda value: isinstance(value, list) and [build(METRICS, str(spec)) for spec in value],
        ("study", "greedy"): lambda value: check_drop(str(value), "--greedy"),
        ("study", "protect"): lambda value: isinstance(value, str) and parse_protect(value, ANY_DEPTH),
        ("study", "text"): file,
    }
