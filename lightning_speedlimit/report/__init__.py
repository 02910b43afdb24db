"""Runs side by side: comparison, diagnosis in words, figures, a page."""

from lightning_speedlimit.report.comparison import Comparison, Group, Point, compare, compare_models
from lightning_speedlimit.report.diagnosis import Finding, diagnose

__all__ = ["Comparison", "Finding", "Group", "Point", "compare", "compare_models", "diagnose"]
