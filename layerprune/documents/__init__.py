"""The files that steps leave and take. Each is frozen, versioned and hashed; see ``base.Document``."""

from layerprune.documents.base import Document, Part
from layerprune.documents.common import Interval, MetricRef, ModelRef, Outcomes, TaskData, Units, as_removal
from layerprune.documents.plan import Limits, Plan, PredictedTask, Prediction, Ranked, Search
from layerprune.documents.receipt import Change, FileEntry, LogitsProof, Receipt
from layerprune.documents.scores import BaseTask, Candidate, EngineReport, Round, Scores, TaskScore

__all__ = [
    "BaseTask",
    "Candidate",
    "Change",
    "Document",
    "EngineReport",
    "FileEntry",
    "Interval",
    "Limits",
    "LogitsProof",
    "MetricRef",
    "ModelRef",
    "Outcomes",
    "Part",
    "Plan",
    "PredictedTask",
    "Prediction",
    "Ranked",
    "Receipt",
    "Round",
    "Scores",
    "Search",
    "TaskData",
    "TaskScore",
    "Units",
    "as_removal",
]
