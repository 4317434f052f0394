"""Every workaround for an upstream defect, with its issue and when it can go."""

from typing import Any


def keep_cpu_gradients_right(model: Any) -> None:
    """Stop bitsandbytes from repacking 4-bit weights at the first forward in eval mode.

    On CPUs with AVX512-BF16 (bitsandbytes 0.50) a later training step through the repacked layer
    crashes, or silently gets wrong gradients where the layer has no bias.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def keep_attention_lean(device: Any) -> None:
    """Repeat the keys of grouped-query attention on a T4, instead of asking sdpa to share them.

    No fast kernel of sm_75 takes enable_gqa, which transformers asks for wherever a batch has no
    padding: what is left builds the whole attention matrix in float32 (transformers#48633).
    """
    from transformers.integrations import sdpa_attention

    if device.dtype == "float16" and hasattr(sdpa_attention, "use_gqa_in_sdpa"):
        sdpa_attention.use_gqa_in_sdpa = lambda *args, **kwargs: False


def keep_adapter_in_float32(model: Any) -> None:
    """Cast trainable parameters to float32, whatever precision computes.

    TRL makes them bfloat16 for any 4-bit model: CUDA's GradScaler cannot unscale that (trl#4901),
    and updates at a rate of 2e-4 would be lost in its eight bits.
    """
    import torch

    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data = parameter.data.to(torch.float32)


def fit_loss_to_cpu(device: Any) -> None:
    """Let TRL's loss skip unsupervised positions on a CPU, and work in tiles that malloc keeps.

    Off a GPU TRL scores every position, to keep shapes the same for compilers that we do not use,
    and throws the surplus away; its tiles of half a GiB are mapped and cleared anew each time. The
    loss is the same, the time is not (benchmarks/train.py).
    """
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    if device.name == "cpu":
        utils._use_triton = lambda device: True
        chunked_logprob.TOKEN_CHUNK_SIZE, utils._CHUNKED_LOGPROB_CHUNK_SIZE = CPU_LOSS_TILE


CPU_LOSS_TILE = (256, 4096)  # positions x words whose logits are held at a time: 4 MiB


def trainer_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of SFTConfig; transformers before 5.22 says gradient_checkpointing for one."""
    from transformers import TrainingArguments

    if hasattr(TrainingArguments, "activation_checkpointing"):
        return arguments
    recompute = arguments["activation_checkpointing"]
    others = {key: v for key, v in arguments.items() if key != "activation_checkpointing"}
    return others | {"gradient_checkpointing": recompute}
