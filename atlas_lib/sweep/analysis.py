"""What a sweep's exported study says: points with their noise, and which is really better."""

import itertools
import statistics as plain
from typing import Any

from atlas_lib.config import overlay_layer
from atlas_lib.evaluate import significance

WORK = ("training", "answers")  # how the parts of a run end that are not overhead


def points(exported: dict) -> list[dict]:
    """The complete trials, {number, point, varied, value, runs, ...} each, the best first."""
    sign = -1 if exported["sweep"]["objective"]["direction"] == "maximize" else 1
    done = [row for row in exported["trials"] if row["state"] == "COMPLETE"]
    return sorted(done, key=lambda row: (sign * row["value"], row["number"]))


def label(row: dict) -> str:
    """A point in a few words: the last part of each key that the sweep varies, and its value."""
    return ", ".join(f"{key.rpartition('.')[2]} {_short(v)}" for key, v in row["varied"].items())


def _short(value: Any) -> str:
    if isinstance(value, list):
        return f"{len(value)}: {value[0]} to {value[-1]}" if len(value) > 3 else ", ".join(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def table(rows: list[dict], metric: str) -> Any:
    """The points as a pandas table: objective with its seeds' range, losses, scores, minutes."""
    import pandas as pd

    shown = []
    for row in rows:
        mean, low, high = spread(row, metric)
        cells = {"trial": row["number"], **{k: _short(v) for k, v in row["varied"].items()}}
        cells |= {metric: mean, "lowest seed": low, "highest seed": high}
        runs = list(row["runs"].values())
        if all("verdicts" in run for run in runs):
            cells["strict, 95 %"] = "{:.3f} to {:.3f}".format(*strict_interval(row))
            cells["base"] = plain.mean(run["base_dev_strict"] for run in runs)
        for other in {"validation_loss", "dev_strict"} - {metric}:
            cells |= {other: spread(row, other)[0]} if other in runs[0] else {}
        shown.append(cells | {"minutes": sum(run["seconds"] for run in runs) / 60})
    return pd.DataFrame(shown)


def surface(exported: dict, rows: list[dict]) -> Any:
    """The objective over two listed parameters as a pandas table, or None for another space."""
    import pandas as pd

    space = exported["sweep"]["space"]
    if len(space) != 2 or not all(isinstance(values, list) for values in space.values()):
        return None
    down, across = space
    names = [[_short(value) for value in space[key]] for key in (down, across)]
    grid = pd.DataFrame(float("nan"), index=names[0], columns=names[1])
    for row in rows:
        grid.loc[_short(row["varied"][down]), _short(row["varied"][across])] = row["value"]
    return grid.rename_axis(index=down, columns=across)


def picture(exported: dict, rows: list[dict]) -> Any:
    """A figure of the objective over the space: a map if it is two lists, else parallel lines."""
    import matplotlib.pyplot as plt
    from optuna.visualization import matplotlib as pictures

    found = surface(exported, rows)
    if found is None:
        return pictures.plot_parallel_coordinate(study(exported)).figure
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    image = axes.imshow(found, cmap="viridis", aspect="auto")
    for place in itertools.product(*map(range, found.shape)):
        value = found.iloc[place]
        color = "black" if image.norm(value) > 0.6 else "white"
        axes.text(*place[::-1], f"{value:.3f}", ha="center", va="center", color=color)
    axes.set_xticks(range(len(found.columns)), found.columns)
    axes.set_yticks(range(len(found.index)), found.index)
    axes.set(xlabel=found.columns.name, ylabel=found.index.name)
    figure.colorbar(image, label=exported["sweep"]["objective"]["metric"])
    return figure


def agreement(rows: list[dict], metric: str) -> str:
    """Whether the validation loss would have chosen the same point, as a title."""
    lowest = min(rows, key=lambda row: spread(row, "validation_loss")[0])
    same = "the same point" if lowest is rows[0] else "another point"
    return f"The lowest validation loss is {same}"


def at_an_edge(exported: dict, row: dict) -> list[str]:
    """Numeric parameters of which the point has the smallest or the largest value tried."""
    found = []
    for key, values in exported["sweep"]["space"].items():
        ends = values if isinstance(values, list) else values["log_uniform"]
        numeric = all(isinstance(v, int | float) for v in ends) and len(ends) > 2
        if numeric and row["varied"][key] in (min(ends), max(ends)):
            found.append(key)
    return found


def spread(row: dict, metric: str) -> tuple[float, float, float]:
    """(mean, lowest, highest) of a metric over the seeds of a point."""
    values = [run[metric] for run in row["runs"].values()]
    return plain.mean(values), min(values), max(values)


def strict_interval(row: dict) -> list[float]:
    """95 % interval of the strict accuracy over all seeds, a bootstrap over prompts."""
    passed = [sum(scores) for scores in _by_prompt(row).values()]
    sizes = [len(row["runs"])] * len(passed)
    if sum(passed) in (0, sum(sizes)):
        return significance.proportion_ci(len(passed) if sum(passed) else 0, len(passed))
    return significance.bootstrap(passed, sizes, significance.RESAMPLES)


def _by_prompt(row: dict) -> dict[Any, list[int]]:
    """{key of a prompt: passed or not, a seed after the other}."""
    runs = [run["verdicts"] for run in row["runs"].values()]
    return {key: [run[i][1] for run in runs] for i, (key, _) in enumerate(runs[0])}


def compare(better: dict, other: dict) -> dict:
    """`better` against `other` on the same prompts: {won, lost, points, ci95, p, seeds_agree}.

    A prompt is won if more seeds pass it; wins and losses are tested as coin flips (for one seed
    this is McNemar's exact test). `seeds_agree`: the worst seed of one is above the best of the
    other, so that the difference is larger than what a seed alone does.
    """
    ours, theirs = _by_prompt(better), _by_prompt(other)
    if ours.keys() != theirs.keys():
        raise ValueError("the two points were asked different prompts; evaluate them again.")
    gains = [sum(ours[key]) / len(ours[key]) - sum(theirs[key]) / len(theirs[key]) for key in ours]
    won, lost = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    scores = [[run["dev_strict"] for run in row["runs"].values()] for row in (better, other)]
    ci95 = significance.bootstrap(gains, [1] * len(gains), significance.RESAMPLES)
    return {
        "trial": other["number"],
        "won": won,
        "lost": lost,
        "points": 100 * sum(gains) / len(gains),
        "ci95": [100 * bound for bound in ci95],
        "p": significance.mcnemar_p(lost, won),
        "seeds_agree": min(scores[0]) > max(scores[1]) or max(scores[0]) < min(scores[1]),
    }


def comparisons(rows: list[dict], alpha: float = significance.ALPHA) -> list[dict]:
    """The first point against every other, with a verdict: better, worse or not distinguishable.

    The first was picked after looking at all, so all pairs of points are corrected for (Holm).
    """
    pairs = {(a["number"], b["number"]): compare(a, b) for a, b in itertools.combinations(rows, 2)}
    adjusted = significance.holm({pair: found["p"] for pair, found in pairs.items()})
    against_all = []
    for pair, found in pairs.items():
        if pair[0] == rows[0]["number"]:
            found["p_adjusted"] = adjusted[pair]
            real = adjusted[pair] < alpha and found["seeds_agree"]
            word = "better" if found["won"] > found["lost"] else "worse"
            found["verdict"] = word if real else "not distinguishable"
            against_all.append(found)
    return against_all


def study(exported: dict) -> Any:
    """The finished trials as an Optuna study in memory, for importance and its plots."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    given = exported["sweep"]
    made = optuna.create_study(direction=given["objective"]["direction"])
    kinds = {
        key: optuna.distributions.CategoricalDistribution(_stored(values))
        if isinstance(values, list)
        else optuna.distributions.FloatDistribution(*values["log_uniform"], log=True)
        for key, values in given["space"].items()
    }
    for row in points(exported):
        trial = optuna.trial.create_trial(
            params=row["params"], distributions=kinds, value=row["value"]
        )
        made.add_trial(trial)
    return made


def _stored(values: list) -> list:
    from atlas_lib.sweep import definition

    return [definition.encode(value) for value in values]


def importance(exported: dict) -> dict[str, float]:
    """Share of the objective's variance that a parameter explains (fANOVA); {} if unknown."""
    import optuna

    made = study(exported)
    values = {trial.value for trial in made.trials}
    if len(made.trials) < 4 or len(values) < 2:
        return {}
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    return optuna.importance.get_param_importances(made, evaluator=evaluator)


def device_hours(exported: dict) -> float:
    """What all trials, failed ones too, and the stages that they share have cost."""
    runs = [run for row in exported["trials"] for run in row["runs"].values()]
    seconds = sum(run["seconds"] for run in runs)
    seconds += sum(row["failed_seconds"] for row in exported["trials"])
    return (seconds + exported["shared_seconds"]) / 3600


def overhead(exported: dict) -> dict[str, float]:
    """Mean seconds a run by part; `overhead` is all but training and asking the model."""
    runs = [run for row in exported["trials"] for run in row["runs"].values() if run["parts"]]
    if not runs:
        return {}
    names = dict.fromkeys(name for run in runs for name in run["parts"])
    parts = {name: plain.mean(run["parts"].get(name, 0.0) for run in runs) for name in names}
    parts["asking Optuna"] = plain.mean(run["ask_seconds"] for run in runs)
    rest = sum(seconds for name, seconds in parts.items() if not name.endswith(WORK))
    return parts | {"overhead": rest}


def winner_yaml(exported: dict, row: dict) -> str:
    """A whole recipe: the sweep's, its overlay and, above both, the winning point."""
    import yaml

    given = exported["sweep"]
    above = overlay_layer(given["overlay"], given["set"] | row["point"])
    merged = {"extends": given["config"], **above}
    origin = f"# The winner of {exported['study']}: trial {row['number']}, chosen on dev prompts."
    return f"{origin}\n{yaml.safe_dump(merged, sort_keys=False, allow_unicode=True)}"


def as_text(exported: dict) -> str:
    """How far the sweep is, for a terminal."""
    states = [row["state"] for row in exported["trials"] if not row["retried"]]
    counts = ", ".join(f"{states.count(s)} {s.lower()}" for s in dict.fromkeys(states))
    lines = [
        f"{exported['study']}: {counts or 'nothing yet'}; {len(exported['looks'])} looks at test"
    ]
    metric = exported["sweep"]["objective"]["metric"]
    for row in points(exported):
        mean, low, high = spread(row, metric)
        lines.append(
            f"{row['number']:>4}  {metric} {mean:.4f} ({low:.4f} to {high:.4f})  {label(row)}"
        )
    for row in exported["trials"]:
        if row["state"] == "FAIL":
            lines.append(f"{row['number']:>4}  failed: {row['error']}")
    lines += [f"{seconds:>8.1f} s  {name}" for name, seconds in overhead(exported).items()]
    return "\n".join([*lines, f"{device_hours(exported):.2f} device hours"])
