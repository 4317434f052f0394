"""Load the tokenizer and the base model (full precision or NF4), at pinned revisions."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING

from atlas_lib import compat, sources, template
from atlas_lib.devices import Device
from atlas_lib.schema import Config

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_tokenizer(config: Config) -> "PreTrainedTokenizerBase":
    """The tokenizer with the config's chat template and pad token. Raises ValueError."""
    tokenizer = tokenizer_of(config.model.tokenizer, config.model.tokenizer_revision, config)
    if config.model.chat_template:
        tokenizer.chat_template = template.read_template(config.model.chat_template)
    for name, value in config.model.chat_template_kwargs.items():  # holds for every later reader
        setting = f"{{%- set {name} = {json.dumps(value)} %}}"
        tokenizer.chat_template = setting + (tokenizer.chat_template or "")
    tokenizer.eos_token = config.model.eos_token or tokenizer.eos_token
    tokenizer.pad_token = config.model.pad_token or tokenizer.pad_token
    vocabulary = tokenizer.get_vocab()
    ids = [vocabulary.get(token) for token in (tokenizer.eos_token, tokenizer.pad_token)]
    if None in ids or ids[0] == ids[1]:
        # Tools that mask padding by id would never train the end of a response.
        raise ValueError(
            f"The tokenizer's eos and pad tokens are {tokenizer.eos_token!r} and "
            f"{tokenizer.pad_token!r}; set model.eos_token and model.pad_token to two tokens of "
            "its vocabulary, for Qwen2.5 to <|im_end|> and <|endoftext|>."
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
        why = shorten(str(error).rstrip("."), 200)
        fix = "Atlas needs config.json, a tokenizer and complete safetensors, and runs no code"
        fix = sources.remedy(error, f"{fix} of a model")
        raise ValueError(f"{place} cannot be loaded ({why}); {fix}.") from error


def stop_ids(tokenizer: "PreTrainedTokenizerBase", model: "PreTrainedModel") -> list[int]:
    """Ids at which decoding stops: the tokenizer's eos, then those of the model's own config."""
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    return list(dict.fromkeys(i for i in (tokenizer.eos_token_id, *own) if i is not None))


def load_weights(role: str, config: Config, device: Device, in_4bit: bool) -> "PreTrainedModel":
    """The "base" or "instruct" model in `device.dtype` or quantised as `config.quantization`."""
    import torch
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    compat.choose_attention(device.name, device.dtype)
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
    return weights
