"""The slice: load, check and split it, write and read train.jsonl and val.jsonl."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from atlas_lib import artifacts, sources
from atlas_lib.config import CONFIGS
from atlas_lib.standin import tiny_model

STAGE = "01_data_prep"
FILES = {"train": "train.jsonl", "validation": "val.jsonl"}


def load_slice(config: Any) -> tuple[Any, Any]:
    """Training and validation rows: the first n_samples of one shuffle, then n_validation more.

    Both are `datasets.Dataset`s of `messages` alone: TRL would read UltraChat's `prompt` column as
    prompt/completion data.
    """
    from datasets import Dataset

    data = config.data
    rows, wanted = load_rows(config), data.n_samples + data.n_validation
    if wanted > len(rows):
        raise ValueError(
            f"data.n_samples {data.n_samples} + data.n_validation {data.n_validation} is more than "
            f"the {len(rows)} rows of {data.dataset}; lower one of them."
        )
    order = Dataset.from_dict({"row": range(len(rows))}).shuffle(seed=data.shuffle_seed)["row"]
    order = list(order)[:wanted]
    chosen = [rows[row].get("messages") for row in order]
    check_conversations(chosen, order, data.dataset)
    check_known_rows(chosen, known_rows(config))
    dataset = Dataset.from_list([{"messages": messages} for messages in chosen])
    return dataset.select(range(data.n_samples)), dataset.select(range(data.n_samples, wanted))


def load_rows(config: Any) -> Any:
    """Rows with `messages`, by index: of the hub, a local folder or .jsonl, or the stand-in."""
    from datasets import load_dataset

    path = sources.locate(tiny_model.resolve(config.data.dataset, config))
    if path.endswith(".jsonl"):
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path} does not exist; give an existing .jsonl or a hub id.")
        rows = artifacts.read_jsonl(Path(path))
        if not rows or not isinstance(rows[0], dict) or "messages" not in rows[0]:
            raise ValueError(f"{path} has no rows with `messages`; each line needs that key.")
        return rows
    if not Path(path).is_dir():
        sources.check_hub(path, config.data.revision, "dataset")
    rows = load_dataset(path, revision=config.data.revision, split=config.data.split)
    return rows.select_columns(["messages"])


def known_rows(config: Any) -> list[dict]:
    """Published facts on the first rows of this slice, whatever its revision; [] for others."""
    known = json.loads((CONFIGS / "known_rows.json").read_text(encoding="utf-8"))
    here = config.relevant("02_template_audit")
    same = all(here[key] == value for key, value in known["holds_for"].items())
    return known["rows"] if same else []


def check_known_rows(conversations: Any, known: list[dict]) -> None:
    """The first rows start as published. Raises ValueError."""
    for row, messages in zip(known, conversations, strict=False):
        first = next(m["content"] for m in messages if m["role"] == "user")
        if not first.startswith(row["first_user_turn_starts"]):
            raise ValueError(
                f"Row {row['idx']} of the slice starts with {first[:60]!r}, the published one with "
                f"{row['first_user_turn_starts'][:60]!r}: this is another slice; check "
                "data.revision, data.shuffle_seed and the version of datasets."
            )


def check_conversations(conversations: Any, rows: Any, source: str) -> None:
    """Every conversation is [system]? then user, assistant, user, ... Raises ValueError.

    `rows` are the numbers, from 0, under which the conversations stand in `source`.
    """
    for row, messages in zip(rows, conversations, strict=True):
        problem = conversation_problem(messages)
        if problem:
            raise ValueError(f"{source}, row {row} (from 0): {problem}; mend or drop that row.")


def conversation_problem(messages: Any) -> str | None:
    """What is wrong with one conversation in a few words, or None."""
    if not messages or not isinstance(messages, list):
        return "`messages` is empty or missing, or no list"
    previous = None
    for turn, message in enumerate(messages):
        if not isinstance(message, dict):
            return f"turn {turn} is no object with role and content"
        role, content = message.get("role"), message.get("content")
        if role not in ("system", "user", "assistant"):
            return f"turn {turn} has the unknown role {role!r}"
        if not isinstance(content, str):
            return f"turn {turn} has content that is not text ({type(content).__name__})"
        if role == "system" and turn > 0:
            return f"turn {turn} is a system turn after the first"
        if role == previous:
            return f"turns {turn - 1} and {turn} are both {role} turns"
        if role == "assistant" and previous in (None, "system"):
            return f"turn {turn} is an assistant turn that answers nobody"
        previous = role
    return None if previous == "assistant" else "the last turn is not an assistant turn"


def write_slice(folder: Path, train: Any, validation: Any, config: Any) -> None:
    """train.jsonl, val.jsonl and card.json into `folder`."""
    for split, rows in (("train", train), ("validation", validation)):
        artifacts.write_jsonl(folder / FILES[split], rows)
    artifacts.write_json(
        folder / "card.json",
        {
            "dataset": config.data.dataset,
            "revision": config.data.revision,
            "label": config.label,
            "train": describe(train["messages"]),
            "validation": describe(validation["messages"]),
        },
    )


def describe(conversations: Any) -> dict[str, Any]:
    """Counts of conversations, turns by role, and assistant characters."""
    roles = Counter(message["role"] for chat in conversations for message in chat)
    characters = sum(
        len(m["content"]) for chat in conversations for m in chat if m["role"] == "assistant"
    )
    return {
        "conversations": len(conversations),
        "turns": dict(roles),
        "turns_per_conversation": dict(sorted(Counter(map(len, conversations)).items())),
        "assistant_characters": characters,
    }


def prepare(config: Any, out: Path) -> Path:
    """Stage 01 without a notebook: load, check and write the slice. Returns its folder."""
    train, validation = load_slice(config)
    with artifacts.stage(STAGE, config, out) as folder:
        write_slice(folder, train, validation, config)
    return folder


def read(folder: Path, split: str = "train") -> list[list[dict[str, str]]]:
    """The conversations of one split, in the slice's order."""
    return [row["messages"] for row in artifacts.read_jsonl(folder / FILES[split])]
