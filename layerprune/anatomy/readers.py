"""Readers other than transformers that guess at a model, and would guess wrong after a removal.

Seen in llama.cpp, vLLM 0.33 and mlx-lm 0.32.2. They take a kind of layer to repeat with a fixed period, or with one
that a field of config.json names, where config.json has a list; or they know a model by its depth alone. A period that
a field names is written so that it fits where one does (``fitting``). (vLLM also wants ``max_window_layers`` of Qwen 2
to be the depth; a removal keeps that as it is.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from layerprune.anatomy.fields import FIELDS
from layerprune.anatomy.sources import Sources

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


def misread(model_type: str, fields: Mapping[str, Any], sources: Sources) -> tuple[str, ...]:
    """Return a warning for each reader that would take the result for another model."""
    return tuple(text for text, _ in _misreadings(model_type, fields, sources))


def led_astray(model_type: str, fields: Mapping[str, Any], sources: Sources) -> tuple[str, ...]:
    """Return a warning for each reader that reads the base rightly and would take the result for another model."""
    return tuple(text for text, base in _misreadings(model_type, fields, sources) if base)


def fitting(model_type: str, fields: Mapping[str, Any], depth: int) -> dict[str, int]:
    """Return the fields by which readers know a period, with the value that says what the lists say; 0: none does.

    A field is left out that may be missing, as its readers take the right period without it.
    """
    found: dict[str, int] = {}
    for reader in READERS.get(model_type, ()):
        if isinstance(reader, Period) and isinstance(reader.period, str):
            flags = _flags(reader.field, fields.get(reader.field), depth)
            period = _fit(reader, flags)
            if any(flags) and (fields.get(reader.period) or reader.default) != period:
                found[reader.period] = period
    return found


def _misreadings(model_type: str, fields: Mapping[str, Any], sources: Sources) -> Iterator[tuple[str, bool]]:
    """Yield warnings, and whether the reader reads the base rightly."""
    for reader in READERS.get(model_type, ()):
        if isinstance(reader, Depth):
            if (sources.depth == reader.depth) != (len(sources) == reader.depth):
                yield _misread_depth(model_type, reader, sources), True
            continue
        before = _flags(reader.field, fields.get(reader.field), sources.depth)
        after = [before[layer] for layer in sources.layers] if before else []
        if reader.field == "layer_types" and len(set(before)) < 2:
            continue  # sliding windows that are not used, or used alike
        right = not before or not _wrong(reader, before)
        if wrong := _wrong(reader, after):
            period = _fit(reader, before) if right else 0
            yield _misread_period(model_type, reader, period, wrong, len(after)), right


def _misread_depth(model_type: str, reader: Depth, sources: Sources) -> str:
    return (
        f"{reader.name} gives {model_type} models of {reader.depth} layers, and no others, their own {reader.own}: it "
        f"would misread this one with {len(sources)} layers"
    )


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


def _wrong(reader: Period, flags: list[bool]) -> list[int]:
    """Return the layers that a reader takes for another kind; all where it has no number that would do."""
    period = _fit(reader, flags)
    if not period:
        return list(range(len(flags)))
    return [layer for layer, flag in enumerate(_guessed(reader, period, len(flags))) if flag != flags[layer]]


def _fit(reader: Period, flags: list[bool]) -> int:
    """Return the period a reader goes by: a fixed one, or the one that fits; 0 where none does."""
    if isinstance(reader.period, int):
        return reader.period
    periods = range(1, len(flags) + 1)
    return next((period for period in periods if _guessed(reader, period, len(flags)) == flags), 0)


def _guessed(reader: Period, period: int, layers: int) -> list[bool]:
    end = layers // period * period if reader.whole else layers
    return [(layer + 1) % period == 0 or layer >= end for layer in range(layers)]


def _flags(key: str, value: Any, depth: int) -> list[bool]:
    """Return for each layer whether it is of the kind that comes once in a period; nothing where no list says so."""
    if not isinstance(value, list):
        return []
    if FIELDS[key] == "indices":
        return [layer in value for layer in range(depth)]
    return [kind == EACH[key] for kind in value] if len(value) == depth else []
