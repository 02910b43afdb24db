"""Our values under their names in Lightning: for loggers, for what other callbacks monitor, and the progress bar."""

from __future__ import annotations

import math
from typing import Any

import torch

from lightning_speedlimit.callback import lightning, neuron_clouds
from lightning_speedlimit.callback.layer_names import LayerNames, layer_key
from lightning_speedlimit.callback.logged_metrics import LoggedMetrics
from lightning_speedlimit.callback.settings import Settings
from lightning_speedlimit.checks import guard
from lightning_speedlimit.checks.guard import Say
from lightning_speedlimit.record import RunRecord
from lightning_speedlimit.trajectory.estimates import LAYER_VALUES

PREFIX = "speed_limit/"
LOGGED = (
    "noise_share",
    "critical_batch_size",
    "step_headroom",
    "efficiency",
    "efficiency_low",
    "efficiency_drift",
    "efficiency_action",
    "kinematic_efficiency",
    "straightness",
    "steadiness",
    "conversion",
    "signal_fraction",
    "displacement",
    "path_length",
    "action",
    "loss_drop",
    "entropy_production",
    "grad_norm",
    "grad_norm_clipped",
    "step_norm",
    "elapsed",
    "speed_limit_time",
)
IN_BAR = ("noise_share", "critical_batch_size")


class ValueLog:
    """Gives values to the module's `log`.

    Attributes:
        announces: a callback monitors one of them, and must find it from the first batch on.
    """

    def __init__(self, trainer: Any, settings: Settings, say: Say) -> None:
        self.announces = bool(_watched(trainer))
        self._settings, self._say = settings, say
        self._has_logger = bool(trainer.loggers)  # Lightning warns of each name that is logged to none
        self._rows_announced = self._clouds_announced = False
        self._metrics = LoggedMetrics()

    def announce_rows(self, trainer: Any, module: Any, record: RunRecord | None) -> None:
        """NaN, or what a resumed run knows; once."""
        if not self.announces or self._rows_announced:
            return
        self._rows_announced = True
        layers = LayerNames.of(module, every=True).logged.values() if self._settings.per_layer else ()
        known = [layer_key(layer, value) for layer in layers for value in LAYER_VALUES]
        columns = record.columns if record is not None and len(record) else {}
        last = {name: float(columns[name][-1]) for name in LOGGED if name in columns}
        names = [*LOGGED, *sorted(_watched(trainer).intersection(known))]
        self.give(module, dict.fromkeys(names, math.nan) | last, on_step=True)

    def announce_clouds(self, trainer: Any, module: Any, shown: dict[str, float]) -> None:
        """The same for the values of the neurons.

        Args:
            shown: what a resumed run knows.
        """
        if not self.announces or self._clouds_announced or self._settings.clouds is None:
            return
        self._clouds_announced = True
        names = {layer_key(layer.name, name) for layer in neuron_clouds.layers(module) for name in neuron_clouds.SHOWN}
        awaited = dict.fromkeys([*neuron_clouds.SHOWN, *sorted(names & _watched(trainer))], math.nan)
        self.give(module, awaited | shown, on_step=True, logger=False)

    def give(self, module: Any, values: dict[str, float], *, on_step: bool, logger: bool = True) -> None:
        """Through the module's `log`, so that monitors see it; 0-d host tensors: no upload, no read.

        (A callback's own `log` is another module's where trainers share the callback.)
        """
        tensors = torch.tensor(list(values.values()), dtype=torch.float32, device="cpu")
        for name, value in zip(values, tensors.unbind(), strict=True):
            try:
                with torch.device("cpu"):  # a new name's sums, which Lightning makes on torch's default device
                    self._metrics.log(
                        module,
                        PREFIX + name,
                        value,
                        on_step=on_step,
                        on_epoch=not on_step,
                        logger=logger and self._has_logger,
                        prog_bar=self._settings.prog_bar and name in IN_BAR,
                        batch_size=1,
                    )
            except Exception as error:  # the module logs that name itself in another way, or has a `log` of its own
                said = f"SpeedLimit could not log {PREFIX}{name} ({guard.told(error)}); it stays in callback.record"
                self._say(said, "log")


def _watched(trainer: Any) -> set[str]:
    """Names of ours that other callbacks monitor."""
    return {key.removeprefix(PREFIX) for key in lightning.watched(trainer) if key.startswith(PREFIX)}
