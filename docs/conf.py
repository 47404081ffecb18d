"""Settings of Sphinx. ``make docs`` builds the pages into ``docs/_build/html``."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE / "_ext")]

import kd_d2  # noqa: E402

project = "kd_d2"
author = "The kd_d2 authors"
copyright = author
release = version = kd_d2.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "repository_pages"]
exclude_patterns = ["_build", "_generated/parts"]

myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
# ":mod:`.config`" in a docstring is the one beside it, but there are several.
suppress_warnings = ["ref.python"]

autodoc_default_options = {"members": True, "show-inheritance": True, "no-value": True}
autodoc_member_order = "bysource"
autodoc_typehints = "none"
# Those of Detectron2 and torch are written in other dialects.
autodoc_inherit_docstrings = False
autodoc_class_signature = "separated"
napoleon_numpy_docstring = False
napoleon_attr_annotations = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"kd_d2 {release}"
html_static_path = []
html_show_sourcelink = False
