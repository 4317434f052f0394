"""Load the tokenizer, the base model (full precision or NF4) and adapters, at pinned revisions."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from atlas_lib import compat, sources, template
from atlas_lib.devices import Device
from atlas_lib.schema import Config
from atlas_lib.template import END_OF_TURN

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"
QWEN_VOCABULARY, QWEN_STOP_IDS = 151665, [151645, 151643]


def load_tokenizer(config: Config) -> "PreTrainedTokenizerBase":
    """The tokenizer with the config's chat template and pad token. Raises ValueError."""
    tokenizer = tokenizer_of(config.model.tokenizer, config.model.tokenizer_revision, config)
    if config.model.chat_template:
        tokenizer.chat_template = template.read_template(config.model.chat_template)
    if config.model.pad_token:
        tokenizer.pad_token = config.model.pad_token
    stop_ids(tokenizer)
    if tokenizer.pad_token_id in (None, tokenizer.convert_tokens_to_ids(END_OF_TURN)):
        raise ValueError(
            f"The pad token is {tokenizer.pad_token!r}; it must exist and differ from "
            f"{END_OF_TURN}, which tools that mask padding by id would otherwise never train: set "
            f"model.pad_token, for Qwen2.5 to {END_OF_TEXT!r}."
        )
    return tokenizer


def tokenizer_of(name: str, revision: str | None, config: Config) -> "PreTrainedTokenizerBase":
    """The tokenizer of a folder or repository, as it is."""
    from transformers import AutoTokenizer

    place, revision = sources.fetch(name, revision, config, "tokenizer")
    return AutoTokenizer.from_pretrained(place, revision=revision)


def check_vocabulary(tokenizer: "PreTrainedTokenizerBase", config: Config) -> int:
    """The size of the vocabulary that the tokenizer shares with the base model's own tokenizer.

    Raises ValueError where the two differ: an id must mean the same token to the weights.
    """
    own = tokenizer_of(config.model.base, config.model.base_revision, config)
    if own.get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f"The vocabulary of {config.model.tokenizer} is not that of {config.model.base}: ids "
            "would mean other tokens to the weights. Name a tokenizer of the same family."
        )
    return len(tokenizer)


def stop_ids(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Ids of <|im_end|> and <|endoftext|>. Raises ValueError if they are not single tokens."""
    vocabulary = tokenizer.get_vocab()  # convert_tokens_to_ids would return the unknown token
    ids = [vocabulary.get(token) for token in (END_OF_TURN, END_OF_TEXT)]
    if None in ids or (len(tokenizer) == QWEN_VOCABULARY and ids != QWEN_STOP_IDS):
        raise ValueError(
            f"The tokenizer has {ids} as ids of {END_OF_TURN} and {END_OF_TEXT}; it needs both, "
            f"and Qwen2.5's are {QWEN_STOP_IDS}. Name a tokenizer that writes ChatML."
        )
    return ids


def load_weights(
    role: Literal["base", "instruct"], config: Config, device: Device, in_4bit: bool
) -> "PreTrainedModel":
    """The base or instruct model in `device.dtype`, or quantised as `config.quantization` says.

    Safetensors only, never remote code.
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype, quantization = getattr(torch, device.dtype), None
    if in_4bit:
        options = config.quantization.model_dump()
        quantization = BitsAndBytesConfig(**options, bnb_4bit_compute_dtype=dtype)
    name, revision = getattr(config.model, role), getattr(config.model, f"{role}_revision")
    place, revision = sources.fetch(name, revision, config)
    weights = AutoModelForCausalLM.from_pretrained(
        place,
        revision=revision,
        dtype=dtype,
        quantization_config=quantization,
        device_map={"": device.name},
        use_safetensors=True,
        trust_remote_code=False,
    )
    compat.keep_cpu_gradients_right(weights)
    compat.keep_attention_lean(device.dtype)
    return weights


def attach_adapter(
    base: "PreTrainedModel", adapter: str | Path, revision: str | None = None, merge: bool = False
) -> "PreTrainedModel":
    """`base` with a LoRA adapter from a folder or the hub, merged into its weights if asked."""
    from peft import PeftModel

    place = sources.locate(str(adapter)) or adapter
    model = PeftModel.from_pretrained(base, str(place), revision=revision)
    return model.merge_and_unload() if merge else model
