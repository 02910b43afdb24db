"""A stretch of a run as if it were one of its own: what the rows of a record say from one step on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]

# What grows with every step, and what is paid for.
SUMS = (
    "elapsed",
    "path_length",
    "action",
    "work_ito",
    "work_stratonovich",
    "work_anti_ito",
    "work_action",
    "work_decay",
)
COSTS = ("seconds", "samples", "tokens", "epochs")
_SUMS = (*SUMS, *COSTS, "gradient_signal", "gradient_noise", "loss_drop", "entropy_production")
_LEVELS = ("loss", "loss_se", "learning_rate", "grad_norm", "grad_norm_clipped", "step_norm")
_SUMS_WITH_ERROR = ("action", "path_length", "work_ito", "work_stratonovich", "work_anti_ito", "work_action")
_OF_THE_WHOLE = ("samples_per_step", "tokens_per_step", "since_step")
NO_EFFICIENCY = "of a stretch: record.windows() has it, as kinematic efficiency / conversion"


class Cut(NamedTuple):
    """A stretch; steps count from its start."""

    begin: int
    """The step that it starts from, of the whole run."""
    end: int
    rows: list[tuple[int, dict[str, float]]]
    sketches: dict[int, npt.NDArray[np.float32]]
    """Step → sketch of θ_step − θ at the start."""
    reasons: dict[str, str]


def cut(
    columns: Mapping[str, npt.NDArray[Any]],
    sketch_steps: npt.NDArray[np.int64],
    sketches: npt.NDArray[np.float32],
    start: int,
    stop: int | None,
) -> Cut:
    """From the last row that is not after `start` (or the start of the run) to the last that is not after `stop`.

    Raises:
        ValueError: no row between the two.
    """
    steps = columns["step"]
    first = int(np.searchsorted(steps, start, side="right")) - 1
    last = len(steps) - 1 if stop is None else int(np.searchsorted(steps, stop, side="right")) - 1
    if start < 0 or last <= first:
        span = f"rows from step {steps[0]} to {steps[-1]}" if len(steps) else "no rows"
        raise ValueError(f"a stretch needs a row after its start, got {start} to {stop} of {span}; widen it")
    begin, chosen = int(steps[first]) if first >= 0 else 0, steps[first + 1 : last + 1]
    base = np.zeros_like(sketches[:1]) if begin == 0 else sketches[sketch_steps == begin]
    within = np.isin(sketch_steps, chosen)
    since = sketches[within] - base if len(base) else sketches[:0]
    kept = dict(zip((sketch_steps[within] - begin).tolist(), since, strict=False))
    moved = [float(np.linalg.norm(kept[k])) if k in kept else np.nan for k in (chosen - begin).tolist()]
    found = _columns(columns, first, last, np.array(moved, dtype=np.float64))
    rows = [(int(k) - begin, {name: float(c[i]) for name, c in found.items()}) for i, k in enumerate(chosen)]
    reasons = {"efficiency": NO_EFFICIENCY}
    if not len(base):
        reasons["displacement"] = f"no sketch of step {begin}, where the stretch begins"
    return Cut(begin, int(steps[last]), rows, kept, reasons)


def description(run: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
    """What was run, with "stretch": its start and stop; without what is of the whole run."""
    first = run.get("stretch", {}).get("start", 0)  # of a stretch of a stretch: steps of the run
    kept = {name: value for name, value in run.items() if name not in _OF_THE_WHOLE}
    return kept | {"stretch": {"start": first + start, "stop": first + stop}}


@np.errstate(all="ignore")  # of a run that diverged
def _columns(columns: Mapping[str, npt.NDArray[Any]], first: int, last: int, moved: Values) -> dict[str, Values]:
    """The columns of rows `first` + 1 to `last`, from the state of row `first` on (−1: the start).

    Args:
        moved: D from there to each of these rows, parameter.
    """
    chosen = slice(first + 1, last + 1)

    def before(name: str) -> float:
        return 0.0 if first < 0 else float(columns[name][first])

    found = {name: columns[name][chosen] - before(name) for name in _SUMS if name in columns}
    found |= {name: columns[name][chosen] for name in _LEVELS if name in columns}
    for name in (f"{name}_se" for name in _SUMS_WITH_ERROR):
        if name in columns:  # errors of steps that were drawn add up as squares
            found[name] = np.sqrt(np.maximum(columns[name][chosen] ** 2 - before(name) ** 2, 0.0))
    if "loss_drop_se" in columns:  # of both losses; that of the first drop has the start's in it
        found["loss_drop_se"] = np.hypot(columns["loss_drop_se"][chosen], before("loss_drop_se"))
    found["displacement"] = moved
    return found | _ratios(found)


def _ratios(found: Mapping[str, Values]) -> dict[str, Values]:
    missing = np.full_like(found["displacement"], np.nan)
    squared = found["displacement"] ** 2
    path, action, elapsed = (found.get(name, missing) for name in ("path_length", "action", "elapsed"))
    ratios = {
        "straightness": squared / path**2,
        "steadiness": path**2 / (elapsed * action),
        "kinematic_efficiency": squared / (elapsed * action),
        "speed_limit_time": squared / action,
        "conversion": found.get("loss_drop", missing) / found.get("work_ito", missing),
    }
    return {name: np.where(np.isfinite(values), values, np.nan) for name, values in ratios.items()}
