"""The results of a module's finding, shortened and whole.

A module says which one: NAME; SHORTENED, more arguments of its shortened run; PAGES, where its results are kept.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from findings_cases import DOCS, read_rows, run_finding


@pytest.fixture(scope="module")
def output(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the shortened run; data/ has the pictures that it made up."""
    name = request.module.NAME
    folder = tmp_path_factory.mktemp(name) / "out"
    run_finding(name, folder, *getattr(request.module, "SHORTENED", ()))
    return folder


@pytest.fixture(scope="module")
def quick(request: pytest.FixtureRequest, output: Path) -> dict[str, Any]:
    return read_rows(output / f"{request.module.NAME}.json")


@pytest.fixture(scope="module")
def full(request: pytest.FixtureRequest) -> dict[str, Any]:
    return read_rows(getattr(request.module, "PAGES", DOCS) / f"{request.module.NAME}.json")


@pytest.fixture(scope="module", params=["quick", "full"])
def parts(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = request.getfixturevalue(request.param)
    return found
