"""Rules of a quantisation config: which modules each one speaks of, before a removal and after it.

Methods name modules by path, by the end of a path or by a pattern over it, so that a rule left as it is may come to
speak of other layers. Each rule is tried on every module of the base and on the names these have in the result: it has
to match the same ones. One that does not is rewritten, left out where it speaks of removed modules alone, or refused.
"""

from __future__ import annotations

import fnmatch
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import repeat
from typing import Any

from layerprune.architecture import LayerMap
from layerprune.errors import RefusedError

Names = Mapping[str, str | None]  # module or tensor of the base -> its name in the result, None where it is gone
FIELDS = ("quantization_config", "compression_config", "quantization")  # of config.json; the last is MLX's
Match = Callable[[str, str], bool]  # of a rule and a name


def _exact(rule: str, name: str) -> bool:
    return rule == name


def _found(match: Callable[[str, str], object], rule: str, name: str) -> bool:
    try:
        return match(rule, name) is not None
    except re.error:
        return False


def _skipped(rule: str, name: str) -> bool:
    """As transformers.quantizers.quantizers_utils.should_convert_module: up to a dot, as a pattern, or an end."""
    return name.endswith(rule) or _found(re.match, rf"(?:{rule})(?:(?<=\.)|(?=\.|$))", name)


def _compressed(rule: str, name: str) -> bool:
    """As compressed_tensors.utils.match.match_name."""
    return _found(re.match, rule[3:], name) if rule.startswith("re:") else rule == name


def _dynamic(rule: str, name: str) -> bool:
    """As GPTQModel's dynamic_get; "-:" leaves out what it matches."""
    return _found(re.match, rule[2:] if rule[:2] in ("+:", "-:") else rule, name)


def _torchao(rule: str, name: str) -> bool:
    """As transformers.integrations.torchao."""
    return _found(re.fullmatch, rule[3:], name) if rule.startswith("re:") else rule == name


def _searched(rule: str, name: str) -> bool:
    return _found(re.search, rule, name)


def _fullmatched(rule: str, name: str) -> bool:
    return _found(re.fullmatch, rule, name)


def _globbed(rule: str, name: str) -> bool:
    return fnmatch.fnmatchcase(name, rule)


def _shape_of(rule: str, name: str) -> bool:
    """SpQR names a module, a tensor of it and ``shape``."""
    return rule.rsplit(".", 2)[0] == name


# How the field that a rule stands in is read; where readers differ, by each of them.
MATCHES: dict[str, tuple[Match, ...]] = {
    **dict.fromkeys(
        ("modules_to_not_convert", "llm_int8_skip_modules", "linear_weights_not_to_quantize", "ignored_layers"),
        (_skipped,),
    ),
    **dict.fromkeys(("ignore", "targets"), (_compressed, _globbed)),  # the latter: ModelOpt
    "dynamic": (_dynamic,),
    **dict.fromkeys(("module_fqn_to_config", "fqn_to_config"), (_torchao,)),
    **dict.fromkeys(("extra_config", "layer_config"), (_exact, _searched, _fullmatched)),  # AutoRound: vLLM, SGLang
    **dict.fromkeys(("exclude", "exclude_modules", "layer_quant_config"), (_globbed, _compressed)),  # Quark, ModelOpt
    **dict.fromkeys(("config_for_layers", "tune_metadata", "quantized_layers"), (_exact,)),  # VPTQ, HIGGS, ModelOpt
    "shapes": (_shape_of,),
}
EVERY = (_skipped, _compressed, _dynamic, _torchao, _searched, _globbed)  # of a field that is not known
ALWAYS_PATTERNS = {"dynamic", "extra_config", "layer_config"}  # where a full name is read as a pattern, too
TELLING = re.compile(r"[\d.*?+\[\]()\\|]")  # without any of these a rule cannot tell one layer from another
FIGURES = re.compile(r"[\d.]*")
LITERAL = re.compile(r"(?<![\w{,\\])\d+(?![\w}])")
BETWEEN_DOTS = re.compile(r"(\\?\.)(?![*+?])")
FUSED = {"q_proj": "qkv_proj", "gate_proj": "gate_up_proj"}  # names that vLLM's fused modules have beside their parts


def in_memory(names: Iterable[str], stack: str, sources: LayerMap) -> Iterator[tuple[str, str | None]]:
    """Yield weights, named as in memory, with their names in the result, None where they are gone."""
    for name in names:
        layer, _, rest = name[len(stack) + 1 :].partition(".") if name.startswith(f"{stack}.") else ("", "", "")
        if not layer:
            yield name, name
        else:
            kept = int(layer) in sources.layers
            yield name, f"{stack}.{sources.layers.index(int(layer))}.{rest}" if kept else None


def module_names(pairs: Iterable[tuple[str, str | None]]) -> Names:
    """Return the names of weights and of all modules they stand in, from weights of the base and of the result."""
    found: dict[str, set[str | None]] = defaultdict(set)
    for old, new in pairs:
        for name, other in zip(_paths(old), repeat(None) if new is None else _paths(new), strict=False):
            found[name].add(other)
    for name, others in found.items():
        if name in others and not any(part.isdigit() for part in name.split(".")):
            others.discard(None)  # the stack, and what it stands in
    return {name: next(iter(others)) for name, others in found.items() if len(others) == 1}


def _paths(name: str) -> list[str]:
    """Return a name, every name it stands under, and those of the modules that fuse it with others."""
    parts = name.split(".")
    found = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
    fused = [FUSED.get(part, part) for part in parts]
    return found + ([".".join(fused[:end]) for end in range(len(parts), 0, -1)] if fused != parts else [])


def rewriter(textual: Callable[[Any], Any], sources: LayerMap, names: Names) -> Callable[[Any], Any]:
    """Return a function that rewrites the rules in JSON content, keys and values, for the result.

    ``textual`` renumbers paths in a string that are written out; it raises ``RefusedError`` or returns None for one
    that is to go. ``RefusedError`` names the rule that cannot be made to match the same modules.
    """

    def rule(value: str, place: str) -> str | None:
        if not TELLING.search(value) or (place not in MATCHES and FIGURES.fullmatch(value)):
            return value
        if value in names and place not in ALWAYS_PATTERNS:
            return names[value]
        if "," in value and all(part.strip() in names for part in value.split(",")):  # AutoRound's blocks
            return ",".join(new for part in value.split(",") if (new := names[part.strip()]))
        matches = MATCHES.get(place, EVERY)
        kept = [(new, _hits(matches, value, old)) for old, new in names.items() if new is not None]
        if not any(any(hits) for _, hits in kept):
            gone = any(any(_hits(matches, value, old)) for old, new in names.items() if new is None)
            return None if gone else _renumbered(value)
        for other in _others(value, textual, sources):
            if all(_hits(matches, other, new) == hits for new, hits in kept):
                return other
        where = next(new for new, hits in kept if _hits(matches, value, new) != hits)
        raise RefusedError(
            f"the quantisation config's rule {value!r} ({place or 'unnamed'}) would speak of other modules without "
            f"these layers, {where!r} for one, and cannot be rewritten; list the modules one by one"
        )

    def _renumbered(value: str) -> str | None:
        new: str | None = textual(value)
        return new

    def rewritten(value: Any, place: str = "") -> Any:
        if isinstance(value, str):
            return rule(value, place)
        if isinstance(value, list):
            entries = [(entry, rewritten(entry, place)) for entry in value]
            return [new for old, new in entries if new is not None or old is None]
        if isinstance(value, dict):
            pairs = [(rule(key, place), rewritten(entry, key)) for key, entry in value.items()]
            return {key: entry for key, entry in pairs if key is not None}
        return value

    return rewritten


def _hits(matches: tuple[Match, ...], rule: str, name: str) -> tuple[bool, ...]:
    return tuple(match(rule, name) for match in matches)


def _others(value: str, textual: Callable[[Any], Any], sources: LayerMap) -> Iterator[str]:
    """Yield what a rule might be in the result: as it is, by its paths, with other numbers, with layers listed."""
    yield value
    try:
        new = textual(value)
    except RefusedError:
        new = None
    if new is not None:
        yield new
    found = list(LITERAL.finditer(value))
    for chosen in ([found] if len(found) > 1 else []) + [[one] for one in found]:
        yield _with_numbers(value, chosen, sources.layers)
    pieces = BETWEEN_DOTS.split(value)
    for index, piece in enumerate(pieces):
        if listed := _listed(piece, sources.layers, open_end=index == len(pieces) - 1):
            yield "".join([*pieces[:index], listed, *pieces[index + 1 :]])


def _with_numbers(value: str, chosen: list[re.Match[str]], origin: tuple[int, ...]) -> str:
    """Return a rule with numbers of layers replaced by their new ones; those of removed ones by what never matches."""
    for one in reversed(chosen):
        layer = int(one[0])
        new = str(origin.index(layer)) if layer in origin else "(?!)"
        value = value[: one.start()] + new + value[one.end() :]
    return value


def _listed(piece: str, origin: tuple[int, ...], *, open_end: bool) -> str:
    """Return a pattern over layer numbers, such as ``[0-3]``, as the list of their new numbers; empty for others.

    With an open end it is the end of a rule: ``1`` there begins 10, too.
    """
    pattern = rf"{piece}\d*" if open_end else piece
    new = [str(place) for place, layer in enumerate(origin) if _fullmatched(pattern, str(layer))]
    return f"(?:{'|'.join(new)})" + (r"(?!\d)" if open_end else "") if new else ""
