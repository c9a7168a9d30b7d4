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
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from operator import eq
from typing import Any

from layerprune.errors import RefusedError
from layerprune.removal import LayerMap

Names = Mapping[str, str | None]  # module or tensor of the base -> its name in the result, None where it is gone
Match = Callable[[str, str], bool]  # of a rule and a name


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


_searched = partial(_found, re.search)
_fullmatched = partial(_found, re.fullmatch)


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
    **dict.fromkeys(("extra_config", "layer_config"), (eq, _searched, _fullmatched)),  # AutoRound: vLLM, SGLang
    **dict.fromkeys(("exclude", "exclude_modules", "layer_quant_config"), (_globbed, _compressed)),  # Quark, ModelOpt
    **dict.fromkeys(("config_for_layers", "tune_metadata", "quantized_layers"), (eq,)),  # VPTQ, HIGGS, ModelOpt
    "shapes": (_shape_of,),
}
EVERY = (_skipped, _compressed, _dynamic, _torchao, _searched, _globbed)  # of a field that is not known
ALWAYS_PATTERNS = {"dynamic", "extra_config", "layer_config"}  # where a full name is read as a pattern, too
TELLING = re.compile(r"[\d.*?+\[\]()\\|]")  # without any of these a rule cannot tell one layer from another
FIGURES = re.compile(r"[\d.]*")
LITERAL = re.compile(r"(?<![\w{,\\])\d+(?![\w}])")
# Layer numbers that are "any", so that the pattern holds for the pruned stack as it did for the base.
ANY_NUMBER = re.compile(r"\\\.?(\\d|\[0-9\])[+*]|\.(\\d|\[0-9\]|\()[+*d.]")
BETWEEN_DOTS = re.compile(r"(\\?\.)(?![*+?])")
FUSED = {"q_proj": "qkv_proj", "gate_proj": "gate_up_proj"}  # names that vLLM's fused modules have beside their parts


def module_names(pairs: Iterable[tuple[str, str | None]]) -> Names:
    """Return the names of weights and of all modules they stand in, from weights of the base and of the result."""
    found: dict[str, set[str | None]] = defaultdict(set)
    for old, new in pairs:
        for name, other in zip(_paths(old), repeat(None) if new is None else _paths(new), strict=False):
            found[name].add(other)
    for name, others in found.items():
        if name in others and not any(part.isdecimal() for part in name.split(".")):
            others.discard(None)  # the stack, and what it stands in
    return {name: next(iter(others)) for name, others in found.items() if len(others) == 1}


def _paths(name: str) -> list[str]:
    """Return a name, every name it stands under, and those of the modules that fuse it with others."""
    parts = name.split(".")
    found = [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
    fused = [FUSED.get(part, part) for part in parts]
    return found + ([".".join(fused[:end]) for end in range(len(parts), 0, -1)] if fused != parts else [])


@dataclass(frozen=True)
class RuleRewriter:
    """Rewrites the rules of a quantisation config for the pruned model."""

    stack: str  # path of the decoder stack, as rules name it
    sources: LayerMap
    names: Names

    def rewritten(self, content: Any, place: str = "") -> Any:
        """Rewrite the rules in JSON content, keys and values; ``place`` is the field that holds it.

        Rules of removed modules alone are left out. ``RefusedError`` names the rule that cannot be made to match the
        same modules.
        """
        if isinstance(content, str):
            return self._rule(content, place)
        if isinstance(content, list):
            entries = [(entry, self.rewritten(entry, place)) for entry in content]
            return [new for old, new in entries if new is not None or old is None]
        if isinstance(content, dict):
            pairs = [(self._rule(key, place), self.rewritten(entry, key)) for key, entry in content.items()]
            return {key: entry for key, entry in pairs if key is not None}
        return content

    def _rule(self, value: str, place: str) -> str | None:
        if not TELLING.search(value) or (place not in MATCHES and FIGURES.fullmatch(value)):
            return value
        if value in self.names and place not in ALWAYS_PATTERNS:
            return self.names[value]
        if "," in value and all(part.strip() in self.names for part in value.split(",")):  # AutoRound's blocks
            return ",".join(new for part in value.split(",") if (new := self.names[part.strip()]))
        matches = MATCHES.get(place, EVERY)
        kept = [(new, _hits(matches, value, old)) for old, new in self.names.items() if new is not None]
        if not any(any(hits) for _, hits in kept):
            gone = any(any(_hits(matches, value, old)) for old, new in self.names.items() if new is None)
            return None if gone else self.renumbered(value)
        for other in self._others(value):
            if all(_hits(matches, other, new) == hits for new, hits in kept):
                return other
        where = next(new for new, hits in kept if _hits(matches, value, new) != hits)
        raise RefusedError(
            f"the quantisation config's rule {value!r} ({place or 'unnamed'}) would speak of other modules without "
            f"these layers, {where!r} for one, and cannot be rewritten; list the modules one by one"
        )

    def renumbered(self, value: str) -> str | None:
        """Renumber a layer path that is written out; None for one of a removed layer, any other string as it is.

        Understood are paths such as ``model.layers.3.mlp`` and the same as a pattern (``re:model\\.layers\\.3\\..*``).
        A pattern over layer numbers (``layers.[0-3]``) raises ``RefusedError`` naming it.
        """
        last = re.escape(self.stack.rpartition(".")[2])
        if re.search(rf"(?:^|[.:^(*]){last}\\?\.(?:[\[(]|\\d|\d+[-|\[\\(?*+](?!\.))", value):
            if ANY_NUMBER.search(value):
                return value
            raise RefusedError(f"the quantisation config names layers by the pattern {value!r}; list them one by one")
        match = re.fullmatch(rf"((?:^|.*?[.:^(*])?{last}\\?\.)(\d+)((?:\\?\.|$|\$).*)", value, re.DOTALL)
        if match is None:
            return value
        head, layer, tail = match[1], int(match[2]), match[3]
        return f"{head}{self.sources.layers.index(layer)}{tail}" if layer in self.sources.layers else None

    def _others(self, value: str) -> Iterator[str]:
        """Yield what a rule might be in the result: as it is, by its paths, with other numbers, with layers listed."""
        yield value
        with suppress(RefusedError):
            new = self.renumbered(value)
            if new is not None:
                yield new
        found = list(LITERAL.finditer(value))
        for chosen in ([found] if len(found) > 1 else []) + [[one] for one in found]:
            yield _with_numbers(value, chosen, self.sources.layers)
        pieces = BETWEEN_DOTS.split(value)
        for index, piece in enumerate(pieces):
            if listed := _listed(piece, self.sources.layers, open_end=index == len(pieces) - 1):
                yield "".join([*pieces[:index], listed, *pieces[index + 1 :]])


def _hits(matches: tuple[Match, ...], rule: str, name: str) -> tuple[bool, ...]:
    return tuple(match(rule, name) for match in matches)


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
