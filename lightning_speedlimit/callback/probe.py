"""A fixed probe: the loss of the first training batches, at θ_0 and again on log steps, without a trace."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter, is_lazy

from lightning_speedlimit.callback import isolation, plain_batches
from lightning_speedlimit.checks import guard


class Probe:
    """L on the first `size` batches that training delivered, through training_step on copies of the module.

    Nothing of the training is touched: see `isolation.Isolation`. Where that can't be had the probe gives up for
    good: `why` says so, and its losses are NaN.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.batches: list[Any] = []
        self.first: Tensor | None = None
        self.why: str | None = None
        self._delivered = 0

    @property
    def complete(self) -> bool:
        return self._delivered >= self.size

    def keep(self, batch: Any) -> None:
        """A copy of a batch on its way into training_step, as long as there are too few."""
        if self.complete:
            return
        self._delivered += 1
        if self.why is not None:
            return
        try:
            self.batches.append(isolation.deep_copy(batch))
        except Exception as error:  # whatever copying an object of a class of the user's own may raise
            self.give_up(f"a batch can't be copied ({_told(error)})")

    def give_up(self, why: str) -> None:
        self.why, self.batches, self.first = why, [], None

    def begin(self, trainer: Any, module: torch.nn.Module, start: Iterable[tuple[Tensor, Tensor]]) -> bool:
        """Evaluate at θ_0 as soon as that can be: all batches are there, and lazy layers have their weights.

        Args:
            start: parameters and their θ_0.

        Returns:
            Whether θ_0 is needed no more.
        """
        if self.why is None and self.complete and not any(map(is_lazy, (*module.parameters(), *module.buffers()))):
            self.first = self._losses(trainer, module, start)
        return self.first is not None or self.why is not None

    def losses(self, trainer: Any, module: Any) -> tuple[Tensor, Tensor] | None:
        """(size,) float64 losses at θ_0 and at θ as it is now, NaN once the probe has given up; None before θ_0's."""
        last = None if self.first is None else self._losses(trainer, module, ())
        if self.first is not None and last is not None:
            return self.first, last
        undefined = torch.full((self.size,), math.nan, dtype=torch.float64, device=module.device)
        return (undefined, undefined) if self.why is not None and self.complete else None

    def _losses(self, trainer: Any, module: torch.nn.Module, weights: Iterable[tuple[Tensor, Tensor]]) -> Tensor | None:
        found = []
        try:
            apart = isolation.Isolation(trainer, module, self.batches)
            with apart.open():
                for index, batch in enumerate(self.batches):
                    with apart.copy(weights, index) as twin:  # a seed of its own for each
                        found.append(_loss(trainer, twin, isolation.deep_copy(batch), index))
            return torch.stack(found)
        except Exception as error:  # whatever a training_step may raise on a copy and without gradients
            self.give_up(_told(error))
            return None

    def state_dict(self) -> dict[str, Any]:
        """Plain types and tensors; of batches of other types, that they are lost."""
        if self.why is not None:
            return {"size": self.size, "why": self.why}
        if self.first is None:
            return {}
        try:
            batches = plain_batches.encoded(self.batches, self.first.device)
        except plain_batches.NotPlain as error:
            return {"size": self.size, "why": f"a checkpoint can't hold its batches ({error}): the run was resumed"}
        return {"size": self.size, "first": self.first.cpu(), "batches": batches}

    @classmethod
    def restored(cls, state: dict[str, Any], device: torch.device) -> Probe:
        probe = cls(state["size"])
        probe._delivered = probe.size
        probe.why = state.get("why")
        if probe.why is None:
            probe.first = state["first"].to(device)
            probe.batches = plain_batches.decoded(state["batches"], device)
        return probe


def _told(error: Exception) -> str:
    return str(error) if isinstance(error, isolation.NotIsolated) else guard.told(error)


def _loss(trainer: Any, module: Any, batch: Any, index: int) -> Tensor:
    """0-d float64, on its device."""
    step = module.training_step
    wanted = inspect.signature(step).parameters.values()
    takes_index = len(wanted) > 1 or any(p.kind is p.VAR_POSITIONAL for p in wanted)
    arguments = [batch, index] if takes_index else [batch]
    with trainer.precision_plugin.train_step_context(), torch.no_grad():
        output = step(*arguments)
    loss = output["loss"] if isinstance(output, dict) else output
    if not isinstance(loss, Tensor):
        raise TypeError(f"training_step returned {type(loss).__name__} for a probe batch, wanted a loss")
    return loss.detach().double().reshape(())


class StartWeights:
    """A copy of θ_0 of the parameters of a module and of its optimizers, by their names."""

    def __init__(self, module: torch.nn.Module, optimizers: Sequence[Any]) -> None:
        held = [p for o in optimizers for group in o.param_groups for p in group["params"]]
        found = {f"optimizers.{i}": p for i, p in enumerate(held)} | dict(module.named_parameters())
        self._names = {id(p): name for name, p in found.items()}
        self._found = {name: p for name, p in found.items() if self._names[id(p)] == name}
        self._values: dict[str, Tensor] = {}

    def take(self) -> None:
        """θ as it is, of those that have not been taken yet: call it before the first step of each.

        (Lazy layers are there after their first forward pass.)
        """
        for name, parameter in self._found.items():
            if name not in self._values and not isinstance(parameter, UninitializedParameter):
                self._values[name] = parameter.detach().clone()

    def of(self, parameter: Tensor) -> Tensor | None:
        """θ_0 of one of them; None where it is not known."""
        return self._values.get(self._names.get(id(parameter), ""))

    def known(self) -> list[tuple[Tensor, Tensor]]:
        """Each parameter whose θ_0 is known, and that."""
        return [(p, self._values[name]) for name, p in self._found.items() if name in self._values]

    def state_dict(self) -> dict[str, Tensor]:
        return {name: value.cpu() for name, value in self._values.items()}

    def restored(self, state: dict[str, Tensor] | None) -> StartWeights | None:
        """With what was saved; None where nothing was, or of others: what the module holds now is not θ_0."""
        if state is None or not state.keys() <= self._found.keys():
            return None
        self._values |= {name: value.to(self._found[name].device) for name, value in state.items()}
        return self
