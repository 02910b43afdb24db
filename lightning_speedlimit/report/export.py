"""Figures as inline SVG, PNG and pixels."""

from __future__ import annotations

import hashlib
import io
import re
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lightning_speedlimit.checks.arguments import check_kind
from lightning_speedlimit.checks.guard import shown

from .style import GRID, INK, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of like widths: the layout was made with DejaVu Sans, which not every machine has.
_PREFIX = re.compile(r"[A-Za-z][\w-]{0,99}", re.ASCII)  # of ids, which stand in the page as they are
_FONTS = "'DejaVu Sans', Verdana, sans-serif"


def png(figure: Figure) -> bytes:
    """The figure on white, as a PNG file without date and program."""
    _check(figure)
    buffer = io.BytesIO()
    with style():
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def pixels(figure: Figure) -> npt.NDArray[np.uint8]:
    """(height, width, 3) uint8: the figure on white."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    _check(figure)
    with style():
        canvas: Any = FigureCanvasAgg(figure)
        canvas.draw()
        return np.array(canvas.buffer_rgba(), dtype=np.uint8)[:, :, :3]


def svg(figure: Figure, *, prefix: str | None = None) -> str:
    """The figure as an <svg> element for an HTML page; the same figure gives the same text.

    Its ink is `currentColor`, its grid `var(--grid, #ddd)`, its background transparent, its text text. It is as wide
    as what it stands in, at most as wide as it was drawn. What a screen reader says of it comes from `describe`.

    Args:
        prefix: begins all ids, so that those of several figures on a page differ; None: a hash of the content.
    """
    _check(figure)
    if prefix is not None and not (isinstance(prefix, str) and _PREFIX.fullmatch(prefix)):
        raise ValueError(f"prefix got {shown(prefix)}, wanted a letter and then letters, digits, '-', '_'; or None")
    raw = _raw_svg(figure)
    if prefix is None:
        prefix = "f" + hashlib.sha256(raw.encode()).hexdigest()[:10]
    head, body = _split(raw)
    width, height, box = (_attribute(head, name) for name in ("width", "height", "viewBox"))
    body = _with_prefix(_without_page_wide(body), prefix)
    body = body.replace(INK, "currentColor").replace(GRID, "var(--grid, #ddd)").replace("'DejaVu Sans'", _FONTS)
    title, _, text = str(figure.get_label() or "Figure").partition("\n")
    description = f"<desc>{escape(text)}</desc>" if text else ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}" role="img" aria-label="{escape(title)}" '
        f'style="width: 100%; max-width: {width}; aspect-ratio: {_bare(width)} / {_bare(height)}; '
        'stroke-linejoin: round; stroke-linecap: butt">\n'
        f"<title>{escape(title)}</title>{description}\n{body}</svg>\n"
    )


def _raw_svg(figure: Figure) -> str:
    """What `savefig(format="svg", transparent=True)` writes, which draws all that is laid out once more before."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    canvas, dpi = figure.canvas, figure.dpi
    patches: list[Any] = [figure.patch, *(axes.patch for axes in figure.axes)]
    colours = [(patch.get_facecolor(), patch.get_edgecolor()) for patch in patches]
    try:
        for patch in patches:
            patch.set(facecolor="none", edgecolor="none")
        with style(**{"svg.hashsalt": "figure"}):
            writer: Any = FigureCanvasSVG(figure)
            writer.print_svg(buffer, metadata={"Date": None, "Creator": None})
    finally:
        for patch, (face, edge) in zip(patches, colours, strict=True):
            patch.set(facecolor=face, edgecolor=edge)
        figure.set_dpi(dpi)
        figure.set_canvas(canvas)
    return buffer.getvalue()


def _check(figure: object) -> None:
    from matplotlib.figure import Figure

    check_kind("figure", figure, Figure, "a matplotlib Figure, as the functions of report.figures return")


def _split(raw: str) -> tuple[str, str]:
    """The opening tag, and what stands between it and the closing one; without prolog and doctype."""
    found = re.search(r"<svg\b[^>]*>", raw)
    if found is None:
        raise ValueError(f"matplotlib's SVG must hold an <svg> element, got {raw[:80]!r}")
    return found.group(), raw[found.end() : raw.rindex("</svg>")].lstrip()


def _attribute(tag: str, name: str) -> str:
    found = re.search(rf'\b{name}="([^"]*)"', tag)
    if found is None:
        raise ValueError(f"matplotlib's SVG must have the attribute {name}, got {tag!r}")
    return found.group(1)


def _bare(length: str) -> str:
    return length.removesuffix("pt")


def _without_page_wide(body: str) -> str:
    """Without metadata, which names addresses, and without style rules, which would hold for the whole page."""
    body = re.sub(r"<metadata>.*?</metadata>\s*", "", body, flags=re.DOTALL)
    return re.sub(r"<defs>\s*<style\b.*?</style>\s*</defs>\s*", "", body, flags=re.DOTALL)


def _with_prefix(body: str, prefix: str) -> str:
    """All ids, and all references to them, begin with the prefix."""

    def named(match: re.Match[str]) -> Any:
        return f"{match.group(1)}{prefix}-{match.group(2)}"

    body = re.sub(r'(\bid=")([^"]+)', named, body)
    body = re.sub(r"(url\(#)([^)]+)", named, body)
    body = re.sub(r'\bxlink:href="', 'href="', body)
    return re.sub(r'(\bhref="#)([^"]+)', named, body)
