"""Export against `cp`: time and memory on a synthetic sharded checkpoint. Run by hand; the disk has to have the room.

    python benchmarks/export_speed.py FOLDER [--gigabytes 8] [--rounds 4]

Measures what export does to the disk (plan, copy, hash, flush); the logits proof, which loads the model, is not part.
`cp` copies the very bytes that export writes: the result of a first export, evicted from the page cache like the base.
Both run in a process of their own and flush to disk, in turns, now one first and now the other; "cold" evicts what is
read before each run, "warm" reads it through before each run. Memory is the largest resident set of the process that
copies, and beside it that of the process which validates the plan before (it imports torch and has ended by then).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

from layerprune.architecture import load_config, read_architecture
from layerprune.artifacts import MetricRef, Plan, PlanLimits, SearchRef
from layerprune.checkpoint import Checkpoint, locate
from layerprune.checkpoint.location import reference
from layerprune.checkpoint.writer import header_bytes, plan_shards
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
    checkpoint, architecture = Checkpoint.open(folder), read_architecture(load_config(str(folder)))
    found, parameters = locate(str(folder)), checkpoint.parameters
    model = reference(found, checkpoint, model_type="llama", layers=architecture.depth, parameters=parameters)
    metric = MetricRef(name="none", spec="none", options={}, unit="", scope="any set", owner="layerprune")
    return Plan(
        model=model, metric=metric, search=SearchRef(name="none"), limits=PlanLimits(), requested="", ranking=(),
        data=(),
        removal=removal.layers, order=removal.layers, scores_sha256="", seed=0, versions={},
    )  # fmt: skip


def peak_mb() -> float:
    """Return this process's largest resident set so far; getrusage would count its parent's too."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024


def write_only(plan_file: Path, out: Path) -> None:
    """Plan and write as export does, without the proof; print seconds, and the peaks of memory in MB."""
    from layerprune.checkpoint import writer
    from layerprune.exporter import exporter

    write, begun = writer.write_shards, list[float]()

    def timed(*args: object) -> object:
        begun.extend((time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024))
        return write(*args)  # type: ignore[arg-type]

    nothing = {"proof": None, "missing_keys": [], "unexpected_keys": [], "notes": []}
    writer.write_shards, exporter.prove = timed, lambda *args, **kwargs: nothing  # type: ignore[assignment]
    start = time.perf_counter()
    exporter.export(Plan.load(plan_file), out, base=str(plan_file.parent / "base"), max_shard_size=SHARD)
    end, (middle, child) = time.perf_counter(), begun
    seconds = {"planned_s": middle - start, "written_s": end - middle}
    print(json.dumps({**seconds, "peak_mb": peak_mb(), "validating_mb": child}))


def settle(folder: Path, cold: bool) -> None:
    """Bring every file of a folder into the page cache, or out of it."""
    for path in sorted(folder.rglob("*.safetensors")):
        with path.open("rb") as file:
            if cold:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while file.read(2**24):
                    pass


def copy_time(source: Path, to: Path) -> float:
    """Return the seconds that `cp` and a flush take."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(to)], check=True)
    subprocess.run(["sync", "-f", str(to)], check=True)
    seconds = time.perf_counter() - start
    shutil.rmtree(to)
    return seconds


def export_once(folder: Path, out: Path) -> dict[str, float]:
    """Return what the exporting process says of itself."""
    command = [sys.executable, __file__, str(folder), "--write-only", str(folder / "plan.json"), str(out)]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    return dict(json.loads(said.splitlines()[-1]))


def compare(folder: Path, cold: bool, export_first: bool) -> dict[str, float]:
    """Return the figures of one round: an export and a `cp` of what it writes, in the order asked for."""
    base, kept, out = (folder / name for name in ("base", "kept", "out"))
    report: dict[str, float] = {}
    for side in ("export", "cp") if export_first else ("cp", "export"):
        settle(base if side == "export" else kept, cold)
        if side == "cp":
            report["cp_s"] = copy_time(kept, out)
        else:
            report |= export_once(folder, out)
            shutil.rmtree(out)
    report["ratio"] = report["written_s"] / report["cp_s"]
    report["ratio_with_planning"] = (report["written_s"] + report["planned_s"]) / report["cp_s"]
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=8)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--write-only", nargs=2, type=Path, metavar=("PLAN", "OUT"))
    options = parser.parse_args()
    if options.write_only:
        write_only(*options.write_only)
        return
    base, kept = options.folder / "base", options.folder / "kept"
    per_layer = 2 * (4 * HIDDEN**2 + 3 * HIDDEN * INTERMEDIATE)
    layers = max(4, math.ceil((options.gigabytes * 1e9 - 4 * HIDDEN * VOCABULARY) / per_layer))
    make_checkpoint(base, layers)
    make_plan(base, Removal.from_layers(range(1, layers, 4))).save(options.folder / "plan.json")
    export_once(options.folder, kept)
    sizes = [Checkpoint.open(place).nbytes / 1e9 for place in (base, kept)]
    print(f"base {sizes[0]:.2f} GB in {layers} layers, kept {sizes[1]:.2f} GB", flush=True)
    for number in range(options.rounds):
        for cold in (True, False):
            report = compare(options.folder, cold, export_first=bool(number % 2))
            print("cold" if cold else "warm", {key: round(value, 2) for key, value in report.items()}, flush=True)
    shutil.rmtree(options.folder)


if __name__ == "__main__":
    main()
