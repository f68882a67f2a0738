"""Sphinx configuration. Built without network: no intersphinx inventories are fetched."""

from importlib.metadata import version as installed_version

project = "vae-ext"
author = "the vae-ext authors"
copyright = "the vae-ext authors"
release = version = installed_version("vae-ext")

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_design",
]
exclude_patterns = ["_build"]
templates_path = ["_templates"]

myst_enable_extensions = ["amsmath", "attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autosummary_generate = True
autosummary_ignore_module_all = False
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # a result's attributes are members as well
napoleon_use_rtype = False
napoleon_custom_sections = ["Shape"]

html_theme = "furo"
html_title = f"vae-ext {release}"
html_static_path = ["_static"]
