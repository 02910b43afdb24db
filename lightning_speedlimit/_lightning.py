"""The one place that reaches into Lightning: both namespaces, and what has no public attribute."""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

_NAMESPACES = ("pytorch_lightning", "lightning.pytorch")


def _installed() -> list[Any]:
    """Lightning's packages that are there: one, or both under their two names."""
    found = []
    for name in _NAMESPACES:
        if importlib.util.find_spec(name.split(".")[0]) is not None:
            found.append(importlib.import_module(name))
    if not found:
        raise ImportError("SpeedLimit needs Lightning, found none: pip install pytorch-lightning")
    return found


NAMESPACES = _installed()

if TYPE_CHECKING:
    from pytorch_lightning import Callback

    CallbackBase = Callback
else:
    # A class with both bases works in the Trainers and the command lines of both packages.
    CallbackBase = type("CallbackBase", tuple({m.Callback: None for m in NAMESPACES}), {})


def should_log(trainer: Any) -> bool:
    """Lightning's own rhythm (log_every_n_steps); LearningRateMonitor asks the same connector."""
    return bool(trainer._logger_connector.should_update_logs)


def stepped_batches(trainer: Any) -> int:
    """The x-axis that Lightning's loggers use for step metrics."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def loss_scale(trainer: Any, optimizer: Any) -> Tensor | None:
    """The loss scaler's scale where the gradients still carry it (fused optimizers), as a tensor: no sync.

    `GradScaler.get_scale()` would read it.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return None
    scale = scaler._scale
    return scale if isinstance(scale, Tensor) else None


def clips_by_value(trainer: Any) -> bool:
    """Not by a common factor; the algorithm is an enumeration of strings, or None."""
    return bool(trainer.gradient_clip_algorithm == "value")


def plain_optimizer(optimizer: Any) -> Any:
    """The torch optimizer inside a LightningOptimizer."""
    return getattr(optimizer, "optimizer", optimizer)


def muted_logger(trainer: Any) -> Any:
    """A logger of the trainer's own namespace that takes everything and keeps nothing."""
    package = next(m for m in NAMESPACES if type(trainer).__module__.startswith(m.__name__))
    return importlib.import_module(f"{package.__name__}.loggers.logger").DummyLogger()


def unmeasurable(trainer: Any, module: Any) -> str | None:
    """Why this strategy's parameters can't be followed; None where they can."""
    name = type(trainer.strategy).__name__
    if "DeepSpeed" in name:
        return "DeepSpeed keeps gradients and weights in its engine"
    if "FSDP" in name or any(hasattr(p, "to_local") for p in module.parameters()):
        return f"{name} shards the parameters"
    return None


def run_description(trainer: Any, module: torch.nn.Module) -> dict[str, Any]:
    """What was run, in plain types: optimizers and their settings, model, precision, versions."""
    parameters = {id(p): p for p in module.parameters() if not isinstance(p, torch.nn.UninitializedParameter)}
    lightning = NAMESPACES[0]
    return {
        "model": type(module).__name__,
        "parameters": sum(p.numel() for p in parameters.values()),
        "trainable_parameters": sum(p.numel() for p in parameters.values() if p.requires_grad),
        "optimizers": [_optimizer_description(o) for o in trainer.optimizers],
        "accumulate_grad_batches": trainer.accumulate_grad_batches,
        "gradient_clip_val": _plain(trainer.gradient_clip_val),
        "gradient_clip_algorithm": _plain(trainer.gradient_clip_algorithm),
        "precision": str(trainer.precision),
        "strategy": type(trainer.strategy).__name__,
        "world_size": trainer.world_size,
        "device": str(trainer.strategy.root_device),
        "versions": {"torch": str(torch.__version__), lightning.__name__: lightning.__version__},
    }


def _optimizer_description(optimizer: Any) -> dict[str, Any]:
    groups = [{k: _plain(v) for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    return {"class": type(optimizer).__name__, "groups": groups}


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()  # at the start of a fit: no step waits for it
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)
