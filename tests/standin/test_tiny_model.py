"""The tiny model on disk: loaded like hub files, complete or absent, known by its keys and code."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pytest

from atlas_lib.config import load_config
from atlas_lib.standin import corpus, tiny_model

ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "offline.pretrain_steps": 2,
    "offline.n_texts": 200,
    "offline.n_conversations": 30,
    "offline.pretrain_length": 32,
    "offline.pretrain_batch": 2,
}
BUILD = """
import json, sys
from atlas_lib.config import load_config
from atlas_lib.standin import tiny_model
config = load_config("sft_qwen05b", "offline", json.loads(sys.argv[1]))
print(tiny_model.build("base", config))
"""


def small(**changes):
    overrides = {f"offline.{key}" if key != "seed" else key: v for key, v in changes.items()}
    return load_config("sft_qwen05b", "offline", SMALL | overrides)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "atlas"


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Part -> its folder; the base is pretrained for two steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return {part: tiny_model.build(part, small()) for part in tiny_model.PARTS}


def start(**overrides) -> subprocess.Popen:
    """A process that builds the base."""
    command = [sys.executable, "-c", BUILD, json.dumps(SMALL | overrides)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_an_unknown_part_is_refused_with_the_known_ones(cache):
    with pytest.raises(ValueError, match=r"'embedded:bass'.*embedded:tokenizer, embedded:base"):
        tiny_model.build("bass", small())
    assert not cache.exists()


def test_a_part_is_built_once_and_alone(cache, capsys):
    folder = tiny_model.build("ifeval", small())
    assert (folder / "train.jsonl").is_file()
    assert str(folder) in capsys.readouterr().out
    built = folder.stat().st_mtime_ns
    assert tiny_model.build("ifeval", small()) == folder
    assert folder.stat().st_mtime_ns == built and capsys.readouterr().out == ""
    assert [path for path in cache.iterdir() if path.is_dir()] == [folder]


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        ({"seed": 7}, {"base"}),
        ({"hidden_size": 64}, {"base"}),
        ({"n_conversations": 31}, {"ultrachat"}),
        ({"vocab_size": 1200}, {"tokenizer", "base"}),
        ({"corpus_seed": 1}, set(tiny_model.PARTS)),
    ],
)
def test_identity_covers_what_decides_a_part_and_no_more(change, changed):
    differing = {
        part
        for part in tiny_model.PARTS
        if tiny_model.made_from(part, small()) != tiny_model.made_from(part, small(**change))
    }
    assert differing == changed


def test_identity_covers_the_code(tmp_path, monkeypatch):
    before = tiny_model.made_from("base", small())
    (tmp_path / "corpus.yaml").write_bytes(corpus.WORDS.read_bytes() + b"# one more word\n")
    monkeypatch.setattr(corpus, "WORDS", tmp_path / "corpus.yaml")
    assert tiny_model.made_from("base", small()) != before


def test_killed_while_building_it_leaves_no_half_built_part(cache):
    process = start(**{"offline.pretrain_steps": 10**6})
    deadline = time.monotonic() + 120
    while not list(cache.glob(".tiny/tokenizer.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert list(cache.glob(".tiny")) and not list(cache.glob("tiny-*/"))
    tiny_model.build("ifeval", small())  # the next build of any part clears the leftovers
    assert not list(cache.glob(".tiny*"))


@pytest.mark.parametrize("part", ["tokenizer", "dev"])
def test_a_part_that_was_damaged_is_built_again(part, cache, capsys):
    folder = tiny_model.build(part, small())
    written = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name in written:
        os.truncate(folder / name, len(written[name]) // 2)
        assert tiny_model.build(part, small()) == folder
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == written
        (folder / name).unlink()
        tiny_model.build(part, small())
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == written
    assert capsys.readouterr().out.count("Building") == 1 + 2 * len(written)


def test_two_at_once_end_with_one_complete_part(cache):
    processes = [start(), start()]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    built = str(tiny_model.build("base", small()))
    assert {out.splitlines()[-1] for out in outputs} == {built}
    assert "".join(outputs).count("Building embedded:base") == 1
    assert [str(path) for path in cache.iterdir() if path.is_dir()] == [built]


def test_base_and_tokenizer_load_as_from_the_hub(parts):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(parts["base"])
    tokenizer = AutoTokenizer.from_pretrained(parts["tokenizer"])
    assert type(model).__name__ == "Qwen2ForCausalLM" and model.config.tie_word_embeddings
    assert 4e5 < model.num_parameters() < 6e5
    assert model.config.vocab_size == len(tokenizer)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    ids = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    assert ids == [len(tokenizer) - 3, len(tokenizer) - 2, len(tokenizer) - 1]
    assert model.generation_config.eos_token_id == ids[0]  # a base knows no turns
    text = "Naïve café:\n\n* 12 x 7 = 84 — Это спокойно. 你好"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


PROMPTS = ("train", ["key", "prompt", "instruction_id_list", "kwargs"])
DATASETS = {"ultrachat": ("train_sft", ["prompt", "prompt_id", "messages"])}
DATASETS |= {"ifeval": PROMPTS, "dev": PROMPTS}


@pytest.mark.parametrize("part", DATASETS)
def test_datasets_load_with_the_hubs_splits_and_columns(parts, tmp_path, part):
    split, columns = DATASETS[part]
    rows = datasets.load_dataset(str(parts[part]), split=split, cache_dir=str(tmp_path))
    assert rows.column_names == columns
    written = (parts[part] / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(rows) == len(written) and rows[0][columns[1]] == json.loads(written[0])[columns[1]]


def test_datasets_does_not_serve_the_rows_of_another_folder_of_the_same_name(tmp_path):
    for word in ("one", "two"):
        tiny_model.write_dataset(tmp_path / word / "dev", "train", [{"prompt": word}], "label")
        path = str(tmp_path / word / "dev")
        rows = datasets.load_dataset(path, split="train", cache_dir=str(tmp_path / "cache"))
        assert rows["prompt"] == [word]


def test_the_seed_decides_the_weights_and_the_callers_random_state_stays(trained_tokenizer):
    import torch

    texts = corpus.plain_text(0, 200, small().offline.taught)
    before = torch.random.get_rng_state()
    one, same, other = (
        tiny_model.pretrain(trained_tokenizer, texts, config).lm_head.weight
        for config in (small(), small(), small(seed=7))
    )
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(one, same) and not torch.equal(one, other)
