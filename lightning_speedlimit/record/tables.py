"""The tables of a record that are about layers: their clouds of neurons, and their parts of the motion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning_speedlimit.checks import arguments
from lightning_speedlimit.record.clouds import CLOUD_VALUES, CloudTable
from lightning_speedlimit.record.layers import LayerTable


class LayerTables:
    """What `RunRecord` keeps of layers."""

    _clouds: CloudTable
    _layers: LayerTable

    def add_clouds(self, step: int, layers: Mapping[str, Mapping[str, float]]) -> None:
        """Keeps what each layer's cloud of neurons did up to `step`; the same step replaces the last row.

        Args:
            layers: name → {"particles", "wasserstein2", "wasserstein2_lower", "identity_excess", "displacement"}:
                a value that is missing is NaN.
        """
        self._clouds.add(arguments.whole("step", step), arguments.tables("layers", layers))

    @property
    def clouds(self) -> dict[str, Any]:
        """W₂ of each layer's neurons between the start and the rows' steps; all empty where none were measured.

        `step` (rows,) int64; `layers`, their names; `particles` (layers,) int64, neurons N of each; and, each
        (rows, layers) float64 with NaN where a layer was not measured:

        - `wasserstein2`: √(N W₂²), parameter: the layer's displacement up to a relabelling of its neurons (W₂² is
          per neuron); `wasserstein2_lower`: a certified lower bound of it;
        - `displacement`: √(Σ |d_i|²) of the same neurons, parameter;
        - `identity_excess`: displacement²/wasserstein2² − 1, no unit; NaN also where wasserstein2 alone is 0.
        """
        table = self._clouds
        values = dict(zip(CLOUD_VALUES, table.values, strict=True))
        return {"step": table.steps, "layers": table.layers, "particles": table.particles, **values}

    def add_layers(self, step: int, layers: Mapping[str, Mapping[str, float]]) -> None:
        """Keeps what each layer's motion came to up to `step`, in place of what was kept of an earlier step.

        Args:
            layers: name → values as in `layers`, without straightness; what is missing is NaN. "" is what belongs to no
                named layer. Of more than 1,000 those with the largest action stay.
        """
        self._layers.replace(arguments.whole("step", step), arguments.tables("layers", layers))

    @property
    def layers(self) -> dict[str, Any]:
        """What each layer's own motion came to, as of the last reading; empty where that is not known.

        `step`, int (None where empty); `layers`, their names, in the model's order; and, each (layers,) float64:

        - `parameters`, their number; `displacement` D and `path_length` ℓ, parameter; `action`, parameter²/clock;
        - `work_ito` = Σ f_k·u_k, loss;
        - `straightness` = D²/ℓ², 1: low where the layer turns or bounces; of shards NaN;
        - `signal_fraction` = Σ f_{k+1}·u_k / Σ f_k·u_k, 1: the part of its work that the next batch confirms;
        - `efficiency_action`, 1: see `Summary`.

        D², action and work of the layers add up to those of the run.
        """
        return self._layers.columns()
