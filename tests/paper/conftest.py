"""The two results that a test of an experiment looks at; the module says its NAME."""

from __future__ import annotations

from typing import Any

import pytest
from paper_cases import committed, run_experiment


@pytest.fixture(scope="module")
def quick(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Of the shortened version, run here."""
    name: str = request.module.NAME
    return run_experiment(name, tmp_path_factory.mktemp(name))


@pytest.fixture(scope="module")
def full(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Of the full one, which the page cites."""
    return committed(request.module.NAME)
