"""The site: every page is found, every link leads somewhere, every public name is described; and it builds strictly."""

from __future__ import annotations

import importlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
BUILT = ("_build", "gallery_built")
PACKAGES = (
    *("lightning_speedlimit", "lightning_speedlimit.record", "lightning_speedlimit.trajectory"),
    *("lightning_speedlimit.transport", "lightning_speedlimit.theory", "lightning_speedlimit.ensemble"),
    *("lightning_speedlimit.optim", "lightning_speedlimit.metrics", "lightning_speedlimit.report"),
)

sys.path.insert(0, str(DOCS))
from markdown_docstrings import converted  # noqa: E402 - beside the site's settings


def pages() -> list[Path]:
    return sorted(p for p in DOCS.rglob("*.md") if not set(p.relative_to(DOCS).parts) & set(BUILT))


def in_toctrees(text: str) -> list[str]:
    """The pages that a page's toctrees name."""
    blocks = re.findall(r"```\{toctree\}\n(.*?)```", text, re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith(":")]


def anchors(text: str) -> set[str]:
    """Headings as a code-hosting page and the site both name them."""
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(page: Path, text: str) -> list[str]:
    """Relative links of a page that lead to no file, or to no heading of it."""
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        where, _, anchor = target.partition("#")
        if where.startswith(("http://", "https://")):
            continue
        file = (page.parent / where) if where else page
        if set(file.parts) & set(BUILT):
            continue  # written by the build, which checks it
        if not file.exists() or (anchor and anchor not in anchors(file.read_text(encoding="utf-8"))):
            dead.append(target)
    return dead


def undescribed(api: str) -> list[str]:
    """Public names of the package that the page of the API does not have."""
    described = set(re.findall(r"(?:auto\w+|py:data):: lightning_speedlimit\.(?:\w+\.)*(\w+)", api))
    names = {name for package in PACKAGES for name in importlib.import_module(package).__all__}
    return sorted(names - described)


def test_every_page_is_in_a_toctree_once() -> None:
    listed = in_toctrees((DOCS / "index.md").read_text(encoding="utf-8"))
    wanted = {str(p.relative_to(DOCS).with_suffix("")) for p in pages()} - {"index"} | {"gallery_built/index"}
    assert sorted(listed) == sorted(wanted)


@pytest.mark.parametrize("page", [ROOT / "README.md", *pages()], ids=lambda page: page.stem)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    assert dead_links(page, page.read_text(encoding="utf-8")) == []


def test_the_readme_is_short_and_begins_with_install() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 900
    headings = re.findall(r"^## (.*)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    assert headings[:2] == ["Install", "One line"]


def test_a_dead_link_would_be_noticed() -> None:
    text = "[a](limits.md#what-is-estimated) [b](limits.md#nowhere) [c](nowhere.md) [d](#here)\n\n## Here\n"
    assert dead_links(DOCS / "index.md", text) == ["limits.md#nowhere", "nowhere.md", "#here"]  # index has no "Here"


def test_every_public_name_is_described() -> None:
    assert undescribed((DOCS / "api.md").read_text(encoding="utf-8")) == []


def test_a_name_that_is_missing_would_be_noticed() -> None:
    api = (DOCS / "api.md").read_text(encoding="utf-8")
    assert undescribed(api.replace("theory.langevin\n", "\n")) == ["langevin"]


def test_every_command_is_described() -> None:
    typer = pytest.importorskip("typer")
    from lightning_speedlimit.cli.app import app

    described = set(re.findall(r"^\| `speedlimit (\w+)", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE))
    assert described == set(typer.main.get_command(app).commands)


def test_docstrings_become_restructured_text() -> None:
    docstring = [
        "|θ|² of `x`, a* and b_",
        "```python",
        "f(|x|)",
        "```",
        "Example::",
        "    a * b",
        "Returns:",
        "    a: b",
    ]
    assert converted(docstring) == [
        *("\\|θ\\|² of ``x``, a\\* and b\\_", "", ".. code-block:: python", "", "    f(|x|)", ""),
        *("Example::", "    a * b", ":returns: a: b"),
    ]


@pytest.mark.slow
def test_it_builds_without_a_warning(tmp_path: Path) -> None:
    """In a copy, for the build writes the gallery beside its sources."""
    pytest.importorskip("sphinx")
    shutil.copytree(DOCS, tmp_path / "docs", ignore=shutil.ignore_patterns(*BUILT, "__pycache__"))
    for name in ("README.md", "examples", "lightning_speedlimit", "tests"):
        os.symlink(ROOT / name, tmp_path / name)
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-b", "html", "docs", "site"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    for page in ("index", "api", "start", "gallery_built/plot_2_two_optimizers"):
        assert (tmp_path / "site" / f"{page}.html").stat().st_size > 5000
