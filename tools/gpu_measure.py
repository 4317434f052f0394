"""The measurements of `tools.gpu_check`, which starts them in processes of their own.

    python -m tools.gpu_measure FOLDER full|dry NAME...

FOLDER holds the random weights, built by the first process that needs them, and NAME.json with the
figures as they are found, so that a process that is ended leaves those it had.
"""

import functools
import gc
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from textwrap import shorten
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from atlas_lib import artifacts, compat, devices, models, session
from atlas_lib.config import load_config
from atlas_lib.evaluate import bandwidth, decoding, slot_cache
from atlas_lib.train import callbacks, memory, trl_loss
from benchmarks import train
from benchmarks.eval import CHOICES, SPECIALS, drawn, tokenizer_for
from tools.gpu_check import measuring

LENGTHS = (1.0, 0.785)  # of rows, in shares of max_length; on average UltraChat's 914 of 1024
SUPERVISED = 0.85  # of a row's tokens


@dataclass(frozen=True)
class Sizes:
    """How much is computed. The batch is the recipe's, with half of its accumulation."""

    shape: dict[str, Any] = field(default_factory=lambda: train.SHAPES["cuda"])
    vocabulary: int = 151_936
    tokens: int = 1024
    accumulation: int = 2
    steps: int = 30
    steps_recomputing: int = 6
    step_seconds: float = 70.0  # after which the training ends early; half of it with recomputing
    prompts: int = 541
    new_tokens: int = 256  # a response
    compared: int = 8  # prompts whose responses are compared with model.generate's
    compared_tokens: int = 32
    copied_bytes: int = memory.GIB


SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2}
SMALL |= {"initializer_range": 0.3}  # with 0.02 so small a model repeats its last token
DRY = Sizes(SMALL, 1024, 64, 1, 3, 2, 20.0, 12, 8, 4, 8, memory.GIB // 64)


class Task:
    """What every measurement needs: sizes, configuration, device and the folder of the weights."""

    def __init__(self, folder: Path, dry: bool):
        self.folder, self.dry, self.sizes = folder, dry, DRY if dry else Sizes()
        model = {"model.base": str(folder / "model"), "model.base_revision": None}
        rows = {"train.max_length": self.sizes.tokens}
        rows |= {"train.gradient_accumulation_steps": self.sizes.accumulation}
        given = model | rows | {"run.require_gpu": False, "train.report_to": "none"}
        self.config = load_config("sft_qwen05b", "", given)
        self.tokenizer = tokenizer_for(self.sizes.vocabulary // CHOICES)  # a word for every id

    @functools.cached_property
    def device(self) -> devices.Device:
        return devices.choose_device(self.config)  # a refusal is the error of the measurement

    def build(self) -> Path:
        """The folder of the random weights, built if absent."""
        target, part = self.folder / "model", self.folder / "model.part"
        if not target.is_dir():
            train.build(part, self.sizes.shape | {"vocab_size": self.sizes.vocabulary})
            part.rename(target)
        return target

    def load(self, dtype: str, in_4bit: bool = False) -> Any:
        """The random model; no id of its own ends a response."""
        self.build()
        device = devices.Device(self.device.name, dtype, "")
        model = models.load_weights("base", self.config, device, in_4bit)
        model.generation_config.eos_token_id = None
        return model

    def batch(self) -> tuple[int, int]:
        return self.config.train.per_device_train_batch_size, self.sizes.tokens


def card(task: Task) -> Iterator[dict]:
    """The device, its memory, and the provenance of everything measured on it."""
    found = {"device": asdict(task.device), "gpus_listed": devices.visible_gpus()}
    if task.device.name == "cuda":
        free, total = torch.cuda.mem_get_info()
        found |= {"free_gib": free / memory.GIB, "total_gib": total / memory.GIB}
    yield found | {"provenance": session.provenance()}


def kernels(task: Task) -> Iterator[dict]:
    """TRL's loss, sdpa and NF4 in the device's precision, against the same in float32."""
    device, dtype = task.device.name, getattr(torch, task.device.dtype)
    compat.choose_attention(device, task.device.dtype)
    torch.manual_seed(0)
    yield loss_error(task, dtype)
    rows, tokens = task.batch()
    yield {"attention_error_training": attention_error(task, dtype, rows, tokens, tokens)}
    window = task.sizes.tokens // 2
    decode = attention_error(task, dtype, task.sizes.prompts, 1, window)
    yield {"attention_error_decoding": decode}
    yield nf4_errors(task, dtype)


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    found, exact = found.detach().float(), exact.detach().float()
    return float((found - exact).norm() / exact.norm())


def loss_error(task: Task, dtype: torch.dtype) -> dict:
    """TRL's loss as notebook 03 uses it, and its gradient, against full logits in float32."""
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    trl_loss.fit_loss(task.device.name, task.device.dtype)
    width, n = task.sizes.shape["hidden_size"], task.sizes.tokens
    options = {"device": task.device.name, "dtype": dtype}
    hidden = torch.randn(n, width, **options, requires_grad=True)
    weight = torch.randn(task.sizes.vocabulary, width, **options) * 0.02
    targets = torch.randint(task.sizes.vocabulary, (n,), device=task.device.name)
    size = utils._CHUNKED_LOGPROB_CHUNK_SIZE
    rest = (None, 1.0, ("log_probs",))  # as TRL's trainer calls it
    scored = chunked_logprob.ChunkedLogProbFunction.apply(
        hidden, weight, None, targets, 1.0, size, *rest
    )[0]
    exact = hidden.detach().float().requires_grad_()
    logits = exact @ weight.float().T
    expected = -torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    scored.sum().backward()
    expected.sum().backward()
    return {
        "loss_on_triton": bool(chunked_logprob._use_triton(hidden.device)),
        "loss_error": relative_error(scored, expected),
        "loss_gradient_error": relative_error(hidden.grad, exact.grad),
    }


def attention_error(task: Task, dtype: torch.dtype, rows: int, queries: int, keys: int) -> float:
    """sdpa with padding and grouped heads, as training (several queries) and decoding call it.

    Against the plain kernel in float32; with gradients in training. Raises RuntimeError if only the
    plain kernel, which builds the whole matrix, can do it.
    """
    from transformers.integrations import sdpa_attention

    shape = task.sizes.shape
    heads, groups = shape["num_attention_heads"], shape["num_key_value_heads"]
    width = shape["hidden_size"] // heads
    sizes = [(rows, heads, queries, width), *[(rows, groups, keys, width)] * 2]
    parts = [torch.randn(size, device=task.device.name) for size in sizes]
    column = torch.arange(keys, device=task.device.name)
    ends = keys - torch.arange(rows, device=task.device.name)[:, None, None] % (keys // 2)
    mask = ((column <= column[-queries:, None]) & (column < ends))[:, None]
    module = SimpleNamespace(num_key_value_groups=heads // groups, is_causal=True)
    fused = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    forward, found = sdpa_attention.sdpa_attention_forward, []
    if queries == 1:
        forward = slot_cache.packed_attention
    for kind, allowed in ((dtype, fused), (torch.float32, SDPBackend.MATH)):
        given = [part.to(dtype).to(kind, copy=True) for part in parts]
        for tensor in given:
            tensor.requires_grad_(queries > 1)
        with sdpa_kernel(allowed):
            output, _ = forward(module, *given, mask, scaling=width**-0.5)
        if queries > 1:
            output.float().square().sum().backward()
        grads = [tensor.grad for tensor in given if tensor.grad is not None]
        found.append([output, *grads])
    return max(map(relative_error, *found))


def nf4_errors(task: Task, dtype: torch.dtype) -> dict:
    """bitsandbytes' NF4: what rounding costs, and products with and without a gradient."""
    from bitsandbytes import functional, matmul_4bit

    width = task.sizes.shape["hidden_size"]
    options = {"device": task.device.name, "dtype": dtype}
    weight = torch.randn(task.sizes.shape["intermediate_size"], width, **options) * 0.02
    packed, state = functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    back = functional.dequantize_4bit(packed, state)
    lost = (back.float() - weight.float()).abs().mean() / weight.float().abs().mean()
    errors = []
    for rows in (1, 64):
        inputs = torch.randn(rows, width, **options, requires_grad=rows > 1)
        product = matmul_4bit(inputs, packed.t(), state)
        errors.append(relative_error(product, inputs.float() @ back.float().T))
    return {"nf4_rounding": float(lost), "nf4_product_error": max(errors)}


def probe(task: Task) -> Iterator[dict]:
    """The memory that notebook 03 foresees for a batch, and what a batch takes."""
    from peft import LoraConfig, get_peft_model

    device, (rows, tokens) = task.device, task.batch()
    base = task.load(device.dtype, in_4bit=True)
    free = devices.free_bytes(device)
    foreseen = memory.activation_bytes(base, task.config, device, rows * tokens)
    yield {"foreseen_gib": foreseen / memory.GIB, "foreseen_share_of_free": foreseen / free}
    lora = LoraConfig(task_type="CAUSAL_LM", **task.config.lora.model_dump())
    adapted = get_peft_model(base, lora).train()
    ids = torch.zeros(rows, tokens, dtype=torch.long, device=device.name)
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    mixed = device.dtype != "float32"
    train.forget_peak(device)
    before, _ = train.in_use(device)
    with torch.autocast(device.name, getattr(torch, device.dtype), enabled=mixed):
        output = adapted(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
    output.logits.float().sum().backward()
    _, peak = train.in_use(device)
    yield {"batch_gib": (peak - before) / memory.GIB}
    if device.name == "cuda":  # a CPU's figure is that of the whole process
        yield {"batch_over_foreseen": (peak - before) / foreseen}


class Deadline(callbacks.ProgressLines):
    """Progress lines, and an end after some seconds, but not before the second step."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step > 1 and time.monotonic() - self.started > self.seconds:
            control.should_training_stop = True


def training(task: Task) -> Iterator[dict]:
    """The recipe on random rows, as it is but for the accumulation, then with recomputing."""
    trl_loss.fit_loss(task.device.name, task.device.dtype)
    sizes = task.sizes
    yield train_steps(task, False, sizes.steps, sizes.step_seconds)
    seconds = sizes.step_seconds / 2
    yield {"with_recomputing": train_steps(task, True, sizes.steps_recomputing, seconds)}


def train_steps(task: Task, recomputing: bool, steps: int, seconds: float) -> dict:
    """Speed, memory and skipped steps of a training. Its speed leaves out the first step.

    The multiplications are those of `train.least_flops`: about 2.19 GFLOP a token at this shape,
    nothing recomputed.
    """
    device = task.device
    gc.collect()  # a trainer that has ended refers to itself
    base = task.load(device.dtype, in_4bit=True)
    per_step = task.batch()[0] * task.sizes.accumulation
    changes = {"max_steps": steps, "activation_checkpointing": recomputing}
    changes["assistant_only_loss"] = False  # the rows have labels
    changes |= {"output_dir": str(task.folder / "trainer"), "save_strategy": "no"}
    trainer = train.measured_trainer(
        base, task.tokenizer, task.config, device, random_rows(task, steps * per_step), changes
    )
    guard = callbacks.LossGuard()
    trainer.add_callback(guard)
    trainer.add_callback(Deadline(seconds))
    train.forget_peak(device)
    trainer.train()
    _, peak = train.in_use(device)
    steady = train.timed_steps(trainer)[1:]
    limit = train.arithmetic_limit(trainer, device, steady)
    spent, real = sum(s for s, _ in steady), sum(counts[1] for _, counts in steady)
    flops = sum(train.least_flops(trainer.model, counts) for _, counts in steady)
    return {
        "steps": len(steady) + 1,
        "real_tokens_per_second": real / spent,
        "giga_flop_per_token": flops / real / 1e9,
        "tera_flop_per_second": flops / spent / 1e12,
        "matmul_tera_flop_per_second": limit["tera_flop_per_second"],
        "share_of_matmul_peak": flops / spent / 1e12 / limit["tera_flop_per_second"],
        "skipped_steps": guard.skipped,
        "peak_gib": peak / memory.GIB,
        "last_loss": next(e["loss"] for e in reversed(trainer.state.log_history) if "loss" in e),
    }


def random_rows(task: Task, n: int) -> list[dict]:
    """Rows of ids and labels; every second one is shorter, so that batches are padded."""
    draw, rows = torch.Generator().manual_seed(0), []
    for row in range(n):
        length = int(task.sizes.tokens * LENGTHS[row % len(LENGTHS)])
        ids = torch.randint(len(SPECIALS), task.sizes.vocabulary, (length,), generator=draw)
        begin = int(length * (1 - SUPERVISED))
        labels = [-100] * begin + ids[begin:].tolist()
        rows.append({"input_ids": ids.tolist(), "labels": labels})
    return rows


def responses(task: Task) -> Iterator[dict]:
    """Decoding of all prompts in the device's precision, then of a few in float32."""
    sizes, device = task.sizes, task.device
    model, (prompts, _) = task.load(device.dtype), drawn(sizes.prompts)
    texts = task.tokenizer.batch_decode(prompts)
    decoding.generate(model, task.tokenizer, texts[:4], "raw", 4)  # loads the kernels
    train.forget_peak(device)
    started = train.now(device)
    found = decoding.generate(model, task.tokenizer, texts, "raw", sizes.new_tokens)
    seconds = train.now(device) - started
    _, peak = train.in_use(device)
    tokens = [response["n_tokens"] for response in found]
    rate = bandwidth.copy_rate(device, sizes.copied_bytes)
    least, copying = bandwidth.least_bytes(model, list(map(len, prompts)), tokens)
    yield {
        "prompts": sizes.prompts,
        "new_tokens_at_most": sizes.new_tokens,
        "seconds": seconds,
        "tokens_per_second": sum(tokens) / seconds,
        "giga_bytes_per_second_copied": rate / 1e9,
        "share_of_bandwidth": least / rate / seconds,
        "seconds_over_floor_with_copies": seconds / (copying / rate),
        "peak_gib": peak / memory.GIB,
    }
    del model
    model, texts, found = float32_sample(task)
    yield {"distinct_words": len({word for text in found for word in text.split()})}
    inputs = task.tokenizer(texts, return_tensors="pt", padding=True).to(device.name)
    ids, mask, stop = inputs["input_ids"], inputs["attention_mask"], task.tokenizer.eos_token_id
    new = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=sizes.compared_tokens,
        do_sample=False, eos_token_id=stop, pad_token_id=0,
    )[:, ids.shape[1] :].tolist()  # fmt: skip
    expected = [decoding.cut_at_stop(task.tokenizer, row, [stop])["response"] for row in new]
    equal = sum(one == other for one, other in zip(found, expected, strict=True))
    yield {"rows_compared": len(found), "rows_as_generate": equal / len(found)}


def float32_sample(task: Task) -> tuple[Any, list[str], list[str]]:
    """The model in float32, the first prompts and its responses to them."""
    model, (prompts, _) = task.load("float32"), drawn(task.sizes.prompts)
    texts = task.tokenizer.batch_decode(prompts[: task.sizes.compared])
    found = decoding.generate(model, task.tokenizer, texts, "raw", task.sizes.compared_tokens)
    return model, texts, [response["response"] for response in found]


def every_gpu(task: Task) -> Iterator[dict]:
    """The same responses from a process on each GPU, narrowed to it as notebook 04 does it."""
    gpus = devices.visible_gpus()
    yield {"gpus": len(gpus)}
    if len(gpus) < 2:
        return
    folders = [task.folder / f"gpu_{number}" for number in range(len(gpus))]
    processes = []
    for gpu, folder in zip(gpus, folders, strict=True):
        folder.mkdir()
        (folder / "model").symlink_to(task.build())
        narrowed = os.environ | {devices.VISIBLE: gpu, devices.NARROWED: ""}
        processes.append(subprocess.Popen(measuring(folder, task.dry, ["one_gpu"]), env=narrowed))
    statuses = [process.wait() for process in processes]
    if any(statuses):
        raise RuntimeError(f"the process on GPU {gpus[statuses.index(max(statuses))]} failed")
    found = [artifacts.read_json(folder / "one_gpu.json")["figures"] for folder in folders]
    same = [one["responses"] == found[0]["responses"] for one in found]
    used = len({one["gpu"] for one in found})
    yield {"share_of_gpus_used": used / len(gpus), "share_of_gpus_equal": sum(same) / len(same)}


def one_gpu(task: Task) -> Iterator[dict]:
    """Which GPU this process uses, and its responses in float32."""
    cuda = task.device.name == "cuda"
    gpu = torch.cuda.get_device_properties(0).uuid if cuda else os.environ[devices.VISIBLE]
    _, _, found = float32_sample(task)
    yield {"gpu": str(gpu), "responses": found}


MEASUREMENTS = {
    "card": card,
    "kernels": kernels,
    "memory": probe,
    "training": training,
    "decoding": responses,
    "gpus": every_gpu,
    "one_gpu": one_gpu,
}


def measure_into(file: Path, name: str, task: Task) -> bool:
    """Write {figures, error, seconds} to `file` as they are found; whether there is no error."""
    started, figures, error = time.monotonic(), {}, None

    def write(done: bool) -> None:
        seconds = time.monotonic() - started
        found = {"done": done, "error": error, "seconds": seconds, "figures": figures}
        artifacts.write_json(file, found)

    write(False)
    try:
        for more in MEASUREMENTS[name](task):
            figures |= more
            write(False)
            print(f"{name}: {json.dumps(more)}", flush=True)
    except Exception as caught:  # of any library, driver or compiler
        if name != "card":  # whose error is told in one sentence
            traceback.print_exc()
        error = f"{type(caught).__name__}: {shorten(str(caught), 300)}"
    write(True)
    return error is None


def main() -> None:
    folder, size, *names = sys.argv[1:]
    task = Task(Path(folder), size == "dry")
    passed = [measure_into(task.folder / f"{name}.json", name, task) for name in names]
    sys.exit(not all(passed))


if __name__ == "__main__":
    main()
