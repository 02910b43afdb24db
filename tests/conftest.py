"""One thread, fixed seeds, and property tests that give the same verdict on every run."""

import random

import numpy as np
import pytest
import torch
from hypothesis import settings

pytest_plugins = ["modes_plugin"]

torch.set_num_threads(1)

# No deadline: the machines are shared, and a slow example is no wrong one.
settings.register_profile("deterministic", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("deterministic")


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Every test starts from the same seeds, whatever ran before it and on whichever worker."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - libraries under test draw from the global generator
    torch.manual_seed(0)


@pytest.fixture
def on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU is taken for a device that the host must not wait for."""
    monkeypatch.setattr("lightning_speedlimit.trajectory.coordinates.HOST", ())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
