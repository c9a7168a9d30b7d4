"""Which layers of a model are alike: what is found out of one holds for the others."""

from __future__ import annotations

from torch import nn

from layerprune.subject import Subject


def kinds(subject: Subject) -> list[int]:
    """Return for each layer the last one of its kind: of the same modules, switches and layer type."""
    types = getattr(subject.model.config.get_text_config(decoder=True), "layer_types", None) or []
    listed = types if len(types) == len(subject.layers) else [None] * len(subject.layers)
    built = [(kind, _build(layer)) for kind, layer in zip(listed, subject.layers, strict=True)]
    last = {kind: number for number, kind in enumerate(built)}
    return [last[kind] for kind in built]


def _build(layer: nn.Module) -> tuple[object, ...]:
    """Return the modules of a layer by name, class and size, and their switches.

    Other numbers are left out: they may be the layer's own, such as its index.
    """

    def switches(part: nn.Module) -> list[tuple[str, bool | str]]:
        return sorted((key, value) for key, value in vars(part).items() if isinstance(value, bool | str))

    def sizes(part: nn.Module) -> list[tuple[int, ...]]:
        return [tuple(parameter.shape) for parameter in part.parameters(recurse=False)]

    parts = layer.named_modules()
    return tuple((name, type(part).__name__, *sizes(part), *switches(part)) for name, part in parts)
