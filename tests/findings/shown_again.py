"""What a finding says of its committed rows, against its page."""

from __future__ import annotations

import runpy
from pathlib import Path

from findings_cases import DOCS, SCRIPTS
from in_this_process import run_here


def shown_again(name: str, folder: Path, *, tables: int) -> None:
    """Runs the whole experiment on docs/findings/NAME.json, without data; its tables and seconds are in NAME.md."""
    script, output = SCRIPTS / f"{name}.py", folder / "out"
    output.mkdir()
    (output / f"{name}.json").write_text((DOCS / f"{name}.json").read_text("utf-8"), "utf-8")
    arguments = [str(script), "--data", str(folder), "--output", str(output)]
    done = run_here(lambda: runpy.run_path(str(script), run_name="__main__"), arguments, folder)
    assert (done.returncode, done.stderr) == (0, "")
    page = (DOCS / f"{name}.md").read_text("utf-8")
    *printed, last = done.stdout.strip().split("\n\n")
    assert len(printed) == tables
    for table in printed:
        assert table in page
    assert last.split(": ")[1].split(" of")[0] in page  # processor seconds
