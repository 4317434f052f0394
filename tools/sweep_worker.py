"""One worker of a sweep: it takes a GPU or a share of the cores, then trials until none is left."""

import contextlib
import functools
import math
import os
import statistics
import subprocess
import time
from pathlib import Path

import filelock
import platformdirs
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import Trial

from atlas_lib.sweep import definition
from tools import sweep_study, sweep_trial
from tools.sweep_study import OpenStudy
from tools.sweep_trial import Place

WORKERS = "ATLAS_SWEEP_WORKERS"  # how many share this machine
POLL = 2.0  # seconds


def run_worker(opened: OpenStudy) -> None:
    """Run trials until none is left, and take over what other workers were interrupted in."""
    with contextlib.ExitStack() as stack:
        place = take_device(stack, opened)
        while not (reason := sweep_study.why_over(opened)):
            if not sweep_study.run_next(opened, functools.partial(evaluate, opened, place)):
                time.sleep(POLL)
    print(f"worker {os.getpid()} ends: {reason}", flush=True)


def evaluate(opened: OpenStudy, place: Place, trial: Trial) -> float:
    """The objective of a trial: the mean over its seeds. Raises TrialError."""
    point, sweep = trial.user_attrs[sweep_study.POINT], opened.sweep
    values = ", ".join(f"{k}={v}" for k, v in definition.point(sweep, trial.params).items())
    print(f"trial {point}: {values}", flush=True)
    try:
        for seed in sweep.seeds:
            if str(seed) not in sweep_study.finished_runs(trial):
                found = sweep_trial.run_seed(place, point, trial.params, seed)
                trial.set_user_attr(f"{sweep_study.SEED}{seed}", found)
    except UpdateFinishedTrialError:  # taken over by another worker, which goes on with it
        return math.nan
    except (RuntimeError, ValueError, OSError) as error:
        print(f"trial {point} failed: {error}", flush=True)
        trial.set_user_attr(sweep_study.ERROR, str(error))
        raise sweep_study.TrialError(str(error)) from error
    except sweep_trial.RunKilledError as error:
        print(f"trial {point} is queued again: {error}", flush=True)
        raise sweep_study.TrialError(str(error)) from error
    runs = sweep_study.finished_runs(trial).values()
    value = statistics.mean(run[sweep.objective.metric] for run in runs)
    print(f"trial {point}: {sweep.objective.metric} {value:.4f}; {progress(opened)}", flush=True)
    return value


def progress(opened: OpenStudy) -> str:
    """How many trials have ended, this one included, and how long the rest may take."""
    trials = opened.study.get_trials(deepcopy=False)
    ended = 1 + sum(map(sweep_study.has_ended, sweep_study.counted(opened.study).values()))
    total = len(definition.planned(opened.sweep))
    workers = sum(trial.state.name == "RUNNING" for trial in trials)
    left = sweep_study.device_seconds(trials) / ended * (total - ended) / workers
    return f"{ended} of {total} trials have ended, about {left / 60:.0f} min left"


# --- devices --------------------------------------------------------------------------------------


def take_device(stack: contextlib.ExitStack, opened: OpenStudy) -> Place:
    """A GPU that no other sweep uses, or a share of the cores, kept until `stack` ends."""
    devices, waited = list_devices(opened), False
    while True:
        for path, environment in devices.items():
            with contextlib.suppress(filelock.Timeout):
                stack.enter_context(filelock.FileLock(path, blocking=False))
                group = {"WANDB_RUN_GROUP": opened.study.study_name}
                lock = path.with_suffix(".run")
                return Place(opened.sweep, opened.home, environment | group, lock)
        if not waited:
            print(f"worker {os.getpid()} waits for one of {len(devices)} devices", flush=True)
        waited = True
        time.sleep(POLL)


def list_devices(opened: OpenStudy) -> dict[Path, dict[str, str]]:
    """{lock file: environment}: of each GPU, or of as many shares of the cores as workers."""
    if names := gpus():
        cache = Path(platformdirs.user_cache_dir("atlas")) / "gpus"
        return {cache / f"{name}.lock": {"CUDA_VISIBLE_DEVICES": name} for name in names}
    workers = int(os.environ.get(WORKERS, opened.sweep.workers or 1))
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers))}
    return {opened.home / "slots" / f"{number}.lock": threads for number in range(workers)}


def gpus() -> list[str]:
    """The GPUs that this user may use, by UUID, which names their locks on this machine."""
    command = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    names = listed.stdout.split()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(names)).split(",")
    known = {str(number): name for number, name in enumerate(names)} | {n: n for n in names}
    return [known[gpu] for gpu in visible if gpu in known]
