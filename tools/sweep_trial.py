"""One trial of a sweep: the notebooks in a process of their own, one run per seed."""

import contextlib
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock
import yaml

from atlas_lib import artifacts, bootstrap
from atlas_lib.config import load_config
from atlas_lib.evaluate import grid
from atlas_lib.stages import STAGES, earlier
from atlas_lib.sweep import definition
from atlas_lib.sweep.definition import Sweep

# The module that runs the stages; the tests set one that needs no model.
RUNNER = os.environ.get("ATLAS_SWEEP_RUNNER", "tools.run")
MOST_POINTS = 200  # of a loss curve in the storage
WORK_TAGS = {"train", "generate", "sample-responses"}  # of cells; all others are overhead


class RunKilledError(Exception):
    """The process of a run was killed; the same run resumes where it was."""


@dataclass(frozen=True)
class Place:
    """Where runs happen: the sweep's folder, and a device by its environment and its lock."""

    sweep: Sweep
    home: Path
    environment: dict[str, str] = field(default_factory=dict)
    device_lock: Path | None = None

    def folder(self, point: int, seed: int) -> Path:
        """OUT of one run."""
        return self.home / "trials" / f"{point:04d}" / f"seed-{seed}"


def run_seed(place: Place, point: int, params: dict, seed: int) -> dict[str, Any]:
    """Run what is missing of the stages for one seed; its results. Raises RuntimeError."""
    sweep, out, begun = place.sweep, place.folder(point, seed), time.monotonic()
    overrides = definition.trial_overrides(sweep, params, seed)
    if shared_stages(sweep):
        copy_once(build_shared(place, overrides), out)
    name = {"WANDB_NAME": f"{place.home.name} {point} seed {seed}"}
    run_stages(place, sorted({*shared_stages(sweep), *sweep.stages}), overrides, out, name)
    return collect_results(sweep, out, time.monotonic() - begun)


def evaluate_winner(place: Place, point: int, params: dict, seed: int) -> list[dict]:
    """The winner's metrics on the test prompts; retrained here if its adapter is elsewhere."""
    trained, out = place.folder(point, seed), place.home / "winner" / f"{point:04d}"
    if trained.is_dir():
        copy_once(trained, out)
    run_stages(place, list(STAGES), definition.winner_overrides(place.sweep, params, seed), out, {})
    return artifacts.read_json(out / "metrics.json")


def copy_once(source: Path, out: Path, *ignored: str) -> None:
    """Let OUT begin as a copy of another run, whose stages are reused where they still fit.

    Files and folders with a name that matches a pattern of `ignored` are left out.
    """
    if not out.exists():
        part = out.with_name(f"{out.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(source, part, ignore=shutil.ignore_patterns(*ignored))
        part.rename(out)


# --- stages that trials share ---------------------------------------------------------------------


def shared_stages(sweep: Sweep) -> list[str]:
    """The stages before the first one of a trial."""
    return earlier(min(sweep.stages))


def build_shared(place: Place, overrides: dict) -> Path:
    """A folder with the shared stages and the base model's responses, built by the first caller."""
    sweep = place.sweep
    config = load_config(sweep.config, sweep.overlay, overrides)
    out = place.home / "shared" / shared_digest(sweep, config)
    out.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(out / "build.lock"):
        if not (out / "ready").is_file():
            run_stages(place, shared_stages(sweep), overrides, out, {})
            if "04_ifeval_eval" in sweep.stages:
                run_module(place, grid.command(config, "", out, ["base"])[2:], out, {})
            (out / "ready").touch()
    return out


def shared_digest(sweep: Sweep, config: Any) -> str:
    """12 hex digits of all that determines the shared stages and the base model's responses."""
    evaluated = artifacts.made_from("04_ifeval_eval", config).items()
    decided_by = {k: v for k, v in evaluated if k.startswith(("model.", "eval.", "content of"))}
    return artifacts.digest(artifacts.made_from(shared_stages(sweep)[-1], config) | decided_by)


# --- processes ------------------------------------------------------------------------------------


def run_stages(
    place: Place, stages: list[str], overrides: dict, out: Path, environment: dict[str, str]
) -> None:
    """Run stages of the sweep's configuration in OUT. Raises RuntimeError with the run's error."""
    sweep = place.sweep
    command = [RUNNER, *stages, "--out", str(out), "--config", sweep.config]
    command += ["--overlay", sweep.overlay]
    for key, value in overrides.items():
        text = yaml.safe_dump([value], default_flow_style=True, width=float("inf"))
        command += ["--set", f"{key}={text.strip()[1:-1]}"]
    run_module(place, command, out, environment)


def run_module(place: Place, command: list[str], out: Path, environment: dict[str, str]) -> None:
    """Run a module with arguments. Raises RuntimeError with its error, or RunKilledError."""
    locks = [str(path) for path in (out / "run.lock", place.device_lock) if path]
    given = [sys.executable, "-m", "tools.sweep_trial", json.dumps(locks), str(out), *command]
    out.mkdir(parents=True, exist_ok=True)
    with (out / "log.txt").open("ab") as log:
        process = subprocess.Popen(
            given,
            cwd=bootstrap.ROOT,
            env=os.environ | place.environment | environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            status = process.wait()
        finally:
            if process.poll() is None:  # the worker is stopped: the run saves what it has
                process.terminate()
                process.wait()
    ending = artifacts.read_json(out / "ending.json")
    if status == -signal.SIGKILL or ending["killed"]:
        raise RunKilledError(f"its process was killed; see {out / 'log.txt'}")
    if status:
        raise RuntimeError(ending["error"] or f"it ended with status {status}; see {log.name}")


def main() -> None:
    """The process of one run: it keeps its locks until it exits, even if its worker dies first.

    So the next worker's run waits for it, and two never write into one folder or share a device.
    """
    locks, out, module, *sys.argv[1:] = sys.argv[1:]
    path, ending = Path(out) / "ending.json", {"error": None, "killed": False}
    with contextlib.ExitStack() as stack:
        for lock in json.loads(locks):
            stack.enter_context(filelock.FileLock(lock))
        artifacts.write_json(path, ending)
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            if isinstance(end.code, str):
                ending["error"] = end.code.removeprefix("error: ")
            artifacts.write_json(path, ending | {"killed": kernel_died(end)})
            raise


def kernel_died(error: BaseException | None) -> bool:
    """Whether the process of a notebook was killed, by the chain of exceptions."""
    from nbclient.exceptions import DeadKernelError

    while error and not isinstance(error, DeadKernelError):
        error = error.__context__
    return error is not None


# --- results --------------------------------------------------------------------------------------


def collect_results(sweep: Sweep, out: Path, seconds: float) -> dict[str, Any]:
    """The results of a run for the storage. Raises RuntimeError if some are missing."""
    try:
        parts = time_by_part(sweep, out)
        found: dict[str, Any] = {"seconds": seconds, "parts": parts}
        if "03_sft_train" in {*shared_stages(sweep), *sweep.stages}:
            found |= training_results(out / "03_sft_train")
        if "04_ifeval_eval" in sweep.stages:
            found |= evaluation_results(out / "04_ifeval_eval")
    except (OSError, ValueError, KeyError, StopIteration) as error:
        raise RuntimeError(f"its results are missing ({type(error).__name__}: {error})") from None
    return found


def training_results(stage: Path) -> dict[str, Any]:
    summary = artifacts.read_json(stage / "summary.json")
    log = artifacts.read_jsonl(stage / "train_log.jsonl")
    curve = [[entry["step"], entry["loss"]] for entry in log if "loss" in entry]
    thinned = curve[:: -(-len(curve) // MOST_POINTS) or 1]
    return {"validation_loss": summary["validation_loss"], "curve": thinned}


def evaluation_results(stage: Path) -> dict[str, Any]:
    results = artifacts.read_json(stage / "ifeval.json")
    rows = {row["model"]: row for row in results["metrics"] if row["format"] == "chat"}
    verdicts = artifacts.read_jsonl(stage / "scores" / "SFT-chat.jsonl")
    return {
        "dev_strict": rows["SFT"]["prompt_level_strict_acc"],
        "dev_inst_strict": rows["SFT"]["inst_level_strict_acc"],
        "base_dev_strict": rows["base"]["prompt_level_strict_acc"],
        "verdicts": [[v["key"], int(v["prompt_strict"])] for v in verdicts],
        "commit": results["commit"],
        "hardware": results["hardware"],
    }


def time_by_part(sweep: Sweep, out: Path) -> dict[str, float]:
    """Seconds of each stage's tagged cells, and of its other cells; {} without notebooks."""
    parts: Counter[str] = Counter()
    for stage in sweep.stages:
        path = out / "notebooks" / f"{stage}.ipynb"
        notebook = artifacts.read_json(path) if path.is_file() else {"cells": []}
        for cell in notebook["cells"]:
            tag = next(iter(WORK_TAGS & {*cell["metadata"].get("tags", [])}), "other cells")
            parts[f"{stage}: {tag}"] += cell["metadata"]["papermill"]["duration"] or 0.0
    return dict(parts)


if __name__ == "__main__":
    main()
