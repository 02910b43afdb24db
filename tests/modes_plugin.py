"""Collects the ways of training that tests say they show: `@pytest.mark.mode("DDP, 2 processes", "measured")`.

`pytest --modes FILE` brings FILE up to date with the tests that ran: a mode is there when every test of it that ran
passed. docs/make_modes.py makes docs/modes.md of it. Entries of tests that did not run (skipped, deselected) stay, so
that what needs another machine can be added there; `make modes` begins without any.
"""

import json
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import pytest

OUTCOMES = ("measured", "caveat", "refused")


@dataclass(frozen=True, order=True)
class Mode:
    """What one test declares; `file` is the test's."""

    name: str
    outcome: str
    remark: str
    file: str


# Of all tests that were collected; and whether the test needs a device that not every machine has.
DECLARED = pytest.StashKey[list[tuple[Mode, bool]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--modes", metavar="FILE", type=Path, help="bring the list of modes of training up to date")
    parser.addoption("--declared-modes", metavar="FILE", type=Path, help="write what the collected tests declare")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[DECLARED] = []
    if config.getoption("--modes") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Collector(config.getoption("--modes")), "modes")


@pytest.hookimpl(tryfirst=True)  # before any are deselected
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        found = declared(item)
        if found:
            config.stash[DECLARED] += [(mode, "gpu" in item.keywords) for mode in found]
            # Travels from xdist's workers to the process that writes.
            item.user_properties.append(("modes", [astuple(mode) for mode in found]))
    file = config.getoption("--declared-modes")
    if file:
        file.write_text(json.dumps([(astuple(mode), gpu) for mode, gpu in config.stash[DECLARED]]), encoding="utf-8")


def declared(item: pytest.Item) -> list[Mode]:
    """The modes of a test.

    Raises:
        UsageError: a marker without a name, an unknown outcome, or none of the words that the page needs.
    """
    found = []
    for marker in item.iter_markers("mode"):
        try:
            mode = _mode(*marker.args, **marker.kwargs, file=item.nodeid.partition("::")[0])
        except (TypeError, ValueError) as error:
            raise pytest.UsageError(f"{item.nodeid}: {error}; wanted mode(name, outcome, remark)") from error
        found.append(mode)
    return found


def _mode(name: str, outcome: str, remark: str = "", *, file: str) -> Mode:
    if outcome not in OUTCOMES:
        raise ValueError(f"mode {name!r} got the outcome {outcome!r}, wanted one of {', '.join(OUTCOMES)}")
    if not name or (outcome != "measured" and not remark):
        raise ValueError(f"mode {name!r}, {outcome}, got no remark: say the caveat, or the message of the refusal")
    return Mode(name, outcome, remark, file)


class Collector:
    """In the process that sees all reports."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.passed: set[Mode] = set()
        self.failed: set[Mode] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        modes = {Mode(*m) for key, found in report.user_properties if key == "modes" for m in found}
        if report.failed:
            self.failed |= modes
        elif report.when == "call" and report.passed:
            self.passed |= modes

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        before = read(self.file) if self.file.is_file() else set()
        write(self.file, (before | self.passed) - self.failed)


def read(file: Path) -> set[Mode]:
    return {Mode(**entry) for entry in json.loads(file.read_text(encoding="utf-8"))}


def write(file: Path, modes: Iterable[Mode]) -> None:
    entries: list[dict[str, Any]] = [vars(mode) for mode in sorted(modes)]
    file.write_text(json.dumps(entries, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
