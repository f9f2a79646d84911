"""The documentation site: `.ci/docs` builds it, warnings are errors.

Sphinx, since the reference comes from the docstrings, and since it renders formulas, checks links
and searches without a service; MyST for pages in Markdown.
"""

import re
import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import anatomy  # noqa: E402

import dice_core  # noqa: E402

project = "dice_core"
author = "The dice_core authors"
release = version = dice_core.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",  # no content delivery network: pages can be read without a connection
    "sphinx_copybutton",
    "sphinx_design",
    "myst_nb",
]
default_role = "literal"

myst_enable_extensions = ["dollarmath", "colon_fence", "attrs_inline", "attrs_block"]
myst_heading_anchors = 3
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 600
nb_execution_show_tb = True
nb_merge_streams = True
nb_mime_priority_overrides = [("*", "image/png", 1)]

autodoc_typehints = "none"  # the docstrings have them, with shapes and units
autodoc_member_order = "bysource"
autodoc_class_signature = "mixed"
napoleon_google_docstring = False
napoleon_custom_sections = ["Returns", "Shapes"]  # in sentences, not lists of types

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
copybutton_only_copy_prompt_lines = True

html_theme = "furo"
html_title = "dice_core"
html_show_sourcelink = False
html_show_copyright = False


def prepare(app) -> None:
    """Files from elsewhere in the checkout, and figures drawn by code."""
    shutil.copy(HERE.parent / "examples" / "tutorial.ipynb", HERE / "tutorial.ipynb")
    anatomy.draw(HERE / "images")


def without_emphasis(app, what, name, obj, options, lines: list[str]) -> None:
    """Shapes such as (N, C, *) have an asterisk that reStructuredText takes for emphasis."""
    lines[:] = [re.sub(r"(?<=, )\*(?=[,)])", "\N{ASTERISK OPERATOR}", line) for line in lines]


def setup(app) -> None:
    app.connect("config-inited", lambda app, config: prepare(app))
    app.connect("autodoc-process-docstring", without_emphasis)
