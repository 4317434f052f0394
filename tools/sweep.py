"""Parameter sweeps: many runs of the notebooks, kept by Optuna, chosen on dev prompts.

python -m tools.sweep run lr_rank_offline      # all of it; again: goes on where it was
python -m tools.sweep work --study lr_rank --storage postgresql://host/atlas  # join from anywhere
python -m tools.sweep status --study lr_rank
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState
from sqlalchemy.exc import SQLAlchemyError

from atlas_lib import artifacts, bootstrap, notebooks
from atlas_lib.config import load_config
from atlas_lib.sweep import analysis, definition
from tools import sweep_storage, sweep_study, sweep_trial, sweep_worker

STARTS = 5  # of a worker: it is replaced when it is killed, but not for ever
HOME = bootstrap.ROOT / "runs" / "sweeps"
STORAGE = "ATLAS_SWEEP_STORAGE"  # a URL may hold a password, which no process list should show


def main() -> None:
    args = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("error: stopped; the same command goes on."))
    try:
        args.command(args)
    except KeyboardInterrupt:
        sys.exit("error: stopped; the same command goes on.")
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")
    except (StorageInternalError, SQLAlchemyError) as error:
        kind = type(error.__cause__ or error).__name__
        sys.exit(f"error: The storage does not answer any more ({kind}); the same command goes on.")


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
            sub.add_argument("sweep", metavar="SWEEP", help=", ".join(definition.available()))
            sub.add_argument("--workers", type=int, help="on this machine; default: one a GPU")
            sub.add_argument("--retry-failed", action="store_true", help="try failed points again")
        sub.add_argument("--study", required=command is not run, help="its name")
        sub.add_argument("--storage", default=os.environ.get(STORAGE, ""), metavar="URL")
        sub.add_argument("--home", type=Path, help="folder of its runs (runs/sweeps/STUDY)")
    return parser.parse_args()


def opened(args: argparse.Namespace) -> tuple[Any, definition.Sweep, Any, Path]:
    """(study, sweep, locks, folder) of a study that is there."""
    home = home_of(args)
    if not args.storage and not (home / "journal.log").is_file():
        raise ValueError(f"{home} has no journal.log; start it with `run`, or give --storage.")
    storage = sweep_storage.open_storage(args.storage, home)
    study, sweep = sweep_study.join(args.study, storage)
    if study.user_attrs["fingerprint"] != fingerprint(sweep):
        raise ValueError(
            f"This checkout resolves {sweep.config} differently than the study's; use the same."
        )
    return study, sweep, sweep_storage.locks(storage, study, home), home


def work(args: argparse.Namespace) -> None:
    sweep_worker.work(*opened(args))


def home_of(args: argparse.Namespace) -> Path:
    return (args.home or HOME / args.study).resolve()


def fingerprint(sweep: definition.Sweep) -> str:
    """What the sweep's configuration resolves to: the same on every machine that joins."""
    return load_config(sweep.config, sweep.overlay, sweep.set).digest()


# --- run ------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> None:
    sweep = definition.load(args.sweep)
    args.study = args.study or sweep.name
    if args.workers is not None and args.workers < 1:
        raise ValueError(f"--workers is {args.workers}; give 1 or more.")
    workers = args.workers or sweep.workers or max(1, len(sweep_worker.gpus()))
    storage = sweep_storage.open_storage(args.storage, home_of(args))
    study = sweep_study.create(args.study, sweep, storage, fingerprint(sweep))
    held = sweep_storage.locks(storage, study, home_of(args))
    if args.retry_failed:
        print(f"{sweep_study.retry_failed(study, held)} failed points are queued again")
    n, seeds = definition.n_trials(sweep), len(sweep.seeds)
    print(f"{args.study}: {n} trials x {seeds} seeds, {workers} workers", flush=True)
    failed = supervise(args, workers)
    trials = study.get_trials(deepcopy=False)
    if failures := sweep_study.too_many_failures(sweep, trials):
        raise RuntimeError(f"{failures} (mend it, then run with --retry-failed)")
    if failed and not sweep_study.why_nothing_to_ask(sweep, trials):
        raise RuntimeError(f"{failed} workers failed, their last lines say why; the sweep goes on.")
    if not any(t.state == TrialState.COMPLETE for t in trials):
        raise RuntimeError("No trial was completed; `status` lists their errors.")
    if "04_ifeval_eval" in sweep.stages:
        look_once(study, sweep, held, home_of(args))
    report(args)


def supervise(args: argparse.Namespace, workers: int) -> int:
    """Run the workers until all end; how many failed. One that is killed is replaced, in bounds."""
    command = [sys.executable, "-m", "tools.sweep", "work", "--study", args.study]
    command += ["--home", str(home_of(args))]
    environment = os.environ | {STORAGE: args.storage, sweep_worker.WORKERS: str(workers)}
    processes, starts = [], 0
    try:
        while len(processes) < workers or any(p.poll() is None for p in processes):
            while len(processes) < workers:
                if (starts := starts + 1) > STARTS * workers:
                    raise RuntimeError("Workers are killed again and again; the sweep is not over.")
                processes.append(subprocess.Popen(command, cwd=bootstrap.ROOT, env=environment))
            time.sleep(0.2)
            processes = [p for p in processes if (p.poll() or 0) >= 0]  # the killed ones leave
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
    return sum(process.returncode != 0 for process in processes)


def look_once(study: Any, sweep: definition.Sweep, held: Any, home: Path) -> None:
    """The winner answers the test prompts; the look is on record before it happens."""
    winner = sweep_study.winner(study, sweep)
    looked = {"trial": winner.number, "seed": sweep.seeds[0]}
    sweep_study.record_look(study, held, looked)
    if study.user_attrs.get("final", {}).get("of") == looked:
        return
    print(f"The winner is trial {winner.number}: it answers the test prompts now.", flush=True)
    found = sweep_trial.look(sweep, winner.number, winner.params, looked["seed"], home, {})
    study.set_user_attr("final", {"of": looked, **found})


# --- status and report ----------------------------------------------------------------------------


def status(args: argparse.Namespace) -> None:
    study, sweep, _, home = opened(args)
    exported = export(study, sweep, home)
    print(analysis.as_text(exported))


def report(args: argparse.Namespace) -> None:
    """Export the study to a file and execute notebook 05 on it."""
    study, sweep, _, home = opened(args)
    export(study, sweep, home)
    parameters = {"CONFIG": sweep.config, "OVERLAY": sweep.overlay, "SET": sweep.set}
    page = notebooks.execute("05_sweep_report", home, parameters)
    print(f"report: {page}; the winning configuration: {home / 'winner.yaml'}")


def export(study: Any, sweep: definition.Sweep, home: Path) -> dict:
    """The study as one file, whatever the storage: what the report is made from."""
    trials = study.get_trials(deepcopy=False)
    again = sweep_study.retried(trials)
    rows = [
        {
            "number": t.number,
            "state": t.state.name,
            "value": t.value,
            "params": t.params,
            "point": definition.point(sweep, t.params),
            "varied": definition.varied(sweep, t.params),
            "runs": sweep_study.runs(t),
            "error": t.user_attrs.get("error"),
            "failed_seconds": t.user_attrs.get(sweep_study.FAILED_SECONDS, 0.0),
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
