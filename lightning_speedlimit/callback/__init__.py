"""SpeedLimit, the callback of Lightning, and the names of what it logs."""

from lightning_speedlimit.callback.speed_limit import SpeedLimit
from lightning_speedlimit.callback.value_log import LOGGED

__all__ = ["LOGGED", "SpeedLimit"]
