"""The files that steps leave and take. Each is frozen, versioned and hashed; see ``base.Document``."""

from layerprune.documents.audit import (
    PRUNED,
    UNHEALED,
    Audit,
    AuditedTask,
    Compared,
    Comparison,
    Continuation,
    FlippedItem,
    Flips,
    Generation,
    Measured,
    Overall,
    Speed,
    TextLoss,
)
from layerprune.documents.base import Document, Part
from layerprune.documents.common import Interval, MetricRef, ModelRef, Outcomes, TaskData, Units, as_removal
from layerprune.documents.heal_log import CorpusRef, HealerRef, HealLog, HeldOut, LossPoint, Overlap
from layerprune.documents.plan import Limits, Plan, PredictedTask, Prediction, Ranked, Search
from layerprune.documents.receipt import Change, FileEntry, LogitsProof, Receipt
from layerprune.documents.recipe import Recipe
from layerprune.documents.scores import BaseTask, Candidate, EngineReport, Round, Scores, TaskScore

__all__ = [
    "PRUNED",
    "UNHEALED",
    "Audit",
    "AuditedTask",
    "BaseTask",
    "Candidate",
    "Change",
    "Compared",
    "Comparison",
    "Continuation",
    "CorpusRef",
    "Document",
    "EngineReport",
    "FileEntry",
    "FlippedItem",
    "Flips",
    "Generation",
    "HealLog",
    "HealerRef",
    "HeldOut",
    "Interval",
    "Limits",
    "LogitsProof",
    "LossPoint",
    "Measured",
    "MetricRef",
    "ModelRef",
    "Outcomes",
    "Overall",
    "Overlap",
    "Part",
    "Plan",
    "PredictedTask",
    "Prediction",
    "Ranked",
    "Receipt",
    "Recipe",
    "Round",
    "Scores",
    "Search",
    "Speed",
    "TaskData",
    "TaskScore",
    "TextLoss",
    "Units",
    "as_removal",
]
