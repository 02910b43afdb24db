"""What the pages print is what their code prints."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
_BLOCK = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)


_SECONDS = re.compile(r"^(seconds +)\S+ *", re.MULTILINE)


def printed_and_shown(page: str) -> list[tuple[str, str]]:
    """For each python block that a text block follows: what it prints, and what the page shows.

    The folder in which a page is run has another name elsewhere; pages show it as "…".
    """
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
            printed, shown = (_SECONDS.sub(r"\1…", text) for text in (out.getvalue(), blocks[i + 1][1]))
            found.append((printed.replace(str(Path.cwd()), "…"), shown))
    return found


PAGES = [
    *("theory", "replicas", "start", "reading", "sceptic"),
    *("how-to/plain-pytorch", "how-to/fabric", "how-to/own-optimizer"),
]


@pytest.mark.parametrize("name", PAGES)
def test_pages_show_what_their_code_prints(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where a run leaves its record
    pairs = printed_and_shown((DOCS / f"{name}.md").read_text(encoding="utf-8"))
    assert pairs
    for printed, shown in pairs:
        assert printed == shown


def test_a_page_that_shows_something_else_would_be_noticed() -> None:
    ((printed, shown),) = printed_and_shown("```python\nprint(1)\n```\n\n```text\n2\n```\n")
    assert (printed, shown) == ("1\n", "2\n")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_the_page_about_several_processes_shows_what_they_print(processes: int, tmp_path: Path) -> None:
    page = (DOCS / "how-to/several-processes.md").read_text(encoding="utf-8")
    blocks = _BLOCK.findall(page)
    (code,) = (code for language, code in blocks if language == "python")
    (shown,) = (code for language, code in blocks if language == "text")
    (tmp_path / "train.py").write_text(code, encoding="utf-8")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    done = subprocess.run(
        [*launcher, "train.py"], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=300
    )
    assert _SECONDS.sub(r"\1…", done.stdout) == _SECONDS.sub(r"\1…", shown)
