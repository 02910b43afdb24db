"""Makes ../notebook.ipynb from cells.py, whose cells begin with "# %%": no outputs, so that a change can be read."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("cells.py")
TARGET = Path(__file__).parents[1] / "notebook.ipynb"


def cells(script: str) -> list[dict[str, Any]]:
    """What begins with "# %% [markdown]" is text, in comments; what begins with "# %%" is Python."""
    parts = re.split(r"^# %%(.*)\n", script, flags=re.MULTILINE)[1:]
    return [_cell(i, kind.strip(), body.strip()) for i, (kind, body) in enumerate(zip(*[iter(parts)] * 2, strict=True))]


def _cell(place: int, kind: str, body: str) -> dict[str, Any]:
    if kind == "[markdown]":
        text = re.sub(r"^# ?", "", body, flags=re.MULTILINE)
        return {"cell_type": "markdown", "id": f"cell-{place}", "metadata": {}, "source": text.splitlines(True)}
    code = {"execution_count": None, "outputs": [], "source": body.splitlines(True)}
    return {"cell_type": "code", "id": f"cell-{place}", "metadata": {}, **code}


def notebook(script: str) -> str:
    """The file's text, in the format of Jupyter, 4.5."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    document = {"cells": cells(script), "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(document, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    TARGET.write_text(notebook(SOURCE.read_text("utf-8")), "utf-8")
