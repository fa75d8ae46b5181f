"""Sphinx: `make docs` writes the pages in this folder, and the API from the docstrings, to build/docs."""

import sys
from importlib import metadata
from pathlib import Path

project = "FedMS"
release = metadata.version("fedms")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_title = f"FedMS {release}"
myst_heading_anchors = 3
# Attributes that a class documents and a property implements are described once.
napoleon_use_ivar = True
autodoc_typehints = "description"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": False}
# Cross-references in docstrings are plain names in backticks, as a reader of the code sees them.
default_role = "code"

sys.path.insert(0, str(Path(__file__).parent))
import notebooks  # noqa: E402


def setup(app):
    """Write the notebooks of the tutorials, and link each one below the title of its page."""
    app.connect("builder-inited", lambda app: notebooks.write(Path(app.srcdir, "_notebooks")))
    app.connect("source-read", _link_notebook)


def _link_notebook(app, name, source):
    if name in notebooks.TUTORIALS:
        title, rest = source[0].split("\n", 1)
        source[0] = f"{title}\n\n{{download}}`This page as a notebook </_notebooks/{Path(name).name}.ipynb>`\n{rest}"
