"""A measurement in a checkpoint: plain types and tensors, which `torch.load(weights_only=True)` takes."""

from __future__ import annotations

from typing import Any

import torch

from lightning_speedlimit.callback.batch_losses import BatchLosses
from lightning_speedlimit.callback.measurement import Measurement
from lightning_speedlimit.callback.plain_batches import why_not_plain
from lightning_speedlimit.callback.probe import Probe
from lightning_speedlimit.record import RunRecord


def state_of(measured: Measurement, losses: BatchLosses) -> dict[str, Any]:
    """The meter's sums and its vectors of the measured coordinates, the record, the losses of an open window.

    Empty where nothing is measured, and of shards: the checkpoint would hold the sums of one process.

    Raises:
        TypeError: something in it is neither of a plain type nor a tensor.
    """
    meter = measured.meter
    if meter is None or meter.sharded:
        return {}
    record = measured.record.state_dict()
    state: dict[str, Any] = {
        "meter": meter.state_dict(),
        "record": record | {"arrays": {k: torch.from_numpy(v) for k, v in record["arrays"].items()}},
        "measured_at": measured.measured_at,
        "last_of_epoch": measured.last_of_epoch,
        "clouds": [measured.clouds_at, dict(measured.clouds_shown)],
        "loss": losses.state(),
        "samples": measured.samples.state(stepped=meter.steps != measured.closed_steps),
        "start": None if measured.start is None else measured.start.state_dict(),
    }
    probe = {} if measured.probe is None else measured.probe.state_dict()
    if probe:
        state["probe"] = probe
    unfit = why_not_plain(state)
    if unfit is not None:
        raise TypeError(f"it holds {unfit}, wanted plain types and tensors: checkpoints are loaded with weights_only")
    return state


def restore(measured: Measurement, losses: BatchLosses, loaded: dict[str, Any], device: torch.device) -> None:
    """Go on where a state was taken. Raises whatever a state of another version or kind, or a damaged one, leads to."""
    meter, callback = measured.meter, measured.callback
    assert meter is not None
    saved = loaded["record"]
    record = RunRecord.from_state_dict(saved | {"arrays": {k: v.cpu().numpy() for k, v in saved["arrays"].items()}})
    meter.load_state_dict(loaded["meter"])
    # All steps are closed: another callback may have saved it before ours saw the end of the batch.
    measured.closed_steps, measured.measured_at = meter.steps, int(loaded["measured_at"])
    losses.load(loaded["loss"], device)
    measured.samples.load(loaded.get("samples"))
    _restore_start(measured, loaded, device)
    if callback.clouds is not None:
        measured.clouds_at, measured.clouds_shown = loaded.get("clouds", (-1, {}))
    measured.last_of_epoch = bool(loaded["last_of_epoch"])
    record.run.update(measured.record.run)
    measured.record = record


def _restore_start(measured: Measurement, loaded: dict[str, Any], device: torch.device) -> None:
    """θ_0 and the probe, for what is left of them to do."""
    callback, measured.probe = measured.callback, None
    if "probe" in loaded and callback.probe_batches:
        measured.probe = Probe.restored(loaded["probe"], device)
    wanting = {"probe_batches": callback.probe_batches and measured.probe is None, "clouds": callback.clouds}
    names = [name for name, wants in wanting.items() if wants]
    if measured.start is not None:
        measured.start = measured.start.restored(loaded["start"]) if names else None
        if names and measured.start is None:
            said = "SpeedLimit resumed without the initial weights, which the checkpoint was saved without"
            measured.say(f"{said}: {' and '.join(names)} left out in this run")
    if callback.probe_batches and measured.probe is None and measured.start is not None:  # saved before all had come
        measured.probe = Probe(callback.probe_batches)
