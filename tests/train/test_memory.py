"""Activation checkpointing: the short probe predicts what a whole batch keeps."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

from atlas_lib import devices
from atlas_lib.config import load_config
from atlas_lib.train import memory

CPU = devices.Device("cpu", "float32", "test")
SHAPE = Qwen2Config(
    vocab_size=64, hidden_size=64, intermediate_size=256, num_hidden_layers=5,
    num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
)  # fmt: skip


def recipe(**train):
    given = {f"train.{key}": value for key, value in train.items()}
    return load_config("sft_qwen05b_fast", "", given)


def bytes_of_a_batch(config, rows: int, tokens: int, dtype: torch.dtype) -> int:
    """Bytes that one forward pass over a padded batch keeps, apart from the weights."""
    lora = LoraConfig(task_type="CAUSAL_LM", **config.lora.model_dump())
    model = get_peft_model(Qwen2ForCausalLM(SHAPE).to(dtype), lora)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.zeros(rows, tokens, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[0, tokens // 2 :] = 0
    autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    with autocast, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.train()(input_ids=ids, attention_mask=mask, use_cache=False)
    assert output.logits.requires_grad
    return sum(size for address, size in kept.items() if address not in weights)


@pytest.mark.parametrize(
    ("dtype", "rows", "tokens"), [("float32", 1, 256), ("float32", 4, 512), ("bfloat16", 4, 512)]
)
def test_the_probe_predicts_what_a_batch_keeps(dtype, rows, tokens):
    config, device = recipe(), devices.Device("cpu", dtype, "test")
    base = Qwen2ForCausalLM(SHAPE).to(getattr(torch, dtype))
    predicted = memory.activation_bytes(base, config, device, rows * tokens)
    found = bytes_of_a_batch(config, rows, tokens, getattr(torch, dtype))
    assert predicted == pytest.approx(found, rel=0.15)


def test_the_probe_leaves_the_model_and_the_random_state_as_they_were():
    base, wide = Qwen2ForCausalLM(SHAPE), load_config("sft_qwen05b_all_linear")
    modules, state = dict(base.named_modules()), torch.get_rng_state()
    few = memory.activation_bytes(base, recipe(), CPU, 1024)
    assert memory.activation_bytes(base, wide, CPU, 1024) > 1.2 * few  # more adapted layers
    assert dict(base.named_modules()) == modules
    assert torch.equal(torch.get_rng_state(), state)


def test_a_configured_choice_or_rows_of_any_length_need_no_probe(capsys):
    for wanted in (True, False):
        assert memory.must_checkpoint(None, recipe(activation_checkpointing=wanted), CPU) is wanted
        assert "as configured" in capsys.readouterr().out
    assert memory.must_checkpoint(None, recipe(max_length=None), CPU)  # rows of any length


@pytest.mark.parametrize(("share", "answer"), [(0.5, True), (2.0, False)])
def test_without_a_configured_choice_free_memory_decides(share, answer, monkeypatch, capsys):
    base, config = Qwen2ForCausalLM(SHAPE), recipe()
    rows, tokens = config.train.per_device_train_batch_size, config.train.max_length
    needed = memory.activation_bytes(base, config, CPU, rows * tokens)
    monkeypatch.setattr(devices, "free_bytes", lambda device: int(share * needed))
    assert memory.must_checkpoint(base, config, CPU) is answer
    assert f"{rows} x {tokens:,} tokens keep" in capsys.readouterr().out


def losses(checkpointing: bool) -> list[float]:
    """The losses of three optimizer steps with dropout."""
    torch.manual_seed(0)
    lora = LoraConfig(task_type="CAUSAL_LM", **recipe().lora.model_dump())
    model = get_peft_model(Qwen2ForCausalLM(SHAPE), lora).train()
    assert lora.lora_dropout > 0
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    ids = torch.arange(60).view(2, 30)
    found = []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def test_checkpointing_does_not_change_the_losses():
    kept, recomputed = losses(False), losses(True)
    assert kept == pytest.approx(recomputed, rel=1e-6)
    assert len(set(kept)) == 3
