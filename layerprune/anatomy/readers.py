"""Readers other than transformers that guess at a model, and would guess wrong after a removal.

Seen in llama.cpp and vLLM 0.33. They take a kind of layer to repeat with a fixed period where config.json has a list,
or know a model by its depth alone. Where a base's lists do not repeat as a reader thinks, it misreads the base already
and nothing is said. (vLLM also wants ``max_window_layers`` of Qwen 2 to be the depth; a removal keeps that as it is.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from layerprune.anatomy.fields import FIELDS
from layerprune.anatomy.sources import Sources


@dataclass(frozen=True)
class Period:
    """One guess: what a field says of each layer repeats every so many layers."""

    name: str
    field: str  # of fields.FIELDS: a list of one entry per layer, or of the layers that something applies to
    period: int | str  # or the name of the field that says so


@dataclass(frozen=True)
class Depth:
    """One guess: a model of so many layers, and no other, is a certain one, which has something of its own."""

    name: str
    depth: int
    own: str


_LLAMA4 = (
    Period("llama.cpp", "no_rope_layers", 4),
    Period("llama.cpp", "moe_layers", "interleave_moe_layer_step"),
    Period("vLLM", "moe_layers", "interleave_moe_layer_step"),
)
_GEMMA3 = (Period("llama.cpp", "layer_types", 6), Depth("llama.cpp", 62, "scale of attention (that of the 27B)"))

READERS: dict[str, tuple[Period | Depth, ...]] = {
    "cohere2": (Period("llama.cpp", "layer_types", 4),),
    "exaone4": (Depth("llama.cpp", 64, "sliding windows (those of the 32B)"),),
    "exaone_moe": (Period("llama.cpp", "layer_types", 4),),
    "gemma2": (
        Period("llama.cpp", "layer_types", 2),
        Depth("llama.cpp", 46, "scale of attention (that of the 27B)"),
    ),
    "gemma3": _GEMMA3,
    "gemma3_text": _GEMMA3,
    "gpt_oss": (Period("llama.cpp", "layer_types", 2), Period("vLLM", "layer_types", 2)),
    "llama4": _LLAMA4,
    "llama4_text": _LLAMA4,
    "olmo3": (Period("llama.cpp", "layer_types", 4),),
    "smollm3": (Period("llama.cpp", "no_rope_layers", 4),),
}


def misread(model_type: str, fields: Mapping[str, Any], sources: Sources) -> tuple[str, ...]:
    """Return a warning for each reader that reads the base rightly and would take the result for another model."""
    warnings = []
    for reader in READERS.get(model_type, ()):
        tell = _misread_depth if isinstance(reader, Depth) else _misread_period
        warnings.append(tell(model_type, reader, fields, sources))  # type: ignore[arg-type]
    return tuple(filter(None, warnings))


def _misread_depth(model_type: str, reader: Depth, fields: Mapping[str, Any], sources: Sources) -> str:
    if (sources.depth == reader.depth) == (len(sources) == reader.depth):
        return ""
    return (
        f"{reader.name} gives {model_type} models of {reader.depth} layers, and no others, their own {reader.own}: it "
        f"would misread this one with {len(sources)} layers"
    )


def _misread_period(model_type: str, reader: Period, fields: Mapping[str, Any], sources: Sources) -> str:
    kinds = _kinds(reader.field, fields.get(reader.field), sources.depth)
    period = fields.get(reader.period) if isinstance(reader.period, str) else reader.period
    if not kinds or not period or any(kind != kinds[layer % period] for layer, kind in enumerate(kinds)):
        return ""
    origin = sources.of(FIELDS[reader.field].half)
    wrong = [new for new, layer in enumerate(origin) if kinds[layer] != kinds[new % period]]
    if not wrong:
        return ""
    return (
        f"{reader.name} takes {reader.field} of {model_type} to repeat every {period} layers and would misread "
        f"{len(wrong)} of the {len(sources)} layers, layer {wrong[0]} first; keep the period for it"
    )


def _kinds(key: str, value: Any, depth: int) -> list[Any]:
    """Return what a field says of each layer; nothing where it does not."""
    if not isinstance(value, list):
        return []
    if FIELDS[key].kind == "indices":
        return [layer in value for layer in range(depth)]
    return value if len(value) == depth else []
