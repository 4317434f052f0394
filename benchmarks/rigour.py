"""How often the verdicts are wrong, by simulation with the library's own tests.

    python -m benchmarks.rigour [--sweeps 1000] [--json results/rigour.json]
    python -m benchmarks.rigour --quick

A simulated prompt is followed if a normal variable is positive: the sum of the prompt's difficulty,
the seed's effect and a part of its own. Difficulty makes two trainings agree on most prompts, and
the seed's effect moves the true accuracy by a standard deviation in points.
"""

import argparse
import functools
import itertools
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from scipy.optimize import brentq
from scipy.stats import multivariate_normal, norm

from atlas_lib import artifacts, session
from atlas_lib.evaluate import significance
from atlas_lib.sweep import analysis

POINTS, PROMPTS, ACCURACY, ALPHA = 12, 121, 0.30, significance.ALPHA
SEEDS, DISCORDANT, SEED_SD = (2, 3), (0.15, 0.25), (0, 1, 2, 3)


@functools.cache
def shared_variance(discordant: float) -> float:
    """The share of variance that two trainings have in common if they differ on so many prompts."""
    z = norm.ppf(ACCURACY)

    def surplus(shared: float) -> float:
        both = multivariate_normal.cdf([z, z], cov=[[1, shared], [shared, 1]])
        return 2 * (ACCURACY - both) - discordant

    return brentq(surplus, 0, 0.999)


def simulate_sweep(
    draw: np.random.Generator, seeds: int, discordant: float, seed_sd: float, lift: float = 0
) -> list[dict]:
    """A sweep's points, best first, all equal in truth but for point 0, better by `lift` points."""
    shared = shared_variance(discordant)
    difficulty = np.sqrt(shared) * draw.normal(size=PROMPTS)
    accuracy = ACCURACY + seed_sd / 100 * draw.normal(size=(POINTS, seeds, 1))
    accuracy[0] += lift / 100
    own = np.sqrt(1 - shared) * draw.normal(size=(POINTS, seeds, PROMPTS))
    passed = norm.ppf(accuracy.clip(0.01, 0.99)) + difficulty + own > 0
    rows = [
        {
            "number": number,
            "varied": {"number": number},
            "runs": {
                str(seed): {
                    "dev_strict": float(scores.mean()),
                    "verdicts": [*enumerate(scores.astype(int).tolist())],
                }
                for seed, scores in enumerate(point)
            },
        }
        for number, point in enumerate(passed)
    ]
    return sorted(rows, key=lambda row: -analysis.spread(row, "dev_strict")[0])


def better_by_both(rows: list[dict]) -> list[int]:
    """Points that the best one is called better than: `analysis.compare_best` without intervals."""
    found = better_by_prompts(rows)
    p_seeds = analysis.seed_p_values(rows, "dev_strict") if found else []
    noisy = {row["number"] for row, p in zip(rows[1:], p_seeds, strict=False) if p >= ALPHA}
    return [other for other in found if other not in noisy]


def better_by_prompts(rows: list[dict]) -> list[int]:
    """The same without the test of the seeds."""
    counts = analysis.prompt_counts(rows)
    significant = analysis.prompt_p_values(counts)
    pairs = [(rows[0]["number"], row["number"]) for row in rows[1:]]
    won = {pair: counts[pair][0] > counts[pair][1] for pair in pairs}
    return [pair[1] for pair in pairs if significant[pair] < ALPHA and won[pair]]


def better_by_range(rows: list[dict]) -> list[int]:
    """The prompts' test, and all seeds of one point above all of the other: the rule until 2026."""
    ranges = {row["number"]: analysis.spread(row, "dev_strict")[1:] for row in rows}
    lowest = ranges[rows[0]["number"]][0]
    return [other for other in better_by_prompts(rows) if lowest > ranges[other][1]]


def false_winner_rate(
    rule: Callable[[list[dict]], list[int]], sweeps: int, *setting: float, seed: int = 0
) -> float:
    """The share of sweeps of equal points whose best one is called better than some other."""
    draw = np.random.default_rng(seed)
    return sum(bool(rule(simulate_sweep(draw, *setting))) for _ in range(sweeps)) / sweeps


def sizes(sweeps: int) -> list[dict]:
    """False winners by seeds, discordance and noise of the seeds, under three rules."""
    rows = []
    rules = {"range of seeds": better_by_range, "both tests": better_by_both}
    for setting in itertools.product(SEEDS, DISCORDANT, SEED_SD):
        found = {name: false_winner_rate(rule, sweeps, *setting) for name, rule in rules.items()}
        bound = ALPHA + 2.6 * (ALPHA * (1 - ALPHA) / sweeps) ** 0.5
        row = dict(zip(("seeds", "discordant", "seed_sd_points"), setting, strict=True)) | found
        rows.append(row | {"sweeps": sweeps, "within_noise": found["both tests"] <= bound})
        print(row, flush=True)
    return rows


def sweep_power(sweeps: int) -> list[dict]:
    """How often one point that is truly better is called better than some, and than all others."""
    rows = []
    for seeds, lift in itertools.product(SEEDS, (5, 10, 15)):
        draw, some, every = np.random.default_rng(1), 0, 0
        for _ in range(sweeps):
            simulated = simulate_sweep(draw, seeds, 0.15, 1, lift)
            found = better_by_both(simulated) if simulated[0]["number"] == 0 else []
            some, every = some + bool(found), every + (len(found) == POINTS - 1)
        row = {"seeds": seeds, "lift_points": lift, "sweeps": sweeps}
        rows.append(row | {"better_than_some": some / sweeps, "than_all": every / sweeps})
        print(rows[-1], flush=True)
    return rows


def optimism(sweeps: int) -> list[dict]:
    """The winner's true optimism in points, and what the bootstrap says of it, on average."""
    rows = []
    for seed_sd in SEED_SD:
        draw, real, said = np.random.default_rng(2), [], []
        for _ in range(sweeps):
            simulated = simulate_sweep(draw, 2, 0.15, seed_sd)
            means = [analysis.spread(row, "dev_strict")[0] for row in simulated]
            real.append(means[0] - sum(means) / POINTS)
            said.append(analysis.winners_optimism(simulated))
        row = {"seed_sd_points": seed_sd, "sweeps": sweeps}
        rows.append(row | {"real": 100 * statistics.mean(real)})
        rows[-1]["bootstrap"] = 100 * statistics.mean(said)
        print(rows[-1], flush=True)
    return rows


def verdict_power() -> list[dict]:
    """Exact power of the paired test, and the smallest effect that it detects with 80 % power."""
    return [
        {
            "prompts": n,
            "discordant": share,
            "smallest_effect_points": significance.smallest_effect(n, share, ALPHA),
            "power": {
                str(points): significance.power(
                    n, (share + points / 100) / 2, (share - points / 100) / 2, ALPHA
                )
                for points in (3, 5, 8)
                if points / 100 <= share
            },
        }
        for n, share in itertools.product((121, 541), significance.DISCORDANT)
    ]


def recipe_noise(adapters: int) -> list[dict]:
    """How often one adapter's verdict is better or worse although the recipe changes nothing.

    The seed moves the true effect of an adapter; 541 prompts, the test of a single adapter.
    """
    rows = []
    for share, seed_sd in itertools.product((0.10, 0.15, 0.20), (0, 1, 1.5, 2)):
        draw = np.random.default_rng(3)
        effect = (seed_sd / 100 * draw.normal(size=adapters)).clip(-share, share)
        differ = draw.binomial(541, share, size=adapters)
        wins = draw.binomial(differ, (share + effect) / (2 * share))
        wrong = (significance.mcnemar_p(differ - wins, wins) < ALPHA).mean()
        row = {"discordant": share, "seed_sd_points": seed_sd, "adapters": adapters}
        rows.append(row | {"better_or_worse": float(wrong)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweeps", type=int, default=1000, help="simulated sweeps a setting")
    parser.add_argument("--quick", action="store_true", help="20 sweeps a setting")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    sweeps = 20 if args.quick else args.sweeps
    report = {
        "points": POINTS,
        "prompts": PROMPTS,
        "accuracy": ACCURACY,
        "alpha": ALPHA,
        "false_winners": sizes(sweeps),
        "sweep_power": sweep_power(max(20, sweeps // 4)),
        "winners_optimism": optimism(max(20, sweeps // 10)),
        "verdict_power": verdict_power(),
        "recipe_noise": recipe_noise(200 * sweeps),
    }
    report |= session.provenance()
    if args.json:
        artifacts.write_json(args.json, report)
    if not all(row["within_noise"] for row in report["false_winners"]):
        sys.exit(f"error: the false-winner rate exceeds {ALPHA:g} by more than its noise.")


if __name__ == "__main__":
    main()
