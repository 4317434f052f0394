"""Parameter sweeps: many runs of the notebooks, tracked by Optuna; dev prompts choose the winner.

python -m tools.sweep run lr_rank_offline      # all of it; the same command resumes it
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

import optuna
from optuna.exceptions import StorageInternalError
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from atlas_lib import artifacts, bootstrap, notebooks
from atlas_lib.sweep import analysis, definition
from tools import sweep_study, sweep_trial, sweep_worker
from tools.sweep_study import POINT, OpenStudy

STARTS = 5  # of a worker: one that is killed is replaced, but not for ever
HOME = bootstrap.ROOT / "runs" / "sweeps"
STORAGE = "ATLAS_SWEEP_STORAGE"  # a URL may hold a password, which no process list should show
RESUME = "the same command resumes it."


def main() -> None:
    args = parse_arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: runs save what they have
    try:
        args.command(args)
    except KeyboardInterrupt:
        sys.exit(f"error: stopped; {RESUME}")
    except (StorageInternalError, SQLAlchemyError) as error:
        kind = type(error.__cause__ or error).__name__
        sys.exit(f"error: The storage does not answer any more ({kind}); {RESUME}")
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"error: {error}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, command, purpose in (
        ("run", run, "start or resume a sweep, evaluate the winner, write the report"),
        ("work", work, "be one worker of an existing study"),
        ("status", print_status, "print how far a study is"),
        ("report", write_sweep_report, "write the report of what is finished"),
    ):
        sub = commands.add_parser(name, help=purpose, allow_abbrev=False)
        sub.set_defaults(command=command)
        if command is run:
            sub.add_argument("sweep", metavar="SWEEP", help=", ".join(definition.sweep_names()))
            sub.add_argument("--workers", type=int, help="on this machine; default: one a GPU")
            sub.add_argument("--retry-failed", action="store_true", help="try failed points again")
        sub.add_argument("--study", required=command is not run, help="its name")
        sub.add_argument("--storage", default=os.environ.get(STORAGE, ""), metavar="URL")
        sub.add_argument("--home", type=Path, help="folder of its runs (runs/sweeps/STUDY)")
    return parser.parse_args()


def home_of(args: argparse.Namespace) -> Path:
    return (args.home or HOME / args.study).resolve()


def open_study(args: argparse.Namespace) -> OpenStudy:
    home = home_of(args)
    if not args.storage and not (home / "study.db").exists():
        raise ValueError(f"{home} has no study.db; start it with `run`, or give --storage.")
    return sweep_study.join(args.study, sweep_study.open_storage(args.storage, home), home)


def work(args: argparse.Namespace) -> None:
    sweep_worker.run_worker(open_study(args))


# --- run ------------------------------------------------------------------------------------------


def run(args: argparse.Namespace) -> None:
    sweep = definition.load_sweep(args.sweep)
    args.study = args.study or sweep.name
    if args.workers is not None and args.workers < 1:
        raise ValueError(f"--workers is {args.workers}; give 1 or more.")
    workers = args.workers or sweep.workers or max(1, len(sweep_worker.gpus()))
    storage = sweep_study.open_storage(args.storage, home_of(args))
    opened = sweep_study.create(args.study, sweep, storage, home_of(args))
    if args.retry_failed:
        print(f"{sweep_study.retry_failed(opened)} failed points are queued again")
    n, seeds = len(definition.planned(sweep)), len(sweep.seeds)
    print(f"{args.study}: {n} trials x {seeds} seeds, {workers} workers", flush=True)
    failed = supervise(args, workers)
    if failing := sweep_study.why_failing(opened):
        raise RuntimeError(f"{failing} (fix the cause, then run with --retry-failed)")
    if failed and not sweep_study.why_over(opened):
        raise RuntimeError(f"{failed} workers failed, their last lines say why; {RESUME}")
    if "04_ifeval_eval" in sweep.stages:
        evaluate_once(opened)
    write_sweep_report(args)


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
                    raise RuntimeError(f"Workers are killed again and again; {RESUME}")
                processes.append(subprocess.Popen(command, cwd=bootstrap.ROOT, env=environment))
            time.sleep(0.2)
            processes = [p for p in processes if (p.poll() or 0) >= 0]  # the killed ones leave
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()
    return sum(process.returncode != 0 for process in processes)


def evaluate_once(opened: OpenStudy) -> None:
    """Evaluate the winner on the test prompts; this is recorded before it happens."""
    study, seed = opened.study, opened.sweep.seeds[0]
    winner = sweep_study.winner(opened)
    evaluated = {"trial": winner.user_attrs[POINT], "seed": seed}
    sweep_study.record_test_evaluation(opened, evaluated)
    if study.user_attrs.get("final", {}).get("of") != evaluated:
        print(f"The winner is trial {evaluated['trial']}: test-set evaluation.", flush=True)
        place = sweep_trial.Place(opened.sweep, opened.home)
        metrics = sweep_trial.evaluate_winner(place, evaluated["trial"], winner.params, seed)
        study.set_user_attr("final", {"of": evaluated, "metrics": metrics})


# --- status and report ----------------------------------------------------------------------------


def print_status(args: argparse.Namespace) -> None:
    """Print the counts of trials by state, and each that is complete or failed."""
    exported = export(open_study(args))
    metric, rows = exported["sweep"]["objective"]["metric"], exported["trials"]
    states = [row["state"].lower() for row in rows]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    evaluations = len(exported["test_evaluations"])
    print(f"{args.study}: {counts or 'no trials yet'}; {evaluations} test-set evaluations")
    for row in analysis.ranked(exported):
        mean, low, high = analysis.spread(row, metric)
        value = f"{metric} {mean:.4f} ({low:.4f} to {high:.4f})"
        print(f"{row['number']:>4}  {value}  {analysis.label(row)}")
    for row in rows:
        if row["error"]:
            print(f"{row['number']:>4}  failed: {row['error']}")
    print(f"{exported['device_hours']:.2f} device hours")


def write_sweep_report(args: argparse.Namespace) -> None:
    """Export the study to a file and execute notebook 05 on it."""
    opened = open_study(args)
    sweep, home = opened.sweep, opened.home
    sweep_study.winner(opened)  # or there is nothing to report
    export(opened)
    parameters = {"CONFIG": sweep.config, "OVERLAY": sweep.overlay, "SET": sweep.set}
    path = notebooks.execute("05_sweep_report", home, parameters)
    print(f"report: {path}; the winning configuration: {home / 'winner.yaml'}")


def export(opened: OpenStudy) -> dict:
    """The study as one file, from which the report is made, whatever the storage."""
    trials, attrs = opened.study.get_trials(deepcopy=False), opened.study.user_attrs
    exported = {
        "study": opened.study.study_name,
        "sweep": opened.sweep.model_dump(mode="json"),
        "trials": [
            row_of(opened, trial, [t for t in trials if t.user_attrs[POINT] == point])
            for point, trial in sorted(sweep_study.counted(opened.study).items())
        ],
        "importance": importance(opened.study),
        "device_hours": sweep_study.device_seconds(trials) / 3600,
        "test_evaluations": attrs.get("test_evaluations", []),
        "final": attrs.get("final"),
    }
    artifacts.write_json(opened.home / "study.json", exported)
    return exported


def row_of(opened: OpenStudy, trial: FrozenTrial, same_point: list[FrozenTrial]) -> dict:
    """A point in the export: the trial that counts, and what all its trials have cost."""
    return {
        "number": trial.user_attrs[POINT],
        "state": trial.state.name,
        "value": trial.value,
        "point": definition.point(opened.sweep, trial.params),
        "varied": definition.varied(opened.sweep, trial.params),
        "runs": sweep_study.finished_runs(trial),
        "error": sweep_study.error_of(trial),
        "trials": len(same_point),
        "seconds": sweep_study.device_seconds(same_point),
    }


def importance(study: optuna.Study) -> dict[str, float]:
    """Each parameter's share in the decrease of variance in a random forest; {} if unknown.

    fANOVA would take a time exponential in the number of listed values.
    """
    values = [t.value for t in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))]
    if len(values) < 4 or len(set(values)) < 2:
        return {}
    evaluator = optuna.importance.MeanDecreaseImpurityImportanceEvaluator(seed=0)
    return optuna.importance.get_param_importances(study, evaluator=evaluator)


if __name__ == "__main__":
    main()
