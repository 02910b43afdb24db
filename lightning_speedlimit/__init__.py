"""How close a training run came to the thermodynamic speed limit (Seroussi et al., arXiv:2307.14653)."""

from lightning_speedlimit.callback import SpeedLimit
from lightning_speedlimit.record import RunRecord
from lightning_speedlimit.trajectory import TrajectoryMeter, register_mobility

__all__ = ["RunRecord", "SpeedLimit", "TrajectoryMeter", "register_mobility"]
__version__ = "0.1.0"
