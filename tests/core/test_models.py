"""Loading the tokenizer and the weights; the precision rules on a CPU are only dtypes."""

from types import SimpleNamespace

import bitsandbytes
import pytest

from atlas_lib import devices, models

CPU = devices.Device("cpu", "float32", "test")


def test_the_base_is_really_in_4_bit(tiny_config):
    packed = models.load_weights("base", tiny_config, CPU, in_4bit=True)
    layers = [m for m in packed.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 14  # seven linears in each of two layers
    assert {m.weight.quant_type for m in layers} == {"nf4"}
    assert all(m.weight.quant_state.nested for m in layers)


def test_a_tokenizer_without_the_end_of_turn_is_refused():
    bare = SimpleNamespace(get_vocab=lambda: {"a": 0}, convert_tokens_to_ids=lambda tokens: [0, 0])
    with pytest.raises(ValueError, match="needs both"):
        models.stop_ids(bare)
