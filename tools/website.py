"""Build the site in build/site from results/, site/ and experiments/; nothing is run for it.

python -m tools.website
"""

import json
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

import jinja2
import nbformat

from atlas_lib import bootstrap

ROOT, SOURCE, TARGET = bootstrap.ROOT, Path("build/site-source"), Path("build/site")
FOLDED = {"parameters", "injected-parameters", "bootstrap"}  # no part of the story


def main() -> None:
    if not (ROOT / "results" / "run.json").is_file():
        sys.exit("error: results/ holds no published run; type make publish RUN=<folder> first.")
    from sphinx.cmd.build import main as sphinx_build

    source = ROOT / SOURCE
    assemble(source)
    target = str(ROOT / TARGET)
    shutil.rmtree(target, ignore_errors=True)  # a page that is gone must not stay
    if status := sphinx_build(
        ["-q", "-W", "--keep-going", "-n", "-b", "html", str(source), target]
    ):
        sys.exit(status)
    print(f"{TARGET / 'index.html'} is built")


def assemble(source: Path) -> None:
    """Sphinx's input: the pages of site/ filled with the results, experiments, notebooks."""
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(ROOT / "site", source)
    shutil.copytree(ROOT / "experiments", source / "experiments")
    shutil.copy(ROOT / "results" / "config.yaml", source)
    pages = sorted((ROOT / "results" / "notebooks").glob("*.ipynb"))
    (source / "notebooks").mkdir()
    for page in pages:
        nbformat.write(
            for_sphinx(nbformat.read(page, as_version=4)), source / "notebooks" / page.name
        )
    values = published() | {"pages": [page.stem for page in pages]}
    forest = nbformat.read(ROOT / "results" / "notebooks" / "04_ifeval_eval.ipynb", as_version=4)
    values["forest"] = first_figure(forest, source / "static" / "forest.png")
    for template in sorted(source.glob("*.jinja")):
        text = template.read_text("utf-8")
        environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True)
        template.with_suffix("").write_text(environment.from_string(text).render(values), "utf-8")
        template.unlink()


def published() -> dict[str, Any]:
    """What the pages say of the published run."""
    run = json.loads((ROOT / "results" / "run.json").read_bytes())
    metrics = json.loads((ROOT / "results" / "metrics.json").read_bytes())
    its = [row for row in metrics if all(row[k] == run[k] for k in ("commit", "config_digest"))]
    audit = json.loads((ROOT / "results" / "sft_template_audit_summary.json").read_bytes())
    references = json.loads((ROOT / "configs" / "published.json").read_bytes())
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["urls"]
    primary = next(row for row in run["comparisons"] if row["role"] == "primary")
    names = {"run": run, "metrics": its, "audit": audit, "references": references["rows"]}
    return names | {"primary": primary, "repository": urls["Repository"]}


def for_sphinx(page: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Give MyST-NB what it looks for: alternative texts of figures, which code to fold."""
    for cell in (cell for cell in page.cells if cell.cell_type == "code"):
        tags = cell.metadata.setdefault("tags", [])
        tags.append("hide-input")
        options = {"code_prompt_show": "Show code", "code_prompt_hide": "Hide code"}
        for output in cell.outputs:
            if alt := output.get("metadata", {}).get("image/png", {}).get("alt"):
                options["image"] = {"alt": alt}
        if FOLDED & set(tags):
            options |= {"code_prompt_show": "Show the set-up"}
        cell.metadata["mystnb"] = options
    return page


def first_figure(page: nbformat.NotebookNode, path: Path) -> str:
    """Write the first figure of a page to `path`; returns its alternative text."""
    import base64

    outputs = [output for cell in page.cells for output in cell.get("outputs", [])]
    figure = next(output for output in outputs if "image/png" in output.get("data", {}))
    path.write_bytes(base64.b64decode(figure.data["image/png"]))
    return figure.metadata["image/png"]["alt"]


if __name__ == "__main__":
    main()
