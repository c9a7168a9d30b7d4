"""The pruned model in memory, built as a user would load it, on the base's own weights: for timing it before export."""

from __future__ import annotations

from pathlib import Path

from layerprune.anatomy import Sources, read_anatomy
from layerprune.exporter.configs import read_json, rebuilt
from layerprune.exporter.twin import hand_over
from layerprune.removal import Removal
from layerprune.subject import Subject


def sharing_weights(subject: Subject, folder: Path, removal: Removal, *, trust_remote_code: bool = False) -> Subject:
    """Return the model that ``export`` would write, without a copy of any weight; ``folder`` is the base's.

    Raises ``RefusedError`` or ``ExportError`` where it cannot be built so.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    base, anatomy = subject.model, subject.anatomy
    config = rebuilt(base.config, anatomy.prune_config(read_json(folder / "config.json"), removal))
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(
            config,
            dtype=subject.dtype,
            attn_implementation=base.config._attn_implementation,
            trust_remote_code=trust_remote_code,
        )
    hand_over(base, model, anatomy.stack, Sources.after(removal, anatomy.depth), share=True)
    model.to(subject.device).eval()  # buffers; the weights are there already
    return Subject(model, subject.tokenizer, read_anatomy(config, trust_remote_code=trust_remote_code), subject.ref)
