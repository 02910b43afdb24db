"""Runs that were measured from a later step on: what the steps before cost and bought is in none of their numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def since(run: Mapping[str, Any]) -> int:
    """The step of the training at which the measurement began; 0: with the training."""
    return run.get("since_step") or 0


def sentence(run: Mapping[str, Any]) -> str:
    """A sentence of it; "" of a run that was measured from its start."""
    step = since(run)
    if not step:
        return ""
    before = "the step" if step == 1 else f"the {step:,} steps"
    return f"Measured only from step {step:,} on: what {before} before it cost and bought is in none of these numbers."
