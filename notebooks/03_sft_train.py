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
# # Teach the base model to answer
#
# The pretrained model continues text. Here it learns to answer: supervised fine-tuning by
# maximum likelihood on the assistant's tokens, given everything before them,
#
# $$\mathcal{L} = -\frac{1}{|A|}\sum_{t \in A} \log p_\theta(x_t \mid x_{<t}),$$
#
# where $A$ is the set of tokens that notebook 02 marked. The weights stay frozen in 4 bits (QLoRA:
# NF4 with double quantisation) and the update is a product of two thin matrices beside each
# attention projection, $W + \frac{\alpha}{r} B A$ with rank $r$ (LoRA).
#
# **What you will see:** how many numbers are trained and for how many steps; the check of the
# trainer's labels against the audit; the loss; and the same prompts before and after.
# **In:** the slice (01) and its audit (02). **Out:** `03_sft_train/adapter/`, `train_log.jsonl`,
# `summary.json`.

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

from atlas_lib import artifacts, audit, compat, data, devices, models, notebooks, session
from atlas_lib.config import load_config
from atlas_lib.evaluate import decoding
from atlas_lib.train import adapters, hub, model_card, tracking

config = load_config(CONFIG, OVERLAY, SET)
out = session.output_folder(OUT, CONFIG, OVERLAY)
session.start(config, out)
device = devices.choose_device(config)
print(f"{device.name}, {device.dtype}: {device.reason}")
repo = hub.preflight(config)  # now, not after the training
headline = display(Markdown("*The finding appears here at the end.*"), display_id=True)

# %% [markdown]
# ## The gate comes first
#
# Nothing is loaded before the audit of exactly this slice, tokenizer and length has passed. Rows
# that it left out are left out here too, and nothing replaces them.
#
# A row can be handed over and still not train: when `max_length` cuts away all of its answers, TRL
# drops it. The audit has predicted those too, so the number of steps below counts without them.

# %%
source = artifacts.require(data.STAGE, config, out, data.prepare)
audited = audit.require_passed(config, out, source)
verdicts = {row["idx"]: row["verdict"] for row in artifacts.read_jsonl(audited / audit.ROWS)}
kept = [idx for idx, verdict in verdicts.items() if verdict != "excluded"]
conversations = data.read(source)
print(f"{len(kept):,} of {len(conversations):,} conversations go to the trainer")

# %% [markdown]
# ## The smallest example: how many steps is one epoch?
#
# A step updates the weights once, after `batch x accumulation` rows. The published page of this
# recipe says "about 80 steps"; the arithmetic says otherwise, and the trainer agrees with the
# arithmetic. One epoch, since low-rank updates on so few rows soon learn them by heart; a warm-up
# of three in a hundred steps, since the run is short.

# %%
rows_per_step = config.train.per_device_train_batch_size * config.train.gradient_accumulation_steps
print(f"recipe: 5,000 / (4 x 4) = {5000 / 16} -> {math.ceil(5000 / 16)} steps")
rows = sum(verdict == "ok" for verdict in verdicts.values())
steps = math.ceil(config.train.num_train_epochs * math.ceil(rows / rows_per_step))
steps = steps if (config.train.max_steps or -1) < 0 else config.train.max_steps
print(f"this run: {rows:,} rows, {rows_per_step} a step -> {steps} steps")

# %% [markdown]
# ## The model: 4-bit weights, a thin trainable update
#
# The base is loaded quantised: each weight is one of sixteen levels that are spaced as the values
# of a normal distribution are (NF4), times a scale for its block, and the scales are quantised once
# more. Nothing of it is trained. LoRA adds to each projection that the config lists a matrix $A$
# that brings the inputs down to $r$ numbers and a matrix $B$, zero at first, that takes them up to
# the outputs: `r x (inputs + outputs)` numbers. $\alpha = 2r$ keeps the update's scale when $r$
# changes. At Qwen2.5-0.5B's shape, 24 layers of hidden size 896:

# %%
attention = {"q": (896, 896), "k": (896, 128), "v": (896, 128), "o": (896, 896)}
mlp = {"gate": (896, 4864), "up": (896, 4864), "down": (4864, 896)}
for targets in (attention, attention | mlp):
    layer = sum(16 * (inputs + outputs) for inputs, outputs in targets.values())
    print(f"r=16 on {', '.join(targets)}: {layer:,} x 24 layers = {24 * layer:,}")

# %% [markdown]
# The recipe trains the first of these; the second is a variant of ours. What this run trains is
# counted below by the model itself, which has the last word.

# %%
from datasets import Dataset
from peft import LoraConfig
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from atlas_lib import template
from atlas_lib.train import callbacks, memory

tokenizer = models.load_tokenizer(config)
models.check_vocabulary(tokenizer, config)
original = tokenizer.chat_template
template.patch_chat_template_for_assistant_mask(tokenizer)
in_4bit = config.quantization.load_in_4bit
base = models.load_weights("base", config, device, in_4bit)
print(base.config.architectures[0], "in", config.quantization.bnb_4bit_quant_type)
recompute = memory.must_checkpoint(base, config, device)

# %% [markdown]
# Freezing the base in 4 bits is what makes this fit anywhere: the weights shrink to a quarter of
# their 16-bit size, and only the thin update needs gradients and optimizer state. At half a billion
# parameters it would fit without, but this is the path that larger models have to take.
# *Activation checkpointing* forgets what the forward pass computed and computes it again when the
# backward pass needs it: a third more work for a fraction of the memory.
#
# ## The training cell
#
# This is the whole recipe: everything under `train:` in the config goes straight into TRL's
# `SFTConfig`, and the precision follows the device. TRL makes the adapter of a 4-bit model bfloat16
# and this cell puts it back to float32: float16's gradient scaler cannot work on bfloat16, and
# small updates would be rounded away in it.
#
# Three callbacks watch: one prints, one stops at a loss that is not a number, and one writes a
# checkpoint every few minutes, so that a session that dies costs minutes.

# %%
checkpoints = callbacks.Checkpoints(config, out, device, [source, audited])
arguments = {
    "seed": config.seed,
    "fp16": device.dtype == "float16",
    "bf16": device.dtype == "bfloat16",
    "use_cpu": device.name == "cpu",
    "disable_tqdm": True,
    **config.train.model_dump(exclude_unset=True),
    "output_dir": str(checkpoints.folder),
    "activation_checkpointing": recompute,
    "report_to": tracking.report_to(config, out),
}
trainer = SFTTrainer(
    model=base,
    args=SFTConfig(**compat.trainer_arguments(arguments)),
    train_dataset=Dataset.from_list([{"messages": conversations[idx]} for idx in kept]),
    eval_dataset=Dataset.from_list(
        [{"messages": chat} for chat in data.read(source, "validation")]
    ),
    processing_class=tokenizer,
    peft_config=LoraConfig(task_type="CAUSAL_LM", **config.lora.model_dump()),
    callbacks=[callbacks.ProgressLines(), callbacks.LossGuard(), checkpoints],
)
trainer.remove_callback(PrinterCallback)  # ours says how much time is left
compat.fit_loss_to_cpu(device)
compat.keep_adapter_in_float32(trainer.model)
trained_types = {str(p.dtype) for p in trainer.model.parameters() if p.requires_grad}
assert trained_types == {"torch.float32"}, trained_types

# %%
trainable, total = adapters.parameter_counts(trainer.model)
print(f"{trainable:,} of {total:,} parameters are trained ({trainable / total:.2%})")
compared = audit.check_trainer(trainer.train_dataset, audited)
print(f"{compared:,} rows: the trainer's labels are exactly those that the audit proved")

# %% [markdown]
# That last line is the point of notebook 02: not a sample, not a re-rendering, but the labels in
# the trainer's own data set, all of them. Had one token differed, the cell would have raised.

# %%
with checkpoints.listening():
    result = trainer.train(resume_from_checkpoint=checkpoints.resume_from)
checkpoints.require_finished(result.global_step, steps)
assert result.global_step == steps, "the trainer does not agree with the arithmetic"
validation = trainer.evaluate()
log = [entry for entry in trainer.state.log_history if "loss" in entry]
first_loss, last_loss = log[0]["loss"], callbacks.recent_loss(log, steps=10)
assert math.isfinite(validation["eval_loss"]), "the validation loss is not a number"

# %% [markdown]
# ## The loss
#
# A falling curve alone proves little, since it also falls when the mask is wrong. Together with the
# check above it says that the model gets better at the assistant's words, and only at those.

# %%
import matplotlib.pyplot as plt

from atlas_lib import figures

figure, axes = plt.subplots(figsize=(7, 2.6), layout="constrained")
axes.plot([e["step"] for e in log], [e["loss"] for e in log], color="#4c72b0", label="training")
axes.axhline(
    validation["eval_loss"], color="#c44e52", linestyle="--", label="validation, at the end"
)
axes.set(xlabel="step", ylabel="loss on assistant tokens")
finding = f"Loss {first_loss:.2f} to {last_loss:.2f} in {result.global_step} steps"
axes.set_title(finding)
axes.legend(frameon=False)
ending = f"the dashed validation loss at the end is {validation['eval_loss']:.2f}"
figures.show(figure, f"Curve of the training loss. {finding}; {ending}.", config.label)

# %% [markdown]
# The dashed line is the loss on conversations that were never trained on. If it lay far above the
# end of the curve, the model would have learned the rows by heart.
#
# ## Ask it something
#
# Edit the prompts and run the cell again. The same weights answer twice: once with the adapter
# switched off, once with it on. A few first turns of the validation rows are asked as well, to see
# whether it has learned to stop.

# %%
prompts = [
    "Write a short note on kayaking. Do not use any commas.",
    "Tell me about sculpture. Wrap your whole answer in double quotation marks.",
    "Is jazz guitar hard to learn? Answer with one of: My answer is yes. My answer is no.",
]
with trainer.model.disable_adapter():
    before = decoding.generate(trainer.model, tokenizer, prompts, "chat", 80, len(prompts))
firsts = [chat for chat in data.read(source, "validation") if chat[0]["role"] == "user"][:5]
asked = prompts + [chat[0]["content"] for chat in firsts]
cap = min(512, config.eval.max_new_tokens)
after = decoding.generate(trainer.model, tokenizer, asked, "chat", cap, len(asked))
for prompt, was, now in zip(prompts, before, after, strict=False):
    print(f"PROMPT {prompt}\n  base {was['response']!r}\n  SFT  {now['response'][:400]!r}\n")
stop_share = decoding.diagnose(after)["stop_rate"]
print(f"SFT ends {stop_share:.0%} of {len(asked)} answers by itself, within {cap} tokens")

# %% [markdown]
# The base goes on writing, the fine-tuned model answers and stops. A few prompts are an
# illustration and fail no run; the measurement is notebook 04.
#
# ## Save, and say what was done
#
# The adapter goes to disk with the tokenizer beside it. Its default template is the original one,
# because plain Jinja readers cannot parse the markers; the patched one is kept under the name
# `training`. Before the stage counts as finished, a fresh base with the adapter from disk has to
# give the trained model's logits: what is handed over is what was trained.

# %%
losses = {"first_loss": first_loss, "last_loss": last_loss}
losses["validation_loss"] = validation["eval_loss"]
size = {"steps": result.global_step, "rows_compared_with_audit": compared}
size |= {"trainable_parameters": trainable, "total_parameters": total}
spent = {"precision": device.dtype, "seconds": checkpoints.seconds()}
spent |= {"resumed_after_step": checkpoints.resumed_after, "activation_checkpointing": recompute}
summary = {"label": config.label, **size, **losses, **spent}
summary |= {"stop_share": stop_share, "answers": len(asked)}

# %%
with artifacts.stage("03_sft_train", config, out, [source, audited]) as folder:
    adapter = folder / "adapter"
    adapters.save_adapter(trainer.model, adapter, config, tokenizer, original)
    fresh = models.attach_adapter(models.load_weights("base", config, device, in_4bit), adapter)
    probe = trainer.train_dataset[0]["input_ids"][:256]
    summary["reload_difference"] = adapters.logits_difference(trainer.model, fresh, probe, device)
    assert summary["reload_difference"] < 1e-3, "the saved adapter is not the trained one"
    artifacts.write_jsonl(folder / "train_log.jsonl", trainer.state.log_history)
    figure.savefig(folder / "loss.png", dpi=150)
    artifacts.write_json(folder / "summary.json", summary)
    model_card.write(adapter, config, summary, audit.read_summary(audited), repo)
checkpoints.remove()  # the recipe's single save has taken their place
print(f"saved and reloaded: logits differ by {summary['reload_difference']:.1e} of the largest")

# %% [markdown]
# ## Push it, if a token and a repository are there
#
# The token was tried before the training. If the upload fails all the same, the adapter is safe in
# the output folder, and the command that sends it later is printed.

# %%
hub.push(adapter, repo, config)

# %%
headline.update(
    Markdown(
        f"**{result.global_step} steps over {compared:,} audited conversations take the loss from "
        f"{first_loss:.3f} to {last_loss:.3f}, {validation['eval_loss']:.3f} on the "
        f"validation rows.** {config.label}"
    )
)

# %% [markdown]
# Kaggle gives back the files of a run but not its page; there, the next line keeps it beside them.

# %% tags=["keep"]
notebooks.keep("03_sft_train", out)

# %% [markdown]
# ## Summary
#
# The adapter was trained on exactly the tokens that the audit proved, and saved with what it takes
# to repeat it.
#
# **What did not work:** the first published version of this recipe started from the Instruct
# weights with TRL's default mask, learned to write the user's questions too, and fell in every
# evaluation.
#
# **Next:** [04_ifeval_eval](04_ifeval_eval.ipynb) asks whether it follows instructions better.
