"""Records with curves that are known, for the tests of alignment and comparison."""

import math
from collections.abc import Callable, Iterable
from typing import Any

from lightning_speedlimit.record import RunRecord

Curve = Callable[[float], float]


def description(name: str = "SGD", lr: float = 0.1, **settings: Any) -> dict[str, Any]:
    """What a run says of itself."""
    optimizer = {"class": name, "groups": [{"lr": lr, "momentum": 0, "maximize": False}]}
    return {"clock": "steps", "parameters": 10, "optimizers": [optimizer], "batch_size": 8, **settings}


def straight(
    steps: Iterable[int],
    loss: Curve,
    *,
    speed: float = 0.1,
    loss_se: float = 0.0,
    run: dict[str, Any] | None = None,
    columns: dict[str, Curve] | None = None,
) -> RunRecord:
    """Straight motion at constant speed v: D = ℓ = v k, A = v² k, τ = k, and the loss L(k).

    All work lowers the loss. `columns`: further ones, or others in their place; NaN at a step where they say so.
    """
    record = RunRecord(description() if run is None else run)
    for k in steps:
        drop = loss(0) - loss(k)
        works = dict.fromkeys(("work_ito", "work_stratonovich", "work_anti_ito", "work_action"), drop)
        row = {
            "elapsed": float(k),
            "displacement": speed * k,
            "path_length": speed * k,
            "action": speed**2 * k,
            "loss": loss(k),
            "loss_se": loss_se,
            "loss_drop": drop,
            "loss_drop_se": loss_se,
            "entropy_production": drop,
            "seconds": 0.01 * k,
            **works,
            **{name: curve(k) for name, curve in (columns or {}).items()},
        }
        record.append(k, row)
    return record


def decay(time: float, start: float = 1.0) -> Curve:
    """L(k) = L_0 e^{−k/time}."""
    return lambda k: start * math.exp(-k / time)


def reaching(elapsed: float, action: float, **settings: Any) -> RunRecord:
    """A run whose loss is 1 − k/τ·½, a line from 1 to ½ at step τ, where its action is A.

    Two rows beyond and before: exact by linear interpolation, whatever τ is; it ends at twice τ.
    """
    record = RunRecord(description(**settings))
    for k in range(1, math.ceil(2 * elapsed) + 1):
        level = 1 - 0.5 * k / elapsed
        row = {"elapsed": float(k), "action": action * k / elapsed, "displacement": 0.1 * k, "path_length": 0.1 * k}
        record.append(k, {**row, "loss": level, "loss_se": 0.0, "loss_drop": 1 - level, "loss_drop_se": 0.0})
    return record
