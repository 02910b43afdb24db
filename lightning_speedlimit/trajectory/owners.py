"""Who measures a parameter that several optimizers hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor
from torch.optim import Optimizer

from lightning_speedlimit.checks.guard import warn
from lightning_speedlimit.trajectory.optimizers import parameters_of


class Owners:
    """The first that holds it, for as long as it does; then the first of the others to step.

    What the others do to it counts as moved outside of its steps; that is said once of each parameter.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._known: dict[int, Optimizer] = {}
        self._told: set[int] = set()
        for optimizer in optimizers:
            held = parameters_of([optimizer])
            self.take([p for p in held if id(p) not in self._known], optimizer)
            self.anothers(held, optimizer)

    def take(self, parameters: Iterable[Tensor], optimizer: Optimizer) -> None:
        """From now on it measures these."""
        self._known.update((id(p), optimizer) for p in parameters)

    def anothers(self, parameters: Iterable[Tensor], optimizer: Optimizer) -> set[int]:
        """By id, those of an optimizer's parameters that another one measures."""
        others = {id(p): owner for p in parameters if (owner := self._known.get(id(p), optimizer)) is not optimizer}
        held = {id(owner): {id(p) for p in parameters_of([owner])} for owner in others.values()}
        found = {key: owner for key, owner in others.items() if key in held[id(owner)]}
        self._tell(found, optimizer)
        return set(found)

    def _tell(self, found: dict[int, Optimizer], optimizer: Optimizer) -> None:
        new = [owner for key, owner in found.items() if key not in self._told]
        self._told.update(found)
        if new:
            name, first = type(optimizer).__name__, type(new[0]).__name__
            warn(
                f"optimizers got {len(new)} parameters in both {first} and {name}: they are measured as those of "
                f"{first}, and what {name} does to them counts as moved outside of its steps",
                stacklevel=5,
            )
