"""Copy the executed notebooks and figures of a finished run into results/, after checking them.

python -m tools.publish runs/sft_qwen05b-offline
python -m tools.publish runs/seed1 --metrics-only    # another run's figures, for experiments/
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbformat
import yaml

from atlas_lib import artifacts, session
from atlas_lib.bootstrap import ROOT
from atlas_lib.config import load_config
from atlas_lib.loss_mask import audit
from atlas_lib.notebooks import STAMP
from atlas_lib.stages import IFEVAL_EVAL, STAGES, TEMPLATE_AUDIT
from tools import leaks
from tools.run import cell_sources

RESULTS = ROOT / "results"
LARGEST = 3_000_000  # characters of a file; a page of 1 MB grows within a notebook
HEAD_ROWS = 50
REPORT = "report.md"
MADE_ON = ("commit", "digest", "platform", "hardware", "versions")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the run's OUT, e.g. runs/sft_qwen05b-offline")
    parser.add_argument("--metrics-only", action="store_true", help="append its metrics, no more")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    try:
        files, rows = collect_files(args.run.resolve(), args.results, args.metrics_only)
        replace_results(args.results, files)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{args.results}: {', '.join(sorted(files))}\n")
    print("\n".join(map(readme_row, rows)))


def collect_files(
    run: Path, results: Path, metrics_only: bool = False
) -> tuple[dict[str, str], list[dict]]:
    """What to write below results/, by name, and the rows of metrics. Raises ValueError.

    A run has the four stages or, as a sweep's report does, a notebook and no metrics. Published
    notebooks must match HEAD; with `metrics_only`, the commit that they ran at.
    """
    if (here := session.commit()).startswith("unknown"):
        raise ValueError(f"The commit of this checkout is {here}.")
    paths = {path.stem: path for path in sorted((run / "notebooks").glob("*.ipynb"))}
    missing = STAGES.keys() - paths.keys()
    if not paths or (missing and (metrics_only or len(missing) < len(STAGES))):
        raise ValueError(f"{run} lacks notebooks/{min(missing)}.ipynb; run it first.")
    at = None if metrics_only else "HEAD"
    checked = {name: check_notebook(name, path, at) for name, path in paths.items()}
    files, rows = {}, []
    if not metrics_only:
        files |= {f"notebooks/{name}.ipynb": text_of(each, run) for name, each in checked.items()}
    if not missing:
        record, rows = record_of(run, checked)
        files |= {} if metrics_only else record
        path = results / "metrics.json"
        before = artifacts.read_json(path) if path.is_file() else []
        files["metrics.json"] = as_json(before + [row for row in rows if row not in before])
    for name, text in files.items():
        if len(text) > LARGEST:
            raise ValueError(f"{name} has {len(text):,} characters; at most {LARGEST:,} go in.")
        leaks.refuse(name, text)
    return files, rows


def check_notebook(name: str, path: Path, at: str | None = "HEAD") -> nbformat.NotebookNode:
    """An executed notebook without its payload, if it is the one committed `at`. Raises ValueError.

    `at` None: the commit that it ran at.
    """
    try:
        notebook = nbformat.read(path, as_version=4)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is not a notebook ({reason}); run it again.") from None
    if problem := problem_of(name, notebook, at):
        raise ValueError(f"{path} {problem}.")
    notebook.cells = [cell for cell in notebook.cells if "payload" not in tags(cell)]
    return notebook


def problem_of(name: str, notebook: nbformat.NotebookNode, at: str | None) -> str | None:
    """Why an executed notebook cannot be published, or None."""
    stamp = stamp_of(notebook)
    if not stamp:
        return "does not record its commit; run it again"
    if not is_known(stamp["commit"]):  # with "-dirty", too
        return f"ran at commit {stamp['commit']}; commit everything and run it again"
    committed = git("show", f"{at or stamp['commit']}:notebooks/{name}.ipynb")
    if not committed or prose_and_code(json.loads(committed)) != prose_and_code(notebook):
        return f"is not the committed notebooks/{name}.ipynb; run it again"
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    if stamp["platform"] == "kaggle":
        counts[-1] = len(counts)  # there this very cell copies the notebook while it runs
    if counts != list(range(1, len(counts) + 1)):
        return f"has cells that did not run once each, in order ({counts}); run it again"
    return wrong_output(notebook)


def prose_and_code(notebook: dict) -> list[str]:
    """The sources of all cells that tools.kernels does not write."""
    written = {"parameters", "payload"}
    cells = [cell for cell in notebook["cells"] if not written.intersection(tags(cell))]
    return cell_sources({"cells": cells}, ("code", "markdown", "raw"))


def wrong_output(notebook: nbformat.NotebookNode) -> str | None:
    """What is wrong with the outputs of a notebook."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    kinds = [(kind, output) for output in outputs for kind in output.get("data", {})]
    if any(output.output_type == "error" for output in outputs):
        return "has a cell that ended in an error; fix it and run it again"
    if any("widget" in kind for kind, _ in kinds):
        return "has a widget, which cannot be shown; print plain lines instead"
    images = [(kind, output) for kind, output in kinds if kind.startswith("image/")]
    if not all(output.metadata.get(kind, {}).get("alt") for kind, output in images):
        return "has a figure without alternative text; use atlas_lib.notebooks.show_figure"
    return None


def stamp_of(notebook: nbformat.NotebookNode) -> dict[str, Any]:
    """What `notebooks.start` recorded: digest, commit, platform, out, parameters; {} if nothing."""
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", []))
    return next((o.metadata[STAMP] for o in outputs if STAMP in o.get("metadata", {})), {})


def record_of(run: Path, notebooks: dict[str, Any]) -> tuple[dict[str, str], list[dict]]:
    """The files beside the metrics, and the metrics' rows, of a run with all stages."""
    stamps = {stage: stamp_of(notebooks[stage]) for stage in STAGES}
    given = stamps[IFEVAL_EVAL]["parameters"]
    config = load_config(given["CONFIG"], given["OVERLAY"], given["SET"])
    manifests = {stage: artifacts.check(run / stage, config) for stage in STAGES}
    for stage, manifest in manifests.items():
        if any(manifest[key] != stamps[stage][key] for key in ("commit", "digest")):
            raise ValueError(f"{run / stage} was not written by its notebook; run it again.")
    measured = artifacts.read_json(run / IFEVAL_EVAL / "ifeval.json")
    record = {
        "label": config.label,
        "parameters": given,
        **measured["origin"],
        "stages": {s: {key: m[key] for key in MADE_ON} for s, m in manifests.items()},
        "data": artifacts.read_json(run / "01_data_prep" / "card.json"),
        "training": artifacts.read_json(run / "03_sft_train" / "summary.json"),
        "comparisons": [without_keys(row) for row in measured["comparisons"]],
        "parts": [without_keys(row) for row in measured.get("parts", [])],
        "sensitivity": measured.get("sensitivity", {}),  # none in runs of earlier versions
        "benchmarks": measured.get("benchmarks", {}),
    }
    rows_of_audit = (run / TEMPLATE_AUDIT / audit.AUDIT_ROWS).read_text("utf-8").split("\n")
    return {
        "run.json": as_json(record),
        "config.yaml": yaml.safe_dump(config.as_dict(), sort_keys=False, allow_unicode=True),
        "sft_template_audit.jsonl": "\n".join([*rows_of_audit[:-1][:HEAD_ROWS], ""]),
        "sft_template_audit_summary.json": as_json(audit.read_summary(run / TEMPLATE_AUDIT)),
        **({REPORT: (run / REPORT).read_text("utf-8")} if (run / REPORT).is_file() else {}),
    }, [row | measured["origin"] for row in measured["metrics"]]


def without_keys(compared: dict) -> dict:
    """A comparison without its lists of prompts and types, which the notebook shows."""
    return {key: value for key, value in compared.items() if key not in ("won", "lost", "by_type")}


def text_of(notebook: nbformat.NotebookNode, run: Path) -> str:
    """The notebook as it goes to results/, without the paths of this machine."""
    text = nbformat.writes(notebook) + "\n"
    return text.replace(str(run), f"runs/{run.name}").replace(f"{ROOT}/", "")


def tags(cell: dict) -> list[str]:
    return cell["metadata"].get("tags", [])


def is_known(commit: str) -> bool:
    """Whether this checkout has the commit."""
    return bool(git("cat-file", "-t", f"{commit}^{{commit}}"))


def git(*args: str) -> str:
    """What git prints in this checkout; nothing if it fails."""
    command = ["git", "-C", str(ROOT), *args]
    return subprocess.run(command, capture_output=True, text=True).stdout


def as_json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def replace_results(results: Path, files: dict[str, str]) -> None:
    """Write `files` into a copy of `results` and put the copy in its place."""
    with tempfile.TemporaryDirectory(dir=results.parent) as scratch:
        copy = Path(scratch) / "new"
        if results.is_dir():
            shutil.copytree(results, copy)
        for name, text in files.items():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_text(text, encoding="utf-8")
        if results.is_dir():
            results.rename(Path(scratch) / "old")
        copy.rename(results)


def readme_row(row: dict) -> str:
    """A row of metrics.json as README shows it."""
    low, high = row["ci95"]
    return (
        f"| {row['model']} | {row['format']} | {row['n']} | {row['prompt_level_strict_acc']:.3f} "
        f"| {low:.3f} to {high:.3f} | {row['eos_rate']:.2f} |"
    )


if __name__ == "__main__":
    main()
