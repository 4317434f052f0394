"""Files of prompts, responses and verdicts, checked before anything is computed."""

import difflib
import functools
import inspect
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, StringConstraints, create_model

from atlas_lib import artifacts, data
from atlas_lib.config import validate
from atlas_lib.evaluate import checkers
from atlas_lib.schema import Section

VERDICTS_NAME = "verdicts.jsonl"
VERDICT_FIELDS = {"key", "instruction_id_list", "strict", "prompt_strict"}


def _literal(text: str) -> str:
    """The text, if it matches only itself as a regular expression."""
    if re.search(r"[.^$*+?{}()\[\]|\\]", text):
        raise ValueError("the checker reads it as a regular expression; give it without .^$*+?|()")
    return text


Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Word = Annotated[Text, AfterValidator(_literal)]
# Types of the checkers' arguments, which their signatures lack; all others are counts.
Count = Annotated[int, Field(strict=True, gt=0)]
KINDS: dict[str, Any] = {
    **dict.fromkeys(("keywords", "forbidden_words"), Annotated[list[Word], Field(min_length=1)]),
    **dict.fromkeys(("keyword", "section_spliter"), Word),
    **dict.fromkeys(("end_phrase", "first_word", "language", "prompt_to_repeat"), Text),
    **dict.fromkeys(
        ("relation", "let_relation", "capital_relation"), Literal["less than", "at least"]
    ),
    "postscript_marker": Literal["P.S.", "P.P.S"] | Word,
    "letter": Annotated[str, Field(min_length=1, max_length=1)],
}


def load_prompts(name: str, revision: str | None = None, limit: int | None = None) -> list[dict]:
    """First `limit` rows of a .jsonl file, local folder or hub dataset, in IFEval's schema.

    Raises ValueError that names the first row that cannot be scored, before anything is generated.
    """
    rows = data.load_rows(name, revision, "train")
    return _checked_prompts(name, itertools.islice(rows, limit))


def _checked_prompts(source: Any, rows: Iterable[dict]) -> list[dict]:
    known = checkers.lm_eval_checkers().instructions_registry.INSTRUCTION_DICT
    prompts = []
    for number, row in enumerate(rows, start=1):
        try:
            prompts.append(_scorable(row, known))
        except Exception as error:  # a checker raises what it happens to meet
            key = f", key {row['key']!r}" if isinstance(row, dict) and "key" in row else ""
            problem = str(error) if type(error) is ValueError else f"the checkers raise {error!r}."
            raise ValueError(f"{source}, row {number}{key}: {problem}") from None
    _check_keys(source, prompts, "prompts")
    return prompts


def _scorable(row: dict, known: dict[str, type]) -> dict:
    """The prompt without kwargs that are None, with which the hub pads them. Raises."""
    for problem in _prompt_problems(row, known):
        raise ValueError(f"{problem}.")
    prompt = {name: row[name] for name in checkers.PROMPT_FIELDS}
    prompt["kwargs"] = [_given(kwargs) for kwargs in row["kwargs"]]
    checkers.followed(prompt, ".")
    return prompt


def _given(kwargs: dict | None) -> dict:
    return {name: value for name, value in (kwargs or {}).items() if value is not None}


def _prompt_problems(row: Any, known: dict[str, type]) -> Iterator[str]:
    """What is wrong with a row; a check may rely on those before it."""
    if not isinstance(row, dict) or not row.keys() >= set(checkers.PROMPT_FIELDS):
        yield f"it needs {', '.join(checkers.PROMPT_FIELDS)}"
    ids, text = row["instruction_id_list"], row["prompt"]
    if not (text and isinstance(text, str) and ids and len(ids) == len(row["kwargs"])):
        yield "it needs a text, and instructions with as many kwargs"
    for instruction, kwargs in zip(ids, map(_given, row["kwargs"]), strict=True):
        if instruction not in known:
            nearest = difflib.get_close_matches(str(instruction), known, cutoff=0.0)
            yield f"unknown instruction {instruction!r}; nearest: {', '.join(nearest)}"
        names = inspect.signature(known[instruction].build_description).parameters.keys() - {"self"}
        # A checker draws at random what it is not given, and takes 0 and "" for not given.
        if names != kwargs.keys():
            yield f"{instruction} needs {sorted(names)}, not {sorted(kwargs)}"
        validate(_arguments(frozenset(names)), kwargs)
        if kwargs.get("nth_paragraph", 0) > kwargs.get("num_paragraphs", 0):
            yield "nth_paragraph is more than num_paragraphs"


@functools.cache
def _arguments(names: frozenset[str]) -> type[Section]:
    """The schema of a checker's arguments."""
    kinds = {name: (KINDS.get(name, Count), ...) for name in names}
    return create_model("Arguments", __base__=Section, **kinds)


def _check_keys(source: Any, rows: list[dict], what: str) -> None:
    """Refuse a source without rows, or with two keys that are the same text."""
    times = Counter(str(row["key"]) for row in rows)
    repeated = [key for key in times if times[key] > 1]
    if repeated or not rows:
        problem = f"repeats the keys {repeated}" if rows else f"holds no {what}"
        raise ValueError(f"{source} {problem}.")


def load_responses(path: Path, prompts: list[dict]) -> list[str]:
    """Responses of a file with one {prompt, response} a line, in the prompts' order.

    Raises ValueError that names the first row that does not belong to the prompt at its place.
    """
    rows = artifacts.read_jsonl(path)
    for number, (row, prompt) in enumerate(zip(rows, prompts, strict=False), start=1):
        if row.get("prompt") != prompt["prompt"] or not isinstance(row.get("response"), str):
            raise ValueError(
                f"{path}, row {number} has to hold the text of the prompt with key "
                f"{prompt['key']!r} as 'prompt' and a text as 'response'."
            )
    if len(rows) != len(prompts):
        raise ValueError(f"{path} has {len(rows)} rows for {len(prompts)} prompts.")
    return [row["response"] for row in rows]


def load_verdicts(path: Path) -> list[dict]:
    """Verdicts from a file, or a folder, that `score` wrote, or from a log of lm-eval's samples.

    The responses of a log of the task ifeval (--log_samples) are scored again. Raises ValueError.
    """
    path = path / VERDICTS_NAME if path.is_dir() else path
    rows = artifacts.read_jsonl(path)
    if rows and "doc" in rows[0]:
        prompts = _checked_prompts(path, (row.get("doc") for row in rows))
        return checkers.score(prompts, [row["filtered_resps"][0] for row in rows])
    if not all(row.keys() >= VERDICT_FIELDS for row in rows):
        rows = []
    _check_keys(path, rows, "verdicts; write them with the command `score`")
    return rows
