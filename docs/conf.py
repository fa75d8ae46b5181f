"""Sphinx: `make docs` writes the pages in this folder, and the API from the docstrings, to build/docs."""

from importlib import metadata

project = "FedMS"
release = metadata.version("fedms")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_title = f"FedMS {release}"
myst_heading_anchors = 3
autodoc_typehints = "description"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": False}
# Cross-references in docstrings are plain names in backticks, as a reader of the code sees them.
default_role = "code"
