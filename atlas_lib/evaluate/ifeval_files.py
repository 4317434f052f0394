"""Files of prompts, responses and verdicts: every row is checked before anything is computed.

Read by `artifacts.read_jsonl`: datasets' JSON loader fills kwargs with None, wants one type for all
keys and does not report the line of broken JSON.
"""

import difflib
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from atlas_lib import artifacts, sources
from atlas_lib.evaluate import checkers

PROMPT = {"key": (int, str), "prompt": str, "instruction_id_list": list, "kwargs": list}
RESPONSE = {"prompt": str, "response": str}
VERDICT = {"key": (int, str), "instruction_id_list": list, "strict": list, "loose": list}
VERDICT |= {"prompt_strict": bool, "prompt_loose": bool}
VERDICTS_NAME = "verdicts.jsonl"


def load_prompts(name: str, revision: str | None, limit: int | None = None) -> list[dict]:
    """First `limit` rows of a hub dataset, local folder or .jsonl, without kwargs that are None.

    Raises ValueError that names the first bad row, OSError where there is no file.
    """
    rows = list(itertools.islice(_prompt_rows(name, revision), limit))
    _refuse(name, _problems(rows, PROMPT, _unscorable))
    return [_without_none(row) for _, row in rows]


def load_responses(path: Path, prompts: list[dict]) -> tuple[list[str], list[str]]:
    """Responses in the prompts' order, and warnings about prompt texts that differ.

    Raises ValueError that names the first bad row, or where more than 1 % of the texts differ.
    """
    rows = artifacts.read_jsonl(path)
    _refuse(path, _response_problems(rows, prompts))
    differs = "the prompt's text differs from the one to score by"
    warnings = [f"{path}, {place}: {differs}" for place in _other_texts(rows, prompts)]
    return [row["response"] for row in rows], warnings


def load_verdicts(path: Path) -> list[dict]:
    """Verdicts from a file, or a folder, that `score` wrote. Raises ValueError naming a bad row."""
    path = path / VERDICTS_NAME if path.is_dir() else path
    rows = _lines(path)
    _refuse(path, _problems(rows, VERDICT, _inconsistent))
    return [row for _, row in rows]


def _refuse(name: str | Path, problems: Iterator[str]) -> None:
    if problem := next(problems, None):
        raise ValueError(f"{name}, {problem}")


def _lines(path: Path) -> list[tuple[str, Any]]:
    return [(f"line {n}", row) for n, row in enumerate(artifacts.read_jsonl(path), start=1)]


def _prompt_rows(name: str, revision: str | None) -> Iterable[tuple[str, Any]]:
    if name.endswith(".jsonl") or Path(name).is_file():
        return _lines(Path(name))
    import datasets

    if not Path(name).exists():
        sources.check_hub(name, revision, "dataset")
    rows = datasets.load_dataset(name, split="train", revision=revision)
    return ((f"row {n}", row) for n, row in enumerate(rows, start=1))


def _problems(
    rows: list[tuple[str, Any]], fields: dict[str, Any], misfit: Callable[[dict], str | None]
) -> Iterator[str]:
    """Rows that lack one of `fields`, that `misfit` objects to, or that repeat a key."""
    places: dict[str, str] = {}
    for place, row in rows:
        if problem := _unusable(row, fields):
            yield f"{place} {problem}"
        if problem := misfit(row):
            yield f"{place} (key {row['key']}) {problem}"
        if (first := places.setdefault(str(row["key"]), place)) != place:
            yield f"{place} repeats key {row['key']} of {first}"
    if not rows:
        yield "which holds no rows"


def _unusable(row: Any, fields: dict[str, Any]) -> str | None:
    for field, kind in fields.items():
        if not isinstance(row, dict) or not isinstance(row.get(field), kind):
            return f"lacks a usable {field!r} (needed: {', '.join(fields)})"
    return None


def _unscorable(row: dict) -> str | None:
    """Why the checkers could not score a response to a prompt, found before generating any."""
    if not row["prompt"]:
        return "has an empty 'prompt': there is nothing to continue"
    ids, kwargs = row["instruction_id_list"], row["kwargs"]
    known = checkers.lm_eval_checkers().instructions_registry.INSTRUCTION_DICT
    for unknown in (instruction for instruction in ids if str(instruction) not in known):
        nearest = ", ".join(difflib.get_close_matches(str(unknown), known, cutoff=0.0))
        return f"has the unknown instruction {unknown!r}; nearest: {nearest}"
    if not ids or len(ids) != len(kwargs):
        return f"has {len(ids)} instruction ids and {len(kwargs)} kwargs"
    if not all(isinstance(given, dict | None) for given in kwargs):
        return f"has kwargs that do not fit {ids}: each has to be an object"
    row = _without_none(row)
    for instruction, given in zip(ids, row["kwargs"], strict=True):
        parameters = inspect.signature(known[instruction].build_description).parameters
        # A checker draws at random what it is not given, and takes 0 and "" for not given.
        if (needed := {*parameters} - {"self"}) != {name for name, value in given.items() if value}:
            needs = f"needed, none of them empty or 0: {sorted(needed)}"
            return f"has kwargs that do not fit {instruction!r}: {needs}; given: {given}"
    try:
        checkers.followed(row, ".")
    except Exception as error:  # a checker raises what it happens to meet
        return f"has kwargs that do not fit {ids} ({type(error).__name__}: {error})"
    return None


def _without_none(row: dict) -> dict:
    """The fields of a prompt without kwargs that are None, with which the hub pads them."""
    kwargs = [{k: v for k, v in (given or {}).items() if v is not None} for given in row["kwargs"]]
    return {field: row[field] for field in PROMPT} | {"kwargs": kwargs}


def _response_problems(rows: list, prompts: list[dict]) -> Iterator[str]:
    """The rows have to be in the order of the prompts, each with its prompt's text and key."""
    texts = {prompt["prompt"] for prompt in prompts}
    keyed = any("key" in row for row in rows if isinstance(row, dict))
    for line, (row, prompt) in enumerate(zip(rows, prompts, strict=False), start=1):
        if problem := _unusable(row, RESPONSE):
            yield f"line {line} {problem}"
        place = f"line {line} does not match key {prompt['key']}, the prompt at this place: "
        if keyed and str(row.get("key")) != str(prompt["key"]):
            yield f"{place}its key is {row.get('key')!r}"
        if row["prompt"] != prompt["prompt"] and row["prompt"] in texts:
            yield f"{place}its text is that of another prompt"
    if len(rows) != len(prompts):
        line = min(len(rows), len(prompts)) + 1
        yield f"line {line} is missing or one too many: {len(rows)} rows, {len(prompts)} prompts"
    other = _other_texts(rows, prompts)
    if len(other) > len(rows) / 100:
        yield f"{other[0]} is the first of {len(other)} of {len(rows)} prompt texts that differ"


def _other_texts(rows: list[dict], prompts: list[dict]) -> list[str]:
    """Line and key of the rows whose prompt text is not the one to score by."""
    pairs = enumerate(zip(rows, prompts, strict=True), start=1)
    return [
        f"line {line} (key {prompt['key']})"
        for line, (row, prompt) in pairs
        if row["prompt"] != prompt["prompt"]
    ]


def _inconsistent(row: dict) -> str | None:
    names = row["instruction_id_list"]
    for mode in checkers.MODES:
        kinds = [(type(name), type(passed)) for name, passed in zip(names, row[mode], strict=False)]
        if len(row[mode]) != len(names) or {*kinds} != {(str, bool)}:
            return f"has not one verdict in {mode!r} for each name in 'instruction_id_list'"
        if row[f"prompt_{mode}"] != all(row[mode]):
            return f"has a 'prompt_{mode}' that does not follow from {mode!r}"
    return None
