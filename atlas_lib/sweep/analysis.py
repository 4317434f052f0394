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
    import pandas as pd


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
    passed = [sum(scores) for scores in _by_prompt(row).values()]
    return significance.share_ci(passed, [len(row["runs"])] * len(passed))


def _by_prompt(row: dict) -> dict[Any, list[int]]:
    """{key of a prompt: [1 if passed else 0, for each seed]}."""
    runs = [run["verdicts"] for run in row["runs"].values()]
    return {key: [run[i][1] for run in runs] for i, (key, _) in enumerate(runs[0])}


def compare_points(better: dict, other: dict) -> dict:
    """`better` against `other` on the same prompts: {won, lost, points, ci95, p, seeds_agree}.

    A prompt is won if more seeds pass it; wins and losses get McNemar's exact test. `seeds_agree`:
    the worst seed of one point is above the best seed of the other. Raises ValueError if the
    prompts differ.
    """
    ours, theirs = _by_prompt(better), _by_prompt(other)
    if ours.keys() != theirs.keys():
        raise ValueError("The two points were evaluated on different prompts; run both again.")
    gains = [statistics.mean(ours[key]) - statistics.mean(theirs[key]) for key in ours]
    won, lost = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    (_, low, high), (_, other_low, other_high) = (spread(r, "dev_strict") for r in (better, other))
    ci95 = significance.bootstrap(gains, [1] * len(gains), significance.RESAMPLES)
    return {
        "trial": other["number"],
        "won": won,
        "lost": lost,
        "points": 100 * statistics.mean(gains),
        "ci95": [100 * bound for bound in ci95],
        "p": significance.mcnemar_p(lost, won),
        "seeds_agree": low > other_high or high < other_low,
    }


def compare_best(rows: list[dict], alpha: float = significance.ALPHA) -> list[dict]:
    """The first point against every other, with a verdict: better, worse or not distinguishable.

    The first point was chosen after seeing all, so p is corrected for all pairs of points (Holm).
    """
    pairs = {(a["number"], b["number"]): (a, b) for a, b in itertools.combinations(rows, 2)}
    compared = {numbers: compare_points(*pair) for numbers, pair in pairs.items()}
    adjusted = significance.holm({numbers: found["p"] for numbers, found in compared.items()})
    for numbers, found in compared.items():
        found["p_adjusted"] = adjusted[numbers]
        real = adjusted[numbers] < alpha and found["seeds_agree"]
        word = "better" if found["won"] > found["lost"] else "worse"
        found["verdict"] = word if real else "not distinguishable"
    return [found for (first, _), found in compared.items() if first == rows[0]["number"]]


def comparison_table(compared: list[dict], rows: list[dict]) -> "pd.DataFrame":
    """The results of `compare_best`, formatted for display."""
    import pandas as pd

    labels = {row["number"]: label(row) for row in rows}
    table = pd.DataFrame(compared).assign(
        against=[labels[found["trial"]] for found in compared],
        points=[f"{found['points']:+.1f}" for found in compared],
        ci95=["{:+.1f} to {:+.1f}".format(*found["ci95"]) for found in compared],
        p=[f"{found['p_adjusted']:.2g}" for found in compared],
    )
    return table[["against", "points", "ci95", "won", "lost", "p", "seeds_agree", "verdict"]]


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
