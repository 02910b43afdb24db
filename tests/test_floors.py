"""Imports go down only: every import of every file of the package against its room and floor."""

import ast
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = "lightning_speedlimit"
ROOT = Path(__file__).resolve().parents[1] / PACKAGE


@dataclass(frozen=True)
class Room:
    """A part of the package: its floor, and what it may import that is neither ours nor Python's."""

    floor: int
    libraries: frozenset[str]


def room(floor: int, *libraries: str) -> Room:
    return Room(floor, frozenset(libraries))


ROOMS = {
    "_guard": room(-1),
    "_checked": room(-1, "torch"),
    "_arguments": room(0, "numpy"),
    "theory": room(0, "torch"),
    "trajectory": room(0, "torch"),
    "optim": room(0, "torch"),
    "transport": room(0, "torch", "numpy", "geomloss", "scipy", "ot"),
    "ensemble": room(1, "torch", "numpy", "scipy"),
    "record": room(1, "numpy"),
    "metrics": room(2, "torch", "torchmetrics"),
    "callback": room(2, "torch", "numpy", "torchmetrics", "lightning", "lightning_utilities", "pytorch_lightning"),
    "report": room(2, "torch", "numpy", "scipy", "matplotlib", "jinja2"),
    "demo": room(2, "torch", "sklearn"),
    "cli": room(3, "numpy", "matplotlib", "jinja2", "typer", "rich"),
    "__init__": room(4),
}

# Files that belong to a room without carrying its name.
ALIASES = {
    "summary": "record",
    "_summary_text": "record",
    "_plain_text": "record",
    "_record_files": "record",
    "_record_keeper": "record",
    "_record_lock": "record",
    "_record_writing": "record",
    "_record_reading": "record",
    "_record_schema": "record",
    "_record_clouds": "record",
    "_record_sketches": "record",
    "_record_stretch": "record",
    "_record_windows": "record",
    "_regimes": "record",
    "_tuning": "record",
    "_attaching": "callback",
    "_batch_losses": "callback",
    "_batch_size": "callback",
    "_figure_logging": "callback",
    "_fits": "callback",
    "_lightning": "callback",
    "_logged_metrics": "callback",
    "_measurement": "callback",
    "_measuring": "callback",
    "_neuron_clouds": "callback",
    "_probe": "callback",
    "_plain_batches": "callback",
    "_isolation": "callback",
    "_saved_state": "callback",
    "_snapshot": "callback",
    "_reach": "callback",
    "_unseen_steps": "callback",
    "_value_log": "callback",
    "__main__": "cli",
}

# (from, to): the only steps sideways. The callback hands its record to the figures at the end of a run
# (log_figures) and does without where the extra "report" is not installed.
SIDEWAYS = {("callback", "report")}


def room_of(module: str) -> str:
    """'lightning_speedlimit.theory.curves' → 'theory'; the package itself → '__init__'."""
    parts = module.split(".")
    name = parts[1] if len(parts) > 1 else "__init__"
    name = ALIASES.get(name, name)
    if name not in ROOMS:
        raise AssertionError(f"{module} has no floor; give it a room in tests/test_floors.py")
    return name


def module_of(file: Path) -> str:
    parts = (PACKAGE, *file.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_modules(source: str, module: str, *, is_package: bool) -> set[str]:
    """Every module that the source imports, wherever in it: lazily, for typing, by a constant name."""
    found: set[str] = set()
    here = module.split(".")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = node.level - 1 if is_package else node.level
                base = ".".join([*here[: len(here) - up], *filter(None, [node.module])])
            found.update(brought_by_package(node) if base == PACKAGE else [base])
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in {"import_module", "__import__"} and isinstance(node.args[0].value, str):
                found.add(node.args[0].value)
    return found


def brought_by_package(node: ast.ImportFrom) -> set[str]:
    """`from lightning_speedlimit import name`: a room where the name is one, else the package's own file."""
    known = ROOMS.keys() | ALIASES.keys()
    return {f"{PACKAGE}.{alias.name}" if alias.name in known else PACKAGE for alias in node.names}


def complaints(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """What the source of `module` imports and should not."""
    name = room_of(module)
    here = ROOMS[name]
    found = []
    for target in sorted(imported_modules(source, module, is_package=is_package)):
        top = target.split(".")[0]
        if top == PACKAGE:
            there = room_of(target)
            if there != name and (name, there) not in SIDEWAYS and ROOMS[there].floor >= here.floor:
                found.append(f"{module} (floor {here.floor}) imports {target} (floor {ROOMS[there].floor})")
        elif top not in sys.stdlib_module_names and top not in here.libraries:
            found.append(f"{module} imports {target}; its room may import {sorted(here.libraries)}")
    return found


def test_imports_go_down_only() -> None:
    files = sorted(ROOT.rglob("*.py"))
    assert len(files) >= 4, "the walk found no package to check"
    found = [
        line
        for file in files
        for line in complaints(file.read_text("utf-8"), module_of(file), is_package=file.name == "__init__.py")
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("trajectory.meter", "import numpy as np"),
        ("trajectory.meter", "import lightning.pytorch as pl"),
        ("trajectory.meter", "from lightning_speedlimit.record import RunRecord"),
        ("trajectory.meter", "from ..theory import gradient_flow"),
        ("trajectory.meter", "from lightning_speedlimit import transport"),
        ("theory.curves", "def f():\n    import scipy.optimize"),
        ("transport.exact", "import sklearn"),
        ("record", "import torch"),
        ("summary", "from lightning_speedlimit import callback"),
        ("metrics", "from geomloss import SamplesLoss"),
        ("metrics", "if TYPE_CHECKING:\n    from pytorch_lightning import Trainer"),
        ("ensemble.replicas", "importlib.import_module('pytorch_lightning')"),
        ("report.figures", "from .. import callback"),
        ("report.figures", "from lightning_speedlimit.cli import main"),
        ("cli", "from lightning_speedlimit import SpeedLimit"),
    ],
)
def test_the_guard_can_fail(module: str, source: str) -> None:
    assert complaints(source, f"{PACKAGE}.{module}"), f"{source!r} passed in {module}"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("trajectory.meter", "import math\nimport torch\nfrom . import mobility\nfrom .sums import Sums"),
        (
            "transport.exact",
            "from geomloss import SamplesLoss\nfrom scipy.optimize import linear_sum_assignment",
        ),
        ("record", "from ._record_files import RecordError\nfrom .summary import Summary\nimport numpy"),
        ("callback", "import pytorch_lightning\nfrom .record import RunRecord\nfrom .report import figures"),
        ("cli", "from lightning_speedlimit.report import compare"),
    ],
)
def test_the_guard_lets_good_imports_pass(module: str, source: str) -> None:
    assert complaints(source, f"{PACKAGE}.{module}") == []


def test_a_module_without_a_floor_is_named() -> None:
    with pytest.raises(AssertionError, match=r"lightning_speedlimit\.cellar has no floor"):
        complaints("import math", f"{PACKAGE}.cellar")


def test_relative_imports_resolve_from_packages_and_modules() -> None:
    # The same line means another module in theory/__init__.py than in theory/curves.py.
    line = "from .curves import Curve"
    package = imported_modules(line, f"{PACKAGE}.theory", is_package=True)
    assert package == {f"{PACKAGE}.theory.curves"}
    assert imported_modules(line, f"{PACKAGE}.theory.flow", is_package=False) == package
