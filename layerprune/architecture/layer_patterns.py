"""Fields that say by one number or word what a list says of each layer: intervals, steps, patterns.

Which fields these are is asked of the config class: with its lists left out, a class derives them from such a field.
Where a list stands beside the field, transformers goes by the list and other readers by the field, so that after a
removal the two have to agree.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from layerprune.architecture.config_fields import ALSO_DEPTH, DEPTH_KEYS, FIELDS, KINDS, MTP_KEYS, per_layer, repeating
from layerprune.architecture.stack import reread

if TYPE_CHECKING:
    from transformers import PretrainedConfig


Fields = dict[str, Any]
DEEPER = 4  # times the depth
# Numbers that lists follow from, too, and that have their own rules in fields.edits.
NO_PATTERN = {*FIELDS, *DEPTH_KEYS, *ALSO_DEPTH, *MTP_KEYS}
Lists = dict[str, list[Any]]


def lists_of(fields: Mapping[str, Any]) -> Lists:
    """Return the fields that say something of each layer by a list."""
    return {key: fields[key] for key in KINDS["list"] + KINDS["indices"] if isinstance(fields.get(key), list)}


def derived(kind: type[PretrainedConfig], fields: Fields) -> Lists:
    """Return the lists that a config class makes of the other fields; none where it does not accept them."""
    bare = {key: value for key, value in fields.items() if not (key in FIELDS and isinstance(value, list))}
    return lists_of(reread(kind, bare) or {})


def consistent_patterns(kind: type[PretrainedConfig], before: Fields, after: Fields) -> Fields:
    """Return a config's fields with patterns that agree with the lists beside them.

    ``before`` are the fields of the base, ``after`` those of the result with its lists. A pattern that still holds is
    kept; one that does not is given the value that does, and is left out where there is none.
    """
    wanted, remade = lists_of(reread(kind, after) or after), derived(kind, after)
    differing = [name for name in lists_of(after) if name in wanted and remade.get(name) != wanted[name]]
    for name, governors in governing_fields(kind, before, differing).items():
        if derived(kind, after).get(name) != wanted[name]:
            present = [key for key in governors if key in after]
            after = _agreeing(kind, before, after, name, wanted[name], present)
    for alias in [key for key in after if key.startswith("_") and key.lstrip("_") not in after]:
        plain = {alias: alias.lstrip("_")}
        renamed = consistent_patterns(kind, _renamed(before, plain), _renamed(after, plain))
        after = _renamed(renamed, {alias.lstrip("_"): alias})
    return after


def _renamed(fields: Fields, names: dict[str, str]) -> Fields:
    return {names.get(key, key): value for key, value in fields.items()}


def governing_fields(kind: type[PretrainedConfig], fields: Fields, lists: Sequence[str]) -> dict[str, list[str]]:
    """Return which fields a list follows from, by name of the list; tried out: other values give another list.

    A stack deeper than the model's is asked about, where every pattern shows. A size that fills a list is no pattern.
    """
    if not lists:
        return {}
    deep = {**fields, **{key: DEEPER * fields[key] for key in DEPTH_KEYS if isinstance(fields.get(key), int)}}
    own, found = derived(kind, deep), dict[str, list[str]]()
    for key, value in deep.items():
        if key in NO_PATTERN or isinstance(value, bool) or not isinstance(value, int | str):
            continue
        others = (value + 1, value - 1, value + 2) if isinstance(value, int) else (2, 3)
        tried = [{**deep, key: other} for other in others]
        if isinstance(value, str):
            tried.append({other: kept for other, kept in deep.items() if other != key})
        made = [own, *(derived(kind, fields) for fields in tried)]
        for name in lists:
            seen = [each[name] for each in made if name in each]
            if any(one != seen[0] for one in seen) and any(one.count(one[0]) < len(one) for one in seen if one):
                found.setdefault(name, []).append(key)
    return found


def _agreeing(
    kind: type[PretrainedConfig], before: Fields, after: Fields, name: str, wanted: list[Any], governors: list[str]
) -> Fields:
    """Return the fields with the patterns behind one list given another value, or left out."""
    known = {**derived(kind, before), **lists_of(reread(kind, before) or {})}.get(name, [])
    for key in governors:
        if word := _spelled(before.get(key), known, wanted):
            return {**after, key: word}
        for value in range(1, len(wanted) + 1):
            if isinstance(after[key], int) and derived(kind, {**after, key: value}).get(name) == wanted:
                return {**after, key: value}
    return {key: value for key, value in after.items() if key not in governors}


def _spelled(word: Any, known: list[Any], wanted: list[Any]) -> str:
    """Return ``wanted`` in the letters that ``word``, repeated over the stack, says ``known`` in, as short as can be.

    Such words are "LLLG" (EXAONE 4) and "FSSS" (the indexers of GLM). Empty where ``word`` is not one of them.
    """
    if not isinstance(word, str) or not word:
        return ""
    pairs = {(kind, word[layer % len(word)]) for layer, kind in enumerate(known)}
    letters = dict(pairs)
    if not len(letters) == len(pairs) == len(set(letters.values())) or not letters.keys() >= set(wanted):
        return ""
    spelled = "".join(letters[kind] for kind in wanted)
    return spelled if len(word) == len(known) else spelled[: repeats(spelled) or len(spelled)]


def repeats(kinds: Sequence[Any]) -> int:
    """Return after how many entries a sequence repeats, seen at least twice over; 0 where it does not."""
    for period in range(1, len(kinds) // 2 + 1):
        if all(kind == kinds[layer % period] for layer, kind in enumerate(kinds)):
            return period
    return 0


@dataclass(frozen=True)
class LayerPeriod:
    """How a list of one entry per layer repeats in the base."""

    name: str
    kinds: tuple[Any, ...]
    period: int  # 0: not seen twice over, but the config class repeats so
    follows: bool  # whether it is what the config class makes of the depth

    def kept(self, new: Sequence[Any], remade: Lists) -> bool:
        """Whether the list of the result repeats in the same way, or as the config class would have it."""
        again = [self.kinds[layer % self.period] for layer in range(len(new))] if self.period else None
        return list(new) == again or (self.follows and list(new) == per_layer(remade, self.name, len(new)))


def layer_periods(kind: type[PretrainedConfig], fields: Fields, depth: int) -> tuple[LayerPeriod, ...]:
    """Return what repeats from layer to layer in a config; lists that say the same of all layers do not."""
    own = derived(kind, fields)
    deep = derived(kind, {**fields, **{key: 2 * DEEPER * depth for key in DEPTH_KEYS if fields.get(key) == depth}})
    found = []
    for name in lists_of(fields):
        kinds = per_layer(fields, name, depth)
        far = per_layer(deep, name, 2 * DEEPER * depth)[DEEPER * depth :]
        follows = bool(kinds) and kinds == per_layer(own, name, depth) and any(kind != far[0] for kind in far)
        found.append(LayerPeriod(name, tuple(kinds), repeats(kinds), follows))
    steps = repeating(fields, depth).items()
    found += [LayerPeriod(name, tuple(kinds), repeats(kinds), follows=False) for name, kinds in steps]
    return tuple(it for it in found if it.period > 1 or (it.period == 0 and it.follows))
