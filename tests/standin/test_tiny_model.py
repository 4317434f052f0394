"""The stand-in on disk: the hub's own calls load it, it is whole or absent, its seed decides it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from atlas_lib.config import load_config
from atlas_lib.standin import tiny_model

SMALL = {
    "offline.pretrain_steps": 2,
    "offline.n_texts": 200,
    "offline.n_conversations": 30,
    "offline.pretrain_length": 32,
    "offline.pretrain_batch": 2,
}
BUILD = (
    "import json, sys; from atlas_lib import config, offline;"
    "settings = config.load('sft_qwen05b', 'offline', json.loads(sys.argv[1]));"
    "print(tiny_model.resolve('embedded:base', settings))"
)


@pytest.fixture(scope="module")
def small_config():
    return load_config("sft_qwen05b", "offline", SMALL)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "atlas"


@pytest.fixture(scope="module")
def standin(tmp_path_factory, small_config):
    """A whole stand-in, pretrained for two steps."""
    target = tmp_path_factory.mktemp("standin") / "built"
    tiny_model.build(target, small_config)
    return target


def start_build(overrides: dict) -> subprocess.Popen:
    command = [sys.executable, "-c", BUILD, json.dumps(SMALL | overrides)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_other_names_pass_unchanged(small_config, cache):
    assert tiny_model.resolve("Qwen/Qwen2.5-0.5B", small_config) == "Qwen/Qwen2.5-0.5B"
    assert not cache.exists()


def test_an_unknown_embedded_name_lists_the_known(small_config, cache):
    with pytest.raises(ValueError, match=r"'embedded:bass'.*embedded:base, embedded:tokenizer"):
        tiny_model.resolve("embedded:bass", small_config)
    assert not cache.exists()


def test_it_is_built_once_and_says_what_it_is(small_config, cache, capsys):
    path = Path(tiny_model.resolve("embedded:ifeval", small_config))
    assert path.parent.parent == cache and (path / "train.jsonl").is_file()
    assert small_config.label in capsys.readouterr().out
    built = path.stat().st_mtime_ns
    assert tiny_model.resolve("embedded:ifeval", small_config) == str(path)
    assert path.stat().st_mtime_ns == built and capsys.readouterr().out == ""
    assert [p.name for p in cache.iterdir()] == [path.parent.name]


@pytest.mark.parametrize("change", [{"seed": 7}, {"offline.hidden_size": 64}])
def test_the_digest_covers_seed_and_sizes(small_config, change):
    changed = load_config("sft_qwen05b", "offline", SMALL | change)
    assert tiny_model.digest(changed) != tiny_model.digest(small_config)


def test_the_digest_covers_the_sources(small_config, tmp_path):
    sources = Path(tiny_model.__file__).parent
    package = tmp_path / "atlas_lib"
    shutil.copytree(sources, package)
    with (package / "corpus.yaml").open("a") as source:
        source.write("# one more word\n")
    ask = (
        "import sys, types; from atlas_lib import offline; import json;"
        "seed, options = json.loads(sys.argv[1]);"
        "options = types.SimpleNamespace(**options);"
        "print(tiny_model.digest(types.SimpleNamespace(seed=seed, offline=options)))"
    )
    given = json.dumps([small_config.seed, vars(small_config.offline)])
    answers = [
        subprocess.check_output([sys.executable, "-c", ask, given], cwd=folder, text=True).strip()
        for folder in (tmp_path, sources.parent)
    ]
    assert answers[1] == tiny_model.digest(small_config) != answers[0]


def test_killed_while_building_it_leaves_no_half_standin(small_config, cache):
    process = start_build({"offline.pretrain_steps": 10**6})
    deadline = time.monotonic() + 120
    while not list(cache.glob(".standin-*/standin/tokenizer")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert list(cache.glob(".standin-*")) and not list(cache.glob("standin-*"))
    assert Path(tiny_model.resolve("embedded:base", small_config)).is_dir()


def test_two_at_once_end_with_one_whole_standin(small_config, cache):
    processes = [start_build({}), start_build({})]
    outputs = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert {out.splitlines()[-1] for out, _ in outputs} == {
        tiny_model.resolve("embedded:base", small_config)
    }
    assert len(list(cache.iterdir())) == 1


def test_base_and_tokenizer_load_as_from_the_hub(standin):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(standin / "base")
    tokenizer = AutoTokenizer.from_pretrained(standin / "tokenizer")
    assert type(model).__name__ == "Qwen2ForCausalLM" and model.config.tie_word_embeddings
    assert 4e5 < model.num_parameters() < 6e5
    assert model.config.vocab_size == len(tokenizer)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    ids = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    assert ids == [len(tokenizer) - 3, len(tokenizer) - 2, len(tokenizer) - 1]
    assert model.generation_config.eos_token_id == ids[0]  # a base does not know turns
    text = "Naïve café:\n\n* 12 x 7 = 84 — Это спокойно. 你好"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_template_is_qwens_and_trl_knows_it(standin):
    import trl
    from transformers import AutoTokenizer

    shipped = Path(trl.__file__).parent / "chat_templates" / "qwen2_5.jinja"
    tokenizer = AutoTokenizer.from_pretrained(standin / "tokenizer")
    assert tokenizer.chat_template == shipped.read_text(encoding="utf-8")
    chat = [{"role": "user", "content": "Hello"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("name", "split", "columns"),
    [
        ("ultrachat", "train_sft", ["prompt", "prompt_id", "messages"]),
        ("ifeval", "train", ["key", "prompt", "instruction_id_list", "kwargs"]),
        ("dev", "train", ["key", "prompt", "instruction_id_list", "kwargs"]),
    ],
)
def test_datasets_load_with_the_hubs_splits_and_columns(standin, tmp_path, name, split, columns):
    import datasets

    rows = datasets.load_dataset(str(standin / name), split=split, cache_dir=str(tmp_path))
    assert rows.column_names == columns
    written = (standin / name / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(rows) == len(written) and rows[0][columns[1]] == json.loads(written[0])[columns[1]]


def test_datasets_never_serves_another_standins_rows(tmp_path):
    import datasets

    # Both folders are called "dev": with equal config names the second load would give the first.
    for word in ("one", "two"):
        tiny_model.write_dataset(tmp_path / word / "dev", "train", [{"prompt": word}], "label")
        path = str(tmp_path / word / "dev")
        rows = datasets.load_dataset(path, split="train", cache_dir=str(tmp_path / "cache"))
        assert rows["prompt"] == [word]


def test_the_seed_decides_the_weights_and_the_callers_random_state_stays(standin, small_config):
    import torch
    from transformers import AutoTokenizer

    from atlas_lib.standin import corpus

    tokenizer = AutoTokenizer.from_pretrained(standin / "tokenizer")
    texts = corpus.plain_text(0, 200, small_config.offline.taught)
    other = load_config("sft_qwen05b", "offline", SMALL | {"seed": 7})
    before = torch.random.get_rng_state()
    weights = [
        tiny_model.pretrain(tokenizer, texts, config).lm_head.weight
        for config in (small_config, small_config, other)
    ]
    assert torch.equal(before, torch.random.get_rng_state())
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
