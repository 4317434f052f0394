"""The patch and the masks on Qwen2.5's real tokenizer, fetched by `make test-all`."""

import copy

import numpy as np
import pytest
from chat_cases import CHAT, chats, supervised_text
from hypothesis import given, settings

from atlas_lib import models, template

DEFAULT_SYSTEM_TURN = [
    151644, 8948, 198, 2610, 525, 1207, 16948, 11, 3465, 553, 54364, 14817, 13, 1446, 525, 264,
    10950, 17847, 13, 151645, 198,
]  # fmt: skip


@pytest.fixture(scope="module")
def pair(qwen_folder):
    """(patched real tokenizer, original template)."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(qwen_folder)
    original = tokenizer.chat_template
    assert template.patch_chat_template_for_assistant_mask(tokenizer)
    return tokenizer, original


def masks(pair, chat):
    """(template's mask, reference mask, ids, spans, offsets) of one conversation."""
    tokenizer, original = pair
    text = tokenizer.apply_chat_template(chat, tokenize=False, chat_template=original)
    out = tokenizer.apply_chat_template(
        chat,
        return_dict=True,
        return_assistant_tokens_mask=True,
        tokenizer_kwargs={"return_offsets_mapping": True},
    )
    spans, offsets = template.assistant_spans(text), np.asarray(out["offset_mapping"])
    reference, _ = template.mask_of_spans(spans, offsets)
    return np.asarray(out["assistant_masks"], bool), reference, out["input_ids"], spans, offsets


def test_known_answers(qwen_tokenizer):
    assert models.stop_ids(qwen_tokenizer) == [151645, 151643]
    ids = qwen_tokenizer.apply_chat_template([{"role": "user", "content": "x"}])["input_ids"]
    assert ids[: len(DEFAULT_SYSTEM_TURN)] == DEFAULT_SYSTEM_TURN


def test_the_template_is_the_one_that_trl_ships(qwen_tokenizer):
    assert qwen_tokenizer.chat_template == template.shipped_template("qwen2_5")


def test_supervised_is_what_the_model_must_emit(pair):
    assert supervised_text(pair[0], CHAT) == ["Only me.<|im_end|>", "Still me.<|im_end|>"]


def test_the_prompt_is_exactly_what_comes_before(pair):
    prompt = pair[0].apply_chat_template(CHAT[:2], add_generation_prompt=True)["input_ids"]
    mask, _, ids, _, _ = masks(pair, CHAT[:3])
    first = int(np.flatnonzero(mask)[0])
    assert ids[:first] == prompt


def test_a_straddling_token_counts_as_supervised(pair):
    chat = [CHAT[1], {"role": "assistant", "content": "\nOn a new line."}]
    mask, reference, _, [(start, _)], offsets = masks(pair, chat)
    straddling = np.flatnonzero((offsets[:, 0] < start) & (offsets[:, 1] > start))
    assert len(straddling) == 1
    assert mask[straddling[0]]
    assert reference[straddling[0]]


@settings(max_examples=500, deadline=None)
@given(chats)
def test_both_masks_agree(pair, chat):
    mask, reference, *_ = masks(pair, chat)
    assert np.array_equal(mask, reference)


def test_other_stop_ids_under_qwens_size_are_refused(qwen_tokenizer, monkeypatch):
    broken = copy.deepcopy(qwen_tokenizer)
    monkeypatch.setattr(models, "END_OF_TURN", "<|im_start|>")
    with pytest.raises(ValueError, match="another tokenizer"):
        models.stop_ids(broken)
