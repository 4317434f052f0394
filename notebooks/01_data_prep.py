# ---
# jupyter:
#   kaggle:
#     accelerator: none
#     isInternetEnabled: true
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
# # Select the training data
#
# A pretrained model learns to respond from conversations. This notebook selects the few thousand
# conversations that Atlas trains on from a much larger dataset, checks each of them, and writes
# them to files, so that every later notebook reads exactly the same rows.
#
# **What you will see:** one conversation as it is stored, the subset in numbers, the lengths of its
# responses, and checks that neither validation data nor a prompt of the evaluation is also training
# data.
#
# **Input:** a dataset of conversations (from the hub, a local `.jsonl`, or the offline overlay's).
# **Output:** `01_data_prep/train.jsonl`, `val.jsonl`, `card.json` and a manifest with their hashes.

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
from IPython.display import Markdown

from atlas_lib import artifacts, notebooks, stages
from atlas_lib.data_prep import subset
from atlas_lib.evaluate import overlap

config, out = notebooks.start("01_data_prep", CONFIG, OVERLAY, OUT, SET)
headline = notebooks.headline()

# %% [markdown]
# ## One conversation
#
# The dataset is shuffled once with a fixed seed. The first rows are for training and the rows right
# after them for validation. Only the `messages` column is kept: with UltraChat's `prompt` column,
# TRL would treat the rows as prompt/completion pairs.
#
# Loading also checks every conversation: an optional system turn, then user and assistant in turn,
# the assistant last, each with text as content. A row that violates this stops the notebook with
# its number.

# %%
train, validation = subset.load_subset(config)
for message in train[0]["messages"]:
    print(f"{message['role']:>9}: {message['content'][:160]!r}")

# %% [markdown]
# Each line is one turn. The loss covers the *assistant* turns only, which notebook 02 verifies
# token by token.
#
# ## The whole subset
#
# The recipe uses 5,000 conversations of UltraChat, which have several turns and many topics; the
# preference data of a later phase derives from the same source. OpenHermes is mostly single-turn,
# and Alpaca is short. According to the recipe's page, 5,000 conversations take a quarter of an hour
# on one T4 and all 200,000 twelve hours, and a model of half a billion parameters gains little from
# more. A later phase uses about as many preference pairs, so that methods are compared rather than
# amounts of data.

# %%
import pandas as pd

descriptions = {"train": subset.describe(train["messages"])}
descriptions["validation"] = subset.describe(validation["messages"])
pd.DataFrame(descriptions).T.rename_axis("split")

# %% [markdown]
# The two rows should be similar, since both splits come from the same shuffle. If their turns
# differed much, the validation loss in notebook 03 would not be comparable with the training loss.
#
# ## Lengths of the responses
#
# Length determines what `max_length` truncates and which share of each row enters the loss.
# Characters suffice here; notebook 02 counts tokens.

# %%
import matplotlib.pyplot as plt
import numpy as np

messages = [message for chat in train["messages"] for message in chat]
lengths = [len(m["content"]) for m in messages if m["role"] == "assistant"]
finding = (
    f"Half of the {len(lengths):,} responses have at most {np.median(lengths):,.0f} characters"
)
figure, axes = plt.subplots(figsize=(7, 2.6), layout="constrained")
axes.hist(lengths, bins=50, color="#4c72b0")
axes.set(title=finding, xlabel="characters in one response", ylabel="responses")
alt = f"Histogram of the lengths of responses. {finding}; few are very long."
notebooks.show_figure(figure, alt, config.label)

# %% [markdown]
# The long tail on the right is what truncation will cut, and a truncated response never shows the
# model where to stop.
#
# ## No leak from training into validation
#
# The splits do not overlap by construction, but a dataset may contain a conversation twice. The
# check therefore compares the texts.

# %%
texts = [{str(chat) for chat in split["messages"]} for split in (train, validation)]
repeated = texts[0] & texts[1]
near = overlap.near_duplicates(train["messages"], validation["messages"])
print(f"{len(repeated)} conversations are in both splits")
print(
    f"{len({pair['validation'] for pair in near})} of {len(validation):,} validation conversations "
    f"share at least {overlap.NEAR:.0%} of their {overlap.N}-grams with one for training"
)
assert len(repeated) <= 0.01 * len(validation), "validation repeats the training data"

# %% [markdown]
# A few may repeat by chance in a large dataset. If more than one in a hundred did, the validation
# loss would be too optimistic. A 13-gram is a run of 13 words, in any case and punctuation;
# near-duplicates are reported and kept.
#
# ## Overlap with the evaluation's prompts
#
# If the training data held a test prompt, the score would measure memory. The user turns are
# therefore compared with the prompts of notebook 04 and with the dev prompts that choose the point
# of a sweep: *exact* means the same words, *13-gram* any 13 words in a row in common.

# %%
prompts = overlap.evaluation_texts(config)
overlaps = {name: overlap.prompt_overlaps(train["messages"], prompts[name]) for name in prompts}
overlap.overlap_table(overlaps, prompts)

# %% [markdown]
# The `rows` and `prompts` columns count conversations and prompts that overlap at least once. A
# 13-gram need not be a leak: the wording of an instruction ("your entire response should be in
# English and in all lowercase letters") is one as well, and the offline overlay's training turns
# and prompts share such wording by design, with other topics. The published recipe keeps all rows;
# `data.exclude_overlap` drops those that overlap with `eval.prompts`.

# %%
dropped = {pair["row"] for pair in overlaps.get(config.eval.prompts, [])}
excluded = dropped if config.data.exclude_overlap else set()
train = train.select([row for row in range(len(train)) if row not in excluded])
print(f"{len(excluded)} conversations are left out, {len(train):,} remain")

# %% [markdown]
# ## Write the files
#
# The manifest is written last and contains the hash of every file. A later notebook that finds it
# uses these files; one that does not find it selects the data again.

# %%
with artifacts.stage(stages.DATA_PREP, config, out) as folder:
    subset.write_subset(folder, train, validation, config, excluded)

rows = {split: len(subset.read_subset(folder, split)) for split in subset.SPLIT_FILES}
expected = config.data.n_samples - len(excluded)
assert rows == {"train": expected, "validation": config.data.n_validation}
headline.update(
    Markdown(
        f"**{rows['train']:,} conversations for training, {rows['validation']:,} for validation, "
        f"{len(repeated)} in both, {len(excluded)} left out for overlap.**"
    )
)

# %% [markdown]
# Kaggle returns the files of a run but not its notebook; there, the next cell stores it with them.

# %% tags=["keep"]
notebooks.keep("01_data_prep", out)

# %% [markdown]
# ## Summary
#
# The subset is selected, checked and hashed. It is the same on every machine that uses the same
# revision and seed.
#
# **What did not work:** passing the rows to TRL with their `prompt` column fails with
# `KeyError: 'completion'`.
#
# **Next:** [02_template_audit](02_template_audit.ipynb) shows which of these tokens enter the loss.
