"""The documents of a plan: put together, saved into a run folder, and planned again from recorded scores."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from layerprune.architecture import Architecture, load_config, read_architecture
from layerprune.artifacts import Front, Plan, PlanLimits, Prediction, Scores, SearchRef, Units, read_scores
from layerprune.artifacts.plan import FOLDER, PLOT, TABLE
from layerprune.checkpoint.location import record
from layerprune.config import PlanConfig
from layerprune.errors import DocumentError, ModelError, RefusedError, UsageError
from layerprune.exporter import dry_run
from layerprune.files import locked, published_together, refuse_link, writing
from layerprune.planner.session import SearchRules
from layerprune.registry import build, options_of
from layerprune.removal import Removal, parse_drop
from layerprune.scoring.aggregation import NOISY, asked_objective, can_be_split, rejudged, reliability_of
from layerprune.search import SEARCHES, SearchResult, require_finite, shortfall, table_judge
from layerprune.search.base import OVERFLOW
from layerprune.stats import TARGET, clipped, relevance
from layerprune.util import SILENT, Progress

# The plan document, put together from what a search found.


def build_plan(
    scores: Scores,
    found: SearchResult,
    search: SearchRef,
    limits: PlanLimits,
    requested: str,
    predicted: Prediction | None,
    warnings: tuple[str, ...],
) -> Plan:
    """Return the plan that removes what ``found`` says, with where it comes from."""
    return Plan(
        model=scores.model,
        metric=scores.metric,
        search=search,
        limits=limits,
        requested=requested,
        removal=found.removal.layers,
        order=found.order,
        ranking=found.ranking,
        scores_sha256=scores.sha256(),
        data=scores.data,
        predicted=predicted,
        warnings=(
            *warnings,
            *end_warnings(scores, found.removal.layers, limits),
            *race_warnings(found, limits),
            *plan_warnings(scores, predicted),
        ),
        seed=scores.seed,
        versions=scores.versions,
    )


# Scores saved into a run folder: what was planned from those that stood there before goes with them.


Planned = TypeVar("Planned", Plan, Front)


@contextmanager
def published_with(
    scores: Scores, run_folder: Path, progress: Progress = SILENT, *, before: type[Plan] | type[Front] | None = None
) -> Iterator[Path]:
    """Yield a folder for the documents made from ``scores``; at the end they stand in ``run_folder``, scores first.

    All of them or, where the block fails, none. The plan and the front made from scores that were there before, if
    those were others, are removed; ``before`` names the document that the block writes anew, and so replaces by itself.
    """
    refuse_link(run_folder / FOLDER)
    stale = _planned_from(run_folder, scores, before)
    with published_together(run_folder) as new:
        scores.save(new / Scores.filename)
        yield new
        for path in stale:  # a full disk would have shown by now
            path.unlink(missing_ok=True)
    record(run_folder, scores.model)
    if stale:
        more = f" and {len(stale) - 1} more" if len(stale) > 1 else ""
        progress.note(f"removed: {stale[0]}{more}, planned from the scores that stood there before")


def save_scores(scores: Scores, run_folder: Path, progress: Progress = SILENT) -> None:
    """Save ``scores`` alone; see ``published_with``."""
    with published_with(scores, run_folder, progress):
        pass


def _planned_from(run_folder: Path, scores: Scores, spared: type[Plan] | type[Front] | None) -> list[Path]:
    """Return the files planned from the scores in the folder, where other ones are about to take their place.

    A document that cannot be read is not known to be theirs, nor is a plan in the front's folder that it does not name.
    """
    try:
        old = Scores.load(run_folder / Scores.filename).sha256()
    except DocumentError:
        return []
    if old == scores.sha256():
        return []
    found, folder = list[Path](), run_folder / FOLDER
    if spared is not Plan and _planned(Plan, run_folder / Plan.filename, old):
        found.append(run_folder / Plan.filename)
    if spared is not Front and (front := _planned(Front, folder / Front.filename, old)):
        plans = [folder / point.plan for point in front.points]
        files = [*plans, folder / TABLE, folder / PLOT, folder / Front.filename]  # what names the others goes last
        found += [path for path in files if path.is_file()]
    return found


def _planned(kind: type[Planned], path: Path, scores: str) -> Planned | None:
    try:
        made = kind.load(path)
    except DocumentError:
        return None
    return made if made.scores_sha256 == scores else None


# What a reader of a plan has to know before trusting it: the plan's warnings.


NAMED = 5  # removals named one by one


def plan_warnings(scores: Scores, predicted: Prediction | None) -> tuple[str, ...]:
    """Return what is to be said about how the removals were judged, and on how much."""
    return (*_failures(scores), *_noise(scores), *_floors(scores, predicted))


def race_warnings(found: SearchResult, limits: PlanLimits) -> Iterator[str]:
    """Say where a race says little of the places of layers that are to go, or of those that are not."""
    if found.eliminated:
        yield (
            f"a race had put {_names(found.eliminated)} out after a part of the items, whose scores say little of "
            "their places: score with --no-racing to choose among all"
        )
    if kept := found.accepted_but_kept(limits.protect):
        yield (
            f"a race for more layers had {_names(kept)} among those to go after a part of the items, and says little "
            "of their order: score with --no-racing, or for this --drop, to choose fewer"
        )


def _names(removals: Iterable[Units]) -> str:
    return ", ".join(str(Removal.from_layers(units)) for units in removals)


def end_warnings(scores: Scores, removal: Units, limits: PlanLimits) -> Iterator[str]:
    """Say where the metric let the first or the last layer go: they read the embeddings and shape the output.

    Nothing is to be said where it was asked for: nothing else may go, or what goes has to keep the period.
    """
    last = scores.model.layers - 1
    gone = [unit for unit in (0, last) if unit in removal]
    free = {unit for one in scores.rounds[0].candidates for unit in one.removal} - {*limits.protect, *removal}
    if not gone or not free or limits.keep_period:
        return
    which = " and ".join(f"{'the first' if unit == 0 else 'the last'} (layer {unit})" for unit in gone)
    keep = ",".join("-1" if unit else "0" for unit in gone)
    verb, it = ("are", "them") if len(gone) > 1 else ("is", "it")
    yield f"{which} of {last + 1} layers {verb} to go, which models seldom bear well: --protect {keep} keeps {it}"


def _failures(scores: Scores) -> Iterator[str]:
    """Name the removals without which the model's figures are not finite, the least of each kind."""
    asked = {one.removal for entry in scores.rounds for one in entry.candidates if one.not_finite}
    failed = [units for units in asked if not any(set(other) < set(units) for other in asked)]
    if failed:
        more = f" and {len(failed) - NAMED} others" if len(failed) > NAMED else ""
        yield (
            f"without {_names(sorted(failed)[:NAMED])}{more} the model's figures are not finite: ranked as the most "
            f"harmful ({OVERFLOW})"
        )


def _noise(scores: Scores) -> Iterator[str]:
    """Say where other items would have ranked the layers otherwise."""
    if not can_be_split(scores):
        return
    found = reliability_of(scores)
    if found.whole is not None and found.whole >= NOISY:
        return
    seen = "not to be told, all layers alike" if found.whole is None else f"{found.whole:.2f}"
    more = "" if found.items_needed is None else f"; about {found.items_needed:,} items would give {TARGET}"
    raced = any(candidate.stopped for candidate in scores.rounds[0].candidates)
    items = f"the {found.items:,} items that all layers saw" if raced else f"{found.items:,} items"
    yield f"the ranking is noisy: its split-half reliability on {items} is {seen}{more} (--limit)"


def _floors(scores: Scores, predicted: Prediction | None) -> Iterator[str]:
    """Say where a floor that holds on the items that selected does not on those held back."""
    chances = {data.task: data.chance for data in scores.data}
    for task, floor in scores.metric.objective.floors.items():
        if predicted is None:
            yield f"whether {task} keeps its floor of {floor:g} without all of these layers was not measured"
            continue
        own = predicted.tasks[task]
        if own.agreed is not None:
            what, kept = "the tokens of the model's own answers", own.agreed / (own.base_agreed or 1)
        elif own.base_accuracy > chances[task]:
            what = "its accuracy above chance"
            kept = 1 - clipped(relevance(own.accuracy, own.base_accuracy, chances[task]))
        else:
            continue
        if kept < floor:
            yield (
                f"{task} keeps its floor of {floor:g} on the items that selected, but {kept:.2f} of {what} on "
                f"{own.items} others"
            )


# Planning again from recorded scores: no model, only its config, which says what may be removed.


# What can still be said when the scores are there.
FOR_SCORES = (
    "drop", "protect", "search", "keep_period", "no_adjacent", "contiguous", "objective", "weights", "floor",
)  # fmt: skip
NO_DROP = "nothing says how far to go; with --scores, give --drop"
NO_DRY_RUN = "planned without the model: whether export and other readers take the result was not looked at"


def replan(scores: Scores, config: PlanConfig) -> Plan:
    """Plan from recorded scores, without a model; a search that needs what was not scored is a ``UsageError``.

    What the architecture allows is read off the config in the scores, and export is rehearsed with it. Scores that hold
    none, or one that this transformers cannot build without the model's own code, give a plan that says so.
    """
    if config.drop is None:
        raise UsageError(NO_DROP)
    rules, depth = SearchRules.of(config), scores.model.layers
    wanted = parse_drop(config.drop, depth)
    moves = [candidate.removal for candidate in scores.rounds[0].candidates]
    units = tuple(unit for move in moves for unit in move)
    if len(set(units)) < len(units):
        raise UsageError("scores.json holds whole sets of layers, as its search judged them; plan from the model")
    entry, chosen = build(SEARCHES, config.search or _search_of(scores, wanted))
    with TemporaryDirectory() as folder:
        architecture = _recorded_architecture(scores, Path(folder))
        if architecture is None and rules.keep_period:
            raise UsageError("--keep-period needs the model's config, and scores.json holds none; plan from the model")
        together = tuple(frozenset(move) for move in moves if len(move) > 1)
        constraints = rules.constraints(depth, config.protect, architecture, together=together, units=units)
        try:
            found = chosen.find(table_judge(scores.rounds), constraints, wanted, seed=scores.seed)
        except KeyError as error:
            raise UsageError(
                f"scores.json has no score for {error.args[0]}: it was made with {len(scores.rounds)} rounds; give "
                "the --search that made it, such as greedy:lazy=true, use --search one-shot, or plan from the model"
            ) from error
        constraints.require_allowed(entry.name, found.removal, wanted)
        require_finite(found)
        _require_floors(scores, found)
        if architecture is not None:
            dry_run(Path(folder), found.removal)
    limits = rules.limits(constraints.protect, architecture)
    warnings = (
        (*architecture.misread(found.removal), *architecture.heads()) if architecture is not None else (NO_DRY_RUN,)
    )
    how = SearchRef(name=entry.name, options=options_of(chosen))
    return build_plan(scores, found, how, limits, config.drop, None, warnings)


def plan_from_scores(
    scores: str | Path | Scores, run_folder: Path, *, progress: Progress = SILENT, **options: Any
) -> tuple[Scores, Plan]:
    """Plan from recorded scores; writes the plan and, beside it, the scores, judged again under another objective.

    ``options``: those of ``PlanConfig`` that can be met without the model (``FOR_SCORES``).
    """
    unused = [name for name, value in options.items() if name not in FOR_SCORES and value not in (None, (), False)]
    if unused:
        raise UsageError(f"--scores plans without a model: --{unused[0].replace('_', '-')} cannot be given with it")
    config = PlanConfig.of(model="", **options)
    if config.drop is None:  # before anything is read
        raise UsageError(NO_DROP)
    read = again = scores if isinstance(scores, Scores) else read_scores(Path(scores))
    if config.objective or config.weights or config.floor:
        name, weights, floors = config.objective, config.weights, config.floor
        if name is None:  # what is not said stays as it was recorded
            recorded = read.metric.objective
            name = None if weights else recorded.name
            weights, floors = weights or recorded.weights, recorded.floors if floors is None else floors
        again = rejudged(read, asked_objective(name, weights, floors))
    planned = replan(again, config)
    copy = run_folder / Scores.filename
    with locked(run_folder):
        theirs = copy.exists() and not isinstance(scores, Scores) and copy.samefile(scores)
        if theirs and again != read:
            raise UsageError(f"another objective makes other scores than {scores}; give another folder with -o")
        if theirs:
            planned.save(run_folder / Plan.filename)
        else:
            with published_with(again, run_folder, progress, before=Plan) as new:
                planned.save(new / Plan.filename)
    return again, planned


def _require_floors(scores: Scores, found: SearchResult) -> None:
    """Raise ``RefusedError`` when what is to go, or one of its layers alone, leaves a task below its floor."""
    asked = [found.cost] if found.cost else scores.rounds[0].candidates
    below = [one for one in asked if one.below_floor and set(one.removal) <= set(found.removal)]
    if below:
        raise RefusedError(f"what was found breaks a floor: {shortfall(below[0])}; lower --floor or --drop")


def _search_of(scores: Scores, wanted: int) -> str:
    """Return greedy where the rounds lead stroke by stroke on from what is removed, and one-shot where they do not.

    Exchange judges whole removals, and begins at the intact model again and again.
    """
    path = all(entry.removed for entry in scores.rounds[1:])
    return "greedy" if path and len(scores.rounds) >= wanted > 1 else "one-shot"


def _recorded_architecture(scores: Scores, folder: Path) -> Architecture | None:
    """Lay the recorded config into ``folder`` and read it; None where it cannot be read without the model."""
    if scores.config is None:
        return None
    with writing(folder / "config.json"):
        (folder / "config.json").write_text(scores.config, encoding="utf-8")
    try:
        return read_architecture(load_config(str(folder)))
    except ModelError:  # it takes the model's own code, or another transformers: the plan says what was not looked at
        return None
