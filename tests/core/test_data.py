"""The slice: every malformed conversation is named, and validation is never part of training."""

import json
from pathlib import Path

import datasets
import pytest

from atlas_lib import artifacts, data
from atlas_lib.config import load_config

USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
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


def configured(source: Path, rows: list | None, n_samples: int, n_validation: int, seed=42):
    """A configuration whose data is `rows`, written to `source`."""
    if rows is not None:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        source.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    overrides = {
        "data.dataset": str(source),
        "data.n_samples": n_samples,
        "data.n_validation": n_validation,
        "data.shuffle_seed": seed,
    }
    return load_config("sft_qwen05b", "", overrides)


def refusal(config, kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind, match=r"\A[^\n]+\.\Z") as caught:
        data.load_subset(config)
    return str(caught.value)


# --- the slice ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [42, 7])
def test_validation_is_what_comes_after_the_slice_in_the_same_shuffle(seed, source):
    rows = numbered(30)
    train, validation = data.load_subset(configured(source, rows, 20, 5, seed))
    shuffled = datasets.Dataset.from_list(rows).shuffle(seed=seed)["messages"]
    assert train["messages"] == shuffled[:20]
    assert validation["messages"] == shuffled[20:25]


def test_the_validation_rows_do_not_change_the_training_rows(source):
    few, many = (data.load_subset(configured(source, numbered(30), 20, n))[0] for n in (1, 10))
    assert few["messages"] == many["messages"]


def test_only_messages_are_kept(source):
    train, validation = data.load_subset(configured(source, numbered(6), 4, 2))
    assert train.column_names == validation.column_names == ["messages"]


def test_all_rows_may_be_used(source):
    train, validation = data.load_subset(configured(source, numbered(6), 4, 2))
    assert (len(train), len(validation)) == (4, 2)


@pytest.mark.parametrize(("n_samples", "n_validation"), [(6, 1), (1, 6), (7, 1), (5000, 500)])
def test_more_rows_than_there_are_is_refused(n_samples, n_validation, source):
    sentence = refusal(configured(source, numbered(6), n_samples, n_validation))
    for part in (f"{n_samples} ", f"{n_validation} ", "the 6 rows", str(source), "lower"):
        assert part in sentence


# --- bad conversations ----------------------------------------------------------------------------

BAD = {
    "empty messages": ({"messages": []}, "empty or missing"),
    "null messages": ({"messages": None}, "empty or missing"),
    "missing messages": ({"prompt": "q"}, "empty or missing"),
    "unknown role": ({"messages": [USER, {"role": "tool", "content": "x"}, ANSWER]}, "'tool'"),
    "no role": ({"messages": [{"content": "x"}, ANSWER]}, "None"),
    "capital role": ({"messages": [{"role": "User", "content": "x"}, ANSWER]}, "'User'"),
    "number": ({"messages": [{"role": "user", "content": 5}, ANSWER]}, "(int)"),
    "null": ({"messages": [USER, {"role": "assistant", "content": None}]}, "(NoneType)"),
    "no content": ({"messages": [USER, {"role": "assistant"}]}, "(NoneType)"),
    "parts": ({"messages": [{"role": "user", "content": ["x"]}, ANSWER]}, "(list)"),
    "object": ({"messages": [{"role": "user", "content": {"text": "x"}}, ANSWER]}, "(dict)"),
    "two answers": ({"messages": [USER, ANSWER, ANSWER]}, "both assistant"),
    "two questions": ({"messages": [USER, USER, ANSWER]}, "both user"),
    "two systems": ({"messages": [SYSTEM, SYSTEM, USER, ANSWER]}, "system turn after"),
    "system later": ({"messages": [USER, ANSWER, SYSTEM, USER, ANSWER]}, "system turn after"),
    "user last": ({"messages": [USER, ANSWER, USER]}, "last turn"),
    "no user": ({"messages": [SYSTEM, ANSWER]}, "without a user turn"),
    "answer first": ({"messages": [ANSWER, USER, ANSWER]}, "without a user turn"),
    "system only": ({"messages": [SYSTEM]}, "last turn"),
    "a text": ({"messages": "hello"}, "messages"),
    "texts": ({"messages": ["hello", "there"]}, "turn 0"),
    "a null turn": ({"messages": [USER, None]}, "turn 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_conversation_is_named_by_its_row(name, source):
    bad, words = BAD[name]
    rows = [*numbered(5), bad]
    config = configured(source, rows, 4, 2)
    sentence = refusal(config)
    assert sentence.startswith(f"{source}, row 5 (from 0): ")
    assert words in sentence


@pytest.mark.parametrize("content", [5, ["x"], {"text": "x"}], ids=["number", "parts", "object"])
def test_a_whole_collection_of_other_content_is_refused(content, source):
    """Then it is the column's own type: nothing is converted behind the check's back."""
    chat = [{"role": role, "content": content} for role in ("user", "assistant")]
    sentence = refusal(configured(source, [{"messages": chat}] * 6, 4, 2))
    kind = type(content).__name__
    assert f"(from 0): turn 0 has content that is not text ({kind})" in sentence


def test_a_bad_conversation_in_validation_is_found_too(source):
    rows = numbered(6)
    last = datasets.Dataset.from_dict({"n": range(6)}).shuffle(seed=42)["n"][5]
    rows[last] = {"messages": []}
    assert f"row {last} (from 0)" in refusal(configured(source, rows, 4, 2))


@pytest.mark.parametrize(
    "messages",
    [[USER, ANSWER], [SYSTEM, USER, ANSWER], [USER, ANSWER] * 3, [SYSTEM] + [USER, ANSWER] * 3],
)
def test_a_good_conversation_has_no_problem(messages):
    assert data.conversation_problem(messages) is None


# --- bad files ------------------------------------------------------------------------------------


def test_a_missing_file_is_named(source):
    assert str(source) in refusal(configured(source, None, 4, 2), FileNotFoundError)


@pytest.mark.parametrize(
    "rows", [[], ["not json"], [*numbered(5), '{"messages": [{"role": "us']], ids=len
)
def test_a_file_that_is_no_jsonl_is_named(rows, source):
    assert str(source) in refusal(configured(source, rows, 4, 2))


def test_a_file_without_messages_is_named(source):
    sentence = refusal(configured(source, [{"conversations": [USER, ANSWER]}] * 6, 4, 2))
    assert "messages" in sentence
    assert str(source) in sentence


def test_nothing_is_written_for_bad_data(source, tmp_path):
    config = configured(source, [*numbered(5), {"messages": []}], 4, 2)
    with pytest.raises(ValueError, match="empty or missing"):
        data.prepare_subset(config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- what is written ------------------------------------------------------------------------------


def test_the_prepared_stage_reads_back_as_it_was_loaded(source, tmp_path):
    config = configured(source, numbered(30), 20, 5)
    folder = data.prepare_subset(config, tmp_path / "out")
    train, validation = data.load_subset(config)
    assert folder == tmp_path / "out" / "01_data_prep"
    assert {path.name for path in folder.iterdir()} == {
        "train.jsonl", "val.jsonl", "card.json", "manifest.json",
    }  # fmt: skip
    assert data.read_subset(folder) == data.read_subset(folder, "train") == train["messages"][:]
    assert data.read_subset(folder, "validation") == validation["messages"][:]
    manifest = artifacts.check(folder, config)
    assert manifest["outputs"].keys() == {"train.jsonl", "val.jsonl", "card.json"}


def test_the_same_slice_is_the_same_bytes(source, tmp_path):
    config = configured(source, numbered(30), 20, 5)
    files = [data.prepare_subset(config, tmp_path / out) / "train.jsonl" for out in ("a", "b")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_any_text_survives_the_hand_over(source, tmp_path):
    """Web text holds U+2028 and U+0085, at which Python breaks lines and JSON does not."""
    odd = "one\u2028two\u2029three\x85four\x0cfive\r\nsix\tseven \N{GRINNING FACE} <|im_end|>"
    rows = [{"messages": [USER, {"role": "assistant", "content": odd}]}] * 6
    folder = data.prepare_subset(configured(source, rows, 4, 2), tmp_path / "out")
    assert {chat[1]["content"] for chat in data.read_subset(folder)} == {odd}


def test_the_card_counts_what_is_there(source, tmp_path):
    rows = [{"messages": [SYSTEM, USER, ANSWER]}] * 3 + [{"messages": [USER, ANSWER] * 2}] * 3
    folder = data.prepare_subset(configured(source, rows, 5, 1), tmp_path / "out")
    card = json.loads((folder / "card.json").read_text("utf-8"))
    both = [card["train"], card["validation"]]
    assert card["dataset"] == str(source)
    assert [part["conversations"] for part in both] == [5, 1]
    assert sum(part["turns"].get("system", 0) for part in both) == 3
    assert sum(part["turns"]["assistant"] for part in both) == 9
    assert sum(part["assistant_characters"] for part in both) == 9
    assert sum(part["turns_per_conversation"].get("4", 0) for part in both) == 3
