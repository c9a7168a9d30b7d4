"""Every causal-LM type of the installed transformers, tried: tiny random weights, exported, reloaded, compared.

The verdicts are measured, never listed by hand: ``python tools/zoo.py`` prints ``docs/ZOO.md``.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from layerprune import option_types
from layerprune.architecture import Architecture, load_config, read_architecture
from layerprune.architecture.architecture import check_causal
from layerprune.architecture.tiny import save_tiny, tiny_config, types
from layerprune.artifacts import MetricRef, Plan, PlanLimits, SearchRef
from layerprune.checkpoint import Checkpoint, locate
from layerprune.checkpoint.location import reference
from layerprune.cli import command as opt
from layerprune.cli.command import Verb, pass_console
from layerprune.cli.console import Console
from layerprune.errors import LayerpruneError, RefusedError, UsageError, did_you_mean, one_line
from layerprune.exporter.exporter import export
from layerprune.exporter.proof import load
from layerprune.removal import Removal
from layerprune.util import SILENT, Progress

if TYPE_CHECKING:
    import torch
    from torch import nn

Kind = Literal["exact", "constrained", "refused", "unavailable", "wrong"]
WORDS = {
    "exact": "exact",
    "constrained": "exact, with a constraint",
    "refused": "refused",
    "unavailable": "cannot be built here",
    "wrong": "WRONG",
}


PROMPTS = 8
AS_DECODER = "as a decoder (is_decoder true); as an encoder it is refused"


@dataclass(frozen=True)
class Verdict:
    """What became of one model type."""

    model_type: str
    kind: Kind
    reason: str = ""  # the constraint, the refusal, or what went wrong
    exported: tuple[Removal, ...] = ()
    max_difference: float = 0.0  # largest difference of a logit, over all removals
    encoder: bool = False  # whether the same type is refused where its config says is_decoder false


@click.command(
    cls=Verb,
    examples=["python tools/zoo.py > docs/ZOO.md", "python tools/zoo.py --types llama,gemma3_text"],
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option(
    "--types",
    "names",
    type=opt.Value(option_types.names),
    help="Only these model types. Default: all of them; takes minutes.",
)
@pass_console
def main(console: Console, names: tuple[str, ...] | None = None) -> None:
    """Try export on a tiny random model of each causal-LM type of the installed transformers.

    The verdicts are printed as the Markdown of docs/ZOO.md; exit code 1 when a type comes out wrong.
    """
    verdicts = zoo(names, console.progress)
    console.print(render(verdicts).rstrip("\n"))
    click.get_current_context().exit(any(verdict.kind == "wrong" for verdict in verdicts))


def zoo(names: Iterable[str] | None = None, progress: Progress = SILENT) -> list[Verdict]:
    """Return the verdict on each type, all of transformers' causal LMs by default; a second or two each.

    Raises ``UsageError`` before the first when one is unknown.
    """
    known = types()
    asked = known if names is None else tuple(dict.fromkeys(names))
    for name in asked:
        if name not in known:
            raise UsageError(f"transformers has no causal-LM type {name!r}.{did_you_mean(name, known)}")
    found = []
    with progress.task("trying model types", len(asked), "types") as advance:
        for name in asked:
            with tempfile.TemporaryDirectory(prefix="layerprune-zoo-") as folder:
                found.append(judge(name, Path(folder)))
            advance()
    return found


def judge(model_type: str, folder: Path) -> Verdict:
    """Try one type in an empty folder: remove one, several, the first and the last layer.

    Only what ``Architecture.check`` allows is tried; a refusal by export that it did not foresee counts as wrong.

    Exact means: no missing or unexpected keys, the logits of the base with those layers bypassed, and generation with
    a cache that agrees with generation without one as the base's does.
    """
    try:
        base = save_tiny(model_type, folder / "base")
    except Exception as error:  # noqa: BLE001  whatever keeps transformers from building it
        return Verdict(model_type, "unavailable", one_line(error))
    try:
        architecture = read_architecture(load_config(str(base)))
    except RefusedError as error:
        return Verdict(model_type, "refused", str(error))
    allowed = [removal for removal in trials(architecture) if not refusal(architecture, removal)]
    worst = 0.0
    generates = agreements(base)
    for number, removal in enumerate(allowed):
        out = folder / str(number)
        try:
            receipt = export(tiny_plan(base, architecture, removal), out)
        except LayerpruneError as error:
            return Verdict(model_type, "wrong", f"{removal}: {error}")
        assert receipt.proof is not None
        worst = max(worst, receipt.proof.max_difference)
        agreed = agreements(out) if generates else 0
        if agreed < generates / 2:
            said = f"with a cache it generates the tokens it does without for {agreed} of {PROMPTS} prompts"
            return Verdict(model_type, "wrong", f"{removal}: {said}, the base for {generates}")
    if not allowed:
        return Verdict(model_type, "refused", "; ".join(architecture.remarks))
    kind: Kind = "constrained" if architecture.constrained else "exact"
    encoder = encodes(model_type)
    reason = "; ".join((*architecture.remarks, *([AS_DECODER] if encoder else [])))
    return Verdict(model_type, kind, reason, tuple(allowed), worst, encoder)


def encodes(model_type: str) -> bool:
    """Return whether the type is an encoder where is_decoder is false, as it is published, and refused there."""
    config = tiny_config(model_type)
    if getattr(config, "is_decoder", None) is not True:
        return False
    config.is_decoder = False
    try:
        check_causal(config)
    except RefusedError:
        return True
    return False


def trials(architecture: Architecture) -> list[Removal]:
    """Return the removals to try: one, several, first, last, and each group that goes together."""
    depth = architecture.depth
    groups = [tuple(sorted(group)) for group in architecture.together]
    units = [(depth // 3,), (1, depth // 2), (0,), (depth - 1,), *groups]
    return [Removal.from_layers(entry) for entry in dict.fromkeys(units)]


def refusal(architecture: Architecture, removal: Removal) -> str:
    """Return why a removal is refused, empty when it is not."""
    try:
        architecture.check(removal)
    except RefusedError as error:
        return str(error)
    return ""


def agreements(folder: Path) -> int:
    """Return for how many of the prompts a checkpoint generates the same tokens with a cache as without.

    Types that select tokens or experts sharply do not always agree with themselves on random weights; a type that
    cannot generate from tokens alone agrees for none.
    """
    import torch

    model, _ = load(folder, trust_remote_code=False)
    prompts = torch.randint(3, 90, (PROMPTS, 16), generator=torch.Generator().manual_seed(0))
    try:
        cached, plain = (_generated(model, prompts, cache=cache) for cache in (True, False))
    except Exception:  # noqa: BLE001  asked of the base first: zero there means that nothing is asked of the result
        return 0
    return int((cached == plain).all(dim=-1).sum())


def _generated(model: nn.Module, tokens: torch.Tensor, *, cache: bool) -> torch.Tensor:
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    return model.generate(tokens, use_cache=cache, **settings)


def tiny_plan(base: Path, architecture: Architecture, removal: Removal) -> Plan:
    """Return a plan that nobody chose, to try an export."""
    checkpoint = Checkpoint.open(base)
    found, parameters = locate(str(base)), architecture.parameters()
    model = reference(
        found, checkpoint, model_type=architecture.model_type, layers=architecture.depth, parameters=parameters
    )
    metric = MetricRef(name="none", spec="none", options={}, unit="", scope="any set", owner="layerprune")
    return Plan(
        model=model, metric=metric, search=SearchRef(name="none"), limits=PlanLimits(), requested=str(len(removal)),
        removal=removal.layers, order=removal.layers, ranking=(), scores_sha256="", data=(), seed=0, versions={},
    )  # fmt: skip


def render(verdicts: Iterable[Verdict]) -> str:
    """Return the verdicts as a Markdown page."""
    from importlib.metadata import version

    rows = sorted(verdicts, key=lambda verdict: verdict.model_type)
    counts = Counter(verdict.kind for verdict in rows)
    total = len(rows) - counts["unavailable"]
    exact = [row for row in rows if row.kind in ("exact", "constrained")]
    lines = [
        "# Which model types can be pruned",
        "",
        "Measured, not listed by hand: each type is built tiny with random weights, layers are removed (one, several,",
        "the first, the last, wherever the type allows it), the checkpoint is reloaded by stock",
        "transformers, and its logits are compared with those of the base with the same layers bypassed. Generated by",
        f"`python tools/zoo.py` with transformers {version('transformers')}, "
        f"torch {version('torch').partition('+')[0]}.",
        "",
        f"Of {total} types that can be built, {len(exact)} are exact ({counts['constrained']} with a constraint), "
        f"{counts['refused']} are refused, {counts['wrong']} are wrong. "
        f"{sum(row.encoder for row in exact)} of them are exact as decoders (is_decoder true) and refused as the "
        "encoders they are published as.",
        "",
        "| type | verdict | constraint or reason | largest difference of a logit |",
        "|---|---|---|---|",
    ]
    for row in rows:
        difference = f"{row.max_difference:.0e}" if row.max_difference else "0"
        reason, shown = row.reason.replace("|", "/"), difference if row in exact else ""
        lines.append(f"| `{row.model_type}` | {WORDS[row.kind]} | {reason} | {shown} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(prog_name="python tools/zoo.py")
