"""A runner for sweeps that takes the arguments of tools.run and needs no model.

It writes what 03 would: a validation loss that the overrides decide. `label` may tell it to sleep
so many seconds, to fail for some ranks, or to kill its notebook's process once for some ranks.
Each start, each end and each overlap with another run in the same folder is a line of a file.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

import nbformat
import psutil

from atlas_lib import artifacts, notebooks
from atlas_lib.config import parse_assignments


def loss(rate: float, rank: int, seed: int) -> float:
    return rate * 1000 + rank / 100 + seed / 1e6


def events(out: Path) -> Path:
    return (
        out / f"{out.name}.events"
    )  # another name than in the folder that this one was copied from


def log_event(out: Path, event: str) -> None:
    with events(out).open("a") as file:
        file.write(f"{event}\n")


def log_start(out: Path) -> None:
    other = out / "pid"
    overlaps = other.is_file() and is_alive(int(other.read_text() or -1))
    log_event(out, "overlapped" if overlaps else "started")
    other.write_text(str(os.getpid()))


def log_end(out: Path) -> None:
    (out / "pid").unlink(missing_ok=True)
    log_event(out, "ended")


def is_alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def kill_notebook(out: Path) -> None:
    """Execute a notebook that kills its own process, as happens when the memory is full."""
    notebooks.NOTEBOOKS = out
    cell = nbformat.v4.new_code_cell("import os; os.kill(os.getpid(), 9)")
    kernel = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata=kernel)
    nbformat.write(notebook, out / "deadly.ipynb")
    try:
        notebooks.execute("deadly", out, {})
    except RuntimeError as error:
        sys.exit(f"error: {error}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("stages", nargs="+")
    for name in ("--config", "--overlay", "--out"):
        parser.add_argument(name)
    parser.add_argument("--set", action="append", default=[])
    args = parser.parse_args()
    values, out = parse_assignments(args.set), Path(args.out)
    first = not events(out).is_file()
    log_start(out)
    given = {name: os.environ.get(name) for name in ("WANDB_RUN_GROUP", "WANDB_NAME")}
    artifacts.write_json(out / "environment.json", given)
    does = json.loads(values["label"]) if "label" in values else {}
    time.sleep(does.get("sleep", 0))
    if "03_sft_train" in args.stages and values["lora.r"] in does.get("fails", []):
        sys.exit(f"error: rank {values['lora.r']} was told to fail")
    if "03_sft_train" in args.stages and first and values["lora.r"] in does.get("dies", []):
        kill_notebook(out)
    value = loss(float(values["train.learning_rate"]), values["lora.r"], values["train.seed"])
    stage = out / "03_sft_train"
    artifacts.write_json(stage / "summary.json", {"validation_loss": value})
    artifacts.write_jsonl(stage / "train_log.jsonl", [{"step": 1, "loss": 2 * value}])
    log_end(out)


if __name__ == "__main__":
    main()
