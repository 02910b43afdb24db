"""Langevin dynamics as a torch optimizer: gradient descent at a temperature."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD
from torch.optim.optimizer import ParamsT
from torch.optim.sgd import sgd

__all__ = ["Langevin"]


class Langevin(SGD):
    """θ ← θ − lr (∇L + wθ) + √(2 T lr) ξ: Euler–Maruyama of dθ = −∇L dt + √(2T) dW, one step = lr of time.

    Its stationary distribution tends to e^{−L/T} as lr → 0; where L = ½hθ² the variance is T/(h(1 − lr·h/2)).
    At temperature 0 it is `torch.optim.SGD` bit by bit, and draws no random numbers. Parameters without a
    gradient stay where they are, as in SGD. A complex parameter is two real ones.

    Args:
        params: parameters, or groups of them; a group may have its own `lr`, `temperature` and `weight_decay`.
        lr: time of one step, parameter²/loss; a number, or a tensor of one element.
        temperature: T ≥ 0, in units of the loss. Of the loss that is differentiated: where it is a mean over N
            examples, sampling e^{−Σ loss} takes T = 1/N. A schedule may change `group["temperature"]`.
        weight_decay: w ≥ 0, an L2 term ½w|θ|² of the loss, loss/parameter².
        maximize: climb the loss; samples e^{+L/T}.
        foreach: as in `torch.optim.SGD`.
        generator: source of ξ, one per device (several: an iterable). None: the device's global one, whose
            state is then yours to keep. `state_dict` holds the generators' states, so a resumed run goes on
            with the same noise.

    Raises:
        TypeError: no generator, or no number.
        ValueError: a negative or infinite setting; a parameter on a device that no generator is for.

    Source: Seroussi, Alemi, Helias, Ringel, arXiv:2307.14653, their second dynamics. Its entropy production is
    not the action of its trajectory, which diverges as lr → 0: `lightning_speedlimit.ensemble` estimates it.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        temperature: float,
        *,
        weight_decay: float = 0.0,
        maximize: bool = False,
        foreach: bool | None = None,
        generator: torch.Generator | Iterable[torch.Generator] | None = None,
    ) -> None:
        self._generators = _by_device(generator)
        self._default_temperature = temperature
        _check_numbers({"lr": lr, "temperature": temperature, "weight_decay": weight_decay})
        super().__init__(params, lr=lr, weight_decay=weight_decay, maximize=maximize, foreach=foreach)
        self.defaults["temperature"] = temperature

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group with its own settings, checked as those of the constructor are."""
        param_group.setdefault("temperature", self._default_temperature)
        _check_numbers({name: param_group[name] for name in _NUMBERS if name in param_group})
        for name in ("momentum", "dampening", "nesterov", "differentiable", "fused"):
            if param_group.get(name):
                raise ValueError(f"{name} must be off, got {param_group[name]!r}; Langevin dynamics has none")
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            self._generator_for(parameter)

    def _generator_for(self, parameter: Tensor) -> torch.Generator | None:
        if not self._generators:
            return None
        if parameter.device not in self._generators:
            raise ValueError(
                f"generator must be there for every device, got {', '.join(map(str, self._generators))} and a "
                f"parameter on {parameter.device}; add torch.Generator({str(parameter.device)!r})"
            )
        return self._generators[parameter.device]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; returns what the closure returned, which is called first and with gradients on."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            sparse = any(p.grad.is_sparse for p in params)
            if sparse and group["temperature"]:
                raise RuntimeError(
                    "Langevin at a temperature got a sparse gradient, and its noise moves every coordinate; "
                    "use dense gradients (sparse=False), or temperature 0"
                )
            _descend(group, params, sparse)
            if group["temperature"]:
                self._diffuse(group, params)
        return loss

    def _diffuse(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """θ ← θ + √(2 T lr) ξ."""
        moved = [torch.view_as_real(p) if p.is_complex() else p for p in params]
        noise = [torch.empty_like(p).normal_(generator=self._generator_for(p)) for p in moved]
        if isinstance(group["lr"], Tensor):
            root = (2.0 * group["temperature"] * group["lr"]).sqrt().reshape(())
            for xi in noise:
                xi.mul_(root.to(xi.device))
            scale = 1.0
        else:
            scale = math.sqrt(2.0 * group["temperature"] * group["lr"])
        if group["foreach"] is False:
            for parameter, xi in zip(moved, noise, strict=True):
                parameter.add_(xi, alpha=scale)
        elif moved:
            torch._foreach_add_(moved, noise, alpha=scale)

    def state_dict(self) -> dict[str, Any]:
        """SGD's, and under "generators" the state of each generator by its device."""
        states = {str(device): generator.get_state() for device, generator in self._generators.items()}
        return super().state_dict() | {"generators": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Settings and noise go on as they were saved; a checkpoint of SGD leaves temperature and noise alone.

        Raises:
            ValueError: the checkpoint holds the state of a generator that this optimizer has none for.
        """
        states = state_dict.get("generators", {})
        own = {str(device): generator for device, generator in self._generators.items()}
        if missing := states.keys() - own.keys():
            raise ValueError(
                f"the checkpoint holds noise generators for {', '.join(sorted(missing))}, this optimizer has "
                f"{', '.join(own) or 'none'}; construct it with generator=torch.Generator({min(missing)!r})"
            )
        super().load_state_dict(state_dict)
        for device, state in states.items():
            own[device].set_state(state.cpu())

    def __getstate__(self) -> dict[str, Any]:
        own = {"_generators": self._generators, "_default_temperature": self._default_temperature}
        return super().__getstate__() | own

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for group in self.param_groups:
            group.setdefault("temperature", self._default_temperature)


# Langevin's step is named a wrapper of SGD's, which it is: the update is SGD's plus noise of mean zero, and who
# looks the step up to know the mobility (trajectory/mobility.py) finds SGD's. `updated=()`: the mark by which
# torch knows a step whose hooks are run already must not be copied with it.
functools.update_wrapper(Langevin.step, SGD.step, assigned=(), updated=())

_NUMBERS = ("lr", "temperature", "weight_decay")


def _descend(group: dict[str, Any], params: list[Tensor], sparse: bool) -> None:
    """SGD's own arithmetic, so that its bits are SGD's."""
    sgd(
        params,
        [p.grad for p in params if p.grad is not None],
        [None] * len(params),
        has_sparse_grad=sparse,
        foreach=group["foreach"],
        fused=None,
        weight_decay=group["weight_decay"],
        momentum=0.0,
        lr=group["lr"],
        dampening=0.0,
        nesterov=False,
        maximize=group["maximize"],
    )


def _by_device(
    generator: torch.Generator | Iterable[torch.Generator] | None,
) -> dict[torch.device, torch.Generator]:
    if generator is None:
        return {}
    several = list(generator) if isinstance(generator, Iterable) else [generator]
    found: dict[torch.device, torch.Generator] = {}
    for one in several:
        if not isinstance(one, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator or several, got {type(one).__name__}")
        if one.device in found:
            raise ValueError(f"generator must be one per device, got two for {one.device}; leave one out")
        found[one.device] = one
    return found


def _check_numbers(numbers: dict[str, Any]) -> None:
    for name, value in numbers.items():
        if isinstance(value, Tensor) and name == "lr":
            if value.numel() != 1:
                raise ValueError(f"lr must have one element, got shape {tuple(value.shape)}; take one per group")
        elif isinstance(value, bool) or not isinstance(value, int | float):
            raise TypeError(f"{name} must be a number, got {value!r}")
        if not 0.0 <= float(value) < math.inf:
            raise ValueError(f"{name} must be finite and not negative, got {value!r}")
