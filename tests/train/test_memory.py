"""The choice of activation checkpointing: what the probe measures is what a real model keeps."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

from atlas_lib import compat, devices
from atlas_lib.config import load_config
from atlas_lib.train import memory

CPU = devices.Device("cpu", "float32", "test")
SHAPE = Qwen2Config(
    vocab_size=64, hidden_size=64, intermediate_size=256, num_hidden_layers=5,
    num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
)  # fmt: skip


def test_transformers_that_say_gradient_checkpointing_are_told_so(monkeypatch):
    """Kaggle's image has one; this environment's says activation_checkpointing."""
    import transformers

    given = {"activation_checkpointing": True, "seed": 1}
    assert compat.trainer_arguments(given) == given
    monkeypatch.setattr(transformers, "TrainingArguments", object)
    assert compat.trainer_arguments(given) == {"gradient_checkpointing": True, "seed": 1}


def recipe(**train):
    given = {f"train.{key}": value for key, value in train.items()}
    return load_config("sft_qwen05b_fast", "", given)


def really_kept(config, rows: int, tokens: int, dtype: torch.dtype) -> int:
    """Bytes that one forward pass of the whole model keeps, apart from its weights."""
    model = Qwen2ForCausalLM(SHAPE).to(dtype)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **config.lora.model_dump()))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    ids = torch.zeros(rows, tokens, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[0, tokens // 2 :] = 0
    autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    with autocast, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.train()(input_ids=ids, attention_mask=mask, use_cache=False)
    assert output.logits.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("rows", "tokens"), [(1, 256), (4, 512)])
def test_two_layers_tell_what_all_layers_keep(rows, tokens, dtype):
    config, device = recipe(), devices.Device("cpu", dtype, "test")
    estimated = memory.activation_bytes(SHAPE, config, device, rows * tokens)
    assert estimated == pytest.approx(
        really_kept(config, rows, tokens, getattr(torch, dtype)), rel=0.15
    )


def test_more_targets_keep_more():
    few = memory.activation_bytes(SHAPE, recipe(), CPU, 1024)
    wide = load_config("sft_qwen05b_all_linear")
    assert memory.activation_bytes(SHAPE, wide, CPU, 1024) > 1.2 * few


def test_the_runs_own_random_state_stays_as_it_was():
    before = torch.get_rng_state()
    memory.activation_bytes(SHAPE, recipe(), CPU, 256)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("asked", [True, False])
def test_what_is_configured_is_done(asked, capsys):
    config = recipe(activation_checkpointing=asked)
    assert memory.must_checkpoint(None, config, CPU) is asked  # nothing is measured
    assert "as configured" in capsys.readouterr().out


@pytest.mark.parametrize(("share", "answer"), [(0.5, True), (2.0, False)])
def test_left_open_it_depends_on_what_is_free(share, answer, monkeypatch, capsys):
    config = recipe()
    rows, tokens = config.train.per_device_train_batch_size, config.train.max_length
    needed = memory.activation_bytes(SHAPE, config, CPU, rows * tokens)
    monkeypatch.setattr(devices, "free_bytes", lambda device: int(share * needed))
    base = Qwen2ForCausalLM(SHAPE)
    assert memory.must_checkpoint(base, config, CPU) is answer
    assert f"{rows} x {tokens:,} tokens keep" in capsys.readouterr().out


def test_rows_of_any_length_are_checkpointed(capsys):
    assert memory.must_checkpoint(None, recipe(max_length=None), CPU)


def test_what_is_free_is_a_number_of_bytes():
    assert 2**24 < devices.free_bytes(CPU) < 2**50


def test_the_recipe_itself_asks_for_checkpointing():
    assert load_config("sft_qwen05b").train.activation_checkpointing is True
