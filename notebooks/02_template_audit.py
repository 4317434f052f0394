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
# # Audit the loss mask
#
# Fine-tuning minimises a loss over *some* of the tokens of a conversation. A mask determines which
# ones, and nothing fails when it is wrong: the loss still falls, but the model learns something
# else. Published attempts at this very run went wrong here. One also trained on the user's turns,
# because a default was off; in another the mask was all zeros, because Qwen's template does not
# mark the assistant's turns.
#
# This notebook computes the mask in independent ways, for every token of every conversation,
# and stores a hash of each row's labels, which notebook 03 compares with its trainer's.
#
# **What you will see:** a mask on three tokens, one conversation in colour, the whole subset in
# numbers, and the gate.
#
# **Input:** the subset of notebook 01. **Output:** `02_template_audit/sft_template_audit.jsonl`
# (one row per conversation) and `summary.json`. Neither model weights nor TRL are loaded.

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
from IPython.display import HTML, Markdown

from atlas_lib import artifacts, models, notebooks, stages
from atlas_lib.data_prep import subset
from atlas_lib.loss_mask import audit, labelling, markers, page, token_rows
from atlas_lib.loss_mask.turns import STATUS, ChatTemplate

config, out = notebooks.start("02_template_audit", CONFIG, OVERLAY, OUT, SET)
headline = notebooks.headline()

# %% [markdown]
# ## Three tokens
#
# A language model reads `a b c` and predicts the next token at each position. Cross-entropy
# averages over all positions whose *label* is not -100. A mask is therefore a list of labels in
# which -100 replaces every token that should not be learned.

# %%
for mask in ([True, True, True], [False, False, True]):
    print(mask, "->", labelling.labels_of([11, 12, 13], mask, max_length=1024))

# %% [markdown]
# In the second line only the third token is learned, but the model still *reads* the first two.
# This is assistant-only loss: the question is context, the response is the target.
#
# ## What must the model emit?
#
# The weights are the pretrained ones; the tokenizer is the Instruct model's, because it has the
# chat template, which renders a conversation as text. The template itself defines the target. At
# inference, the server renders the messages so far with the generation prompt, and the model
# continues until the stop token. So for each assistant message the *prompt* is what the server
# would send, and the target is what follows in the answered conversation, up to the stop.

# %%
source = artifacts.require(stages.DATA_PREP, config, out, subset.prepare_subset)
conversations = subset.read_subset(source)
tokenizer = models.load_tokenizer(config)
chat_template = ChatTemplate(tokenizer)
first = chat_template.turns(conversations[0])[0]
print("stop", chat_template.ending.stop, "· the prompt ends with", repr(chat_template.header))
print("prompt  ", repr(first.prompt[-60:]))
print("emission", repr(first.emission[:60]), "...", repr(first.emission[-30:]))
print(first.status, "=", STATUS[first.status])

# %% [markdown]
# A turn is *exact* if the rendered training row starts with that prompt, followed by that emission.
# Then the model learns the very tokens that it has to produce, in the very context in which it will
# have to produce them. Some templates rewrite earlier turns, for example by removing their
# reasoning; for them the audit makes one training row per turn.
#
# ## How the trainer is told
#
# `{% generation %}` markers in a template tell the trainer which part of the text is the
# assistant's, but Qwen2.5's template has none. The patch below puts them around the emission: the
# content and `<|im_end|>`. The newline before the content belongs to the prompt, and the newline
# after `<|im_end|>` comes when the model has already stopped. Any other template is left as it is,
# and its rows go to the trainer as token ids with labels.

# %%
print(markers.choose_supervision(tokenizer))
text = tokenizer.apply_chat_template(conversations[0], tokenize=False)
[before] = chat_template.render([conversations[0]])
assert text == before, "the patch changed the rendered text"

# %% [markdown]
# The rendered text is the same to the byte; the audit below checks this for every conversation.
# Two more properties of the tokenizer matter for training: decoding must stop at the token that
# ends a turn, and the vocabulary must be that of the weights.

# %%
print("decoding stops at", tokenizer.eos_token, "· padding is", tokenizer.pad_token)
print("vocabulary of tokenizer and weights:", audit.check_vocabulary(tokenizer, config), "tokens")

# %% [markdown]
# ## One conversation in colour
#
# Tokens in bold on green are learned; the others are only read.

# %%
import html
from itertools import groupby


def as_html(ids: list[int], mask: list[int]) -> HTML:
    """The tokens as text, the supervised ones in bold on green."""
    style, parts = "background:#b7e4c7;color:#000", []
    for supervised, run in groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1]):
        text = tokenizer.decode([token for token, _ in run])
        text = html.escape(notebooks.printable(text))
        parts.append(f'<b style="{style}">{text}</b>' if supervised else text)
    return HTML(f'<pre style="white-space:pre-wrap">{"".join(parts)}</pre>')


# %%
several = [chat for chat in conversations if sum(m["role"] == "assistant" for m in chat) > 1]
example = min(several or conversations, key=lambda chat: len(str(chat)))
row = token_rows.labelled(chat_template, [example])[-1]
as_html(row["input_ids"], [label != labelling.IGNORED for label in row["labels"]])

# %% [markdown]
# Every green run starts with the first token of a response and ends with the stop token.
# Without the end, the model would never learn to stop; with one token more at the start, it would
# learn a newline that the prompt already contains at inference time.
#
# ## The whole subset, by independent methods
#
# Three methods must agree on every token. *Prefixes*: the definition above, with the prompts
# rendered and tokenised. *Sentinels*: the conversation is rendered once with a placeholder for each
# text; putting the texts back shows where each response stands, without any prompt. *Markers*: the
# mask that transformers makes of the patched template, which is also compared with the grammar of
# ChatML. An error goes unnoticed only if all methods make it on the same tokens. Templates that
# look into the texts cannot be judged by sentinels; such rows are counted.
#
# A message that itself contains a special token can forge a turn. Such rows are excluded, counted
# and listed.

# %%
with artifacts.stage(stages.TEMPLATE_AUDIT, config, out, [source]) as folder:
    rows = audit.audit_rows(chat_template, conversations, config)
    summary = audit.write_audit(folder, rows, config)

# %%
import pandas as pd

counts = {key: f"{summary[key]:,}" for key in ("rows", *audit.COUNTED)}
pd.DataFrame({"count": counts | {"supervised_share": f"{summary['supervised_share']:.1%}"}})

# %% [markdown]
# The frame below holds the first conversations; open one to see each token, and beside it the mask
# of TRL's own template where that differs.

# %%
auditor = audit.Auditor(chat_template, config)
judged = list(auditor.judge(conversations[:50]))
notebooks.show_page(page.render_page(auditor, judged, config.label), "Audited rows")

# %% [markdown]
# `rows_failed` counts the conversations in which the masks differ anywhere, or that fail another
# check of the audit, such as a changed text. `straddling` counts tokens that contain both the
# newline before a response and its first characters; they are learned, since otherwise the first
# word would be lost.
#
# ## Comparison with TRL's markers
#
# TRL has marked templates of its own for some models. For Qwen2.5, its markers also include the
# newline before the response and the one after `<|im_end|>`. Neither does much harm, but the model
# never has to emit them.

# %%
extra, turns = summary["n_supervised_by_trl"] - summary["n_supervised"], summary["turns"]
if summary["n_supervised_by_trl"]:
    print(
        f"TRL's would train {extra:,} more tokens: {extra / turns:.2f} in each of {turns:,} turns"
    )
else:
    print("TRL has no marked template for this one and would refuse to train.")

# %% [markdown]
# For Qwen2.5, two per turn are expected. There are fewer where truncation cuts a turn or where the
# newline is part of the first word's token.
#
# ## The cost of truncation
#
# Rows longer than `max_length` tokens lose their end, and with it the stop token of the turn that
# was cut. The model reads the beginning of a response and never sees it end.

# %%
import matplotlib.pyplot as plt

histogram, limit = summary["length_histogram"], summary["max_length"]
finding = f"{summary['rows_truncated']:,} of {summary['rows']:,} conversations are cut at {limit:,}"
figure, axes = plt.subplots(figsize=(7, 2.6), layout="constrained")
axes.stairs(histogram["counts"], histogram["edges"], fill=True, color="#4c72b0")
axes.axvline(limit, color="#c44e52", linestyle="--")
axes.set(title=finding, ylabel="conversations")
axes.set_xlabel("tokens in one conversation (dashed: max_length)")
alt = f"Histogram of conversation lengths. {finding} tokens."
notebooks.show_figure(figure, alt, config.label)

# %% [markdown]
# Everything to the right of the dashed line is discarded; `turns_cut` counts the responses that
# lose their end.
#
# ## The gate
#
# Notebook 03 refuses to train if a row failed, or if this audit was made from another subset,
# tokenizer or length. If there is no audit yet, notebook 03 runs it first.

# %%
assert summary["rows_failed"] == 0, summary["errors"]
assert summary["rows_ok"] > 0, "nothing to train on"
headline.update(
    Markdown(
        f"**All methods agree on the {summary['n_tokens']:,} tokens of "
        f"{summary['rows'] - summary['rows_excluded']:,} conversations; "
        f"{summary['supervised_share']:.0%} of them are learned, "
        f"{summary['rows_excluded']} rows are excluded.**"
    )
)

# %% [markdown]
# Kaggle returns the files of a run but not its notebook; there, the next cell stores it with them.

# %% tags=["keep"]
notebooks.keep("02_template_audit", out)

# %% [markdown]
# ## Summary
#
# The labels that enter the loss are known for every row before any weights are loaded.
#
# **What did not work:** relying on defaults. Without the patch, the tokenizer returns an assistant
# mask of zeros, and no error.
#
# **Next:** [03_sft_train](03_sft_train.ipynb) trains, after it has found the same labels in its
# trainer.
