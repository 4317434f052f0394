"""Load the tokenizer, the base model (full precision or NF4) and adapters, at pinned revisions."""

import hashlib
import json
from pathlib import Path
from typing import Any

from atlas_lib import offline, runtime, template
from atlas_lib.template import END_OF_TURN

END_OF_TEXT = "<|endoftext|>"
QWEN_STOP_IDS = [151645, 151643]
CPU_LOSS_TILE = (256, 4096)  # positions x words whose logits are held at a time: 4 MiB


def load_tokenizer(config: Any) -> Any:
    """The tokenizer with the config's chat template and pad token. Raises ValueError."""
    from transformers import AutoTokenizer

    name, revision = _locate(config.model.tokenizer, config.model.tokenizer_revision, config)
    tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    if config.model.chat_template:
        tokenizer.chat_template = template.shipped_template(config.model.chat_template)
    if config.model.pad_token:
        tokenizer.pad_token = config.model.pad_token
    stop_ids(tokenizer)
    if tokenizer.pad_token_id in (None, tokenizer.convert_tokens_to_ids(END_OF_TURN)):
        raise ValueError(
            f"The pad token is {tokenizer.pad_token!r}; it must exist and not be {END_OF_TURN}, or "
            "tools that mask by id never train the stop: set model.pad_token, for Qwen2.5 to "
            f"{END_OF_TEXT!r}."
        )
    return tokenizer


def vocabulary_sha256(tokenizer: Any) -> str:
    """Hash of the sorted vocabulary, added tokens included."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(vocabulary.encode()).hexdigest()


def check_vocabulary(tokenizer: Any, config: Any) -> str:
    """The hash that the tokenizer shares with the base model's own. Raises ValueError.

    The tokenizer comes from another repository than the weights: an id has to mean the same there.
    """
    from transformers import AutoTokenizer

    name, revision = _locate(config.model.base, config.model.base_revision, config)
    own = vocabulary_sha256(AutoTokenizer.from_pretrained(name, revision=revision))
    if own != vocabulary_sha256(tokenizer):
        raise ValueError(
            f"The vocabulary of {config.model.tokenizer} is not that of {config.model.base}: ids "
            "would mean other tokens to the weights. Name a tokenizer of the same family."
        )
    return own


def stop_ids(tokenizer: Any) -> list[int]:
    """Ids of <|im_end|> and <|endoftext|>. Raises ValueError if they are not single tokens."""
    vocabulary = tokenizer.get_vocab()  # convert_tokens_to_ids would answer with the unknown token
    ids = [vocabulary.get(token) for token in (END_OF_TURN, END_OF_TEXT)]
    if None in ids:
        raise ValueError(f"The tokenizer lacks {END_OF_TURN} or {END_OF_TEXT}; ChatML needs both.")
    if len(tokenizer) == 151665 and ids != QWEN_STOP_IDS:
        raise ValueError(f"Stop ids {ids} are not Qwen2.5's {QWEN_STOP_IDS}: another tokenizer.")
    return ids


def load_weights(role: str, config: Any, device: Any, in_4bit: bool) -> Any:
    """The "base" or "instruct" model in `device.dtype`, or quantised as `config.quantization` says.

    Safetensors only, never remote code.
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = getattr(torch, device.dtype)
    quantization = None
    if in_4bit:
        quantization = BitsAndBytesConfig(
            **config.quantization.model_dump(), bnb_4bit_compute_dtype=dtype
        )
    wanted = (getattr(config.model, role), getattr(config.model, f"{role}_revision"))
    name, revision = _locate(*wanted, config)
    base = AutoModelForCausalLM.from_pretrained(
        name,
        revision=revision,
        dtype=dtype,
        quantization_config=quantization,
        device_map={"": device.name},
        use_safetensors=True,
        trust_remote_code=False,
    )
    _keep_cpu_gradients_right(base)
    _keep_attention_lean(device)
    return base


def _keep_cpu_gradients_right(model: Any) -> None:
    """Stop bitsandbytes from repacking 4-bit weights at the first forward in eval mode.

    On CPUs with AVX512-BF16 (bitsandbytes 0.50) a later training step through the repacked layer
    crashes, or silently gets wrong gradients where the layer has no bias.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _keep_attention_lean(device: Any) -> None:
    """Repeat the keys of grouped-query attention on a T4, instead of asking sdpa to share them.

    No fast kernel of sm_75 takes enable_gqa, which transformers asks for wherever a batch has no
    padding: what is left builds the whole attention matrix in float32 (transformers#48633).
    """
    from transformers.integrations import sdpa_attention

    if device.dtype == "float16" and hasattr(sdpa_attention, "use_gqa_in_sdpa"):
        sdpa_attention.use_gqa_in_sdpa = lambda *args, **kwargs: False


def parameter_counts(model: Any) -> tuple[int, int]:
    """Trainable and total parameters; a 4-bit weight counts once, not per packed byte."""
    counts = [
        (
            p.requires_grad,
            p.numel() * (2 if p.dtype.itemsize == 1 and not p.is_floating_point() else 1),
        )
        for p in model.parameters()
    ]
    return sum(n for trained, n in counts if trained), sum(n for _, n in counts)


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


def save_adapter(
    model: Any, folder: Path, config: Any, tokenizer: Any, original_template: str
) -> None:
    """Adapter, tokenizer and generation config into `folder`, nothing pickled, no hub asked.

    `original_template` becomes the default one; the tokenizer's marked one is kept as `training`.
    """
    import copy

    from transformers import GenerationConfig

    lora = model.peft_config[model.active_adapter]
    lora.base_model_name_or_path, lora.revision = config.model.base, config.model.base_revision
    model.save_pretrained(folder, save_embedding_layers=False)  # "auto" would ask the hub
    (folder / "README.md").unlink(missing_ok=True)  # peft's stub says nothing
    saved = copy.deepcopy(tokenizer)
    saved.chat_template = {"default": original_template, "training": tokenizer.chat_template}
    saved.save_pretrained(folder)
    # Without it a fresh base + adapter stops at <|endoftext|> only.
    settings = GenerationConfig(eos_token_id=stop_ids(saved), pad_token_id=saved.pad_token_id)
    settings.save_pretrained(folder)


def attach_adapter(
    base: Any, adapter: str | Path, revision: str | None = None, merge: bool = False
) -> Any:
    """`base` with a LoRA adapter from a folder or the hub, merged into its weights if asked."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(base, runtime.locate(str(adapter)), revision=revision)
    return model.merge_and_unload() if merge else model


def logits_difference(one: Any, other: Any, input_ids: list[int], device: Any) -> float:
    """Largest difference between two models' logits, in units of their largest logit."""
    import torch

    ids = torch.tensor([input_ids], device=device.name)
    autocast = torch.autocast(  # as in training, where the trainer wraps its model
        device.name, getattr(torch, device.dtype), enabled=device.dtype != "float32"
    )
    with torch.inference_mode(), autocast:
        first, second = (m.eval()(input_ids=ids).logits.float() for m in (one, other))
    return float((first - second).abs().max() / first.abs().max())


def _locate(name: str, revision: str | None, config: Any) -> tuple[str, str | None]:
    """A local folder (built first if embedded), or a hub id that the hub has been asked for."""
    name = runtime.locate(offline.resolve(name, config))
    if Path(name).is_dir():
        return name, None
    runtime.check_hub(name, revision)
    return name, revision
