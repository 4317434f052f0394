"""Speed and memory of one recipe, trained in several ways: same data, labels and rows per step.

    python -m benchmarks.train [--steps 4] [--loss-steps 3] [--json results/bench_train.json]

On a GPU: the shape and length of Qwen2.5-0.5B (not run yet). On a CPU: four layers of width 256,
with every conversation and `max_length` cut to a quarter. The vocabulary keeps its size, so that
the loss takes a far larger share of the time than in the real model. Weights are random, the
tokenizer is Qwen's, and the conversations are those of benchmarks.audit. Each row runs in a process
of its own, so that peak memory is measured separately. Run it on an otherwise idle machine.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from atlas_lib import artifacts, compat, devices, models, session, template
from atlas_lib.config import load_config
from atlas_lib.train import memory, trl_loss
from atlas_lib.train.throughput import least_flops, matmul_rate, now
from benchmarks import audit
from tools import npm_tokenizers

MIB, ROWS_A_STEP, CUT = 2**20, 16, 4
BATCH, ACCUMULATION = "train.per_device_train_batch_size", "train.gradient_accumulation_steps"
SHAPES = {  # intermediate is about 4.75 times hidden in the small one too; heads are of 64
    "cpu": {"hidden_size": 256, "intermediate_size": 1216, "num_hidden_layers": 4}
    | {"num_attention_heads": 4, "num_key_value_heads": 2},
    "cuda": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
    | {"num_attention_heads": 14, "num_key_value_heads": 2},
}
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
QUIET = {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}


@dataclass(frozen=True)
class Row:
    """One way of training: a config with changes, and how the loss is computed."""

    what: str
    config: str = "sft_qwen05b_published"
    changes: dict = field(default_factory=dict)
    full_logits: bool = False  # the model's own loss
    small_tiles: bool = False  # 4 MiB of logits at a time, which malloc can keep; CPU only
    supervised_only: bool = False  # as TRL does by itself on a GPU


OURS = {"small_tiles": True, "supervised_only": True}
ONE_ROW, ALL_ROWS = {BATCH: 1, ACCUMULATION: 16}, {BATCH: 16, ACCUMULATION: 1}
NO_RECOMPUTING = {"train.activation_checkpointing": None}
ROWS = {  # between a and c one change a row
    "a": Row("the recipe, TRL's loss as it is"),
    "b": Row("the recipe, the model's own full-logits loss", full_logits=True),
    "a1": Row("a + small tiles", small_tiles=True),
    "a2": Row("a1 + supervised positions only", **OURS),
    "a3": Row("a2 + recomputing only if needed", changes=NO_RECOMPUTING, **OURS),
    "c": Row("a3 + grouped by length: ours, fastest", "sft_qwen05b_fast", **OURS),
    "c1": Row("c in batches of 16 x 1", "sft_qwen05b_fast", ALL_ROWS, **OURS),
    "d": Row("a2 in batches of 1 x 16: ours, leanest", changes=ONE_ROW, **OURS),
}
SAME_LOSS = ("a", "b", "c", "d")


def build(folder: Path, shape: dict[str, Any]) -> None:
    """Save a Qwen2 of random weights, the same at each call, by default with its vocabulary."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    fixed = {"vocab_size": 151_936, "max_position_embeddings": 32_768, "rope_theta": 1e6}
    Qwen2ForCausalLM(Qwen2Config(tie_word_embeddings=True, **fixed | shape)).save_pretrained(folder)


def resolved(row: Row, base: str, compare_losses: bool) -> Any:
    """The row's config with local files in place of the hub's.

    To compare losses, dropout is off (its random numbers depend on the shape of a batch), grouping
    is off (it changes the order of rows), and so is warm-up (its first step changes nothing).
    """
    local = {"model.base": base, "model.base_revision": None, "run.require_gpu": False}
    tokenizer = str(npm_tokenizers.tokenizer_folder())
    local |= {"model.tokenizer": tokenizer, "model.tokenizer_revision": None}
    local |= {"train.report_to": "none", "train.logging_steps": 1} | row.changes
    if compare_losses:
        local |= {"lora.lora_dropout": 0.0, "train.warmup_steps": 0}
        local |= {"train.train_sampling_strategy": "random"}
    if devices.choose_device(load_config(row.config, "", local)).name == "cpu":
        local["train.max_length"] = 1024 // CUT
    return load_config(row.config, "", local)


def conversations(rows: int, device: Any) -> list[dict]:
    """Rows of benchmarks.audit, their turns cut to a quarter on a CPU."""
    chats = list(audit.conversations(rows))
    if device.name == "cpu":
        for turn in (turn for chat in chats for turn in chat):
            words = turn["content"].split()
            turn["content"] = " ".join(words[: max(1, len(words) // CUT)])
    return [{"messages": chat} for chat in chats]


def forget_peak(device: Any) -> None:
    if device.name == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: VmHWM restarts at VmRSS


def in_use(device: Any) -> tuple[int, int]:
    """Bytes in use now, and at most since `forget_peak`."""
    if device.name == "cuda":
        import torch

        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    sizes = dict(re.findall(r"(Vm\w+):\s+(\d+) kB", Path("/proc/self/status").read_text()))
    return int(sizes["VmRSS"]) * 1024, int(sizes["VmHWM"]) * 1024


def others_seconds() -> float:
    """Processor seconds since boot of everything but this process."""
    import psutil

    machine, own = psutil.cpu_times(), os.times()
    return sum(machine) - machine.idle - machine.iowait - own.user - own.system


def trainer_for(row: Row, config: Any, device: Any, steps: int, scratch: str) -> Any:
    """The trainer for `row` on the conversations of this benchmark."""
    tokenizer = models.load_tokenizer(config)
    template.patch_chat_template_for_assistant_mask(tokenizer)
    base = models.load_weights("base", config, device, config.quantization.load_in_4bit)
    changes = {"activation_checkpointing": memory.must_checkpoint(base, config, device)}
    rows = conversations(steps * ROWS_A_STEP, device)
    trainer = measured_trainer(
        base, tokenizer, config, device, rows, changes | {"output_dir": scratch}, row.full_logits
    )
    choose_loss(row, device)
    return trainer


def measured_trainer(
    base: Any,
    tokenizer: Any,
    config: Any,
    device: Any,
    rows: list[dict],
    changes: dict,
    full_logits: bool = False,
) -> Any:
    """The trainer of notebook 03, which counts tokens and records when steps end."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PrinterCallback, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Measured(SFTTrainer):
        counts, ends = [], []  # per micro-batch: fed, real, supervised, squared lengths

        def training_step(self, model, inputs, num_items_in_batch=None):
            real, labels = inputs["attention_mask"], inputs["labels"]
            lengths = real.sum(1)
            parts = (torch.ones_like(real), lengths, labels != -100, lengths**2)
            self.counts.append(torch.stack([part.sum() for part in parts]))
            return super().training_step(model, inputs, num_items_in_batch)

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            if not full_logits:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            return model(**inputs, use_cache=False, num_items_in_batch=num_items_in_batch).loss

    class Clock(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            Measured.ends.append((now(device), others_seconds()))

        on_step_end = on_train_begin

    arguments = config.train.model_dump(exclude_unset=True) | {"disable_tqdm": True}
    arguments |= {"seed": config.seed, "use_cpu": device.name == "cpu"}
    arguments |= {"fp16": device.dtype == "float16", "bf16": device.dtype == "bfloat16"}
    trainer = Measured(
        model=base,
        args=SFTConfig(**compat.trainer_arguments(arguments | changes)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", **config.lora.model_dump()),
        callbacks=[Clock()],
    )
    trainer.remove_callback(PrinterCallback)
    compat.keep_adapter_in_float32(trainer.model)
    return trainer


def choose_loss(row: Row, device: Any) -> None:
    """Configure TRL's loss for the row; on a GPU it is left unchanged."""
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    if row.supervised_only:
        trl_loss.fit_loss(device.name, device.dtype)
    elif row.small_tiles and device.name == "cpu":
        chunked_logprob.TOKEN_CHUNK_SIZE, utils._CHUNKED_LOGPROB_CHUNK_SIZE = trl_loss.CPU_TILE


def measure(name: str, base: str, steps: int, compare_losses: bool) -> dict:
    """Train `steps` steps as ROWS[name] says. Figures are medians over all steps but the first."""
    row = ROWS[name]
    config = resolved(row, base, compare_losses)
    device = devices.choose_device(config)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = trainer_for(row, config, device, steps, scratch)
        forget_peak(device)
        before, _ = in_use(device)
        trainer.train()
        _, peak = in_use(device)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if compare_losses:
        return {"losses": losses}
    ends, others = zip(*trainer.ends, strict=True)
    timed = timed_steps(trainer)
    seconds, counts = zip(*timed, strict=True)
    steady = timed[1:]
    fed, real, supervised = (sum(c[k] for c in counts) for k in range(3))
    result = {
        "row": name,
        **asdict(row),
        "activation_checkpointing": trainer.args.activation_checkpointing,
        "real_tokens_per_second": statistics.median(c[1] / s for s, c in steady),
        "supervised_tokens_per_second": statistics.median(c[2] / s for s, c in steady),
        "step_seconds": statistics.median(s for s, _ in steady),
        "seconds": seconds,
        "others_share": (others[-1] - others[1]) / (ends[-1] - ends[1]) / os.cpu_count(),
        "peak_over_model_mib": (peak - before) / MIB,
        "peak_mib": peak / MIB,
        "fed_over_real": fed / real,
        "tokens": {"fed": fed, "real": real, "supervised": supervised},
        "losses": losses,
    }
    return result | ({"limit": arithmetic_limit(trainer, device, steady)} if name == "c" else {})


def timed_steps(trainer: Any) -> list[tuple[float, list[int]]]:
    """Seconds and token counts of each optimizer step of a measured trainer."""
    import torch

    seconds = [end - start for (start, _), (end, _) in pairwise(trainer.ends)]
    counts = torch.stack(trainer.counts).view(len(seconds), -1, 4).sum(1).tolist()
    return list(zip(seconds, counts, strict=True))


def arithmetic_limit(trainer: Any, device: Any, steady: list) -> dict:
    """How long the steps' multiplications alone must take here, and how far the steps are."""
    rate = matmul_rate(device)
    limits = [least_flops(trainer.model, counts) / rate for _, counts in steady]
    return {
        "tera_flop_per_second": rate / 1e12,
        "seconds_per_step": statistics.median(limits),
        "step_over_limit": statistics.median(
            s / least for (s, _), least in zip(steady, limits, strict=True)
        ),
    }


def undisturbed(name: str, base: str, steps: int) -> dict:
    """Figures of a row; up to three runs, until other processes use less than 5 % of the CPUs."""
    runs = []
    while len(runs) < 3 and all(run["others_share"] > 0.05 for run in runs):
        runs.append(in_own_process(name, base, steps))
    return min(runs, key=lambda run: run["others_share"])


def in_own_process(name: str, base: str, steps: int, *flags: str) -> dict:
    command = [sys.executable, "-m", "benchmarks.train", "--row", name, "--base", base]
    done = subprocess.run(
        [*command, "--steps", str(steps), *flags],
        env=os.environ | OFFLINE | QUIET,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def table(rows: list[dict]) -> str:
    """Markdown; "fed" is with padding."""
    keys = ["real_tokens_per_second", "supervised_tokens_per_second", "step_seconds"]
    keys += ["peak_over_model_mib", "peak_mib", "fed_over_real"]
    lines = ["| row | what | " + " | ".join(k.replace("_", " ") for k in keys) + " |"]
    lines.append("|---|---|" + "---:|" * len(keys))
    for row in rows:
        figures = " | ".join(f"{row[k]:.{0 if row[k] > 100 else 2}f}" for k in keys)
        lines.append(f"| {row['row']} | {row['what']} | {figures} |")
    return "\n".join(lines)


def summary(rows: list[dict], losses: dict[str, list[float]]) -> dict:
    """Speed and memory ratios, the difference of losses, and the distance from the limit."""
    found = {row["row"]: row for row in rows}

    def ratio(one: str, other: str, key: str) -> float:
        return found[one][key] / found[other][key]

    apart = [abs(x - y) for n in SAME_LOSS for x, y in zip(losses[n], losses["a"], strict=True)]
    return {
        "speed_c_over_a": ratio("c", "a", "real_tokens_per_second"),
        "speed_c_over_b": ratio("c", "b", "real_tokens_per_second"),
        "memory_over_model_d_over_b": ratio("d", "b", "peak_over_model_mib"),
        "memory_d_over_b": ratio("d", "b", "peak_mib"),
        "largest_loss_difference": max(apart),
        "losses_without_dropout_and_grouping": losses,
        "limit_of_c": found["c"]["limit"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--loss-steps", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    parser.add_argument("--base", help=argparse.SUPPRESS)
    parser.add_argument("--losses", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.row:
        print(json.dumps(measure(args.row, args.base, args.steps, args.losses)))
        return
    if args.steps < 2:
        parser.error("--steps must be at least 2: the first one only warms up.")
    device = devices.choose_device(resolved(ROWS["a"], "", False))
    rows, losses = [], {}
    with tempfile.TemporaryDirectory() as base:
        build(Path(base), SHAPES[device.name])
        for name in ROWS:
            print(f"{name}: {ROWS[name].what}", file=sys.stderr, flush=True)
            rows.append(undisturbed(name, base, args.steps))
        for name in SAME_LOSS:
            print(f"losses of {name}", file=sys.stderr, flush=True)
            losses[name] = in_own_process(name, base, args.loss_steps, "--losses")["losses"]
    result = summary(rows, losses)
    print(table(rows))
    print(json.dumps(result, indent=1))
    if args.json:
        setting = {"device": asdict(device), "shape": SHAPES[device.name]}
        whole = setting | result | {"rows": rows} | session.provenance()
        artifacts.write_json(args.json, whole)


if __name__ == "__main__":
    main()
