"""The simulation of benchmarks/rigour.py, in small: how often a sweep has a false winner."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from atlas_lib.evaluate import significance
from atlas_lib.sweep import analysis
from benchmarks import rigour

ROOT = Path(__file__).resolve().parents[2]
NOISY = (2, 0.15, 3)  # seeds, discordant prompts, standard deviation of a seed in points


def test_a_rule_without_the_noise_of_the_seeds_has_false_winners_and_is_caught():
    """80 sweeps of 12 equal points: a rate of 0.05 shows as more than 0.13 once in 600 times."""
    old = rigour.false_winner_rate(rigour.better_by_range, 80, *NOISY)
    new = rigour.false_winner_rate(rigour.better_by_both, 80, *NOISY)
    assert old > 0.05 + 0.08
    assert new <= 0.05 + 0.08


def test_the_simulated_rule_is_that_of_the_report():
    draw, seen = np.random.default_rng(4), set()
    for lift in (0, 15, 20):
        rows = rigour.simulate_sweep(draw, 2, 0.15, 1, lift)
        compared = analysis.compare_best(rows)
        called = [row["trial"] for row in compared if row["verdict"] == "better"]
        assert called == rigour.better_by_both(rows)
        seen.add(bool(called))
    assert seen == {False, True}


@pytest.mark.parametrize("discordant", rigour.DISCORDANT)
def test_the_simulation_has_the_accuracy_and_the_discordance_that_it_states(discordant):
    draw, means, differing = np.random.default_rng(0), [], []
    for _ in range(100):
        runs = [r["runs"]["0"]["verdicts"] for r in rigour.simulate_sweep(draw, 2, discordant, 1)]
        passed = np.array(runs)[:, :, 1]
        means.append(passed.mean())
        differing.append(np.mean(passed[0::2] != passed[1::2]))
    assert np.mean(means) == pytest.approx(rigour.ACCURACY, abs=0.015)
    assert np.mean(differing) == pytest.approx(discordant, abs=0.015)


def test_the_published_simulation_holds_its_bound():
    found = json.loads((ROOT / "results" / "rigour.json").read_text("utf-8"))
    sizes = found["false_winners"]
    assert len(sizes) == 16 and all(row["within_noise"] for row in sizes)
    assert max(row["both tests"] for row in sizes) <= significance.ALPHA + 0.02
    assert max(row["range of seeds"] for row in sizes) > 0.3


@pytest.mark.slow
def test_the_command_runs_in_small(tmp_path):
    command = [sys.executable, "-m", "benchmarks.rigour", "--quick", "--json", tmp_path / "r.json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "r.json").read_text("utf-8"))
    assert found["recipe_noise"] and found["verdict_power"] and found["winners_optimism"]
