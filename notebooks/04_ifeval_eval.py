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
# # Measure whether it follows instructions
#
# IFEval asks for things that a program can check: no commas, exactly three bullets, an answer in
# quotation marks. Here the base model, the fine-tuned one and the vendor's own Instruct answer the
# same prompts, greedily, and Google's own checkers (as lm-eval ships them) say who did what was
# asked.
#
# Each model is asked twice: **raw**, the bare prompt, as the published scores were taken, and
# **chat**, in the template that the fine-tuning used. Published scores for this recipe exist only
# raw, so the fine-tuned model was never asked in the language that it had been taught.
#
# **What you will see:** one prompt and its verdict; the rule for the words "better" and "clear",
# fixed before any answer is read; the grid of models and formats; the differences with their
# intervals; which instruction types moved; wins and losses to read; and what it would take to see
# a smaller effect.
# **In:** the adapter of notebook 03 (or `models.adapter`) and the prompts. **Out:**
# `04_ifeval_eval/responses/`, `scores/`, `ifeval.json`, and `metrics.json`.

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
import math

from IPython.display import Markdown, display

from atlas_lib import artifacts, devices, models, notebooks, session
from atlas_lib.config import load_config
from atlas_lib.evaluate import grid, guardrails, ifeval, significance

config = load_config(CONFIG, OVERLAY, SET)
out = session.output_folder(OUT, CONFIG, OVERLAY)
session.start(config, out)
device = devices.choose_device(config)
print(f"{device.name}, {device.dtype}: {device.reason}")
headline = display(Markdown("*The finding appears here at the end.*"), display_id=True)

# %% [markdown]
# ## The smallest example: one prompt, one verdict
#
# Each prompt carries one to three instructions. *Strict* takes the answer as it is; *loose* also
# accepts it without its first or last line or without asterisks. A prompt counts as passed when all
# of its instructions are.

# %%
ifeval.ensure_punkt()  # before anything long: some checkers need it, and they come last
prompts = grid.load_prompts(config)
print(prompts[0]["prompt"])
for answer in ("", "Yes, of course, here it is."):
    verdict = ifeval.score(prompts[:1], [answer])[0]
    print(repr(answer), dict(zip(verdict["instruction_id_list"], verdict["strict"], strict=True)))

# %% [markdown]
# An empty answer never passes, even where silence would satisfy the rule. Verdicts are the same in
# every run: the two checkers that draw random letters and the language detector are seeded.
#
# ## The rule, before the answers
#
# Both models answer the *same* prompts, so only those on which they differ carry information.
# McNemar's exact test asks whether wins and losses among them could be coin flips. One comparison
# is the primary one, fixed here: **SFT against base, both in the chat format**. The secondary one
# is the published protocol, raw against raw. All others are corrected together (Holm), since
# whoever looks often enough finds something.

# %%
alpha, margin = config.eval.alpha, config.eval.clear_margin
print(f"p >= {alpha:g}: 'not distinguishable'; otherwise")
print(f"  at least {math.ceil(margin * len(prompts))} more wins than losses: 'clear margin'")
print(f"  ({margin:.1%} of the {len(prompts)} prompts), fewer: 'better, but small'")
print("  more losses than wins: 'worse'")
for discordant in (20, 40, 60, 100):
    wins = int(significance.wins_needed(discordant, alpha))
    print(f"of {discordant} prompts on which two models differ, {wins} wins are significant")

# %% [markdown]
# ## Whose answers?
#
# The adapter comes from notebook 03, which is run now if it has not been; `models.adapter` names
# another one, by path or hub id, and then nothing is trained.


# %%
def train(config, out: Path) -> Path:
    """The page of 03 is the only place that trains: run it."""
    page = notebooks.execute("03_sft_train", out, parameters)
    print(f"trained by {page}")
    return out / "03_sft_train"


parameters = {"CONFIG": CONFIG, "OVERLAY": OVERLAY, "SET": SET}
trained = None if config.model.adapter else artifacts.require("03_sft_train", config, out, train)
adapter = config.model.adapter or trained / "adapter"

# %% [markdown]
# ## Ask everybody
#
# All models answer on weights of the same precision, so that only the adapter differs, and it is
# merged into them. In float32 merging changes no token (the tests show it row for row); in half
# precision a near tie between two tokens may fall the other way.
#
# The answer is cut at the first stop token before it is turned into text. As soon as one is
# finished it is on disk, in `answers/`, and the next prompt takes its place in the batch. A run
# that dies goes on with what is missing. On a machine with two GPUs the models are spread over
# both.

# %%
answered = grid.ask_all(parameters, device, adapter, prompts, out)
verdicts = {
    row: ifeval.score(prompts, [answer["response"] for answer in answers])
    for row, answers in answered.items()
}
assert all(len(rows) == len(prompts) for rows in verdicts.values()), "somebody did not answer"

# %% [markdown]
# ## The grid
#
# Four accuracies a row, and what confounds them: how many answers hit the length limit, ended with
# `<|im_end|>`, go round in circles, are empty; how long they are, and how many different ones there
# are. A model that says the same thing to everybody passes some instructions without having read
# any.

# %%
import pandas as pd

metrics = ifeval.measure(answered, verdicts)
columns = ["n", *ifeval.ACCURACIES, "ci95", "inst_ci95", "at_cap", "stop_rate", "repetition"]
columns += ["empty", "mean_length", "distinct"]
table = pd.DataFrame(metrics).set_index(["model", "format"])[columns].T.astype(object)
for interval in ("ci95", "inst_ci95"):
    table.loc[interval] = [f"{low:.3f} to {high:.3f}" for low, high in table.loc[interval]]
if not config.model.instruct:
    table["Instruct", "any"] = "not run"
table.map(lambda value: f"{value:.3f}" if isinstance(value, float) else value)

# %% [markdown]
# `ci95` is Wilson's interval of the prompt-level strict accuracy; `inst_ci95` that of the
# instruction level, a bootstrap over prompts, since the instructions of one prompt share one
# answer. Compare rows of the same format first; the jump from raw to chat within a model says how
# much the wording of the question does.
#
# Others have measured some of these rows. Where model and protocol are the same, ours should agree.
# All published figures of this recipe were asked raw: the fine-tuned model was never asked in the
# format that it had been trained in.

# %%
published = grid.published(config)
for row in published:
    ours = next((m for m in metrics if all(m[k] == row[k] for k in ("model", "format"))), None)
    row["ours"] = "not run" if ours is None else f"{ours['prompt_level_strict_acc']:.4f}"
    inside = ours is not None and ours["ci95"][0] <= row["value"] <= ours["ci95"][1]
    row["agrees"] = ("yes" if inside else "no") if ours and row["should_agree"] else "-"
pd.DataFrame(published) if published else "nobody has published figures for this model and data"

# %% [markdown]
# ## More than noise?
#
# Points are percentage points of prompt-level strict accuracy, their intervals a bootstrap over
# prompts. `won` and `lost` are the prompts that only the second or only the first model passed.

# %%
compared = significance.comparisons(verdicts, alpha, margin)
for row in compared:
    row["comparison"] = f"{' '.join(row['b'])} against {' '.join(row['a'])}"
primary = next((row for row in compared if row["role"] == "primary"), compared[0])
shown = pd.DataFrame(compared).set_index("comparison").drop(columns=["won", "lost"])
shown["difference"] = [significance.in_points(row) for row in compared]
shown["p"] = [f"{p:.2g}" for p in shown["p_adjusted"]]
shown = shown.rename(columns={"only_b": "won", "only_a": "lost"})
shown[["role", "difference", "won", "lost", "both", "neither", "p", "verdict"]]

# %%
import matplotlib.pyplot as plt

from atlas_lib import figures

figure, axes = plt.subplots(figsize=(7, 0.8 + 0.35 * len(compared)), layout="constrained")
upwards = compared[::-1]
for position, row in enumerate(upwards):
    color = "#c44e52" if row is primary else "#4c72b0"
    axes.plot(row["difference_ci95"], [position] * 2, color=color)
    axes.plot(row["difference_points"], position, "o", color=color)
axes.axvline(0, color="#8c8c8c", linewidth=0.8)
axes.set_yticks(range(len(compared)), [row["comparison"] for row in upwards])
axes.set(xlabel="difference in points, 95 % interval")
axes.set(ylim=(-0.6, len(compared) - 0.4))
axes.set_title(f"{primary['comparison']}: {primary['verdict']}")
points = [f"{row['comparison']} {row['difference_points']:+.1f}" for row in compared]
figures.show(figure, f"Differences with intervals, in points: {'; '.join(points)}.", config.label)

# %% [markdown]
# An interval that crosses the line leaves the direction open. The red one is the comparison that
# was fixed beforehand; it is the one that the headline reports.
#
# ## Which instructions moved?
#
# Some types pass by accident: a model that repeats one short sentence uses no commas. So the
# single bars are there to be looked at, and the verdict is taken on all prompts together. Types
# marked with a dot are the ones that the training data teaches, where that is known.

# %%
form = primary["b"][1]
taught = set(config.offline.taught if config.data.dataset.startswith("embedded:") else [])
by_type = {row["model"]: row["by_type"] for row in metrics if row["format"] == form}
shares = pd.DataFrame(
    {name: {kind: p / n for kind, (p, n) in by_type[name].items()} for name in by_type}
)
shares = shares.rename(lambda kind: f"{'• ' if kind in taught else ''}{kind}").sort_values("SFT")
gained = int((shares["SFT"] > shares["base"]).sum())
colors = ["#c5c9d3", "#4c72b0", "#8c8c8c", "#dd8452"]
axes = shares.plot.barh(figsize=(8, 7), width=0.8, color=colors[: len(by_type)])
axes.set(xlabel=f"share followed ({form}, strict)", ylabel="")
finding = f"SFT follows {gained} of {len(shares)} instruction types more often than base"
axes.set_title(finding)
figures.show(axes.figure, f"Share followed, by type and model. {finding}.", config.label)

# %% [markdown]
# A type near zero for everybody is one that the fine-tuning data does not contain. It stays in the
# picture, and in the average. In the offline stand-in the base has read requests and answers as
# plain text, as every pretrained model has; what the fine-tuning adds is the chat format and when
# to stop, and that is why its raw rows differ much less than its chat rows.
#
# Per type, the same four counts as above, for the primary comparison:

# %%
types = pd.DataFrame(primary["by_type"]).T.rename(columns={"only_b": "won", "only_a": "lost"})
types.assign(net=types["won"] - types["lost"]).sort_values("net", ascending=False)

# %% [markdown]
# ## Wins and losses, read aloud
#
# Numbers hide what happened. Five prompts that only the second model of the primary comparison
# passed, and five that it lost, with the instruction that the other one failed.

# %%
place = {prompt["key"]: index for index, prompt in enumerate(prompts)}
a, b = tuple(primary["a"]), tuple(primary["b"])
for heading, keys, failing, passing in (("WON", "won", a, b), ("LOST", "lost", b, a)):
    for key in primary[keys][:5]:
        index = place[key]
        names, strict = (verdicts[failing][index][k] for k in ("instruction_id_list", "strict"))
        failed = [name for name, ok in zip(names, strict, strict=True) if not ok]
        print(f"{heading} {prompts[index]['prompt'][:300]!r}")
        print(f"  {' '.join(passing)}: {answered[passing][index]['response'][:240]!r}")
        print(f"  {' '.join(failing)}: {answered[failing][index]['response'][:240]!r}")
        print(f"  failed by {' '.join(failing)}: {', '.join(failed)}\n")

# %% [markdown]
# ## What would it take to see less?
#
# A test that finds nothing has not shown that there is nothing. With as many differing prompts as
# there were, a net win below the first number could not have been significant; to find an effect of
# the observed size four times out of five, the second number of prompts is needed.

# %%
seen = significance.sensitivity(primary, len(prompts), alpha)
print(f"{primary['comparison']}: {primary['only_b']} wins, {primary['only_a']} losses")
print(f"smallest net win that would have been significant: {seen['net_needed']}")
print(f"prompts needed to find an effect of this size with {seen['power']:.0%} power:", end=" ")
print(seen["prompts_needed"] or "no effect was seen")
subset = [i for i, p in enumerate(prompts) if set(p["instruction_id_list"]) <= taught]
on_taught = ifeval.measure(answered, verdicts, subset) if subset else []

# %% [markdown]
# Where it is known which types the training data teaches, the picture on the prompts that ask for
# nothing else should be plain; on the others nothing is expected.

# %%
pd.DataFrame(on_taught)[["model", "format", *columns]] if on_taught else "not known for this data"

# %% [markdown]
# ## What should not have moved
#
# Knowledge and arithmetic are not what this fine-tuning teaches. `eval.guardrails` asks MMLU, GSM8K
# and TruthfulQA as the published recipe did, which takes hours; nothing is expected to move by more
# than a point or two.

# %%
guarded = []
for name in grid.model_names(config) if config.eval.guardrails else []:
    answering = grid.load(name, config, device, adapter)
    rows = guardrails.measure(answering, models.load_tokenizer(config), batch_size=8)
    guarded += [{"model": name, **row} for row in rows]
for row in guarded:
    row["published"] = guardrails.PUBLISHED[row["task"]].get(row["model"])
pd.DataFrame(guarded) if guarded else "not run: eval.guardrails is off"

# %% [markdown]
# ## Write it down
#
# One object a model and format in `metrics.json`, each with what it takes to find the run again.

# %%
origin = {"config_digest": config.digest(), "commit": session.commit(), "data": config.eval.prompts}
origin |= {"hardware": devices.hardware(), "label": config.label}
results = {"metrics": metrics, "comparisons": compared, "taught_types": on_taught}
results |= {"sensitivity": seen, "guardrails": guarded, "published": published, **origin}

with artifacts.stage("04_ifeval_eval", config, out, [trained] if trained else []) as folder:
    for (name, how), answers in answered.items():
        keyed = [{"key": p["key"], "prompt": p["prompt"]} for p in prompts]
        keyed = [asked | answer for asked, answer in zip(keyed, answers, strict=True)]
        artifacts.write_jsonl(folder / "responses" / f"{name}-{how}.jsonl", keyed)
        artifacts.write_jsonl(folder / "scores" / f"{name}-{how}.jsonl", verdicts[name, how])
    artifacts.write_json(folder / "ifeval.json", results)
artifacts.write_json(out / "metrics.json", [row | origin for row in metrics])

# %%
scores = {(row["model"], row["format"]): row["prompt_level_strict_acc"] for row in metrics}
headline.update(
    Markdown(
        f"**{primary['comparison']}: {primary['verdict']}.** Prompt-level strict accuracy "
        f"{scores[a]:.3f} to {scores[b]:.3f} on {len(prompts)} prompts, "
        f"{significance.in_points(primary)}; {primary['only_b']} won, {primary['only_a']} lost, "
        f"p = {primary['p_adjusted']:.2g}. {config.label}"
    )
)

# %% [markdown]
# Kaggle gives back the files of a run but not its page; there, the next line keeps it beside them.

# %% tags=["keep"]
notebooks.keep("04_ifeval_eval", out)

# %% [markdown]
# ## Summary
#
# The same prompts, the same checkers, every model in two formats, and a paired test whose rule was
# fixed before the answers were read.
#
# **What did not work:** reading a table of two averages. The published difference between base and
# SFT for this recipe, taken raw, is two prompts of 541, from which nothing can be concluded.
#
# **Next:** change a value in [03_sft_train](03_sft_train.ipynb) by `SET` and see whether it moves.
