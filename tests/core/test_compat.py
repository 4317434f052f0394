"""Workarounds: each test fails where the defect is present and the workaround is missing."""

import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers.integrations import sdpa_attention

from atlas_lib import compat, devices, models

CPU = devices.Device("cpu", "float32", "test")
T4 = devices.Device("cuda", "float16", "a T4")


@pytest.fixture
def base(tiny_config):
    return models.load_weights("base", tiny_config, CPU, in_4bit=False)


@pytest.fixture
def nf4(tiny_config):
    """The tiny model in NF4 with an untrained adapter."""
    torch.manual_seed(0)
    packed = models.load_weights("base", tiny_config, CPU, in_4bit=True)
    lora = LoraConfig(task_type="CAUSAL_LM", **tiny_config.lora.model_dump())
    return get_peft_model(packed, lora)


def gradients(model):
    ids = torch.arange(8)[None]
    model.train()
    model.zero_grad()
    model(input_ids=ids, labels=ids).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_gradients_are_the_same_after_an_evaluation(nf4):
    before = gradients(nf4)
    nf4.eval()
    with torch.no_grad():
        nf4(input_ids=torch.arange(8)[None])
    after = gradients(nf4)
    assert before.keys() == after.keys()
    assert any(gradient.abs().sum() > 0 for gradient in before.values())
    for name, gradient in before.items():
        torch.testing.assert_close(after[name], gradient)


def test_a_bfloat16_adapter_is_cast_back_to_float32(nf4):
    for parameter in (p for p in nf4.parameters() if p.requires_grad):
        parameter.data = parameter.data.to(torch.bfloat16)  # as TRL does for any 4-bit model
    compat.keep_adapter_in_float32(nf4)
    assert {p.dtype for p in nf4.parameters() if p.requires_grad} == {torch.float32}


def test_on_a_t4_sdpa_is_never_called_with_enable_gqa(base, monkeypatch):
    """A batch without padding has no mask, and would get a kernel that builds the whole matrix."""
    asked, sdpa = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(sdpa_attention, "use_gqa_in_sdpa", sdpa_attention.use_gqa_in_sdpa)
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *a, **k: asked.append(k.get("enable_gqa", False)) or sdpa(*a, **k),
    )
    ids = torch.arange(12)[None]
    shared = base(input_ids=ids).logits
    assert set(asked) == {True}  # the defect
    asked.clear()
    compat.choose_attention(T4.name, T4.dtype)
    torch.testing.assert_close(base(input_ids=ids).logits, shared)
    assert set(asked) == {False}


def test_cudnn_attention_is_off():
    torch.backends.cuda.enable_cudnn_sdp(True)
    compat.choose_attention("cuda", "bfloat16")
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_an_older_transformers_gets_gradient_checkpointing(monkeypatch):
    """Kaggle's image has such a version."""
    given = {"activation_checkpointing": True, "seed": 1}
    assert compat.trainer_arguments(given) == given
    monkeypatch.setattr(sys.modules["transformers"], "TrainingArguments", object)
    assert compat.trainer_arguments(given) == {"gradient_checkpointing": True, "seed": 1}


NOISE = """
import logging, warnings
{first}
for name, message in {logs!r}.items():
    logging.getLogger(name).warning(message + ": %s", "planted")
    logging.getLogger(name).warning("Another message is shown")
warnings.warn("`is_gradient_checkpointing` is deprecated and planted", FutureWarning)
warnings.warn("Another warning is shown", FutureWarning)
import peft
"""


@pytest.mark.parametrize("first", ["from atlas_lib import compat", ""])
def test_messages_that_do_not_help_a_reader_are_hidden(first):
    code = NOISE.format(first=first, logs=compat.SILENCED_LOGS)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.count("Another message is shown") == len(compat.SILENCED_LOGS)
    assert done.stderr.count("Another warning is shown") >= 1
    noisy = any(m in done.stderr for m in ("planted", "Failed to load CPU", "IProgress"))
    assert noisy == (not first)
