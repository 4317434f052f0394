"""One worker of a sweep: it takes a GPU or a share of the cores, and trials until none is left."""

import contextlib
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import platformdirs
from optuna.exceptions import UpdateFinishedTrialError

from atlas_lib.sweep import definition
from atlas_lib.sweep.definition import Sweep
from tools import sweep_storage, sweep_study, sweep_trial

WORKERS = "ATLAS_SWEEP_WORKERS"  # how many share this machine
POLL = 2.0  # seconds between looks at what others do


def work(study: Any, sweep: Sweep, held: Any, home: Path) -> None:
    """Claim and run trials until there is nothing left, waiting while others are at work."""
    with contextlib.ExitStack() as stack:
        slot, environment = take_slot(stack, sweep, home)
        environment |= {"WANDB_RUN_GROUP": study.study_name}
        waiting = False
        while True:
            begun = time.monotonic()
            claimed = sweep_study.claim(study, sweep, held)
            if isinstance(claimed, str):
                print(f"worker {os.getpid()} ends: {claimed}", flush=True)
                return
            if claimed:
                asked = time.monotonic() - begun
                with claimed.lease:
                    locks = [slot, claimed.file]
                    one_trial(study, sweep, claimed.trial, home, environment, locks, asked)
            elif not waiting:
                print(f"worker {os.getpid()} waits: the last trials are running", flush=True)
            waiting = claimed is None
            time.sleep(POLL if waiting else 0)


def one_trial(study, sweep, trial, home, environment, locks, asked: float) -> None:
    """Run a trial's seeds and record them; its error, if it has one, stops nothing else."""
    point = ", ".join(f"{k}={v}" for k, v in definition.point(sweep, trial.params).items())
    print(f"trial {trial.number}: {point}", flush=True)
    try:
        runs = run_seeds(sweep, trial, home, environment, locks, asked)
        value = sweep_trial.objective(sweep, runs)
        counted = sweep_study.complete(study, trial, value)
    except UpdateFinishedTrialError:
        counted = False
    except (SystemExit, KeyboardInterrupt):
        sweep_study.stopped(trial)
        raise
    except (RuntimeError, ValueError, OSError) as error:
        print(f"trial {trial.number} failed: {error}", flush=True)
        seconds = sweep_trial.unrecorded_seconds(sweep, home, trial)
        with contextlib.suppress(UpdateFinishedTrialError):
            sweep_study.fail(study, trial._trial_id, str(error), seconds)
        return
    if not counted:
        print(f"trial {trial.number} was ended by another worker: not counted again", flush=True)
        return
    done = f"trial {trial.number}: {sweep.objective.metric} {value:.4f}"
    print(f"{done}; {progress(study, sweep)}", flush=True)


def run_seeds(sweep, trial, home, environment, locks, asked: float) -> list[dict]:
    """The results of all seeds; those that an earlier worker has recorded are kept."""
    runs = sweep_study.runs(trial)
    for seed in (seed for seed in sweep.seeds if str(seed) not in runs):
        found = sweep_trial.measure(
            sweep, trial.number, trial.params, seed, home, environment, locks
        )
        runs[str(seed)] = found | {"ask_seconds": asked if not runs else 0.0}
        trial.set_user_attr(f"{sweep_study.SEED}{seed}", runs[str(seed)])
    return list(runs.values())


def progress(study: Any, sweep: Sweep) -> str:
    """How many trials ended, and how long the rest may take at the pace so far."""
    trials = study.get_trials(deepcopy=False)
    ended = [t for t in trials if t.state.is_finished()]
    total = definition.n_trials(sweep) + len(sweep_study.retried(trials))
    elapsed = max(t.datetime_complete for t in ended) - min(t.datetime_start for t in ended)
    left = elapsed.total_seconds() / len(ended) * (total - len(ended))
    return f"{len(ended)} of {total} ended, about {left / 60:.0f} min left"


def gpus() -> list[str]:
    """The GPUs that this user may use, by name: with a number, 04 would spread over all of them."""
    command = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    names = listed.stdout.split()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(names)).split(",")
    known = {str(number): name for number, name in enumerate(names)} | {n: n for n in names}
    return [known[gpu] for gpu in visible if gpu in known]


def take_slot(stack: contextlib.ExitStack, sweep: Sweep, home: Path) -> tuple[Any, dict[str, str]]:
    """(held lock file, environment): a GPU of one's own, or a share of the cores. Waits for one."""
    workers, there = int(os.environ.get(WORKERS, sweep.workers or 1)), gpus()
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    cache = Path(platformdirs.user_cache_dir("atlas")) / "gpus"
    slots = {cache / f"{gpu}.lock": {"CUDA_VISIBLE_DEVICES": gpu} for gpu in there}
    own = {home / "slots" / f"{n}.lock": {"OMP_NUM_THREADS": threads} for n in range(workers)}
    told = False
    while True:
        for path, environment in (slots or own).items():
            attempt = contextlib.ExitStack()
            if file := attempt.enter_context(sweep_storage.file_lock(path, wait=False)):
                stack.enter_context(attempt)
                return file, environment
            attempt.close()
        if not told:
            print(
                f"worker {os.getpid()} waits for a free place among {len(slots or own)}", flush=True
            )
        told = True
        time.sleep(POLL)
