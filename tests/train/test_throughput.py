"""Figures of a training: real tokens of the epochs trained, and the operations they need."""

from types import SimpleNamespace

import pytest
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config, Qwen2ForCausalLM

from atlas_lib import devices
from atlas_lib.train import throughput

SHAPE = Qwen2Config(
    vocab_size=640, hidden_size=64, intermediate_size=256, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=True,
)  # fmt: skip
ROWS = [
    {"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4]},
    {"input_ids": [1, 2], "labels": [-100, 2]},
]


@pytest.fixture(scope="module")
def trainer():
    model = get_peft_model(Qwen2ForCausalLM(SHAPE), LoraConfig(target_modules=["q_proj"]))
    return SimpleNamespace(model=model, train_dataset=ROWS, state=SimpleNamespace(epoch=2.0))


def test_tokens_are_those_of_all_epochs_and_a_cpu_has_no_share(trainer):
    work = throughput.training_work(trainer, 4.0, devices.Device("cpu", "float32", "test"))
    assert work == {
        "seconds": 4.0, "tokens": 12, "tokens_per_second": 3.0, "share_of_matmul_rate": None,
    }  # fmt: skip


def test_the_share_is_that_of_the_measured_rate(trainer, monkeypatch):
    adapter, total = trainer.model.get_nb_trainable_parameters()
    head = 640 * 64
    flops = (4 * (total - adapter - head) + 6 * adapter) * 6 + 6 * 2 * 64 * 20 + 4 * head * 3
    monkeypatch.setattr(throughput, "matmul_rate", lambda device: flops)
    work = throughput.training_work(trainer, 4.0, devices.Device("cuda", "float16", "test"))
    assert work["share_of_matmul_rate"] == pytest.approx(2 / 4)


def test_the_rate_is_measured():
    rate = throughput.matmul_rate(devices.Device("cpu", "float32", "test"))
    assert 1e8 < rate < 1e14
