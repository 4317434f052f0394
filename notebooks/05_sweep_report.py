# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Read what a sweep found
#
# A sweep runs the same notebooks many times with different values. Its table always has a best row,
# even if all points are equally good and only chance separates them. The question is therefore not
# which point comes first, but whether the first point is *better* than the others.
#
# Two precautions keep the answer honest. Every point is trained with several **seeds**, which shows
# how much a score varies when only chance changes. And every point is evaluated on **dev prompts**,
# which have the test prompts' instruction types but none of their texts: the score of the best of
# many points on the prompts that chose it is biased upwards.
#
# **What you will see:** every point with its noise; which differences are significant; the losses;
# the effect of each parameter; the winning configuration; the cost.
# **Input:** `study.json`, the study as `tools.sweep` exports it from its storage.
# **Output:** `winner.yaml`, a configuration that is ready to use.

# %% tags=["parameters"]
CONFIG = "sft_qwen05b"
OVERLAY = ""
OUT = ""
SET = {}

# %% [markdown]
# The next two cells find the library and show what identifies this run.

# %% tags=["bootstrap"]
import importlib.util
import subprocess
import sys
from pathlib import Path

REPOSITORY, REF = "https://github.com/agaonker/atlas", "main"
places = [Path.cwd(), *Path.cwd().parents]
places += [folder.parent for folder in Path("/kaggle/input").rglob("atlas_lib")]
sys.path += [str(place) for place in places if (place / "atlas_lib" / "bootstrap.py").is_file()]
if importlib.util.find_spec("atlas_lib") is None:
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", f"git+{REPOSITORY}@{REF}"]
    if subprocess.run(pip).returncode:
        raise RuntimeError(f"pip cannot install {REPOSITORY}; Kaggle: is Settings > Internet on?")
from atlas_lib import bootstrap

bootstrap.ensure()

# %% tags=["setup"]
import json

from IPython.display import Markdown

from atlas_lib import artifacts, notebooks
from atlas_lib.sweep import analysis

config, out = notebooks.start("05_sweep_report", CONFIG, OVERLAY, OUT, SET)
if not (out / "study.json").is_file():
    raise FileNotFoundError(f"{out} holds no study.json: run `make sweep SWEEP=...` first.")
headline = notebooks.headline()

# %% [markdown]
# ## The smallest example: one point
#
# A point is one choice of values. It is trained once for each seed with everything else unchanged.
# The differences between the rows below are therefore noise, and a difference between two points
# has to exceed it.

# %%
exported = json.loads((out / "study.json").read_bytes())
sweep = exported["sweep"]
metric, direction = sweep["objective"]["metric"], sweep["objective"]["direction"]
points = analysis.ranked(exported)
assert points, "no trial is complete yet"
best = points[0]
print(f"trial {best['number']}: {analysis.label(best)}")
for seed, run in best["runs"].items():
    print(f"  seed {seed}: {metric} {run[metric]:.4f}")

# %% [markdown]
# ## Each point counts once
#
# Workers may be killed at any time. Optuna then queues the trial again, and the point keeps the
# seeds that it has finished. However often that happens, a point counts once, with one run for each
# seed. A point that failed is listed with its error and is left out of everything below.

# %%
import pandas as pd

seen = [json.dumps(row["point"], sort_keys=True) for row in points]
assert sweep["sampler"] == "tpe" or len(set(seen)) == len(seen), "a point was counted twice"
assert all(len(row["runs"]) == len(sweep["seeds"]) for row in points), "a seed is missing"
failed = [row for row in exported["trials"] if row["state"] == "FAIL"]
repeated = sum(row["trials"] > 1 for row in exported["trials"])
print(f"{len(points)} complete, {len(failed)} failed, {repeated} interrupted and queued again")
pd.DataFrame(failed)[["number", "point", "error"]] if failed else "no trial failed"

# %% [markdown]
# ## Every point with its noise
#
# The objective is the mean over the seeds; the lowest and the highest seed stand beside it. The
# interval of the strict accuracy describes another source of noise: how much the score would vary
# with other prompts (bootstrap over prompts).

# %%
analysis.points_table(points, metric)

# %%
import matplotlib.pyplot as plt

figure, axes = plt.subplots(figsize=(7, 1.2 + 0.32 * len(points)), layout="constrained")
names = [analysis.label(row) for row in points]
for place, row in enumerate(points):
    if metric == analysis.BY_PROMPT:
        axes.plot(analysis.strict_interval(row), [place] * 2, color="#c5c9d3", linewidth=6)
    values = [run[metric] for run in row["runs"].values()]
    axes.plot(values, [place] * len(values), "o", color="#4c72b0", alpha=0.7)
    axes.plot(row["value"], place, "|", color="#c44e52", markersize=14, markeredgewidth=2)
axes.set_yticks(range(len(points)), names)
axes.set_ylim(len(points) - 0.4, -0.6)
axes.set(xlabel=f"{metric}: seeds (dots), mean (red), 95 % over prompts (bar)")
axes.set_title(f"Best of {len(points)}: {names[0]}")
alt = f"{metric} of every point, best first, with its seeds; {names[0]} is at {best['value']:.3f}."
notebooks.show_figure(figure, alt, config.label)

# %% [markdown]
# Overlapping bars do not show that two points are equally good: both were evaluated on the *same*
# prompts, and only the prompts on which they differ carry information. The next section tests
# these.
#
# ## Is the best point better?
#
# The best point is compared with every other one by the objective of the sweep, in two ways,
# because there are two sources of chance. *Seeds*: Tukey's test asks whether the difference of the
# means exceeds what the seeds alone do; the variance of the seeds is pooled over all points.
# *Prompts*, for the strict accuracy: McNemar's exact test asks whether the prompts that more seeds
# of one point pass than of the other are compatible with a fair coin. The best point was chosen
# after seeing all of them, so both p-values hold for **all pairs** of points, not only for the rows
# shown. A point is called better only if both tests are significant. With a single seed nothing is
# known about the noise of the seeds, and nothing is tested.

# %%
compared = analysis.compare_best(points, metric, config.eval.alpha)
analysis.best_table(compared, points) if compared else "there is only one point"

# %% [markdown]
# How small a difference can be seen:

# %%
print("\n".join(analysis.smallest_differences(points, metric, config.eval.alpha)) or "unknown")

# %% [markdown]
# *Not distinguishable* is a useful result: among such points, choose the cheapest or the most usual
# value.
#
# ## The losses
#
# One line for each seed, one color for each point. If the curves coincide while the scores differ,
# or the other way round, the loss alone would not have chosen the best point.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
colors = plt.get_cmap("viridis")([place / max(1, len(points) - 1) for place in range(len(points))])
for row, color in zip(points, colors, strict=True):
    for position, run in enumerate(row["runs"].values()):
        name = analysis.label(row) if not position else None
        left.plot(*zip(*run["curve"], strict=True), color=color, label=name, linewidth=1)
        right.plot(run["validation_loss"], run[metric], "o", color=color)
lowest = min(points, key=lambda row: analysis.spread(row, "validation_loss")[0])
agreement = f"The lowest loss is {'the same' if lowest is best else 'another'} point"
left.set(xlabel="step", ylabel="training loss", title="Loss by point, best first")
right.set(xlabel="validation loss", ylabel=metric, title=agreement)
figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=7)
alt = f"Training loss by step for {len(points)} points, and {metric} against validation loss."
notebooks.show_figure(figure, alt, config.label)

# %% [markdown]
# ## The effect of each parameter
#
# One panel for each parameter, one dot for each point. If the space has two parameters, the table
# below the figure shows how they act together.

# %%
keys = list(sweep["space"])
varied = pd.DataFrame([{**row["varied"], metric: row["value"]} for row in points])
varied = varied.map(lambda value: ", ".join(value) if isinstance(value, list) else value)
figure, panels = plt.subplots(1, len(keys), figsize=(8, 3), sharey=True, squeeze=False)
for panel, key in zip(panels[0], keys, strict=True):
    panel.plot(varied[key].astype(str), varied[metric], "o", color="#4c72b0")
    panel.set(xlabel=key)
panels[0][0].set(ylabel=metric)
panels[0][0].set_title(f"{metric} is {direction}d at {analysis.label(best)}", fontsize=10)
alt = f"{metric} over {', '.join(keys)}; the best point is {analysis.label(best)}."
notebooks.show_figure(figure, alt, config.label)

# %%
varied.pivot_table(index=keys[0], columns=keys[1:], values=metric).round(4)

# %% [markdown]
# If the best value lies at the edge of the space, the space was too small: extend the next sweep in
# that direction.
#
# *Importance* is how much of the variance reduction in a random forest fitted to the points is due
# to a parameter. The shares add up to 1 even if all points are equally good and the forest fits
# noise, so they are shown only if the best point is better than another. They describe this space
# only: a parameter that was hardly varied cannot be important.

# %%
print(f"at the edge of the space: {', '.join(analysis.at_an_edge(exported, best)) or 'nothing'}")
better = sum(row["verdict"] == "better" for row in compared)
shares = pd.Series(exported["importance"] if better else {}, name="importance", dtype=float)
shares.to_frame().round(3) if len(shares) else "not shown: no point is better, or too few points"

# %% [markdown]
# ## The winning configuration
#
# A whole recipe, including the sweep's overlay. Save it as `configs/<name>.yaml` to use it with
# `--config <name>` in every notebook and tool.

# %%
winning = analysis.winner_yaml(exported, best)
artifacts.write_lines(out / "winner.yaml", [winning.rstrip()])
print(winning)

# %% [markdown]
# ## The cost
#
# Hours of one device, a GPU or a share of the cores, summed over all trials, including those that
# failed or were interrupted. The table shows the average time of a run by stage: cells that train
# or generate, and all others.

# %%
print(f"{exported['device_hours']:.2f} device hours")
parts = pd.DataFrame([run["parts"] for row in points for run in row["runs"].values()])
parts.mean().rename("seconds per run").to_frame().round(1) if len(parts.columns) else "not timed"

# %% [markdown]
# ## The evaluation on the test prompts
#
# The dev prompts were used to choose the winner, so its score on them is biased upwards. If all
# points are equally good, a bootstrap over prompts and seeds shows by how much; if the best one is
# really better, it is less. The test prompts are evaluated once, for the winner only. Each
# evaluation is recorded in the study before it starts; after more than one, the last score is no
# longer unbiased.

# %%
if metric == analysis.BY_PROMPT:
    optimism = 100 * analysis.winners_optimism(points)
    print(f"best of {len(points)}: too high by up to {optimism:.1f} points by chance alone")
evaluations = exported["test_evaluations"]
final = (exported["final"] or {}).get("metrics", [])
assert len(evaluations) <= 1 or final, "several test-set evaluations, but no result"
print(f"test-set evaluations: {len(evaluations)}")
for evaluation in evaluations:
    print(f"  {evaluation['at']}: trial {evaluation['trial']}, seed {evaluation['seed']}")
columns = ["model", "format", "n", "prompt_level_strict_acc", "ci95", "eos_rate"]
shown = pd.DataFrame(final, columns=columns)
shown["ci95"] = [f"{low:.3f} to {high:.3f}" for low, high in shown["ci95"]]
shown.round(3) if final else "the winner has not been evaluated on the test prompts"

# %%
tested = f"better than {better} of the {len(compared)} other points"
if not compared or compared[0]["p_seeds"] is None:
    tested = "not tested: there is only one point, or one seed"
headline.update(
    Markdown(
        f"**{analysis.label(best)} is first with {metric} {best['value']:.3f}, {tested}.** "
        f"{len(points)} points x {len(sweep['seeds'])} seeds, {exported['device_hours']:.2f} "
        f"device hours, {len(evaluations)} test-set evaluation(s)."
    )
)

# %% [markdown]
# ## Summary
#
# Every point with its noise, and tests of the seeds and of the prompts that are corrected for the
# number of points.
#
# **What did not work:** sorting a table. With a dozen points and a few dozen prompts, the first row
# is usually one of several that cannot be distinguished. The pairs are therefore tested, and the
# test prompts are not used until the choice is made.
#
# **Next:** [03_sft_train](03_sft_train.ipynb) with the winning configuration, on all the data.

# %%
notebooks.keep("05_sweep_report", out)
