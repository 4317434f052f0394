"""Whether activations have to be recomputed: measured on a short row, compared with free memory."""

from typing import TYPE_CHECKING

from atlas_lib import devices
from atlas_lib.devices import HEADROOM, Device
from atlas_lib.schema import Config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GIB = 2**30
PROBE_TOKENS = 256


def must_checkpoint(base: "PreTrainedModel", config: Config, device: Device) -> bool:
    """Whether to checkpoint activations: as configured or, if null, only if they would not fit.

    Prints the reason. `base` is loaded already, so that its weights are not counted as free memory.
    """
    wanted, tokens = config.train.activation_checkpointing, config.train.max_length
    rows = config.train.per_device_train_batch_size
    if wanted is not None:
        answer, reason = wanted, "as configured"
    elif not tokens:
        answer, reason = True, "since train.max_length does not limit the rows"
    else:
        needed = activation_bytes(base, config, device, rows * tokens)
        free = devices.free_bytes(device)
        answer = needed > HEADROOM * free
        reason = (
            f"{rows} x {tokens:,} tokens keep {needed / GIB:.2f} GiB, {HEADROOM:.0%} of the free "
            f"{free / GIB:.2f} GiB may be used"
        )
    print(f"activation checkpointing: {'on' if answer else 'off'}, {reason}")
    return answer


def activation_bytes(base: "PreTrainedModel", config: Config, device: Device, tokens: int) -> int:
    """Bytes that a forward pass over `tokens` keeps for the backward pass, without checkpointing.

    Measured on a row of PROBE_TOKENS with a temporary adapter and without the loss; proportional to
    the tokens, since attention never builds its matrix (see compat.choose_attention).
    """
    import torch
    from peft import LoraConfig, get_peft_model

    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.zeros(1, PROBE_TOKENS, dtype=torch.long, device=device.name)
    mask = torch.ones_like(ids)
    mask[0, -1] = 0  # a batch with padding keeps more than one without
    mixed = device.dtype != "float32"
    autocast = torch.autocast(device.name, getattr(torch, device.dtype), enabled=mixed)
    saved = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with torch.random.fork_rng():  # the training's own random state must not change
        lora = LoraConfig(task_type="CAUSAL_LM", **config.lora.model_dump())
        adapted = get_peft_model(base, lora).train()
        weights = {p.untyped_storage().data_ptr() for p in adapted.parameters()}
        with autocast, saved:
            # The output stays referenced, so that no address is freed and used again.
            output = adapted(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
    adapted.unload()
    del output
    return sum(n for address, n in kept.items() if address not in weights) * tokens // PROBE_TOKENS
