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
# A sweep runs the same notebooks many times with other values. Its table always has a best row,
# even where all rows are the same and only chance differs; so the question of this page is not
# which row is on top, but whether the top row is *better* than the others.
#
# Two things keep the answer honest. Every point was trained with several **seeds**, which shows how
# much a number moves when nothing but chance changes. And every point was judged on **dev
# prompts**, none of which is a test prompt: whoever picks the best of many on the test set has
# measured their own luck.
#
# **What you will see:** every point with its noise; which differences are real; the losses; how the
# parameters act; the winning configuration; what all of it has cost.
# **In:** `study.json`, the sweep's study as `tools.sweep` exports it, whatever storage it lives in.
# **Out:** `winner.yaml`, a configuration that is ready to use.

# %% tags=["parameters"]
CONFIG = "sft_qwen05b"
OVERLAY = ""
OUT = ""
SET = {}

# %% [markdown]
# The next cell finds the library, the one after it prints what this run is made of.

# %% tags=["bootstrap"]
import importlib.util
import subprocess
import sys
from pathlib import Path

REPOSITORY, REF = "https://github.com/agaonker/atlas", "main"
if importlib.util.find_spec("atlas_lib") is None:
    places = [Path.cwd(), *Path.cwd().parents]
    places += [found.parent for found in Path("/kaggle/input").rglob("atlas_lib")]
    homes = [str(p) for p in places if (p / "atlas_lib" / "bootstrap.py").is_file()]
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", f"git+{REPOSITORY}@{REF}"]
    if not homes and subprocess.run(pip).returncode:
        raise RuntimeError(f"pip cannot install {REPOSITORY}; Kaggle: is Settings > Internet on?")
    sys.path[:0] = homes[:1]
from atlas_lib import bootstrap

bootstrap.ensure()

# %%
import json

from IPython.display import Markdown, display

from atlas_lib import artifacts, figures, notebooks, session
from atlas_lib.config import load_config
from atlas_lib.sweep import analysis

config = load_config(CONFIG, OVERLAY, SET)
out = session.output_folder(OUT, CONFIG, OVERLAY)
if not (out / "study.json").is_file():
    raise FileNotFoundError(f"{out} holds no study.json: run `make sweep SWEEP=...` first.")
session.start(config, out)
headline = display(Markdown("*The finding appears here at the end.*"), display_id=True)

# %% [markdown]
# ## The smallest example: one point
#
# A point is one choice of values. It is trained once a seed, with everything else the same, so the
# rows below should be equal. By how much they are not is the noise that every difference further
# down has to exceed.

# %%
exported = json.loads((out / "study.json").read_bytes())
sweep = exported["sweep"]
metric, direction = sweep["objective"]["metric"], sweep["objective"]["direction"]
points = analysis.points(exported)
assert points, "no trial is complete yet"
best = points[0]
print(f"trial {best['number']}: {analysis.label(best)}")
for seed, run in best["runs"].items():
    print(f"  seed {seed}: {metric} {run[metric]:.4f}")

# %% [markdown]
# ## Nothing twice, nothing lost
#
# Workers may be killed at any moment. Whatever happened, each point counts once, with each of its
# seeds once; a trial that failed is listed with its error and takes no part in what follows.

# %%
import pandas as pd

seen = [json.dumps(row["point"], sort_keys=True) for row in points]
assert sweep["sampler"] == "tpe" or len(set(seen)) == len(seen), "a point was counted twice"
assert all(len(row["runs"]) == len(sweep["seeds"]) for row in points), "a seed is missing"
failed = [row for row in exported["trials"] if row["state"] == "FAIL" and not row["retried"]]
revived = sum(row["deaths"] > 0 for row in exported["trials"])
print(f"{len(points)} complete, {len(failed)} failed, {revived} taken over from a lost worker")
pd.DataFrame(failed)[["number", "point", "error"]] if failed else "no trial failed"

# %% [markdown]
# ## Every point with its noise
#
# The objective is the mean over the seeds, beside it the lowest and the highest. The interval of
# the strict accuracy is another kind of noise: it says how much the score would move if other
# prompts had been asked, by a bootstrap over prompts.

# %%
judged = all("verdicts" in run for row in points for run in row["runs"].values())
table = analysis.table(points, metric)
table.set_index("trial").round(4)

# %%
import matplotlib.pyplot as plt

figure, axes = plt.subplots(figsize=(7, 1.2 + 0.32 * len(points)), layout="constrained")
names = [analysis.label(row) for row in points]
for place, row in enumerate(points):
    if judged and metric == "dev_strict":
        axes.plot(analysis.strict_interval(row), [place] * 2, color="#c5c9d3", linewidth=6)
    values = [run[metric] for run in row["runs"].values()]
    axes.plot(values, [place] * len(values), "o", color="#4c72b0", alpha=0.7)
    axes.plot(row["value"], place, "|", color="#c44e52", markersize=14, markeredgewidth=2)
axes.set_yticks(range(len(points)), names)
axes.set_ylim(len(points) - 0.4, -0.6)
axes.set(xlabel=f"{metric}: seeds (dots), mean (red), 95 % over prompts (bar)")
axes.set_title(f"Best of {len(points)}: {names[0]}")
alt = f"{metric} of every point, best first, with its seeds; {names[0]} is at {best['value']:.3f}."
figures.show(figure, alt, config.label)

# %% [markdown]
# Bars that overlap do not yet mean that two points are alike: they were asked the *same* prompts,
# and only those on which they differ carry information. That is the next test.
#
# ## Is the best one better?
#
# For each prompt the two points are compared over their seeds; wins and losses are tested as coin
# flips. The best point was picked after looking at all of them, so the p-values are corrected for
# **all pairs** of points, not just the rows shown (Holm). And since a seed alone moves the score, a
# point is called better only if, in addition, its worst seed is above the other's best.

# %%
compared = analysis.comparisons(points, config.eval.alpha) if judged else []
assert all(row["verdict"] != "better" or row["p_adjusted"] < config.eval.alpha for row in compared)
shown = pd.DataFrame(compared)
if compared:
    names_of = {row["number"]: analysis.label(row) for row in points}
    shown["best against"] = [names_of[row["trial"]] for row in compared]
    shown["points"] = [f"{r['points']:+.1f}" for r in compared]
    shown["ci95"] = [f"{r['ci95'][0]:+.1f} to {r['ci95'][1]:+.1f}" for r in compared]
    shown["p"] = [f"{r['p_adjusted']:.2g}" for r in compared]
    shown = shown[["best against", "points", "ci95", "won", "lost", "p", "seeds_agree", "verdict"]]
shown if compared else "not tested: no trial was asked prompts, or there is only one point"

# %% [markdown]
# *Not distinguishable* is an answer too: among such points the cheaper or the more usual value may
# be taken with a good conscience.
#
# ## The losses
#
# One line a seed, one colour a point. Curves that run together while the scores differ, or the
# other way round, say that the loss alone would have been a poor judge.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
colors = plt.get_cmap("viridis")([place / max(1, len(points) - 1) for place in range(len(points))])
for row, color in zip(points, colors, strict=True):
    for position, run in enumerate(row["runs"].values()):
        name = analysis.label(row) if not position else None
        left.plot(*zip(*run["curve"], strict=True), color=color, label=name, linewidth=1)
        right.plot(run["validation_loss"], run[metric], "o", color=color)
left.set(xlabel="step", ylabel="training loss", title="Loss by point, best first")
right.set(xlabel="validation loss", ylabel=metric, title=analysis.agreement(points, metric))
figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=7)
alt = f"Training loss by step for {len(points)} points, and {metric} against validation loss."
figures.show(figure, alt, config.label)

# %% [markdown]
# ## How the parameters act
#
# With two listed parameters the whole surface fits into one picture. With others, every line is a
# trial, from its values on the left to what came out on the right.

# %%
figure = analysis.picture(exported, points)
figure.axes[0].set_title(f"{metric} is {direction}d at {analysis.label(best)}", fontsize=10)
alt = f"{metric} over {', '.join(sweep['space'])}; the best is {analysis.label(best)}."
figures.show(figure, alt, config.label)

# %% [markdown]
# A maximum at the edge of the picture says that the space was too small: the next sweep should go
# on in that direction.
#
# *Importance* is the share of the objective's variance that a parameter explains by itself, over
# the points that were tried (fANOVA, by a forest of regression trees). It speaks about this space
# only: a parameter that was hardly varied cannot be important.

# %%
edges = analysis.at_an_edge(exported, best)
print(f"at the edge of the space: {', '.join(edges) or 'nothing'}")
shares = analysis.importance(exported)
pd.Series(shares, name="importance").to_frame().round(3) if shares else "too few trials to say"

# %% [markdown]
# ## The winning configuration
#
# A whole recipe, the sweep's overlay included: saved as `configs/<name>.yaml` it is found by
# `--config <name>`, in every notebook and tool.

# %%
winning = analysis.winner_yaml(exported, best)
artifacts.write_lines(out / "winner.yaml", [winning.rstrip()])
print(winning)

# %% [markdown]
# ## What it has cost
#
# Hours of one device, GPU or a share of the cores, over all trials, those that were killed and
# resumed included. The second table says where an average run spends its seconds: all but training
# and answering is overhead.

# %%
hours, parts = analysis.device_hours(exported), analysis.overhead(exported)
print(f"{hours:.2f} device hours, {exported['shared_seconds'] / 3600:.2f} of them shared stages")
pd.Series(parts, name="seconds a run").to_frame().round(1) if parts else "no pages to time"

# %% [markdown]
# ## How often was the test set looked at?
#
# The dev prompts have been used up by the choice: the winner's score on them is too good by
# construction. The test prompts were kept for this one moment. Every look is recorded in the study
# before it happens; more than one, and the last number is no longer an unbiased one.

# %%
looks, final = exported["looks"], (exported["final"] or {}).get("metrics", [])
assert len(looks) <= 1 or final, "looked more than once and kept nothing"
print(f"looks at the test prompts: {len(looks)}")
for look in looks:
    print(f"  {look['at']}: trial {look['trial']}, seed {look['seed']}")
columns = ["model", "format", "n", "prompt_level_strict_acc", "ci95", "stop_rate"]
shown = pd.DataFrame(final, columns=columns)
shown["ci95"] = [f"{low:.3f} to {high:.3f}" for low, high in shown["ci95"]]
shown.round(3) if final else "the winner has not been measured there"

# %%
better = sum(row["verdict"] == "better" for row in compared)
claim = (
    f"better than {better} of the {len(compared)} other points" if judged else "not tested in pairs"
)
headline.update(
    Markdown(
        f"**{analysis.label(best)} is first with {metric} {best['value']:.3f}, {claim}.** "
        f"{len(points)} points x {len(sweep['seeds'])} seeds, {hours:.2f} device hours, "
        f"{len(looks)} look(s) at the test prompts. {config.label}"
    )
)

# %% [markdown]
# ## Summary
#
# Points, their noise, and a test that was told how many points there were to choose from.
#
# **What did not work:** sorting a table. With a dozen points and a few dozen prompts, the top row
# is usually one of several that cannot be told apart; that is why the pairs are tested and the test
# prompts are left alone until the choice is made.
#
# **Next:** [03_sft_train](03_sft_train.ipynb) with the winning configuration, on all the data.

# %%
notebooks.keep("05_sweep_report", out)
