"""Numbers and names as all output writes them; text from elsewhere made fit for a terminal, a page, a file."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence

UNDEFINED = "?"
_ROUNDING = 1e-9  # relative: of sums and means in float64

# --- text from elsewhere: a record, the name of a folder or a class


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


# --- numbers and lists


def number(x: float, digits: int = 3, undefined: str = UNDEFINED) -> str:
    """So many significant digits, all of the integer part; scientific below 1e-4 and from 1e7 on."""
    if math.isnan(x):
        return undefined
    if x == 0 or math.isinf(x):
        return f"{x:.0f}"
    rounded = float(f"{x:.{digits - 1}e}")
    if not 1e-4 <= abs(rounded) < 1e7:
        return f"{x:.{digits - 1}e}"
    return f"{x:.{max(0, digits - 1 - math.floor(math.log10(abs(rounded))))}f}"


def with_error(x: float, standard_error: float, digits: int = 3, undefined: str = UNDEFINED, sign: str = "±") -> str:
    """ "123 ± 4": the error with two digits at most; alone where there is none, or nothing but rounding."""
    told = math.isfinite(standard_error) and standard_error > _ROUNDING * abs(x)
    return number(x, digits, undefined) + (f" {sign} {number(standard_error, 2)}" if told else "")


def count_with_error(x: float, standard_error: float, undefined: str = UNDEFINED, sign: str = "±") -> str:
    """ "12,300 ± 1,200": the same of what was counted."""
    if math.isnan(x):
        return undefined
    told = with_error(x, standard_error)
    error = count(standard_error) if standard_error >= 1e3 else number(standard_error, 2)
    return count(x) + (f" {sign} {error}" if "±" in told else "")


def amount(x: float) -> str:
    """ "12,300", "32", "0.052": three digits at most, thousands apart."""
    if not math.isfinite(x):
        return number(x)
    rounded = float(f"{x:.3g}")
    return f"{rounded:,.0f}" if 1e3 <= rounded < 1e9 else f"{rounded:.4g}"


def count(x: float) -> str:
    """ "17,970", "48": all digits of what was counted; as `amount` below a thousand, as `number` from 1e9 on."""
    return f"{x:,.0f}" if 1e3 <= x < 1e9 else amount(x) if abs(x) < 1e3 else number(x)


def interval(bounds: tuple[float, float]) -> str:
    """ "96 to 123", "1,745 to 4,770"; "at least 96" where the end is not within the run; "at most 96" from 0 on."""
    low, high = map(count, bounds)
    if math.isinf(bounds[1]):
        return f"at least {low}"
    if bounds[0] == 0 < bounds[1]:
        return f"at most {high}"
    return low if low == high else f"{low} to {high}"


def listed(names: Sequence[str], most: int = 10) -> str:
    """ "a, b and c"; "a, b and 7 more"."""
    shown = list(names[:most]) + ([f"{len(names) - most} more"] if len(names) > most else [])
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}" if shown else ""
