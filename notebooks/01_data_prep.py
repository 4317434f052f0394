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
# # Cut the training slice
#
# A continuing model becomes an answering one by reading conversations. This notebook takes the few
# thousand that Atlas trains on out of a much larger collection, checks every one of them, and
# writes them down so that each later notebook sees exactly the same rows.
#
# **What you will see:** one conversation as it is stored; the slice in numbers; how long its
# answers are; and the check that nothing used for validation is also used for training.
#
# **In:** a collection of conversations (a hub dataset, a local `.jsonl`, or the embedded stand-in).
# **Out:** `01_data_prep/train.jsonl`, `val.jsonl`, `card.json` and a manifest with their hashes.

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
from IPython.display import Markdown, display

from atlas_lib import artifacts, data, notebooks, session
from atlas_lib.config import load_config

config = load_config(CONFIG, OVERLAY, SET)
out = session.output_folder(OUT, CONFIG, OVERLAY)
session.start(config, out)
headline = display(Markdown("*The finding appears here at the end.*"), display_id=True)

# %% [markdown]
# ## The smallest example: one conversation
#
# Shuffle once with a fixed seed, take the first rows for training and the rows right after them
# for validation. Only the `messages` column is kept: UltraChat's `prompt` column would make TRL
# take the rows for prompt/completion pairs.
#
# Loading also *checks*: each conversation is an optional system turn, then user and assistant in
# turn, each with text (it may be empty), the assistant last. One row that breaks this stops the
# notebook by number.

# %%
train, validation = data.load_slice(config)
for message in train[0]["messages"]:
    print(f"{message['role']:>9}: {message['content'][:160]!r}")

# %% [markdown]
# Each line is one turn. What the model will be graded on during training is the *assistant* lines,
# and only those; notebook 02 proves that token by token.
#
# ## The whole slice
#
# The recipe takes 5,000 conversations of UltraChat: several turns each, on many topics, and the
# source from which the preference data of a later phase derives. OpenHermes is mostly single-turn,
# Alpaca short. By the recipe's page 5,000 take a quarter of an hour on one T4, all 200,000 twelve;
# past that a model of half a billion parameters is said to gain little. A later phase uses about as
# many preference pairs, so that methods are compared and not amounts of data.

# %%
import pandas as pd

descriptions = {"train": data.describe(train["messages"])}
descriptions["validation"] = data.describe(validation["messages"])
pd.DataFrame(descriptions).T.rename_axis("split")

# %% [markdown]
# The two rows should look alike: same shuffle, neighbouring stretches. If the share of turns
# differed much between them, the validation loss in notebook 03 would mean little.
#
# ## How long are the answers?
#
# Length decides two things later: what `max_length` cuts off, and how much of each row the loss
# sees. Characters are enough here; notebook 02 counts tokens.

# %%
import matplotlib.pyplot as plt
import numpy as np

from atlas_lib import figures

answers = [
    len(m["content"]) for chat in train["messages"] for m in chat if m["role"] == "assistant"
]
figure, axes = plt.subplots(figsize=(7, 2.6), layout="constrained")
axes.hist(answers, bins=50, color="#4c72b0")
axes.set(xlabel="characters in one answer", ylabel="answers")
middle = f"{np.median(answers):,.0f}"
finding = f"Half of the {len(answers):,} answers are shorter than {middle} characters"
axes.set_title(finding)
figures.show(figure, f"Histogram of answer lengths. {finding}; few are very long.", config.label)

# %% [markdown]
# Read it from the right: the long tail is what truncation will cut, and an answer that is cut
# never shows the model how to stop.
#
# ## Nothing leaks from training into validation
#
# The validation rows come *after* the slice in the same shuffle, so they were never carved out of
# it. The gate below compares the texts themselves, since a collection may hold a conversation
# twice.

# %%
texts = {
    name: {str(chat) for chat in rows["messages"]}
    for name, rows in {"train": train, "validation": validation}.items()
}
repeated = texts["train"] & texts["validation"]
print(f"{len(repeated)} conversations stand in both parts")
assert len(repeated) <= 0.01 * len(validation), "validation repeats the training data"

# %% [markdown]
# A handful may repeat by chance in a large collection; more than one in a hundred would make the
# validation loss too good to be true.
#
# ## Write it down
#
# The manifest is written last and holds the hash of every file. A later notebook that finds it
# knows that the slice is whole; one that does not find it builds the slice again.

# %%
with artifacts.stage(data.STAGE, config, out) as folder:
    data.write_slice(folder, train, validation, config)

rows = {name: len(data.read(folder, name)) for name in data.FILES}
assert rows == {"train": config.data.n_samples, "validation": config.data.n_validation}
headline.update(
    Markdown(
        f"**{rows['train']:,} conversations to train on, {rows['validation']:,} to validate, "
        f"{len(repeated)} in both.** {config.label}"
    )
)

# %% [markdown]
# Kaggle gives back the files of a run but not its page; there, the next line keeps it beside them.

# %% tags=["keep"]
notebooks.keep("01_data_prep", out)

# %% [markdown]
# ## Summary
#
# The slice is cut, checked and hashed, and it is the same on every machine that starts from the
# same revision and seed.
#
# **What did not work:** feeding the rows as they come, `prompt` column included, ends in a
# `KeyError: 'completion'` inside TRL.
#
# **Next:** [02_template_audit](02_template_audit.ipynb) shows which of these words the loss sees.
