"""Export against `cp`: time and memory on a synthetic sharded checkpoint. Run by hand; the disk has to have the room.

    python tests/benchmarks/export_speed.py FOLDER [--gigabytes 8]

Measures what export does to the disk (plan, copy, hash, flush); the logits proof, which loads the model, is not part.
Each side runs in a process of its own, reads the same files and flushes to disk; cp copies the whole base, and its time
is counted for the share of the bytes that is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from layerprune.anatomy import load_config, read_anatomy
from layerprune.checkpoint import Checkpoint
from layerprune.checkpoint.writer import header_bytes, plan_shards
from layerprune.documents import Limits, MetricRef, ModelRef, Plan, Search
from layerprune.removal import Removal

LAYERS, HIDDEN, INTERMEDIATE, VOCABULARY = 32, 4096, 11008, 32000  # Llama 2 7B: 13.5 GB in bf16
SHARD = 2 * 10**9


def make_checkpoint(folder: Path, layers: int) -> None:
    """Write a Llama of random bytes; nothing ever looks at the numbers."""
    folder.mkdir(parents=True)
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "dtype": "bfloat16",
        "intermediate_size": INTERMEDIATE, "num_hidden_layers": layers, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": VOCABULARY, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,),
              "lm_head.weight": (VOCABULARY, HIDDEN)}  # fmt: skip
    for layer in range(layers):
        place = f"model.layers.{layer}"
        for name in "qkvo":
            shapes[f"{place}.self_attn.{name}_proj.weight"] = (HIDDEN, HIDDEN)
        shapes[f"{place}.mlp.gate_proj.weight"] = shapes[f"{place}.mlp.up_proj.weight"] = (INTERMEDIATE, HIDDEN)
        shapes[f"{place}.mlp.down_proj.weight"] = (HIDDEN, INTERMEDIATE)
        shapes[f"{place}.input_layernorm.weight"] = shapes[f"{place}.post_attention_layernorm.weight"] = (HIDDEN,)
    parts = [_Part(name, shape) for name, shape in shapes.items()]
    shards = plan_shards(parts, SHARD)  # type: ignore[arg-type]
    noise = os.urandom(64 * 2**20)
    for shard in shards:
        with (folder / shard.filename).open("wb") as file:
            file.write(header_bytes(shard, {"format": "pt"}))
            for part in shard.parts:
                for start in range(0, part.nbytes, len(noise)):
                    file.write(noise[: min(len(noise), part.nbytes - start)])
    names = {part.name: shard.filename for shard in shards for part in shard.parts}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


class _Part:
    """A tensor to invent."""

    def __init__(self, name: str, shape: tuple[int, ...]) -> None:
        self.name, self.shape, self.dtype, self.ranges = name, shape, "BF16", ()
        self.nbytes = 2
        for side in shape:
            self.nbytes *= side


def make_plan(folder: Path, removal: Removal) -> Plan:
    """Return a plan that nobody chose."""
    checkpoint, anatomy = Checkpoint.open(folder), read_anatomy(load_config(str(folder)))
    model = ModelRef(id=str(folder), revision=None, fingerprint=checkpoint.fingerprint(), model_type="llama",
                     layers=anatomy.depth, parameters=checkpoint.parameters)  # fmt: skip
    metric = MetricRef(name="none", spec="none", options={}, unit="", scope="any set", owner="layerprune")
    return Plan(model=model, metric=metric, search=Search(name="none"), limits=Limits(), requested="", ranking=(),
                removal=removal.units, order=removal.units, scores_sha256="", data=(), seed=0, versions={})  # fmt: skip


def peak_mb() -> float:
    """Return this process's largest resident set so far; getrusage would count its parent's too."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def write_only(plan_file: Path, out: Path) -> None:
    """Plan and write as export does, without the proof; print seconds, and memory before and after, in MB."""
    from layerprune.checkpoint import new_folder
    from layerprune.export import exporting

    plan = Plan.load(plan_file)
    build = peak_mb()
    start = time.perf_counter()
    job = exporting._plan_job(plan, None, SHARD, False)
    planned, memory = time.perf_counter() - start, peak_mb()
    start = time.perf_counter()
    with new_folder(out) as folder:
        exporting._write(job, folder, exporting.SILENT)
    written = time.perf_counter() - start
    print(json.dumps({"planned_s": planned, "written_s": written, "imported_mb": build, "planned_mb": memory,
                      "peak_mb": peak_mb()}))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=8)
    parser.add_argument("--write-only", nargs=2, type=Path, metavar=("PLAN", "OUT"))
    options = parser.parse_args()
    if options.write_only:
        write_only(*options.write_only)
        return
    base, out, copy = (options.folder / name for name in ("base", "out", "copy"))
    per_layer = 2 * (4 * HIDDEN**2 + 3 * HIDDEN * INTERMEDIATE)
    layers = max(4, round((options.gigabytes * 1e9 - 4 * HIDDEN * VOCABULARY) / per_layer))
    make_checkpoint(base, layers)
    removal = Removal.from_units(range(1, layers, 4))
    plan_file = make_plan(base, removal).save(options.folder / "plan.json")
    command = [sys.executable, __file__, str(options.folder), "--write-only", str(plan_file), str(out)]
    total = Checkpoint.open(base).nbytes
    for round_ in range(3):
        start = time.perf_counter()
        subprocess.run(["cp", "-r", str(base), str(copy)], check=True)
        subprocess.run(["sync", "-f", str(copy)], check=True)
        whole = time.perf_counter() - start
        shutil.rmtree(copy)  # both sides read the same files and leave the same room in the page cache
        report = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
        kept = Checkpoint.open(out).nbytes
        shutil.rmtree(out)
        report |= {"round": round_, "base_gb": total / 1e9, "kept_gb": kept / 1e9, "cp_s": whole * kept / total}
        report["ratio"] = report["written_s"] / report["cp_s"]
        print(json.dumps({key: round(value, 3) for key, value in report.items()}), flush=True)
    shutil.rmtree(base)


if __name__ == "__main__":
    main()
