"""TRL's loss, fitted to the device."""

import heapq
from textwrap import shorten
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trl import SFTTrainer

CPU_TILE = (256, 4096)  # positions x words whose logits are held at a time: 4 MiB


def fit_loss(device: str, dtype: str) -> None:
    """Let TRL's loss skip unsupervised positions and compute with what the device has.

    Without Triton, TRL 1.16 scores every position to keep shapes constant for compilers, then
    discards most of them. On a CPU its tiles of half a GiB are mapped and cleared anew each time.
    The loss stays the same, the time does not (benchmarks/train.py). On a GPU its Triton kernels
    need a C compiler: they are tried on eight tokens, and replaced by TRL's own torch operations if
    they do not compile. Can go when TRL has arguments for the first two and does the last itself.
    """
    import torch
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    utils._use_triton = lambda device: True
    if device == "cpu":
        chunked_logprob.TOKEN_CHUNK_SIZE, utils._CHUNKED_LOGPROB_CHUNK_SIZE = CPU_TILE
        return
    try:
        options = {"device": device, "dtype": getattr(torch, dtype), "requires_grad": True}
        hidden, weight = (torch.ones(8, 16, **options) for _ in range(2))
        targets = torch.arange(8, device=device)
        scored = chunked_logprob.ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 8)
        scored[0].sum().backward()
    except Exception as error:  # of Triton, of the C compiler, of the driver
        reason = shorten(str(error).rstrip("."), 200)
        print(f"TRL's Triton kernels do not run ({reason}): the loss uses torch operations.")
        chunked_logprob._use_triton = lambda device: False


def compare_losses(trainer: "SFTTrainer") -> tuple[float, float]:
    """The loss of a batch of the two shortest rows: the trainer's, and the mean of -log p by hand.

    Dropout is off. By hand, all logits of the batch are held in float32.
    """
    import torch

    shortest = heapq.nsmallest(2, trainer.train_dataset, key=lambda row: len(row["input_ids"]))
    model = trainer.model.eval()
    batch = {key: t.to(model.device) for key, t in trainer.data_collator(shortest).items()}
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad(), trainer.compute_loss_context_manager():
        by_trainer = trainer.compute_loss(model, batch.copy())
        log_p = model(**inputs, use_cache=False).logits[:, :-1].float().log_softmax(-1)
    targets = batch["labels"][:, 1:]
    of_target = log_p.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return by_trainer.item(), -of_target[targets != -100].mean().item()
