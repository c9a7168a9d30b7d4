"""What a folder holds that is no language model in safetensors, told by the names of its files."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection

ADAPTER = "adapter_config.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle", "*.msgpack", "*.h5", "*.ot")
SAVE = "load it with transformers and save it with save_pretrained"
# What a file says about the folder it is in, and what would work; the first that matches is taken.
# "{}" stands for the file.
KINDS = (
    ("model_index.json", "is a diffusers pipeline ({}), not a language model"),
    ("*.gguf", "has no safetensors weights, only {}; take the model that it was made from, or read it with "
               "transformers (gguf_file) and save it with save_pretrained"),
    ("consolidated*.safetensors", "has its weights in the vendor's own format ({}); take the transformers edition of "
                                  "the model, or convert it"),
    ("*.safetensors", "holds {} and no model.safetensors.index.json that says what is in it; download or save the "
                      "model again, whole"),
    ("*.h5", f"has no safetensors weights, only TensorFlow's {{}}; {SAVE}"),
    ("*.msgpack", f"has no safetensors weights, only Flax's {{}}; {SAVE}"),
    *((pattern, f"has no safetensors weights, only {{}}; pickles are never read, convert it first: {SAVE}")
      for pattern in PICKLES),
    ("*.onnx", "has no safetensors weights, only {}; take the model that it was made from"),
    ("openvino_model.xml", "has no safetensors weights, only {}; take the model that it was made from"),
)  # fmt: skip


def why_no_weights(names: Collection[str]) -> str:
    """Return what a folder with these files is instead of a model; the sentence goes on from the folder's name."""
    top = sorted(name for name in names if "/" not in name)
    if ADAPTER in top or fnmatch.filter(top, "adapter_model*"):
        return "holds an adapter, not a model; merge it into its base model first (peft: merge_and_unload)"
    inner = sorted(name.rpartition("/")[0] for name in names if name.endswith("/config.json"))
    if "modules.json" in top and inner and "config.json" not in top:
        return f"is a sentence-transformers model in several folders; its transformer alone is in {inner[0]}"
    for pattern, said in KINDS:
        found = fnmatch.filter(top, pattern)
        if found:
            return said.format(found[0])
    return "has neither model.safetensors nor model.safetensors.index.json"
