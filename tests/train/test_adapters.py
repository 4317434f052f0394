"""What is saved with an adapter, and how it is loaded again; parameter counts."""

import copy
import json
import os
import re

import pytest
import torch
from checks import ROOT
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import TINY
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from atlas_lib import devices, models, sources, template
from atlas_lib.config import load_config
from atlas_lib.train import adapters, model_card

CPU = devices.Device("cpu", "float32", "test")
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
SEVEN = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


def adapted(config, base):
    return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **config.lora.model_dump()))


@pytest.mark.parametrize(("targets", "trainable"), [(ATTENTION, 2_162_688), (SEVEN, 8_798_208)])
def test_parameter_counts_at_qwens_true_shape(targets, trainable):
    shape = Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
        num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    config = load_config("sft_qwen05b", "", {"lora.target_modules": targets})
    with torch.device("meta"):
        counts = adapted(config, Qwen2ForCausalLM(shape)).get_nb_trainable_parameters()
    assert counts == (trainable, 494_032_768 + trainable)


def test_4_bit_weights_count_once_each(tiny_config):
    whole, packed = (models.load_weights("base", tiny_config, CPU, b) for b in (False, True))
    trainable, total = adapted(tiny_config, packed).get_nb_trainable_parameters()
    assert total - trainable == whole.num_parameters()


def test_a_training_that_taught_nothing_is_doubted(tiny_config):
    model = adapted(tiny_config, models.load_weights("base", tiny_config, CPU, in_4bit=False))
    zero, flat = adapters.doubts(model, 2.0, 2.0)
    assert zero.startswith("the adapter is still zero")
    assert flat == "the loss did not fall (2.000 to 2.000)."
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    assert adapters.doubts(model, 2.0, 1.9) == []


@pytest.fixture
def saved(tiny_config, tmp_path):
    """(model with a random adapter, the folder where the adapter is saved)."""
    torch.manual_seed(0)
    model = adapted(tiny_config, models.load_weights("base", tiny_config, CPU, in_4bit=False))
    for parameter in (p for p in model.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter, std=0.1)
    tokenizer = models.load_tokenizer(tiny_config)
    original = tokenizer.chat_template
    template.patch_chat_template_for_assistant_mask(tokenizer)
    pinned = load_config("sft_qwen05b", "offline", TINY | {"model.base_revision": "pinned"})
    adapters.save_adapter(model, tmp_path / "adapter", pinned, tokenizer, original)
    return model.eval(), tmp_path / "adapter"


def test_a_saved_adapter_gives_the_same_logits_and_another_does_not(saved, tiny_config):
    model, folder = saved
    base = models.load_weights("base", tiny_config, CPU, in_4bit=False)
    merged = PeftModel.from_pretrained(copy.deepcopy(base), folder).merge_and_unload()
    again = PeftModel.from_pretrained(base, folder)
    assert adapters.logits_difference(model, again, range(12), CPU) < 1e-6
    assert adapters.logits_difference(model, merged, range(12), CPU) < 1e-4
    with torch.no_grad():
        next(p for name, p in again.named_parameters() if "lora_B" in name).zero_()
    assert adapters.logits_difference(model, again, range(12), CPU) > 1e-2


def test_what_is_saved_beside_the_adapter(saved, tiny_config):
    _, folder = saved
    read = {p.name: json.loads(p.read_text("utf-8")) for p in folder.glob("*config.json")}
    assert read["adapter_config.json"]["base_model_name_or_path"] == tiny_config.model.base
    assert read["adapter_config.json"]["revision"] == "pinned"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert read["generation_config.json"]["eos_token_id"] == ids
    original = models.load_tokenizer(tiny_config).chat_template
    assert tokenizer.chat_template["default"] == tokenizer.get_chat_template() == original
    assert "{%- generation %}" in tokenizer.chat_template["training"]
    assert not [p for p in folder.rglob("*") if p.suffix in (".bin", ".pt", ".pkl")]


def test_the_adapter_follows_the_umask(saved, tiny_config, tmp_path):
    model, _ = saved
    tokenizer = models.load_tokenizer(tiny_config)
    for umask, expected in ((0o022, 0o644), (0o077, 0o600)):
        before = os.umask(umask)
        try:
            adapters.save_adapter(model, tmp_path / oct(umask), tiny_config, tokenizer, "")
        finally:
            os.umask(before)
        files = [p for p in (tmp_path / oct(umask)).rglob("*") if p.is_file()]
        assert {p.stat().st_mode & 0o777 for p in files} == {expected}


def python_block(text: str) -> str:
    [code] = re.findall(r"```python\n(.*?)```", text, re.S)
    return code


def test_the_cards_code_runs_and_stops_at_both_tokens(saved, tiny_config):
    folder = saved[1]
    settings = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    base, _ = sources.fetch(tiny_config.model.base, None, tiny_config)
    settings |= {"base_model_name_or_path": base, "revision": None}  # only Atlas reads `embedded:`
    (folder / "adapter_config.json").write_text(json.dumps(settings), "utf-8")
    names = {}
    card = model_card.CARD_TEMPLATE.read_text("utf-8").replace("{{ name }}", str(folder))
    exec(python_block(card), names)
    assert names["settings"].eos_token_id == models.stop_ids(names["tokenizer"], names["model"])
    assert len(names["response"]) <= 200


def test_the_readme_shows_how_to_continue_training(saved, tiny_config):
    model, folder = saved
    code = python_block((ROOT / "README.md").read_text("utf-8"))
    assert sum(bool(line) for line in code.splitlines()) == 5
    code = code.replace("runs/sft_qwen05b/03_sft_train/adapter", str(folder))
    base, _ = sources.fetch(tiny_config.model.base, None, tiny_config)
    code, names = code.replace(load_config("sft_qwen05b").model.base, base), {}
    exec(code, names)
    ids = names["tokenizer"]("Once more.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(names["model"].eval()(ids).logits, model(ids).logits)
    names["model"].train()(input_ids=ids, labels=ids).loss.backward()
    moved = [n for n, p in names["model"].named_parameters() if p.grad is not None]
    assert moved
    assert all("lora" in name for name in moved)
