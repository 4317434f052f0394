# ---
# jupyter:
#   accelerator: GPU
#   colab:
#     gpuType: T4
#   kaggle:
#     accelerator: nvidiaTeslaT4
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
# # Train the base model on the assistant's tokens
#
# The pretrained model continues text. Supervised fine-tuning (SFT) teaches it to respond to
# messages: maximum likelihood on the assistant's tokens, given everything before them,
#
# $$\mathcal{L} = -\frac{1}{|A|}\sum_{t \in A} \log p_\theta(x_t \mid x_{<t}),$$
#
# where $A$ is the set of tokens that the mask of notebook 02 selects. The base weights are frozen
# and quantised to 4 bits (QLoRA: NF4 with double quantisation). The trained part is a low-rank
# update beside each attention projection, $W + \frac{\alpha}{r} B A$ with rank $r$ (LoRA).
#
# **What you will see:** the number of trained parameters and of optimizer steps, the comparison of
# the trainer's labels with the audit, the loss, and responses to the same prompts before and after.
#
# **Inputs:** the subset (01) and its audit (02).
#
# **Outputs:** `03_sft_train/adapter/`, `train_log.jsonl`, `summary.json`.

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
import math

from IPython.display import Markdown

from atlas_lib import artifacts, compat, devices, models, notebooks, stages
from atlas_lib.data_prep import subset
from atlas_lib.evaluate import decoding
from atlas_lib.export import package
from atlas_lib.loss_mask import audit, markers, token_rows
from atlas_lib.loss_mask.turns import ChatTemplate
from atlas_lib.train import adapters, hub, model_card, throughput, tracking, trl_loss

config, out = notebooks.start("03_sft_train", CONFIG, OVERLAY, OUT, SET)
device = devices.choose_device(config)
print(f"{device.name}, {device.dtype}: {device.reason}")
repo = hub.preflight(config)  # before the training, not after it
package.check_packages(config.output.export)
headline = notebooks.headline()

# %% [markdown]
# ## Gate: only audited rows reach the trainer
#
# No weights are loaded before the audit of exactly this subset, tokenizer and `max_length` has
# passed. Rows that the audit excludes are excluded here too, and they are not replaced.
#
# TRL silently drops a row when `max_length` cuts off all of its assistant tokens. The audit
# predicts these rows, so that the number of steps below does not count them.

# %%
source = artifacts.require(stages.DATA_PREP, config, out, subset.prepare_subset)
audited = audit.require_passed_audit(config, out, source)
records = audit.read_records(audited)
kept = [row["idx"] for row in records if row["verdict"] != "excluded"]
conversations = subset.read_subset(source)
validation = subset.read_subset(source, "validation")
print(f"{len(kept):,} of {len(conversations):,} conversations go to the trainer")

# %% [markdown]
# ## Smallest example: how many steps are one epoch?
#
# One optimizer step processes `batch size x gradient accumulation` rows. The published write-up of
# this recipe says "about 80 steps"; the arithmetic gives 313, and so does the trainer. The recipe
# trains for one epoch, because LoRA overfits so few rows quickly, and warms up over 3 % of the
# steps.

# %%
rows_per_step = config.train.per_device_train_batch_size * config.train.gradient_accumulation_steps
print(f"recipe: 5,000 rows / (4 x 4) = {5000 / 16} -> {math.ceil(5000 / 16)} steps")
n_rows = audit.count_training_rows(records)
steps = math.ceil(config.train.num_train_epochs * math.ceil(n_rows / rows_per_step))
steps = steps if config.train.max_steps < 0 else config.train.max_steps
print(f"this run: {n_rows:,} rows, {rows_per_step} per step -> {steps} steps")

# %% [markdown]
# ## The tokenizer
#
# The tokenizer comes from the Instruct model, because the base model has no chat template of its
# own. Both vocabularies must be identical, otherwise an id would mean different tokens to the
# tokenizer and to the weights. The patch from notebook 02 marks the assistant's tokens in Qwen2.5's
# template. The original template is kept, to be saved with the adapter. Other templates are not
# marked: the rows then go to the trainer as ids and labels.

# %%
tokenizer = models.load_tokenizer(config)
audit.check_vocabulary(tokenizer, config)
chat_template = ChatTemplate(tokenizer)
print(markers.choose_supervision(tokenizer))
print(f"{len(tokenizer):,} tokens, pad token {tokenizer.pad_token}")

# %% [markdown]
# The validation rows are audited here in the same way, so that the dashed line of the plot below
# is a loss on the right tokens too.

# %%
checked = list(audit.audit_rows(chat_template, validation, config, "validation"))
assert not [row["error"] for row in checked if row["verdict"] == "failed"]
validation = [validation[row["idx"]] for row in checked if row["verdict"] != "excluded"]

# %% [markdown]
# ## The model: 4-bit weights and a low-rank update
#
# NF4 stores each weight as one of sixteen values, spaced like the quantiles of a normal
# distribution, times a scale per block; double quantisation stores the scales in 8 bits as well.
# These weights are frozen. LoRA adds two matrices to each projection that the config lists: $A$
# maps the inputs to $r$ numbers and $B$, zero at the start, maps those to the outputs. Together
# they have `r x (inputs + outputs)` parameters. $\alpha = 2r$ keeps the scale of the update when
# $r$ changes. At the shape of Qwen2.5-0.5B, with 24 layers and hidden size 896:

# %%
attention = {"q": (896, 896), "k": (896, 128), "v": (896, 128), "o": (896, 896)}
mlp = {"gate": (896, 4864), "up": (896, 4864), "down": (4864, 896)}
for targets in (attention, attention | mlp):
    layer = sum(16 * (inputs + outputs) for inputs, outputs in targets.values())
    print(f"r=16 on {', '.join(targets)}: {layer:,} x 24 layers = {24 * layer:,}")

# %% [markdown]
# The published recipe trains the attention projections; training all seven is a variant of this
# project. At half a billion parameters the weights would fit in 16 bits as well, but larger models
# need the 4-bit path. Before the weights are downloaded, TRL's loss is adapted to the device: it
# skips the positions that carry no loss, and where its GPU kernels do not compile, it uses torch
# operations. This changes its speed and not its value.

# %%
trl_loss.fit_loss(device.name, device.dtype)
in_4bit = config.quantization.load_in_4bit
base = models.load_weights("base", config, device, in_4bit)
decoding.check_attention(base.config)  # before the training, not after it
print(base.config.architectures[0], "in", config.quantization.bnb_4bit_quant_type)

# %% [markdown]
# ## The recipe
#
# Everything under `train:` in the config is passed to TRL's `SFTConfig`, and everything under
# `lora:` to peft's `LoraConfig`. `assistant_only_loss` restricts the loss to the marked tokens;
# rows with labels need no markers.

# %%
from peft import LoraConfig, PeftModel

recipe = {"seed": config.seed, **config.train.model_dump(exclude_unset=True)}
recipe["assistant_only_loss"] = recipe["assistant_only_loss"] and chat_template.marked
lora = LoraConfig(task_type="CAUSAL_LM", **config.lora.model_dump())
for name, value in recipe.items():
    print(f"{name}: {value}")
print(f"LoRA: r {lora.r}, alpha {lora.lora_alpha}, dropout {lora.lora_dropout}")
print(f"LoRA modules: {', '.join(config.lora.target_modules)}")

# %% [markdown]
# ## What depends on the device
#
# The precision follows the device: a T4 has no bfloat16. *Activation checkpointing* discards the
# activations of the forward pass and recomputes them during the backward pass, which costs about a
# third more computation and saves most of their memory; it does not change the result. The
# published recipe always uses it; if the config leaves it open, it is used only when the
# activations do not fit in free memory. Checkpoints are written every few minutes, so that an
# interrupted session loses little work.

# %%
from atlas_lib.train import callbacks, memory

precision = {"fp16": device.dtype == "float16", "bf16": device.dtype == "bfloat16"}
checkpoints = callbacks.Checkpoints(config, out, device, [source, audited])
for_this_run = {
    "activation_checkpointing": memory.must_checkpoint(base, config, device),
    "output_dir": str(checkpoints.folder),
    "report_to": tracking.report_to(config, out),
}

# %% [markdown]
# ## The trainer
#
# Three callbacks watch the training: one prints progress, one stops at a loss that is not finite
# and counts the steps that the scaler of float16 skips, and one writes the checkpoints.

# %%
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

if chat_template.marked:
    rows = [{"messages": conversations[idx]} for idx in kept]
    validation_rows = [{"messages": chat} for chat in validation]
else:
    chats = [conversations[idx] for idx in kept]
    rows = token_rows.labelled(chat_template, chats)
    validation_rows = token_rows.labelled(chat_template, validation)
arguments = {"use_cpu": device.name == "cpu", "disable_tqdm": True}
arguments |= precision | recipe | for_this_run
guard = callbacks.LossGuard()
trainer = SFTTrainer(
    model=base,
    args=SFTConfig(**compat.trainer_arguments(arguments)),
    train_dataset=Dataset.from_list(rows),
    eval_dataset=Dataset.from_list(validation_rows),
    processing_class=tokenizer,
    peft_config=lora,
    callbacks=[callbacks.ProgressLines(), guard, checkpoints],
)

# %% [markdown]
# TRL casts the adapter of a 4-bit model to bfloat16. The next cell casts it back to float32: the
# gradient scaler of float16 training cannot handle bfloat16, and small updates would be rounded
# away.

# %%
from transformers import PrinterCallback

compat.keep_adapter_in_float32(trainer.model)
trainer.remove_callback(PrinterCallback)  # replaced by ProgressLines
trained_types = {str(p.dtype) for p in trainer.model.parameters() if p.requires_grad}
assert trained_types == {"torch.float32"}, trained_types
trainable, total = trainer.model.get_nb_trainable_parameters()
print(f"{trainable:,} of {total:,} parameters are trained ({trainable / total:.2%})")

# %% [markdown]
# ## The trainer's batches hold the labels of the audit
#
# The comparison covers every row of an epoch of batches, as the data collator hands them to the
# loss. One differing token raises an error. What the loss makes of the labels is compared as well:
# on a small batch, the trainer's loss must be the mean of $-\log p$ over the labelled tokens.

# %%
compared = audit.check_batches(trainer.get_train_dataloader(), records)
audit.check_batches(trainer.get_eval_dataloader(), checked)
print(f"{compared:,} rows: the labels in the batches are identical to the audited ones")
by_trainer, by_hand = trl_loss.compare_losses(trainer)
print(f"loss of two rows: {by_trainer:.5f} by the trainer, {by_hand:.5f} by hand")
tolerance = 1e-3 if device.dtype == "float32" else 1e-2
assert math.isclose(by_trainer, by_hand, rel_tol=tolerance), "the loss is of other tokens"

# %% [markdown]
# ## What is watched during the training
#
# A response has a first token, which begins it after the header, a content, and a stop token. Their
# losses are measured apart on a few validation rows, from before the first step on, and three
# prompts are answered at five moments. Edit the prompts to see others.

# %%
prompts = [
    "Write a short note on kayaking. Do not use any commas.",
    "Tell me about sculpture. Wrap your whole answer in double quotation marks.",
    "Is jazz guitar hard to learn? Answer with one of: My answer is yes. My answer is no.",
]

# %%
from functools import partial

from atlas_lib.train import learning

respond = partial(
    decoding.generate,
    tokenizer=tokenizer,
    prompts=prompts,
    prompt_format="chat",
    max_new_tokens=48,
    slots=len(prompts),
)
stop_id = tokenizer.eos_token_id
watch = learning.KindLosses(trainer.eval_dataset, stop_id, respond)
trainer.add_callback(watch)

# %% tags=["train"]
with checkpoints.listening():
    result = trainer.train(resume_from_checkpoint=checkpoints.resume_from)
assert result.global_step == steps, "the number of steps differs from the arithmetic above"
validation_loss = trainer.evaluate()["eval_loss"]
assert math.isfinite(validation_loss), "the validation loss is not finite"
log = [entry for entry in trainer.state.log_history if "loss" in entry]
first_loss = log[0]["loss"]
last_loss = sum(entry["loss"] for entry in log[-3:]) / len(log[-3:])
warnings = adapters.doubts(trainer.model, first_loss, last_loss)
for sentence in warnings:
    print(f"warning: {sentence}")

# %% [markdown]
# ## The loss
#
# A falling curve proves little by itself, because it also falls with a wrong mask. Together with
# the comparison above it shows that the model improves on the assistant's tokens alone.

# %%
import matplotlib.pyplot as plt

figure, axes = plt.subplots(figsize=(7, 2.6), layout="constrained")
axes.plot([e["step"] for e in log], [e["loss"] for e in log], color="#4c72b0", label="training")
axes.axhline(validation_loss, color="#c44e52", linestyle="--", label="validation, at the end")
axes.set(xlabel="step", ylabel="loss on assistant tokens")
finding = f"Loss {first_loss:.2f} to {last_loss:.2f} in {result.global_step} steps"
axes.set_title(finding)
axes.legend(frameon=False)
ending = f"the dashed validation loss at the end is {validation_loss:.2f}"
notebooks.show_figure(figure, f"Curve of the training loss. {finding}; {ending}.", config.label)

# %% [markdown]
# The dashed line is the loss on conversations that were not trained on. A validation loss far above
# the end of the curve would mean that the model has memorised the training rows.
#
# ## When is the stop learned?
#
# A pretrained model continues text and rarely ends a turn. The first measurement, before any step,
# shows what it knew already; from there, compare how fast the loss of each kind falls.

# %%
watched = [entry for entry in trainer.state.log_history if "loss_first" in entry]
kinds = [kind for kind in learning.KINDS if f"loss_{kind}" in watched[0]]
figure_kinds, axes = plt.subplots(figsize=(7, 2.6), layout="constrained")
for kind, color in zip(kinds, ("#8c8c8c", "#4c72b0", "#c44e52"), strict=False):
    losses = [entry[f"loss_{kind}"] for entry in watched]
    axes.plot([entry["step"] for entry in watched], losses, color=color, label=kind)
axes.set(xlabel="step", ylabel="loss on validation rows")
ends = [f"{kind} {watched[0][f'loss_{kind}']:.2f} to {watched[-1][f'loss_{kind}']:.2f}"
        for kind in kinds]  # fmt: skip
axes.set_title(f"Loss by kind of token: {', '.join(ends)}", fontsize=10)
axes.legend(frameon=False)
notebooks.show_figure(figure_kinds, f"Losses by kind of token: {', '.join(ends)}.", config.label)

# %%
sampled = [entry for entry in watched if "sampled" in entry]
for number, prompt in enumerate(prompts):
    print(f"prompt  {prompt}")
    for entry in sampled:
        print(f"  step {entry['step']:>4}  {entry['sampled'][number][:300]!r}")
runtime = result.metrics["train_runtime"]
shares = [f"{name} {seconds / runtime:.1%}" for name, seconds in watch.seconds.items()]
print(f"share of the training's time: {', '.join(shares)}")

# %% [markdown]
# ## The EOS rate
#
# The trained model also responds to the first turns of a few validation rows, to measure the share
# of responses that it ends itself with the stop token.

# %% tags=["sample-responses"]
first_turns = [chat[0]["content"] for chat in validation if chat[0]["role"] == "user"][:5]
cap = min(512, config.eval.max_new_tokens)
everything = prompts + first_turns
after = decoding.generate(trainer.model, tokenizer, everything, "chat", cap, len(everything))
eos_rate = sum(response["stop"] == tokenizer.eos_token for response in after) / len(after)
print(f"EOS rate: {eos_rate:.0%} of {len(after)} SFT responses, within {cap} tokens")

# %% [markdown]
# The base model continues the text until it reaches the limit, and the fine-tuned model responds
# and stops. These prompts are an illustration; notebook 04 is the measurement.
#
# ## Save the adapter and a record of the run
#
# The tokenizer is saved beside the adapter. Its default chat template is the original one, because
# other Jinja readers cannot parse the generation markers; the patched template is saved under the
# name `training`. The gate of this stage: a newly loaded base model with the adapter from disk must
# give the same logits as the trained model.

# %%
measured = {
    "steps": result.global_step,
    "rows_compared_with_audit": compared,
    "trainable_parameters": trainable,
    "total_parameters": total,
    "first_loss": first_loss,
    "last_loss": last_loss,
    "validation_loss": validation_loss,
    "eos_rate": eos_rate,
    "responses": len(after),
    "warnings": warnings,
}

# %%
work = throughput.training_work(trainer, checkpoints.seconds(), device)
summary = {
    "label": config.label,
    **measured,
    **work,
    "precision": device.dtype,
    "skipped_steps": guard.skipped,
    "resumed_after_step": checkpoints.resumed_after,
    "activation_checkpointing": for_this_run["activation_checkpointing"],
}

# %%
with artifacts.stage(stages.SFT_TRAIN, config, out, [source, audited], **work) as folder:
    adapter = folder / "adapter"
    adapters.save_adapter(trainer.model, adapter, config, tokenizer, chat_template.text)
    fresh = PeftModel.from_pretrained(models.load_weights("base", config, device, in_4bit), adapter)
    probe = trainer.train_dataset[0]["input_ids"][:256]
    summary["reload_difference"] = adapters.logits_difference(trainer.model, fresh, probe, device)
    assert summary["reload_difference"] < 1e-3, "the saved adapter is not the trained one"
    artifacts.write_jsonl(folder / "train_log.jsonl", trainer.state.log_history)
    figure.savefig(folder / "loss.png", dpi=150)
    artifacts.write_json(folder / "summary.json", summary)
    model_card.write_card(adapter, config, summary, audit.read_summary(audited), repo)
checkpoints.remove()
print(f"after reloading, logits differ by {summary['reload_difference']:.1e} of the largest logit")

# %% [markdown]
# ## Push the adapter to the hub
#
# Nothing is pushed without a token and a repository. Write access was checked before the training;
# if the upload fails nevertheless, the command that repeats it is printed.

# %%
hub.push_adapter(adapter, repo, config)

# %% [markdown]
# ## Export the model
#
# Off by default. `output.export` lists other forms of the model: `merged` safetensors for
# transformers and vLLM, or GGUF (`f16`, `q8_0`, `q4_k_m`) for llama.cpp and Ollama. Each one is
# compared with the model that notebook 04 evaluates: the text of 200 prompts, their token ids, and
# greedy responses. What differs is named `.unproven`. `python -m tools.export` does the same later.

# %%
if config.output.export:
    package.export_model(config, adapter, out / "export", config.output.export)
if config.output.export and config.output.push_export:
    hub.push_adapter(out / "export", repo, config, "export")

# %% [markdown]
# What each stage took: minutes of its last session, and the most memory of its process and GPU.
# `seconds` and `tokens` are those of the training alone, interrupted sessions included; padding is
# not counted. The share of the GPU's matrix multiplication rate counts no recomputation.

# %%
notebooks.ledger(out)

# %%
headline.update(
    Markdown(
        f"**{result.global_step} steps over {compared:,} audited conversations take the loss from "
        f"{first_loss:.3f} to {last_loss:.3f}; on validation rows it is {validation_loss:.3f}.** "
        + " ".join(f"Warning: {sentence}" for sentence in warnings)
    )
)

# %% [markdown]
# Kaggle returns the files of a run but not its notebook; there, the next cell stores it with them.

# %% tags=["keep"]
notebooks.keep("03_sft_train", out)

# %% [markdown]
# ## Summary
#
# The loss covered exactly the tokens that the audit had verified, and the adapter is saved with the
# configuration that reproduces it.
#
# **What did not work:** the first published version of this recipe started from the Instruct
# weights with TRL's default mask. It learned to write the user's questions as well, and every
# evaluation fell.
#
# **Next:** [04_ifeval_eval](04_ifeval_eval.ipynb) measures whether the model follows instructions
# better.
