"""The slice: load, check and split it, write and read train.jsonl and val.jsonl."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from atlas_lib import artifacts, offline, runtime
from atlas_lib import config as configuration

STAGE = "01_data_prep"
FILES = {"train": "train.jsonl", "validation": "val.jsonl"}


def load_split(name: str, revision: str | None, split: str, config: Any) -> Any:
    """A `datasets.Dataset` from the hub, a local folder or .jsonl, or the embedded stand-in."""
    from datasets import load_dataset

    path = offline.resolve(name, config)
    if path.endswith((".jsonl", ".json")):
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path} does not exist; give an existing .jsonl or a hub id.")
        return load_dataset("json", data_files={split: path}, split=split)
    if not Path(path).exists():
        runtime.check_hub(path, revision, "dataset")
    return load_dataset(path, revision=revision, split=split)


def load_slice(config: Any) -> tuple[Any, Any]:
    """Training and validation rows: the first n_samples of one shuffle, then n_validation more."""
    data = config.data
    rows = load_split(data.dataset, data.revision, data.split, config)
    wanted = data.n_samples + data.n_validation
    if wanted > len(rows):
        raise ValueError(
            f"data.n_samples {data.n_samples} + data.n_validation {data.n_validation} is more than "
            f"the {len(rows)} rows of {data.dataset}; lower one of them."
        )
    # Only `messages`: TRL would read UltraChat's `prompt` column as prompt/completion data.
    rows = rows.shuffle(seed=data.shuffle_seed).select(range(wanted)).select_columns(["messages"])
    check_conversations(rows["messages"], data.dataset)
    check_known_rows(rows["messages"], known_rows(config))
    return rows.select(range(data.n_samples)), rows.select(range(data.n_samples, wanted))


def known_rows(config: Any) -> list[dict]:
    """Published facts on the first rows of exactly this slice; [] for any other data."""
    known = json.loads((configuration.FOLDER / "known_rows.json").read_text(encoding="utf-8"))
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


def check_conversations(conversations: Any, source: str) -> None:
    """Every conversation is [system]? then user, assistant, user, ... Raises ValueError."""
    for row, messages in enumerate(conversations):
        problem = conversation_problem(messages)
        if problem:
            raise ValueError(
                f"{source}, row {row} of the shuffled slice: {problem}; mend or drop that row."
            )


def conversation_problem(messages: Any) -> str | None:
    """What is wrong with one conversation in a few words, or None."""
    if not messages:
        return "`messages` is empty or missing"
    previous = None
    for turn, message in enumerate(messages):
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
