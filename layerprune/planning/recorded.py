"""Planning again from recorded scores: no model, only its config, which says what may be removed."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from layerprune import documents
from layerprune.anatomy import Anatomy, load_config, read_anatomy
from layerprune.config import PlanConfig
from layerprune.documents import Plan, Scores, read_scores
from layerprune.errors import ModelError, RefusedError, UsageError
from layerprune.exporter import rehearse
from layerprune.judgement import asked_objective, rejudged
from layerprune.lock import locked
from layerprune.output import writing
from layerprune.planners import (
    SEARCHES,
    Constraints,
    Found,
    Move,
    Search,
    parse_drop,
    parse_protect,
    require_finite,
    shortfall,
    table_judge,
)
from layerprune.planning.laying import laid
from layerprune.planning.limits import FREE, Rules
from layerprune.planning.written import written
from layerprune.progress import SILENT, Progress
from layerprune.specs import build, options_of

# What can still be said when the scores are there.
FOR_SCORES = (
    "drop", "protect", "search", "keep_period", "no_adjacent", "contiguous", "objective", "weights", "floor",
)  # fmt: skip
UNREHEARSED = "planned without the model: whether export and other readers take the result was not looked at"


def replan(
    scores: Scores, drop: str, protect: str | None = None, *, search: str | None = None, rules: Rules = FREE
) -> Plan:
    """Plan from recorded scores, without a model; a search that needs what was not scored is a ``UsageError``.

    What the architecture allows is read off the config in the scores, and export is rehearsed with it. Scores that hold
    none, or one that this transformers cannot build without the model's own code, give a plan that says so.
    """
    wanted = parse_drop(drop, scores.model.layers)
    moves = _moves(scores)
    entry, chosen = build(SEARCHES, search or _search_of(scores, wanted))
    with TemporaryDirectory() as folder:
        anatomy = _anatomy(scores, Path(folder))
        constraints = _constraints(scores, moves, parse_protect(protect, scores.model.layers), anatomy, rules)
        found = _found(chosen, scores, constraints, wanted)
        if misfit := constraints.misfit(found.removal, wanted):
            raise RefusedError(f"the search {entry.name!r} found {found.removal}, which may not go: {misfit}")
        require_finite(found)
        _require_floors(scores, found)
        if anatomy is not None:
            rehearse(Path(folder), found.removal)
    limits = rules.limits(constraints.protect, anatomy)
    warnings = (*anatomy.misread(found.removal), *anatomy.heads()) if anatomy is not None else (UNREHEARSED,)
    how = documents.Search(name=entry.name, options=options_of(chosen))
    return written(scores, found, how, limits, drop, None, warnings)


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
    if config.drop is None:
        raise UsageError("nothing says how far to go; with --scores, give --drop")
    read = again = scores if isinstance(scores, Scores) else read_scores(Path(scores))
    if config.objective or config.weights or config.floor:
        name, weights, floors = config.objective, config.weights, config.floor
        if name is None:  # what is not said stays as it was recorded
            recorded = read.metric.objective
            name = None if weights else recorded.name
            weights, floors = weights or recorded.weights, recorded.floors if floors is None else floors
        again = rejudged(read, asked_objective(name, weights, floors))
    planned = replan(again, config.drop, config.protect, search=config.search, rules=Rules.of(config))
    copy = run_folder / Scores.filename
    with locked(run_folder):
        theirs = copy.exists() and not isinstance(scores, Scores) and copy.samefile(scores)
        if theirs and again != read:
            raise UsageError(f"another objective makes other scores than {scores}; give another folder with -o")
        if theirs:
            planned.save(run_folder / Plan.filename)
        else:
            with laid(again, run_folder, progress, before=Plan) as new:
                planned.save(new / Plan.filename)
    return again, planned


def _require_floors(scores: Scores, found: Found) -> None:
    """Raise ``RefusedError`` when what is to go, or one of its layers alone, leaves a task below its floor."""
    asked = [found.cost] if found.cost else scores.rounds[0].candidates
    below = [one for one in asked if one.below_floor and set(one.removal) <= set(found.removal)]
    if below:
        raise RefusedError(f"what was found breaks a floor: {shortfall(below[0])}; lower --floor or --drop")


def _moves(scores: Scores) -> list[Move]:
    moves = [candidate.removal for candidate in scores.rounds[0].candidates]
    if len({unit for move in moves for unit in move}) < sum(map(len, moves)):
        raise UsageError("scores.json holds whole sets of layers, as its search judged them; plan from the model")
    return moves


def _search_of(scores: Scores, wanted: int) -> str:
    """Return greedy where the rounds lead stroke by stroke on from what is removed, and one-shot where they do not.

    Exchange judges whole removals, and begins at the intact model again and again.
    """
    laid = all(entry.removed for entry in scores.rounds[1:])
    return "greedy" if laid and len(scores.rounds) >= wanted > 1 else "one-shot"


def _anatomy(scores: Scores, folder: Path) -> Anatomy | None:
    """Lay the recorded config into ``folder`` and read it; None where it cannot be read without the model."""
    if scores.config is None:
        return None
    with writing(folder / "config.json"):
        (folder / "config.json").write_text(scores.config, encoding="utf-8")
    try:
        return read_anatomy(load_config(str(folder)))
    except ModelError:  # it takes the model's own code, or another transformers: the plan says what was not looked at
        return None


def _constraints(
    scores: Scores, moves: list[Move], protect: frozenset[int], anatomy: Anatomy | None, rules: Rules
) -> Constraints:
    if anatomy is None and rules.keep_period:
        raise UsageError("--keep-period needs the model's config, and scores.json holds none; plan from the model")
    return Constraints(
        scores.model.layers,
        protect=protect,
        must_keep=frozenset() if anatomy is None else anatomy.must_keep,
        together=tuple(frozenset(move) for move in moves if len(move) > 1),
        units=tuple(unit for move in moves for unit in move),
        check=None if anatomy is None else rules.check(anatomy),
        shape=rules.shape,
    )


def _found(chosen: Search, scores: Scores, constraints: Constraints, wanted: int) -> Found:
    try:
        return chosen(table_judge(scores.rounds), constraints, wanted, seed=scores.seed)
    except KeyError as error:
        raise UsageError(
            f"scores.json has no score for {error.args[0]}: it was made with {len(scores.rounds)} rounds; "
            "give the --search that made it, such as greedy:lazy=true, use --search one-shot, or plan from the model"
        ) from error
