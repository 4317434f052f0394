"""Sweeps under load: trivial trials while workers are killed, and what asking for one costs.

    python -m benchmarks.sweep [--trials 100] [--kills 20] [--json results/bench_sweep.json]

The journal file and a PostgreSQL server that is started for it, where one is installed.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from optuna.trial import TrialState

from atlas_lib import artifacts, bootstrap, session
from tools import sweep_study

sys.path.append(str(bootstrap.ROOT / "tests" / "helpers"))
import postgres
import sweep_studies


def under_fire(home: Path, url: str, trials: int, kills: int) -> dict:
    """Trials by four workers, of which one is killed again and again; what became of them."""
    rates = [n * 1e-5 for n in range(1, trials // 2 + 1)]
    space = {"train.learning_rate": rates, "lora.r": [4, 8]}
    options = {"space": space, "seeds": [1], "set": {"label": '{"sleep": 0.2}'}}
    study, begun = sweep_studies.Study(home, url, "under-fire", **options), time.monotonic()
    sweep_studies.kill_at_random(study, workers=4, kills=kills, seed=0)
    found = study.trials()
    complete = [t for t in found if t.state == TrialState.COMPLETE]
    return {
        "trials": trials,
        "kills": kills,
        "complete": len(complete),
        "different_points": len({json.dumps(t.params, sort_keys=True) for t in complete}),
        "records": len(found),
        "taken_over": sum("deaths" in t.user_attrs for t in found),
        "runner_starts": sum(sweep_studies.starts(study).values()),
        "seconds": round(time.monotonic() - begun, 1),
    }


def asking(home: Path, url: str, sampler: str, marks: tuple[int, ...]) -> dict:
    """Median milliseconds of a claim among the 20 before so many trials, recording left out."""
    ten = range(1, 11)
    rates = [n * 1e-5 for n in ten] if sampler == "grid" else {"log_uniform": [1e-5, 1e-4]}
    space = {"train.learning_rate": rates, "lora.r": [*ten], "train.warmup_steps": [*ten]}
    options = {"space": space, "budget": {"trials": max(marks)}}
    study = sweep_studies.Study(home, url, f"asking-{sampler}", sampler=sampler, **options)
    seconds = []
    for _ in range(max(marks)):
        begun = time.perf_counter()
        claimed = study.claim()
        seconds.append(time.perf_counter() - begun)
        with claimed.lease:
            sweep_study.complete(study.study, claimed.trial, 1.0)
    return {str(n): round(1000 * median(seconds[max(0, n - 20) : n]), 2) for n in marks}


@contextlib.contextmanager
def storages() -> Iterator[dict[str, str]]:
    """{name: URL}; the journal file has none."""
    if postgres.programs() is None:
        print("no PostgreSQL server is installed: the journal file only")
        yield {"journal": ""}
        return
    with postgres.server() as server:
        yield {"journal": "", "postgresql": server.url}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--asks", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    result: dict = {"under_fire": {}, "ask_milliseconds": {}}
    marks = (10, 100, args.asks)
    with storages() as urls, tempfile.TemporaryDirectory() as scratch:
        for name, url in urls.items():
            home = Path(scratch) / name
            result["under_fire"][name] = under_fire(home / "fire", url, args.trials, args.kills)
            print(name, result["under_fire"][name], flush=True)
            for sampler in ("grid", "tpe"):
                key = f"{name}, {sampler}"
                found = asking(home / sampler, url, sampler, marks)
                result["ask_milliseconds"][key] = found
                print(key, found, flush=True)
    result |= session.provenance()
    if args.json:
        artifacts.write_json(args.json, result)


if __name__ == "__main__":
    main()
