"""What one of several processes can't do none does, at whatever moment: by the answers that a strategy gives."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lightning_speedlimit import SpeedLimit
from lightning_speedlimit.callback import measuring


class Strategy:
    """Of two processes, of which the other gives these answers in turn."""

    def __init__(self, *others: bool) -> None:
        self.others, self.asked = list(others), []

    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        self.asked.append(decision)
        other = self.others.pop(0)
        return (decision and other) if all else (decision or other)


class Begun:
    """A measurement."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.meter, self.record, self.detached = SimpleNamespace(), SimpleNamespace(run={}), False

    def detach(self) -> None:
        self.detached = True


@pytest.fixture
def callback(monkeypatch: pytest.MonkeyPatch) -> SpeedLimit:
    found = SpeedLimit()
    found._several = True
    monkeypatch.setattr(measuring, "Measurement", Begun)
    return found


def trainer(*others: bool) -> Any:
    return SimpleNamespace(strategy=Strategy(*others))


@pytest.mark.filterwarnings("error")
def test_it_measures_where_all_can(callback: SpeedLimit) -> None:
    with_all = trainer(True)
    callback._measure_anew(with_all, None, 0)
    assert with_all.strategy.asked == [True]
    assert callback._measured is not None
    assert not callback._measured.detached


def test_it_does_not_where_another_cannot(callback: SpeedLimit, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = Begun()
    monkeypatch.setattr(measuring, "Measurement", lambda *_, **__: begun)
    with pytest.warns(UserWarning, match="SpeedLimit measures nothing: another process can't"):
        callback._measure_anew(trainer(False), None, 0)
    assert callback._measured is None
    assert begun.detached


def test_one_that_fails_tells_the_others_all_the_same(callback: SpeedLimit, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise MemoryError("here alone")

    monkeypatch.setattr(measuring, "Measurement", fails)
    alone = trainer(True)
    with pytest.raises(MemoryError):  # the hook around it says so
        callback._measure_anew(alone, None, 0)
    assert alone.strategy.asked == [False]
    assert callback._measured is None


def test_a_single_process_asks_nobody(callback: SpeedLimit) -> None:
    callback._several = False
    callback._measure_anew(SimpleNamespace(), None, 0)
    assert callback._measured is not None


@pytest.mark.parametrize(("here", "there"), [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.filterwarnings("ignore:SpeedLimit starts anew")
def test_a_run_goes_on_where_all_can_and_else_begins_anew_in_all(
    callback: SpeedLimit, monkeypatch: pytest.MonkeyPatch, here: bool, there: bool
) -> None:
    def restored(*_: Any) -> None:
        if not here:
            raise KeyError("meter")

    monkeypatch.setattr(measuring, "restore", restored)
    both = trainer(True, there, True)
    callback._measure_anew(both, None, 0)
    first, module = callback._measured, SimpleNamespace(device=None)
    assert callback._resume(both, module, {}, 7) is (here and there)
    assert (callback._measured is first) is (here and there)
    assert both.strategy.asked == [True, here] + [True] * (not (here and there))
    if not (here and there):
        assert callback._measured is not None
        assert callback._measured.record.run == {"since_step": 7}
