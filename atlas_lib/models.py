"""Load the tokenizer, the base model (full precision or NF4) and adapters, at pinned revisions."""

import hashlib
import json
from pathlib import Path
from typing import Any

from atlas_lib import compat, sources, template
from atlas_lib.standin import tiny_model
from atlas_lib.template import END_OF_TURN

END_OF_TEXT = "<|endoftext|>"
QWEN_STOP_IDS = [151645, 151643]


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
    compat.keep_cpu_gradients_right(base)
    compat.keep_attention_lean(device)
    return base


def attach_adapter(
    base: Any, adapter: str | Path, revision: str | None = None, merge: bool = False
) -> Any:
    """`base` with a LoRA adapter from a folder or the hub, merged into its weights if asked."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(base, sources.locate(str(adapter)), revision=revision)
    return model.merge_and_unload() if merge else model


def _locate(name: str, revision: str | None, config: Any) -> tuple[str, str | None]:
    """A local folder (built first if embedded), or a hub id that the hub has been asked for."""
    name = sources.locate(tiny_model.resolve(name, config))
    if Path(name).is_dir():
        return name, None
    sources.check_hub(name, revision)
    return name, revision
