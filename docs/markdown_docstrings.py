"""Docstrings are Markdown where they hold code; Sphinx reads reStructuredText. This is the difference."""

from __future__ import annotations

import re
from collections.abc import Iterator

_FENCE = re.compile(r"^(\s*)```(\w*)\s*$")
_CODE = re.compile(r"(``[^`]+``|`[^`]+`)")
_SPECIAL = re.compile(r"([*|\\])|(?<=\w)(_)(?!\w)")  # emphasis, substitutions, references


def to_restructured_text(app: object, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Fences become code blocks, `code` becomes ``code``, and *, | and a trailing _ stay what they are; in place."""
    lines[:] = converted(lines)
    if what in ("attribute", "property", "data"):
        lines[:0] = ["..", ""]  # a comment: napoleon takes what stands before a first line's colon for a type


def converted(lines: list[str]) -> list[str]:
    """The lines of a docstring in reStructuredText."""
    lines = list(_with_returns_as_field(lines))
    found: list[str] = []
    indent: str | None = None  # within a fence: that of its first line
    literal = -1  # within an indented literal block: the indentation of the line that announced it
    for line in lines:
        fence = _FENCE.match(line)
        blank = not line.strip()
        width = len(line) - len(line.lstrip())
        if fence and indent is None:
            indent = fence[1]
            found += ["", f"{indent}.. code-block:: {fence[2] or 'none'}", ""]
        elif fence:
            indent = None
            found.append("")
        elif indent is not None:
            found.append("" if blank else f"    {line}")
        elif line.lstrip().startswith((">>>", "...")):
            found.append(line)
        else:
            if literal >= 0 and not blank and width <= literal:
                literal = -1
            found.append(line if literal >= 0 else _escaped(line))
            if line.rstrip().endswith("::"):
                literal = width
    return found


def _with_returns_as_field(lines: list[str]) -> Iterator[str]:
    """ ":returns: what" for "Returns:" and its first line, whose colon napoleon would take for the end of a type."""
    announced = False
    for line in lines:
        if line == "Returns:":
            announced = True
        elif announced:
            yield f":returns: {line.strip()}"
            announced = False
        else:
            yield line


def _escaped(line: str) -> str:
    """One line of prose: code is doubled, and what reStructuredText would read into the rest is escaped."""
    parts = _CODE.split(line)
    return "".join(
        (part if part.startswith("``") else f"`{part}`") if i % 2 else _SPECIAL.sub(r"\\\g<0>", part)
        for i, part in enumerate(parts)
    )
