"""Rows of a file, a local folder or a dataset of the hub."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

from atlas_lib import artifacts, sources

Messages = list[dict[str, str]]


def load_rows(place: str, revision: str | None, split: str) -> Sequence[dict]:
    """Rows by index: of a .jsonl or .parquet file, or of a split of a local folder or hub dataset.

    Raises ValueError that names the source, and for a file the line.
    """
    import datasets
    import pyarrow.parquet

    path, kind, cache = Path(place), Path(place).suffix.lower(), None
    if path.is_dir():  # `datasets` caches a folder with a card by its name, not by its content
        cache = f"{datasets.config.HF_DATASETS_CACHE}/{sources.content_digest(path)}"
    elif kind != ".parquet" and (path.is_file() or kind in sources.FILE_TYPES):
        return artifacts.read_jsonl(path)  # an error of `datasets` would not name the line
    try:
        if path.is_file():
            return pyarrow.parquet.read_table(path).to_pylist()
        if not path.is_dir() and (files := _split_files(place, revision, split)):
            return datasets.Dataset.from_parquet(files)
        return datasets.load_dataset(place, revision=revision, split=split, cache_dir=cache)
    except Exception as error:  # each of its loaders has exceptions of its own
        reason = textwrap.shorten(str(error.__cause__ or error), 200)
        wrong = f"datasets cannot load the split {split!r} ({reason})"
        fix = "training data is read from the split data.split, prompts from 'train'"
        raise ValueError(f"{place}: {wrong}; {sources.remedy(error, fix)}.") from None


def _split_files(place: str, revision: str | None, split: str) -> list[str]:
    """A hub dataset's Parquet files of one split, in order: `datasets` would prepare all splits."""
    from huggingface_hub import errors, snapshot_download

    pattern = f"data/{split}-*.parquet"
    try:
        options = {"repo_type": "dataset", "allow_patterns": pattern}
        folder = snapshot_download(place, revision=revision, **options)
    except errors.LocalEntryNotFoundError:  # without a hub, `datasets` may have it in its own cache
        return []
    return sorted(map(str, Path(folder).glob(pattern)))
