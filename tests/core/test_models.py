"""Loading, adapters and what is saved; on the CPU, where the precision rules are only dtypes."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import TINY

from atlas_lib import compat, devices, models, template
from atlas_lib.config import load_config
from atlas_lib.standin import tiny_model
from atlas_lib.train import adapters, model_card

README = Path(__file__).resolve().parents[2] / "README.md"
CPU = devices.Device("cpu", "float32", "test")


def lora(config, base):
    return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **config.lora.model_dump()))


@pytest.fixture
def nf4(tiny_config):
    """The tiny model in NF4 with an untrained adapter."""
    torch.manual_seed(0)
    return lora(tiny_config, models.load_weights("base", tiny_config, CPU, in_4bit=True))


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
    compat.keep_adapter_in_float32(nf4)
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
    config = load_config("sft_qwen05b", "", {"lora.target_modules": targets})
    with torch.device("meta"):
        base = Qwen2ForCausalLM(shape)
        assert adapters.parameter_counts(base) == (494_032_768, 494_032_768)
        counts = adapters.parameter_counts(lora(config, base))
    assert counts == (trainable, 494_032_768 + trainable)


def test_4_bit_weights_count_once_each(nf4, tiny_config):
    whole = models.load_weights("base", tiny_config, CPU, in_4bit=False)
    trainable, total = adapters.parameter_counts(nf4)
    assert total - trainable == adapters.parameter_counts(whole)[1]


@pytest.fixture
def saved(tiny_config, tmp_path):
    """(adapted model with a moved adapter, its folder)."""
    torch.manual_seed(0)
    adapted = lora(tiny_config, models.load_weights("base", tiny_config, CPU, in_4bit=False))
    for parameter in (p for p in adapted.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter, std=0.1)
    tokenizer = models.load_tokenizer(tiny_config)
    original = tokenizer.chat_template
    template.patch_chat_template_for_assistant_mask(tokenizer)
    pinned = load_config("sft_qwen05b", "offline", TINY | {"model.base_revision": "pinned"})
    adapters.save_adapter(adapted, tmp_path / "adapter", pinned, tokenizer, original)
    return adapted.eval(), tmp_path / "adapter"


@pytest.mark.parametrize("merge", [False, True])
def test_a_saved_adapter_gives_the_same_logits(saved, tiny_config, merge):
    adapted, folder = saved
    base = models.load_weights("base", tiny_config, CPU, in_4bit=False)
    again = models.attach_adapter(base, folder, merge=merge).eval()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, adapted(ids).logits)


def test_a_reloaded_adapter_differs_by_nothing_and_another_one_by_a_lot(saved, tiny_config):
    adapted, folder = saved
    bare = models.load_weights("base", tiny_config, CPU, in_4bit=False)
    fresh = models.attach_adapter(bare, folder)
    assert adapters.logits_difference(adapted, fresh, list(range(12)), CPU) < 1e-6
    first = next(p for name, p in fresh.named_parameters() if "lora_B" in name)
    with torch.no_grad():
        first.zero_()
    assert adapters.logits_difference(adapted, fresh, list(range(12)), CPU) > 1e-2


def test_fitting_the_loss_to_a_cpu_leaves_it_as_it_is(tiny_config, monkeypatch):
    from trl.kernels import chunked_logprob
    from trl.trainer import utils

    base = models.load_weights("base", tiny_config, CPU, in_4bit=False)
    utils.add_fused_lm_head(base)
    ids = torch.arange(40)[None]
    labels = ids.clone()
    labels[:, :30] = -100
    scored = []
    whole = utils._ChunkedLogProbFunction.apply
    monkeypatch.setattr(
        utils._ChunkedLogProbFunction, "apply", lambda h, *a: scored.append(len(h)) or whole(h, *a)
    )
    for module, name in (  # put back afterwards
        (utils, "_use_triton"),
        (utils, "_CHUNKED_LOGPROB_CHUNK_SIZE"),
        (chunked_logprob, "TOKEN_CHUNK_SIZE"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name))
    losses = [base(input_ids=ids, labels=labels, fused_lm_head=True).loss.item()]
    monkeypatch.setattr(compat, "CPU_LOSS_TILE", (4, 100))  # several tiles of this small model
    compat.fit_loss_to_cpu(CPU)
    losses.append(base(input_ids=ids, labels=labels, fused_lm_head=True).loss.item())
    assert scored == [39, 10]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_on_a_t4_no_batch_asks_sdpa_to_share_keys(tiny_config, monkeypatch):
    """Full batches have no mask, and would take the one kernel that builds the whole matrix."""
    from transformers.integrations import sdpa_attention

    base = models.load_weights("base", tiny_config, CPU, in_4bit=False)
    asked, sdpa = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(sdpa_attention, "use_gqa_in_sdpa", sdpa_attention.use_gqa_in_sdpa)
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *a, **k: asked.append(k.get("enable_gqa", False)) or sdpa(*a, **k),
    )
    ids = torch.arange(12)[None]
    shared = base(input_ids=ids).logits
    assert set(asked) == {True}  # what would happen on a T4, too
    asked.clear()
    compat.keep_attention_lean(devices.Device("cuda", "float16", "a T4"))
    torch.testing.assert_close(base(input_ids=ids).logits, shared)
    assert set(asked) == {False}


def test_what_lies_beside_the_adapter(saved, tiny_config):
    from transformers import AutoTokenizer

    _, folder = saved
    read = {p.name: json.loads(p.read_text("utf-8")) for p in folder.glob("*config.json")}
    assert read["adapter_config.json"]["base_model_name_or_path"] == tiny_config.model.base
    assert read["adapter_config.json"]["revision"] == "pinned"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert read["generation_config.json"]["eos_token_id"] == ids
    original = models.load_tokenizer(tiny_config).chat_template
    assert tokenizer.chat_template["default"] == original
    assert "{%- generation %}" in tokenizer.chat_template["training"]
    assert tokenizer.get_chat_template() == original
    assert not [p for p in folder.rglob("*") if p.suffix in (".bin", ".pt", ".pkl")]


def test_the_cards_code_runs_and_stops_at_both_tokens(saved, tiny_config):
    folder = saved[1]
    settings = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    base = tiny_model.resolve(tiny_config.model.base, tiny_config)
    settings |= {"base_model_name_or_path": base, "revision": None}  # `embedded:` is ours alone
    (folder / "adapter_config.json").write_text(json.dumps(settings), "utf-8")
    text = model_card.TEMPLATE.read_text("utf-8").replace("{{ name }}", str(folder))
    [code] = re.findall(r"```python\n(.*?)```", text, re.S)
    names = {}
    exec(code, names)
    assert names["settings"].eos_token_id == models.stop_ids(names["tokenizer"])
    assert len(names["answer"]) <= 200


def test_the_readme_shows_how_to_go_on_training(saved, tiny_config):
    adapted, folder = saved
    [code] = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.S)
    assert sum(bool(line) for line in code.splitlines()) == 5
    real = load_config("sft_qwen05b").model
    code = code.replace("runs/sft_qwen05b/03_sft_train/adapter", str(folder))
    code = code.replace(real.base, tiny_model.resolve(tiny_config.model.base, tiny_config))
    names = {}
    exec(code, names)
    ids = names["tokenizer"]("Once more.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(names["model"].eval()(ids).logits, adapted(ids).logits)
    names["model"].train()(input_ids=ids, labels=ids).loss.backward()
    moved = [n for n, p in names["model"].named_parameters() if p.grad is not None]
    assert moved
    assert all("lora" in name for name in moved)


def test_a_tokenizer_without_the_end_of_turn_is_refused():
    bare = SimpleNamespace(get_vocab=lambda: {"a": 0}, convert_tokens_to_ids=lambda tokens: [0, 0])
    with pytest.raises(ValueError, match=r"needs both"):
        models.stop_ids(bare)
