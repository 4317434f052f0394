"""The training subset: a bad conversation is named; validation is not part of training."""

import json
from pathlib import Path

import datasets
import pytest
from checks import refusal

from atlas_lib import artifacts, data
from atlas_lib.config import load_config

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
    train, validation = data.load_subset(configured(source, rows, 20, n_validation, seed))
    shuffled = datasets.Dataset.from_list(rows).shuffle(seed=seed)["messages"]
    assert train["messages"] == shuffled[:20]
    assert validation["messages"] == shuffled[20 : 20 + n_validation]
    assert train.column_names == validation.column_names == ["messages"]


@pytest.mark.parametrize(("n_samples", "n_validation"), [(6, 1), (1, 6), (5000, 500)])
def test_more_rows_than_there_are_is_refused(n_samples, n_validation, source):
    config = configured(source, numbered(6), n_samples, n_validation)
    sentence = refusal(data.load_subset, config)
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
    "two responses": ({"messages": [USER, ASSISTANT, ASSISTANT]}, "both assistant"),
    "two questions": ({"messages": [USER, USER, ASSISTANT]}, "both user"),
    "system later": ({"messages": [USER, ASSISTANT, SYSTEM, USER, ASSISTANT]}, "system turn after"),
    "user last": ({"messages": [USER, ASSISTANT, USER]}, "last turn"),
    "no user": ({"messages": [SYSTEM, ASSISTANT]}, "without a user turn"),
    "assistant first": ({"messages": [ASSISTANT, USER, ASSISTANT]}, "without a user turn"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_conversation_is_named_by_its_row_and_nothing_is_written(name, source, tmp_path):
    bad, words = BAD[name]
    config = configured(source, [*numbered(5), bad], 4, 2)
    sentence = refusal(data.prepare_subset, config, tmp_path / "out")
    assert sentence.startswith(f"{source}, row 5 (from 0): ")
    assert words in sentence
    assert not (tmp_path / "out").exists()


def test_a_bad_conversation_in_validation_is_found(source):
    rows = numbered(6)
    last = datasets.Dataset.from_dict({"n": range(6)}).shuffle(seed=42)["n"][5]
    rows[last] = {"messages": []}
    assert f"row {last} (from 0)" in refusal(data.load_subset, configured(source, rows, 4, 2))


def test_a_missing_file_is_named(source):
    config = configured(source, [], 4, 2)
    source.unlink()
    assert str(source) in refusal(data.load_subset, config, kind=FileNotFoundError)


@pytest.mark.parametrize("rows", [[], ["not json"], [{"conversations": [USER, ASSISTANT]}] * 6])
def test_a_file_without_rows_of_messages_is_named(rows, source):
    assert str(source) in refusal(data.load_subset, configured(source, rows, 4, 2))


def test_the_prepared_stage_reads_back_as_it_was_loaded(source, tmp_path):
    config = configured(source, numbered(30), 20, 5)
    folder = data.prepare_subset(config, tmp_path / "out")
    train, validation = data.load_subset(config)
    assert folder == tmp_path / "out" / "01_data_prep"
    assert data.read_subset(folder) == data.read_subset(folder, "train") == train["messages"][:]
    assert data.read_subset(folder, "validation") == validation["messages"][:]
    outputs = artifacts.check(folder, config)["outputs"]
    assert outputs.keys() == {"train.jsonl", "val.jsonl", "card.json"}
    again = data.prepare_subset(config, tmp_path / "again")
    assert artifacts.check(again, config)["outputs"] == outputs


def test_the_card_counts_turns_and_characters(source, tmp_path):
    rows = [{"messages": [SYSTEM, USER, ASSISTANT]}] * 3 + [{"messages": [USER, ASSISTANT] * 2}] * 3
    folder = data.prepare_subset(configured(source, rows, 5, 1), tmp_path / "out")
    card = json.loads((folder / "card.json").read_text("utf-8"))
    both = [card["train"], card["validation"]]
    assert card["dataset"] == str(source)
    assert [part["conversations"] for part in both] == [5, 1]
    assert sum(part["turns"].get("system", 0) for part in both) == 3
    assert sum(part["turns"]["assistant"] for part in both) == 9
    assert sum(part["assistant_characters"] for part in both) == 9
    assert sum(part["turns_per_conversation"].get("4", 0) for part in both) == 3
