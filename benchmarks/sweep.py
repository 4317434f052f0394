"""Sweeps under load: trivial trials while processes are killed, and the cost of taking a trial.

    python -m benchmarks.sweep [--trials 100] [--kills 20] [--json results/bench_sweep.json]

On SQLite, and on a PostgreSQL server that is started for it, where one is installed.
"""

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from optuna.trial import TrialState

from atlas_lib import artifacts, bootstrap, session

sys.path.append(str(bootstrap.ROOT / "tests" / "helpers"))
import postgres
import sweep_studies


def kill(home: Path, url: str, trials: int, kills: int) -> dict:
    """A sweep by four workers, of which processes are killed again and again."""
    rates = [n * 1e-5 for n in range(1, trials // 2 + 1)]
    space = {"train.learning_rate": rates, "lora.r": [4, 8]}
    options = {"space": space, "seeds": [1], "set": {"label": '{"sleep": 0.2}'}}
    study, begun = sweep_studies.Study(home, url, "killed", **options), time.monotonic()
    killed = sweep_studies.kill_at_random(study, workers=4, kills=kills, seed=0)
    return {
        "trials": trials,
        "kills": dict(killed),
        "complete": len(study.trials(TrialState.COMPLETE)),
        "each_point_once_with_its_value": study.each_point_once(),
        "interrupted": len(study.trials(TrialState.FAIL)),
        "runs_started": study.count("started"),
        "runs_overlapping": study.count("overlapped"),
        "seconds": round(time.monotonic() - begun, 1),
    }


def take(home: Path, url: str, sampler: str, marks: tuple[int, ...]) -> dict:
    """Median milliseconds to take and end a trial, over the 20 before so many trials."""
    ten = range(1, 11)
    rates = [n * 1e-5 for n in ten] if sampler == "grid" else {"log_uniform": [1e-5, 1e-4]}
    space = {"train.learning_rate": rates, "lora.r": [*ten], "train.warmup_steps": [*ten]}
    options = {"space": space, "budget": {"trials": max(marks)}}
    study = sweep_studies.Study(home, url, f"take-{sampler}", sampler=sampler, **options)
    seconds = []
    for _ in range(max(marks)):
        begun = time.perf_counter()
        study.take()
        seconds.append(time.perf_counter() - begun)
    return {str(n): round(1000 * median(seconds[max(0, n - 20) : n]), 2) for n in marks}


@contextlib.contextmanager
def storages() -> Iterator[dict[str, str]]:
    """{name: URL}; SQLite has none."""
    if postgres.programs() is None:
        print("no PostgreSQL server is installed: SQLite only")
        yield {"sqlite": ""}
        return
    with postgres.server() as server:
        yield {"sqlite": "", "postgresql": server.url}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--takes", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    result: dict = {"killed": {}, "take_milliseconds": {}}
    marks = (10, 100, args.takes)
    with storages() as urls, tempfile.TemporaryDirectory() as scratch:
        for name, url in urls.items():
            home = Path(scratch) / name
            result["killed"][name] = kill(home / "killed", url, args.trials, args.kills)
            print(name, result["killed"][name], flush=True)
            for sampler in ("grid", "tpe"):
                key = f"{name}, {sampler}"
                found = take(home / sampler, url, sampler, marks)
                result["take_milliseconds"][key] = found
                print(key, found, flush=True)
    result |= session.provenance()
    if args.json:
        artifacts.write_json(args.json, result)


if __name__ == "__main__":
    main()
