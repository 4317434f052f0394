"""The patch and the masks on Qwen2.5's real tokenizer, which `make test-all` fetches."""

import copy

import numpy as np
import pytest
from chat_cases import CHAT, chats
from hypothesis import given, settings

from atlas_lib import models, template

DEFAULT_SYSTEM_TURN = [
    151644, 8948, 198, 2610, 525, 1207, 16948, 11, 3465, 553, 54364, 14817, 13, 1446, 525, 264,
    10950, 17847, 13, 151645, 198,
]  # fmt: skip


@pytest.fixture(scope="module")
def patched(qwen_folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(qwen_folder)
    assert tokenizer.chat_template == template.shipped_template("qwen2_5")
    assert template.patch_chat_template_for_assistant_mask(tokenizer)
    return tokenizer


def tokenized(patched, chat):
    """Token ids, the template's mask, the reference mask, the spans and the offsets of a chat."""
    original = template.shipped_template("qwen2_5")
    text = patched.apply_chat_template(chat, tokenize=False, chat_template=original)
    options = {"return_dict": True, "return_assistant_tokens_mask": True}
    options["tokenizer_kwargs"] = {"return_offsets_mapping": True}
    out = patched.apply_chat_template(chat, **options)
    spans, offsets = template.assistant_spans(text), np.asarray(out["offset_mapping"])
    reference, _ = template.mask_of_spans(spans, offsets)
    return out["input_ids"], np.asarray(out["assistant_masks"], bool), reference, spans, offsets


def test_known_answers(patched):
    assert models.stop_ids(patched) == [151645, 151643]
    ids = patched.apply_chat_template([{"role": "user", "content": "x"}])["input_ids"]
    assert ids[: len(DEFAULT_SYSTEM_TURN)] == DEFAULT_SYSTEM_TURN


def test_the_prompt_is_exactly_what_comes_before(patched):
    prompt = patched.apply_chat_template(CHAT[:2], add_generation_prompt=True)["input_ids"]
    ids, mask, *_ = tokenized(patched, CHAT[:3])
    assert ids[: np.argmax(mask)] == prompt


def test_a_straddling_token_counts_as_supervised(patched):
    chat = [CHAT[1], {"role": "assistant", "content": "\nOn a new line."}]
    _, mask, reference, [(start, _)], offsets = tokenized(patched, chat)
    [straddling] = np.flatnonzero((offsets[:, 0] < start) & (offsets[:, 1] > start))
    assert mask[straddling] and reference[straddling]


@settings(max_examples=500, deadline=None)
@given(chats)
def test_both_masks_agree(patched, chat):
    _, mask, reference, *_ = tokenized(patched, chat)
    assert np.array_equal(mask, reference)


def test_other_stop_ids_under_qwens_size_are_refused(patched, monkeypatch):
    monkeypatch.setattr(models, "END_OF_TURN", "<|im_start|>")
    with pytest.raises(ValueError, match=r"Qwen2\.5's are \[151645, 151643\]"):
        models.stop_ids(copy.deepcopy(patched))
