"""What a run leaves behind: columns over the log steps, sketches of its trajectory, clouds, a summary."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lightning_speedlimit.checks import arguments, guard
from lightning_speedlimit.display import Displayed
from lightning_speedlimit.record import stretch, why
from lightning_speedlimit.record.clouds import CloudTable
from lightning_speedlimit.record.files import RecordData, from_json, to_json
from lightning_speedlimit.record.folders import record_within
from lightning_speedlimit.record.frames import data_frame
from lightning_speedlimit.record.latest import latest
from lightning_speedlimit.record.layers import LayerTable, told
from lightning_speedlimit.record.reading import checked, plain_reasons, read_folder
from lightning_speedlimit.record.regimes import Regime, regimes
from lightning_speedlimit.record.rows import Meter, RowTable, row_of
from lightning_speedlimit.record.schema import RUN, RecordError, check
from lightning_speedlimit.record.sketches import SketchShelf
from lightning_speedlimit.record.state import data_of, state_of
from lightning_speedlimit.record.summary import Summary
from lightning_speedlimit.record.tables import LayerTables
from lightning_speedlimit.record.tuning import Tuned, Tuning
from lightning_speedlimit.record.windows import Trajectory, Windows
from lightning_speedlimit.record.writing import write_folder

if TYPE_CHECKING:
    from pandas import DataFrame


class RunRecord(LayerTables, Displayed):
    """One run: a table with one row per log step, at most 512 sketches of θ_t − θ_0, layers, clouds, and what was run.

    Args:
        run: what was run, as JSON-able values: optimizer classes and their settings, number of parameters,
            precision, versions. The summary reads `clock` ("steps" or "lr") and `entropy_production` (the
            estimator's name) from it. Tuples become lists; what steers a terminal is escaped, in all text.

    Raises:
        RecordError: a part of `run` that comparisons read is of another type than the package writes.
        TypeError: a value that JSON has no word for.

    Example::

        record = RunRecord({"clock": "steps", "entropy_production": "loss_drop"})
        record.append(50, {"loss": 0.7, "displacement": 1.3})
        record.save("speed_limit")
        print(RunRecord.load("speed_limit").summary())
    """

    run: dict[str, Any]

    def __init__(self, run: Mapping[str, Any] | None = None) -> None:
        if run is not None:
            arguments.check_kind("run", run, Mapping, "what was run, as a dict, or None")
        self.run = from_json(to_json(dict(run or {})))
        check(self.run, RUN, "run")
        self._reasons: dict[str, str] = {}
        self._rows = RowTable()
        self._shelf = SketchShelf()
        self._clouds, self._layers = CloudTable(), LayerTable()
        self._began, self._seconds = time.monotonic(), 0.0

    def __len__(self) -> int:
        """The number of rows."""
        return len(self._rows)

    def __repr__(self) -> str:
        table = self._rows
        return f"RunRecord({len(table)} rows of {len(table.names)} columns, last step {table.last_step})"

    def _as_text(self) -> str:
        return f"{self!r}\n\n{self.summary()}"

    # --- rows

    def append(self, step: int, values: Mapping[str, float], reasons: Mapping[str, str] | None = None) -> None:
        """Adds the row of `step`; a row for the same step replaces the last one.

        Args:
            step: optimizer steps taken so far; may not decrease.
            values: column name → value. A column not seen before is NaN in the earlier rows, a column
                not given is NaN in this one.
            reasons: name → why its value is NaN, or what to beware of. Replaces the earlier reasons.
        """
        step, row = arguments.whole("step", step), row_of(values)
        reasons = {} if reasons is None else arguments.texts("reasons", reasons)
        self._rows.add(step, row)
        self._reasons = plain_reasons(reasons)
        self._shelf.see(step)

    def take(self, meter: Meter, values: Mapping[str, float] | None = None) -> None:
        """Adds the row of what a `TrajectoryMeter` measures now, with a sketch and `seconds`; its only sync.

        `seconds` is wall-clock time since this record was made or loaded, after what it held then.

        Args:
            meter: of a plain loop, after a step. With Lightning the callback does this by itself.
            values: further columns of the row. `compare(cost=…)` knows "samples", "tokens" and "epochs", each the sum
                since the start.
        """
        if not callable(getattr(meter, "measure", None)):
            raise TypeError(f"meter got {guard.shown(meter)}, wanted a TrajectoryMeter")
        given = {} if values is None else arguments.numbers("values", values)
        seconds = self._seconds + time.monotonic() - self._began
        measured, sketch = meter.measure(sketch=True)
        reasons = why.with_cure(meter.reasons, "call meter.record_loss(loss) at each step")
        self.run["measured_coordinates"] = meter.measured_coordinates
        self.run["optimized_coordinates"] = meter.optimized_coordinates
        self.append(meter.steps, {**measured, "seconds": seconds, **given}, reasons)
        self.tune()
        self.add_layers(meter.steps, told(meter.layers()))
        if sketch is not None:
            self.add_sketch(meter.steps, sketch.numpy())

    def tune(self) -> dict[str, float]:
        """Completes the last row with what `tuning` says of the latest steps that tell it, and returns that.

        Those are the last row's, or the last 2, 4, 8, … rows', a half at most (all of a short run): as many as it takes
        for a standard error of at most 0.1 of noise_share and 30 % of the others. NaN where all of them do not.
        """
        found = latest(self._rows.views(), self.run, self._reasons)
        values = {name: tuned.value for name, tuned in found.items()}
        values |= {f"{name}_se": tuned.standard_error for name, tuned in found.items()}
        self.amend(values, {name: tuned.reason for name, tuned in found.items() if tuned.reason})
        return values

    def amend(self, values: Mapping[str, float], reasons: Mapping[str, str] | None = None) -> None:
        """Adds columns to the last row, or replaces them; the row's other values stay, and their reasons.

        Args:
            values: column name → value. A column not seen before is NaN in the earlier rows.
            reasons: name → why its value is NaN, or what to beware of; the reasons that the names in `values`
                had before are dropped.
        """
        if not len(self._rows):
            raise ValueError("amend needs a row to add to, got an empty record; append one first")
        row = row_of(values)
        reasons = {} if reasons is None else arguments.texts("reasons", reasons)
        self._rows.amend(row)
        for name in row:
            self._reasons.pop(name, None)
        self._reasons |= plain_reasons(reasons)

    @property
    def columns(self) -> dict[str, npt.NDArray[Any]]:
        """Name → array over the log steps: `step` (int64) first, then float64 columns; copies."""
        return {name: column.copy() for name, column in self._rows.views().items()}

    def to_dataframe(self) -> DataFrame:
        """`columns` as a pandas frame: a row for each log step, `step` its index.

        Raises:
            ImportError: pandas is not installed (extra "pandas").
        """
        columns = self.columns
        return data_frame(columns, {"step": columns.pop("step")})

    @property
    def reasons(self) -> dict[str, str]:
        """Name → why its last value is NaN, or what to beware of; a copy."""
        return dict(self._reasons)

    # --- sketches

    def wants_sketch(self) -> bool:
        """Whether a sketch of the newest row would stay; ask after `append`.

        A sketch that was not asked for may be added all the same, as at the end of a run: it is kept as the
        last point of the trajectory until the next one takes its place.
        """
        return self._shelf.wants_one()

    def add_sketch(self, step: int, sketch: npt.ArrayLike) -> None:
        """Keeps the sketch (4093 values) of θ_step − θ_0; when 512 are kept, every second goes first."""
        self._shelf.add(arguments.whole("step", step), sketch)

    @property
    def sketch_steps(self) -> npt.NDArray[np.int64]:
        """(sketches,) int64: the steps that the sketches belong to."""
        return self._shelf.steps

    @property
    def sketches(self) -> npt.NDArray[np.float32]:
        """(sketches, 4093) float32, in parameter units; a copy."""
        return self._shelf.sketches

    # --- what it says

    def tuning(self, after: int = 0, to: int | None = None) -> dict[str, Tuned]:
        """critical_batch_size B_c, step_headroom S/C and noise_share N/W of the steps after one row, up to another.

        With W = Σ f_k·u_k, a = Σ f_{k+1}·u_k and the loss drop d: S = 2d − a, C = 2(d − a), N = W − S; B_c = B·N/S
        for SGD without momentum, else B·Σ(‖g_k‖² − g_k·g_{k−1})/Σ g_k·g_{k−1}. B_c is in samples (tokens where these
        are counted), the others have no unit. Each has its standard error: the noise of steps, by second differences of
        the rows, and that of the losses; what drawing coordinates adds is not in it.

        Args:
            after: the step of a row, or 0 for the start. to: the step of a later row; None: the last.

        Returns:
            name → `Tuned` with value, standard_error and reason; NaN where there are fewer than four log steps, where
            what is divided by can't be told from 0, and B_c where the batch size is not known.

        Raises:
            TypeError, ValueError: no whole number; no row is of that step; `to` is not after `after`.

        Source: McCandlish, Kaplan, Amodei et al. 2018, arXiv:1812.06162 (B_simple, steps ∝ 1 + B_c/B); the works of
        the stretch to second order in the step.
        """
        after, to = arguments.whole("after", after), None if to is None else arguments.whole("to", to)
        return Tuning.between(self._rows.views(), self.run, after, to, self._reasons).values

    def summary(self) -> Summary:
        """The last row as a `Summary`, with `tuning` of the whole run; NaN where nothing was recorded."""
        columns, there = self._rows.views(), len(self._rows) > 0
        step = int(columns.pop("step")[-1]) if there else 0
        values = {name: float(column[-1]) for name, column in columns.items()} if there else {}
        whole = self.tuning()
        for name, tuned in whole.items():
            values |= {name: tuned.value, f"{name}_se": tuned.standard_error}
        reasons = why.of_run(self._rows.views(), self._reasons, whole)
        return Summary.from_row(step, values, reasons=reasons, run=self.run)

    def windows(self, first_step: npt.ArrayLike, last_step: npt.ArrayLike) -> Windows:
        """η(s, t) = D²/[(τ_t − τ_s)(A_t − A_s)] ÷ conversion, for any windows between steps that have a sketch.

        Args:
            first_step: s of each window, any shape: 0 or one of `sketch_steps`.
            last_step: t > s of each, of a shape that fits.

        Returns:
            `Windows`, with NaN where a step has no sketch or the efficiency is undefined.

        Raises:
            ValueError: a window that does not start before it ends.
        """
        return self._trajectory().windows(first_step, last_step)

    def regimes(self) -> list[Regime]:
        """The stretches of the run that differ clearly in how efficient their windows are, in order, without gaps.

        ln η over windows (t, 4t) is divided where two levels, or two power laws, describe it clearly better than one
        power law and differ by at least a factor of 1.2 in the mean, and the boundary is placed where the two sides'
        speed-limit times add up to most. What is noise is told by the losses' standard errors and by the scatter
        between neighbouring windows: a regime is rather missed than invented. A loss of unknown error counts as exact.
        Each is told from two windows at least, from some step t to 6t, so that log steps have to be fine enough: a
        run logged every 50 steps shows nothing of its first 50. A smooth bend that no one power law describes, as of
        a run that goes on when it has converged, is divided too; where in it is then a matter of definition.

        Returns:
            at most four; one where there is one regime, or too few steps to tell; none where nothing is recorded.

        Source: the two regimes of arXiv:2307.14653 in its image experiments.
        """
        return regimes(self._trajectory())

    def stretch(self, start: int = 0, stop: int | None = None) -> RunRecord:
        """The run from one step to another as a record of its own: sums from `start` on, its steps counted from 0.

        What needs the whole run is left out (`efficiency`, layers); D is that of the sketches, known to 2.2 %, and NaN
        where there is none at `start`. `run["stretch"]` has `start` and `stop`.

        Args:
            start: 0, or the step of a row; between rows that of the row before.
            stop: the same; None: the last row.

        Raises:
            TypeError, ValueError: no whole number, or no row between the two.
        """
        start = arguments.whole("start", start)
        stop = None if stop is None else arguments.whole("stop", stop)
        cut = stretch.cut(self.columns, self.sketch_steps, self.sketches, start, stop)
        record = RunRecord(stretch.description(self.run, cut.begin, cut.end))
        for step, values in cut.rows:
            record.append(step, values, cut.reasons)
            if step in cut.sketches:
                record.add_sketch(step, cut.sketches[step])
        return record

    def _trajectory(self) -> Trajectory:
        rows = self._rows.views()
        return Trajectory(rows.pop("step"), rows, self._shelf.steps, self._shelf.sketches)

    # --- state and files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the record into the folder `path`, atomically: a kill leaves the one before.

        Of several writers in one folder the last one's record is there. Files keep the modes that you gave them.

        Raises:
            RecordError: `load` would refuse it, as with a `run` of more than a megabyte.
            OSError: the folder can't be written (read-only, full, locked by another writer).
        """
        write_folder(arguments.path("path", path), self._data(sketches=True))

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, sketches: bool = True) -> RunRecord:
        """Reads a folder written by `save`, or the only such folder below it. Executes nothing, checks everything.

        Args:
            path: the record's folder, or that of its run, as "lightning_logs/version_0".
            sketches: False leaves them out (8 MB when there are 512): for many runs whose columns alone are wanted.
                `windows` and `regimes` then know of no step.

        Raises:
            RecordError: the folder is missing, damaged, newer than this version, or no record; or several lie below it.
        """
        arguments.check_flag("sketches", sketches)
        try:
            folder = arguments.path("path", path, "a folder")
        except ValueError as error:
            raise RecordError(str(error)) from error
        found = record_within(folder)
        try:
            return cls._from_data(read_folder(found, sketches=sketches))
        except RecordError as error:
            raise RecordError(f"{found}: {error}") from error  # of many records, which

    def state_dict(self, *, sketches: bool = True) -> dict[str, Any]:
        """Everything, as dicts, lists, str, int, float and (under "arrays") numpy arrays.

        Args:
            sketches: False leaves them out (8 MB when there are 512).
        """
        arguments.check_flag("sketches", sketches)
        return state_of(self._data(sketches=sketches))

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> RunRecord:
        """The record that `state_dict` was taken of.

        Raises:
            TypeError: no dict. RecordError: what it holds is no record's.
        """
        return cls._from_data(data_of(state))

    def _data(self, *, sketches: bool) -> RecordData:
        shelf = self._shelf
        kept = slice(None) if sketches else slice(0)
        columns = self._rows.views()
        step, rows = columns.pop("step"), list(columns.values())
        return RecordData(
            run=self.run,
            reasons=dict(self._reasons),
            columns=self._rows.names,
            step=step.copy(),
            values=np.array(rows, dtype=np.float64).reshape(len(rows), len(step)),
            sketch_steps=shelf.steps[kept],
            sketch_ticks=shelf.ticks[kept],
            sketches=shelf.sketches[kept],
            sketch_state=shelf.state(sketches=sketches),
            cloud_layers=self._clouds.layers,
            cloud_step=self._clouds.steps,
            cloud_particles=self._clouds.particles,
            cloud_values=self._clouds.values,
            layer_names=self._layers.names,
            layer_step=self._layers.step,
            layer_values=self._layers.values,
        )

    @classmethod
    def _from_data(cls, data: RecordData) -> RunRecord:
        data = checked(data)
        record = cls(data.run)
        record._reasons = dict(data.reasons)
        record._rows = RowTable.restore(data.step, data.columns, data.values)
        seconds = record._rows.views().get("seconds", np.empty(0))
        record._seconds = float(np.nan_to_num(seconds[-1])) if len(seconds) else 0.0
        record._shelf = SketchShelf.restore(data.sketch_steps, data.sketch_ticks, data.sketches, data.sketch_state)
        record._clouds = CloudTable.restore(
            steps=data.cloud_step, layers=data.cloud_layers, particles=data.cloud_particles, values=data.cloud_values
        )
        record._layers = LayerTable.restore(data.layer_step, data.layer_names, data.layer_values)
        return record
