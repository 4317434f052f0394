"""Texts that training shares with the evaluation's prompts or with validation, by their words.

Two texts overlap if they have the same words (exact) or 13 words in a row in common (13-gram), in
any case, punctuation and spacing. A shorter prompt within a longer turn is not found.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from atlas_lib import data, sources
from atlas_lib.data import Messages
from atlas_lib.schema import Config

N = 13
KINDS_OF_OVERLAP = ("exact", "13-gram")
DEV_PROMPTS = "configs/dev_prompts.jsonl"
NEAR = 0.5  # of a validation conversation's 13-grams, in one training conversation


def words_of(text: str) -> tuple[str, ...]:
    """Lower-cased words, without punctuation."""
    return tuple(re.findall(r"[^\W_]+", text.lower()))


def grams(words: Sequence[str]) -> set[int]:
    """The hashes of all runs of 13 words and of the whole, which take less memory than the runs."""
    runs = zip(*(words[start:] for start in range(N)), strict=False)
    return {hash(words), *map(hash, runs)} if words else set()


def all_grams(texts: Iterable[str]) -> set[int]:
    """The grams of several texts, none of which runs over the end of one."""
    return set().union(*(grams(words_of(text)) for text in texts))


def index_of(texts: Iterable[Iterable[str]]) -> dict[int, list[int]]:
    """Hash of a gram -> the places of the groups of texts that hold it."""
    found = defaultdict(list)
    for place, group in enumerate(texts):
        for gram in all_grams(group):
            found[gram].append(place)
    return found


def prompt_overlaps(conversations: Iterable[Messages], prompts: Sequence[str]) -> list[dict]:
    """{row, prompt, kind} of each row with a user turn that overlaps with a prompt, by number."""
    index, whole = index_of([text] for text in prompts), [words_of(text) for text in prompts]
    found = {}
    for row, messages in enumerate(conversations):
        for message in messages:
            if message["role"] == "user":
                words = words_of(message["content"])
                for place in {place for gram in grams(words) for place in index.get(gram, ())}:
                    exact = words == whole[place] or found.get((row, place)) == "exact"
                    found[row, place] = "exact" if exact else "13-gram"
    return [{"row": row, "prompt": place, "kind": found[row, place]} for row, place in found]


def near_duplicates(train: Iterable[Messages], validation: Sequence[Messages]) -> list[dict]:
    """{train, validation, shared}: pairs of rows that share at least NEAR of the 13-grams."""
    index = index_of([message["content"] for message in chat] for chat in validation)
    sizes, known = Counter(place for places in index.values() for place in places), set(index)
    found = []
    for row, chat in enumerate(train):
        common = known & all_grams(message["content"] for message in chat)
        shared = Counter(place for gram in common for place in index[gram])
        shares = {place: count / sizes[place] for place, count in shared.items()}
        found += [
            {"train": row, "validation": place, "shared": share}
            for place, share in shares.items()
            if share >= NEAR
        ]
    return found


def overlap_table(overlaps: dict[str, list[dict]], prompts: dict[str, list[str]]) -> pd.DataFrame:
    """Per source of prompts and kind: how many rows and how many prompts overlap."""
    counts = [
        {
            "source": name,
            "kind": kind,
            "rows": len({pair["row"] for pair in found if pair["kind"] == kind}),
            "prompts": len({pair["prompt"] for pair in found if pair["kind"] == kind}),
            "of prompts": len(prompts[name]),
        }
        for name, found in overlaps.items()
        for kind in KINDS_OF_OVERLAP
    ]
    columns = ["source", "kind", "rows", "prompts", "of prompts"]
    return pd.DataFrame(counts, columns=columns).set_index(columns[:2])


def evaluation_texts(config: Config) -> dict[str, list[str]]:
    """{source: its prompts} of eval.prompts and the dev prompts.

    A source that cannot be read is left out with a message, unless rows are to be dropped for it.
    """
    found = {}
    for name, revision in (
        (config.eval.prompts, config.eval.prompts_revision),
        (DEV_PROMPTS, None),
    ):
        try:
            place, fetched = sources.fetch(name, revision, config, "dataset")
            found[name] = list(map(_prompt_text, data.load_rows(place, fetched, "train")))
        except (OSError, ValueError) as problem:
            if config.data.exclude_overlap:
                raise
            print(f"overlap with {name} is not checked: {problem}")
    return found


def _prompt_text(row: dict[str, Any]) -> str:
    if not isinstance(row.get("prompt"), str):
        raise ValueError(f"the row with key {row.get('key')!r} has no text as 'prompt'.")
    return row["prompt"]
