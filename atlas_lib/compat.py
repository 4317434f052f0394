"""Workarounds for defects of the training stack, with the issue and when each can go.

Importing this module hides the messages below, which a user cannot act on. It imports nothing heavy
itself, so that `bootstrap` can use it before any package is loaded.
"""

import importlib.metadata
import logging
import subprocess
import sys
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Logger -> the start of a message that is dropped.
SILENCED_LOGS = {
    # A kernel for CPU inference that Atlas never uses, see `keep_cpu_gradients_right`.
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",
    # Intended: the tokenizer ends a turn with <|im_end|>, the base model a text with <|endoftext|>.
    "transformers.trainer_utils": "The tokenizer has new PAD/BOS/EOS tokens",
}
# Category and the start of a warning that is ignored.
SILENCED_WARNINGS = (
    # transformers 5.22 renamed it; peft 0.21 and trl 1.16 still read the old name.
    (FutureWarning, "`is_gradient_checkpointing` is deprecated"),
    # tqdm in a notebook without ipywidgets; progress is printed as lines anyway.
    (Warning, "IProgress not found"),
)

for logger, start in SILENCED_LOGS.items():
    logging.getLogger(logger).addFilter(
        lambda record, start=start: not str(record.msg).startswith(start)
    )
for category, start in SILENCED_WARNINGS:
    warnings.filterwarnings("ignore", message=start, category=category)


def remove_old_torchao() -> None:
    """Uninstall torchao < 0.16, which Kaggle and Colab have: peft >= 0.19 raises beside it.

    Can go when both images have torchao 0.16 or none.
    """
    try:
        version = importlib.metadata.version("torchao")
    except importlib.metadata.PackageNotFoundError:
        return
    if tuple(map(int, version.split(".")[:2])) < (0, 16):
        pip = [sys.executable, "-m", "pip", "uninstall", "-q", "-y", "torchao"]
        subprocess.run(pip, check=True)
        print(f"Removed torchao {version}: peft needs 0.16 or none.")


def trainer_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments of SFTConfig, under the names that the installed transformers has for them.

    transformers 5.22 renamed gradient_checkpointing to activation_checkpointing. Can go when
    pyproject.toml requires 5.22.
    """
    from transformers import TrainingArguments

    if hasattr(TrainingArguments, "activation_checkpointing"):
        return arguments
    new = {"activation_checkpointing": "gradient_checkpointing"}
    return {new.get(key, key): value for key, value in arguments.items()}


def keep_adapter_in_float32(model: "torch.nn.Module") -> None:
    """Cast trainable parameters to float32, whatever the compute precision.

    TRL 1.16 makes them bfloat16 for any 4-bit model: CUDA's GradScaler cannot unscale that
    (trl#4901), and updates at a rate of 2e-4 would be rounded away. Can go when TRL casts them
    according to `fp16` and `bf16`.
    """
    import torch

    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data = parameter.data.to(torch.float32)


def keep_cpu_gradients_right(model: "torch.nn.Module") -> None:
    """Stop bitsandbytes from repacking 4-bit weights at the first forward pass in eval mode.

    On CPUs with AVX512-BF16, a later training step through the repacked layer crashes, or silently
    computes wrong gradients where the layer has no bias. bitsandbytes 0.50, no issue known to us;
    can go when tests/core/test_compat.py passes without it on such a CPU.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def choose_attention(device: str, dtype: str) -> None:
    """Switch off attention kernels that are wrong or slow on some GPUs, before a model is loaded.

    cuDNN's gives NaN gradients for some padded lengths from sm_90 on (pytorch#196678), and plans
    each new shape for up to half a second. Can go when PyTorch excludes those shapes.

    On a T4, keys of grouped-query attention are repeated, since no fast kernel of sm_75 shares
    them: with enable_gqa, sdpa builds the whole attention matrix in float32. Can go when
    transformers checks the GPU's architecture (transformers#48633, open in 5.23).
    """
    import torch
    from transformers.integrations import sdpa_attention

    if device == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
    if dtype == "float16" and hasattr(sdpa_attention, "use_gqa_in_sdpa"):
        sdpa_attention.use_gqa_in_sdpa = lambda *args, **kwargs: False
