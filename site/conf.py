"""Sphinx settings of the site; tools/website.py assembles its pages and calls Sphinx.

Sphinx with MyST-NB, because it takes executed notebooks as they are, links them with pages of text,
and has themes that bring all of their files. Jupyter Book 2 fetches its theme while building, and
Quarto comes from no package registry that this project uses.
"""

import importlib.util
import json
import shutil
from pathlib import Path

from myst_nb.sphinx_ import HideCodeCellNode, depart_HideCellInput, visit_HideCellInput

RUN = json.loads((Path(__file__).resolve().parents[2] / "results" / "run.json").read_bytes())

project, author, copyright = "Atlas", "the Atlas contributors", "the Atlas contributors, Apache-2.0"
extensions = ["myst_nb", "sphinx_copybutton"]
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # what is shown is what the published run printed
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

# One file of MathJax draws every formula as SVG: no fonts, nothing from elsewhere.
mathjax_path = "tex-svg.js"
mathjax3_config = {"options": {"enableMenu": False}}


def copy_mathjax(app) -> None:
    """Put MathJax out of its Python package among the static files."""
    [package] = importlib.util.find_spec("sphinx-mathjax-offline").submodule_search_locations
    shutil.copy(Path(package) / "static" / "mathjax" / "tex-svg.js", Path(app.srcdir) / "static")


def visit_code(self, node) -> None:
    """Code that belongs to the story is open to begin with; only set-up is folded."""
    visit_HideCellInput(self, node)
    if "set-up" not in node["prompt_show"]:
        start = next(i for i in reversed(range(len(self.body))) if "<details" in self.body[i])
        self.body[start] = self.body[start].replace("<details", "<details open")


def name_levels(app, pagename, templatename, context, doctree) -> None:
    """Sphinx calls the captions of the navigation headings and leaves their level out."""
    for key in ("furo_navigation_tree", "toctree_html"):
        if isinstance(context.get(key), str):
            context[key] = context[key].replace('role="heading"', 'role="heading" aria-level="2"')


def setup(app) -> None:
    app.connect("html-page-context", name_levels, priority=900)  # after the theme's own
    app.connect("builder-inited", copy_mathjax)
    app.add_node(HideCodeCellNode, override=True, html=(visit_code, depart_HideCellInput))
