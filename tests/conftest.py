"""One thread, fixed seeds, and property tests that give the same verdict on every run."""

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import settings

from lightning_speedlimit.trajectory import compiled

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
    monkeypatch.setattr("lightning_speedlimit.trajectory.gathering.HOST", ())


@pytest.fixture
def defaults() -> Iterator[None]:
    """Torch's own, after the test as before."""
    device, dtype = torch.empty(0).device, torch.get_default_dtype()
    yield
    torch.set_default_device(None if device == torch.device("cpu") else device)
    torch.set_default_dtype(dtype)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--without-compiled", action="store_true", help="as where there was no compiler")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--without-compiled"):
        compiled.LIBRARY = None


# Experiments whose shortened run takes seconds: what needs it is slow, what holds a page to its results is not.
LONG = {
    *("compute_optimal", "findings_decay", "findings_frontier", "findings_real_size", "lazy_or_feature"),
    *("noise_and_batch", "size", "warm_up"),
    *("paper_finite_width", "paper_initial_weights", "paper_noisy_sgd", "paper_real_images"),
}


def _needs_the_shortened_run(item: pytest.Item) -> bool:
    call = getattr(item, "callspec", None)
    chosen = set() if call is None else {value for value in call.params.values() if isinstance(value, str)}
    return "quick" in chosen or bool({"quick", "output"} & set(getattr(item, "fixturenames", ())))


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem.removeprefix("test_") in LONG and _needs_the_shortened_run(item):
            item.add_marker(pytest.mark.slow)
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
