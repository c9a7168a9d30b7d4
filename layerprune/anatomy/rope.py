"""The rotary embedding under the names that readers of older configs look for.

transformers 5 writes ``rope_parameters``; transformers 4 and mlx-lm read ``rope_theta``, ``rope_scaling`` and
``partial_rotary_factor`` at the top level and take their own default where these are missing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from layerprune.anatomy.reread import reread

if TYPE_CHECKING:
    from transformers import PretrainedConfig

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


def mirrored(config: PretrainedConfig) -> Fields | None:
    """Return the older fields that say what ``rope_parameters`` of a decoder config says, {} where it says nothing.

    None where the older fields cannot say it, or transformers would read the config otherwise with them.
    """
    fields = config.to_dict()
    parameters = fields.get("rope_parameters")
    if not isinstance(parameters, dict) or not parameters:
        return {}
    names, plain = NAMES.get(config.model_type, Names()), Names()
    if _nested(parameters):
        if config.model_type not in NAMES:
            return {}  # a type that no reader of the older names knows
        found = _by_kind(parameters, names)
    else:
        found = _flat(parameters, plain if names.sliding_theta else names, fields)
    if found is None:
        return None
    given = {key: value for key, value in found.items() if value is not None}
    return next((fits for fits in (found, given) if _read_alike(type(config), fields, fits)), None)


def unsaid(model_type: str) -> str:
    """Return the warning for a model whose rotary embedding the older fields cannot say."""
    return (
        f"the rotary embedding of this {model_type} model stands in rope_parameters of config.json and cannot be said "
        "in the fields that transformers 4 and mlx-lm read (rope_theta, rope_scaling): they would misread the result, "
        "as they misread the base"
    )


def _nested(parameters: Fields) -> bool:
    return any(isinstance(value, dict) for value in parameters.values())


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
    before, after = reread(kind, fields), reread(kind, {**fields, **found})
    if before is None or after is None:
        return False
    before, after = _without_type(before), _without_type(after)
    return {key: value for key, value in after.items() if key in before or key not in found} == before


def _without_type(fields: Fields) -> Fields:
    """Drop ``type``, the older name of ``rope_type``, which says nothing more."""
    parameters = fields.get("rope_parameters") or {}
    by_kind = {key: _dropped(value) if isinstance(value, dict) else value for key, value in parameters.items()}
    return {**fields, "rope_parameters": _dropped(by_kind)}


def _dropped(parameters: Fields) -> Fields:
    return {key: value for key, value in parameters.items() if key != "type"}
