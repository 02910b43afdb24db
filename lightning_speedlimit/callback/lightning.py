"""The one place that reaches into Lightning: both namespaces, and what has no public attribute."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import importlib.util
import operator
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_speedlimit.callback import training_data
from lightning_speedlimit.checks.guard import look
from lightning_speedlimit.trajectory.description import describe_optimizers, plain

_NAMESPACES = ("pytorch_lightning", "lightning.pytorch")


def _installed() -> list[Any]:
    """Lightning's packages that are there: one, or both under their two names."""
    found, failed = [], []
    for name in _NAMESPACES:
        if importlib.util.find_spec(name.split(".")[0]) is None:
            continue
        try:
            package = importlib.import_module(name)
            _ = package.Callback
        except (ImportError, AttributeError) as error:  # a mere folder of that name, or a package that misses something
            failed.append(f"{name}: {error}")
        else:
            found.append(package)
    if not found:
        why = "; ".join(failed) or "found none"
        raise ImportError(f"SpeedLimit needs Lightning, {why}: pip install pytorch-lightning")
    return found


NAMESPACES = _installed()

if TYPE_CHECKING:
    from pytorch_lightning import Callback

    CallbackBase = Callback
else:
    # A class with both bases works in the Trainers and the command lines of both packages.
    CallbackBase = type("CallbackBase", tuple({m.Callback: None for m in NAMESPACES}), {})


def is_running(trainer: Any) -> bool:
    """A fit of it goes on, or an evaluation."""
    return bool(trainer.state.status == "running")


def should_log(trainer: Any) -> bool:
    """Lightning's own rhythm (log_every_n_steps); LearningRateMonitor asks the same connector.

    It also logs at the step that asks to stop. One process alone may ask, and others would not join in what it
    reads: with several, that step is measured at the end of the epoch, which all reach.
    """
    if trainer.should_stop and trainer.world_size > 1:
        return bool(trainer.log_every_n_steps) and (stepped_batches(trainer) + 1) % trainer.log_every_n_steps == 0
    return bool(trainer._logger_connector.should_update_logs)


def process_group(trainer: Any) -> Any:
    """The processes of torch.distributed that train together; None where there is one, or another launcher's."""
    dist = torch.distributed
    together = trainer.world_size > 1 or "FSDP" in type(trainer.strategy).__name__
    return dist.group.WORLD if together and dist.is_available() and dist.is_initialized() else None


def data_parallel_processes(trainer: Any) -> int | None:
    """How many processes have samples of their own; None where the strategy does not tell.

    It tells a DistributedSampler: tensor-parallel processes share theirs.
    """
    if trainer.world_size == 1:
        return 1
    found = look(lambda: trainer.strategy.distributed_sampler_kwargs["num_replicas"], None)
    return found if isinstance(found, int) and found > 0 else None


def stepped_batches(trainer: Any) -> int:
    """The x-axis that Lightning's loggers use for step metrics."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def validates_next(trainer: Any) -> bool:
    """Whether a validation follows this batch: at its end, monitors look at what was logged.

    False where the processes need not agree at this moment: intervals in seconds, and requests to stop.
    """
    if trainer.world_size > 1 and trainer.should_stop:
        return False
    if getattr(trainer, "_val_check_time_interval", None) is not None:
        return False
    return bool(trainer.fit_loop.epoch_loop._should_check_val_fx(trainer.fit_loop._data_fetcher))


def run_folder(trainer: Any) -> str:
    """Where the first logger keeps this run: its log_dir, else save_dir/name/version as ModelCheckpoint has it.

    Loggers without a log_dir (W&B, MLflow) share their save_dir among all runs.
    """
    if not trainer.loggers:
        return str(trainer.default_root_dir)
    logger = trainer.loggers[0]
    log_dir = getattr(logger, "log_dir", None)
    if log_dir is not None:
        return str(log_dir)
    save_dir, name, version = logger.save_dir, logger.name, logger.version
    parts = [str(name)] if name else []
    if version is not None:
        parts.append(version if isinstance(version, str) else f"version_{version}")
    return os.path.join(trainer.default_root_dir if save_dir is None else save_dir, *parts)


def loss_scale(trainer: Any, optimizer: Any) -> Tensor | None:
    """The loss scaler's scale where the gradients still carry it (fused optimizers), as a tensor: no sync.

    `GradScaler.get_scale()` would read it.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return None
    scale = scaler._scale
    return scale if isinstance(scale, Tensor) else None


def gradient_changes(trainer: Any, module: Any, callback: Any) -> Literal["clipping", "given", "unknown"]:
    """What may change gradients after this callback has seen them and before the optimizer does.

    Under manual optimization that is the user's own code. Else it is clipping, where there is any, and what the
    callbacks after this one and the module do in `on_before_optimizer_step`.
    """
    if not module.automatic_optimization:
        return "unknown"
    if trainer.gradient_clip_val or _clips_itself(module):
        return "clipping"
    place = next((i for i, other in enumerate(trainer.callbacks) if other is callback), len(trainer.callbacks))
    later = trainer.callbacks[place + 1 :]
    return "unknown" if any(is_own(part, "on_before_optimizer_step") for part in (module, *later)) else "given"


def writes_of_clipping(trainer: Any, module: Any) -> int | None:
    """How many times torch's clipping writes to each gradient; None where it is not torch's.

    `clip_grad_norm_` multiplies; `clip_grad_value_` clamps from below and from above.
    """
    if not module.automatic_optimization or not trainer.gradient_clip_val or _clips_itself(module):
        return None
    if type(trainer.strategy).__name__ not in ("SingleDeviceStrategy", "DDPStrategy"):
        return None
    return 2 if trainer.gradient_clip_algorithm == "value" else 1


def _clips_itself(module: Any) -> bool:
    return is_own(module, "configure_gradient_clipping")


def is_own(part: Any, hook: str) -> bool:
    """A module's or a callback's method that is not Lightning's."""
    home = str(getattr(getattr(type(part), hook), "__module__", ""))
    return not home.startswith(("pytorch_lightning.", "lightning."))


def change_of_optimizers(trainer: Any, known: list[Any]) -> str | None:
    """What became of these optimizers of the Trainer, in words; None: it has them, and no others."""
    there = trainer.optimizers
    if len(known) == len(there) and all(map(operator.is_, known, there)):
        return None
    before, now = {id(o) for o in known}, {id(o) for o in there}
    if before == now:
        return None
    if before < now:
        return "optimizers were added to those of the Trainer during the fit"
    if now < before:
        return "optimizers were removed from those of the Trainer during the fit"
    return "the optimizers were replaced during the fit"


def plain_optimizer(optimizer: Any) -> Any:
    """The torch optimizer inside a LightningOptimizer."""
    return getattr(optimizer, "optimizer", optimizer)


class TrainerStandIn:
    """In the place of the Trainer, for a copy of the module: what it gives is a copy, what is set on it stays on it.

    Its loggers take everything and keep nothing, and so do `log`, `log_dict` and `print` of the module.
    """

    def __init__(self, trainer: Any, copied: Callable[[Any], Any]) -> None:
        muted = importlib.import_module(f"{_package(trainer).__name__}.loggers.logger").DummyLogger()
        vars(self).update(_trainer=trainer, _copied=copied, logger=muted, loggers=[muted])

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # a step may ask what it is
        return type(vars(self)["_trainer"])

    def take(self, twin: Any, memo: dict[int, Any]) -> None:
        """Be the trainer of the copy of a module.

        Args:
            memo: of the deep copy that it was made by; from here on, copies refer to this one.
        """
        if getattr(twin, "_compiler_ctx", None) is not None:  # their closures are over the module itself
            compiling = importlib.import_module(f"{_package(vars(self)['_trainer']).__name__}.utilities.compile")
            compiling.to_uncompiled(twin)
        for part in twin.modules():
            for name in ("log", "log_dict", "print"):
                if hasattr(part, "log_dict"):
                    vars(part)[name] = _ignore
        memo[id(vars(self)["_trainer"].strategy.model)] = twin  # what wraps the module, under DDP
        twin.trainer = self
        vars(self)["_twin"] = twin

    @functools.cached_property
    def strategy(self) -> Any:
        """A shallow copy: what its methods send to other processes goes its way."""
        found = copy.copy(vars(self)["_trainer"].strategy)
        found.model = found._lightning_module = vars(self)["_twin"]
        copied = vars(self)["_copied"]
        found.optimizers = copied(found.optimizers)
        found.lr_scheduler_configs = copied(found.lr_scheduler_configs)
        return found

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = getattr(vars(self)["_trainer"], name)
        try:
            return vars(self)["_copied"](value)
        except Exception as error:
            raise RuntimeError(f"training_step uses trainer.{name}, which can't be copied: {error}") from error


def _ignore(*args: Any, **kwargs: Any) -> None:
    """Takes the place of `log` on a copy of the module."""


def _package(trainer: Any) -> Any:
    """The one that the trainer comes from, or what it is derived from."""
    modules = [base.__module__ for base in type(trainer).__mro__]
    return next(p for p in NAMESPACES if any(f"{m}.".startswith(f"{p.__name__}.") for m in modules))


def unmeasurable(trainer: Any, module: Any) -> str | None:
    """Why this strategy's parameters can't be followed; None where they can."""
    name = type(trainer.strategy).__name__
    if "DeepSpeed" in name:
        return "DeepSpeed keeps gradients and weights in its engine"
    sharding = getattr(getattr(trainer.strategy, "sharding_strategy", None), "name", "")
    if "FSDP" in name and (sharding.startswith("HYBRID") or sharding == "NO_SHARD"):
        return f"{name} with {sharding} keeps replicas, and its flat parameters do not tell of what"
    return None


def watched(trainer: Any) -> set[str]:
    """The keys that other callbacks monitor. (A `monitor` may be a property that raises before its time.)"""
    return {look(_monitor, "", callback) for callback in trainer.callbacks}


def _monitor(callback: Any) -> str:
    return str(getattr(callback, "monitor", ""))


def run_description(trainer: Any, module: torch.nn.Module) -> dict[str, Any]:
    """What was run, in plain types: optimizers and their settings, model, precision, versions.

    What could not be looked at is left out: data, loaders and settings are the user's own.
    """
    looks: dict[str, Callable[[], Any]] = {
        "model": lambda: type(module).__name__,
        "parameters": lambda: sum(p.numel() for p in _known(module)),
        "trainable_parameters": lambda: sum(p.numel() for p in _known(module) if p.requires_grad),
        "accumulate_grad_batches": lambda: trainer.accumulate_grad_batches,
        "lr_schedules": lambda: [plain(type(c.scheduler).__name__) for c in trainer.lr_scheduler_configs],
        "batch_norm_layers": lambda: sum(isinstance(part, _BatchNorm) for part in module.modules()),
        "gradient_clip_val": lambda: plain(trainer.gradient_clip_val),
        "gradient_clip_algorithm": lambda: plain(trainer.gradient_clip_algorithm),
        "precision": lambda: str(trainer.precision),
        "strategy": lambda: type(trainer.strategy).__name__,
        "world_size": lambda: trainer.world_size,
        "device": lambda: str(trainer.strategy.root_device),
        "versions": lambda: {"torch": str(torch.__version__), **_version(trainer)},
    }
    names = [{"class": type(o).__name__, "groups": []} for o in trainer.optimizers]
    described = look(lambda: describe_optimizers(trainer.optimizers), names)
    found: dict[str, Any] = {"optimizers": described, **training_data.described(trainer)}
    for name, at in looks.items():
        with contextlib.suppress(Exception):
            found[name] = at()
    return found


def _known(module: torch.nn.Module) -> list[Tensor]:
    return [p for p in module.parameters() if not isinstance(p, torch.nn.UninitializedParameter)]


def _version(trainer: Any) -> dict[str, str]:
    lightning = _package(trainer)
    return {lightning.__name__: lightning.__version__}
