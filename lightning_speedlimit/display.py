"""How runs and comparisons show themselves in a notebook. What draws them registers here: records know no figures."""

from __future__ import annotations

from collections.abc import Callable
from html import escape

_HEIGHT = "40rem"  # of a page within a notebook, whose reader may pull it longer

painters: list[Callable[[object], str]] = []
"""Each gives HTML, or raises ImportError where a library is not installed; the first that does not is taken."""


class Displayed:
    """What a notebook shows as tables and figures, and where nothing can draw these as the text that `print` shows."""

    def _repr_html_(self) -> str:
        for paint in painters:
            try:
                return paint(self)
            except ImportError:
                continue
        return f"<pre>{escape(self._as_text())}</pre>"

    def _as_text(self) -> str:
        return str(self)


class Page(str):
    """A whole HTML document as text, which a notebook shows in a frame of its own: neither's styles reach the other."""

    def __repr__(self) -> str:
        return f"<page of {len(self):,} characters; print() shows its HTML, a notebook the page>"

    def _repr_html_(self) -> str:
        """The frame may run the page's own script, and reach nothing of the notebook's."""
        style = f"width: 100%; height: {_HEIGHT}; resize: vertical; overflow: auto; border: 1px solid #8888"
        return f'<iframe sandbox="allow-scripts" style="{style}" srcdoc="{escape(str(self))}"></iframe>'
