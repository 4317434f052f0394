"""Greedy decoding with continuously refilled batch slots, cut at the first stop id.

The cost of a response is its length, which is not known in advance: a row that stops leaves the
batch at once and the next prompt takes its slot, so that no row waits for the longest one.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

from atlas_lib import devices, models, progress
from atlas_lib.evaluate.slot_cache import SlotDecoder

PREFILL_TOKENS = 4096  # bounds the activation memory of prompts that are prefilled together
MAX_SLOTS = {"cpu": 48}  # beyond it a CPU's step takes longer in proportion to its rows


def encode_prompt(tokenizer: Any, prompt: str, prompt_format: str) -> list[int]:
    """Prompt ids: "raw" is the bare text, "chat" a user turn and the assistant's header."""
    if prompt_format == "raw":
        return tokenizer(prompt)["input_ids"]
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


def generate(
    model: Any,
    tokenizer: Any,
    prompts: list[str],
    prompt_format: str,
    max_new_tokens: int,
    slots: int | None = None,
    on_response: Callable[[int, dict], None] | None = None,
) -> list[dict]:
    """One {response, n_tokens, stop} per prompt; `stop` is the stop token, None at the length cap.

    `slots`: rows decoded together; None: as many as memory allows. `on_response(index, response)`
    is called as soon as a row finishes. Raises ValueError for attention that the slots do not
    support, and where memory does not hold a single row. Prompts must not be empty.
    """
    import torch

    stop_ids = models.stop_ids(tokenizer, model)
    encoded = [encode_prompt(tokenizer, prompt, prompt_format) for prompt in prompts]
    # As a decorator, inference_mode holds inside the generator only, not where its rows are used.
    finished = torch.inference_mode()(decode)(
        model.eval(), encoded, stop_ids, max_new_tokens, slots
    )
    responses: list[Any] = [None] * len(prompts)
    for _ in progress.track(range(len(prompts)), f"generating ({prompt_format})"):
        index, ids = next(finished)
        responses[index] = cut_at_stop(tokenizer, ids, stop_ids)
        if on_response:
            on_response(index, responses[index])
    return responses


def cut_at_stop(tokenizer: Any, ids: list[int], stop_ids: list[int]) -> dict:
    """The text before the first stop id, cut before decoding so that nothing after it leaks in."""
    end = next((i for i, token in enumerate(ids) if token in stop_ids), None)
    kept = ids[:end]
    return {
        "response": tokenizer.decode(kept, skip_special_tokens=True),
        "n_tokens": len(kept),
        "stop": None if end is None else tokenizer.convert_ids_to_tokens(ids[end]),
    }


def decode(
    model: Any, encoded: list[list[int]], stop_ids: list[int], cap: int, slots: int | None
) -> Iterator[tuple[int, list[int]]]:
    """(index, new ids including the stop) of every prompt, in the order in which they finish.

    Out of memory halves the slots and restarts the unfinished rows. accelerate's
    find_executable_batch_size retries a function, not a generator, and clears the GPU's cache
    while the error still holds the tensors. Raises ValueError.
    """
    import torch

    check_attention(model.config)
    todo = dict(enumerate(encoded))
    longest = max(map(len, encoded), default=0) + cap
    slots = slots or fitting_slots(model, longest)
    while todo:
        try:
            for index, ids in _refill_slots(model, todo, stop_ids, cap, min(slots, len(todo))):
                yield index, ids
                del todo[index]
            continue
        except torch.OutOfMemoryError:
            pass  # only after this block the error releases its frames and their tensors
        if slots == 1:
            raise ValueError("Memory does not hold a single row: lower eval.max_new_tokens.")
        slots //= 2
        torch.cuda.empty_cache()
        print(f"out of memory: continuing with {slots} slots, {len(todo)} prompts left", flush=True)


def check_attention(shape: Any) -> None:
    """Raises ValueError for attention other than full sdpa, which would misread our mask."""
    kinds = {shape._attn_implementation, *(getattr(shape, "layer_types", None) or [])}
    if other := kinds - {"sdpa", "full_attention"}:
        raise ValueError(
            f"Decoding does not support {', '.join(sorted(other))} attention: load a model with "
            "full attention in every layer and attn_implementation='sdpa'."
        )


def fitting_slots(model: Any, longest: int) -> int:
    """How many rows of `longest` tokens fit into the free memory, at most MAX_SLOTS on a CPU."""
    shape, kind = model.config, model.device.type
    width = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    per_token = 2 * shape.num_hidden_layers * shape.num_key_value_heads * width
    free = devices.free_bytes(devices.Device(kind, str(model.dtype), "")) * devices.HEADROOM
    fitting = int(free / (longest * per_token * model.dtype.itemsize))
    return max(1, min(fitting, MAX_SLOTS.get(kind, fitting)))


def _refill_slots(
    model: Any, prompts: dict[int, list[int]], stop_ids: list[int], cap: int, slots: int
) -> Iterator[tuple[int, list[int]]]:
    """(index, new ids) as rows finish, `slots` rows at a time.

    The longest prompts go first: prompts prefilled together have similar lengths, and memory runs
    out early or not at all.
    """
    prompts = dict(prompts)
    pending, rows = sorted(prompts, key=lambda index: len(prompts[index])), []
    decoder = SlotDecoder(model, slots, len(prompts[pending[-1]]) + cap)
    new: dict[int, list[int]] = {}
    while pending or rows:
        first, free = 0, min(slots - len(rows), len(pending))
        if free and free >= min(len(pending), slots // 16):
            first = len(rows)
            free = min(free, max(1, PREFILL_TOKENS // len(prompts[pending[-1]])))
            rows += [pending.pop() for _ in range(free)]
            new |= {index: [] for index in rows[first:]}
            tokens = decoder.add([prompts[index] for index in rows[first:]])
        else:
            tokens = decoder.step([new[index][-1] for index in rows])
        for row in reversed(range(first, len(rows))):  # the last row fills a gap: process it first
            index = rows[row]
            new[index].append(tokens[row - first])
            if new[index][-1] in stop_ids or len(new[index]) == cap:
                yield index, new.pop(index)
                decoder.remove(row)
                rows[row] = rows[-1]
                rows.pop()


def diagnose(responses: list[dict], eos_token: str) -> dict[str, float]:
    """Possible confounders: shares that hit the cap, end with eos, are empty; mean tokens.

    "distinct" counts different texts. "repetition" is the share of responses dominated by a loop:
    more than half of their sequences of four words or marks occur earlier in the same response.
    """
    n = len(responses)
    return {
        "at_cap": sum(r["stop"] is None for r in responses) / n,
        "eos_rate": sum(r["stop"] == eos_token for r in responses) / n,
        "empty": sum(not r["response"].strip() for r in responses) / n,
        "mean_length": sum(r["n_tokens"] for r in responses) / n,
        "distinct": len({r["response"] for r in responses}),
        "repetition": sum(_repeated_share(r["response"]) > 0.5 for r in responses) / n,
    }


def _repeated_share(text: str) -> float:
    """Share of a text's sequences of four words or marks that occur earlier in it."""
    pieces = re.findall(r"\w{1,16}|[^\w\s]{1,8}", text)  # an endless "!!!" is many pieces, too
    fours = list(zip(*(pieces[i:] for i in range(4)), strict=False))
    return 1 - len(set(fours)) / len(fours) if fours else 0.0
