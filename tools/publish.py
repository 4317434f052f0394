"""Take the executed notebooks and figures of a finished run into results/, if they can be trusted.

python -m tools.publish runs/sft_qwen05b-offline
python -m tools.publish runs/seed1 --metrics-only    # another run's figures, for experiments/
"""

import argparse
import ast
import copy
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import yaml

from atlas_lib import artifacts, audit, bootstrap, notebooks
from atlas_lib.config import STAGES, load_config
from tools import leaks

RESULTS = bootstrap.ROOT / "results"
LARGEST = 1_000_000  # bytes of a file
HEAD_ROWS = 50
STAMP = re.compile(r"config digest (\w+) · commit (\S+) · (\w+) · results in (.+)")
KINDS = ("code", "markdown", "raw")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the run's OUT, e.g. runs/sft_qwen05b-offline")
    parser.add_argument("--metrics-only", action="store_true", help="append its metrics, no more")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    try:
        files, rows = collect(args.run, args.results, args.metrics_only)
        replace(args.results, files)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{args.results}: {', '.join(sorted(files))}\n")
    print("\n".join(map(table_line, rows)))


def collect(
    run: Path, results: Path, metrics_only: bool = False
) -> tuple[dict[str, str], list[dict]]:
    """What to write below results/, by name, and the rows of metrics. Raises ValueError.

    A run has the four stages, or, as a sweep's report does, a page and no metrics. Pages that are
    shown have to be those of HEAD; for metrics alone, those of the commit that measured them.
    """
    pages = {path.stem: path for path in sorted((run / "notebooks").glob("*.ipynb"))}
    missing = set(STAGES) - pages.keys()
    if not pages or (missing and missing != set(STAGES)):
        raise ValueError(f"{run} lacks notebooks/{min(missing)}.ipynb; run it first.")
    if metrics_only and missing:
        raise ValueError(f"{run} has no metrics; leave --metrics-only out.")
    at = None if metrics_only else "HEAD"
    checked = {stage: check_page(stage, path, at) for stage, path in pages.items()}
    files = {f"notebooks/{stage}.ipynb": text_of(page) for stage, page in checked.items()}
    rows: list[dict] = []
    if not missing:
        config = config_of(checked["04_ifeval_eval"])
        rows = metrics_of(run, config, checked["04_ifeval_eval"])
        files |= figures_of(run, config, checked, rows) | {
            "metrics.json": as_json(appended(results / "metrics.json", rows))
        }
    if metrics_only:
        files = {"metrics.json": files["metrics.json"]}
    for name, text in files.items():
        if len(text.encode()) > LARGEST:
            raise ValueError(f"{name} has {len(text.encode()):,} bytes; at most {LARGEST:,} go in.")
        leaks.refuse(name, text)
    return files, rows


def check_page(stage: str, path: Path, at: str | None = "HEAD") -> nbformat.NotebookNode:
    """The executed page if it ran whole and is the one committed `at`; None: at its own commit."""
    if path.stat().st_size > LARGEST:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes; at most {LARGEST:,} go in.")
    try:
        page = nbformat.read(path, as_version=4)
        nbformat.validate(page)
    except (ValueError, nbformat.ValidationError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is not a notebook ({reason}); run it again.") from None
    _, commit, platform, _ = stamp_of(page, path)
    if commit.endswith("-dirty") or not known(commit):
        raise ValueError(f"{path} ran at commit {commit}; commit everything and run it again.")
    committed = json.loads(git("show", f"{at or commit}:notebooks/{stage}.ipynb"))
    ran = as_committed(page, committed) if platform == "kaggle" else page
    if notebooks.sources(ran, KINDS) != notebooks.sources(committed, KINDS):
        raise ValueError(f"{path} is not the committed notebooks/{stage}.ipynb; run it again.")
    for problem in problems(page, platform):
        raise ValueError(f"{path}: {problem}.")
    return page


def problems(page: nbformat.NotebookNode, platform: str) -> list[str]:
    """What is wrong with the outputs of a page."""
    code = [cell for cell in page.cells if cell.cell_type == "code"]
    outputs = [output for cell in code for output in cell.outputs]
    counts = [cell.execution_count for cell in code]
    if platform == "kaggle" and "keep" in tags(code[-1]) and counts[-1] is None:
        counts[-1] = len(code)  # there this very cell copies the page, while it runs
    found = []
    if any(output.output_type == "error" for output in outputs):
        found.append("a cell ended in an error; mend it and run again")
    if counts != list(range(1, len(code) + 1)):
        found.append(f"the cells did not run once each, in order ({counts}); run it again")
    shown = [kind for output in outputs for kind in output.get("data", {})]
    if "widgets" in page.metadata or any("widget" in kind for kind in shown):
        found.append("a widget is left over, which no reader can show; print plain lines instead")
    for output in outputs:
        for kind in output.get("data", {}):
            if kind.startswith("image/") and not output.metadata.get(kind, {}).get("alt"):
                found.append("a figure has no alternative text; show it by atlas_lib.figures.show")
    return found


def stamp_of(page: nbformat.NotebookNode, path: Path) -> tuple[str, str, str, str]:
    """(config digest, commit, platform, OUT) as the page printed them. Raises ValueError."""
    printed = (output.get("text", "") for cell in page.cells for output in cell.get("outputs", []))
    for text in printed:
        if found := STAMP.search(text):
            return found.groups()
    raise ValueError(f"{path} does not say of which commit it is; run it again.")


def config_of(page: nbformat.NotebookNode) -> Any:
    """The resolved configuration; its digest is the printed one. Raises ValueError."""
    given = parameters_of(page)
    config = load_config(given["CONFIG"], given["OVERLAY"], given["SET"])
    there, commit, *_ = stamp_of(page, Path("the page"))
    if config.digest() != there:
        raise ValueError(
            f"configs/ has changed since commit {commit}: the digest is {config.digest()}, "
            f"the run's is {there}; run it again."
        )
    return config


def parameters_of(page: nbformat.NotebookNode) -> dict[str, Any]:
    """CONFIG, OVERLAY, OUT and SET as the parameter cells, injected or not, leave them."""
    values: dict[str, Any] = {}
    for cell in page.cells:
        if {"parameters", "injected-parameters"} & set(tags(cell)):
            assigned = [
                node for node in ast.parse(cell.source).body if isinstance(node, ast.Assign)
            ]
            values |= {node.targets[0].id: ast.literal_eval(node.value) for node in assigned}
    return values


def metrics_of(run: Path, config: Any, page: nbformat.NotebookNode) -> list[dict]:
    """metrics.json, if it is what the page of 04 measured. Raises ValueError."""
    artifacts.check(run / "04_ifeval_eval", config)
    measured = json.loads((run / "04_ifeval_eval" / "ifeval.json").read_bytes())
    origin = ("config_digest", "commit", "data", "hardware", "label")
    expected = [row | {key: measured[key] for key in origin} for row in measured["metrics"]]
    rows = json.loads((run / "metrics.json").read_bytes())
    if rows != expected or measured["commit"] != stamp_of(page, run)[1]:
        raise ValueError(f"{run}/metrics.json is not what its notebook 04 measured; run it again.")
    return rows


def figures_of(run: Path, config: Any, pages: dict, rows: list[dict]) -> dict[str, str]:
    """The run beside its metrics: configuration, machines, training, comparisons, audit."""
    manifests = {stage: artifacts.check(run / stage, config) for stage in STAGES}
    made_on = ("commit", "config_digest", "platform", "hardware", "versions")
    measured = json.loads((run / "04_ifeval_eval" / "ifeval.json").read_bytes())
    given = parameters_of(pages["04_ifeval_eval"])
    record = {
        "label": config.label,
        "parameters": {key: given[key] for key in ("CONFIG", "OVERLAY", "SET")},
        **{key: rows[0][key] for key in ("commit", "config_digest")},
        "stages": {s: {key: m[key] for key in made_on} for s, m in manifests.items()},
        "data": json.loads((run / "01_data_prep" / "card.json").read_bytes()),
        "training": json.loads((run / "03_sft_train" / "summary.json").read_bytes()),
        "comparisons": [
            {key: value for key, value in row.items() if key not in ("won", "lost", "by_type")}
            for row in measured["comparisons"]
        ],
        "sensitivity": measured["sensitivity"],
    }
    with (run / audit.STAGE / audit.ROWS).open(encoding="utf-8") as file:
        head = "".join(line for line, _ in zip(file, range(HEAD_ROWS), strict=False))
    return {
        "run.json": as_json(record),
        "config.yaml": yaml.safe_dump(config.as_dict(), sort_keys=False, allow_unicode=True),
        "sft_template_audit.jsonl": head,
        "sft_template_audit_summary.json": as_json(audit.read_summary(run / audit.STAGE)),
    }


def appended(path: Path, rows: list[dict]) -> list[dict]:
    """All rows that were ever published, then those of `rows` that are new."""
    before = json.loads(path.read_bytes()) if path.is_file() else []
    return before + [row for row in rows if row not in before]


def text_of(page: nbformat.NotebookNode) -> str:
    """The page as it goes to results/, without the machine's part of OUT and the checkout."""
    out = stamp_of(page, Path("the page"))[3].strip()
    text = nbformat.writes(without_payload(page)) + "\n"
    ran = page.metadata.get("papermill", {}).get("input_path") or ""
    if Path(out).is_absolute() and out != "/kaggle/working":
        text = text.replace(out, f"runs/{Path(out).name}")
    return text.replace(f"{Path(ran).parent.parent}/", "") if Path(ran).is_absolute() else text


def as_committed(page: nbformat.NotebookNode, committed: dict) -> nbformat.NotebookNode:
    """A copy of a page that was built for Kaggle, without what tools.kernels put into it."""
    given = {tag: c for c in committed["cells"] for tag in tags(c)}
    page = without_payload(page)
    for cell in page.cells:
        for tag in {"parameters", "bootstrap"} & set(tags(cell)):
            cell.source = "".join(given[tag]["source"])
    return page


def without_payload(page: nbformat.NotebookNode) -> nbformat.NotebookNode:
    page = copy.deepcopy(page)
    page.cells = [cell for cell in page.cells if "payload" not in tags(cell)]
    return page


def tags(cell: dict) -> list[str]:
    return cell["metadata"].get("tags", [])


def known(commit: str) -> bool:
    try:
        return bool(git("cat-file", "-t", f"{commit}^{{commit}}"))
    except ValueError:
        return False


def git(*args: str) -> str:
    """What git prints in this checkout. Raises ValueError with its complaint."""
    done = subprocess.run(["git", "-C", str(bootstrap.ROOT), *args], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"git {args[0]} says {done.stderr.strip().splitlines()[-1]!r}.")
    return done.stdout


def as_json(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def replace(results: Path, files: dict[str, str]) -> None:
    """Write `files` into a copy of `results` and put it in its place."""
    part, old = results.with_name("results.part"), results.with_name("results.old.part")
    for scratch in (part, old):
        shutil.rmtree(scratch, ignore_errors=True)
    if results.is_dir():
        shutil.copytree(results, part)
    for name, text in files.items():
        (part / name).parent.mkdir(parents=True, exist_ok=True)
        (part / name).write_text(text, encoding="utf-8")
    if results.is_dir():
        results.rename(old)
    part.rename(results)
    shutil.rmtree(old, ignore_errors=True)


def table_line(row: dict) -> str:
    """A row of metrics.json as README shows it."""
    low, high = row["ci95"]
    return (
        f"| {row['model']} | {row['format']} | {row['n']} | {row['prompt_level_strict_acc']:.3f} "
        f"| {low:.3f} to {high:.3f} | {row['stop_rate']:.2f} |"
    )


if __name__ == "__main__":
    main()
