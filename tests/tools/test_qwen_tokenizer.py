"""Qwen2.5's real tokenizer, which `make test-all` fetches; see also tests/loss_mask."""

import pytest
from transformers import AutoTokenizer

from atlas_lib import template
from atlas_lib.loss_mask import audit
from atlas_lib.loss_mask.turns import ChatTemplate

DEFAULT_SYSTEM_TURN = [
    151644, 8948, 198, 2610, 525, 1207, 16948, 11, 3465, 553, 54364, 14817, 13, 1446, 525, 264,
    10950, 17847, 13, 151645, 198,
]  # fmt: skip


@pytest.fixture
def tokenizer(qwen_folder):
    return AutoTokenizer.from_pretrained(qwen_folder)


def test_stop_ids_and_the_default_system_turn(tokenizer):
    assert tokenizer.chat_template == template.read_template("qwen2_5")
    ends = [tokenizer.eos_token, tokenizer.pad_token]
    assert tokenizer.convert_tokens_to_ids(ends) == [151645, 151643]
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "x"}])["input_ids"]
    assert ids[: len(DEFAULT_SYSTEM_TURN)] == DEFAULT_SYSTEM_TURN


def test_a_token_across_the_start_of_a_turn_is_supervised(tokenizer, tiny_config):
    turns = ("user", "Hello"), ("assistant", "\nOn a new line.")
    chat = [{"role": role, "content": content} for role, content in turns]
    original = tokenizer.chat_template
    template.patch_chat_template_for_assistant_mask(tokenizer)
    [row] = audit.audit_rows(ChatTemplate(tokenizer, original), [chat], tiny_config)
    assert (row["verdict"], row["straddling"]) == ("ok", 1)
