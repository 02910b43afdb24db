"""The package as users get it: an sdist, the wheel that is made of it, and what is installed."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

import lightning_speedlimit
from lightning_speedlimit.trajectory import compiled

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lightning_speedlimit"
if sys.version_info >= (3, 11):
    import tomllib
else:  # pytest brings it to older versions
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def run(*command: str | Path, folder: Path) -> str:
    """What it prints; without anything that leads to the repository."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


# -- what is built ----------------------------------------------------------------------------------------------


def build(kind: str, source: Path, into: Path) -> Path:
    """The sdist or the wheel, by the backend that pyproject.toml names; nothing is downloaded."""
    code = f"import sys; from setuptools import build_meta; print(build_meta.build_{kind}(sys.argv[1]))"
    into.mkdir(exist_ok=True)
    return into / run(sys.executable, "-c", code, into, folder=source).split()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a copy, without what lies about in the repository and with what could be taken by mistake."""
    copy = tmp_path_factory.mktemp("source") / "repository"
    left_out = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "_build", "docs")
    shutil.copytree(ROOT, copy, ignore=left_out)
    return build("sdist", copy, copy.parent / "dist")


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    """Of the sdist alone: so it holds whatever is needed."""
    with tarfile.open(sdist) as archive:
        archive.extractall(sdist.parent, filter="data")
    return build("wheel", sdist.parent / sdist.name.removesuffix(".tar.gz"), sdist.parent)


@pytest.mark.package
def test_the_sdist_has_the_package_and_no_tests(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"} <= names
    assert package_files() <= names
    assert {name.partition("/")[0] for name in names if "/" in name} == {
        "lightning_speedlimit",
        "lightning_speedlimit.egg-info",
    }


@pytest.mark.package
def test_the_wheel_has_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(n for n in names if n.endswith("/METADATA"))).decode()
    information = {name for name in names if ".dist-info/" in name}
    libraries = {name for name in names if "/_rows." in name}
    assert names - information - libraries == package_files()
    assert len(libraries) == (compiled.LIBRARY is not None)
    assert {"lightning_speedlimit/py.typed", "lightning_speedlimit/report/templates/page.html.j2"} <= names
    tags = re.escape(sysconfig.get_platform().replace("-", "_")) if libraries else "any"
    assert re.fullmatch(rf"lightning_speedlimit-{PROJECT['version']}-(cp310-abi3|py3-none)-{tags}\.whl", wheel.name)
    assert "License-Expression: MIT" in metadata
    assert "Description-Content-Type: text/markdown" in metadata
    assert re.search(r"^# lightning-speedlimit", metadata, re.MULTILINE)


def package_files() -> set[str]:
    """As they are in the repository; what was compiled beside them is not."""
    files = (f for f in PACKAGE.rglob("*") if f.is_file() and "__pycache__" not in f.parts and f.suffix != ".so")
    return {str(f.relative_to(ROOT)) for f in files}


# -- what is installed ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the commands of a new environment, which sees this one's libraries and not the repository."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, folder=folder)
    (packages,) = folder.glob("lib/*/site-packages")
    # A path alone: the links to checkouts that are installed there are not followed.
    (packages / "around.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "--quiet", "--no-index"]
    run(*pip, "--no-deps", "--ignore-installed", wheel, folder=folder)
    return folder / "bin"


@pytest.mark.package
def test_what_is_installed_is_what_is_used(installed: Path, tmp_path: Path) -> None:
    code = "import lightning_speedlimit as l; print(l.__version__, l.__file__)"
    version, file = run(installed / "python", "-c", code, folder=tmp_path).split()
    assert version == PROJECT["version"]
    assert Path(file).is_relative_to(installed.parent)


@pytest.mark.package
def test_the_demo_and_a_comparison_from_what_is_installed(installed: Path, tmp_path: Path) -> None:
    said = run(installed / "speedlimit", "demo", "--quick", "--output", "demo_runs", folder=tmp_path)
    assert "Compared at the same loss" in said
    page = (tmp_path / "demo_runs" / "report.html").read_text(encoding="utf-8")
    assert "<svg" in page
    assert "<style" in page
    code = (
        "from pathlib import Path\n"
        "from lightning_speedlimit import RunRecord, compare\n"
        "folders = sorted(p.parent for p in Path('demo_runs').rglob('record.json'))\n"
        "print(compare(folders[:2]))\n"
        "compare(folders[:2]).html('two.html')\n"
        "print(RunRecord.load(folders[0]).summary())\n"
    )
    said = run(installed / "python", "-c", code, folder=tmp_path)
    assert "kinematic" in said
    assert (tmp_path / "two.html").stat().st_size > 5000


# -- what it says of itself -------------------------------------------------------------------------------------


def test_one_version_everywhere() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    versions = {
        "__version__": lightning_speedlimit.__version__,
        "CITATION.cff": (re.findall(r"^version: (\S+)$", citation, re.MULTILINE) or ["none"])[0],
    }
    assert versions == dict.fromkeys(versions, PROJECT["version"])


def imported_libraries(file: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(str(node.module))
    tops = {name.partition(".")[0] for name in found}
    return tops - sys.stdlib_module_names - {PACKAGE.name}


def test_every_library_that_is_imported_is_asked_for() -> None:
    """By a dependency, or by the extra of the room that it is imported in."""
    extras = PROJECT["optional-dependencies"]
    asked = PROJECT["dependencies"] + [r for extra in extras.keys() - {"test", "docs"} for r in extras[extra]]
    known = {re.split(r"[\[>=<~]", requirement)[0].lower() for requirement in asked}
    names: Any = importlib.metadata.packages_distributions()
    libraries = {library for file in PACKAGE.rglob("*.py") for library in imported_libraries(file)}
    missing = {
        library
        for library in libraries
        if not known & {library.lower(), *(name.lower() for name in names.get(library, []))}
    }
    assert missing == {"sklearn"}  # without it the demo has other data


def test_the_hooks_before_a_commit_are_the_checks_of_make_test() -> None:
    hooks = re.findall(r"entry: \.venv/bin/(.*)", (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    checks = re.findall(r"\$\(BIN\)/(ruff .*|mypy .*)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert [hook.replace(" --force-exclude", "") for hook in hooks] == [
        check.replace(" --check", "").removesuffix(" .") for check in checks
    ]


HEAVY = {"matplotlib", "jinja2", "pandas", "typer", "rich", "sklearn", "transformers", "tensorboard", "wandb", "mlflow"}
LIGHTNING = {"pytorch_lightning", "lightning", "torchmetrics"}
# In this order, in one process: what is brought by one is there for the next.
IMPORTS = {
    "lightning_speedlimit": HEAVY | LIGHTNING | {"torch", "numpy", "scipy"},
    "lightning_speedlimit.record": HEAVY | LIGHTNING | {"torch", "scipy"},
    "lightning_speedlimit.report": HEAVY | LIGHTNING,
    "lightning_speedlimit.trajectory": HEAVY | LIGHTNING,
    # These two are loaded by Lightning and torchmetrics, where they are there.
    "lightning_speedlimit.callback": HEAVY - {"rich", "matplotlib"},
}


def test_imports_are_light() -> None:
    code = (
        "import importlib, sys\n"
        "for name in sys.argv[1:]:\n"
        "    importlib.import_module(name)\n"
        "    print(*{module.partition('.')[0] for module in sys.modules})\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *IMPORTS], cwd=ROOT, capture_output=True, text=True, check=True)
    for (name, never), line in zip(IMPORTS.items(), done.stdout.splitlines(), strict=True):
        assert not never & set(line.split()), name
