"""Text that comes from elsewhere (a record, the name of a folder or a class), fit for a terminal, a page, a file."""

from __future__ import annotations

import unicodedata


def plain_text(text: str) -> str:
    r"""The text with what steers a terminal, or has no shape, written as Python writes it: \x1b, \u202e, \ud800.

    That is control characters, marks of direction, halves of surrogate pairs, and what Unicode leaves to others. Line
    feeds, tabs and spaces of all kinds stay.
    """
    return text if text.isprintable() else "".join(c if _is_plain(c) else _escaped(c) for c in text)


def one_line(text: str, longest: int) -> str:
    """The same on one line of at most so many characters."""
    text = " ".join(plain_text(text).split())
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def _is_plain(character: str) -> bool:
    return character.isprintable() or character in "\n\t" or unicodedata.category(character) == "Zs"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
