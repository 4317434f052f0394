"""The definition of a loss mask for any template, and the second opinion, with planted faults."""

import numpy as np
import pytest
import templates
from chat_cases import CALL, CHAT, chats
from hypothesis import given, settings

from atlas_lib.loss_mask import labelling
from atlas_lib.loss_mask.sentinels import Sentinels
from atlas_lib.loss_mask.token_rows import labelled, tokenise
from atlas_lib.loss_mask.turns import ChatTemplate


def status_of(tokenizer, text, chat):
    return [turn.status for turn in ChatTemplate(tokenizer, text).turns(chat)]


def rows_of(chat_template, chat):
    return chat_template.rows(chat, chat_template.turns(chat))


def learned(tokenizer, row):
    return tokenizer.decode([label for label in row["labels"] if label != labelling.IGNORED])


@pytest.mark.parametrize("name", templates.EXACT)
def test_an_exact_template_trains_one_row_per_conversation(tokenizer, name):
    tokenizer.chat_template = templates.EXACT[name]
    chat_template = ChatTemplate(tokenizer)
    assert chat_template.ending.stop == "<|im_end|>"
    [row] = labelled(chat_template, [CHAT])
    assert [turn.status for turn in chat_template.turns(CHAT)] == ["exact", "exact"]
    lead = " " if name == "brackets" else ""
    assert learned(tokenizer, row) == f"{lead}Only me.<|im_end|>{lead}Still me.<|im_end|>"


def test_a_template_that_rewrites_history_trains_one_row_per_response(tokenizer):
    chat_template = ChatTemplate(tokenizer, templates.THINK)
    assert status_of(tokenizer, templates.THINK, CHAT) == ["history", "exact"]
    tokenizer.chat_template = templates.THINK
    first, second = labelled(chat_template, [CHAT])
    assert learned(tokenizer, first) == "<think>\n\n</think>\n\nOnly me.<|im_end|>"
    assert learned(tokenizer, second) == "<think>\n\n</think>\n\nStill me.<|im_end|>"
    prompt = tokenizer.apply_chat_template(CHAT[:4], add_generation_prompt=True)["input_ids"]
    assert second["input_ids"][: len(prompt)] == prompt
    assert set(second["labels"][: len(prompt)]) == {labelling.IGNORED}


@pytest.mark.parametrize("text", [templates.NO_STOP, templates.CALLS])
def test_a_stop_that_a_text_quotes_ends_no_response(tokenizer, text):
    """Neither <|im_start|>, by which a next message would end it, nor the stop of a call."""
    quoting = {"role": "assistant", "content": "first <|im_start|> second"}
    calling = quoting | {"tool_calls": [{"function": {"name": "a", "arguments": "<|im_end|>"}}]}
    chat_template = ChatTemplate(tokenizer, text)
    [turn] = chat_template.turns([CHAT[1], calling if text == templates.CALLS else quoting])
    assert turn.status == ("exact" if text == templates.CALLS else "no stop")
    assert turn.status == "no stop" or turn.emission.endswith("}<|endoftext|>")


def test_a_template_that_refuses_a_prompt_only_is_named(tokenizer):
    limit = "{% if add_generation_prompt and messages|length > 3 %}{{ raise_exception('long') }}"
    chat_template = ChatTemplate(tokenizer, limit + "{% endif %}" + templates.CHATML)
    with pytest.raises(ValueError, match=r"message 4 \(assistant\): long"):
        chat_template.turns(CHAT)


def test_a_call_with_an_empty_content_is_judged(tokenizer):
    asks = templates.CALLS.replace(
        "{% if m.tool", "{% if m.content %}{{ m.content }}{% endif %}{% if m.tool"
    )
    chat_template = ChatTemplate(tokenizer, asks)
    [row] = rows_of(
        chat_template, [CHAT[1], {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    )
    assert Sentinels(chat_template).judge(row).spans == row.spans


def test_a_tool_call_may_end_with_another_token(tokenizer):
    chat_template = ChatTemplate(tokenizer, templates.CALLS)
    assert chat_template.ending.stop == "<|im_end|>"
    assert chat_template.call_ending.stop == "<|endoftext|>"
    calling = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    chat = [CHAT[1], calling, {"role": "tool", "content": "It is."}, CHAT[2]]
    emissions = [turn.emission for turn in chat_template.turns(chat)]
    assert [emission.endswith("<|endoftext|>") for emission in emissions] == [True, False]
    [row] = rows_of(chat_template, chat)
    assert Sentinels(chat_template).judge(row).spans == row.spans


@pytest.mark.parametrize(
    ("text", "status", "problem"),
    [
        (templates.OPENS, "prompt", "does not start with the prompt of inference"),
        (templates.NO_STOP, "no stop", "no stop token ends the response"),
    ],
)
def test_turns_that_no_row_can_show_are_named(tokenizer, text, status, problem):
    chat_template = ChatTemplate(tokenizer, text)
    assert status_of(tokenizer, text, CHAT)[-1] == status
    with pytest.raises(ValueError, match=rf"message [24]: .*{problem}"):
        rows_of(chat_template, CHAT)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (templates.NO_HEADER, "has no generation prompt"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "does not render the content"),
        ("{{ messages[0] }", "does not render a plain chat"),
        ("", "has no chat template"),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "with no special token"),
    ],
)
def test_an_unusable_template_is_refused(tokenizer, text, problem):
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=problem):
        ChatTemplate(tokenizer, text)


def test_a_conversation_that_the_template_refuses_is_named(tokenizer):
    chat_template = ChatTemplate(tokenizer, templates.ALTERNATES)
    with pytest.raises(ValueError, match=r"message 0 \(system\): Roles must alternate"):
        chat_template.turns(CHAT)


@pytest.mark.parametrize(
    "name", ["ChatML", "brackets", "think", "Qwen2.5", "whitespace is swallowed"]
)
def test_both_methods_agree_on_drawn_conversations(name, trained_tokenizer):
    """Prefixes and sentinels, each with its own way from characters to tokens."""
    import copy

    tokenizer = copy.deepcopy(trained_tokenizer)
    text = {**templates.EXACT, "think": templates.THINK}.get(name, tokenizer.chat_template)
    if name == "whitespace is swallowed":
        templates.swallow_whitespace(tokenizer)
        text = templates.CHATML
    tokenizer.chat_template = text
    chat_template = ChatTemplate(tokenizer)
    sentinels, judged = Sentinels(chat_template), []

    @settings(max_examples=200, deadline=None)
    @given(chats)
    def agree(chat):
        rows = rows_of(chat_template, chat)
        for tokens in tokenise(chat_template, rows):
            opinion = sentinels.judge(tokens.row)
            judged.append(opinion is not None)
            if opinion is None or opinion.dropped:
                continue
            assert opinion.spans == tokens.row.spans
            added = np.isin(tokens.ids, chat_template.added_ids)
            spans = opinion.spans.values()
            mask = labelling.mask_of_spans(spans, tokens.offsets, added)
            assert np.array_equal(mask, tokens.mask)

    agree()
    assert np.mean(judged) > 0.5


def test_whitespace_that_a_special_token_swallows_is_not_learned_as_the_token(tokenizer):
    templates.swallow_whitespace(tokenizer)
    tokenizer.chat_template = templates.CHATML
    chat = [CHAT[1], {"role": "assistant", "content": " spaces first"}]
    [row] = labelled(ChatTemplate(tokenizer), [chat])
    assert "<|im_start|>" not in learned(tokenizer, row)


@pytest.mark.parametrize(
    ("text", "chat", "key"),
    [
        (templates.NO_SYSTEM, CHAT, "content"),
        (templates.CHATML, [CHAT[1], {**CHAT[2], "tool_calls": [CALL]}], "tool_calls"),
        (templates.CHATML, [CHAT[1], {**CHAT[2], "reasoning_content": "Hm."}], "reasoning_content"),
    ],
)
def test_texts_that_the_template_leaves_out_are_found(tokenizer, text, chat, key):
    chat_template = ChatTemplate(tokenizer, text)
    [row] = rows_of(chat_template, chat)
    assert key in {text.key for text in Sentinels(chat_template).judge(row).dropped}


def test_a_template_that_looks_into_texts_is_not_judged(tokenizer):
    looks = templates.CHATML.replace("{{ m.content }}", "{{ m.content | replace('e', '3') }}")
    chat_template = ChatTemplate(tokenizer, looks)
    [row] = rows_of(chat_template, CHAT)
    assert Sentinels(chat_template).judge(row) is None
