"""The notebook of the examples: as its script says, without outputs, and executed by a kernel of Jupyter's."""

from __future__ import annotations

import json
import os
import runpy
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOK = EXAMPLES / "notebook.ipynb"


@pytest.fixture(scope="module")
def maker() -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / "notebook" / "make.py"))


def test_it_is_made_from_the_script(maker: dict[str, Any]) -> None:
    """`python examples/notebook/make.py` after a change; outputs stay out of it."""
    assert NOTEBOOK.read_text("utf-8") == maker["notebook"](maker["SOURCE"].read_text("utf-8"))
    assert not any(cell.get("outputs") for cell in json.loads(NOTEBOOK.read_text("utf-8"))["cells"])


def test_cells_are_what_stands_between_the_marks(maker: dict[str, Any]) -> None:
    script = "# %% [markdown]\n# # Title\n#\n# a line\n\n# %%\nx = 1  # %% no mark\n\nx\n"
    first, second = maker["cells"](script)
    assert (first["cell_type"], first["source"]) == ("markdown", ["# Title\n", "\n", "a line"])
    assert (second["cell_type"], second["source"]) == ("code", ["x = 1  # %% no mark\n", "\n", "x"])


def test_it_runs_and_shows_figures_tables_and_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("ipykernel", "pandas", "sklearn"):
        pytest.importorskip(module)
    client, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    document = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(document)
    client.NotebookClient(document, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in document.cells if cell.cell_type == "code" for output in cell.outputs]
    assert [output for output in outputs if output.output_type != "execute_result"] == [], "logs, warnings, errors"
    run, rows, comparison, table, page = (output.data["text/html"] for output in outputs)
    assert (run.count("<svg"), comparison.count("<svg")) == (2, 1)
    assert "batch 128" in comparison
    assert "dataframe" in rows
    assert "beaten_by" in table
    assert page.startswith("<iframe")
