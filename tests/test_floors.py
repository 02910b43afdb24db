"""Imports go down only: every import of every file of the package against its room and floor."""

import ast
import graphlib
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
    "words": room(-1),
    "display": room(-1),
    "checks": room(-1, "torch", "numpy"),
    "loaders": room(0, "torch"),
    "theory": room(0, "torch"),
    "trajectory": room(0, "torch", "numpy"),
    "optim": room(0, "torch"),
    "transport": room(0, "torch", "numpy", "geomloss", "scipy", "ot"),
    "ensemble": room(1, "torch", "numpy", "scipy"),
    "record": room(1, "numpy", "pandas"),  # pandas where someone asks for a frame
    "metrics": room(2, "torch", "torchmetrics"),
    "callback": room(2, "torch", "numpy", "torchmetrics", "lightning", "lightning_utilities", "pytorch_lightning"),
    "report": room(2, "torch", "numpy", "scipy", "matplotlib", "jinja2", "pandas"),
    "integrations": room(2, "torch", "transformers", "accelerate"),
    "demo": room(2, "torch", "sklearn"),
    "cli": room(3, "numpy", "matplotlib", "jinja2", "typer", "rich"),
    "__init__": room(4),
}

# Files that belong to a room without carrying its name.
ALIASES = {"__main__": "cli"}

# (from, to): the only steps sideways. At the end of a run the callbacks ask what to change; Lightning's hands its
# record to the figures (log_figures) and does without where the extra "report" is not installed.
SIDEWAYS = {("callback", "report"), ("integrations", "report")}


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


def imported_within(source: str, module: str, *, is_package: bool) -> set[str]:
    """Modules of the package that the source of `module` imports; `from a.b import c` is a.b.c where that is one."""
    modules = {module_of(file) for file in ROOT.rglob("*.py")}
    found = imported_modules(source, module, is_package=is_package)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and not node.level:
            parts = {f"{node.module}.{alias.name}" for alias in node.names} & modules
            found |= parts
            if len(parts) == len(node.names):
                found.discard(str(node.module))
    return (found & modules) - {module}


def circle(imports: dict[str, set[str]]) -> list[str] | None:
    """Modules that import each other in a ring, the first of them at the end again; None where there is none."""
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return None


def test_no_two_modules_import_each_other() -> None:
    imports = {
        module_of(file): imported_within(file.read_text("utf-8"), module_of(file), is_package=file.stem == "__init__")
        for file in ROOT.rglob("*.py")
    }
    assert sum(map(len, imports.values())) > 300, "the walk found no imports to check"
    assert circle(imports) is None


def test_a_ring_of_imports_would_be_noticed() -> None:
    """Within functions and for typing too."""
    sources = {
        f"{PACKAGE}.report.text": f"from {PACKAGE}.report import verdict",
        f"{PACKAGE}.report.verdict": f"def f():\n    from {PACKAGE}.report.page import page",
        f"{PACKAGE}.report.page": f"if TYPE_CHECKING:\n    from {PACKAGE}.report.text import table",
    }
    found = circle({module: imported_within(source, module, is_package=False) for module, source in sources.items()})
    assert set(found or ()) == sources.keys()


def test_no_file_is_too_long() -> None:
    assert not {str(f) for f in ROOT.rglob("*.py") if len(f.read_text("utf-8").splitlines()) > 400}


def test_the_root_holds_public_modules_alone() -> None:
    hidden = [f.name for f in ROOT.iterdir() if f.name.startswith("_") and f.stem not in ("__init__", "__main__")]
    assert [name for name in hidden if name != "__pycache__"] == []


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
        ("trajectory.meter", "import scipy"),
        ("trajectory.meter", "import lightning.pytorch as pl"),
        ("trajectory.meter", "from lightning_speedlimit.record import RunRecord"),
        ("trajectory.meter", "from ..theory import gradient_flow"),
        ("trajectory.meter", "from lightning_speedlimit import transport"),
        ("theory.curves", "def f():\n    import scipy.optimize"),
        ("transport.exact", "import sklearn"),
        ("record", "import torch"),
        ("record.summary", "from lightning_speedlimit import callback"),
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
        ("record.run", "from .files import RecordError\nfrom .summary import Summary\nimport numpy"),
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
