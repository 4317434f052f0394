"""TRL's loss, fitted to the device."""

from textwrap import shorten

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
