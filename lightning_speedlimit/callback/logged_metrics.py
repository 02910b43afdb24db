"""Lightning's collection of what was logged: values in it are read, and ours are given their next ones."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_speedlimit.callback.lightning import is_own


def last_logged(trainer: Any, name: str) -> Tensor | None:
    """What training logged last under this name, at a step: another tensor at each `log`, not read.

    (`trainer.callback_metrics` keeps what validation logged, and reads the progress bar's metrics each time.)
    """
    for _, item in trainer._results.valid_items() if trainer._results else ():
        if item.meta.on_step and name in (item.meta.name, item.meta.forked_name(True)):
            value = item._forward_cache
            if isinstance(value, Tensor) and value.numel() == 1:
                return value
    return None


def names(trainer: Any) -> list[str]:
    """What training logged at its steps so far."""
    items = trainer._results.valid_items() if trainer._results else ()
    return list(dict.fromkeys(item.meta.name for _, item in items if item.meta.on_step))


class LoggedMetrics:
    """The metrics that `module.log` has made for our values.

    A name's first value goes through `log`; the next ones go to the metric that it made, as `log` itself would do in
    the end: a tenth of its time, most of which goes into copies of the metric's settings.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[Any, dict[str, Any]]] = {}

    def log(self, module: Any, name: str, value: Tensor, **settings: Any) -> None:
        """`module.log(name, value, **settings)`; value: a 0-d host tensor."""
        if is_own(module, "log") or "log" in vars(module):
            module.log(name, value, **settings)
            return
        key, results = f"{module._current_fx_name}.{name}", module.trainer._results
        metric, known = self._known.get(key, (None, None))
        if metric is not None and known == settings and self._takes_next(module, key, metric):
            results.update_metrics(key, value, settings["batch_size"])
            module.trainer._logger_connector._current_fx = module._current_fx_name
            return
        module.log(name, value, **settings)
        if results is not None and key in results:
            self._known[key] = results[key], settings

    @staticmethod
    def _takes_next(module: Any, key: str, metric: Any) -> bool:
        """The metric is still there, and `log` would not reset it first."""
        trainer = module.trainer
        results = trainer._results
        return bool(
            results is not None
            and results.get(key) is metric
            and results.dataloader_idx is None
            and not trainer._logger_connector.should_reset_tensors(module._current_fx_name)
        )
