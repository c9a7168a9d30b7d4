"""The verbs as functions of Python. The command line calls the same ones, so both take the same options.

Wherever a model is asked for, a local folder, a Hub id or a pair ``(model, tokenizer)`` that is loaded already will do;
``score`` and ``plan`` run it as it is in memory, the others read the files that it was loaded from.
Documents (``Scores``, ``Plan``, ...) are taken as they are or as paths. A run folder ``out`` gets the documents, in the
place of those that are there, and keeps what was measured: the same call again goes on from it. A checkpoint's folder
must not exist yet. Faults raise ``LayerpruneError``, whose message is one line.
"""

from __future__ import annotations

import inspect as signatures
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

from layerprune import config as configs
from layerprune.errors import UsageError
from layerprune.util import SILENT, Bars, Progress

if TYPE_CHECKING:
    from layerprune.artifacts import Audit, Front, HealLog, Plan, Receipt, Scores, Study
    from layerprune.auditor.recheck import RecheckResult
    from layerprune.auditor.verification import Verification
    from layerprune.hub import Pushed
    from layerprune.inspection import Inspection
    from layerprune.models.model import LoadedModel
    from layerprune.recipes import Finished

    Pair = tuple[Any, Any]  # a PreTrainedModel and its tokenizer
    PathLike = str | Path

Function = TypeVar("Function", bound=Callable[..., Any])
# What a pair has settled already.
LOADING = ("dtype", "device", "attn_implementation", "offload", "revision", "trust_remote_code")


def _takes(config: type[configs.Config]) -> Callable[[Function], Function]:
    """Return a decorator that gives a function the options of ``config``, in its signature and in its docstring."""

    def decorate(function: Function) -> Function:
        own = signatures.signature(function)
        kept = [one for one in own.parameters.values() if one.kind is not signatures.Parameter.VAR_KEYWORD]
        options = {name: one for name, one in configs.declared(config).items() if name not in own.parameters}
        made = [
            signatures.Parameter(
                name,
                signatures.Parameter.KEYWORD_ONLY,
                default=signatures.Parameter.empty if one.value is configs.MISSING else one.value,
                annotation=config.__dataclass_fields__[name].type,
            )
            for name, one in options.items()
        ]
        function.__signature__ = own.replace(parameters=[*kept, *made])  # type: ignore[attr-defined]
        fill = textwrap.TextWrapper(112, initial_indent="    ", subsequent_indent=" " * 8).fill
        lines = [fill(f"{name}: {one.help}") for name, one in options.items()]
        function.__doc__ = f"{signatures.getdoc(function)}\n\nOptions:\n" + "\n".join(lines)
        return function

    return decorate


@_takes(configs.InspectConfig)
def inspect(model: PathLike | Pair, *, progress: Progress | bool | None = None, **options: Any) -> Inspection:
    """Look at the decoder stack of ``model`` and at what can be removed from it; no weights are loaded.

    With a ``base`` its weights are compared with that model's, a chunk at a time: ``lineage`` has a match for each
    layer, and ``lineage.sentences`` says what was done. ``progress``: as in ``score``.
    """
    from layerprune.inspection import inspect_model

    config = configs.InspectConfig.of(**_placed(model, options))
    return inspect_model(
        config.model,
        revision=config.revision,
        base=config.base,
        trust_remote_code=config.trust_remote_code,
        progress=_progress(progress),
    )


@_takes(configs.ScoreConfig)
def score(
    model: PathLike | Pair,
    *,
    out: PathLike | None = None,
    stability: bool = False,
    progress: Progress | bool | None = None,
    **options: Any,
) -> Scores:
    """Measure what the removal of each layer costs.

    ``out``: a run folder that gets scores.json. ``stability``: refuse a metric whose ranking cannot be repeated on
    other items. ``progress``: True shows bars, False nothing; by default bars where somebody watches.
    """
    from layerprune.files import check_places, locked
    from layerprune.planner import save_scores, score_model

    shown, folder = _progress(progress), None if out is None else Path(out)
    with _opened(model, options) as (told, loaded):
        config = configs.ScoreConfig.of(**told)
        with locked(folder, config.model):
            if folder is not None:
                check_places(folder, files=("scores.json",))
            scores = score_model(config, run_folder=folder, progress=shown, stability=stability, loaded=loaded)
            if folder is not None:
                save_scores(scores, folder, shown)
    return scores


@_takes(configs.PlanConfig)
def plan(
    model: PathLike | Pair | None = None,
    *,
    scores: PathLike | Scores | None = None,
    out: PathLike | None = None,
    progress: Progress | bool | None = None,
    **options: Any,
) -> Plan | Front:
    """Choose the layers to remove; no weight is touched.

    From a ``model``, or from earlier ``scores`` without one. Exactly one of ``drop``, ``target_params``,
    ``target_bytes``, ``target_speedup``, ``max_drop`` and ``front`` says how far to go; ``front`` returns a ``Front``,
    whose plans lie in ``out``. ``out``: a run folder that gets scores.json and plan.json.
    """
    return planned(model, scores=scores, out=out, progress=progress, **options)[1]


def planned(
    model: PathLike | Pair | None = None,
    *,
    scores: PathLike | Scores | None = None,
    out: PathLike | None = None,
    progress: Progress | bool | None = None,
    **options: Any,
) -> tuple[Scores, Plan | Front]:
    """Return the scores that a plan was made from, too; see ``plan``."""
    from layerprune.planner import front_model, plan_from_scores, plan_model

    shown = _progress(progress)
    if options.get("front") and scores is not None:
        raise UsageError("--scores plans without a model, and a front asks it how far to go: leave --scores out")
    if options.get("front") and out is None:
        raise UsageError("a front is a folder of plans: say where it goes with out")
    with ExitStack() as stack:
        folder = Path(out) if out is not None else Path(stack.enter_context(TemporaryDirectory(prefix="layerprune-")))
        if scores is not None:
            if model is not None:
                raise UsageError("--scores plans without a model: a MODEL cannot be given with it")
            return plan_from_scores(scores, folder, progress=shown, **options)
        if model is None:
            raise UsageError("name the MODEL to plan for, or give --scores to plan from an earlier scores.json")
        told, loaded = stack.enter_context(_opened(model, options))
        config = configs.PlanConfig.of(**told)
        make = front_model if config.front else plan_model
        return make(config, run_folder=folder, progress=shown, loaded=loaded)


@_takes(configs.ExportConfig)
def export(
    plan: PathLike | Plan | Pair,
    out: PathLike | None = None,
    *,
    progress: Progress | bool | None = None,
    **options: Any,
) -> Receipt | str:
    """Write the smaller model that ``plan`` describes to the new folder ``out``, and check it against its base.

    ``plan`` is a plan, the path of one or the folder that holds it; with ``remove`` it is a model, which loses exactly
    these layers: nothing is measured, and no plan is needed. With ``form`` nothing is written: the removal is returned
    as another tool takes it.
    """
    from layerprune.checkpoint import try_new_folder
    from layerprune.exporter import export as write
    from layerprune.exporter import removal_plan, translated

    shown, config = _progress(progress), configs.ExportConfig.of(**options)
    target = None if out is None else Path(out)
    if config.form is None and target is None:
        raise UsageError("say where the smaller model goes with -o DIR, or with --as for which tool to print it")
    if config.form is not None and (target is not None or config.max_shard_size is not None):
        unused = "-o" if target is not None else "--max-shard-size"
        raise UsageError(f"--as {config.form} prints the removal and writes nothing: {unused} cannot be given with it")
    if config.remove is None:
        if config.revision is not None:
            raise UsageError("--revision is for a MODEL with --remove; a plan names its own")
        read = _plan_at(plan)
    else:
        if config.base is not None:
            raise UsageError("--base is for a PLAN; with --remove the first argument is the model")
        model, revision = _named(plan)
        if target is not None:
            try_new_folder(target, model)
        read = removal_plan(
            model,
            config.remove,
            revision=config.revision or revision,
            weights=target is not None,
            trust_remote_code=config.trust_remote_code,
            progress=shown,
        )
    common: Any = {"base": config.base, "trust_remote_code": config.trust_remote_code, "progress": shown}
    if target is None:
        return translated(read, str(config.form), **common)
    return write(read, target, max_shard_size=config.max_shard_size, **common)


@_takes(configs.HealConfig)
def heal(
    checkpoint: PathLike, out: PathLike, *, progress: Progress | bool | None = None, **options: Any
) -> HealLog | None:
    """Win back what removal took from an exported ``checkpoint``; the new folder ``out`` gets the same shapes.

    Of several processes under ``accelerate launch`` the first returns the log, the others None.
    """
    from layerprune.healing.healer import heal as carry_out

    return carry_out(Path(checkpoint), Path(out), progress=_progress(progress), **options)


@_takes(configs.AuditConfig)
def audit(
    folder: PathLike, out: PathLike | None = None, *, progress: Progress | bool | None = None, **options: Any
) -> Audit | RecheckResult:
    """Compare the exported model in ``folder`` with its base on items that no earlier step has seen.

    Writes audit.json, the model card and report.html into ``folder``. Any other model, a folder or a Hub id, is
    compared with ``base``; its folder stays as it is, and ``out`` gets audit.json, report.html and card.md. With
    ``recheck`` nothing is written: items of the audit that is there are asked again, and what does not repeat returned.
    """
    from layerprune.auditor.auditor import audit as examine

    where = None if out is None else Path(out)
    return examine(folder, out=where, progress=_progress(progress), **options)


@_takes(configs.VerifyConfig)
def verify(folder: PathLike, *, progress: Progress | bool | None = None, **options: Any) -> Verification:
    """Check that ``folder`` is what export, heal and audit left: every hash and every figure. Problems are returned."""
    from layerprune.auditor.verification import verify as look

    place, config = _exported(folder), configs.VerifyConfig.of(**options)
    return look(place, base=config.base, progress=_progress(progress))


@_takes(configs.CardConfig)
def card(folder: PathLike, **options: Any) -> Path:
    """Renew the model card of an exported ``folder``, or card.md of the one that holds another model's audit.

    Everything outside the generated part stays as it is, byte for byte. Returns the card's path.
    """
    from layerprune.auditor.auditor import renew_card

    return renew_card(_exported(folder), configs.CardConfig.of(**options).base)


@_takes(configs.PushConfig)
def push(folder: PathLike, repo: str, *, progress: Progress | bool | None = None, **options: Any) -> Pushed:
    """Verify ``folder`` and send weights, card, audit and report to ``repo`` (owner/name) on the Hub."""
    from layerprune.hub import push as send

    return send(_exported(folder), repo, progress=_progress(progress), **options)


@_takes(configs.StudyConfig)
def study(model: PathLike | Pair, out: PathLike, *, progress: Progress | bool | None = None, **options: Any) -> Study:
    """Ask the paper's questions (arXiv:2605.14075) of ``model``: which metric knows which of its layers matter.

    ``out`` gets study.html, study.json, tables (CSV) and plots (SVG).
    """
    from layerprune.analysis import WORK, check_room, write_study
    from layerprune.analysis import study as measure
    from layerprune.files import locked

    folder, config = Path(out), configs.StudyConfig.of(**_placed(model, options))
    with locked(folder, config.model):
        check_room(folder)
        found = measure(config, folder / WORK, progress=_progress(progress))
        write_study(found, folder)
    return found


@_takes(configs.PruneConfig)
def prune(
    model: PathLike | Pair, out: PathLike, *, progress: Progress | bool | None = None, **options: Any
) -> Finished:
    """Plan, export, heal where ``heal`` says how, and audit: the smaller model in the new folder ``out``.

    The documents on the way lie in a run folder beside it, ``OUT.run``, with recipe.json, the same as a recipe. A call
    that was cut off goes on when it is made again.
    """
    from layerprune.recipes import prune_recipe, run_recipe

    target, told = Path(out).absolute(), _placed(model, options)
    recipe = prune_recipe(configs.PruneConfig.of(**told), told)
    return run_recipe(recipe, target.with_name(f"{target.name}.run"), result=target, progress=_progress(progress))


def _progress(asked: Progress | bool | None) -> Progress:
    if asked is None:
        asked = sys.stderr.isatty() or "ipykernel" in sys.modules
    if isinstance(asked, bool):
        return Bars() if asked else SILENT
    return asked


@contextmanager
def _opened(model: PathLike | Pair, options: dict[str, Any]) -> Iterator[tuple[dict[str, Any], LoadedModel | None]]:
    """Yield the options with the model's name among them and, of a pair, the loaded model; it gets its mode back."""
    if isinstance(model, str | Path):
        yield {**options, "model": str(model)}, None
        return
    from layerprune.models.model import LoadedModel, runs_own_code

    for name in LOADING:
        if options.get(name):
            raise UsageError(f"{name} says how a model is loaded, and this one is loaded already; leave it out")
    network, tokenizer = _pair(model)
    name, revision = _named(model)
    training, trusted = network.training, runs_own_code(network)
    told = {**options, "model": name, "revision": revision, "trust_remote_code": trusted}
    try:
        yield told, LoadedModel.of(network, tokenizer)
    finally:
        network.train(training)


def _pair(model: Any) -> Pair:
    if not isinstance(model, tuple | list) or len(model) != 2 or not hasattr(model[0], "config"):
        raise UsageError(f"{type(model).__name__} is no model; give a folder, a Hub id or a pair (model, tokenizer)")
    return model[0], model[1]


def _named(model: Any) -> tuple[str, str | None]:
    """Return where a model is, and its commit on the Hub."""
    if isinstance(model, str | Path):
        return str(model), None
    network, _ = _pair(model)
    where = str(network.name_or_path)
    return where, None if Path(where).is_dir() else getattr(network.config, "_commit_hash", None)


def _placed(model: Any, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options with the place of the model among them: these verbs read its files, of a pair, too."""
    name, revision = _named(model)
    return {**options, "model": name} | ({} if revision is None else {"revision": revision})


def _exported(folder: PathLike) -> Path:
    if not Path(folder).is_dir():
        raise UsageError(f"{folder} does not exist; give the folder that layerprune export wrote")
    return Path(folder)


def _plan_at(plan: Any) -> Plan:
    """Return a plan; raises ``UsageError`` for what looks like a model, which needs ``remove``."""
    from layerprune.artifacts import Plan, read_plan
    from layerprune.checkpoint.location import learn

    if isinstance(plan, Plan):
        return plan
    if not isinstance(plan, str | Path):
        raise UsageError("a model loses the layers that are named: give remove, such as remove='21-24', or a plan")
    path = Path(plan)
    file = path / Plan.filename if path.is_dir() else path
    if not file.exists() and (path / "config.json").exists():
        raise UsageError(f"{path} is a model and not a plan; name the layers to remove (--remove 21-24), or plan first")
    for place in (file.parent, file.parent.parent):  # beside a front's plans, and above its folder
        learn(place)
    return read_plan(file)
