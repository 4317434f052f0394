"""Useful tokens per second of greedy decoding on IFEval-like prompts, against two other engines.

    python -m benchmarks.eval [--prompts 256] [--json results/bench_eval.json]

The other engines are lm-eval's HF generation at batch 16 and transformers' continuous batching.
Prompts have the lengths of IFEval's in Qwen2.5's chat format (29 tokens plus a log-normal with
median 41). Response lengths are log-normal with median 250, capped at 1280. Weights are random, so
no row would stop by itself: the model ends every row at the length drawn for it, in every engine
alike. It recognises the row by the class of the last token (its id modulo the number of prompts)
and the length by the position; which of a class's 16 tokens comes next is up to the weights. On a
CPU the model has Qwen2.5-0.5B's proportions and a thirtieth of its parameters; on a GPU its true
shape (not run yet; steps that a CUDA graph replays are in "rest"). Each engine runs in its own
process, and a ratio compares the fastest runs. Keep the machine idle otherwise.

"steps" are the bytes that one step of 0.5B's true shape touches in float16, counted in a trace of
fake tensors, with our attention and with keys repeated as transformers 5.16 does.
"""

import argparse
import functools
import itertools
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import unittest.mock
from collections import Counter
from pathlib import Path
from typing import Any

from atlas_lib import artifacts, devices, session
from atlas_lib.evaluate import decoding, slot_cache
from benchmarks import train

CAP, MEDIAN_RESPONSE, SPREAD = 1280, 250, 0.8
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
STOP = SPECIALS.index("<|im_end|>")
CHOICES = 16  # tokens in a class: how many the weights choose from
SHAPES = {  # 0.5B's proportions: seven query heads of 64 to one of keys, MLP of 5.43 times hidden
    "cpu": {"hidden_size": 448, "intermediate_size": 2432, "num_hidden_layers": 4}
    | {"num_attention_heads": 7, "num_key_value_heads": 1},
    "cuda": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
    | {"num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151_936},
}
IFEVAL, T4_BANDWIDTH = 541, 320e9  # prompts; bytes per second
RUNS = [  # engine, slots; None: as many as the engine takes by itself
    ("lm_eval", 16),
    ("continuous_batching", 16),
    ("continuous_batching", 32),
    ("atlas", 16),
    ("atlas", 32),
    ("atlas", 48),
]


def drawn(n: int, seed: int = 0) -> tuple[list[list[int]], list[int]]:
    """Prompt ids and response lengths. Prompt i's last token and its response are of class i."""
    draw = random.Random(seed)
    prompts, lengths = [], []
    for row in range(n):
        size = 29 + min(360, int(draw.lognormvariate(math.log(41), 0.41)))
        words = [draw.randrange(n * CHOICES) for _ in range(size - 1)]
        words.append(row + n * draw.randrange(CHOICES))
        prompts.append([len(SPECIALS) + word for word in words])
        lengths.append(min(CAP, int(draw.lognormvariate(math.log(MEDIAN_RESPONSE), SPREAD))))
    return prompts, lengths


def tokenizer_for(n: int) -> Any:
    """A word a token, so that every engine's text says which ids it chose."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIALS, *(f"w{i}" for i in range(n * CHOICES))]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIALS[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=SPECIALS[STOP],
        pad_token=SPECIALS[0],
        extra_special_tokens=SPECIALS[1:],
        padding_side="left",
    )


def stopping_model(prompts: list[list[int]], lengths: list[int], device: Any) -> Any:
    """A random Qwen2 that ends row i after lengths[i] tokens; `passes` times its forward passes."""
    import torch
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM

    n = len(prompts)
    shape = {"vocab_size": len(SPECIALS) + n * CHOICES} | SHAPES[device.name]
    of_class = (torch.arange(shape["vocab_size"], device=device.name) - len(SPECIALS)) % n
    others = of_class != torch.arange(n, device=device.name)[:, None]  # [class, word]
    others[:, : len(SPECIALS)] = True
    others[:, len(SPECIALS) + n * CHOICES :] = True
    ends = [len(p) + length - 1 for p, length in zip(prompts, lengths, strict=True)]
    ends = torch.tensor(ends, device=device.name)

    passes = []  # seconds, whether a prompt came in, rows, rows that still had to go on

    class StoppingQwen2(Qwen2ForCausalLM):
        def forward(self, input_ids=None, position_ids=None, logits_to_keep=0, **inputs):
            captured = device.name == "cuda" and torch.cuda.is_current_stream_capturing()
            started = captured or train.now(device)
            few = isinstance(logits_to_keep, int)
            kept = slice(-logits_to_keep, None) if few else logits_to_keep
            output = super().forward(
                input_ids, position_ids=position_ids, logits_to_keep=logits_to_keep, **inputs
            )
            row, position = (input_ids[:, kept] - len(SPECIALS)) % n, position_ids[:, kept]
            output.logits.masked_fill_(others[row], -math.inf)
            output.logits[..., STOP].masked_fill_(position >= ends[row], math.inf)
            if captured:  # it cannot wait for the time or a number
                return output
            alive = int((position < ends[row]).sum())
            seconds = train.now(device) - started
            passes.append((seconds, input_ids.numel() > row.numel(), row.numel(), alive))
            return output

    torch.manual_seed(0)
    config = Qwen2Config(max_position_embeddings=32_768, tie_word_embeddings=True, **shape)
    model = StoppingQwen2(config).to(device.name, getattr(torch, device.dtype)).eval()
    model.prompts, model.lengths, model.passes = prompts, lengths, passes
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=[STOP, 0], pad_token_id=0, max_new_tokens=None
    )
    return model


def with_lm_eval(model: Any, tokenizer: Any, texts: list[str], slots: int) -> list[list[int]]:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=slots, max_length=4096)
    options = {"until": [SPECIALS[STOP]], "max_gen_toks": CAP, "do_sample": False}
    requests = [Instance("generate_until", {}, (text, options), i) for i, text in enumerate(texts)]
    return tokenizer(lm.generate_until(requests, disable_tqdm=True))["input_ids"]


def with_continuous_batching(
    model: Any, tokenizer: Any, texts: list[str], slots: int
) -> list[list[int]]:
    from transformers import ContinuousBatchingConfig

    prompts = tokenizer(texts)["input_ids"]
    pages = math.ceil((max(map(len, prompts)) + CAP) / 256)
    options = ContinuousBatchingConfig(  # by itself it would take, and clear, most of the memory
        max_requests_per_batch=slots,
        num_blocks=slots * pages,
        max_batch_tokens=256,
        auto_switch_to_flash=False,
    )
    found = model.generate_batch(prompts, None, options, max_new_tokens=CAP)
    cut = [itertools.takewhile(lambda i: i != STOP, f.generated_tokens) for f in found.values()]
    return [list(ids) for ids in cut]


def with_atlas(model: Any, tokenizer: Any, texts: list[str], slots: int) -> list[list[int]]:
    responses = decoding.generate(model, tokenizer, texts, "raw", CAP, slots)
    return tokenizer([response["response"] for response in responses])["input_ids"]


ENGINES = {
    "lm_eval": with_lm_eval,
    "continuous_batching": with_continuous_batching,
    "atlas": with_atlas,
}


def measure(engine: str, slots: int, n: int) -> dict:
    """One engine's speed, memory and tokens, after a warm-up with four short rows."""
    import torch

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    device = devices.Device(kind, "float16" if kind == "cuda" else "float32", "")
    prompts, lengths = drawn(n)
    tokenizer = tokenizer_for(n)
    model = stopping_model(prompts, lengths, device)
    texts = tokenizer.batch_decode(prompts)
    shortest = sorted(range(n), key=lengths.__getitem__)[:4]
    ENGINES[engine](model, tokenizer, [texts[i] for i in shortest], slots)
    model.passes.clear()
    train.forget_peak(device)
    before, _ = train.in_use(device)
    started = train.now(device)
    rows = ENGINES[engine](model, tokenizer, texts, slots)
    seconds = train.now(device) - started
    _, peak = train.in_use(device)
    return {
        "engine": engine,
        "slots": slots,
        "useful_tokens_per_second": sum(map(len, rows)) / seconds,
        **phases(model.passes, seconds, slots),
        "peak_mib": peak / train.MIB,
        "peak_over_model_mib": (peak - before) / train.MIB,
        "parameters": model.num_parameters(),
        "rows_of_another_length": sum(len(r) != k for r, k in zip(rows, lengths, strict=True)),
        "rows": rows,
    }


def phases(passes: list[tuple], seconds: float, slots: int) -> dict:
    """Where the time went. A pass that mixes prompts and rows in progress counts as prefill."""
    prefill, decode = ([p for p in passes if p[1] == new] for new in (True, False))
    spent = {"prefill": sum(p[0] for p in prefill), "decode": sum(p[0] for p in decode)}
    return {
        "seconds": {"all": seconds, **spent, "rest": seconds - sum(spent.values())},
        "passes": {"prefill": len(prefill), "decode": len(decode)},
        "useful_share_of_slots": sum(p[3] for p in decode) / (slots * max(1, len(decode))),
    }


def touched_bytes(function: Any) -> dict[str, int]:
    """Bytes that `function` reads and writes, by operation; views touch nothing."""
    from torch import Tensor
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    found: Counter[str] = Counter()

    def tensors(values: Any) -> list[Tensor]:
        return [value for value in tree_leaves(values) if isinstance(value, Tensor)]

    def size(tensor: Tensor) -> int:
        strides = zip(tensor.shape, tensor.stride(), strict=True)
        return math.prod(n for n, stride in strides if stride) * tensor.itemsize

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            output = func(*args, **(kwargs or {}))
            given, made = tensors((args, kwargs)), tensors(output)
            name = func.overloadpacket.__name__
            storages = {tensor.untyped_storage()._cdata for tensor in given}
            if name == "embedding":  # of these two, a few rows of a large tensor
                given = [args[1], output]
            elif name == "index_put_":
                given, made = tensors(args[1]), [args[2], args[2]]
            elif not func._schema.is_mutable:
                made = [t for t in made if t.untyped_storage()._cdata not in storages]
                given = given if made else []
            found[name] += sum(map(size, given + made))
            return output

    with Counting():
        function()
    return {name: count for name, count in found.most_common() if count}


def repeating_attention(module: Any, query: Any, key: Any, value: Any, mask: Any, **_: Any):
    """transformers' sdpa up to 5.16, for one new token."""
    import torch
    from transformers.integrations import sdpa_attention

    groups = module.num_key_value_groups
    key, value = (sdpa_attention.repeat_kv(kept, groups) for kept in (key, value))
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return output.transpose(1, 2).contiguous(), None


def traced_steps() -> list[dict]:
    """A step in the middle of 541 responses at the cap, and what all of them take of a T4."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AutoModelForCausalLM, Qwen2Config

    window = slot_cache.rounded_up(statistics.median(map(len, drawn(IFEVAL)[0])) + CAP // 2, 4096)
    found = []
    with torch.inference_mode(), FakeTensorMode():
        config = Qwen2Config(tie_word_embeddings=True, **SHAPES["cuda"])
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float16).eval()
        for attention in (slot_cache.packed_attention, repeating_attention):
            for slots in (128, IFEVAL):
                step = functools.partial(
                    slot_cache.SlotDecoder(model, slots, window).one_token, slots, window
                )
                with unittest.mock.patch.object(slot_cache, "packed_attention", attention):
                    step()  # allocates the cache
                    touched = touched_bytes(step)
                total = sum(touched.values())
                steps = CAP * IFEVAL / slots
                shape = {"attention": attention.__name__, "slots": slots, "window": window}
                seconds = total * steps / T4_BANDWIDTH
                found.append(
                    shape | {"bytes": total, "t4_seconds": seconds, "by_operation": touched}
                )
    return found


def in_a_process(engine: str, slots: int, n: int) -> dict:
    """`measure` in a fresh process."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "result.json"
        command = [sys.executable, "-m", "benchmarks.eval", "--only", engine, str(slots)]
        command += ["--prompts", str(n), "--json", str(file)]
        subprocess.run(command, check=True, stdout=sys.stderr, env=os.environ | train.OFFLINE)
        return json.loads(file.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        engine, slots = args.only
        artifacts.write_json(args.json, measure(engine, int(slots), args.prompts))
        return
    results = []
    for engine, slots in RUNS:
        results.append(in_a_process(engine, slots, args.prompts))
        shown = {key: value for key, value in results[-1].items() if key != "rows"}
        print(json.dumps(shown), flush=True)
    result = summary(results, args.prompts)
    print(json.dumps({k: v for k, v in result.items() if k != "runs"}, indent=1))
    if args.json:
        artifacts.write_json(args.json, result)


def summary(results: list[dict], n: int) -> dict:
    """Ratios of our fastest row to each engine's fastest, and whether all chose the same tokens."""
    rows = [result.pop("rows") for result in results]
    for result, found in zip(results, rows, strict=True):
        result["rows_as_first_run"] = sum(a == b for a, b in zip(found, rows[0], strict=True))
    speed = {}
    for result in results:
        engine, found = result["engine"], result["useful_tokens_per_second"]
        speed[engine] = max(found, speed.get(engine, 0))
    prompts, lengths = drawn(n)
    return {
        "prompts": n,
        "prompt_tokens": {"median": statistics.median(map(len, prompts))},
        "response_tokens": {
            "sum": sum(lengths),
            "median": statistics.median(lengths),
            "mean": statistics.mean(lengths),
            "at_cap": sum(length == CAP for length in lengths),
        },
        "atlas_over": {e: speed["atlas"] / s for e, s in speed.items() if e != "atlas"},
        "steps": traced_steps(),
        "runs": results,
        **session.provenance(),
    }


if __name__ == "__main__":
    main()
