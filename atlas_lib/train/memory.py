"""Whether activations have to be recomputed: measured on two layers, compared with what is free."""

from typing import Any

from atlas_lib import devices
from atlas_lib.devices import HEADROOM

GIB = 2**30
PROBE_TOKENS = 256


def must_checkpoint(base: Any, config: Any, device: Any) -> bool:
    """train.activation_checkpointing; where it is null, whether activations do not fit otherwise.

    Prints the reason. `base` is the loaded model, whose own memory is not free any more.
    """
    asked = config.train.activation_checkpointing
    if asked is not None:
        print(f"activation checkpointing: {'on' if asked else 'off'}, as configured")
        return asked
    if not config.train.max_length:
        print("activation checkpointing: on, since rows of any length may come")
        return True
    rows, tokens = config.train.per_device_train_batch_size, config.train.max_length
    needed, free = (
        activation_bytes(base.config, config, device, rows * tokens),
        devices.free_bytes(device),
    )
    answer = needed > HEADROOM * free
    print(
        f"activation checkpointing: {'on' if answer else 'off'}, {rows} x {tokens:,} tokens keep "
        f"{needed / GIB:.2f} GiB, {HEADROOM:.0%} of the free {free / GIB:.2f} GiB may be used"
    )
    return answer


def activation_bytes(shape: Any, config: Any, device: Any, tokens: int) -> int:
    """What a forward pass over `tokens` keeps for the backward pass, without checkpointing.

    Measured on two layers against one of random weights, then times the layers of `shape`. It grows
    in proportion to the tokens as long as attention never builds its matrix: load_weights sees to
    that. The probe is padded, since a batch with padding keeps more than one without.
    """
    one, two = (_kept_by_probe(shape, layers, config, device) for layers in (1, 2))
    return (two - one) * shape.num_hidden_layers * tokens // PROBE_TOKENS


def _kept_by_probe(shape: Any, layers: int, config: Any, device: Any) -> int:
    """Bytes kept by the forward pass of `layers` adapted layers over PROBE_TOKENS tokens."""
    import torch

    kept: dict[int, int] = {}
    dtype = getattr(torch, device.dtype)
    autocast = torch.autocast(device.name, dtype=dtype, enabled=device.dtype != "float32")
    with torch.random.fork_rng():  # the run's own random state stays as it was
        model = _probe(shape, layers, config, dtype).to(device.name)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def keep(tensor: Any) -> Any:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        ids = torch.zeros(1, PROBE_TOKENS, dtype=torch.long, device=device.name)
        mask = torch.ones_like(ids)
        mask[0, -1] = 0
        with autocast, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            # It stays alive, so that no storage is used twice.
            output = model(input_ids=ids, attention_mask=mask, use_cache=False)
        del output
    return sum(kept.values())


def _probe(shape: Any, layers: int, config: Any, dtype: Any) -> Any:
    """The architecture of `shape` with fewer layers, no vocabulary to speak of, and LoRA."""
    import copy

    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    small = copy.deepcopy(shape)
    small.num_hidden_layers, small.vocab_size = layers, 8
    small.layer_types = (getattr(shape, "layer_types", None) or [])[:layers] or None
    small.pad_token_id = small.bos_token_id = small.eos_token_id = 0
    if hasattr(small, "quantization_config"):
        del small.quantization_config
    model = AutoModelForCausalLM.from_config(small, dtype=dtype)
    lora = LoraConfig(task_type="CAUSAL_LM", **config.lora.model_dump())
    return get_peft_model(model, lora).train()
