"""Which optimizers a meter can follow: unwrapped, with step hooks that fire, each parameter once."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_speedlimit.checks.guard import look, told, warn

_WITHIN = 3  # wrappers in wrappers


def unwrapped(optimizer: Any) -> Any:
    """The optimizer whose step runs, and whose hooks fire, in a wrapper of Fabric, Lightning or Accelerate.

    (Others that hold an optimizer, as Lookahead does, move weights of their own.)
    """
    wrappers = ("lightning", "lightning_fabric", "pytorch_lightning", "accelerate")
    wrapper = any(kind.__module__.split(".")[0] in wrappers for kind in type(optimizer).__mro__)
    inner = getattr(optimizer, "optimizer", None) if wrapper else None
    return optimizer if inner is None else unwrapped(inner)


def why_unhooked(optimizer: Any) -> str | None:
    """Why its step hooks would not fire; None where they will."""
    if not look(lambda: hasattr(optimizer, "register_step_post_hook"), False):
        return "has no step hooks"
    if not hasattr(optimizer, "_optimizer_step_post_hooks") or not look(lambda: type(optimizer).step.hooked, False):
        return "has step hooks that never fire (its __init__ does not call super().__init__)"
    try:
        for register in (optimizer.register_step_pre_hook, optimizer.register_step_post_hook):
            register(lambda *args: None).remove()
    except Exception as error:
        return f"takes no step hooks ({told(error)})"
    return None


def cure_of(optimizer: Any) -> str:
    """What to do about an optimizer whose steps can't be seen: hook the one within it, where there is one."""
    inner = inner_optimizers(optimizer)
    if not inner and not _steps(optimizer):
        return "give the optimizer whose step() the training calls"
    if not inner:
        return "derive it from torch.optim.Optimizer and call super().__init__"
    place, found = next(iter(inner.items()))
    name = type(optimizer).__name__
    return (
        f"hook the {type(found).__name__} within it, TrajectoryMeter(optimizer.{place}); "
        f"what {name} itself does to the weights then counts as moved outside of its steps"
    )


def inner_optimizers(optimizer: Any, depth: int = _WITHIN) -> dict[str, Any]:
    """The optimizers that a wrapper holds and whose hooks fire, by the attribute, as in "base" or "optimizer.base"."""
    found: dict[str, Any] = {}
    for name, value in look(lambda: dict(vars(optimizer)), {}).items():
        several = value if isinstance(value, list | tuple) else [value]
        places = [name] if several is not value else [f"{name}[{i}]" for i in range(len(several))]
        for place, part in zip(places, several, strict=True):
            if part is optimizer or not _steps(part):
                continue
            if isinstance(part, Optimizer) and why_unhooked(part) is None:
                found[place] = part
            elif depth > 1:
                found |= {f"{place}.{rest}": own for rest, own in inner_optimizers(part, depth - 1).items()}
    return found


def _steps(thing: Any) -> bool:
    return look(lambda: callable(thing.step), False)


def followed(optimizers: Optimizer | Iterable[Optimizer]) -> list[Optimizer]:
    """The optimizers that can be measured.

    What is left out is said by name. Raises TypeError where nothing is left, ValueError for an empty list.
    """
    given = [unwrapped(o) for o in _listed(optimizers)]
    if not given:
        raise ValueError("optimizers got an empty list, wanted at least one torch optimizer")
    found: list[Optimizer] = []
    for optimizer in given:
        why, name = why_unhooked(optimizer), type(optimizer).__name__
        if why is None:
            found.append(optimizer)
            continue
        if len(given) == 1:
            raise TypeError(f"optimizers got {name}, which {why}, wanted a torch.optim.Optimizer: {cure_of(optimizer)}")
        warn(f"{name} {why}: what it does is not measured, and the rest is", stacklevel=3)
    if not found:
        names = ", ".join(dict.fromkeys(type(o).__name__ for o in given))
        cures = dict.fromkeys(cure_of(o) for o in given if inner_optimizers(o))
        raise TypeError(
            f"optimizers got {names}, none of which has step hooks that fire, wanted torch.optim.Optimizer"
            + "".join(f": {cure}" for cure in cures)
        )
    return found


def _listed(optimizers: Any) -> list[Any]:
    """One optimizer, or what is no list of them, as a list of one: what it lacks is told of it by name."""
    if isinstance(optimizers, Optimizer | Tensor | str | bytes) or _steps(optimizers):
        return [optimizers]
    try:
        return list(optimizers)
    except TypeError:
        return [optimizers]


def parameters_of(optimizers: Iterable[Optimizer]) -> list[Tensor]:
    """Of all their groups, as they are now."""
    return [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]


def within_another_step(optimizer: Optimizer) -> bool:
    """A `step` that another `step` of the same optimizer has called: torch hooks both."""
    depth, frame = 0, sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "wrapper" and frame.f_locals.get("self") is optimizer:
            depth += 1
        frame = frame.f_back  # type: ignore[assignment]
    return depth > 1
