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
# # Audit what the loss sees
#
# Fine-tuning minimises a loss over *some* of the tokens of a conversation. Which ones is decided
# by a mask that nobody looks at, and when it is wrong nothing fails: the loss still falls, the
# model just learns something else. Published attempts at this very run went wrong here. One
# trained on the user's turns too, because a default was off; one had a mask of zeros, because
# Qwen's template does not mark the assistant's turns.
#
# This notebook computes the mask in two independent ways, for every token of every conversation,
# and hands notebook 03 a fingerprint of the labels that it must find in its trainer.
#
# **What you will see:** three tokens, one conversation in colour, the whole slice in numbers, and
# the gate. **In:** the slice of notebook 01. **Out:** `02_template_audit/sft_template_audit.jsonl`
# (a row a conversation) and `summary.json`. No weights are loaded here, and no TRL.

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
from IPython.display import HTML, Markdown, display

from atlas_lib import artifacts, audit, data, models, notebooks, session, template
from atlas_lib.config import load_config

config = load_config(CONFIG, OVERLAY, SET)
out = session.output_folder(OUT, CONFIG, OVERLAY)
session.start(config, out)
headline = display(Markdown("*The finding appears here at the end.*"), display_id=True)

# %% [markdown]
# ## The smallest example: three tokens
#
# A language model sees `a b c` and is asked, at each place, for the next token. Cross-entropy
# averages over all places whose *label* is not -100. So a mask is nothing but a list of labels in
# which the tokens that we do not want to teach are replaced by -100.

# %%
for mask in ([True, True, True], [False, False, True]):
    print(mask, "->", template.labels_of([11, 12, 13], mask, max_length=1024))

# %% [markdown]
# In the second line only the third token is learned, but the model still *reads* the first two.
# That is assistant-only loss: the question is context, the answer is the lesson.
#
# ## The template, and the markers that it lacks
#
# The weights are the pretrained ones; the tokenizer is the Instruct model's, since it brings the
# chat template. The template writes a conversation as text. To tell which part of the text is the
# assistant's, it needs `{% generation %}` markers, and Qwen2.5's has none. The patch below puts
# them around exactly the tokens that the model has to emit after `<|im_start|>assistant` and a
# newline: the content and `<|im_end|>`. Not the newline before, which is part of the prompt, and
# not the one after, which comes when the model has already stopped.

# %%
source = artifacts.require(data.STAGE, config, out, data.prepare)
conversations = data.read(source)
tokenizer = models.load_tokenizer(config)
original = tokenizer.chat_template
print("patched:", template.patch_chat_template_for_assistant_mask(tokenizer))
print("patched again:", template.patch_chat_template_for_assistant_mask(tokenizer))
print("stop ids", models.stop_ids(tokenizer), "· pad", tokenizer.pad_token_id)
print("vocabulary of tokenizer and weights:", models.check_vocabulary(tokenizer, config)[:16])

text = tokenizer.apply_chat_template(conversations[0], tokenize=False)
before = tokenizer.apply_chat_template(conversations[0], tokenize=False, chat_template=original)
assert text == before, "the patch changed the rendered text"

# %% [markdown]
# The text that comes out is the same to the byte; the audit below holds that for every conversation
# of the slice. Only the bookkeeping changed.
#
# ## One conversation, coloured
#
# Tokens on green are learned, the others are only read. In a terminal, and where colours are taken
# out, the same strip is plain text with the learned tokens between ⟦ and ⟧.


# %%
import html
import re


def show_strip(row: dict) -> HTML:
    """The head of one audit row as coloured tokens."""
    style = {1: "background:#b7e4c7;color:#000", 0: ""}
    pairs = zip(row["decoded_head"], row["assistant_mask_head"], strict=True)
    spans = (f'<span style="{style[m]}">{html.escape(token)}</span>' for token, m in pairs)
    return HTML(f'<pre style="white-space:pre-wrap">{"".join(spans)}</pre>')


shortest = min(conversations, key=lambda chat: len(str(chat)))
row = next(audit.audit_rows(tokenizer, original, [shortest], config))
pairs = zip(row["decoded_head"], row["assistant_mask_head"], strict=True)
plain = "".join(f"⟦{token}⟧" if supervised else token for token, supervised in pairs)
print(re.sub("⟧⟦", "", plain))
show_strip(row)

# %% [markdown]
# Every green run that is shown whole starts with the first word of an answer and ends with
# `<|im_end|>`. If the end were missing, the model would never learn to stop; if it started one
# token early, it would be graded on a newline that at inference time is already there.
#
# ## The whole slice, against an independent reference
#
# The mask above comes from the markers. The reference never sees them: it reads the text that the
# *unpatched* template renders, finds `<|im_start|>assistant`, newline, anything up to `<|im_end|>`
# by the grammar of ChatML, and maps those characters to tokens by the tokenizer's offsets. Two
# ways to be wrong would have to agree on every token to slip through.
#
# A message that itself contains a special token can forge a turn. Such rows are left out, counted
# and listed.

# %%
with artifacts.stage(audit.STAGE, config, out, [source]) as folder:
    rows = audit.audit_rows(tokenizer, original, conversations, config)
    summary = audit.write_audit(folder, rows, config)

import pandas as pd

counts = {key: f"{summary[key]:,}" for key in ("rows", *audit.COUNTED)}
pd.DataFrame({"count": counts | {"supervised_share": f"{summary['supervised_share']:.1%}"}})

# %% [markdown]
# `rows_failed` is the line that matters: in how many rows the two masks differ anywhere.
# `straddling` counts tokens that hold both the newline before an answer and its first characters;
# they count as learned, since without them the first word would not be.
#
# ## Ours beside TRL's
#
# TRL brings a marked template of its own. It puts the markers around the newline before the answer
# and the one after `<|im_end|>` as well: the first belongs to the prompt, the second comes when the
# model has already stopped. Neither hurts much; both are tokens that the model never has to emit.

# %%
extra, turns = summary["n_supervised_by_trl"] - summary["n_supervised"], summary["turns"]
print(f"TRL's would train {extra:,} more tokens: {extra / turns:.2f} in each of {turns:,} turns")

# %% [markdown]
# Two a turn is what the description above predicts. It is less where truncation cuts a turn, or
# where the newline has merged with the first word.
#
# ## What truncation costs
#
# Rows longer than `max_length` tokens lose their end, and with it the `<|im_end|>` of the turn that
# was cut. The model reads the beginning of an answer and never sees it stop.

# %%
import matplotlib.pyplot as plt

from atlas_lib import figures

histogram, limit = summary["length_histogram"], summary["max_length"]
figure, axes = plt.subplots(figsize=(7, 2.6), layout="constrained")
axes.stairs(histogram["counts"], histogram["edges"], fill=True, color="#4c72b0")
axes.axvline(limit, color="#c44e52", linestyle="--")
axes.set(xlabel="tokens in one conversation (dashed: max_length)", ylabel="conversations")
finding = f"{summary['rows_truncated']:,} of {summary['rows']:,} conversations are cut at {limit:,}"
axes.set_title(finding)
figures.show(figure, f"Histogram of conversation lengths. {finding} tokens.", config.label)

# %% [markdown]
# Everything right of the dashed line is thrown away. The count of `turns_cut` says how many answers
# lose their stop that way.
#
# ## The gate
#
# Notebook 03 refuses to train if one row failed, if this audit is missing, or if it was made from
# another slice, tokenizer or length.

# %%
assert summary["rows_failed"] == 0, summary["errors"]
assert summary["rows_ok"] > 0, "nothing to train on"
assert "trl" not in sys.modules, "the audit has to be independent of the trainer"
headline.update(
    Markdown(
        f"**Template and reference agree on all {summary['n_tokens']:,} tokens of "
        f"{summary['rows'] - summary['rows_excluded']:,} conversations; "
        f"{summary['supervised_share']:.0%} of them are learned, "
        f"{summary['rows_excluded']} rows are left out.** {config.label}"
    )
)

# %% [markdown]
# Kaggle gives back the files of a run but not its page; there, the next line keeps it beside them.

# %% tags=["keep"]
notebooks.keep("02_template_audit", out)

# %% [markdown]
# ## Summary
#
# The labels that the loss will see are known, row by row, before a single weight is loaded.
#
# **What did not work:** trusting the default. Asking the unpatched template for an assistant mask
# returns zeros and no error.
#
# **Next:** [03_sft_train](03_sft_train.ipynb) trains, after it has found these labels in its
# trainer.
