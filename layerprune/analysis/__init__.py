"""The paper's questions (arXiv:2605.14075) asked of one model: which metric knows which layers matter, and how well."""

from layerprune.analysis.findings import verdict_of
from layerprune.analysis.measurements import WORK, study
from layerprune.analysis.page import check_room, read_study, write_study

__all__ = ["WORK", "check_room", "read_study", "study", "verdict_of", "write_study"]
