"""Save an adapter, and compare what was saved with what was trained."""

import copy
import functools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from atlas_lib.devices import Device
from atlas_lib.models import stop_ids
from atlas_lib.schema import Config

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedTokenizerBase


def save_without_hub(model: "PeftModel") -> None:
    """Let the model save its adapter without asking the hub for the base model's config.

    peft 0.21 does so by default, at `main` and without a time limit, to find out whether embedding
    layers have changed (`save_embedding_layers="auto"`). Atlas trains none. Can go when the trainer
    passes the argument on.
    """
    model.save_pretrained = functools.partial(model.save_pretrained, save_embedding_layers=False)


def save_adapter(
    model: "PeftModel",
    folder: Path,
    config: Config,
    tokenizer: "PreTrainedTokenizerBase",
    original_template: str,
) -> None:
    """Write adapter, tokenizer and generation config into `folder`, without pickles or requests.

    `original_template` becomes the default one; the tokenizer's patched one is kept as `training`.
    """
    from transformers import GenerationConfig

    lora = model.peft_config[model.active_adapter]
    lora.base_model_name_or_path, lora.revision = config.model.base, config.model.base_revision
    model.save_pretrained(folder, save_embedding_layers=False)  # "auto" would ask the hub
    # safetensors makes its file readable by the owner only, whatever the umask.
    shutil.copymode(folder / "adapter_config.json", folder / "adapter_model.safetensors")
    (folder / "README.md").unlink(missing_ok=True)  # peft's stub; model_card writes the real one
    saved = copy.deepcopy(tokenizer)
    saved.chat_template = {"default": original_template, "training": tokenizer.chat_template}
    saved.save_pretrained(folder)
    # Without a generation config, base + adapter would stop at <|endoftext|> only.
    settings = GenerationConfig(
        eos_token_id=stop_ids(saved, model), pad_token_id=saved.pad_token_id
    )
    settings.save_pretrained(folder)


def doubts(model: "PeftModel", first_loss: float, last_loss: float) -> list[str]:
    """Signs that the training has taught the model nothing, as sentences."""
    updates = [p for name, p in model.named_parameters() if ".lora_B." in name]
    found = []
    if all(p.abs().max() < 1e-6 for p in updates):  # one step of the recipe moves them by 1e-4
        found.append("the adapter is still zero and changes nothing; see train.learning_rate.")
    if last_loss >= first_loss:
        found.append(f"the loss did not fall ({first_loss:.3f} to {last_loss:.3f}).")
    return found


def logits_difference(
    one: "PeftModel", other: "PeftModel", input_ids: Sequence[int], device: Device
) -> float:
    """Largest absolute difference between two models' logits, divided by the largest logit."""
    import torch

    ids = torch.tensor([input_ids], device=device.name)
    mixed = device.dtype != "float32"  # the trainer has wrapped its own model in autocast
    autocast = torch.autocast(device.name, getattr(torch, device.dtype), enabled=mixed)
    with torch.inference_mode(), autocast:
        first, second = (model.eval()(input_ids=ids).logits.float() for model in (one, other))
    return float((first - second).abs().max() / first.abs().max())
