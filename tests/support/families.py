"""Tiny random models of many types, and plans to prune them, for every test that needs one."""

from __future__ import annotations

from pathlib import Path

from layerprune.architecture import load_config, read_architecture
from layerprune.architecture.tiny import save_tiny, tiny_config, tiny_model, types
from layerprune.artifacts import MetricRef, Plan, PlanLimits, SearchRef
from layerprune.checkpoint import Checkpoint, locate
from layerprune.checkpoint.location import reference
from layerprune.removal import Removal

__all__ = ["FAMILIES", "make_plan", "save_tiny", "tiny_config", "tiny_model", "types"]

# The types every change is tried on; the zoo (slow) has all of them.
FAMILIES = (
    "llama", "qwen3", "gemma2", "gemma3_text", "smollm3", "olmo2", "phi3", "gpt2", "gpt_neox", "qwen2_moe", "mixtral",
    "deepseek_v3",
)  # fmt: skip


def make_plan(folder: Path, removal: Removal) -> Plan:
    """Return a plan to remove ``removal`` from the model in ``folder``, as if a metric had chosen it."""
    checkpoint, architecture = Checkpoint.open(folder), read_architecture(load_config(str(folder)))
    model = reference(
        locate(str(folder)),
        checkpoint,
        model_type=architecture.model_type,
        layers=architecture.depth,
        parameters=architecture.parameters(),
    )
    metric = MetricRef(name="cosine", spec="cosine", options={}, unit="1-cos", scope="any set", owner="layerprune")
    return Plan(
        model=model,
        metric=metric,
        search=SearchRef(name="one-shot"),
        limits=PlanLimits(),
        requested=str(len(removal)),
        removal=removal.layers,
        order=removal.layers,
        ranking=(),
        scores_sha256="0" * 64,
        data=(),
        seed=0,
        versions={},
    )
