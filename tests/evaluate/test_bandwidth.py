"""Figures of the decoding: this session's tokens, and the bytes that they need."""

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from atlas_lib import devices
from atlas_lib.evaluate import bandwidth

CPU = devices.Device("cpu", "float32", "test")
PROMPTS = {"ifeval": [{"prompt": "Write a line."}, {"prompt": "Write two lines."}]}
RESPONSES = {"ifeval": {("base", "raw"): [{"n_tokens": 3}, {"n_tokens": 5}]}}


def test_a_cpu_has_no_share(tiny_config):
    assert bandwidth.decoding_work(tiny_config, CPU, PROMPTS, RESPONSES, 8, 2.0) == {
        "seconds": 2.0, "tokens": 8, "tokens_per_second": 4.0, "share_of_bandwidth": None,
    }  # fmt: skip


@pytest.mark.parametrize(("tokens", "known"), [(8, True), (5, False)])
def test_responses_of_an_earlier_session_have_no_share(tokens, known, tiny_config):
    """The meta device stands in for a GPU: its copies are done at once."""
    gpu = devices.Device("meta", "float16", "test")
    work = bandwidth.decoding_work(tiny_config, gpu, PROMPTS, RESPONSES, tokens, 1e-6)
    assert (work["share_of_bandwidth"] is not None) == known


def test_bytes_are_those_of_the_weights_and_of_all_earlier_keys_and_values():
    shape = Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen2ForCausalLM(shape).to(torch.float16)
    a_token = 2 * 3 * 2 * 8 * 2  # keys and values, layers, heads, width, bytes
    held = (10 + 11) + (4 + 5 + 6)  # before each of two and three new tokens
    weights = 3 * 2 * model.num_parameters()
    least, copying = bandwidth.least_bytes(model, [10, 4], [2, 3])
    assert least == weights + held * a_token
    assert copying == weights + held * a_token * 5


def test_the_rate_is_measured():
    assert 1e7 < bandwidth.copy_rate(CPU, 2**20) < 1e13
