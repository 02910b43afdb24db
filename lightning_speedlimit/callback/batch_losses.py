"""The losses of a training's batches, put together to those of its joint steps."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_speedlimit.callback import logged_metrics


class BatchLosses:
    """The loss of each joint step: the mean over the batches of its accumulation window. No sync.

    `monitor`: None = what training_step returns; else the name of what it logs.
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._count = 0
        self._first: Tensor | None = None  # of this batch's backwards
        self._backwards = 0
        self._last_monitored: Tensor | None = None

    def see_backward(self, trainer: Any, loss: Tensor, monitor: str | None) -> None:
        self._backwards += 1
        if self._backwards == 1:
            self._first = loss.detach() if monitor is None else self._monitored(trainer, monitor)

    def add(self, trainer: Any, module: Any, outputs: Any, monitor: str | None) -> None:
        """A batch's loss; automatic optimization divided it by the batches of its window."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if monitor is not None:
            loss = self._monitored(trainer, monitor)
            self._last_monitored = loss if loss is not None else self._last_monitored
        if module.automatic_optimization and self._backwards > 1:
            loss = self._first  # LBFGS evaluates it again and again; the first one is at θ_k
        self._first, self._backwards = None, 0
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            return
        loss = loss.detach() if loss.dtype.itemsize > 2 else loss.detach().float()
        if monitor is None and module.automatic_optimization and trainer.accumulate_grad_batches > 1:
            loss = loss * trainer.accumulate_grad_batches
        self._sum = loss if self._sum is None else self._sum + loss
        self._count += 1

    def take(self) -> Tensor | None:
        """The joint step's loss, and begin the next window; None where no batch of it had one."""
        total, count = self._sum, self._count
        self._sum, self._count = None, 0
        return None if total is None else (total if count == 1 else total / count)

    def state(self) -> tuple[Tensor | None, int]:
        """Of a window that is not over."""
        return None if self._sum is None else self._sum.cpu(), self._count

    def load(self, state: tuple[Tensor | None, int], device: Any) -> None:
        total, self._count = state
        self._sum = None if total is None else total.to(device)

    def _monitored(self, trainer: Any, name: str) -> Tensor | None:
        """What was logged under this name in this batch; what an earlier one logged is no loss of this one."""
        found = logged_metrics.last_logged(trainer, name)
        return None if found is self._last_monitored else found
