"""Speed and memory of one recipe trained in several ways: same data, labels and rows a step.

    python -m benchmarks.train [--steps 6] [--loss-steps 3] [--json results/bench_train.json]

On a GPU it is Qwen2.5-0.5B's true shape; on a CPU four layers of 256 with the same 151,936 words,
so that the loss weighs more there than in the real model. Weights are random: neither time nor
memory depends on what they are. Conversations are those of benchmarks.audit. Every row of the
table runs in a process of its own, so that its peak memory is its own.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from atlas_lib import artifacts, memory, model, runtime, template
from atlas_lib import config as configuration
from benchmarks import audit
from tools import qwen_tokenizer

MIB = 2**20
ROWS_A_STEP = 16
VOCABULARY = 151_936
# hidden, intermediate (4.75 times hidden, as in Qwen's), layers, heads, key and value heads
CPU_SHAPE = (256, 1216, 4, 4, 2)
GPU_SHAPE = (896, 4864, 24, 14, 2)  # Qwen2.5-0.5B


@dataclass(frozen=True)
class Row:
    """One way of training: a config, what differs from it, and which loss."""

    what: str
    config: str = "sft_qwen05b"
    changes: dict = field(default_factory=dict)
    full_logits: bool = False  # the model's own loss, as in the recipe's day
    compact: bool = False  # model.score_supervised_positions_only
    tile: int = 32768  # words that TRL's loss scores at a time
    tokens: int = 4096
    tag: str = ""


ROWS = {
    "a": Row("published recipe, TRL's defaults of today"),
    "b": Row("published recipe, full logits", full_logits=True),
}


def build(folder: Path, on_gpu: bool) -> None:
    """A Qwen2 of random weights, always the same, with the true vocabulary, saved in `folder`."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    hidden, intermediate, layers, heads, key_value_heads = GPU_SHAPE if on_gpu else CPU_SHAPE
    torch.manual_seed(0)
    shape = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=32768,
        rope_theta=1e6,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(shape).save_pretrained(folder)


def conversations(rows: int, device: Any) -> list[list[dict]]:
    """Those of benchmarks.audit; on a CPU each turn is cut to a quarter, as max_length is."""
    chats = list(audit.conversations(rows))
    if device.name == "cpu":
        for turn in (turn for chat in chats for turn in chat):
            words = turn["content"].split()
            turn["content"] = " ".join(words[: max(1, len(words) // 4)])
    return chats


def resolved(row: Row, folder: Path, dropout: bool) -> Any:
    """The row's config, with the random weights in the place of the hub's."""
    tokenizer = str(qwen_tokenizer.fetch())
    local = {"model.base": str(folder), "model.base_revision": None, "run.require_gpu": False}
    local |= {"model.tokenizer": tokenizer, "model.tokenizer_revision": None}
    local |= {"train.report_to": "none", "train.logging_steps": 1}
    local |= {"train.max_length": 256}
    return configuration.load(
        row.config, "", local | ({} if dropout else {"lora.lora_dropout": 0.0}) | row.changes
    )


def resident(field: str) -> int:
    """Bytes that /proc says of this process: VmRSS now, VmHWM at most."""
    [kib] = re.findall(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kib) * 1024


def forget_peak(device: Any) -> int:
    """Let the peak begin here; bytes in use now."""
    if device.name == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def peak(device: Any) -> int:
    """Most bytes in use since `forget_peak`."""
    if device.name == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    return resident("VmHWM")


def trainer_for(row: Row, config: Any, device: Any, scratch: Path, steps: int) -> Any:
    """The training cell of notebook 03 for this row, with a trainer that counts and takes times."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PrinterCallback, TrainerCallback
    from trl import SFTConfig, SFTTrainer
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    class Clock(TrainerCallback):
        def __init__(self):
            self.ends = []

        def on_train_begin(self, *args, **kwargs):
            self.ends.append(now(device))

        on_step_end = on_train_begin

    class Counting(SFTTrainer):
        counts: list = []

        def training_step(self, model, inputs, num_items_in_batch=None):
            labels, real = inputs["labels"], inputs["attention_mask"]
            self.counts.append((labels.numel(), real.sum(), (labels != -100).sum()))
            return super().training_step(model, inputs, num_items_in_batch)

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            if not row.full_logits:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            return model(**inputs, use_cache=False, num_items_in_batch=num_items_in_batch).loss

    tokenizer = model.load_tokenizer(config)
    template.patch_chat_template_for_assistant_mask(tokenizer)
    base = model.load_weights("base", config, device, config.quantization.load_in_4bit)
    recompute = memory.must_checkpoint(base, config, device)
    chats = conversations(steps * ROWS_A_STEP, device)
    arguments = SFTConfig(
        **{
            "output_dir": str(scratch),
            "seed": config.seed,
            "fp16": device.dtype == "float16",
            "bf16": device.dtype == "bfloat16",
            "use_cpu": device.name == "cpu",
            "disable_tqdm": True,
            **config.train.model_dump(exclude_unset=True),
            "activation_checkpointing": recompute,
        }
    )
    clock = Clock()
    trainer = Counting(
        model=base,
        args=arguments,
        train_dataset=Dataset.from_list([{"messages": chat} for chat in chats]),
        processing_class=tokenizer,
        peft_config=LoraConfig(task_type="CAUSAL_LM", **config.lora.model_dump()),
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)
    model.keep_adapter_in_float32(trainer.model)
    if row.compact:
        model.score_supervised_positions_only(device)
    utils._CHUNKED_LOGPROB_CHUNK_SIZE = row.tile
    chunked_logprob.TOKEN_CHUNK_SIZE = row.tokens
    return trainer, clock


def now(device: Any) -> float:
    if device.name == "cuda":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


def measure(name: str, folder: Path, steps: int, dropout: bool) -> dict:
    row = ROWS[name]
    config = resolved(row, folder, dropout)
    device = runtime.device(config)
    with tempfile.TemporaryDirectory() as scratch:
        trainer, clock = trainer_for(row, config, device, Path(scratch), steps)
        before = forget_peak(device)
        trainer.train()
        top = peak(device)
    micro = len(trainer.counts) // steps
    counts = [
        [sum(int(c[k]) for c in trainer.counts[s * micro : (s + 1) * micro]) for k in range(3)]
        for s in range(steps)
    ]
    times = [b - a for a, b in zip(clock.ends, clock.ends[1:])]
    fed, real, supervised = (sum(c[k] for c in counts[1:]) for k in range(3))
    total = sum(times[1:])
    return {
        "row": name,
        "step_seconds": statistics.median(times[1:]),
        "all": times,
        "fed": fed,
        "real": real,
        "supervised": supervised,
        "real_s": real / total,
        "supervised_s": supervised / total,
        "peak_mib": top / MIB,
        "over_mib": (top - before) / MIB,
        "losses": [e["loss"] for e in trainer.state.log_history if "loss" in e],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--row", help=argparse.SUPPRESS)
    args = parser.parse_args()


if __name__ == "__main__":
    main()
