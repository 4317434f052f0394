"""Build the website in build/site from results/, site/ and experiments/, without running anything.

python -m tools.website
"""

import base64
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

import jinja2
import nbformat

from atlas_lib import artifacts, bootstrap

PUBLISHED = bootstrap.ROOT / "results"
SET_UP = {"parameters", "injected-parameters", "bootstrap", "setup"}  # tags of folded cells


def main() -> None:
    if not (PUBLISHED / "run.json").is_file():
        sys.exit("error: results/ has no published run; run `make publish RUN=<folder>` first.")
    from sphinx.cmd.build import main as build_sphinx

    source, target = bootstrap.ROOT / "build/site-source", bootstrap.ROOT / "build/site"
    for folder in (source, target):
        shutil.rmtree(folder, ignore_errors=True)
    assemble(source)
    options = ["-q", "-W", "--keep-going", "-n", "-b", "html"]
    if status := build_sphinx([*options, str(source), str(target)]):
        sys.exit(status)
    print("build/site/index.html is built")


def assemble(source: Path) -> None:
    """Write Sphinx's input: the pages of site/ filled with results, experiments, notebooks."""
    shutil.copytree(bootstrap.ROOT / "site", source)
    shutil.copytree(bootstrap.ROOT / "experiments", source / "experiments")
    shutil.copytree(PUBLISHED / "notebooks", source / "notebooks")
    shutil.copy(PUBLISHED / "config.yaml", source)
    for path in (source / "notebooks").glob("*.ipynb"):
        notebook = nbformat.read(path, as_version=4)
        annotate(notebook)
        nbformat.write(notebook, path)
    values = template_values()
    values["forest"] = extract_forest(source / "static" / "forest.png")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True)
    for path in source.glob("*.jinja"):
        template = environment.from_string(path.read_text("utf-8"))
        path.with_suffix("").write_text(template.render(values), "utf-8")
        path.unlink()


def template_values() -> dict[str, Any]:
    """The variables of the templates in site/: the published run, and the repository's URL."""
    run, rows, audit = (
        artifacts.read_json(PUBLISHED / name)
        for name in ("run.json", "metrics.json", "sft_template_audit_summary.json")
    )
    project = tomllib.loads((bootstrap.ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return {
        "run": run,
        "metrics": [row for row in rows if all(row.get(k) == run[k] for k in ("commit", "digest"))],
        "audit": audit,
        "primary": next(row for row in run["comparisons"] if row["role"] == "primary"),
        "repository": project["urls"]["Repository"],
        "notebooks": sorted(path.stem for path in (PUBLISHED / "notebooks").glob("*.ipynb")),
    }


def annotate(notebook: nbformat.NotebookNode) -> None:
    """Add the metadata that MyST-NB reads: alternative texts of figures, and what to fold."""
    for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
        if SET_UP & set(cell.metadata.get("tags", [])):
            cell.metadata["tags"].append("hide-input")
        for output in cell.outputs:
            if alt := output.get("metadata", {}).get("image/png", {}).get("alt"):
                cell.metadata["mystnb"] = {"image": {"alt": alt}}


def extract_forest(path: Path) -> str:
    """Write the forest plot of notebook 04 to `path`; returns its alternative text."""
    notebook = nbformat.read(PUBLISHED / "notebooks" / "04_ifeval_eval.ipynb", as_version=4)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    figure = next(output for output in outputs if "image/png" in output.get("data", {}))
    path.write_bytes(base64.b64decode(figure.data["image/png"]))
    return figure.metadata["image/png"]["alt"]


if __name__ == "__main__":
    main()
