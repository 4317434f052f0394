"""Studies of trivial trials in real processes, for the tests and the benchmark of sweeps."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from optuna.trial import TrialState

from atlas_lib.config import load_config
from atlas_lib.sweep import definition
from tools import sweep_storage, sweep_study

ROOT = Path(__file__).resolve().parents[2]
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
    "runner": "tests.helpers.trivial_run",
}


def command(*arguments, **options) -> subprocess.Popen:
    given = [sys.executable, "-m", "tools.sweep", *map(str, arguments)]
    return subprocess.Popen(
        given, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )


def finished(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=120)
    return output


class Study:
    """A study on the journal file, as a session sees it that starts no processes."""

    def __init__(self, home: Path, storage: str = "", name: str = "trivial", **changes):
        self.home, self.url, self.name = home, storage, name
        self.sweep = definition.validate(TRIVIAL | {"name": name} | changes)
        self.storage = sweep_storage.open_storage(storage, home)
        digest = load_config(self.sweep.config, self.sweep.overlay, self.sweep.set).digest()
        self.study = sweep_study.create(name, self.sweep, self.storage, digest)
        self.held = sweep_storage.locks(self.storage, self.study, home)

    def claim(self):
        return sweep_study.claim(self.study, self.sweep, self.held)

    def worker(self, **environment) -> subprocess.Popen:
        environment = os.environ | {"ATLAS_SWEEP_STORAGE": self.url} | environment
        return command("work", "--study", self.name, "--home", self.home, env=environment)

    def trials(self, *states):
        return self.study.get_trials(deepcopy=False, states=states or None)

    def each_point_once(self) -> bool:
        done = self.trials(TrialState.COMPLETE)
        points = {json.dumps(t.params, sort_keys=True) for t in done}
        return len(done) == len(points) == definition.n_trials(self.sweep)


def starts(study: Study) -> dict[int, int]:
    """How often the runner was started, by trial."""
    found = study.home.glob("trials/*/seed-1/starts.txt")
    return {int(p.parent.parent.name): len(p.read_text().splitlines()) for p in found}


def wait_for(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def kill_at_random(study: Study, workers: int, kills: int, seed: int) -> None:
    """Work with several workers, kill -9 one of them now and then, and replace it."""
    chance = random.Random(seed)
    environment = {"ATLAS_SWEEP_WORKERS": str(workers)}
    running = [study.worker(**environment) for _ in range(workers)]
    deadline = time.monotonic() + 300
    while any(process.poll() is None for process in running) and time.monotonic() < deadline:
        time.sleep(chance.uniform(0.2, 1.2))
        victim = chance.choice(running)
        if kills and victim.poll() is None and study.trials():
            os.kill(victim.pid, signal.SIGKILL)
            victim.wait()
            running[running.index(victim)] = study.worker(**environment)
            kills -= 1
    assert not kills, "the sweep was over before the last kill"
    assert [process.wait(timeout=60) for process in running] == [0] * workers
