"""LoRA by peft: small matrices beside frozen weights, merged into them at the end and kept as an adapter, too."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from layerprune.checkpoint import Checkpoint
from layerprune.errors import RefusedError
from layerprune.healing.base import Case, Changed
from layerprune.healing.goals import NextToken
from layerprune.healing.names import Stored, names_on_disk, read_tensor, stored_as
from layerprune.healing.places import in_mlp, projections
from layerprune.healing.processes import leads
from layerprune.healing.trained import Trained, option, ready, run
from layerprune.healing.training import make_trainable
from layerprune.output import writing
from layerprune.subject import Subject

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

ADAPTER = "adapter"  # folder of the adapter, inside the healed checkpoint's documents


@dataclass(frozen=True)
class Lora(Trained):
    """Train low-rank updates of every linear map in attention and MLP on the text (peft), and merge them."""

    lr: float = option(1e-3, "learning rate, at its height")
    rank: int = option(16, "rank of the updates")
    alpha: float = option(32.0, "an update is scaled by alpha / rank")
    dropout: float = option(0.0, "share of an adapter's inputs that is left out while training")

    needs_base: ClassVar[bool] = False
    cost: ClassVar[str] = "a forward pass and most of a backward pass over the text; little memory beyond the model"
    source: ClassVar[str] = "LoRA, arXiv:2106.09685; peft"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise ValueError("rank is at least 1, alpha above 0, dropout from 0 to below 1")

    def heal(self, case: Case) -> Iterator[Changed]:
        """Yield the merged weights; the adapter itself is attached, for peft to load on the unhealed checkpoint."""
        subject, precision = ready(case)
        targets = projections(subject)
        if not in_mlp(subject, targets):
            why = "no linear map of an MLP was found, or its experts are fused"
            case.record.notes.append(f"adapters went on the attention alone: {why}")
        weights = [f"{target}.weight" for target in targets]
        stored = names_on_disk(subject.model, Checkpoint.open(case.folder), weights)
        make_trainable(subject.model, set(), torch.bfloat16 if precision == "bfloat16" else None)
        adapted = with_adapter(subject, targets, self.config(targets, subject, case.name), case.seed)
        case.record.found["trained"] = sum(w.numel() for w in adapted.parameters() if w.requires_grad)
        run(case, subject, NextToken(), self.training(case, subject, precision))
        if leads():
            save_adapter(adapted, case.attachments / ADAPTER)
        yield from merged(adapted, targets, stored, case)

    def config(self, targets: tuple[str, ...], subject: Subject, base: str) -> LoraConfig:
        """Return peft's account of the adapter; ``base`` is what it says it belongs to."""
        from peft import LoraConfig
        from transformers.pytorch_utils import Conv1D

        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # peft divides it; it need not be whole
            lora_dropout=self.dropout,
            target_modules=list(targets),
            fan_in_fan_out=isinstance(subject.model.get_submodule(targets[0]), Conv1D),
            task_type="CAUSAL_LM",
            base_model_name_or_path=base,
        )


def with_adapter(subject: Subject, targets: tuple[str, ...], config: LoraConfig, seed: int) -> PeftModel:
    """Put fresh adapters, which change nothing yet, into the subject's model; peft's wrapper around it is returned."""
    from peft import get_peft_model

    base = config.base_model_name_or_path
    torch.manual_seed(seed)  # peft draws one half of every adapter
    adapted = get_peft_model(subject.model, config)
    config.base_model_name_or_path = base  # peft puts the folder here that the model was read from
    names = [name for name, weight in subject.model.named_parameters() if weight.requires_grad]
    stray = sorted({name.partition(".lora_")[0] for name in names} - set(targets))
    if stray:  # it would be trained and never merged
        raise RefusedError(
            f"peft puts an adapter on {stray[0]}, which was not asked for; use partial, seams or distill"
        )
    return adapted


def save_adapter(adapted: PeftModel, folder: Path) -> None:
    """Write what ``PeftModel.from_pretrained`` reads, without the card peft would add, which names local paths."""
    from peft import get_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    weights = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    config = copy.copy(adapted.peft_config["default"])
    config.inference_mode = True
    with writing(folder, SafetensorError):
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / "adapter_model.safetensors")
        config.save_pretrained(str(folder))


def merged(adapted: PeftModel, targets: tuple[str, ...], stored: Stored, case: Case) -> Iterator[Changed]:
    """Yield each adapted weight with its update added in float32, one at a time, from the weight as it is stored."""
    checkpoint = Checkpoint.open(case.folder)
    model = adapted.get_base_model()
    for target in targets:
        names = stored[f"{target}.weight"]
        layer: Any = model.get_submodule(target)
        with torch.no_grad():
            update = layer.get_delta_weight("default").float().cpu()
            value = read_tensor(checkpoint, names[0]).float() + update
        yield from stored_as(names, value)
