"""What a run is called by: its optimizers, the peak of its learning rate, the batch of a step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lightning_speedlimit.record import RunRecord
from lightning_speedlimit.record.drawn import batch_factors
from lightning_speedlimit.words import one_line

_LONGEST = 200  # characters
_NEAR = 0.9  # a peak that rows come so near to is the one that was set: no row need be at it
_ABOVE = 1 + 1e-6  # float32


def optimizer_title(run: Mapping[str, Any] | RunRecord) -> str:
    """ "AdamW lr 0.003, batch 512 (128 x 4)": what tells runs apart; "run" where the record does not say.

    The rate is the highest of the run, of a mapping (what was run alone) the first. The batch is that of a step: of one
    process times those accumulated times the processes.
    """
    said = run.run if isinstance(run, RunRecord) else run
    optimizers = list(said.get("optimizers", []))
    peaks = peak_rates(run) if isinstance(run, RunRecord) else None
    titles = [_one_optimizer(o, peaks if i == 0 else None) for i, o in enumerate(optimizers)]
    part = said.get("stretch")
    stretch = ", steps {start} to {stop}".format(**part) if part else ""
    return one_line(" + ".join(titles or ["run"]) + _batch(said) + stretch, _LONGEST)


def _one_optimizer(optimizer: Mapping[str, Any], peaks: Sequence[float] | None) -> str:
    parts = [optimizer.get("class", "optimizer")]
    for key in ("lr", "momentum"):  # which some optimizer may take for something else
        values = [_number(group.get(key)) for group in optimizer.get("groups", [])]
        values = list(dict.fromkeys(v for v in (peaks if key == "lr" and peaks else values) if not math.isnan(v)))
        if any(values):
            parts.append(f"{key} {'/'.join(f'{value:g}' for value in values)}")
    return " ".join(parts)


def _batch(run: Mapping[str, Any]) -> str:
    found = effective_batch(run)
    if found is None:
        return ""
    factors = [factor for factor in batch_factors(run) if factor]
    parts = f" ({' x '.join(map(str, factors))})" if len(factors) > 1 and math.prod(factors) == found else ""
    return f", batch {found:g}{parts}" if found < 1e6 else f", batch {found:,.0f}{parts}"


def effective_batch(run: Mapping[str, Any]) -> float | None:
    """Samples of a step: batch × accumulated batches × processes; else what was counted; None where neither tells."""
    factors = batch_factors(run)
    counted = _number(run.get("samples_per_step"))
    if factors and not (counted > 0 and not 0.8 < math.prod(factors) / counted < 1.25):  # last batches are smaller
        return math.prod(factors)
    return counted if counted > 0 else None


def peak_rates(record: RunRecord, step: float = math.inf) -> list[float]:
    """The highest learning rate of each group of the first optimizer up to a step; NaN where a group has none.

    The highest of the rows and of the first step. Where that is within a tenth of what a schedule was set to go to
    (`max_lr`, `initial_lr`), that; the other groups in proportion to the first one.
    """
    optimizers = record.run.get("optimizers") or []
    groups = optimizers[0].get("groups", []) if optimizers else []
    if not groups:
        return []
    columns = record.columns
    rows = columns["learning_rate"][columns["step"] <= step] if "learning_rate" in columns else np.empty(0)
    known = [float(rate) for rate in (*rows, _number(groups[0].get("lr"))) if math.isfinite(rate)]
    if not known:
        return [math.nan] * len(groups)
    peak = max(known)
    for key in ("max_lr", "initial_lr", "lr"):
        declared = _number(groups[0].get(key))
        if _NEAR * declared <= peak <= _ABOVE * declared:
            return [_number(group.get(key, group.get("lr"))) for group in groups]
    base = "initial_lr" if _number(groups[0].get("initial_lr")) > 0 else "lr"
    first = _number(groups[0].get(base))
    factor = peak / first if first > 0 else math.nan
    return [float(f"{peak:.3g}"), *(float(f"{_number(group.get(base)) * factor:.3g}") for group in groups[1:])]


def _number(value: Any) -> float:
    """NaN for what is no finite number: settings may be anything."""
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if known else math.nan
