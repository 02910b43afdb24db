"""The benchmarks run, and count what tests hold to its bound."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def operations(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    for name in ("cases", "dispatched", "operations"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("operations")


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_operations_of_a_small_model(operations: Any, kind: str) -> None:
    hosts = operations.gathering.HOST
    found = operations.measure_operations("MLP of 0.3 M parameters in 6 tensors", kind, "cpu")
    assert 20 < found["operations"] <= found["reach"] == {"sgd": 60, "adamw": 90}[kind]
    assert hosts == operations.gathering.HOST
