"""Which optimizers a meter can follow: unwrapped, with step hooks that fire, each parameter once."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer


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
    if not hasattr(optimizer, "register_step_post_hook"):
        return "has no step hooks"
    if not hasattr(optimizer, "_optimizer_step_post_hooks") or not getattr(type(optimizer).step, "hooked", False):
        return "has step hooks that never fire (its __init__ does not call super().__init__)"
    return None


def followed(optimizers: Optimizer | Iterable[Optimizer]) -> tuple[list[Optimizer], dict[int, set[int]]]:
    """The optimizers that can be measured, and of each the parameters that another one measures.

    What is left out is said by name. Raises TypeError where nothing is left, ValueError for an empty list.
    """
    given = [unwrapped(o) for o in ([optimizers] if _is_one(optimizers) else optimizers)]  # type: ignore[union-attr]
    if not given:
        raise ValueError("optimizers got an empty list, wanted at least one torch optimizer")
    found: list[Optimizer] = []
    for optimizer in given:
        why, name = why_unhooked(optimizer), type(optimizer).__name__
        if why is None:
            found.append(optimizer)
            continue
        if len(given) == 1:
            raise TypeError(
                f"optimizers got {name}, which {why}, wanted a torch.optim.Optimizer: derive it from that, and call "
                "super().__init__"
            )
        warnings.warn(f"{name} {why}: what it does is not measured, and the rest is", stacklevel=4)
    if not found:
        names = ", ".join(type(o).__name__ for o in given)
        raise TypeError(f"optimizers got {names}, none of which has step hooks that fire, wanted torch.optim.Optimizer")
    return found, _elsewhere(found)


def _is_one(optimizers: Any) -> bool:
    return isinstance(optimizers, Optimizer) or hasattr(optimizers, "param_groups")


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
            warnings.warn(
                f"optimizers got {len(shared)} parameters in both {names[1]} and {names[0]}: they are measured as "
                f"those of {names[1]}, and what {names[0]} does to them counts as moved outside of its steps",
                stacklevel=5,
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
    if got not in wanted:
        raise ValueError(f"{name} got {got!r}, wanted one of {', '.join(map(repr, wanted))}")


def check_at_least(name: str, got: object, least: int) -> None:
    if isinstance(got, bool) or not isinstance(got, int) or got < least:
        raise ValueError(f"{name} got {got!r}, wanted a whole number of at least {least}")


def check_coordinates(got: object) -> None:
    if got != "all" and (isinstance(got, bool) or not isinstance(got, int) or got < 1):
        raise ValueError(f"coordinates got {got!r}, wanted a whole number of at least 1, or 'all'")
