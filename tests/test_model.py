"""Loading, adapters and what is saved; on the CPU, where the precision rules are only dtypes."""

import json
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from atlas_lib import config as configuration
from atlas_lib import model, runtime, template

CPU = runtime.Device("cpu", "float32", "test")


def lora(config, base):
    return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **config.lora.model_dump()))


@pytest.fixture
def nf4(tiny_config):
    """The stand-in in NF4 with an untrained adapter."""
    torch.manual_seed(0)
    return lora(tiny_config, model.load_weights("base", tiny_config, CPU, in_4bit=True))


def gradients(adapted):
    ids = torch.arange(8)[None]
    adapted.train()
    adapted.zero_grad()
    adapted(input_ids=ids, labels=ids).loss.backward()
    return {n: p.grad.clone() for n, p in adapted.named_parameters() if p.grad is not None}


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


def test_the_base_is_really_in_4_bit(nf4):
    import bitsandbytes

    layers = [m for m in nf4.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 14  # seven linears in each of two layers
    assert {m.weight.quant_type for m in layers} == {"nf4"}
    assert all(m.weight.quant_state.nested for m in layers)


def test_a_bfloat16_adapter_is_put_back_to_float32(nf4):
    for parameter in (p for p in nf4.parameters() if p.requires_grad):
        parameter.data = parameter.data.to(torch.bfloat16)  # as TRL does for any 4-bit model
    model.keep_adapter_in_float32(nf4)
    assert {p.dtype for p in nf4.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize(
    ("targets", "trainable"),
    [
        (["q_proj", "k_proj", "v_proj", "o_proj"], 2_162_688),
        (
            ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            8_798_208,
        ),
    ],
)
def test_parameter_counts_at_qwens_true_shape(targets, trainable):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    shape = Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
        num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    config = configuration.load("sft_qwen05b", "", {"lora.target_modules": targets})
    with torch.device("meta"):
        base = Qwen2ForCausalLM(shape)
        assert model.parameter_counts(base) == (494_032_768, 494_032_768)
        counts = model.parameter_counts(lora(config, base))
    assert counts == (trainable, 494_032_768 + trainable)


def test_4_bit_weights_count_once_each(nf4, tiny_config):
    whole = model.load_weights("base", tiny_config, CPU, in_4bit=False)
    trainable, total = model.parameter_counts(nf4)
    assert total - trainable == model.parameter_counts(whole)[1]


@pytest.fixture
def saved(tiny_config, tmp_path):
    """(adapted model with a moved adapter, its folder)."""
    torch.manual_seed(0)
    adapted = lora(tiny_config, model.load_weights("base", tiny_config, CPU, in_4bit=False))
    for parameter in (p for p in adapted.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter, std=0.1)
    tokenizer = model.load_tokenizer(tiny_config)
    template.patch_chat_template_for_assistant_mask(tokenizer)
    model.save_adapter(adapted, tmp_path / "adapter", tiny_config, tokenizer.chat_template)
    return adapted.eval(), tmp_path / "adapter"


@pytest.mark.parametrize("merge", [False, True])
def test_a_saved_adapter_gives_the_same_logits(saved, tiny_config, merge):
    adapted, folder = saved
    base = model.load_weights("base", tiny_config, CPU, in_4bit=False)
    again = model.attach_adapter(base, folder, merge=merge).eval()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, adapted(ids).logits)


def test_what_lies_beside_the_adapter(saved, tiny_config):
    from transformers import AutoTokenizer

    _, folder = saved
    read = {p.name: json.loads(p.read_text("utf-8")) for p in folder.glob("*config.json")}
    assert read["adapter_config.json"]["base_model_name_or_path"] == tiny_config.model.base
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert read["generation_config.json"]["eos_token_id"] == ids
    original = model.load_tokenizer(tiny_config).chat_template
    assert tokenizer.chat_template["default"] == original
    assert "{%- generation %}" in tokenizer.chat_template["training"]
    assert tokenizer.get_chat_template() == original
    assert not [p for p in folder.rglob("*") if p.suffix in (".bin", ".pt", ".pkl")]


def test_a_tokenizer_without_the_end_of_turn_is_refused():
    bare = SimpleNamespace(get_vocab=lambda: {"a": 0}, convert_tokens_to_ids=lambda tokens: [0, 0])
    with pytest.raises(ValueError, match=r"lacks <\|im_end\|>"):
        model.stop_ids(bare)
