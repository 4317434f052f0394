"""Sphinx settings of the site; tools/website.py assembles its pages and calls Sphinx.

Sphinx with MyST-NB renders executed notebooks without changing them, links them with pages of text,
and has themes that contain all of their files. Jupyter Book 2 downloads its theme while building,
and Quarto is in none of the package registries that this project uses.
"""

import importlib.util
import json
import shutil
from pathlib import Path

RUN = json.loads((Path(__file__).resolve().parents[2] / "results" / "run.json").read_bytes())

project, author, copyright = "Atlas", "the Atlas contributors", "the Atlas contributors, Apache-2.0"
extensions = ["myst_nb", "sphinx_copybutton"]
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # show the outputs of the published run
nb_code_prompt_show = "Show the set-up"
nb_code_prompt_hide = "Hide the set-up"
nb_merge_streams = True
exclude_patterns = ["README.md"]

html_theme = "furo"
html_title = "Atlas"
html_static_path = ["static"]
html_favicon = "static/favicon.svg"
html_css_files = ["atlas.css"]
html_js_files = ["atlas.js"]
html_show_sourcelink = False
html_copy_source = False
html_use_index = False
html_theme_options = {"announcement": RUN["label"]} if RUN["label"] else {}
pygments_style, pygments_dark_style = "a11y-high-contrast-light", "a11y-high-contrast-dark"

# One file of MathJax renders formulas as SVG, without fonts and without external requests.
mathjax_path = "tex-svg.js"
mathjax3_config = {"options": {"enableMenu": False}}


def copy_mathjax(app) -> None:
    """Copy MathJax from its Python package to the static files."""
    [package] = importlib.util.find_spec("sphinx-mathjax-offline").submodule_search_locations
    shutil.copy(Path(package) / "static" / "mathjax" / "tex-svg.js", Path(app.srcdir) / "static")


def name_levels(app, pagename, templatename, context, doctree) -> None:
    """Add the heading level that Sphinx omits from the captions of the navigation."""
    for key in ("furo_navigation_tree", "toctree_html"):
        if isinstance(context.get(key), str):
            context[key] = context[key].replace('role="heading"', 'role="heading" aria-level="2"')


def setup(app) -> None:
    app.connect("html-page-context", name_levels, priority=900)  # after the theme's own
    app.connect("builder-inited", copy_mathjax)
