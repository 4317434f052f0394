"""Save an adapter, and compare what was saved with what was trained."""

from pathlib import Path
from typing import Any

from atlas_lib.models import stop_ids


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
