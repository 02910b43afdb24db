"""The documentation's settings: `sphinx-build -W --keep-going -n -b html docs docs/_build/html`.

Nothing is fetched while it builds, and the pages need no network to be read: formulas are plain unicode.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import warnings
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
os.environ.setdefault("OMP_NUM_THREADS", "1")  # sums, and so the figures, are the same on every machine

from markdown_docstrings import to_restructured_text  # noqa: E402 - beside this file

import lightning_speedlimit  # noqa: E402

project = "lightning-speedlimit"
author = "lightning-speedlimit contributors"
copyright = author
release = version = lightning_speedlimit.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "gallery/*.rst"]

# --- pages in Markdown: links and headings work here as on a code-hosting page

myst_heading_anchors = 4
highlight_language = "none"  # indented blocks are formulas
copybutton_prompt_text = r"\$ "
copybutton_prompt_is_regexp = True

# --- the API, from docstrings in Markdown with Google's sections

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_class_signature = "mixed"
autodoc_mock_imports = ["transformers", "accelerate"]  # which one callback alone needs
napoleon_numpy_docstring = False
napoleon_use_ivar = True
python_maximum_signature_line_length = 88
maximum_signature_line_length = 88
add_module_names = False

# Types of other packages, whose pages are elsewhere: to link them would need their inventories from the network.
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|torchmetrics|numpy|np|npt|collections|pathlib|os|typing|types|jinja2|matplotlib|dist)\b.*"),
    (r"py:.*", r"(pandas\.)?DataFrame"),
    (r"py:.*", r"lightning_speedlimit\.record\.rows\.Meter"),  # a protocol: any TrajectoryMeter is one
    (r"py:.*", r"(Tensor|Optimizer|Module|Path|Any|Callable|Iterable|Mapping|Sequence|Self|ArrayLike|NDArray|Figure)"),
]

# --- scripts that are run while the pages are built

sphinx_gallery_conf = {
    "examples_dirs": "gallery",
    "gallery_dirs": "gallery_built",
    "filename_pattern": r"plot_",
    "within_subsection_order": "FileNameSortKey",
    "abort_on_example_error": True,
    "run_stale_examples": True,  # a script that is the same may print something else with a package that is not
    "download_all_examples": False,
    "show_memory": False,
    "show_signature": False,
    "remove_config_comments": True,
    "min_reported_time": 1e9,
    "write_computation_times": False,
    "image_scrapers": ("matplotlib", "gallery_figures"),
    "reset_modules": ("matplotlib",),
    "copyfile_regex": "",
}
# What Lightning says of devices, workers and its other products belongs to no page.
for name in ("pytorch_lightning", "lightning.pytorch"):  # the package under its two names
    logging.getLogger(f"{name}.utilities.rank_zero").setLevel(logging.ERROR)
for message in (".*does not have many workers.*", ".*LeafSpec.*"):
    warnings.filterwarnings("ignore", message)

# --- how it looks

html_theme = "furo"
html_title = "lightning-speedlimit"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = False
html_theme_options = {"navigation_with_keys": True}


def without_signature(app: object, what: str, name: str, obj: object, *_: object) -> tuple[str, None] | None:
    """Results are not made by who reads them: their fields are described, and how they are constructed is not."""
    return ("", None) if what == "class" and dataclasses.is_dataclass(obj) else None


def setup(app: object) -> None:
    """Docstrings become reStructuredText before napoleon reads their sections (it comes at priority 500)."""
    app.connect("autodoc-process-signature", without_signature)  # type: ignore[attr-defined]
    app.connect("autodoc-process-docstring", to_restructured_text, priority=400)  # type: ignore[attr-defined]
