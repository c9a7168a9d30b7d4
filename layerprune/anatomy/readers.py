"""Readers other than transformers that guess a layer's kind from its number, and would guess wrong after a removal.

Seen in llama.cpp and vLLM 0.33: they take a kind of layer to repeat with a fixed period, where config.json has a list.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from layerprune.anatomy.sources import Sources


@dataclass(frozen=True)
class Reader:
    """One guess: the field says what kind each layer is; the reader takes it to repeat every ``period`` layers."""

    name: str
    field: str
    period: int


READERS: dict[str, tuple[Reader, ...]] = {
    "cohere2": (Reader("llama.cpp", "layer_types", 4),),
    "gemma2": (Reader("llama.cpp", "layer_types", 2),),
    "gemma3": (Reader("llama.cpp", "layer_types", 6),),
    "gemma3_text": (Reader("llama.cpp", "layer_types", 6),),
    "gpt_oss": (Reader("llama.cpp", "layer_types", 2), Reader("vLLM", "layer_types", 2)),
    "llama4": (Reader("llama.cpp", "no_rope_layers", 4), Reader("vLLM", "no_rope_layers", 4)),
    "llama4_text": (Reader("llama.cpp", "no_rope_layers", 4), Reader("vLLM", "no_rope_layers", 4)),
    "smollm3": (Reader("llama.cpp", "no_rope_layers", 4),),
}


def misread(model_type: str, fields: Mapping[str, Any], sources: Sources) -> tuple[str, ...]:
    """Return a warning for each reader that reads the base rightly and would take the result for another model."""
    warnings = []
    for reader in READERS.get(model_type, ()):
        kinds = fields.get(reader.field)
        if not isinstance(kinds, list) or len(kinds) != sources.depth:
            continue
        wrong = [new for new, layer in enumerate(sources.attention) if kinds[layer] != kinds[new % reader.period]]
        if wrong and _repeats(kinds, reader.period):
            warnings.append(
                f"{reader.name} takes {reader.field} of {model_type} to repeat every {reader.period} layers and would "
                f"misread {len(wrong)} of the {len(sources)} layers, layer {wrong[0]} first; keep the period for it"
            )
    return tuple(warnings)


def _repeats(kinds: list[Any], period: int) -> bool:
    return all(kind == kinds[layer % period] for layer, kind in enumerate(kinds))
