"""Runs that differ in the training seed alone: does the recipe gain over the base model?

The test over prompts judges one adapter. Here seeds and prompts are both samples: the gain of
another adapter of the same recipe differs, and so does the gain on other prompts.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from atlas_lib import artifacts
from atlas_lib.evaluate import significance
from atlas_lib.stages import IFEVAL_EVAL

SMALLEST_P = -100  # as a power of ten; scipy's quantiles of t are wrong far below it


def mean_and_variances(gains: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean of `gains` (..., seeds, prompts), and its variance by seeds and by prompts.

    Each variance includes the interaction of seeds with prompts, so that their sum is on the safe
    side: mean**2 / sum is Clark's min F' (1973, The language-as-fixed-effect fallacy).
    """
    k, n = gains.shape[-2:]
    by_seed, by_prompt = gains.mean(axis=-1), gains.mean(axis=-2)
    variance_by_seed = by_seed.var(axis=-1, ddof=1) / k
    return by_seed.mean(axis=-1), variance_by_seed, by_prompt.var(axis=-1, ddof=1) / n


def critical_value(seed_share: np.ndarray, k: int, n: int, alpha: float) -> np.ndarray:
    """The smallest |mean| / standard error that is significant with k seeds and n prompts.

    It is the mean of the critical values of t with k - 1 and n - 1 degrees of freedom, weighted by
    the shares of the two variances (Cochran and Cox, 1957). With Satterthwaite's degrees of freedom
    the test rejects too often where few seeds differ much; results/seeds.json has the simulation.
    """
    from scipy.stats import t

    return seed_share * t.isf(alpha / 2, k - 1) + (1 - seed_share) * t.isf(alpha / 2, n - 1)


def two_way_test(gains: np.ndarray, alpha: float) -> dict:
    """{mean, interval, p} of `gains` (seeds, prompts), both random; at least two of each."""
    from scipy.optimize import bisect

    mean, by_seed, by_prompt = map(float, mean_and_variances(gains))
    if (variance := by_seed + by_prompt) == 0:  # every seed gains the same on every prompt
        return {"mean": mean, "interval": [mean, mean], "p": float(mean == 0)}
    error, share = variance**0.5, by_seed / variance
    half = error * critical_value(share, *gains.shape, alpha)

    def excess(exponent: float) -> float:
        return critical_value(share, *gains.shape, 10**exponent) - abs(mean) / error

    p = 10 ** bisect(excess, SMALLEST_P, 0) if excess(SMALLEST_P) > 0 else 0.0
    return {"mean": mean, "interval": [mean - half, mean + half], "p": p}


def compare_seeds(runs: Mapping[int, Path], prompt_format: str, alpha: float) -> dict:
    """SFT against base of each seed, whose OUT `runs` holds, and of all seeds together."""
    passed = {seed: _passed(out, prompt_format) for seed, out in runs.items()}
    gains = np.array([sft - base for base, sft in passed.values()])
    won, lost = (gains > 0).sum(axis=1).tolist(), (gains < 0).sum(axis=1).tolist()
    rows = [
        {"seed": seed, "base": float(base.mean()), "SFT": float(sft.mean()), "won": w, "lost": x}
        | {"difference_points": 100 * (w - x) / len(base), "p": significance.mcnemar_p(x, w)}
        for (seed, (base, sft)), w, x in zip(passed.items(), won, lost, strict=True)
    ]
    found = {"format": prompt_format, "n": gains.shape[1], "alpha": alpha, "seeds": rows}
    found["mean_SFT"] = sum(row["SFT"] for row in rows) / len(rows)
    found["difference_points"] = 100 * float(gains.mean())
    if min(gains.shape) < 2:
        few = "one seed" if len(rows) == 1 else "one prompt"
        return found | {"verdict": f"not tested: {few}"}
    tested = two_way_test(gains, alpha)
    word = "better" if tested["mean"] > 0 else "worse"
    found["difference_ci"] = [100 * bound for bound in tested["interval"]]
    found |= {"seed_sd_points": 100 * float(gains.mean(axis=1).std(ddof=1)), "p": tested["p"]}
    return found | {"verdict": word if tested["p"] < alpha else "not distinguishable"}


def _passed(out: Path, prompt_format: str) -> list[np.ndarray]:
    """1 for each prompt that base, and that SFT, passed, else 0."""
    scores = out / IFEVAL_EVAL / "scores"
    files = [scores / f"{model}-{prompt_format}.jsonl" for model in ("base", "SFT")]
    return [np.array([int(v["prompt_strict"]) for v in artifacts.read_jsonl(f)]) for f in files]


def seeds_text(found: dict) -> str:
    """The result of `compare_seeds` as a table for a terminal."""
    lines = [f"\n{'seed':<10}{'base':>7}{'SFT':>7}{'won':>6}{'lost':>6}{'points':>8}{'p':>10}"]
    for row in found["seeds"]:
        lines.append(
            f"{row['seed']:<10}{row['base']:>7.3f}{row['SFT']:>7.3f}{row['won']:>6}"
            f"{row['lost']:>6}{row['difference_points']:>+8.1f}{row['p']:>10.2g}"
        )
    points = f"{found['difference_points']:>+8.1f}"
    p = f"{found['p']:>10.2g}" if "p" in found else ""
    lines.append(f"{'mean':<10}{'':>7}{found['mean_SFT']:>7.3f}{'':>12}{points}{p}")
    about = f"strict accuracy on {found['n']} prompts ({found['format']})"
    if "p" in found:
        interval = "{:+.1f} to {:+.1f}".format(*found["difference_ci"])
        about += f"; mean difference {interval} points ({1 - found['alpha']:.0%} interval)"
        about += f", SD between seeds {found['seed_sd_points']:.1f}"
    lines += [about, f"the recipe against base, seeds and prompts random: {found['verdict']}"]
    return "\n".join(lines)
