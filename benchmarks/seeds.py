"""Size and power of the test over prompts and seeds, by simulation.

    python -m benchmarks.seeds [--simulations 2000] [--json results/seeds.json]

Beside it stand the same statistic with Satterthwaite's degrees of freedom, and McNemar's test on
the first seed alone, which asks about one adapter and not about the recipe.
"""

import argparse
import itertools
import time
from pathlib import Path

import numpy as np
from scipy import stats

from atlas_lib import artifacts, session
from atlas_lib.evaluate import seeds, significance

ALPHA = 0.05
PROMPTS, SEEDS, DISCORDANCE = (121, 541), (2, 3, 5), (0.15, 0.25)
SEED_SDS = (0.0, 0.01, 0.02, 0.03)  # of the true gain between training seeds
EFFECTS = (0.05, 0.10)
SHARED = (0.2, 0.5, 0.9)  # how far two seeds agree on a prompt: correlation of the latent gains


def simulate(
    n: int,
    k: int,
    discordance: float,
    effect: float,
    seed_sd: float,
    shared: float,
    simulations: int,
    rng: np.random.Generator,
) -> dict[str, float]:
    """The share of simulations in which each test finds a difference.

    A seed's true gain is normal around `effect`. A prompt is won or lost where a latent gain, of
    which `shared` is the prompt's own, passes a threshold that gives the seed its gain and leaves
    the share of discordant prompts at `discordance` (more if the gain is larger).
    """
    gain = effect + seed_sd * rng.standard_normal((simulations, k, 1))
    win = np.maximum((np.maximum(discordance, np.abs(gain)) + gain) / 2, 0)
    latent = np.sqrt(1 - shared) * rng.standard_normal((simulations, k, n), np.float32)
    latent += np.sqrt(shared) * rng.standard_normal((simulations, 1, n), np.float32)
    won, lost = latent > stats.norm.isf(win), latent < stats.norm.ppf(win - gain)
    return {name: float(found.mean()) for name, found in decide(won, lost).items()}


def decide(won: np.ndarray, lost: np.ndarray) -> dict[str, np.ndarray]:
    """What each test says of (simulations, seeds, prompts) outcomes: true for a difference."""
    k, n = won.shape[-2:]
    mean, by_seed, by_prompt = seeds.mean_and_variances(won.astype(np.float32) - lost)
    variance = by_seed + by_prompt
    ratio = np.abs(mean) / np.sqrt(variance)
    freedom = variance**2 / (by_seed**2 / (k - 1) + by_prompt**2 / (n - 1))
    wins, discordant = won[:, 0].sum(axis=-1), (won | lost)[:, 0].sum(axis=-1)
    needed = significance.wins_needed(discordant, ALPHA)
    return {
        "two_way": ratio > seeds.critical_value(by_seed / variance, k, n, ALPHA),
        "satterthwaite": ratio > stats.t.isf(ALPHA / 2, freedom),
        "one_seed": np.maximum(wins, discordant - wins) >= needed,
    }


def settings() -> list[dict[str, float]]:
    """Without an effect for every agreement of the seeds, with one for the middle agreement."""
    null = itertools.product(PROMPTS, SEEDS, DISCORDANCE, (0.0,), SEED_SDS, SHARED)
    real = itertools.product(PROMPTS, SEEDS, DISCORDANCE, EFFECTS, SEED_SDS, SHARED[1:2])
    names = ("n", "k", "discordance", "effect", "seed_sd", "shared")
    return [dict(zip(names, values, strict=True)) for values in (*null, *real)]


def summarise(rows: list[dict], simulations: int) -> dict:
    """The largest size of each test by number of seeds, and two standard errors above alpha."""
    null = [row for row in rows if row["effect"] == 0]
    largest = {
        test: {str(k): max(row[test] for row in null if row["k"] == k) for k in SEEDS}
        for test in ("two_way", "satterthwaite", "one_seed")
    }
    bound = ALPHA + 2 * (ALPHA * (1 - ALPHA) / simulations) ** 0.5
    return {"alpha": ALPHA, "within_noise": bound, "largest_size_by_seeds": largest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--simulations", type=int, default=2000)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows, begun = [], time.monotonic()
    for number, setting in enumerate(settings()):
        rng = np.random.default_rng(number)
        rows.append(setting | simulate(**setting, simulations=args.simulations, rng=rng))
        print(rows[-1], flush=True)
    result = {"simulations": args.simulations, **summarise(rows, args.simulations), "rows": rows}
    print(result["largest_size_by_seeds"], f"{time.monotonic() - begun:.0f} s")
    if args.json:
        artifacts.write_json(args.json, result | session.provenance())


if __name__ == "__main__":
    main()
