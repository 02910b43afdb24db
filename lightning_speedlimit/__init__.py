"""How close a training run came to the thermodynamic speed limit (Seroussi et al., arXiv:2307.14653)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lightning_speedlimit import display

if TYPE_CHECKING:
    from lightning_speedlimit.callback import SpeedLimit
    from lightning_speedlimit.record import RunRecord
    from lightning_speedlimit.report import Comparison, compare
    from lightning_speedlimit.trajectory import TrajectoryMeter, register_mobility

__all__ = ["Comparison", "RunRecord", "SpeedLimit", "TrajectoryMeter", "compare", "register_mobility"]
__version__ = "0.1.0"

# Found on first use: who reads records waits for neither torch nor Lightning.
_HOMES = {
    "SpeedLimit": "callback",
    "RunRecord": "record",
    "Comparison": "report",
    "compare": "report",
    "TrajectoryMeter": "trajectory",
    "register_mobility": "trajectory",
}


def _paint(shown: object) -> str:
    from lightning_speedlimit.report.notebook import html

    return html(shown)


display.painters.append(_paint)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    found = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
