"""The training subset: a bad conversation is named; validation is not part of training."""

import gzip
import json
import os
import pickle
import re
import shutil
from pathlib import Path

import datasets
import pytest
import stub_hub
from checks import refusal, run_python

from atlas_lib import artifacts, data
from atlas_lib.config import load_config
from atlas_lib.data_prep import subset

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Keep what `datasets` converts out of the user's cache."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def source(tmp_path) -> Path:
    return tmp_path / "chats.jsonl"


def numbered(count: int) -> list[dict]:
    """Rows as UltraChat has them, `prompt` column included."""
    return [
        {
            "prompt": f"question {n}",
            "messages": [
                {"role": "user", "content": f"question {n}"},
                {"role": "assistant", "content": f"answer {n}"},
            ],
        }
        for n in range(count)
    ]


def configured(source: Path, rows: list, n_samples: int, n_validation: int, seed=42):
    """A configuration whose data is `rows`, written to `source`."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    source.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    overrides = {
        "data.dataset": str(source),
        "data.n_samples": n_samples,
        "data.n_validation": n_validation,
        "data.shuffle_seed": seed,
    }
    return load_config("sft_qwen05b", "", overrides)


@pytest.mark.parametrize(("seed", "n_validation"), [(42, 5), (42, 10), (7, 10)])
def test_validation_follows_training_in_the_same_shuffle(seed, n_validation, source):
    rows = numbered(30)
    train, validation = subset.load_subset(configured(source, rows, 20, n_validation, seed))
    shuffled = datasets.Dataset.from_list(rows).shuffle(seed=seed)["messages"]
    assert train["messages"] == shuffled[:20]
    assert validation["messages"] == shuffled[20 : 20 + n_validation]
    assert train.column_names == validation.column_names == ["messages"]


@pytest.mark.parametrize(("n_samples", "n_validation"), [(6, 1), (1, 6), (5000, 500)])
def test_more_rows_than_there_are_is_refused(n_samples, n_validation, source):
    config = configured(source, numbered(6), n_samples, n_validation)
    sentence = refusal(subset.load_subset, config)
    for part in (f"{n_samples} ", f"{n_validation} ", "the 6 rows", str(source), "lower"):
        assert part in sentence


BAD = {
    "empty messages": ({"messages": []}, "empty or missing"),
    "missing messages": ({"prompt": "q"}, "empty or missing"),
    "text": ({"messages": "hello"}, "messages"),
    "texts": ({"messages": ["hello", "there"]}, "turn 0"),
    "null turn": ({"messages": [USER, None]}, "turn 1"),
    "unknown role": ({"messages": [USER, {"role": "tool", "content": "x"}, ASSISTANT]}, "'tool'"),
    "no role": ({"messages": [{"content": "x"}, ASSISTANT]}, "None"),
    "number": ({"messages": [{"role": "user", "content": 5}, ASSISTANT]}, "(int)"),
    "no content": ({"messages": [USER, {"role": "assistant"}]}, "(NoneType)"),
    "parts": ({"messages": [{"role": "user", "content": ["x"]}, ASSISTANT]}, "(list)"),
    "two responses": (
        {"messages": [USER, ASSISTANT, ASSISTANT]},
        "turn 2 has the role 'assistant' instead of 'user'",
    ),
    "two questions": ({"messages": [USER, USER, ASSISTANT]}, "instead of 'assistant'"),
    "system later": (
        {"messages": [USER, ASSISTANT, SYSTEM, USER, ASSISTANT]},
        "turn 2 has the role 'system'",
    ),
    "two system turns": ({"messages": [SYSTEM, SYSTEM, USER, ASSISTANT]}, "turn 1 has the role"),
    "system alone": ({"messages": [SYSTEM]}, "last turn"),
    "user last": ({"messages": [USER, ASSISTANT, USER]}, "last turn"),
    "no user": ({"messages": [SYSTEM, ASSISTANT]}, "turn 1 has the role 'assistant'"),
    "assistant first": (
        {"messages": [ASSISTANT, USER, ASSISTANT]},
        "turn 0 has the role 'assistant'",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_conversation_is_named_by_its_row_and_nothing_is_written(name, source, tmp_path):
    bad, words = BAD[name]
    config = configured(source, [*numbered(5), bad], 4, 2)
    sentence = refusal(subset.prepare_subset, config, tmp_path / "out")
    assert sentence.startswith(f"{source}, row 5 (from 0): ")
    assert words in sentence
    assert not (tmp_path / "out").exists()


def test_a_bad_conversation_in_validation_is_found(source):
    rows = numbered(6)
    last = datasets.Dataset.from_dict({"n": range(6)}).shuffle(seed=42)["n"][5]
    rows[last] = {"messages": []}
    assert f"row {last} (from 0)" in refusal(subset.load_subset, configured(source, rows, 4, 2))


# --- files and folders ----------------------------------------------------------------------------

LINE = json.dumps(numbered(1)[0]).encode() + b"\n"
ONE_A_LINE = "each line must hold one object, in UTF-8 and not compressed"
# name: (name of the file, its bytes, words of the refusal)
BAD_FILES = {
    "no bytes": ("chats.jsonl", b"", "is more than the 0 rows of"),
    "blank lines": ("chats.jsonl", b"\n \r\n", "is more than the 0 rows of"),
    "other key": ("chats.jsonl", b'{"conversations": []}\n' * 9, "`messages` is empty or missing"),
    "text": ("chats.jsonl", LINE + b'"x"\n', "line 2: not JSON Lines"),
    "list": ("chats.jsonl", LINE + b"[]\n", "line 2: not JSON Lines"),
    "half a line": ("chats.jsonl", LINE * 3 + LINE[:30], "line 4: not JSON Lines"),
    "two objects": ("chats.jsonl", LINE.strip() + LINE, "line 1: not JSON Lines"),
    "brackets": ("chats.jsonl", LINE + b"[" * 100_000 + b"\n", "line 2: not JSON Lines"),
    "surrogate": (
        "chats.jsonl",
        LINE + LINE.replace(b"question 0", rb"\ud800"),
        "line 2: not JSON Lines",
    ),
    "Latin-1": ("chats.jsonl", LINE + b'{"messages": "\xe4"}\n', "line 2: not JSON Lines"),
    "UTF-16": (
        "chats.jsonl",
        LINE.decode().encode("utf-16"),
        f"line 1: not JSON Lines.*{ONE_A_LINE}",
    ),
    "gzip": ("chats.jsonl.gz", gzip.compress(LINE), f"line 1: not JSON Lines.*{ONE_A_LINE}"),
    "CSV": ("chats.csv", b"messages\nhello\n", f"line 1: not JSON Lines.*{ONE_A_LINE}"),
    "array": ("chats.json", b"[\n" + LINE + b"]\n", f"line 1: not JSON Lines.*{ONE_A_LINE}"),
    "no Parquet": ("chats.parquet", LINE, "Parquet magic bytes not found"),
    "array in a line": ("chats.json", b"[" + LINE.strip() + b"]", "line 1: not JSON Lines"),
}


def configured_at(place: Path, **given):
    return load_config(
        "sft_qwen05b",
        "",
        {"data.dataset": str(place), "data.n_samples": 4, "data.n_validation": 2}
        | {f"data.{key}": value for key, value in given.items()},
    )


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named_with_the_line(name, tmp_path):
    file, content, words = BAD_FILES[name]
    (tmp_path / file).write_bytes(content)
    sentence = refusal(subset.load_subset, configured_at(tmp_path / file))
    assert str(tmp_path / file) in sentence
    assert re.search(words, sentence)
    assert not re.search(r"line \d+ column", sentence)  # of a line of its own


@pytest.mark.parametrize("name", ["chats", "chats.json", "chats.JSONL", "chats.txt"])
@pytest.mark.parametrize(("before", "after"), [(b"", b""), (b"\xef\xbb\xbf", b"\n\n")])
def test_json_lines_are_read_from_a_file_of_any_name(before, after, name, tmp_path):
    (tmp_path / name).write_bytes(before + LINE * 6 + after)
    assert len(subset.load_subset(configured_at(tmp_path / name))[0]) == 4


@pytest.mark.parametrize("name", ["chats.jsonl", "chats.JSON", "chats.parquet", "chats.jsonl.gz"])
def test_a_missing_file_is_named(name, tmp_path):
    config = configured_at(tmp_path / name)
    assert f"{tmp_path / name} does not exist" in refusal(
        subset.load_subset, config, kind=FileNotFoundError
    )


def test_a_file_that_may_not_be_read_is_named(source):
    source.touch(mode=0)
    before = os.geteuid()
    try:
        if before == 0:  # root may read everything
            os.seteuid(65534)
        with pytest.raises(PermissionError, match=str(source)):
            data.load_rows(str(source), None, "train")
    finally:
        os.seteuid(before)


def test_other_keys_of_a_turn_are_left_out_whatever_their_types(source):
    rows = numbered(6)
    for note, row in zip(["x", 1, None, [2], {"a": 1}, True], rows, strict=True):
        row["messages"][0]["note"] = note
    train, validation = subset.load_subset(configured(source, rows, 4, 2))
    for messages in [*train["messages"], *validation["messages"]]:
        assert [turn.keys() for turn in messages] == [{"role", "content"}] * 2


CONFIGS = [{"config_name": "default", "data_files": [{"split": "train", "path": "rows.jsonl"}]}]
CARD = f"---\n{json.dumps({'configs': CONFIGS})}\n---\n"
BAD_FOLDERS = {
    "nothing": ({}, "any data files"),
    "no such split": ({"test.jsonl": LINE * 6}, "'train'.*'test'"),
    "broken JSON": ({"train.jsonl": LINE + b"{"}, "JSON parse error"),
    "brackets": ({"train.jsonl": b"[" * 100_000}, "depth"),
    "cells of text": ({"train.csv": b"messages\n" + b"hello\n" * 6}, "not a list"),
    "broken card": ({"README.md": b"---\n{\n---\n", "train.jsonl": LINE * 6}, "flow node"),
    "missing file of a card": ({"README.md": CARD.encode()}, "rows.jsonl"),
    "pickle": ({"train.pkl": "pickle"}, "data files"),
    "script": ({"mine.py": "script"}, "scripts are no longer supported"),
    "script beside data": ({"mine.py": "script", "train.jsonl": LINE * 6}, "scripts"),
}


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_a_bad_folder_is_named_and_runs_no_code(name, tmp_path):
    folder, canary = tmp_path / "mine", tmp_path / "canary"
    folder.mkdir()
    code = f"open({str(canary)!r}, 'w')"
    evil = {"pickle": pickle.dumps(Touching(code)), "script": code.encode()}
    files, words = BAD_FOLDERS[name]
    for file, content in files.items():
        (folder / file).write_bytes(evil.get(content, content))
    sentence = refusal(subset.load_subset, configured_at(folder, split="train"))
    assert str(folder) in sentence
    assert re.search(words, sentence)
    assert not canary.exists()


class Touching:
    """Its pickle runs `code` when it is loaded."""

    def __init__(self, code: str):
        self.code = code

    def __reduce__(self):
        return eval, (self.code,)


def test_a_folder_may_be_named_like_a_file(tmp_path):
    folder = tmp_path / "dir.jsonl"
    artifacts.write_jsonl(folder / "train.jsonl", numbered(6))
    train, _ = subset.load_subset(configured_at(folder, split="train"))
    assert len(train) == 4


@pytest.mark.parametrize("card", [None, CARD])
def test_a_folder_is_read_again_when_its_content_changes(card, tmp_path):
    """`datasets` caches a folder with a card by its name, and another folder of that name too."""
    found = []
    for n, folder in enumerate([tmp_path / "mine", tmp_path / "mine", tmp_path / "other" / "mine"]):
        rows = [{"messages": [USER, {"role": "assistant", "content": str(n)}]}] * 6
        artifacts.write_jsonl(folder / ("rows.jsonl" if card else "train.jsonl"), rows)
        if card:
            (folder / "README.md").write_text(card, "utf-8")
        train, _ = subset.load_subset(configured_at(folder, split="train"))
        found.append(train["messages"][0][1]["content"])
    assert found == ["0", "1", "2"]


def test_the_prepared_stage_reads_back_as_it_was_loaded(source, tmp_path):
    config = configured(source, numbered(30), 20, 5)
    folder = subset.prepare_subset(config, tmp_path / "out")
    train, validation = subset.load_subset(config)
    assert folder == tmp_path / "out" / "01_data_prep"
    assert subset.read_subset(folder) == subset.read_subset(folder, "train") == train["messages"][:]
    assert subset.read_subset(folder, "validation") == validation["messages"][:]
    outputs = artifacts.check(folder, config)["outputs"]
    assert outputs.keys() == {"train.jsonl", "val.jsonl", "card.json"}
    again = subset.prepare_subset(config, tmp_path / "again")
    assert artifacts.check(again, config)["outputs"] == outputs


def test_the_card_counts_turns_and_characters(source, tmp_path):
    rows = [{"messages": [SYSTEM, USER, ASSISTANT]}] * 3 + [{"messages": [USER, ASSISTANT] * 2}] * 3
    folder = subset.prepare_subset(configured(source, rows, 5, 1), tmp_path / "out")
    card = json.loads((folder / "card.json").read_text("utf-8"))
    both = [card["train"], card["validation"]]
    assert card["dataset"] == str(source)
    assert [part["conversations"] for part in both] == [5, 1]
    assert sum(part["turns"].get("system", 0) for part in both) == 3
    assert sum(part["turns"]["assistant"] for part in both) == 9
    assert sum(part["assistant_characters"] for part in both) == 9
    assert sum(part["turns_per_conversation"].get("4", 0) for part in both) == 3


LOAD = """
import sys
from atlas_lib.data_prep import subset
from atlas_lib.config import load_config

given = {"data.dataset": "team/chats", "data.revision": sys.argv[1], "data.split": "train_sft"}
given |= {"data.n_samples": 4, "data.n_validation": 2}
parts = subset.load_subset(load_config("sft_qwen05b", "", given))
print([messages[0]["content"] for part in parts for messages in part["messages"]])
"""


@pytest.fixture
def on_hub(tmp_path):
    """(the stub hub with four splits, a function that loads one in a new process)."""
    files = {}
    for split, count in (("train_sft", 2), ("test_sft", 1), ("train_gen", 1), ("test_gen", 1)):
        for part in range(count):
            rows = numbered(6)[part * 3 :][: 6 // count]
            path = tmp_path / f"{split}-{part:05}-of-{count:05}-00.parquet"
            datasets.Dataset.from_list(rows).to_parquet(path)
            files[f"data/{path.name}"] = path.read_bytes()
    with stub_hub.serve() as hub:
        hub.datasets["team/chats"] = files | {"README.md": b"# Chats"}

        def load(**given: str) -> str:
            environment = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": stub_hub.TOKEN} | given
            environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
            done = run_python("-c", LOAD, stub_hub.COMMIT, **environment)
            return (done.stderr if done.returncode else done.stdout).splitlines()[-1]

        yield hub, load


def test_one_split_of_a_hub_dataset_is_downloaded_once(on_hub):
    hub, load = on_hub
    first = load()
    chosen = datasets.Dataset.from_list(numbered(6)).shuffle(seed=42)["messages"]
    assert first == str([messages[0]["content"] for messages in chosen])
    downloaded = [line for line in hub.requests if line.startswith("GET") and "/resolve/" in line]
    assert len(downloaded) == 2
    assert all("train_sft" in line for line in downloaded)
    hub.requests.clear()
    assert load() == first
    assert [line for line in hub.requests if "/datasets/" in line] == []  # all of it is on disk
    assert load(HF_HUB_OFFLINE="1") == first


def test_a_hub_that_stalls_during_a_download_is_named_and_a_later_run_goes_on(on_hub):
    hub, load = on_hub
    hub.plant("stall")
    sentence = load(HF_HUB_DOWNLOAD_TIMEOUT="1")
    assert sentence.startswith("ValueError: team/chats: datasets cannot load the split 'train_sft'")
    assert sentence.endswith("the hub stopped answering: run it again, complete files are kept.")
    hub.plant()
    assert load().startswith("['question ")


@pytest.mark.parametrize(
    "gone",
    [
        {"HF_HUB_OFFLINE": "1"},
        pytest.param({"HF_ENDPOINT": "http://127.0.0.1:9"}, marks=pytest.mark.long),
    ],
)
def test_a_download_that_is_not_complete_is_not_taken_for_the_split(gone, on_hub, tmp_path):
    """Without a hub, huggingface_hub gives the part of the files that is on disk."""
    _, load = on_hub
    load()
    [second] = (tmp_path / "home").rglob("snapshots/*/data/train_sft-00001-*.parquet")
    second.unlink()
    shutil.rmtree(tmp_path / "home" / "datasets")
    assert load(**gone).startswith("ValueError: team/chats: datasets cannot load the split")


def test_a_hub_dataset_without_files_by_split_is_loaded_by_its_card(on_hub):
    hub, load = on_hub
    files = b"  data_files:\n  - split: train_sft\n    path: a.jsonl\n"
    card = b"---\nconfigs:\n- config_name: default\n" + files + b"---"
    rows = "".join(f"{json.dumps(row)}\n" for row in numbered(6)).encode()
    hub.datasets["team/chats"] = {"README.md": card, "a.jsonl": rows}
    assert load().startswith("['question ")
