"""Files of prompts, responses and verdicts, checked before anything is computed."""

import difflib
import inspect
import itertools
from collections import Counter
from pathlib import Path
from typing import Any

from atlas_lib import artifacts, data
from atlas_lib.evaluate import checkers

VERDICTS_NAME = "verdicts.jsonl"


def load_prompts(name: str, revision: str | None = None, limit: int | None = None) -> list[dict]:
    """First `limit` rows of a .jsonl file, local folder or hub dataset, in IFEval's schema.

    Raises ValueError that names the first row that cannot be scored, before anything is generated.
    """
    known = checkers.lm_eval_checkers().instructions_registry.INSTRUCTION_DICT
    prompts, rows = [], data.load_rows(name, revision, "train")
    for number, row in enumerate(itertools.islice(rows, limit), start=1):
        try:
            prompts.append(_scorable(row, known))
        except Exception as error:  # a checker raises what it happens to meet
            raise ValueError(
                f"{name}, row {number}: IFEval's checkers cannot score this prompt "
                f"({type(error).__name__}: {error})."
            ) from None
    repeated = [key for key, times in Counter(str(p["key"]) for p in prompts).items() if times > 1]
    if repeated or not prompts:
        problem = f"repeats the keys {repeated}" if prompts else "holds no prompts"
        raise ValueError(f"{name} {problem}.")
    return prompts


def _scorable(row: dict, known: dict[str, Any]) -> dict:
    """The prompt without kwargs that are None, with which the hub pads them. Raises."""
    kwargs = [{k: v for k, v in (given or {}).items() if v is not None} for given in row["kwargs"]]
    prompt = {k: row[k] for k in ("key", "prompt", "instruction_id_list")} | {"kwargs": kwargs}
    ids, text = row["instruction_id_list"], row["prompt"]
    if not (text and isinstance(text, str) and ids and len(ids) == len(kwargs)):
        raise ValueError("it needs a text, and instructions with as many kwargs")
    for instruction, given in zip(ids, kwargs, strict=True):
        if instruction not in known:
            nearest = difflib.get_close_matches(str(instruction), known, cutoff=0.0)
            raise ValueError(f"unknown instruction {instruction!r}; nearest: {', '.join(nearest)}")
        parameters = inspect.signature(known[instruction].build_description).parameters
        # A checker draws at random what it is not given, and takes 0 and "" for not given.
        if (needed := {*parameters} - {"self"}) != {name for name, value in given.items() if value}:
            raise ValueError(f"{instruction} needs {sorted(needed)}, none of them empty or 0")
    checkers.followed(prompt, ".")
    return prompt


def load_responses(path: Path, prompts: list[dict]) -> list[str]:
    """Responses of a file with one {prompt, response} a line, in the prompts' order.

    Raises ValueError that names the first row that does not belong to the prompt at its place.
    """
    rows = artifacts.read_jsonl(path)
    for number, (row, prompt) in enumerate(zip(rows, prompts, strict=False), start=1):
        given = row if isinstance(row, dict) else {}
        if given.get("prompt") != prompt["prompt"] or not isinstance(given.get("response"), str):
            raise ValueError(
                f"{path}, row {number} has to hold the text of the prompt with key "
                f"{prompt['key']} as 'prompt' and a text as 'response'."
            )
    if len(rows) != len(prompts):
        raise ValueError(f"{path} has {len(rows)} rows for {len(prompts)} prompts.")
    return [row["response"] for row in rows]


def load_verdicts(path: Path) -> list[dict]:
    """Verdicts from a file, or a folder, that `score` wrote. Raises ValueError for other files."""
    path = path / VERDICTS_NAME if path.is_dir() else path
    rows = artifacts.read_jsonl(path)
    if not rows or not all(isinstance(row, dict) and "prompt_strict" in row for row in rows):
        raise ValueError(f"{path} holds no verdicts; write them with the command `score`.")
    return rows
