"""A SmolLM2 GGUF into an ordinary checkpoint folder: what transformers' GGUF loader leaves wrong is put right here.

The loader dequantises the weights and undoes the rotary permutation correctly; around them it leaves a quantisation
mark, a rounded epsilon, stray keys, and a tokenizer without the digit splitting that ``tokenizer.ggml.pre = smollm``
stands for (all seen with transformers 5.23).
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from demo.cache import FetchError
from layerprune.util import SILENT, Progress

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

STRAY_KEYS = (
    "_model_name_or_path",
    "_name_or_path",
    "is_local",
    "local_files_only",
    "quantization_config",
    "unk_token_id",
)
RMS_NORM_EPS = 1e-5  # the GGUF's float32 reads back as 9.999999747378752e-06
CONTEXT = 8192  # tokens, llama.context_length of the GGUF; the loader gives the tokenizer no limit


def convert(gguf: Path, folder: Path, progress: Progress = SILENT) -> None:
    """Write the GGUF's model and tokenizer into ``folder`` as bf16 safetensors with tied embeddings.

    Raises ``FetchError`` when the ``gguf`` package is missing or a tensor is.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if find_spec("gguf") is None:
        raise FetchError("reading the model's GGUF needs the package gguf: pip install gguf")
    with progress.task("dequantising the model", 3, "steps") as advance:
        model, info = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, output_loading_info=True, **_dequantise()
        )
        absent = [name for key in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info[key]]
        if absent:
            raise FetchError(f"{gguf.name} does not fit its own config at {sorted(map(str, absent))[:5]}")
        advance()
        clean(model).save_pretrained(folder)
        advance()
        save_tokenizer(AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name), folder)
        for file in folder.iterdir():
            file.chmod(0o644)  # safetensors writes private files; a checkpoint is for sharing
        advance()


def clean(model: PreTrainedModel) -> PreTrainedModel:
    """Return an unquantised bf16 model with the same weights, a repaired config and a generation config."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    config = repair_config(model.config)
    # A new model: the loaded one is marked as quantised, and save_pretrained refuses it.
    fresh = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    fresh.load_state_dict(model.state_dict())
    fresh.tie_weights()
    fresh.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    return fresh


def repair_config(config: PretrainedConfig) -> PretrainedConfig:
    """Return the config without quantisation and stray keys, with the epsilon the model was trained with."""
    plain: dict[str, Any] = {key: value for key, value in config.to_dict().items() if key not in STRAY_KEYS}
    plain.update(rms_norm_eps=RMS_NORM_EPS, dtype="bfloat16")
    return type(config).from_dict(plain)


def save_tokenizer(loaded: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save the tokenizer with SmolLM's digit splitting, under the class name that transformers 4 and 5 both read."""
    import json

    from tokenizers import pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = loaded.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.post_processor = None  # SmolLM adds no token; transformers 5.0's loader puts <|im_start|> in front
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=loaded.bos_token,
        eos_token=loaded.eos_token,
        unk_token=loaded.unk_token,
        pad_token=loaded.pad_token,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = loaded.chat_template
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = {key: value for key, value in json.loads(path.read_text()).items() if key not in STRAY_KEYS}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # not TokenizersBackend, which only transformers 5 knows
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


def _dequantise() -> dict[str, Any]:
    """Ask for dense weights where this transformers could also keep them packed."""
    from transformers.utils import quantization_config

    config = getattr(quantization_config, "GgufConfig", None)  # absent from older ones, which always dequantise
    return {} if config is None else {"quantization_config": config(dequantize=True)}
