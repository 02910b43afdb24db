"""Puts a meter on the optimizers of a Trainer that can be measured, and says which can't."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_speedlimit.callback import lightning
from lightning_speedlimit.callback.layer_names import LayerNames
from lightning_speedlimit.callback.logger_runs import described, hyperparameters
from lightning_speedlimit.callback.settings import Settings
from lightning_speedlimit.checks import guard
from lightning_speedlimit.checks.guard import Say, look
from lightning_speedlimit.record import RunRecord
from lightning_speedlimit.trajectory import TrajectoryMeter
from lightning_speedlimit.trajectory.optimizers import cure_of, why_unhooked
from lightning_speedlimit.trajectory.shards import are_sharded

_DESCRIBED = (
    "clock",
    "entropy_production",
    "monitor",
    "loss_window",
    "probe_batches",
    "measure_every_n_steps",
    "clouds",
    "coordinates",
)


def attach(callback: Settings, trainer: Any, module: Any, names: LayerNames, say: Say) -> TrajectoryMeter | None:
    """A meter on every optimizer that has step hooks; None where none has. Says which have not."""
    why = lightning.unmeasurable(trainer, module)
    if why is not None:
        say(f"SpeedLimit measures nothing in this run: {why}, which it does not support")
        return None
    hooked = _hooked(trainer.optimizers, say)
    if not hooked:
        return None
    if not any(p.requires_grad for o in hooked for g in o.param_groups for p in g["params"]):
        said = "SpeedLimit got optimizers whose parameters are all frozen, wanted one with requires_grad=True"
        say(f"{said}: nothing is measured until one is unfrozen")
    # Of shards no process knows a layer's path, and one may hold nothing of a layer: only where they are asked for.
    sharded = are_sharded([p for o in hooked for g in o.param_groups for p in g["params"]])
    meter = TrajectoryMeter(
        hooked,
        clock=callback.clock,
        entropy_production=callback.entropy_production,
        loss_window=callback.loss_window,
        measure_every_n_steps=callback.measure_every_n_steps,
        coordinates=callback.coordinates,
        gradient_changes=lightning.gradient_changes(trainer, module, callback),
        layer_of=None if sharded and not callback.per_layer else names,
        process_group=lightning.process_group(trainer),
    )
    writes = lightning.writes_of_clipping(trainer, module)
    if writes is not None:
        meter.recorder.expect_writes(writes)
    if meter.sharded:
        said = f"SpeedLimit under {type(trainer.strategy).__name__}: each process holds a part of the parameters"
        left_out = "probe_batches and clouds are left out"
        say(f"{said}. Nothing is saved in checkpoints (a resumed run is measured from there); {left_out}")
    return meter


def _hooked(optimizers: Sequence[Any], say: Say) -> list[Any]:
    real = [o for o in optimizers if look(_has_groups, True, o)]  # for "no optimizer" Lightning has one without groups
    if not real:
        say("SpeedLimit measures nothing: configure_optimizers returned no optimizer")
    found = []
    for optimizer in real:
        why = why_unhooked(optimizer)
        if why is None:
            found.append(optimizer)
        else:
            name, cure = type(optimizer).__name__, cure_of(optimizer)
            say(f"SpeedLimit can't measure {name}, which {why}: {cure}. What others do is measured")
    return found


def _has_groups(optimizer: Any) -> bool:
    return bool(optimizer.param_groups)


def new_record(callback: Settings, trainer: Any, module: Any, say: Say) -> RunRecord:
    """Empty, with a description of the run, where a record can hold that."""
    settings = {name: getattr(callback, name) for name in _DESCRIBED}
    try:
        return RunRecord({**settings, **lightning.run_description(trainer, module), **_named(trainer, module)})
    except Exception as error:  # settings of optimizers may be anything
        say(f"SpeedLimit's record does not tell what was run: {guard.told(error)}")
        return RunRecord({"clock": callback.clock, "entropy_production": callback.entropy_production})


def _named(trainer: Any, module: Any) -> dict[str, Any]:
    """What its first logger calls the run, where this process has it, and the hyper-parameters; if there are any."""
    given = hyperparameters(module)
    named = (
        look(described, {}, trainer.loggers[0]) if trainer.loggers and trainer.is_global_zero else {}
    )  # others have none
    return ({"hparams": given} if given else {}) | ({"logger": named} if named else {})
