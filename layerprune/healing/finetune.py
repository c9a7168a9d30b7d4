"""The methods that fine-tune: LoRA by peft, the head and the last layers, the layers beside the cuts."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from layerprune.checkpoint import Checkpoint
from layerprune.errors import RefusedError, UsageError
from layerprune.files import writing
from layerprune.healing.base import ATTENTION, MLP, Changed, HealContext, Healer, StoredWeights, cuts
from layerprune.healing.losses import NextToken
from layerprune.healing.training import Precision, Training, is_main_process, make_trainable, on_own_device, train
from layerprune.models.model import LoadedModel
from layerprune.models.placement import fast_bfloat16
from layerprune.registry import option
from layerprune.removal import Removal

if TYPE_CHECKING:
    from peft import PeftModel


# What all methods that train have in common: their options, how the model is made ready, what is written down.


# Tokens of one forward pass. Measured on two cores: more is no faster; a GPU wants more.
MICRO_TOKENS = {"cpu": 1024, "cuda": 8192}
RATES, COUNTS = (1e-9, 10.0), (1, 10**7)  # bounds of options
HELDOUT_TOKENS = 8192  # that a measurement on the way reads: it must not cost more than it tells


@dataclass(frozen=True)
class TrainingMethod(Healer):
    """The options of every method that trains."""

    lr: float = option(2e-4, "learning rate, at its height", RATES)
    epochs: float = option(1.0, "how many times the text is read; less than 1: a part of it", (1e-6, 1000))
    steps: int | None = option(None, "how many steps, instead of epochs", COUNTS)
    batch: int = option(4, "windows of a step, over all processes", COUNTS)
    micro: int | None = option(
        None, "windows of one forward pass; none: as many as 1,024 tokens on a CPU, 8,192 else", COUNTS
    )
    warmup: float = option(
        0.05, "share of the steps in which the learning rate rises; then it falls as a cosine", (0, 0.99)
    )
    decay: float = option(0.0, "weight decay", (0, 10))
    clip: float = option(1.0, "largest norm of the gradient", (1e-6, 1e6))
    measures: int = option(5, "how many times the held-out loss is measured on the way", COUNTS)
    patience: int = option(2, "measurements without improvement after which it stops", COUNTS)
    recompute: bool = option(False, "gradient checkpointing: slower, far less memory")

    gradients = True

    def forward_windows(self, case: HealContext, loaded: LoadedModel) -> int:
        """Return how many windows one forward pass takes."""
        tokens = MICRO_TOKENS.get(loaded.device.type, MICRO_TOKENS["cpu"])
        return self.micro or max(1, tokens // case.text.train.window)

    def run(self, case: HealContext, loaded: LoadedModel, goal: NextToken, precision: Precision) -> None:
        """Train what requires a gradient in the loaded model, and write down how it went."""
        text, record = case.text, case.record
        steps = self.steps or max(1, math.ceil(self.epochs * len(text.train) / self.batch))
        training = Training(
            steps=steps,
            lr=self.lr,
            batch=self.batch,
            micro=self.forward_windows(case, loaded),
            warmup=round(self.warmup * steps),
            measures=min(self.measures, steps),
            patience=self.patience,
            clip=self.clip,
            decay=self.decay,
            precision=precision,
            recompute=self.recompute,
            seed=case.seed,
            loaded=f"{self!r} of {loaded.ref.fingerprint}, receipt {case.receipt.sha256()}",
        )
        record.found["trained"] = sum(w.numel() for w in loaded.model.parameters() if w.requires_grad)
        few = replace(text, heldout=text.heldout.spread(max(1, HELDOUT_TOKENS // text.heldout.window)))
        state = train(loaded.model, goal, few, training, case.work / "training", case.progress)
        record.tokens += state.tokens
        record.curve += state.curve
        record.found |= {"steps": state.step, "best_step": state.best_step, "precision": precision}
        record.dtype, record.device = precision, str(loaded.device)
        if state.stopped:
            record.notes.append(f"stopped at step {state.step} of {steps}: the held-out loss no longer fell")


def load_for_training(case: HealContext) -> tuple[LoadedModel, Precision]:
    """Load the unhealed checkpoint for training, and say what its products are made in.

    Weights are loaded as they are stored, so that those that are trained lose nothing. Raises ``UsageError`` for
    float16, which gradients do not fit.
    """
    if case.dtype == "float16":
        raise UsageError("gradients do not fit float16; train in --dtype bfloat16 or float32")
    precision = precision_of(case)
    stored = {tensor.dtype for tensor in Checkpoint.open(case.folder).tensors.values()}
    dtype = "bfloat16" if precision == "bfloat16" and stored <= {"BF16"} else "float32"
    return on_own_device(case).load_model(dtype), precision


def precision_of(case: HealContext) -> Precision:
    """Return what matrix products are made in: as asked, else bfloat16 where it is fast."""
    if case.dtype in ("bfloat16", "float32"):
        return cast(Precision, case.dtype)
    on_gpu = torch.cuda.is_available() and case.device != "cpu"
    return "bfloat16" if on_gpu or fast_bfloat16() else "float32"


# LoRA by peft: small matrices beside frozen weights, merged into them at the end and kept as an adapter, too.


ADAPTER = "adapter"  # folder of the adapter, inside the healed checkpoint's documents


@dataclass(frozen=True)
class Lora(TrainingMethod):
    """Train low-rank updates of every linear map in attention and MLP on the text (peft), and merge them."""

    lr: float = option(1e-3, "learning rate, at its height", RATES)
    rank: int = option(16, "rank of the updates", (1, 10_000))
    alpha: float = option(32.0, "an update is scaled by alpha / rank", (1e-6, 1e6))
    dropout: float = option(0.0, "share of an adapter's inputs that is left out while training", (0, 0.99))

    cost = "a forward pass and most of a backward pass over the text; little memory beyond the model"
    source = "LoRA, arXiv:2106.09685; peft"

    def heal(self, case: HealContext) -> Iterator[Changed]:
        """Yield the merged weights; the adapter itself is attached, for peft to load on the unhealed checkpoint."""
        loaded, precision = load_for_training(case)
        targets = projections(loaded)
        if not in_mlp(targets):
            why = "no linear map of an MLP was found, or its experts are fused"
            case.record.notes.append(f"adapters went on the attention alone: {why}")
        stored = StoredWeights.of(loaded.model, case.folder, [f"{target}.weight" for target in targets])
        make_trainable(loaded.model, set(), precision)
        adapted = self.adapted(loaded, targets, case.name, case.seed)
        self.run(case, loaded, NextToken(), precision)
        if is_main_process():
            save_adapter(adapted, case.attachments / ADAPTER)
        for target in targets:  # one at a time, in float32, from the weight as it is stored
            name, layer = f"{target}.weight", cast(Any, loaded.model.get_submodule(target))
            update = layer.get_delta_weight("default").detach().float().cpu()
            yield from stored.changed(name, stored.read(name).float() + update)

    def adapted(self, loaded: LoadedModel, targets: tuple[str, ...], name: str, seed: int) -> PeftModel:
        """Put fresh adapters, which change nothing yet, into the loaded model; peft's wrapper around it is returned.

        ``name`` is what the adapter says it belongs to.
        """
        from peft import LoraConfig, get_peft_model
        from transformers.pytorch_utils import Conv1D

        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # peft divides it; it need not be whole
            lora_dropout=self.dropout,
            target_modules=list(targets),
            fan_in_fan_out=isinstance(loaded.model.get_submodule(targets[0]), Conv1D),
            task_type="CAUSAL_LM",
        )
        torch.manual_seed(seed)  # peft draws one half of every adapter
        adapted = get_peft_model(loaded.model, config)
        config.base_model_name_or_path = name  # peft puts the folder here that the model was read from
        names = [name for name, weight in loaded.model.named_parameters() if weight.requires_grad]
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
    config = adapted.peft_config["default"]
    config.inference_mode = True
    config.target_modules = sorted(config.target_modules)  # peft holds a set, in an order of this process alone
    with writing(folder, SafetensorError):
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / "adapter_model.safetensors")
        config.save_pretrained(str(folder))


# Fine-tuning of a part of the weights: the head and the last layers, or the layers on either side of the cuts.


@dataclass(frozen=True)
class WeightTraining(TrainingMethod):
    """A method that trains some of the model's own weights, and says which."""

    def heal(self, case: HealContext) -> Iterator[Changed]:
        """Yield the weights that ``weights_to_train`` names, trained on the text."""
        yield from self.fit(case, lambda student: NextToken())

    @abstractmethod
    def weights_to_train(self, case: HealContext, loaded: LoadedModel) -> set[str]:
        """Return the names of the weights to train."""

    def fit(self, case: HealContext, goal: Callable[[LoadedModel], NextToken]) -> Iterator[Changed]:
        """Train the chosen weights towards the goal of the loaded model and yield them under their names on disk."""
        loaded, precision = load_for_training(case)
        weights = make_trainable(loaded.model, self.weights_to_train(case, loaded), precision)
        stored = StoredWeights.of(loaded.model, case.folder, weights)
        self.run(case, loaded, goal(loaded), precision)
        for name, weight in weights.items():
            yield from stored.changed(name, weight.detach())


@dataclass(frozen=True)
class Partial(WeightTraining):
    """Fine-tune the last layers, the final norm and the head on the text; everything before them is only read."""

    layers: int = option(3, "how many of the last layers", (0, 10_000))
    head: bool = option(True, "the output embeddings too, where tied the input's with them, and the final norm")

    cost = "a forward pass of everything and a backward pass of the part, over the text"
    source = "Reassessing Layer Pruning in LLMs, arXiv:2411.15558"

    def weights_to_train(self, case: HealContext, loaded: LoadedModel) -> set[str]:
        depth = len(loaded.layers)
        if not 0 <= self.layers <= depth:
            raise UsageError(f"the last {self.layers} layers were asked for and the model has {depth}")
        names = weights_of(loaded, loaded.layers[depth - self.layers :])
        return names | head_weights(loaded) if self.head else names


@dataclass(frozen=True)
class Seams(WeightTraining):
    """Fine-tune, on the text, the layers on either side of every cut."""

    width: int = option(1, "how many layers on each side", (1, 10_000))

    cost = "a forward pass of everything and a backward pass down to the first cut, over the text"
    source = "layerprune"

    def weights_to_train(self, case: HealContext, loaded: LoadedModel) -> set[str]:
        beside = seams(case.removal, case.receipt.base.layers, self.width)
        return weights_of(loaded, [loaded.layers[layer] for layer in beside])


# Which weights are trained: found from the anatomy, never from a table of architectures.


def seams(removal: Removal, depth: int, width: int) -> tuple[int, ...]:
    """Return the layers of the pruned model within ``width`` layers on either side of a cut."""
    left = depth - len(removal)
    near = {cut.after + step for cut in cuts(removal, depth) for step in range(1 - width, width + 1)}
    return tuple(sorted(near & set(range(left))))


def weights_of(loaded: LoadedModel, modules: Iterable[nn.Module]) -> set[str]:
    """Return the names of all weights of some modules of the model."""
    chosen = {id(weight) for module in modules for weight in module.parameters()}
    return {name for name, weight in loaded.model.named_parameters() if id(weight) in chosen}


def head_weights(loaded: LoadedModel) -> set[str]:
    """Return the names of what stands behind the stack: the output embeddings and the decoder's final norm.

    Output embeddings that are tied to the input's are trained as what they are, both.
    """
    return weights_of(loaded, [loaded.model.get_output_embeddings()]) | final_norm(loaded)


def final_norm(loaded: LoadedModel) -> set[str]:
    """Return the names of the weights of the norm behind the last layer: outside the stack, and one-dimensional."""
    vectors = {name for name, weight in loaded.model.named_parameters() if weight.dim() == 1}
    outside = vectors - weights_of(loaded, loaded.layers)
    return {name for name in outside if name.rpartition(".")[0].split(".")[-1] in FINAL_NORMS}


FINAL_NORMS = {"norm", "final_layernorm", "final_layer_norm", "ln_f", "norm_f", "final_norm", "embedding_norm"}


def projections(loaded: LoadedModel) -> tuple[str, ...]:
    """Return the paths of the linear maps inside the attention and the MLP of every layer.

    Where experts are fused into one tensor only the attention's: peft would stretch an adapter of an MLP to experts
    whose maps had its name before they were fused. Raises ``RefusedError`` where there is none.
    """
    from transformers.pytorch_utils import Conv1D

    parts = [
        (child, part) for layer in loaded.layers for child, part in layer.named_children() if child in ATTENTION | MLP
    ]
    fused = any(child in MLP and weight.dim() > 2 for child, part in parts for weight in part.parameters())
    paths = {id(module): name for name, module in loaded.model.named_modules()}
    found = [
        paths[id(module)]
        for child, part in parts
        if child in ATTENTION or not fused
        for module in part.modules()
        if isinstance(module, nn.Linear | Conv1D)
    ]
    if not found:
        raise RefusedError(
            f"a {loaded.architecture.model_type} model has no linear maps in its attention or MLP for an adapter; "
            "use partial, seams or distill"
        )
    return tuple(found)


def in_mlp(targets: Iterable[str]) -> bool:
    """Return whether some of these paths lie in the MLP of a layer."""
    return any(MLP & set(target.split(".")) for target in targets)
