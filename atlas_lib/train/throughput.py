"""How fast the training was, and what share of the GPU's matrix multiplication rate that is."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from atlas_lib.devices import Device

if TYPE_CHECKING:
    from peft import PeftModel


def training_work(trainer: Any, seconds: float, device: Device) -> dict[str, float | None]:
    """Figures of a finished training for the ledger: seconds, real tokens and tokens per second.

    `seconds` includes earlier sessions. Tokens are those of the epochs trained, without padding. On
    a GPU, `share_of_matmul_rate` compares the least operations with the rate measured here.
    """
    rows = trainer.train_dataset
    lengths = [len(row["input_ids"]) for row in rows]
    tokens = round(trainer.state.epoch * sum(lengths))
    work = {"seconds": seconds, "tokens": tokens, "tokens_per_second": tokens / seconds}
    if device.name == "cpu":
        return work | {"share_of_matmul_rate": None}
    supervised = sum(label != -100 for row in rows for label in row["labels"])
    squares = sum(length**2 for length in lengths)
    flops = least_flops(trainer.model, (0, sum(lengths), supervised, squares))
    rate = trainer.state.epoch * flops / seconds
    return work | {"share_of_matmul_rate": rate / matmul_rate(device)}


def least_flops(trained: "PeftModel", counts: Sequence[int]) -> float:
    """Forward, and backward to activations and adapters, of real tokens; nothing recomputed.

    `counts` are tokens fed (ignored), real and supervised, and the sum of squared lengths.
    Analytic, because torch's FlopCounterMode counts neither 4-bit products nor in-place additions.
    The first layer needs no gradient of its inputs; this is neglected (less than 1 %).
    """
    _, real, supervised, squares = counts
    shape = trained.config
    adapter, total = trained.get_nb_trainable_parameters()
    head = shape.vocab_size * shape.hidden_size  # tied: as the embedding it multiplies nothing
    layers = 4 * (total - adapter - head) + 6 * adapter
    attention = 6 * shape.num_hidden_layers * shape.hidden_size  # causal: half of every square
    return layers * real + attention * squares + 4 * head * supervised


def matmul_rate(device: Device) -> float:
    """The best of five large matrix products in the type that computes, in operations a second."""
    import torch

    size = 8192 if device.name == "cuda" else 3072
    one = torch.randn(size, size, device=device.name).to(getattr(torch, device.dtype))
    out, best = torch.empty_like(one), float("inf")
    for _ in range(5):
        started = now(device)
        torch.mm(one, one, out=out)
        best = min(best, now(device) - started)
    return 2 * size**3 / best


def now(device: Device) -> float:
    """Seconds, once the device has finished its work."""
    if device.name == "cuda":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()
