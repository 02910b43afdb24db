"""Which optimizers a meter can follow: unwrapped, with step hooks that fire, each parameter once."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_speedlimit.checks.guard import look, shown, told, warn

MOST_LOSSES = 1_000_000  # of a window at each end of the run: it is kept on the device
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
        optimizer.register_step_pre_hook(_nothing).remove()
        optimizer.register_step_post_hook(_nothing).remove()
    except Exception as error:
        return f"takes no step hooks ({told(error)})"
    return None


def _nothing(*args: Any) -> None:
    """A hook that is tried and taken off again."""


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


def followed(optimizers: Optimizer | Iterable[Optimizer]) -> tuple[list[Optimizer], dict[int, set[int]]]:
    """The optimizers that can be measured, and of each the parameters that another one measures.

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
    return found, _elsewhere(found)


def _listed(optimizers: Any) -> list[Any]:
    """One optimizer, or what is no list of them, as a list of one: what it lacks is told of it by name."""
    if isinstance(optimizers, Optimizer | Tensor | str | bytes) or _steps(optimizers):
        return [optimizers]
    try:
        return list(optimizers)
    except TypeError:
        return [optimizers]


def _elsewhere(optimizers: list[Optimizer]) -> dict[int, set[int]]:
    owner: dict[int, Optimizer] = {}
    found: dict[int, set[int]] = {id(o): set() for o in optimizers}
    for optimizer in optimizers:
        shared: dict[int, Tensor] = {}
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            first = owner.setdefault(id(parameter), optimizer)
            if first is not optimizer:
                shared[id(parameter)] = parameter
        if shared:
            found[id(optimizer)] = set(shared)
            names = type(optimizer).__name__, type(owner[next(iter(shared))]).__name__
            warn(
                f"optimizers got {len(shared)} parameters in both {names[1]} and {names[0]}: they are measured as "
                f"those of {names[1]}, and what {names[0]} does to them counts as moved outside of its steps",
                stacklevel=4,
            )
    return found


def within_another_step(optimizer: Optimizer) -> bool:
    """A `step` that another `step` of the same optimizer has called: torch hooks both."""
    depth, frame = 0, sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "wrapper" and frame.f_locals.get("self") is optimizer:
            depth += 1
        frame = frame.f_back  # type: ignore[assignment]
    return depth > 1


def check_choice(name: str, got: object, wanted: tuple[str, ...]) -> None:
    if not isinstance(got, str) or got not in wanted:
        raise ValueError(f"{name} got {shown(got)}, wanted one of {', '.join(map(repr, wanted))}")


def check_at_least(name: str, got: object, least: int, most: int = 2**63 - 1) -> None:
    if isinstance(got, bool) or not isinstance(got, int) or got < least:
        raise ValueError(f"{name} got {shown(got)}, wanted a whole number of at least {least}")
    if got > most:
        raise ValueError(f"{name} got {shown(got)}, wanted a whole number from {least} to {most:,}")


def check_coordinates(got: object) -> None:
    if isinstance(got, str) and got == "all":
        return
    if isinstance(got, bool) or not isinstance(got, int) or got < 1:
        raise ValueError(f"coordinates got {shown(got)}, wanted a whole number of at least 1, or 'all'")
    check_at_least("coordinates", got, 1)
