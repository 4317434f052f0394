"""Decoding against transformers' generate, row for row; memory; where a response is cut."""

from types import SimpleNamespace

import pytest
import torch
from ifeval_cases import random_adapter
from peft import PeftModel

from atlas_lib import devices, models
from atlas_lib.config import load_config
from atlas_lib.evaluate import decoding, ifeval_files, slot_cache
from atlas_lib.standin import tiny_model

CAP = 64
DEVICE = devices.Device("cpu", "float32", "test")
PROMPTS = ["Tell me about chess.", "Hi", "Write a few lines about rowing. Do not use commas.", "?"]
# Every text is a document of its own, so that this tiny model learns to stop: some rows do, at
# very different lengths, and others hit the cap.
STOPPING = {"offline.texts_per_document": 1, "offline.pretrain_steps": 120}


@pytest.fixture(scope="module")
def config():
    return load_config("sft_qwen05b", "offline", STOPPING)


@pytest.fixture(scope="module")
def loaded(config):
    return models.load_weights("base", config, DEVICE, False), models.load_tokenizer(config)


@pytest.fixture(scope="module")
def prompts(config):
    """48 of embedded:ifeval, a third of them long."""
    rows = ifeval_files.load_prompts(str(tiny_model.build("ifeval", config)), limit=48)
    texts = [row["prompt"] for row in rows]
    return [" ".join(texts[i : i + 9]) if i % 3 == 0 else texts[i] for i in range(48)]


@pytest.fixture(scope="module")
def adapter(config, tmp_path_factory):
    return random_adapter(config, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def reference(loaded, prompts):
    """Answers by `models.generate`, a prompt at a time; kept, since this is slow."""
    kept = {}

    def responses(form: str, model=None) -> list[dict]:
        if (form, model) not in kept:
            tokenizer = loaded[1]
            rows = [plainly(model or loaded[0], tokenizer, text, form) for text in prompts]
            kept[form, model] = rows
        return kept[form, model]

    return responses


def plainly(model, tokenizer, prompt, form, cap=CAP) -> dict:
    from transformers import GenerationConfig

    stop_ids = models.stop_ids(tokenizer, model)
    ids = torch.tensor([decoding.encode_prompt(tokenizer, prompt, form)])
    options = GenerationConfig(do_sample=False, eos_token_id=stop_ids, pad_token_id=stop_ids[1])
    found = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        generation_config=options,
        max_new_tokens=cap,
    )
    return decoding.cut_at_stop(tokenizer, found[0, ids.shape[1] :].tolist(), stop_ids)


@pytest.mark.parametrize("form", ["raw", "chat"])
@pytest.mark.parametrize("slots", [1, 2, 7, 64])  # with 2, nearly every row enters a used slot
def test_full_slots_give_the_rows_of_plain_generation(loaded, prompts, reference, form, slots):
    assert decoding.generate(*loaded, prompts, form, CAP, slots) == reference(form)


def test_the_rows_it_is_compared_on_are_of_every_kind(loaded, prompts, reference):
    responses, tokenizer = reference("raw"), loaded[1]
    stops = {response["stop"] for response in responses}
    assert stops >= {None, "<|endoftext|>"}
    assert len({response["n_tokens"] for response in responses}) > 10
    assert len({response["response"] for response in responses}) > 30
    lengths = [len(decoding.encode_prompt(tokenizer, text, "raw")) for text in prompts]
    assert max(lengths) > 8 * min(lengths)


@pytest.mark.parametrize("form", ["raw", "chat"])
def test_an_adapter_gives_the_same_responses_attached_and_merged(
    config, loaded, prompts, reference, adapter, form
):
    tokenizer = loaded[1]
    base = models.load_weights("base", config, DEVICE, False)
    attached = PeftModel.from_pretrained(base, adapter)
    expected = reference(form, attached)
    assert decoding.generate(attached, tokenizer, prompts, form, CAP, 7) == expected
    with attached.disable_adapter():
        assert decoding.generate(attached, tokenizer, prompts, form, CAP, 7) == reference(form)
    merged = attached.merge_and_unload()
    assert decoding.generate(merged, tokenizer, prompts, form, CAP, 7) == expected
    assert expected != reference(form)


def test_a_model_in_4_bit_gives_the_same_responses(config, loaded, prompts, adapter):
    tokenizer = loaded[1]
    base = models.load_weights("base", config, DEVICE, in_4bit=True)
    attached = PeftModel.from_pretrained(base, adapter)
    expected = [plainly(attached, tokenizer, text, "raw", 12) for text in prompts[:12]]
    assert decoding.generate(attached, tokenizer, prompts[:12], "raw", 12, 5) == expected


def test_the_cache_moves_without_a_trace(loaded, prompts, reference, monkeypatch):
    """Short prompts in three slots: the columns are used up again and again."""
    monkeypatch.setattr(decoding, "PREFILL_TOKENS", 200)
    short = [i for i in range(48) if i % 3]
    found = decoding.generate(*loaded, [prompts[i] for i in short], "raw", CAP, 3)
    assert found == [reference("raw")[i] for i in short]


def test_there_is_always_a_mask_and_no_query_without_a_column(loaded, prompts):
    """Without one a T4 takes sdpa's slow path; a softmax over nothing may be NaN on a GPU."""
    masks = []
    hook = loaded[0].register_forward_pre_hook(
        lambda module, args, inputs: masks.append(inputs["attention_mask"]), with_kwargs=True
    )
    decoding.generate(*loaded, prompts[:9], "raw", 5, 4)
    hook.remove()
    assert {mask.shape[2] == 1 for mask in masks} == {True, False}  # decoding and new prompts
    assert all(mask.dim() == 4 and mask.any(-1).all() for mask in masks)


@pytest.mark.parametrize(
    "change", [{"_attn_implementation": "eager"}, {"layer_types": ["sliding_attention"] * 2}]
)
def test_attention_that_would_misread_the_mask_is_refused(loaded, monkeypatch, change):
    [(name, value)] = change.items()
    monkeypatch.setattr(loaded[0].config, name, value)
    with pytest.raises(ValueError, match=r"does not support (eager|sliding_attention) attention"):
        decoding.generate(*loaded, PROMPTS, "raw", 4, 2)


def test_a_stop_at_the_very_first_token(loaded, prompts, reference):
    """Made sure of: the likeliest first token of some rows is declared a stop."""
    base, tokenizer = loaded
    encoded = [decoding.encode_prompt(tokenizer, text, "raw") for text in prompts]
    plain = dict(torch.inference_mode()(decoding.decode)(base, encoded, [], 6, 5))
    stop = [plain[0][0]]
    cut = dict(torch.inference_mode()(decoding.decode)(base, encoded, stop, 6, 5))
    assert cut[0] == stop
    for index, ids in plain.items():
        end = ids.index(stop[0]) + 1 if stop[0] in ids else None
        assert cut[index] == ids[:end]


@pytest.fixture
def small_memory(loaded):
    """The model, out of memory where more than `rows` rows come at once, after a few passes."""
    base = loaded[0]
    state = SimpleNamespace(rows=10**9, passes=0)

    def refuse(module, args, inputs):
        state.passes += 1
        if len(inputs["input_ids"]) > state.rows and state.passes > 40:
            raise torch.OutOfMemoryError("planted")

    hook = base.register_forward_pre_hook(refuse, with_kwargs=True)
    yield state
    hook.remove()


def test_out_of_memory_halves_the_slots_and_loses_nothing(
    loaded, prompts, reference, small_memory, capsys
):
    small_memory.rows, seen = 4, []
    responses = decoding.generate(
        *loaded, prompts, "raw", CAP, 16, lambda index, response: seen.append((index, response))
    )
    assert responses == reference("raw")
    assert sorted(index for index, _ in seen) == list(range(len(prompts)))
    assert all(responses[index] == response for index, response in seen)
    tokens = [response["n_tokens"] for _, response in seen]
    assert tokens[0] < max(tokens), "responses are handed over as they finish, not in batches"
    shown = capsys.readouterr().out
    assert shown.count("out of memory") == 2 and "with 8 slots" in shown and "with 4 slots" in shown
    small_memory.rows = 0
    with pytest.raises(ValueError, match="Memory does not hold a single row"):
        decoding.generate(*loaded, PROMPTS, "raw", CAP, 2)


def test_slots_are_what_memory_holds(loaded, monkeypatch):
    base = loaded[0]
    assert decoding.fitting_slots(base, 1008) == decoding.MAX_SLOTS["cpu"]
    decoder = slot_cache.SlotDecoder(base, 1, 1008)
    decoder.add([[5] * 1000])
    row = sum(kept.nbytes for layer in decoder.cache.layers.values() for kept in layer)
    monkeypatch.setattr(devices, "free_bytes", lambda device: 5.5 * row / devices.HEADROOM)
    assert decoding.fitting_slots(base, 1008) == 5
    monkeypatch.setattr(devices, "free_bytes", lambda device: 0)
    assert decoding.fitting_slots(base, 1008) == 1


def test_a_t4_holds_all_prompts_of_ifeval(monkeypatch):
    """At Qwen2.5-0.5B's shape, with 13.4 of its 14.6 GiB free; a CPU takes 48."""
    heads = {"num_attention_heads": 14, "num_key_value_heads": 2, "hidden_size": 896}
    shape = SimpleNamespace(num_hidden_layers=24, **heads)
    model = SimpleNamespace(config=shape, dtype=torch.float16, device=torch.device("cuda"))
    monkeypatch.setattr(devices, "free_bytes", lambda device: 13.4 * 2**30)
    assert decoding.fitting_slots(model, 1280) >= 541
    model.device = torch.device("cpu")
    assert decoding.fitting_slots(model, 1280) == 48


def test_chat_prompts_open_a_turn_and_the_response_is_cut_at_the_first_stop(loaded):
    _, tokenizer = loaded
    text = tokenizer.decode(decoding.encode_prompt(tokenizer, "Hi", "chat"))
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(decoding.encode_prompt(tokenizer, "Hi", "raw")) == "Hi"
    end, text_end = tokenizer.eos_token_id, tokenizer.pad_token_id
    ids = tokenizer("Yes.")["input_ids"]
    cut = decoding.cut_at_stop(tokenizer, [*ids, end, *ids, text_end], [end, text_end])
    assert cut == {"response": "Yes.", "n_tokens": len(ids), "stop": "<|im_end|>"}
    assert decoding.cut_at_stop(tokenizer, ids, [end])["stop"] is None


def test_diagnostics_count_only_the_end_of_turn_as_a_stop():
    stops = ["<|im_end|>", "<|endoftext|>", None, "<|im_end|>"]
    responses = [{"response": "a", "n_tokens": 2, "stop": stop} for stop in stops]
    responses[0]["response"] = " "
    found = decoding.diagnose(responses, "<|im_end|>")
    assert found == {
        "at_cap": 0.25,
        "eos_rate": 0.5,
        "empty": 0.25,
        "mean_length": 2.0,
        "distinct": 2,
        "repetition": 0.0,
    }


WORDS = " ".join(f"word{i}" for i in range(60))
ROWS = ", ".join(f'{{"name": "n{i}", "age": {i}}}' for i in range(30))


@pytest.mark.parametrize(
    ("text", "loops"),
    [
        ("", False),
        ("Ha ha ha.", False),
        (WORDS, False),
        (f"{WORDS} {WORDS[:200]}", False),
        (f"{WORDS}\n\n" + "and so on, " * 60, True),
        ("!" * 200, True),
        ("a" * 200, True),
        ("好的。" * 50, True),
        (f"[{ROWS}]", False),  # the same keys again and again are no loop
    ],
)
def test_a_response_that_repeats_itself_is_counted(text, loops):
    responses = [{"response": text, "n_tokens": 1, "stop": None}]
    assert decoding.diagnose(responses, "<|im_end|>")["repetition"] == loops
