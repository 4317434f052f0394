"""The training subset: load, check and describe it; write and read its files."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atlas_lib import artifacts, data, sources, stages
from atlas_lib.bootstrap import CONFIGS
from atlas_lib.data import Messages
from atlas_lib.schema import Config

if TYPE_CHECKING:
    from datasets import Dataset

SPLIT_FILES = {"train": "train.jsonl", "validation": "val.jsonl"}


def load_subset(config: Config) -> tuple["Dataset", "Dataset"]:
    """Training and validation rows: the first n_samples of one shuffle, then n_validation more.

    Both have the column `messages` alone, each turn its role and content: TRL would read
    UltraChat's `prompt` column as prompt/completion data. Raises ValueError that names a bad row.
    """
    from datasets import Dataset

    wanted = config.data
    place, revision = sources.fetch(wanted.dataset, wanted.revision, config, "dataset")
    rows = data.load_rows(place, revision, wanted.split)
    end = wanted.n_samples + wanted.n_validation
    if end > len(rows):
        raise ValueError(
            f"data.n_samples {wanted.n_samples} + data.n_validation {wanted.n_validation} is more "
            f"than the {len(rows)} rows of {wanted.dataset}; lower one of them or add rows."
        )
    shuffled = Dataset.from_dict({"row": range(len(rows))}).shuffle(seed=wanted.shuffle_seed)
    chosen = []
    for row in shuffled[:end]["row"]:
        messages = rows[row].get("messages")
        if wrong := conversation_problem(messages):
            raise ValueError(
                f"{wanted.dataset}, row {row} (from 0): {wrong}; fix or drop that row."
            )
        chosen.append([{k: turn[k] for k in turn if k in ("role", "content")} for turn in messages])
    check_known_rows(chosen, known_rows(config))
    dataset = Dataset.from_list([{"messages": messages} for messages in chosen])
    return dataset.select(range(wanted.n_samples)), dataset.select(range(wanted.n_samples, end))


def known_rows(config: Config) -> list[dict]:
    """Published facts on the first rows of this subset, at any revision; [] for other data."""
    known, here = artifacts.read_json(CONFIGS / "known_rows.json"), config.flat()
    same = all(here[key] == value for key, value in known["holds_for"].items())
    return known["rows"] if same else []


def check_known_rows(conversations: Iterable[Messages], known: list[dict]) -> None:
    """The first rows start as published. Raises ValueError."""
    for row, messages in zip(known, conversations, strict=False):
        first = next(m["content"] for m in messages if m["role"] == "user")
        if not first.startswith(row["first_user_turn_starts"]):
            raise ValueError(
                f"Row {row['idx']} of the subset starts with {first[:60]!r}, the published one "
                f"with {row['first_user_turn_starts'][:60]!r}; check data.revision, "
                "data.shuffle_seed and the version of datasets."
            )


def conversation_problem(messages: Any) -> str | None:
    """What is wrong with one conversation in a few words, or None."""
    if not messages or not isinstance(messages, list):
        return "`messages` is empty or missing, or not a list"
    role, expected = None, "user"
    for turn, message in enumerate(messages):
        if not isinstance(message, dict):
            return f"turn {turn} is not an object with role and content"
        role, content = message.get("role"), message.get("content")
        if role != expected and (turn, role) != (0, "system"):
            return f"turn {turn} has the role {role!r} instead of {expected!r}"
        if not isinstance(content, str):
            return f"turn {turn} has content that is not text ({type(content).__name__})"
        expected = "assistant" if role == "user" else "user"
    return None if role == "assistant" else "the last turn is not an assistant turn"


def write_subset(
    folder: Path, train: "Dataset", validation: "Dataset", config: Config, excluded: Sequence = ()
) -> None:
    """train.jsonl, val.jsonl and card.json into `folder`; the card lists the rows left out."""
    for split, rows in (("train", train), ("validation", validation)):
        artifacts.write_jsonl(folder / SPLIT_FILES[split], rows)
    card = {
        "dataset": config.data.dataset,
        "revision": config.data.revision,
        "label": config.label,
        "excluded_for_overlap": sorted(excluded),
        "train": describe(train["messages"]),
        "validation": describe(validation["messages"]),
    }
    artifacts.write_json(folder / "card.json", card)


def describe(conversations: Sequence[Messages]) -> dict[str, Any]:
    """Counts of conversations, turns by role, and assistant characters."""
    messages = [message for chat in conversations for message in chat]
    return {
        "conversations": len(conversations),
        "turns": dict(Counter(m["role"] for m in messages)),
        "turns_per_conversation": dict(sorted(Counter(map(len, conversations)).items())),
        "assistant_characters": sum(
            len(m["content"]) for m in messages if m["role"] == "assistant"
        ),
    }


def prepare_subset(config: Config, out: Path) -> Path:
    """Stage 01 without a notebook: load, check and write the subset. Returns its folder."""
    if config.data.exclude_overlap:
        raise ValueError("data.exclude_overlap is applied by notebook 01_data_prep; run it first.")
    train, validation = load_subset(config)
    with artifacts.stage(stages.DATA_PREP, config, out) as folder:
        write_subset(folder, train, validation, config)
    return folder


def read_subset(folder: Path, split: str = "train") -> list[Messages]:
    """The conversations of one split, in the subset's order."""
    return [row["messages"] for row in artifacts.read_jsonl(folder / SPLIT_FILES[split])]
