"""What a sweep's exported study shows: each point with its noise, and which points differ.

A row is one point of `study.json`: {number, state, value, params, point, varied, runs, ...}, where
`runs` maps a seed to its results.
"""

import itertools
import statistics
from typing import TYPE_CHECKING, Any

from atlas_lib.config import overlay_layer
from atlas_lib.evaluate import significance

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

Pair = tuple[int, int]  # numbers of two points
BY_PROMPT = "dev_strict"  # the objective of which there is a verdict for every prompt
DRAWS = 2000  # of a bootstrap
UNTESTED = "not tested: one seed"


def ranked(exported: dict) -> list[dict]:
    """The complete points, the best first."""
    sign = -1 if exported["sweep"]["objective"]["direction"] == "maximize" else 1
    complete = [row for row in exported["trials"] if row["state"] == "COMPLETE"]
    return sorted(complete, key=lambda row: (sign * row["value"], row["number"]))


def label(row: dict) -> str:
    """A point in short: the last part of each varied key and its value."""
    return ", ".join(f"{key.rpartition('.')[2]} {_short(v)}" for key, v in row["varied"].items())


def _short(value: Any) -> str:
    if isinstance(value, list):
        return f"{len(value)}: {value[0]} to {value[-1]}" if len(value) > 3 else ", ".join(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def points_table(rows: list[dict], metric: str) -> "pd.DataFrame":
    """One line a point: objective with the range of its seeds, losses, scores, minutes."""
    import pandas as pd

    lines = []
    for row in rows:
        runs = list(row["runs"].values())
        cells = {"trial": row["number"]} | {key: _short(v) for key, v in row["varied"].items()}
        cells |= zip((metric, "lowest seed", "highest seed"), spread(row, metric), strict=True)
        if "verdicts" in runs[0]:
            cells["strict, 95 %"] = "{:.3f} to {:.3f}".format(*strict_interval(row))
            cells["base"] = spread(row, "base_dev_strict")[0]
        for other in {"validation_loss", "dev_strict"} - {metric}:
            cells |= {other: spread(row, other)[0]} if other in runs[0] else {}
        lines.append(cells | {"minutes": sum(run["seconds"] for run in runs) / 60})
    return pd.DataFrame(lines).set_index("trial").round(4)


def spread(row: dict, metric: str) -> tuple[float, float, float]:
    """(mean, lowest, highest) of a metric over the seeds of a point."""
    values = [run[metric] for run in row["runs"].values()]
    return statistics.mean(values), min(values), max(values)


def strict_interval(row: dict) -> list[float]:
    """95 % interval of the strict accuracy over all seeds, by a bootstrap over prompts."""
    passed = _passed(row)
    return significance.share_ci(passed.sum(axis=0), [len(passed)] * passed.shape[1])


def _passed(row: dict) -> "np.ndarray":
    """Which prompts passed (0 or 1), seeds x prompts."""
    import numpy as np

    return np.array([[score for _, score in run["verdicts"]] for run in row["runs"].values()])


def prompt_counts(rows: list[dict]) -> dict[Pair, list[int]]:
    """{pair of points: prompts that the first one wins and loses}: those that more seeds pass.

    Raises ValueError if the prompts differ.
    """
    keys = [[key for key, _ in run["verdicts"]] for row in rows for run in row["runs"].values()]
    if any(other != keys[0] for other in keys):
        raise ValueError("The points were evaluated on different prompts; run them again.")
    shares = {row["number"]: _passed(row).mean(axis=0) for row in rows}
    return {
        (a, b): [int((shares[a] > shares[b]).sum()), int((shares[a] < shares[b]).sum())]
        for a, b in itertools.combinations(shares, 2)
    }


def prompt_p_values(counts: dict[Pair, list[int]]) -> dict[Pair, float]:
    """McNemar's exact p of every pair, corrected for all pairs (Holm): prompts are the sample."""
    import numpy as np

    p_values = significance.mcnemar_p(*np.array([*counts.values()], int).reshape(-1, 2).T)
    return significance.holm(dict(zip(counts, p_values.tolist(), strict=True)))


def seed_p_values(rows: list[dict], metric: str) -> list[float]:
    """p of the first point against each other by Tukey's HSD, which holds for all pairs of points.

    The seeds are the sample; their variance is pooled over all points. Nothing with one seed.
    """
    import numpy as np
    from scipy.stats import studentized_range

    error, shape = _seed_error(rows, metric)
    if not shape:
        return []
    means = np.array([spread(row, metric)[0] for row in rows])
    gaps = abs(means[1:] - means[0]) / max(error, 1e-12)  # seeds may not differ at all
    return studentized_range.sf(gaps, *shape).tolist()


def _seed_error(rows: list[dict], metric: str) -> tuple[float, tuple[int, ...]]:
    """The standard error of a point's mean, and Tukey's number of groups and degrees of freedom."""
    seeds = len(rows[0]["runs"])
    if min(seeds, len(rows)) < 2:
        return 0.0, ()
    scores = [[run[metric] for run in row["runs"].values()] for row in rows]
    variance = statistics.mean(map(statistics.variance, scores))
    return (variance / seeds) ** 0.5, (len(rows), len(rows) * (seeds - 1))


def compare_best(
    rows: list[dict], metric: str = BY_PROMPT, alpha: float = significance.ALPHA
) -> list[dict]:
    """The first point against every other: {trial, difference, p_seeds, verdict, ...}.

    Better means that the difference is larger than the noise of the seeds (Tukey's HSD) and, if the
    objective is `dev_strict`, than that of the prompts (McNemar, Holm). The first point was chosen
    after seeing all of them, so both tests hold for all pairs of points.
    """
    by_seeds = seed_p_values(rows, metric) or [None] * len(rows[1:])
    counts = prompt_counts(rows) if metric == BY_PROMPT else {}
    by_prompts = prompt_p_values(counts)
    compared = []
    for other, p_seeds in zip(rows[1:], by_seeds, strict=True):
        pair = rows[0]["number"], other["number"]
        difference = spread(rows[0], metric)[0] - spread(other, metric)[0]
        found = {"trial": other["number"], "difference": difference, "p_seeds": p_seeds}
        tests = [p_seeds or 0.0]
        if counts:
            won, lost = counts[pair]
            gains = _passed(rows[0]).mean(axis=0) - _passed(other).mean(axis=0)
            found |= {"ci95": significance.bootstrap(gains, [1] * len(gains))}
            found |= {"won": won, "lost": lost, "p_prompts": by_prompts[pair]}
            tests.append(by_prompts[pair] if won > lost else 1.0)
        word = "better" if max(tests) < alpha else "not distinguishable"
        found["verdict"] = UNTESTED if p_seeds is None else word
        compared.append(found)
    return compared


def best_table(compared: list[dict], rows: list[dict]) -> "pd.DataFrame":
    """The results of `compare_best`, formatted for display."""
    import pandas as pd

    labels = {row["number"]: label(row) for row in rows}
    table = pd.DataFrame(compared)
    table["trial"] = [labels[trial] for trial in table["trial"]]
    for name, form in (("difference", "{:+.4f}"), ("p_prompts", "{:.2g}"), ("p_seeds", "{:.2g}")):
        if name in table:
            table[name] = [form.format(x) if pd.notna(x) else "-" for x in table[name]]
    if "ci95" in table:
        table["ci95"] = ["{:+.3f} to {:+.3f}".format(*bounds) for bounds in table["ci95"]]
    return table.rename(columns={"trial": "against"}).set_index("against")


def smallest_differences(rows: list[dict], metric: str, alpha: float) -> list[str]:
    """What this sweep can detect, as sentences: by the noise of its seeds and of its prompts."""
    from scipy.stats import studentized_range

    said = []
    error, shape = _seed_error(rows, metric)
    if shape:
        least = error * studentized_range.isf(alpha, *shape)
        said.append(f"seeds: a difference in {metric} below {least:.4f} is not significant")
    if metric == BY_PROMPT and len(rows) > 1:
        counts, n = prompt_counts(rows).values(), _passed(rows[0]).shape[1]
        discordant = statistics.mean(map(sum, counts)) / n
        points = significance.smallest_effect(n, discordant, alpha / len(counts))
        smallest = f"is {points:.1f} points" if points else "does not exist"
        said.append(
            f"prompts: the smallest effect that {n} prompts show with 80 % power, corrected for "
            f"{len(counts)} pairs, {smallest} ({discordant:.0%} of the prompts are discordant)"
        )
    return said


def winners_optimism(rows: list[dict]) -> float:
    """By how much the strict accuracy of the best is too high if all points are equally good.

    The mean, over a bootstrap of prompts and seeds, of the largest deviation of a point from its
    own accuracy.
    """
    import numpy as np

    passed, draw = np.array([_passed(row) for row in rows]), np.random.default_rng(0)
    points, seeds, prompts = passed.shape
    weights = draw.multinomial(prompts, [1 / prompts] * prompts, size=DRAWS) / prompts
    of_seeds = draw.multinomial(seeds, [1 / seeds] * seeds, size=(points, DRAWS)) / seeds
    scores = np.einsum("psr,prs->pr", passed @ weights.T, of_seeds)
    return float((scores - passed.mean(axis=(1, 2))[:, None]).max(axis=0).mean())


def at_an_edge(exported: dict, row: dict) -> list[str]:
    """Numeric keys of which the point has the smallest or the largest value of the space."""
    edges = []
    for key, choices in exported["sweep"]["space"].items():
        values = choices if isinstance(choices, list) else choices["log_uniform"]
        numeric = all(isinstance(value, int | float) for value in values)
        if numeric and len(values) > 2 and row["varied"][key] in (min(values), max(values)):
            edges.append(key)
    return edges


def winner_yaml(exported: dict, row: dict) -> str:
    """A whole recipe: the sweep's own, its overlay and, above both, the winning point."""
    import yaml

    sweep = exported["sweep"]
    above = overlay_layer(sweep["overlay"], sweep["set"] | row["point"])
    origin = f"# The winner of {exported['study']}: trial {row['number']}, chosen on dev prompts."
    recipe = {"extends": sweep["config"], **above}
    return f"{origin}\n{yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)}"
