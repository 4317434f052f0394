"""How fast responses were generated, and what share of the GPU's memory bandwidth that is."""

from collections.abc import Sequence
from typing import Any

from atlas_lib import devices, models
from atlas_lib.devices import Device
from atlas_lib.evaluate import adapter_check, decoding
from atlas_lib.schema import Config


def decoding_work(
    config: Config,
    device: Device,
    prompts: dict[str, list[dict]],
    responses: dict[str, dict[tuple[str, str], list[dict]]],
    tokens: int,
    seconds: float,
) -> dict[str, float | None]:
    """Figures for the ledger: seconds, new tokens and tokens per second of this session.

    `prompts` and `responses` are those of each benchmark, `tokens` how many were generated in this
    session. On a GPU, `share_of_bandwidth` compares the fewest bytes that decoding must touch with
    the rate of a copy; it is None for 4-bit weights, and if earlier sessions have contributed.
    """
    given = [row for rows in responses.values() for row in rows.items()]
    work = {"seconds": seconds, "tokens": tokens, "tokens_per_second": tokens / seconds}
    everything = sum(response["n_tokens"] for _, some in given for response in some)
    if device.name == "cpu" or config.eval.load_in_4bit or tokens < everything:
        return work | {"share_of_bandwidth": None}
    import torch

    model = adapter_check.base_without_weights(config).to(getattr(torch, device.dtype))
    tokenizer, least = models.load_tokenizer(config), 0
    for benchmark, rows in responses.items():
        for (_, form), some in rows.items():
            asked = [
                len(decoding.encode_prompt(tokenizer, prompt["prompt"], form))
                for prompt in prompts[benchmark]
            ]
            least += least_bytes(model, asked, [response["n_tokens"] for response in some])[0]
    rate = copy_rate(device) * max(1, len(devices.visible_gpus()))
    return work | {"share_of_bandwidth": least / rate / seconds}


def least_bytes(model: Any, prompts: Sequence[int], tokens: Sequence[int]) -> tuple[int, int]:
    """Bytes that decoding must touch with all rows in one batch; the same with repeated keys.

    `prompts` and `tokens` are the lengths of each row's prompt and response. A step reads the
    weights once and every row's keys and values once. Repeating them for the query heads that share
    them writes and reads a copy for each head.
    """
    shape = model.config
    width = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    a_token = 2 * shape.num_hidden_layers * shape.num_key_value_heads * width
    held = sum(n * asked + n * (n - 1) // 2 for asked, n in zip(prompts, tokens, strict=True))
    weights = model.num_parameters() * max(tokens)
    copies = 2 * shape.num_attention_heads // shape.num_key_value_heads
    size = model.dtype.itemsize
    return (weights + held * a_token) * size, (weights + held * a_token * (1 + copies)) * size


def copy_rate(device: Device, size: int = 2**30) -> float:
    """Bytes read and written a second by copies of `size` bytes."""
    import torch
    from torch.utils.benchmark import Timer

    source = torch.zeros(size, dtype=torch.uint8, device=device.name)
    copied = {"source": source, "target": torch.empty_like(source)}
    return 2 * size / Timer("target.copy_(source)", globals=copied).timeit(5).mean
