"""Studies of trivial trials in real processes, for the tests and the benchmark of sweeps."""

import contextlib
import os
import random
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import yaml
from optuna.trial import TrialState
from trivial_run import loss

from atlas_lib.sweep import definition
from tools import sweep_study

ROOT = Path(__file__).resolve().parents[2]
# Heartbeats every second: a killed worker's trial is taken over after four.
ENVIRONMENT = {"ATLAS_SWEEP_RUNNER": "tests.helpers.trivial_run", "ATLAS_SWEEP_HEARTBEAT": "1"}
sweep_study.HEARTBEAT = int(ENVIRONMENT["ATLAS_SWEEP_HEARTBEAT"])
TRIVIAL = {
    "config": "sft_qwen05b",
    "overlay": "offline",
    "set": {},
    "space": {"train.learning_rate": [1e-3, 2e-3], "lora.r": [4, 8]},
    "sampler": "grid",
    "seeds": [1, 2],
    "objective": {"metric": "validation_loss", "direction": "minimize"},
    "stages": ["03_sft_train"],
    "prompts": "embedded:dev",
}


def command(*arguments, **environment) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "tools.sweep", *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | ENVIRONMENT | environment,
    )


def finished(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=120)
    return output


class Study:
    """A study as a process sees it that starts no workers."""

    def __init__(self, home: Path, url: str = "", name: str = "trivial", **changes):
        self.home, self.url, self.name, self.changes = home, url, name, changes
        self.sweep = definition.validate_sweep(TRIVIAL | {"name": name} | changes)
        storage = sweep_study.open_storage(url, home)
        self.opened = sweep_study.create(name, self.sweep, storage, home)
        self.study = self.opened.study

    def worker(self, **environment) -> subprocess.Popen:
        arguments = ("work", "--study", self.name, "--home", self.home)
        return command(*arguments, ATLAS_SWEEP_STORAGE=self.url, **environment)

    def run(self, *options) -> subprocess.Popen:
        """The whole command, which starts the workers and writes the report."""
        path = self.home.with_name(f"{self.name}.yaml")
        path.write_text(yaml.safe_dump(TRIVIAL | self.changes), "utf-8")
        arguments = ("run", path, "--home", self.home, *options)
        return command(*arguments, ATLAS_SWEEP_STORAGE=self.url)

    def trials(self, *states):
        return self.study.get_trials(deepcopy=False, states=states or None)

    def take(self, evaluate=lambda trial: 1.0) -> bool:
        """Take a trial in this process and give it a value without running anything."""
        return sweep_study.run_next(self.opened, evaluate)

    def each_point_once(self) -> bool:
        """Whether every point is complete once, with the value of an undisturbed sweep."""
        done, wanted = self.trials(TrialState.COMPLETE), definition.planned(self.sweep)
        found = [(sorted(trial.params.items()), trial.value) for trial in done]
        return sorted(found) == sorted((sorted(p.items()), self.value_of(p)) for p in wanted)

    def value_of(self, params: dict) -> float:
        given = self.sweep.set | params
        rate, rank, seeds = given["train.learning_rate"], given["lora.r"], self.sweep.seeds
        return statistics.mean(loss(rate, rank, seed) for seed in seeds)

    def events(self) -> dict[tuple[int, int], list[str]]:
        """{(point, seed): what happened in its folder}."""
        return {
            (
                int(path.parts[-3]),
                int(path.parts[-2].removeprefix("seed-")),
            ): path.read_text().split()
            for path in self.home.glob("trials/*/*/seed-*.events")
        }

    def count(self, event: str) -> int:
        return Counter(e for events in self.events().values() for e in events)[event]


def wait_for(condition, what: str = "it") -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.05)


def kill_at_random(study: Study, workers: int, kills: int, seed: int) -> Counter:
    """Run the sweep, kill -9 a worker, the supervisor or all now and then, and run it again."""
    chance, killed = random.Random(seed), Counter()
    supervisors = [study.run("--workers", str(workers))]  # all kept: orphans write into their pipes
    while killed.total() < kills:
        before = study.count("started")
        wait_for(lambda before=before: study.count("started") > before, f"a start after {killed}")
        time.sleep(chance.uniform(0, 0.5))
        kind = chance.choice(["worker", "worker", "worker", "supervisor", "all"])
        victims = processes_of(study, {"worker": "work", "supervisor": "run", "all": ""}[kind])
        for process in (
            chance.sample(victims, min(1, len(victims))) if kind == "worker" else victims
        ):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        killed[kind] += bool(victims)
        if kind != "worker":
            supervisors[-1].wait()
            supervisors.append(study.run("--workers", str(workers)))
    output = finished(supervisors[-1])
    assert supervisors[-1].returncode == 0, output
    return killed


def processes_of(study: Study, role: str) -> list[psutil.Process]:
    """The sweep's processes with this subcommand, orphans included; "" for all of them."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if any(str(study.home) in word for word in words) and role in (*words, ""):
            found.append(process)
    return found
