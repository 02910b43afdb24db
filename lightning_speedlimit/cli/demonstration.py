"""`speedlimit demo`."""

from __future__ import annotations

from pathlib import Path

from lightning_speedlimit.cli.comparing import print_comparisons, write_page
from lightning_speedlimit.cli.complaints import writing
from lightning_speedlimit.demo import train_all
from lightning_speedlimit.report import compare


def demonstrate(output: Path, *, quick: bool) -> None:
    """Trains, compares, writes the page, and says how to go on."""
    with writing(output):
        folders = list(train_all(output, quick=quick, say=lambda text: print(text, flush=True)))
    print()
    comparison = compare(folders)
    print_comparisons([comparison])
    page = output / "report.html"
    write_page(page, [comparison])
    print("\nHow to go on")
    print(f"  the page with figures   {page.resolve().as_uri()}")
    for what, command in (
        ("one run", f"show {folders[-1]}"),
        ("at the same step", f"compare {output} --by step"),
        ("for a program", f"compare {output} --json"),
    ):
        print(f"  {what:<22}  speedlimit {command}")
