"""Build the website in build/site from results/, site/ and experiments/, without running anything.

python -m tools.website
"""

import base64
import html
import json
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

import jinja2
import nbformat

from atlas_lib import artifacts, bootstrap
from atlas_lib.evaluate import significance

PUBLISHED = bootstrap.ROOT / "results"
WELL_KNOWN = (  # families, and a repository that has their template
    ("Qwen2.5", "Qwen-Qwen2.5-7B-Instruct"),
    ("Qwen3", "Qwen/Qwen3-0.6B"),
    ("Qwen3-Instruct-2507", "Qwen/Qwen3-4B-Instruct-2507"),
    ("Qwen3.5", "Qwen3.5-4B"),
    ("Llama 3", "NousResearch/Meta-Llama-3-8B-Instruct"),
    ("Llama 3.1", "meta-llama-Llama-3.1-8B-Instruct"),
    ("Llama 3.2", "meta-llama-Llama-3.2-3B-Instruct"),
    ("Gemma 3", "nvidia/Nemotron-Content-Safety-Reasoning-4B"),
    ("Gemma 4", "google/gemma-4-E4B-it"),
    ("Mistral 7B v0.3", "mistralai/Mistral-7B-Instruct-v0.3"),
    ("Mistral Small 3.1", "mistralai/Mistral-Small-3.1-24B-Instruct-2503"),
    ("Phi-3", "microsoft/Phi-3-mini-4k-instruct"),
    ("Phi-4", "microsoft/phi-4"),
    ("SmolLM2", "HuggingFaceTB/SmolLM2-135M-Instruct"),
    ("SmolLM3", "HuggingFaceTB/SmolLM3-3B"),
    ("DeepSeek-V3.1", "deepseek-ai-DeepSeek-V3.1"),
    ("DeepSeek-R1 distilled", "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B"),
    ("gpt-oss", "openai-gpt-oss-120b"),
    ("GLM-4.5", "zai-org/GLM-4.5-Air"),
    ("OLMo 3", "allenai/Olmo-3-7B-Instruct"),
    ("Granite 4", "ibm-granite-granite-4.0"),
)
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
    for name in ("config.yaml", "report.md"):
        shutil.copy(PUBLISHED / name, source)
    for path in (source / "notebooks").glob("*.ipynb"):
        notebook = nbformat.read(path, as_version=4)
        annotate(notebook)
        nbformat.write(notebook, path)
    values = template_values()
    values["forest"] = extract_forest(source / "static" / "forest.png")
    extract_responses(source / "static" / "responses.html")
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["visible"] = visible
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
    primary = next(row for row in run["comparisons"] if row["role"] == "primary")
    project = tomllib.loads((bootstrap.ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return {
        "run": run,
        "metrics": [row for row in rows if all(row.get(k) == run[k] for k in ("commit", "digest"))],
        "audit": audit,
        "primary": primary,
        "smallest": smallest_effect_of(primary),
        "survey": artifacts.read_json(PUBLISHED / "template_survey.json"),
        "families": WELL_KNOWN,
        "repository": project["urls"]["Repository"],
        "notebooks": sorted(path.stem for path in (PUBLISHED / "notebooks").glob("*.ipynb")),
    }


def smallest_effect_of(compared: dict) -> float | None:
    """The smallest effect in points that a comparison of the published run could detect."""
    n = sum(compared[name] for name in ("both", "only_a", "only_b", "neither"))
    discordant = (compared["only_a"] + compared["only_b"]) / n
    return significance.smallest_effect(n, discordant, significance.ALPHA)


def visible(text: str) -> str:
    """Text for HTML, on one line, with escapes for line breaks."""
    return html.escape(json.dumps(text, ensure_ascii=False)[1:-1].replace('\\"', '"'))


def annotate(notebook: nbformat.NotebookNode) -> None:
    """Add the metadata that MyST-NB reads: alternative texts of figures, and what to fold."""
    for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
        if SET_UP & set(cell.metadata.get("tags", [])):
            cell.metadata["tags"].append("hide-input")
        for output in cell.outputs:
            if alt := output.get("metadata", {}).get("image/png", {}).get("alt"):
                cell.metadata["mystnb"] = {"image": {"alt": alt}}


def outputs_of_04() -> list[nbformat.NotebookNode]:
    """All outputs of the published notebook 04."""
    notebook = nbformat.read(PUBLISHED / "notebooks" / "04_ifeval_eval.ipynb", as_version=4)
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def extract_forest(path: Path) -> str:
    """Write the forest plot of notebook 04 to `path`; returns its alternative text."""
    figure = next(o for o in outputs_of_04() if "image/png" in o.get("data", {}))
    path.write_bytes(base64.b64decode(figure.data["image/png"]))
    return figure.metadata["image/png"]["alt"]


def extract_responses(path: Path) -> None:
    """Write the page of every response, a frame of notebook 04, to `path`."""
    shown = ("".join(o.get("data", {}).get("text/html", "")) for o in outputs_of_04())
    frame = next(text for text in shown if "srcdoc=" in text)
    page = html.unescape(frame.partition('srcdoc="')[2].partition('"')[0])
    path.write_text(page, "utf-8")


if __name__ == "__main__":
    main()
