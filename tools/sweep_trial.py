"""One trial of a sweep: the real notebooks in a process of their own, a run a seed."""

import contextlib
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from atlas_lib import artifacts, bootstrap
from atlas_lib.config import STAGES, load_config
from atlas_lib.sweep import definition
from atlas_lib.sweep.definition import Sweep
from tools import sweep_storage, sweep_study

ATTEMPTS = 3  # at a run whose process is killed: each goes on where the last one was
KILLED = "its process was killed"  # what tools.run says when a notebook's own process is gone
TICK = 5.0  # seconds: how exactly a killed run's time is known
MOST_POINTS = 200  # of a loss curve in the storage
# The cells of a page that train and ask the model, by a call in them; all the rest is overhead.
WORK = {
    "trainer.train(": "training",
    "trainer.model.disable_adapter(": "sample answers",
    "grid.ask_all(": "answers",
}


def folder(home: Path, number: int, seed: int) -> Path:
    """OUT of one run."""
    return home / "trials" / f"{number:04d}" / f"seed-{seed}"


def measure(
    sweep: Sweep, number: int, params: dict, seed: int, home: Path, environment: dict, locks: list
) -> dict[str, Any]:
    """Run the stages for one seed, or what is missing of them; its results for the storage.

    `locks` are open files that the processes inherit, so that a killed worker's run keeps them.
    Raises RuntimeError with the run's own error.
    """
    out = folder(home, number, seed)
    overrides = definition.overrides(sweep, params, seed)
    environment = environment | {"WANDB_NAME": f"{home.name} {number} seed {seed}"}
    out.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    shared = build_shared(sweep, overrides, home, environment, locks)
    borrow(shared, out)
    waited = time.monotonic() - begun
    execute(sweep, stages_until(sweep), overrides, out, environment, locks)
    return collect(sweep, out) | {"shared_seconds": waited}


def stages_until(sweep: Sweep) -> list[str]:
    """The trial's stages and those below them, which are usually there already."""
    return sorted({*earlier(sweep), *sweep.stages})


def earlier(sweep: Sweep) -> list[str]:
    """What all trials share: the stages before the first that a trial runs."""
    return [stage for stage in STAGES if stage < min(sweep.stages)]


def execute(
    sweep: Sweep, stages: list[str], overrides: dict, out: Path, environment: dict, locks: list
) -> None:
    """The sweep's runner on these stages. Raises RuntimeError."""
    command = [sys.executable, "-m", sweep.runner, *stages, "--out", str(out)]
    command += ["--config", sweep.config, "--overlay", sweep.overlay]
    for key, value in overrides.items():
        command += ["--set", f"{key}={_as_yaml(value)}"]
    _run_through(command, out, environment, locks)


def _as_yaml(value: Any) -> str:
    return yaml.safe_dump([value], default_flow_style=True, width=float("inf")).strip()[1:-1]


def _run_through(command: list[str], out: Path, environment: dict, locks: list) -> None:
    """Run it until it ends by itself. Raises RuntimeError with its own words."""
    for _ in range(ATTEMPTS):
        status, said = _run(command, out, environment, locks)
        if status == 0:
            return
        if status > 0 and KILLED not in said:
            break
    raise RuntimeError(said)


def _run(command: list[str], out: Path, environment: dict, locks: list) -> tuple[int, str]:
    """(exit status, its error in a sentence); the output goes to OUT/log.txt."""
    log = out / "log.txt"
    with log.open("ab") as file:
        start = file.tell()
        process = subprocess.Popen(
            command,
            cwd=bootstrap.ROOT,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            pass_fds=[lock.fileno() for lock in locks],
        )
        status = _wait(process, out / "spent.json")
    with log.open("rb") as file:
        file.seek(start)
        lines = file.read().decode(errors="replace").splitlines()
    said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return status, said[-1] if said else f"it ended with status {status}; see {log}"


def _wait(process: subprocess.Popen, spent: Path) -> int:
    """Its exit status; the seconds of all attempts are on disk every few seconds."""
    before, begun = read_spent(spent), time.monotonic()
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(timeout=TICK)
            artifacts.write_json(spent, {"seconds": before + time.monotonic() - begun})
    finally:  # stopped on purpose: the run saves what it has
        if process.poll() is None:
            process.terminate()
            process.wait()
        artifacts.write_json(spent, {"seconds": before + time.monotonic() - begun})


def read_spent(path: Path) -> float:
    return json.loads(path.read_bytes())["seconds"] if path.is_file() else 0.0


def unrecorded_seconds(sweep: Sweep, home: Path, trial: Any) -> float:
    """What the runs of a trial have cost that ended without a result."""
    done = sweep_study.runs(trial)
    lost = [seed for seed in sweep.seeds if str(seed) not in done]
    return sum(read_spent(folder(home, trial.number, seed) / "spent.json") for seed in lost)


def build_shared(
    sweep: Sweep, overrides: dict, home: Path, environment: dict, locks: list
) -> Path | None:
    """A folder with the stages and the base's answers that this run shares with others.

    Built by the first that needs it, while the others wait. None: there is nothing to share.
    """
    if not earlier(sweep):
        return None
    config = load_config(sweep.config, sweep.overlay, overrides)
    out = home / "shared" / _identity(sweep, config)
    with sweep_storage.file_lock(out.with_suffix(".lock")) as lock:
        if not (out / "ready").is_file():
            out.mkdir(parents=True, exist_ok=True)
            execute(sweep, earlier(sweep), overrides, out, environment, [*locks, lock])
            if "04_ifeval_eval" in sweep.stages:
                _ask_base(sweep, overrides, out, environment, [*locks, lock])
            (out / "ready").touch()
    return out


def _identity(sweep: Sweep, config: Any) -> str:
    """12 hex digits of all that decides the shared stages and the base's answers."""
    made_from = artifacts.relevant(earlier(sweep)[-1], config)
    evaluated = artifacts.relevant("04_ifeval_eval", config)
    made_from |= {
        k: v for k, v in evaluated.items() if k.startswith(("model.", "eval.", "content"))
    }
    return hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:12]


def _ask_base(sweep: Sweep, overrides: dict, out: Path, environment: dict, locks: list) -> None:
    parameters = {"CONFIG": sweep.config, "OVERLAY": sweep.overlay, "SET": overrides}
    command = [
        sys.executable,
        "-m",
        "atlas_lib.evaluate.grid",
        json.dumps(parameters),
        "",
        str(out),
        "base",
    ]
    _run_through(command, out, environment, locks)


def borrow(shared: Path | None, out: Path) -> None:
    """Put finished stages, their pages and answers of `shared` into `out`, where they are missing.

    Files of a stage are links: whoever writes them anew renames, and the original stays.
    """
    for source in sorted(shared.iterdir()) if shared else []:
        target, linked = out / source.name, source.name in STAGES
        if not source.is_dir() or (target.exists() and linked):
            continue
        part = out / f"{source.name}.part"
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(source, part, copy_function=_link if linked else shutil.copy2)
        if linked:
            part.rename(target)
            continue
        target.mkdir(exist_ok=True)
        for file in part.iterdir():
            if not (target / file.name).exists():
                file.rename(target / file.name)
        shutil.rmtree(part)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def collect(sweep: Sweep, out: Path) -> dict[str, Any]:
    """What a run left, small enough for the storage. Raises RuntimeError if some is missing."""
    try:
        found: dict[str, Any] = {"seconds": read_spent(out / "spent.json")}
        if "03_sft_train" in stages_until(sweep):
            found |= _trained(out / "03_sft_train")
        if "04_ifeval_eval" in sweep.stages:
            found |= _evaluated(out / "04_ifeval_eval")
        found["parts"] = parts(sweep, out, found["seconds"])
    except (OSError, ValueError, KeyError, StopIteration) as error:
        raise RuntimeError(f"its results are not there ({type(error).__name__}: {error})") from None
    return found


def _trained(stage: Path) -> dict[str, Any]:
    summary = json.loads((stage / "summary.json").read_bytes())
    log = stage / "train_log.jsonl"
    curve = [[e["step"], e["loss"]] for e in artifacts.read_jsonl(log) if "loss" in e]
    thinned = curve[:: -(-len(curve) // MOST_POINTS) or 1]
    return {"validation_loss": summary["validation_loss"], "curve": thinned}


def _evaluated(stage: Path) -> dict[str, Any]:
    results = json.loads((stage / "ifeval.json").read_bytes())
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


def parts(sweep: Sweep, out: Path, seconds: float) -> dict[str, float]:
    """Where a run's seconds went, by its executed pages; {} for a runner without pages."""
    found: dict[str, float] = {}
    for stage in sweep.stages:
        page = out / "notebooks" / f"{stage}.ipynb"
        if not page.is_file():
            continue
        page = json.loads(page.read_bytes())
        cells = [
            (c["metadata"]["papermill"]["duration"] or 0.0, c["source"]) for c in page["cells"]
        ]
        names = [next((WORK[w] for w in WORK if w in "".join(s)), "other cells") for _, s in cells]
        for name, (duration, _) in zip(names, cells, strict=True):
            found[f"{stage}: {name}"] = found.get(f"{stage}: {name}", 0.0) + duration
        inside = sum(duration for duration, _ in cells)
        found[f"{stage}: kernel"] = page["metadata"]["papermill"]["duration"] - inside
    if found:
        found["processes"] = max(0.0, seconds - sum(found.values()))
    return found


def objective(sweep: Sweep, runs: list[dict]) -> float:
    """The mean over the seeds."""
    return statistics.mean(run[sweep.objective.metric] for run in runs)


def look(
    sweep: Sweep, number: int, params: dict, seed: int, home: Path, environment: dict
) -> dict[str, Any]:
    """The winner on the test prompts: its own adapter if it is here, else trained again."""
    out = home / "winner"
    out.mkdir(parents=True, exist_ok=True)
    trained = folder(home, number, seed)
    for stage in (*earlier(sweep), "03_sft_train"):
        if (trained / stage / artifacts.MANIFEST).is_file():
            shutil.rmtree(out / stage, ignore_errors=True)
            shutil.copytree(trained / stage, out / stage, copy_function=_link)
            (out / "notebooks").mkdir(exist_ok=True)
            page = f"{stage}.ipynb"
            shutil.copy2(trained / "notebooks" / page, out / "notebooks" / page)
    overrides = definition.winning_overrides(sweep, params, seed)
    execute(sweep, list(STAGES), overrides, out, environment, [])
    return {"metrics": json.loads((out / "metrics.json").read_bytes())}
