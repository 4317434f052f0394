"""Parameter sweeps: many runs of the notebooks, kept by Optuna, chosen on dev prompts.

python -m tools.sweep run lr_rank_offline            # all of it; again: goes on where it was
python -m tools.sweep work --study lr_rank --storage postgresql://host/atlas     # join from anywhere
python -m tools.sweep status --study lr_rank
"""

import argparse
import contextlib
import datetime
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import platformdirs
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import TrialState

from atlas_lib import artifacts, notebooks, runtime, sweep_report
from atlas_lib import config as configuration
from atlas_lib import sweep as sweeps
from tools import sweep_study, sweep_trial

HOME = runtime.ROOT / "runs" / "sweeps"
STORAGE = "ATLAS_SWEEP_STORAGE"  # a URL may hold a password, which no process list should show
WORKERS = "ATLAS_SWEEP_WORKERS"  # how many share this machine
POLL = 2.0  # seconds between looks at what others do


def main() -> None:
    args = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: stopped; the same command goes on."))
    try:
        args.command(args)
    except KeyboardInterrupt:
        sys.exit("error: stopped; the same command goes on.")
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command, says in (
        (run, "start or continue a sweep, look once at the test prompts, write the report"),
        (work, "be one worker of a study that is there"),
        (status, "print how far it is"),
        (report, "write the report of what is there"),
    ):
        sub = commands.add_parser(command.__name__, help=says, allow_abbrev=False)
        sub.set_defaults(command=command)
        if command is run:
            sub.add_argument("sweep", metavar="SWEEP", help=", ".join(sweeps.available()))
            sub.add_argument("--workers", type=int, help="on this machine; default: one a GPU")
            sub.add_argument("--retry-failed", action="store_true", help="try failed points again")
        sub.add_argument("--study", required=command is not run, help="its name")
        sub.add_argument("--storage", default=os.environ.get(STORAGE, ""), metavar="URL")
        sub.add_argument("--home", type=Path, help="folder of its runs (runs/sweeps/STUDY)")
    return parser.parse_args()


def opened(args: argparse.Namespace) -> tuple[Any, sweeps.Sweep, Any, Path]:
    """(study, sweep, locks, folder) of a study that is there."""
    home = home_of(args)
    if not args.storage and not (home / "journal.log").is_file():
        raise ValueError(f"{home} has no journal.log; start it with `run`, or give --storage.")
    storage = sweep_study.open_storage(args.storage, home)
    study, sweep = sweep_study.join(args.study, storage)
    if study.user_attrs["fingerprint"] != fingerprint(sweep):
        raise ValueError(
            f"This checkout resolves {sweep.config} differently than the study's; use the same."
        )
    return study, sweep, sweep_study.locks(storage, study, home), home


def home_of(args: argparse.Namespace) -> Path:
    return (args.home or HOME / args.study).resolve()


def fingerprint(sweep: sweeps.Sweep) -> str:
    """What the sweep's configuration resolves to: the same on every machine that joins."""
    return configuration.load(sweep.config, sweep.overlay, sweep.set).digest()


# --- run ------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> None:
    sweep = sweeps.load(args.sweep)
    args.study = args.study or sweep.name
    workers = args.workers or sweep.workers or max(1, len(gpus()))
    if workers < 1:
        raise ValueError(f"--workers is {workers}; give 1 or more.")
    storage = sweep_study.open_storage(args.storage, home_of(args))
    study = sweep_study.create(args.study, sweep, storage, fingerprint(sweep))
    held = sweep_study.locks(storage, study, home_of(args))
    if args.retry_failed:
        print(f"{sweep_study.retry_failed(study, held)} failed points are queued again")
    print(
        f"{args.study}: {sweeps.n_trials(sweep)} trials x {len(sweep.seeds)} seeds, {workers} workers"
    )
    supervise(args, workers)
    trials = study.get_trials(deepcopy=False)
    if any(t.state == TrialState.COMPLETE for t in trials):
        if "04_ifeval_eval" in sweep.stages:
            look_once(study, sweep, held, home_of(args))
        report(args)
    why = sweep_study.why_nothing_to_ask(sweep, trials)
    if why and why.endswith(tuple(t.user_attrs.get("error", "\0") for t in trials)):
        raise RuntimeError(f"{why} (mend it, then run with --retry-failed)")


def supervise(args: argparse.Namespace, workers: int) -> None:
    """Run the workers until all end by themselves; one that is killed is replaced, up to a bound."""
    command = [sys.executable, "-m", "tools.sweep", "work", "--study", args.study]
    command += ["--home", str(home_of(args))]
    environment = os.environ | {STORAGE: args.storage, WORKERS: str(workers)}
    processes, spare = [], 3 * workers
    try:
        while len(processes) < workers or any(p.poll() is None for p in processes):
            killed = [p for p in processes if (p.poll() or 0) < 0]
            processes = [p for p in processes if p not in killed]
            spare -= len(killed)
            while len(processes) < workers and spare >= 0:
                processes.append(subprocess.Popen(command, cwd=runtime.ROOT, env=environment))
            if spare < 0:
                raise RuntimeError("Workers are killed again and again; the same command goes on.")
            time.sleep(0.2)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
    if failed := [p for p in processes if p.returncode]:
        raise RuntimeError(f"{len(failed)} workers failed; their last lines say why.")


def look_once(study: Any, sweep: sweeps.Sweep, held: Any, home: Path) -> None:
    """The winner answers the test prompts; the look is on record before it happens.

    A look that was interrupted goes on and counts once; another winner would be another look.
    """
    winner = study.best_trial
    looked = {"trial": winner.number, "seed": sweep.seeds[0]}
    with held(sweep_study.ASK, wait=True):
        looks = study.user_attrs.get("looks", [])
        if not any(looked.items() <= look.items() for look in looks):
            at = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            study.set_user_attr("looks", [*looks, looked | {"at": at}])
    if study.user_attrs.get("final", {}).get("of") == looked:
        return
    print(f"The winner is trial {winner.number}: it answers the test prompts now.", flush=True)
    found = sweep_trial.look(sweep, winner.number, winner.params, looked["seed"], home, {})
    study.set_user_attr("final", {"of": looked, **found})


# --- work -----------------------------------------------------------------------------------------


def work(args: argparse.Namespace) -> None:
    """Claim and run trials until there is nothing left, waiting while others are at work."""
    study, sweep, held, home = opened(args)
    with contextlib.ExitStack() as stack:
        slot, environment = take_slot(stack, sweep, home)
        environment |= {"WANDB_RUN_GROUP": args.study}
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
    params, runs = trial.params, []
    point = ", ".join(f"{k}={v}" for k, v in sweeps.point(sweep, params).items())
    print(f"trial {trial.number}: {point}", flush=True)
    try:
        for seed in sweep.seeds:
            done = sweep_trial.measure(
                sweep, trial.number, params, seed, home, environment, locks
            ) | {"ask_seconds": asked if not runs else 0.0}
            trial.set_user_attr(f"seed {seed}", done)
            runs.append(done)
        value = sweep_trial.objective(sweep, runs)
        counted = sweep_study.complete(study, trial, value)
    except UpdateFinishedTrialError:
        counted = False
    except (SystemExit, KeyboardInterrupt):
        sweep_study.stopped(trial)
        raise
    except (RuntimeError, ValueError, OSError) as error:
        print(f"trial {trial.number} failed: {error}", flush=True)
        with contextlib.suppress(UpdateFinishedTrialError):
            sweep_study.fail(study, trial._trial_id, str(error))
        return
    if not counted:
        print(f"trial {trial.number} was ended by another worker: not counted again", flush=True)
        return
    print(f"trial {trial.number}: {sweep.objective.metric} {value:.4f}; {progress(study, sweep)}")
    sys.stdout.flush()


def progress(study: Any, sweep: sweeps.Sweep) -> str:
    """How many trials ended, and how long the rest may take at the pace so far."""
    trials = study.get_trials(deepcopy=False)
    ended = [t for t in trials if t.state.is_finished()]
    total = sweeps.n_trials(sweep) + len(sweep_study.retried(trials))
    elapsed = max(t.datetime_complete for t in ended) - min(t.datetime_start for t in ended)
    left = elapsed.total_seconds() / len(ended) * (total - len(ended))
    return f"{len(ended)} of {total} ended, about {left / 60:.0f} min left"


def gpus() -> list[str]:
    """The GPUs that this user may use, by name: a process that has one does not count the others."""
    command = ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    names = listed.stdout.split()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(names)).split(",")
    known = {str(number): name for number, name in enumerate(names)} | {n: n for n in names}
    return [known[gpu] for gpu in visible if gpu in known]


def take_slot(
    stack: contextlib.ExitStack, sweep: sweeps.Sweep, home: Path
) -> tuple[Any, dict[str, str]]:
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
            if file := attempt.enter_context(sweep_study.file_lock(path, wait=False)):
                stack.enter_context(attempt)
                return file, environment
            attempt.close()
        if not told:
            print(
                f"worker {os.getpid()} waits for a free place among {len(slots or own)}", flush=True
            )
        told = True
        time.sleep(POLL)


# --- status and report ----------------------------------------------------------------------------


def status(args: argparse.Namespace) -> None:
    study, sweep, _, home = opened(args)
    exported = export(study, sweep, home)
    print(sweep_report.as_text(exported))


def report(args: argparse.Namespace) -> None:
    """Export the study to a file and execute notebook 05 on it."""
    study, sweep, _, home = opened(args)
    export(study, sweep, home)
    parameters = {"CONFIG": sweep.config, "OVERLAY": sweep.overlay, "SET": sweep.set}
    page = notebooks.execute("05_sweep_report", home, parameters)
    print(f"report: {page}; the winning configuration: {home / 'winner.yaml'}")


def export(study: Any, sweep: sweeps.Sweep, home: Path) -> dict:
    """The study as one file, whatever the storage: what the report is made from."""
    trials = study.get_trials(deepcopy=False)
    again = sweep_study.retried(trials)
    rows = [
        {
            "number": t.number,
            "state": t.state.name,
            "value": t.value,
            "params": t.params,
            "point": sweeps.point(sweep, t.params) if t.params.keys() >= sweep.space.keys() else {},
            "runs": {
                s: t.user_attrs[f"seed {s}"] for s in sweep.seeds if f"seed {s}" in t.user_attrs
            },
            "error": t.user_attrs.get("error"),
            "deaths": t.user_attrs.get("deaths", 0),
            "retried": t.number in again,
        }
        for t in trials
    ]
    attrs = study.user_attrs
    exported = {"study": study.study_name, "sweep": sweep.model_dump(mode="json"), "trials": rows}
    exported |= {"looks": attrs.get("looks", []), "final": attrs.get("final")}
    shared = sorted((home / "shared").glob("*/spent.json"))
    exported["shared_seconds"] = sum(sweep_trial.read_spent(path) for path in shared)
    artifacts.write_json(home / "study.json", exported)
    return exported


if __name__ == "__main__":
    main()
