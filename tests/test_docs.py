"""What the pages print is what their code prints."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
_BLOCK = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)


def printed_and_shown(page: str) -> list[tuple[str, str]]:
    """For each python block that a text block follows: what it prints, and what the page shows."""
    blocks = _BLOCK.findall(page)
    namespace: dict[str, object] = {"__name__": "page"}
    found = []
    for i, (language, code) in enumerate(blocks):
        if language != "python":
            continue
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(code, "page", "exec"), namespace)
        if i + 1 < len(blocks) and blocks[i + 1][0] == "text":
            found.append((out.getvalue(), blocks[i + 1][1]))
    return found


@pytest.mark.parametrize("name", ["theory", "replicas"])
def test_pages_show_what_their_code_prints(name: str) -> None:
    pairs = printed_and_shown((DOCS / f"{name}.md").read_text(encoding="utf-8"))
    assert pairs
    for printed, shown in pairs:
        assert printed == shown


def test_a_page_that_shows_something_else_would_be_noticed() -> None:
    ((printed, shown),) = printed_and_shown("```python\nprint(1)\n```\n\n```text\n2\n```\n")
    assert (printed, shown) == ("1\n", "2\n")


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: page.stem)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target
