"""The end of a training's output: the one thing to change, and where to read more."""

from __future__ import annotations

import shlex
import textwrap
from pathlib import Path

from lightning_speedlimit.record import RunRecord
from lightning_speedlimit.record.lost_loss import lost_loss
from lightning_speedlimit.record.tuning import FEWEST
from lightning_speedlimit.report.advice import advise
from lightning_speedlimit.report.advice_text import WIDTH, rate
from lightning_speedlimit.report.diagnosis import diagnose


def to_change(record: RunRecord) -> str:
    """What `advise` would have changed first; empty where nothing is known to help.

    That is the rate of a loss that ran away, then a rate that was too low, then the batch of a noisy run: what was
    followed on held-out tasks. Of fewer rows than a standard error needs nothing is said but of a lost loss: a few
    losses that rose by chance are no divergence.
    """
    if len(record) < FEWEST and lost_loss(record.columns, record.reasons) is None:
        return ""
    advice = {finding.cause: finding.advice for finding in diagnose(record)}
    return advice.get("divergence") or rate(advise(record), sign="+/-") or advice.get("noise", "")


def closing(record: RunRecord, folder: Path | None) -> str:
    """Lines below a summary; empty where there is nothing to change and no folder."""
    change = to_change(record)
    lines = textwrap.wrap(f"What to change: {change}", WIDTH, break_long_words=False) if change else []
    if folder is not None:
        lines += [f"Record: {folder}", f"More: speedlimit advise {shlex.quote(str(folder))}"]
    return "\n".join(lines)
