"""Readers other than transformers: what they look for in a config, and what they would guess wrong after a removal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from layerprune.architecture.config_fields import per_layer
from layerprune.architecture.stack import reread
from layerprune.removal import LayerMap

if TYPE_CHECKING:
    from transformers import PretrainedConfig


# Readers other than transformers that guess at a model, and would guess wrong after a removal.
#
# Seen in llama.cpp, vLLM 0.33 and mlx-lm 0.32.2. They take a kind of layer to repeat with a fixed period, or with one
# that a field of config.json names, where config.json has a list; or they know a model by its depth alone. A period
# that a field names is written so that it fits where one does (``period_fields``). (vLLM also wants
# ``max_window_layers`` of Qwen 2 to be the depth; a removal keeps that as it is.)


# Of each field: the entry that every so many layers has, and the others have not.
EACH = {"layer_types": "full_attention", "no_rope_layers": 0, "moe_layers": True}


@dataclass(frozen=True)
class Period:
    """One guess: every so many layers is of another kind than those before it."""

    name: str
    field: str  # of fields.FIELDS: a list of one entry per layer, or of the layers that something applies to
    period: int | str  # or the name of the field that says so
    default: int = 0  # of that field; 0: the reader needs it
    whole: bool = False  # layers behind the last whole period are of the other kind, too


@dataclass(frozen=True)
class Depth:
    """One guess: a model of so many layers, and no other, is a certain one, which has something of its own."""

    name: str
    depth: int
    own: str


_LLAMA4 = (
    Period("llama.cpp", "no_rope_layers", 4),
    Period("llama.cpp", "moe_layers", "interleave_moe_layer_step"),
    Period("vLLM", "moe_layers", "interleave_moe_layer_step", 1),
)
_GEMMA3 = (
    Period("llama.cpp", "layer_types", 6),
    Period("mlx-lm", "layer_types", "sliding_window_pattern", 6),
    Depth("llama.cpp", 62, "scale of attention (that of the 27B)"),
)
_QWEN3_NEXT = tuple(Period(name, "layer_types", "full_attention_interval", 4) for name in ("llama.cpp", "mlx-lm"))

READERS: dict[str, tuple[Period | Depth, ...]] = {
    "bailing_hybrid": (Period("mlx-lm", "layer_types", "layer_group_size", whole=True),),
    "cohere2": (
        Period("llama.cpp", "layer_types", 4),
        Period("mlx-lm", "layer_types", "sliding_window_pattern", 4),
    ),
    "exaone4": (Depth("llama.cpp", 64, "sliding windows (those of the 32B)"),),
    "exaone_moe": (Period("llama.cpp", "layer_types", 4),),
    "gemma2": (
        Period("llama.cpp", "layer_types", 2),
        Depth("llama.cpp", 46, "scale of attention (that of the 27B)"),
    ),
    "gemma3": _GEMMA3,
    "gemma3_text": _GEMMA3,
    "gpt_oss": (Period("llama.cpp", "layer_types", 2), Period("vLLM", "layer_types", 2)),
    "llama4": (
        *_LLAMA4,
        Period("mlx-lm", "no_rope_layers", 4),
        Period("mlx-lm", "moe_layers", "interleave_moe_layer_step"),
    ),
    "llama4_text": _LLAMA4,
    "olmo3": (Period("llama.cpp", "layer_types", 4),),
    "qwen3_5": _QWEN3_NEXT,
    "qwen3_5_moe": _QWEN3_NEXT,
    "qwen3_5_moe_text": _QWEN3_NEXT,
    "qwen3_5_text": _QWEN3_NEXT,
    "qwen3_next": _QWEN3_NEXT,
    "smollm3": (Period("llama.cpp", "no_rope_layers", 4),),
}


def period_fields(model_type: str, fields: Mapping[str, Any], depth: int) -> dict[str, int]:
    """Return the fields by which readers know a period, with the value that says what the lists say; 0: none does.

    A field is left out that may be missing, as its readers take the right period without it.
    """
    found: dict[str, int] = {}
    for reader in READERS.get(model_type, ()):
        if isinstance(reader, Period) and isinstance(reader.period, str):
            flags = _flags(reader, fields, depth)
            period, _ = _best_period(reader, flags)
            if any(flags) and (fields.get(reader.period) or reader.default) != period:
                found[reader.period] = period
    return found


def misreadings(model_type: str, fields: Mapping[str, Any], sources: LayerMap) -> Iterator[tuple[str, bool]]:
    """Yield a warning for each reader that would take the result for another model, and whether it reads the base."""
    for reader in READERS.get(model_type, ()):
        if isinstance(reader, Depth):
            if (sources.depth == reader.depth) != (len(sources) == reader.depth):
                text = (
                    f"{reader.name} gives {model_type} models of {reader.depth} layers, and no others, their own "
                    f"{reader.own}: it would misread this one with {len(sources)} layers"
                )
                yield text, True
            continue
        before = _flags(reader, fields, sources.depth)
        if reader.field == "layer_types" and len(set(before)) < 2:
            continue  # sliding windows that are not used, or used alike
        period, already = _best_period(reader, before)
        _, wrong = _best_period(reader, [before[layer] for layer in sources.layers] if before else [])
        if wrong:
            text = _misread_period(model_type, reader, 0 if already else period, wrong, len(sources))
            yield text, not already


def _misread_period(model_type: str, reader: Period, period: int, wrong: list[int], layers: int) -> str:
    """Return the warning; ``period`` is the one that the base has, 0 where it has none that the reader could know."""
    if isinstance(reader.period, str):
        every = f"every {period} layers" if period else "with one period"
        said = f"{every} ({reader.period}) and would misread or not load the {layers} layers, which no period fits"
    else:
        said = f"every {reader.period} layers and would misread {len(wrong)} of the {layers} layers"
        said = f"{said}, layer {wrong[0]} first"
    end = "keep the period for it" if period else "it misreads the base, too"
    return f"{reader.name} takes {reader.field} of {model_type} to repeat {said}; {end}"


def _best_period(reader: Period, flags: list[bool]) -> tuple[int, list[int]]:
    """Return the period a reader goes by, a fixed one or the one that fits, and the layers it takes for another kind.

    0 and all layers where it needs a period that fits, and none does.
    """
    fixed = isinstance(reader.period, int)
    for period in [reader.period] if fixed else range(1, len(flags) + 1):
        end = len(flags) // period * period if reader.whole else len(flags)
        wrong = [layer for layer, flag in enumerate(flags) if flag != ((layer + 1) % period == 0 or layer >= end)]
        if fixed or not wrong:
            return period, wrong
    return 0, list(range(len(flags)))


def _flags(reader: Period, fields: Mapping[str, Any], depth: int) -> list[bool]:
    """Return for each layer whether it is of the kind that comes once in a period; nothing where no list says so."""
    return [kind == EACH[reader.field] for kind in per_layer(fields, reader.field, depth)]


# The rotary embedding under the names that readers of older configs look for.
#
# transformers 5 writes ``rope_parameters``; transformers 4 and mlx-lm read ``rope_theta``, ``rope_scaling`` and
# ``partial_rotary_factor`` at the top level and take their own default where these are missing.


Fields = dict[str, Any]


@dataclass(frozen=True)
class Names:
    """The older names of one model type's rotary embedding; read off its config class and transformers 4.57."""

    theta: str = "rope_theta"
    partial: str = "partial_rotary_factor"
    sliding_theta: str = ""  # of sliding layers, where they have a theta of their own


# Types with other names than most, or whose rotary embedding differs by kind of layer.
NAMES = {
    "gemma3_text": Names(sliding_theta="rope_local_base_freq"),
    "gemma3n_text": Names(sliding_theta="rope_local_base_freq"),
    "gpt_neox": Names("rotary_emb_base", "rotary_pct"),
    "gpt_neox_japanese": Names("rotary_emb_base", "rotary_pct"),
    "mimo_v2_flash": Names(sliding_theta="swa_rope_theta"),
    "modernbert-decoder": Names("global_rope_theta", sliding_theta="local_rope_theta"),
    "olmo3": Names(sliding_theta="rope_theta"),
}


def legacy_rope_fields(config: PretrainedConfig) -> Fields | None:
    """Return the older fields that say what ``rope_parameters`` of a decoder config says, {} where it says nothing.

    None where the older fields cannot say it, or transformers would read the config otherwise with them.
    """
    fields = config.to_dict()
    parameters = fields.get("rope_parameters")
    if not isinstance(parameters, dict) or not parameters:
        return {}
    names, plain = NAMES.get(config.model_type, Names()), Names()
    if any(isinstance(value, dict) for value in parameters.values()):
        if config.model_type not in NAMES:
            return {}  # a type that no reader of the older names knows
        found = _by_kind(parameters, names)
    else:
        found = _flat(parameters, plain if names.sliding_theta else names, fields)
    if found is None:
        return None
    given = {key: value for key, value in found.items() if value is not None}
    return next((fits for fits in (found, given) if _read_alike(type(config), fields, fits)), None)


def _flat(parameters: Fields, names: Names, fields: Fields) -> Fields | None:
    if parameters.get("rope_theta") is None:
        return None
    found = {names.theta: parameters["rope_theta"], "rope_scaling": _scaling(parameters, fields)}
    if parameters.get("partial_rotary_factor") is not None:
        found[names.partial] = parameters["partial_rotary_factor"]
    return found


def _by_kind(parameters: Fields, names: Names) -> Fields | None:
    """Full and sliding layers: a theta each, one scaling that holds for full layers only."""
    full, sliding = parameters.get("full_attention"), parameters.get("sliding_attention")
    if not full or not sliding or set(parameters) != {"full_attention", "sliding_attention"}:
        return None
    partial = full.get("partial_rotary_factor")
    if _scaling(sliding, {}) is not None or partial != sliding.get("partial_rotary_factor"):
        return None
    found = _flat(full, names, {})
    if found is None or sliding.get("rope_theta") != found.get(names.sliding_theta, sliding.get("rope_theta")):
        return None
    return {**found, names.sliding_theta: sliding["rope_theta"]}


def _scaling(parameters: Fields, fields: Fields) -> Fields | None:
    """Return ``rope_scaling``: the type under both of its names, and what it takes."""
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    rest = {key: value for key, value in parameters.items() if key not in ("rope_theta", "partial_rotary_factor")}
    if kind == "default" and not rest.keys() - {"rope_type", "type"}:
        return None
    if kind == "longrope" and "original_max_position_embeddings" in fields:
        # Phi 3 of transformers 4 accepts these three and no others; the length stands beside them.
        return {"type": kind, **{key: rest[key] for key in ("short_factor", "long_factor")}}
    return {**rest, "rope_type": kind, "type": kind}


def _read_alike(kind: type[PretrainedConfig], fields: Fields, found: Fields) -> bool:
    """Whether transformers reads a config with the older fields as it does without; the type's old name apart."""
    read = reread(kind, fields), reread(kind, {**fields, **found})
    if None in read:
        return False
    before, after = ({**each, "rope_parameters": _without_type(each.get("rope_parameters") or {})} for each in read)
    return {key: value for key, value in after.items() if key in before or key not in found} == before


def _without_type(parameters: Any) -> Any:
    """Drop ``type``, the older name of ``rope_type``, which says nothing more."""
    if not isinstance(parameters, dict):
        return parameters
    return {key: _without_type(value) for key, value in parameters.items() if key != "type"}
