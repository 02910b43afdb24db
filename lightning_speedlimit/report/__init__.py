"""Runs side by side: comparison, diagnosis in words, advice, figures, a page."""

from lightning_speedlimit.report.advice import Advice, AtBatch, advise
from lightning_speedlimit.report.compare import compare, compare_models
from lightning_speedlimit.report.comparison import Comparison
from lightning_speedlimit.report.diagnosis import Finding, diagnose
from lightning_speedlimit.report.places import Group, Point

__all__ = [
    "Advice",
    "AtBatch",
    "Comparison",
    "Finding",
    "Group",
    "Point",
    "advise",
    "compare",
    "compare_models",
    "diagnose",
]
