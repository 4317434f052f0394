"""Greedy decoding that keeps its slots full, cut at the first stop id before the text is decoded.

How long an answer gets decides what it costs, and nobody knows it beforehand: a row that stops
leaves at once and the next prompt takes its place, so that no row waits for the longest one.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any

from atlas_lib import devices, models, progress

COLUMNS = 256  # tokens by which the cache grows, instead of allocating prompt + cap for every row
PREFILL_TOKENS = 4096  # prompts that enter together: bounds the memory of their activations
MAX_SLOTS = {"cpu": 48, "cuda": 128}  # beyond it a step takes longer in proportion to its rows


def encode(tokenizer: Any, prompt: str, form: str) -> list[int]:
    """Prompt ids: "raw" is the bare text, "chat" one user turn and the assistant's header."""
    if form == "raw":
        return tokenizer(prompt)["input_ids"]
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]


def generate(
    model: Any,
    tokenizer: Any,
    prompts: list[str],
    form: str,
    max_new_tokens: int,
    slots: int | None = None,
    on_answer: Callable[[int, dict], None] | None = None,
    engine: str = "slots",
) -> list[dict]:
    """One {response, n_tokens, stop} a prompt; `stop` is the stop token, or None at the cap.

    `slots`: rows decoded together; None: what memory allows. `on_answer(index, answer)` is called
    as soon as a row is finished. `engine` "vllm" takes a folder or hub id for `model`.
    Raises ValueError.
    """
    import torch

    stop_ids = models.stop_ids(tokenizer)
    encoded = [encode(tokenizer, prompt, form) for prompt in prompts]
    if [] in encoded:
        raise ValueError(f"Prompt {encoded.index([])} is empty: there is nothing to go on from.")
    if engine == "vllm":
        finished = _vllm(model, encoded, stop_ids, max_new_tokens)
    else:  # inference_mode holds inside the generator only, not where its rows are used
        decoding = torch.inference_mode()(decode)
        finished = decoding(model.eval(), encoded, stop_ids, max_new_tokens, slots)
    answers: list[Any] = [None] * len(prompts)
    for _ in progress.track(range(len(prompts)), f"generating ({form})"):
        index, ids = next(finished)
        answers[index] = cut_at_stop(tokenizer, ids, stop_ids)
        if on_answer:
            on_answer(index, answers[index])
    return answers


def cut_at_stop(tokenizer: Any, ids: list[int], stop_ids: list[int]) -> dict:
    """Text before the first stop id: cut first, so that nothing after it leaks into the answer."""
    end = next((i for i, token in enumerate(ids) if token in stop_ids), None)
    kept = ids if end is None else ids[:end]
    return {
        "response": tokenizer.decode(kept, skip_special_tokens=True),
        "n_tokens": len(kept),
        "stop": None if end is None else tokenizer.convert_ids_to_tokens(ids[end]),
    }


def decode(
    model: Any, encoded: list[list[int]], stop_ids: list[int], cap: int, slots: int | None
) -> Iterator[tuple[int, list[int]]]:
    """(index, new ids with their stop) of every prompt, as they finish.

    Where memory runs out the slots are halved and unfinished rows start again. Raises ValueError.
    """
    import torch

    _check_attention(model.config)
    todo = dict(enumerate(encoded))
    slots = slots or fitting_slots(model, max(map(len, encoded)) + cap)
    while todo:
        try:
            for index, ids in _keep_full(model, todo, stop_ids, cap, min(slots, len(todo))):
                yield index, ids
                del todo[index]
            continue
        except torch.OutOfMemoryError:
            pass  # freed below: until here the error holds on to the frames and their tensors
        if slots == 1:
            raise ValueError("Memory does not hold one row: lower max_new_tokens, or free some.")
        slots //= 2
        torch.cuda.empty_cache()
        print(f"out of memory: going on with {slots} slots, {len(todo)} prompts left", flush=True)


def _check_attention(shape: Any) -> None:
    """Raises ValueError where our mask would be misread: it holds booleans and no windows."""
    kinds = {shape._attn_implementation, *(getattr(shape, "layer_types", None) or [])}
    if other := kinds - {"sdpa", "full_attention"}:
        raise ValueError(
            f"Slots cannot decode {', '.join(sorted(other))} attention: load the model with "
            "attn_implementation='sdpa', and one whose layers see all tokens."
        )


def fitting_slots(model: Any, longest: int) -> int:
    """How many rows of `longest` tokens the free memory holds, at most MAX_SLOTS."""
    shape, kind = model.config, model.device.type
    width = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    per_token = 2 * shape.num_hidden_layers * shape.num_key_value_heads * width
    free = devices.free_bytes(devices.Device(kind, str(model.dtype), "")) * devices.HEADROOM
    fitting = free / ((longest + COLUMNS) * per_token * model.dtype.itemsize)
    return max(1, min(int(fitting), MAX_SLOTS[kind]))


def _keep_full(
    model: Any, prompts: dict[int, list[int]], stop_ids: list[int], cap: int, slots: int
) -> Iterator[tuple[int, list[int]]]:
    """(index, new ids) as rows finish, `slots` rows at a time.

    Long prompts go first: those that enter together are of like length, and memory runs out early
    or not at all.
    """
    pending = sorted(prompts, key=lambda index: len(prompts[index]))
    prompts, rows, cache = dict(prompts), [], SlotCache(slots)
    new: dict[int, list[int]] = {}
    while pending or rows:
        first, free = 0, min(slots - len(rows), len(pending))
        if free and free >= min(len(pending), slots // 16):
            first = len(rows)
            free = min(free, max(1, PREFILL_TOKENS // len(prompts[pending[-1]])))
            rows += [pending.pop() for _ in range(free)]
            new |= {index: [] for index in rows[first:]}
        ids = [new[index][-1:] or prompts[index] for index in rows[first:]]
        tokens = _next_tokens(model, cache, first, ids)
        for row in reversed(range(first, len(rows))):  # what moves into a gap is settled already
            index = rows[row]
            new[index].append(tokens[row - first])
            if new[index][-1] in stop_ids or len(new[index]) == cap:
                yield index, new.pop(index)
                cache.leave(row)
                rows[row] = rows[-1]
                rows.pop()


def _next_tokens(model: Any, cache: "SlotCache", first: int, ids: list[list[int]]) -> list[int]:
    """The likeliest token after each of `ids`: whole prompts for new rows, else one token a row."""
    import torch

    width = max(map(len, ids))
    cache.take(first, ids, width)
    lengths = torch.tensor(cache.lengths[first:], device=model.device)[:, None]
    column = torch.arange(cache.seen, device=model.device)
    query = column[-width:, None]
    # Always a mask, also where all is seen: without one a T4 takes sdpa's slow path. Padding sees
    # itself, since a softmax over nothing is NaN and would spread through its keys and values.
    begun = column >= cache.seen - lengths[:, :, None]
    mask = (column <= query) & (begun | (column == query))  # [rows, width, seen]
    padded = [[0] * (width - len(row)) + row for row in ids]
    logits = model(
        input_ids=torch.tensor(padded, device=model.device),
        attention_mask=mask[:, None],
        position_ids=(query[:, 0] + lengths - cache.seen).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits
    return logits[:, -1].argmax(-1).tolist()


class SlotCache:
    """Keys and values of all rows, [slots, heads, columns, d] a layer, as a model's KV cache.

    All rows end at the same column, wherever they begin: a step writes one column and reads one
    window. Rows in use stay in front.
    """

    def __init__(self, slots: int):
        self.slots, self.columns, self.end = slots, 0, 0
        self.lengths: list[int] = []  # tokens held of every row in use
        self.layers: dict[int, list] = {}

    def take(self, first: int, ids: list[list[int]], width: int) -> None:
        """Make room for `ids`, which end the rows from `first` on."""
        new_rows = first == len(self.lengths)
        step = 0 if new_rows else 1
        if not width - step <= self.end <= self.columns - step:
            self.make_room(width)
        self.end += step
        self.lengths = [n + step for n in self.lengths] + [len(row) for row in ids if new_rows]
        self.first, self.seen = first, max(self.lengths[first:])

    def make_room(self, width: int) -> None:
        """Move what is held to the front and leave COLUMNS free behind it."""
        held = max(self.lengths, default=0)
        end = max(held, width)
        self.columns = end + COLUMNS
        for layer in self.layers.values():
            for i, old in enumerate(layer):
                layer[i] = self._empty(old)
                layer[i][:, :, end - held : end] = old[:, :, self.end - held : self.end]
        self.end = end

    def _empty(self, like: Any) -> Any:
        """Zeros, not whatever lay there: a masked NaN would still be one in the product."""
        return like.new_zeros(self.slots, like.shape[1], self.columns, like.shape[3])

    def update(self, keys: Any, values: Any, layer: int, *_: Any, **__: Any) -> tuple:
        """What transformers' attention calls: keep [rows, heads, width, d], give all columns."""
        if layer not in self.layers:
            self.layers[layer] = [self._empty(keys), self._empty(values)]
        rows = slice(self.first, self.first + len(keys))
        for kept, new in zip(self.layers[layer], (keys, values), strict=True):
            kept[rows, :, self.end - new.shape[2] : self.end] = new
        keys, values = (
            kept[rows, :, self.end - self.seen : self.end] for kept in self.layers[layer]
        )
        return keys, values

    def leave(self, row: int) -> None:
        """The last row in use moves to where `row` was."""
        last = len(self.lengths) - 1
        for kept in (kept for layer in self.layers.values() for kept in layer):
            if row < last:
                seen = slice(self.end - self.lengths[last], self.end)
                kept[row, :, seen] = kept[last, :, seen]
        self.lengths[row] = self.lengths[last]
        self.lengths.pop()


def _vllm(
    model: str, encoded: list[list[int]], stop_ids: list[int], cap: int
) -> Iterator[tuple[int, list[int]]]:
    """(index, new ids with their stop) from vLLM, all at the end. Not run yet: it needs a GPU."""
    try:
        import vllm
    except ImportError:
        raise ValueError(
            "The engine vllm is not installed: pip install vllm, or use the engine slots."
        ) from None
    # By id and without text, so that the cut falls where it does in the other engine.
    options = vllm.SamplingParams(
        temperature=0.0, max_tokens=cap, stop_token_ids=stop_ids, ignore_eos=True, detokenize=False
    )
    llm = vllm.LLM(model=str(model), generation_config="vllm")
    prompts = [{"prompt_token_ids": ids} for ids in encoded]
    for index, output in enumerate(llm.generate(prompts, options)):
        [found] = output.outputs
        ids = list(found.token_ids)
        if found.stop_reason in stop_ids and ids[-1:] != [found.stop_reason]:
            ids.append(found.stop_reason)
        yield index, ids


def diagnose(answers: list[dict]) -> dict[str, float]:
    """What confounds a comparison: shares at the cap, stopped, empty; mean tokens; variety.

    "repetition" is the share of answers dominated by a loop: those more than half of whose
    sequences of four words or marks were said before in the same answer.
    """
    n = len(answers)
    return {
        "at_cap": sum(a["stop"] is None for a in answers) / n,
        "stop_rate": sum(a["stop"] == models.END_OF_TURN for a in answers) / n,
        "empty": sum(not a["response"].strip() for a in answers) / n,
        "mean_length": sum(a["n_tokens"] for a in answers) / n,
        "distinct": len({a["response"] for a in answers}),
        "repetition": sum(_said_before(a["response"]) > 0.5 for a in answers) / n,
    }


def _said_before(text: str) -> float:
    """Share of a text's sequences of four words or marks that occur earlier in it."""
    pieces = re.findall(r"\w{1,16}|[^\w\s]{1,8}", text)  # an endless "!!!" is many pieces, too
    fours = list(zip(*(pieces[i:] for i in range(4)), strict=False))
    return 1 - len(set(fours)) / len(fours) if fours else 0.0
