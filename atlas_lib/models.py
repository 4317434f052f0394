"""Load the tokenizer and the base model (full precision or NF4), at pinned revisions."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING

from atlas_lib import compat, sources, template
from atlas_lib.devices import Device
from atlas_lib.schema import Config
from atlas_lib.template import END_OF_TURN

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

END_OF_TEXT = "<|endoftext|>"


def load_tokenizer(config: Config) -> "PreTrainedTokenizerBase":
    """The tokenizer with the config's chat template and pad token. Raises ValueError."""
    tokenizer = tokenizer_of(config.model.tokenizer, config.model.tokenizer_revision, config)
    if config.model.chat_template:
        tokenizer.chat_template = template.read_template(config.model.chat_template)
    if config.model.pad_token:
        tokenizer.pad_token = config.model.pad_token
    stop_ids(tokenizer)
    if tokenizer.pad_token_id in (None, tokenizer.convert_tokens_to_ids(END_OF_TURN)):
        # Tools that mask padding by id would never train the end of a turn.
        raise ValueError(
            f"The pad token is {tokenizer.pad_token!r}; set model.pad_token to another token than "
            f"{END_OF_TURN}, for Qwen2.5 to {END_OF_TEXT}."
        )
    return tokenizer


def tokenizer_of(name: str, revision: str | None, config: Config) -> "PreTrainedTokenizerBase":
    """The tokenizer of a folder or repository, as it is."""
    from transformers import AutoTokenizer

    place, revision = sources.fetch(name, revision, config, "tokenizer")
    with _refusing(place):
        return AutoTokenizer.from_pretrained(place, revision=revision, trust_remote_code=False)


@contextlib.contextmanager
def _refusing(place: str | Path) -> Iterator[None]:
    """Raise ValueError in one sentence for what a loader raises about missing or damaged files."""
    try:
        yield
    except Exception as error:
        raise ValueError(
            f"{place} cannot be loaded ({shorten(str(error).rstrip('.'), 200)}); Atlas needs "
            "config.json, a tokenizer and complete safetensors, and runs no code of a model."
        ) from error


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
    if None in ids:
        raise ValueError(
            f"The tokenizer needs {END_OF_TURN} and {END_OF_TEXT} (ids {ids}): name one of ChatML."
        )
    return ids


def load_weights(role: str, config: Config, device: Device, in_4bit: bool) -> "PreTrainedModel":
    """The "base" or "instruct" model in `device.dtype` or quantised as `config.quantization`."""
    import torch
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype, quantization = getattr(torch, device.dtype), None
    if in_4bit:
        options = config.quantization.model_dump()
        quantization = BitsAndBytesConfig(**options, bnb_4bit_compute_dtype=dtype)
    name, revision = getattr(config.model, role), getattr(config.model, f"{role}_revision")
    place, revision = sources.fetch(name, revision, config)
    for file in sorted(Path(place).glob("*.safetensors")):  # none for a hub id
        with _refusing(file):
            safe_open(file, "pt")  # checks that the file is complete
    with _refusing(place):
        weights, found = AutoModelForCausalLM.from_pretrained(
            place,
            revision=revision,
            dtype=dtype,
            quantization_config=quantization,
            device_map={"": device.name},
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below: transformers' error names no file
        )
        if wrong := sorted(map(str, (*found["missing_keys"], *found["mismatched_keys"]))):
            raise ValueError(f"its weights lack what config.json describes, such as {wrong[0]}")
    compat.keep_cpu_gradients_right(weights)
    compat.keep_attention_lean(device.dtype)
    return weights
