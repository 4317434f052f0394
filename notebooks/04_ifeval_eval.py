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
# quotation marks. Here the base model and the fine-tuned one answer the same prompts, greedily, and
# Google's own checkers (as lm-eval ships them) say who did what was asked.
#
# Each model is asked twice: **raw**, the bare prompt, as the published scores were taken, and
# **chat**, in the template that the fine-tuning used. Published scores for this recipe exist only
# raw, so the fine-tuned model was never asked in the language that it had been taught.
#
# **What you will see:** one prompt and its verdict; the grid of models and formats; which
# instruction types moved; and whether the difference is more than noise.
# **In:** the adapter of notebook 03 (or `model.adapter`) and the prompts. **Out:**
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
above = [Path.cwd(), *Path.cwd().parents]
places = above + [found.parent for found in Path("/kaggle/input").rglob("atlas_lib")]
home = next((p for p in places if (p / "atlas_lib" / "bootstrap.py").is_file()), None)
if home:
    sys.path.insert(0, str(home))
elif importlib.util.find_spec("atlas_lib") is None:
    source = f"git+{REPOSITORY}@{REF}"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", source], check=True)
from atlas_lib import bootstrap

bootstrap.ensure()

# %%
from IPython.display import Markdown, display

from atlas_lib import artifacts, generate, ifeval, model, notebooks, offline, runtime
from atlas_lib import config as configuration

config = configuration.load(CONFIG, OVERLAY, SET)
out = runtime.output_folder(OUT, CONFIG, OVERLAY)
runtime.start(config, out)
device = runtime.device(config)
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
prompts = ifeval.load_prompts(
    runtime.locate(offline.resolve(config.eval.prompts, config)),
    config.eval.prompts_revision,
    config.eval.limit,
)
print(prompts[0]["prompt"])
for answer in ("", "Yes, of course, here it is."):
    verdict = ifeval.score(prompts[:1], [answer])[0]
    print(repr(answer), dict(zip(verdict["instruction_id_list"], verdict["strict"], strict=True)))

# %% [markdown]
# An empty answer never passes, even where silence would satisfy the rule. Verdicts are the same in
# every run: the two checkers that draw random letters and the language detector are seeded.
#
# ## Whose answers?
#
# The adapter comes from notebook 03, which is run now if it has not been; `model.adapter` names
# another one, by path or hub id, and then nothing is trained.


# %%
def train(config, out: Path) -> Path:
    """The page of 03 is the only place that trains: run it."""
    notebooks.execute("03_sft_train", out, {"CONFIG": CONFIG, "OVERLAY": OVERLAY, "SET": SET})
    return out / "03_sft_train"


trained = None if config.model.adapter else artifacts.require("03_sft_train", config, out, train)
adapter = config.model.adapter or trained / "adapter"

# %% [markdown]
# ## Ask the base model
#
# All models answer on weights of the same precision, so that only the adapter differs. The answer
# is cut at the first stop token before it is turned into text.

# %%
tokenizer = model.load_tokenizer(config)
texts = [prompt["prompt"] for prompt in prompts]
grid = {}


# %%
def ask(name: str, answering) -> None:
    """Fill the grid's row `name`: every prompt in every format."""
    for form in config.eval.formats:
        grid[name, form] = generate.generate(
            answering,
            tokenizer,
            texts,
            form,
            config.eval.max_new_tokens,
            config.run.eval_batch_size,
        )


base = model.load_weights("base", config, device, config.eval.load_in_4bit)
ask("base", base)

# %% [markdown]
# ## Ask the fine-tuned model
#
# The adapter is merged into the weights, which is faster. In float32 the answers stay the same; in
# half precision a near tie between two tokens may fall the other way.

# %%
revision = config.model.adapter_revision
sft = model.attach_adapter(base, adapter, revision, merge=not config.eval.load_in_4bit)
ask("SFT", sft)

# %% [markdown]
# ## And the vendor's own Instruct model
#
# It shows how far instruction tuning on far more data gets. Where there is no such model, as in the
# offline stand-in, the grid says "not run".

# %%
if config.model.instruct:
    del base, sft
    ask("Instruct", model.load_weights("instruct", config, device, config.eval.load_in_4bit))

# %% [markdown]
# ## The grid
#
# Four accuracies a row, and what confounds them: how many answers hit the length limit, how many
# ended with `<|im_end|>`, how long they are, and how many different ones there are. A model that
# says the same thing to everybody passes some instructions without having read any.

# %%
import pandas as pd

verdicts = {row: ifeval.score(prompts, [a["response"] for a in grid[row]]) for row in grid}
metrics = ifeval.measure(grid, verdicts)
assert all(row["n"] == len(prompts) for row in metrics), "a model did not answer every prompt"

columns = ["n", *ifeval.ACCURACIES, "ci95", "at_cap", "stop_rate", "mean_length", "distinct"]
table = pd.DataFrame(metrics).set_index(["model", "format"])[columns].T.astype(object)
table.loc["ci95"] = [f"{low:.3f} to {high:.3f}" for low, high in table.loc["ci95"]]
if not config.model.instruct:
    table["Instruct", "any"] = "not run"
table.map(lambda value: f"{value:.3f}" if isinstance(value, float) else value)

# %% [markdown]
# `ci95` is Wilson's interval of the prompt-level strict accuracy. Compare rows of the same format
# first; the jump from raw to chat within a model says how much the wording of the question does.
#
# ## Which instructions moved?
#
# Some types pass by accident: a model that repeats one short sentence uses no commas. So the
# single bars are there to be looked at, and the verdict is taken on all prompts together. Types
# marked with a dot are the ones that the training data teaches, where that is known.

# %%
import matplotlib.pyplot as plt

form = "chat" if "chat" in config.eval.formats else config.eval.formats[0]
taught = set(config.offline.taught if config.data.dataset.startswith("embedded:") else [])
by_type = {row["model"]: row["by_type"] for row in metrics if row["format"] == form}
shares = pd.DataFrame(
    {name: {kind: p / n for kind, (p, n) in by_type[name].items()} for name in by_type}
)
shares = shares.rename(lambda kind: f"{'• ' if kind in taught else ''}{kind}").sort_values("SFT")
gained = int((shares["SFT"] > shares["base"]).sum())

axes = shares.plot.barh(figsize=(8, 7), width=0.8, color=["#c5c9d3", "#4c72b0", "#8c8c8c"])
axes.set(xlabel=f"share followed ({form}, strict)", ylabel="")
axes.set_title(f"SFT follows {gained} of {len(shares)} instruction types more often than base")
axes.figure.text(1, 0, config.label, ha="right", va="bottom", fontsize=7)
plt.show()

# %% [markdown]
# A type near zero for both is one that the fine-tuning data does not contain. It stays in the
# picture, and in the average. In the offline stand-in the base has read requests and answers as
# plain text, as every pretrained model has; what the fine-tuning adds is the chat format and when
# to stop, and that is why its raw rows differ much less than its chat rows.
#
# ## More than noise?
#
# Both models answered the *same* prompts, so only the prompts on which they differ carry
# information. McNemar's exact test asks whether wins and losses among those could be coin flips;
# the interval is a bootstrap over prompts.

# %%
comparison = {
    form: ifeval.compare(verdicts["base", form], verdicts["SFT", form])
    for form in config.eval.formats
}
shown = pd.DataFrame(comparison).T.rename_axis("SFT against base")
shown["mcnemar_p"] = [f"{p:.2g}" for p in shown["mcnemar_p"]]
shown["difference_ci95"] = [f"{low:+.1f} to {high:+.1f}" for low, high in shown["difference_ci95"]]
shown

# %% [markdown]
# `only_b` are the prompts that only SFT passed, `only_a` those that only base passed. A net win of
# about twenty prompts in five hundred is what it takes to call a difference clear.
#
# On the prompts whose every instruction the training data teaches, where that is known, the picture
# should be plain; on the others nothing is expected.

# %%
subset = [i for i, p in enumerate(prompts) if set(p["instruction_id_list"]) <= taught]
on_taught = ifeval.measure(grid, verdicts, subset) if subset else []
pd.DataFrame(
    on_taught, columns=["model", "format", *columns]
) if subset else "not known for this data"

# %% [markdown]
# ## Write it down
#
# One object a model and format in `metrics.json`, each with what it takes to find the run again.

# %%
origin = {"config_digest": config.digest(), "commit": runtime.commit(), "data": config.eval.prompts}
origin |= {"hardware": runtime.hardware(), "label": config.label}
results = {"metrics": metrics, "comparison": comparison, "taught_types": on_taught, **origin}

with artifacts.stage("04_ifeval_eval", config, out, [trained] if trained else []) as folder:
    for (name, how), answers in grid.items():
        keyed = [{"key": p["key"], "prompt": p["prompt"]} for p in prompts]
        keyed = [asked | answer for asked, answer in zip(keyed, answers, strict=True)]
        artifacts.write_jsonl(folder / "responses" / f"{name}-{how}.jsonl", keyed)
        artifacts.write_jsonl(folder / "scores" / f"{name}-{how}.jsonl", verdicts[name, how])
    artifacts.write_json(folder / "ifeval.json", results)
artifacts.write_json(out / "metrics.json", [row | origin for row in metrics])

# %%
scores = {row["model"]: row["prompt_level_strict_acc"] for row in metrics if row["format"] == form}
pairs = comparison[form]
headline.update(
    Markdown(
        f"**Prompt-level strict accuracy ({form}): base {scores['base']:.3f}, SFT "
        f"{scores['SFT']:.3f} on {len(prompts)} prompts; {pairs['only_b']} won, "
        f"{pairs['only_a']} lost, p = {pairs['mcnemar_p']:.2g}.** {config.label}"
    )
)

# %% [markdown]
# ## Summary
#
# The same prompts, the same checkers, two models, two formats, and a paired test in the end.
#
# **What did not work:** reading a table of two averages. The published difference between base and
# SFT for this recipe, taken raw, is two prompts of 541, from which nothing can be concluded.
#
# **Next:** change a value in [03_sft_train](03_sft_train.ipynb) by `SET` and see whether it moves.
