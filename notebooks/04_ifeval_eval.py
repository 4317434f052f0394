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
# # Measure whether it follows instructions
#
# IFEval consists of prompts with instructions that a program can verify: no commas, exactly three
# bullet points, a response in quotation marks. The base model, the fine-tuned model and the
# vendor's Instruct model respond to the same prompts with greedy decoding, and Google's checkers,
# as shipped with lm-eval, decide which instructions each response follows.
#
# Each model is evaluated in two prompt formats: **raw**, the bare prompt without a chat template,
# in which the published scores were measured, and **chat**, the template used in fine-tuning. All
# published scores of this recipe are raw, so they say nothing about the fine-tuned model in the
# format that it was trained on.
#
# **What you will see:** a prompt with a response that passes and one that fails; the decision rule,
# fixed before any response is generated; the scores of all models and formats; paired differences
# with confidence intervals; the instruction types that changed, those that were taught and the
# others; and individual wins and losses.
#
# **Inputs:** the adapter of notebook 03 (or `model.adapter`) and the prompts. **Outputs:**
# `04_ifeval_eval/responses/`, `scores/` and `ifeval.json`, and `metrics.json` in OUT.

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
import time

from IPython.display import Markdown, display

from atlas_lib import artifacts, devices, models, notebooks, session
from atlas_lib.evaluate import benchmarks, explorer, grid, guardrails, ifeval, significance, tables

config, out = notebooks.start("04_ifeval_eval", CONFIG, OVERLAY, OUT, SET)
device = devices.choose_device(config)
print(f"{device.name}, {device.dtype}: {device.reason}")
headline = notebooks.headline()

# %% [markdown]
# ## The smallest example: a pass and a failure
#
# A prompt carries one to three instructions, and passes when its response follows all of them. This
# example is not part of the benchmark; it has the same schema. *Strict* scoring takes the response
# as it is. *Loose* scoring also accepts it without its first or last line, or without asterisks, so
# that an introductory sentence does not count as a failure.

# %%
example = {
    "key": "example",
    "prompt": "What do you have for breakfast? Use quotation marks and no commas.",
    "instruction_id_list": ["startend:quotation", "punctuation:no_comma"],
    "kwargs": [{}, {}],
}
for response in ('"Bread and tea."', '"Bread, tea."', 'Sure:\n"Bread and tea."'):
    [verdict] = ifeval.score([example], [response])
    passed = {mode: verdict[f"prompt_{mode}"] for mode in ("strict", "loose")}
    print(f"{response!r:28} {passed}, instructions (strict): {verdict['strict']}")

# %% [markdown]
# The first response passes, the second one breaks one of the two instructions, and the third one
# passes only with loose scoring. An empty response never passes. Scoring is deterministic: the two
# checkers that draw a random letter and the language detector are seeded.
#
# These are the prompts of the evaluation; the first one follows below. A second benchmark, if
# `eval.benchmarks` names one, is evaluated beside it and reported at the end.

# %%
prompts_of = benchmarks.evaluation_prompts(config)
prompts = prompts_of["ifeval"]
print(f"{len(prompts)} prompts from {config.eval.prompts}")
print(prompts[0]["instruction_id_list"], notebooks.printable(prompts[0]["prompt"]), sep="\n")

# %% [markdown]
# ## The decision rule
#
# All models respond to the *same* prompts, so only the prompts on which two models differ carry
# information about their difference. McNemar's exact test asks whether the wins and losses among
# these discordant prompts are compatible with a fair coin. Two comparisons are named here, before
# any response is generated. The primary one is **SFT against base, both in the chat format**. The
# secondary one, the published protocol with raw prompts, is tested at the same level, but only if
# the primary one is significant; otherwise it is *not tested*. The p-values of all other
# comparisons are corrected together by Holm's method. In either way, one of many tests is not
# called significant by chance.
#
# A significant gain is a *clear margin* if the 95 % interval of the difference lies above a value
# that is fixed as well: about the smallest effect that IFEval's 541 prompts show with 80 % power.
# The recipe's own criterion is absolute: prompt-level strict accuracy above 0.25 and
# instruction-level strict accuracy above 0.40. The table of published figures lists it.
#
# The test asks whether *this adapter* differs from the base. Whether the recipe would do so again
# is another question, which takes several seeds.

# %%
alpha, margin = config.eval.alpha, config.eval.clear_margin
print(f"p >= {alpha:g}: 'not distinguishable'; otherwise")
print(f"  the interval's lower bound is above {100 * margin:.2f} points: 'clear margin'")
print("  a gain with a lower one: 'better'; more losses than wins: 'worse'")
for discordant in (20, 40, 60, 100):
    wins = int(significance.wins_needed(discordant, alpha))
    print(f"of {discordant} discordant prompts, {wins} wins are significant")

# %% [markdown]
# ## What these prompts can show
#
# A test without a significant result does not show that there is no effect. How small an effect can
# be seen depends on the number of prompts and on how many of them are discordant, which is not
# known before the responses. The table gives the smallest difference, in points, that is found with
# a probability of 80 %, computed exactly.

# %%
sensitivity = {
    f"{share:.0%}": significance.smallest_effect(len(prompts), share, alpha)
    for share in significance.DISCORDANT
}
for share, points in sensitivity.items():
    print(f"{share:>4} discordant: {f'{points:.1f} points' if points else 'none is large enough'}")

# %% [markdown]
# ## The adapter
#
# The adapter comes from notebook 03, which is executed now if its result is missing. If
# `model.adapter` names another adapter, by path or hub id, that one is evaluated and nothing is
# trained. Before anything is generated, the adapter's weights are compared with those that its own
# configuration implies for this base. An adapter that names another base is refused unless
# `model.adapter_base` states that base.


# %%
def train(config, out: Path) -> Path:
    """Execute notebook 03, the only place that trains."""
    executed = notebooks.execute("03_sft_train", out, parameters)
    print(f"trained by {executed}")
    return out / "03_sft_train"


parameters = {"CONFIG": CONFIG, "OVERLAY": OVERLAY, "SET": SET}
trained = None if config.model.adapter else artifacts.require("03_sft_train", config, out, train)
adapter = config.model.adapter or trained / "adapter"

# %% [markdown]
# ## Generate the responses
#
# All models use weights of the same precision, so that only the adapter differs. It is merged into
# the weights, unless they are in 4 bits. In float32, merging changes no token (the tests compare
# the rows); in half precision, a near tie between two tokens may be resolved differently.
#
# A response is cut at the first stop token before it is decoded to text. Finished responses are
# stored in `OUT/responses/` at once, and the next prompt takes the free slot in the batch. After an
# interruption, re-running generates only the missing responses. On a machine with several GPUs,
# each takes the next model and format that no other GPU has taken.

# %% tags=["generate"]
from atlas_lib.evaluate import bandwidth

stored, started = grid.stored_tokens(out), time.monotonic()
responses_of = grid.generate_all(config, device, adapter, prompts_of, out)
seconds, tokens = time.monotonic() - started, grid.stored_tokens(out) - stored
work = bandwidth.decoding_work(config, device, prompts_of, responses_of, tokens, seconds)

# %%
verdicts_of = {
    name: benchmarks.score_grid(name, prompts_of[name], rows) for name, rows in responses_of.items()
}
responses, verdicts = responses_of["ifeval"], verdicts_of["ifeval"]
assert all(len(rows) == len(prompts) for rows in verdicts.values()), "responses are missing"

# %% [markdown]
# ## Scores
#
# Each column is a model in one prompt format: four accuracies with 95 % confidence intervals, and
# diagnostics that confound a comparison. `at_cap` is the share of responses cut at the length
# limit, `eos_rate` the share that end with the stop token, `repetition` the share dominated by a
# loop, `mean_length` is in tokens, and `distinct` counts the different responses: a model that
# gives the same response to every prompt passes some instructions without reading them.

# %%
end_of_turn = models.load_tokenizer(config).eos_token
metrics = ifeval.grid_metrics(responses, verdicts, end_of_turn)
if not config.model.instruct:
    print("Instruct: not run (model.instruct is not set)")
tables.score_table(metrics)

# %% [markdown]
# Decoding is greedy, and in float32 a response does not depend on the rest of its batch. In half
# precision it may: rounding differs with the shape of the batch, and two tokens can be a tie. Some
# responses are therefore generated again in smaller batches.

# %%
noise = None
if device.dtype != "float32" and ("SFT", "chat") in responses:
    noise = grid.decoding_noise(config, device, adapter, prompts, responses["SFT", "chat"])
    print(f"of {noise['repeated']} responses, {noise['responses_changed']} changed,")
    print(f"and {noise['verdicts_changed']} verdicts with them")
else:
    print("float32: no response depends on its batch (the tests compare them)")

# %% [markdown]
# The prompt-level intervals are Wilson's. The instruction-level intervals are a bootstrap over
# prompts, because the instructions of one prompt share one response and are not independent.
# Compare columns of the same format first. The difference between raw and chat within a model is
# the effect of the chat template alone.
#
# Published figures for the same prompts stand beside ours, with their protocol. Where the model and
# the protocol are the same, decoding is greedy and only a few prompts should lie between the two;
# `apart` counts them. `eval.guardrails` adds MMLU, GSM8K and TruthfulQA with the settings of the
# published recipe. They take hours, and fine-tuning is not expected to move them by more than a
# point or two. SFT is compared with base item by item, with the same test as on IFEval.

# %%
import pandas as pd

published = tables.beside_ours(grid.known_figures(config), metrics)
if published:
    display(pd.DataFrame(published))
else:
    print("There are no published figures for this model and these prompts.")

# %%
guarded, items = [], {}
for name in grid.model_names(config) if config.eval.guardrails else []:
    model, tokenizer = grid.load_model(name, config, device, adapter), models.load_tokenizer(config)
    items[name] = guardrails.run_tasks(model, tokenizer, batch_size=8)
    for row in items[name]:
        figure = guardrails.PUBLISHED[row["task"]].get(name)
        shown = {key: value for key, value in row.items() if key != "outcomes"}
        guarded.append({"model": name, **shown, "published": figure})
guarded_pairs = guardrails.compare_tasks(items["base"], items["SFT"]) if items else []
if guarded:
    display(pd.DataFrame(guarded), pd.DataFrame(guarded_pairs))
else:
    print("MMLU, GSM8K and TruthfulQA: not run (eval.guardrails is off)")

# %% [markdown]
# ## Paired comparisons
#
# Differences are percentage points of prompt-level strict accuracy, with a bootstrap interval over
# prompts. `won` and `lost` count the prompts that only the first-named or only the second-named
# model passed. `p` is adjusted as the rule says: for the secondary comparison it is at least that
# of the primary one, for the others it is Holm's.

# %%
compared = significance.compare_grid(verdicts, alpha, margin)
primary = compared[0]
tables.comparison_table(compared)

# %%
import matplotlib.pyplot as plt

figure, axes = plt.subplots(figsize=(7, 0.8 + 0.35 * len(compared)), layout="constrained")
for position, row in enumerate(reversed(compared)):
    color = "#c44e52" if row is primary else "#4c72b0"
    axes.plot(row["difference_ci95"], [position] * 2, color=color)
    axes.plot(row["difference_points"], position, "o", color=color)
axes.axvline(0, color="#8c8c8c", linewidth=0.8)
axes.set_yticks(range(len(compared)), [row["comparison"] for row in reversed(compared)])
axes.set(xlabel="difference in points, 95 % interval", ylim=(-0.6, len(compared) - 0.4))
axes.set_title(f"{primary['comparison']}: {primary['verdict']}")
points = [f"{row['comparison']} {tables.in_points(row)}" for row in compared]
notebooks.show_figure(figure, f"Differences with intervals: {'; '.join(points)}.", config.label)

# %% [markdown]
# The primary comparison is drawn in red; it is the one that the headline reports. If an interval
# includes zero, the direction of the difference is undecided. The intervals are not adjusted for
# the number of comparisons, and the exact test is stricter than they are: where an interval
# excludes zero and the verdict is *not distinguishable*, the verdict counts.
#
# ## Instruction types
#
# Some types pass by accident: a model that repeats one short sentence uses no commas. The bars are
# therefore descriptive, and the verdict is based on all prompts together. Types marked with a dot
# are those that the training data teaches, where that is known.

# %%
prompt_format = primary["b"][1]
taught = grid.taught_types(config)
by_type = {row["model"]: row["by_type"] for row in metrics if row["format"] == prompt_format}
shares = pd.DataFrame(by_type).map(lambda counts: counts[0] / counts[1])
shares = shares.rename(lambda kind: f"{'• ' if kind in taught else ''}{kind}").sort_values("SFT")
gained = int((shares["SFT"] > shares["base"]).sum())
colors = ["#c5c9d3", "#4c72b0", "#8c8c8c"]
axes = shares.plot.barh(figsize=(8, 7), width=0.8, color=colors[: len(by_type)])
axes.set(xlabel=f"share followed ({prompt_format}, strict)", ylabel="")
finding = f"SFT follows {gained} of {len(shares)} instruction types more often than base"
axes.set_title(finding)
notebooks.show_figure(axes.figure, f"Share followed, by type and model. {finding}.", config.label)

# %% [markdown]
# A type near zero for every model is one that the fine-tuning data does not contain; it still
# counts in the average. With the offline overlay, the base model has seen requests and responses as
# plain text, as every pretrained model has. Fine-tuning adds the chat format and when to stop,
# which is why its raw scores differ much less than its chat scores.
#
# The same counts per type for the primary comparison:

# %%
tables.type_table(primary["by_type"])

# %% [markdown]
# Where the taught types are known, the prompts are split into those whose instructions are all
# taught and the others. The others may fall: a model that has learned to give short responses and
# to stop no longer passes word counts and keywords by continuing to the limit. `before` and `after`
# count the prompts that base and SFT pass.

# %%
known = [set(prompt["instruction_id_list"]) <= taught for prompt in prompts]
subset = [i for i, all_taught in enumerate(known) if all_taught]
rest = [i for i, all_taught in enumerate(known) if not all_taught]
a, b = tuple(primary["a"]), tuple(primary["b"])
halves = {"all types taught": subset, "other types": rest} if taught else {}
parts = significance.compare_parts(verdicts[a], verdicts[b], halves)
tables.part_table(parts) if parts else "it is not known what the training data teaches"

# %%
on_taught = ifeval.grid_metrics(responses, verdicts, end_of_turn, subset) if subset else []
if on_taught:
    display(tables.score_table(on_taught))

# %% [markdown]
# ## Wins and losses
#
# Averages hide what happened. The next cell prints up to five wins and up to five losses of the
# primary comparison, with the instruction that the failing response did not follow.

# %%
place = {prompt["key"]: index for index, prompt in enumerate(prompts)}
for heading, failing, passing in (("won", a, b), ("lost", b, a)):
    for index in [place[key] for key in primary[heading][:5]]:
        verdict = verdicts[failing][index]
        names = zip(verdict["instruction_id_list"], verdict["strict"], strict=True)
        failed = [name for name, ok in names if not ok]
        print(f"{heading.upper()} {prompts[index]['prompt'][:300]!r}")
        for row in (passing, failing):
            print(f"  {' '.join(row)}: {responses[row][index]['response'][:240]!r}")
        print(f"  not followed by {' '.join(failing)}: {', '.join(failed)}\n")

# %% [markdown]
# The frame below lists every prompt by the outcome of the primary comparison. Open one to read all
# responses and what each of them did not follow. The same page is stored as
# `04_ifeval_eval/responses.html`; websites that show no frames leave it out.

# %%
page = explorer.render_responses(prompts, responses, verdicts, primary, config.label)
notebooks.show_page(page, "Every prompt and response")

# %% [markdown]
# ## A second benchmark
#
# IFBench has instructions that IFEval does not have, such as words in alphabetical order or nested
# quotation marks. None of its comparisons is the primary one, so their p-values are corrected
# together. A score has to be read beside that of a response which ignores the prompt: many of the
# checkers have nothing to object to in the single letter `x`, such as those of repeated words and
# of alphabetical order, so a model that writes whole sentences can score lower than it. Where two
# scores are below 5 %, the verdict is *floor*: both are too close to zero to be compared.

# %%
others = {}
for name in config.eval.benchmarks[1:]:
    shared = (prompts_of[name], responses_of[name], verdicts_of[name], end_of_turn, config)
    others[name] = benchmarks.summarise_other(name, *shared)
    print(f"{others[name]['title']}: {others[name]['n']} prompts; {others[name]['source']}")
    print(f"the response 'x' passes {others[name]['trivial']:.1%} of the prompts")
    display(tables.score_table(others[name]["metrics"]))
    display(tables.comparison_table(others[name]["comparisons"]))
if not others:
    print("Other benchmarks than IFEval: not run (eval.benchmarks names none)")

# %% [markdown]
# ## Write the results
#
# `metrics.json` holds one object per model and format on IFEval, each with the origin of its run.
# Other benchmarks are in `ifeval.json`, under `benchmarks`. `report.md` is a page about the run.
# `model_card.md` is the adapter's model card with the scores; to publish it with the adapter:
# `hf upload <repository> model_card.md README.md`.

# %%
origin = {"digest": artifacts.config_digest(config), "commit": session.commit()}
origin |= {"data": config.eval.prompts, "hardware": devices.hardware(), "label": config.label}
origin |= {"adapter": config.model.adapter, "adapter_base": config.model.adapter_base}
results = {"metrics": metrics, "comparisons": compared, "taught_types": on_taught}
results |= {"parts": parts, "sensitivity": sensitivity, "published": published}
results |= {"guardrails": guarded, "guardrails_paired": guarded_pairs}
results |= {"benchmarks": others, "decoding_noise": noise, "origin": origin}

# %%
from atlas_lib.evaluate import report_card

inputs = [trained] if trained else []
with artifacts.stage("04_ifeval_eval", config, out, inputs, **work) as folder:
    for benchmark, rows in responses_of.items():
        for row, given in rows.items():
            file = f"{grid.file_name(benchmark, *row)}.jsonl"
            pairs = zip(prompts_of[benchmark], given, strict=True)
            keyed = [{"key": p["key"], "prompt": p["prompt"], **response} for p, response in pairs]
            artifacts.write_jsonl(folder / "responses" / file, keyed)
            artifacts.write_jsonl(folder / "scores" / file, verdicts_of[benchmark][row])
    artifacts.write_lines(folder / "responses.html", [page])
    if trained:
        report_card.write_model_card(folder / "model_card.md", adapter / "README.md", results)
    artifacts.write_json(folder / "ifeval.json", results)
artifacts.write_json(out / "metrics.json", [row | origin for row in metrics])

# %%
report_card.write_report(out / "report.md", out, config, results)

# %% [markdown]
# What each stage took: minutes of its last session, and the most memory of its process and GPU.
# `seconds` and `tokens` are those of training and of generating; of the responses, only those of
# this session are counted. On a GPU, the shares compare training with the rate of a matrix
# multiplication and decoding with that of a copy, both measured there.

# %%
notebooks.ledger(out)

# %%
headline.update(Markdown(f"**{tables.verdict_line(primary)}**"))

# %% [markdown]
# Kaggle returns the files of a run but not its notebook; there, the next cell stores it with them.

# %% tags=["keep"]
notebooks.keep("04_ifeval_eval", out)

# %% [markdown]
# ## Summary
#
# All models respond to the same prompts in two formats, the same checkers score them, and a paired
# test with a rule fixed in advance decides which differences are more than noise. The verdict is
# about one adapter on these prompts.
#
# **What did not work:** comparing two averages. The published difference between base and SFT for
# this recipe, measured raw, is two prompts of 541, from which nothing can be concluded.
#
# **Next:** change a value of [03_sft_train](03_sft_train.ipynb) with `SET` and evaluate again.
