"""Figures of the package in the gallery: they are none of pyplot's, which are all that sphinx-gallery looks for."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from sphinx_gallery.scrapers import figure_rst

_SHOWN = "_shown_figure"


def shown(block: tuple[str, str, int], block_vars: dict[str, Any], gallery_conf: dict[str, Any]) -> str:
    """The figure that a block left in the variable `figure`, once, as an image."""
    names = block_vars["example_globals"]
    figure = names.get("figure")
    if not isinstance(figure, Figure) or hasattr(figure, "number") or figure is names.get(_SHOWN):
        return ""
    names[_SHOWN] = figure
    path = next(block_vars["image_path_iterator"])
    figure.savefig(path, dpi=130, bbox_inches="tight")
    title = figure.axes[0].get_title(loc="left") or figure.axes[0].get_title() if figure.axes else ""
    return figure_rst([path], gallery_conf["src_dir"], title.replace('"', "") or "figure")


def _get_sg_image_scraper() -> Any:
    """What sphinx-gallery asks a module for that is named in its settings."""
    return shown
