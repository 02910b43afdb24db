"""Whose fit a callback measures: one at a time, others kept aside; and what of it can be copied and pickled."""

from __future__ import annotations

from typing import Any

from lightning_speedlimit.callback.lightning import CallbackBase, is_running

_LIVE = ("log", "log_dict", "_trainer", "_outer")  # Lightning sets the first two: methods of the module


class OneFitAtATime(CallbackBase):
    """A callback whose private attributes belong to one fit.

    A fit of another Trainer that begins within this one, with the same callback object, keeps them aside until it is
    over. A copy or a pickle holds the settings and the record, and nothing of a fit.
    """

    def __init__(self) -> None:
        super().__init__()
        self._trainer: Any = None  # from the fit's setup to its end
        self._outer: dict[str, Any] | None = None

    def _clear(self) -> None:
        """Set what belongs to a fit to what it is without one."""
        raise NotImplementedError

    def _enter(self, trainer: Any) -> None:
        """A fit of this trainer begins."""
        if self._trainer is not None and self._trainer is not trainer and is_running(self._trainer):
            self._outer = {name: value for name, value in vars(self).items() if _is_of_fit(name)}
        self._trainer = trainer

    def _is_anothers(self, trainer: Any) -> bool:
        """A fit of another trainer goes on: this one only shares the callback with it (to validate, say)."""
        return self._trainer is not None and self._trainer is not trainer

    def _leave(self) -> None:
        """The fit is over; the one that it began within goes on."""
        self._trainer = None
        if self._outer is not None:
            vars(self).update(self._outer)

    def __getstate__(self) -> dict[str, Any]:
        bare = object.__new__(type(self))
        bare._clear()
        return {name: value for name, value in vars(self).items() if name not in vars(bare) and name not in _LIVE}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._trainer = self._outer = None
        self._clear()
        vars(self).update(state)


def _is_of_fit(name: str) -> bool:
    return name == "record" or name.startswith("_")
