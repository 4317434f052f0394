"""Batched greedy decoding against a plain loop, and where an answer is cut."""

import pytest
import torch

from atlas_lib import generate, model, runtime

PROMPTS = ["Tell me about chess.", "Hi", "Write a few lines about rowing. Do not use commas.", "?"]


@pytest.fixture(scope="module")
def loaded(tiny_config):
    device = runtime.Device("cpu", "float32", "test")
    base = model.load_weights("base", tiny_config, device, in_4bit=False)
    return base, model.load_tokenizer(tiny_config)


def plain_greedy(base, tokenizer, prompt, form, max_new_tokens) -> list[int]:
    """One prompt, no cache, no padding: the argmax, again and again, up to a stop id."""
    ids, new = generate.encode(tokenizer, prompt, form), []
    while len(new) < max_new_tokens:
        with torch.no_grad():
            token = int(base(torch.tensor([ids + new])).logits[0, -1].argmax())
        if token in model.stop_ids(tokenizer):
            break
        new.append(token)
    return new


@pytest.mark.parametrize("form", ["raw", "chat"])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_batches_give_the_rows_of_a_plain_loop(loaded, form, batch_size):
    base, tokenizer = loaded
    answers = generate.generate(base, tokenizer, PROMPTS, form, 12, batch_size)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        expected = plain_greedy(base, tokenizer, prompt, form, 12)
        assert answer["n_tokens"] == len(expected)
        assert answer["response"] == tokenizer.decode(expected, skip_special_tokens=True)


def test_a_models_own_sampling_defaults_are_not_used(loaded):
    base, tokenizer = loaded
    before = generate.generate(base, tokenizer, PROMPTS, "chat", 12, 4)
    base.generation_config.repetition_penalty = 5.0
    base.generation_config.do_sample = True
    assert generate.generate(base, tokenizer, PROMPTS, "chat", 12, 4) == before


def test_the_answer_is_cut_at_the_first_stop(loaded):
    _, tokenizer = loaded
    end, text_end = model.stop_ids(tokenizer)
    ids = tokenizer("Yes.")["input_ids"]
    cut = generate.cut_at_stop(tokenizer, [*ids, end, *ids, text_end], [end, text_end])
    assert cut == {"response": "Yes.", "n_tokens": len(ids), "stop": "<|im_end|>"}
    assert generate.cut_at_stop(tokenizer, ids, [end])["stop"] is None


def test_chat_prompts_end_with_the_assistants_header(loaded):
    _, tokenizer = loaded
    text = tokenizer.decode(generate.encode(tokenizer, "Hi", "chat"))
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(generate.encode(tokenizer, "Hi", "raw")) == "Hi"


def test_diagnostics_count_only_the_end_of_turn_as_a_stop():
    stops = ["<|im_end|>", "<|endoftext|>", None, "<|im_end|>"]
    answers = [{"response": "a", "n_tokens": 2, "stop": stop} for stop in stops]
    answers[0]["response"] = " "
    found = generate.diagnose(answers)
    assert found == {
        "at_cap": 0.25,
        "stop_rate": 0.5,
        "empty": 0.25,
        "mean_length": 2.0,
        "distinct": 2,
    }
