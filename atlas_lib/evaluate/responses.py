"""Resumable store of responses: a response is on disk once finished and never generated twice.

There is one file for each origin of responses. The file name carries a hash of the origin and the
first line spells it out, so that responses of another model, template or length cap never mix.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import filelock

RESPONSE_KEYS = ("response", "n_tokens", "stop")


def collect_responses(
    folder: Path,
    name: str,
    made_from: dict[str, Any],
    prompts: list[dict],
    generate_missing: Callable[[list[dict], Callable[[int, dict], None]], Any],
) -> list[dict]:
    """One {response, n_tokens, stop} per prompt, in order; only missing ones are generated.

    `prompts` are {key, prompt}. `made_from` holds what determines the responses, as JSON values.
    `generate_missing(prompts, on_response)` calls `on_response(position in prompts, response)` for
    each of them. It is not called if nothing is missing, so it is the place to load a model.
    Raises ValueError for a damaged file, for one that another process writes, or if some prompt
    gets no response or two.
    """
    made_from = made_from | {"prompts_sha256": _sha256([p["prompt"] for p in prompts])}
    path = folder / f"{name}-{_sha256(made_from)[:12]}.jsonl"
    found = _read_responses(path, made_from, prompts)
    if len(found) < len(prompts):
        with _locked(path):
            _generate(path, made_from, prompts, generate_missing)
        found = _read_responses(path, made_from, prompts)
    if lacking := len(prompts) - len(found):
        raise ValueError(f"{path}: {lacking} prompts have no response; run it again.")
    return [found[i] for i in range(len(prompts))]


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """A lock that ends with the process, however that ends. Raises ValueError if it is taken."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.FileLock(path.with_suffix(".lock"), blocking=False):
            yield
    except filelock.Timeout:
        raise ValueError(
            f"{path} is being written by another process; wait for it to end, or stop it."
        ) from None


def _generate(path: Path, made_from: dict, prompts: list[dict], generate_missing: Callable) -> None:
    """Append the missing responses to the file, each as soon as it is finished."""
    found = _read_responses(path, made_from, prompts)
    missing = [i for i in range(len(prompts)) if i not in found]
    print(f"{path.name}: {len(found)} responses are stored, {len(missing)} to generate")
    with path.open("ab") as file:

        def append(row: dict) -> None:
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

        def on_response(position: int, response: dict) -> None:
            index = missing[position]
            append({"index": index, "key": prompts[index]["key"], **response})

        whole_lines = path.read_bytes().rfind(b"\n") + 1
        file.truncate(whole_lines)  # a killed process may have left half a line
        if not whole_lines:
            append({"made_from": made_from})
        if missing:
            generate_missing([prompts[i] for i in missing], on_response)


def _read_responses(path: Path, made_from: dict, prompts: list[dict]) -> dict[int, dict]:
    """{index: response} of the file's whole lines. Raises ValueError naming file and line."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    found: dict[int, dict] = {}
    for number, line in enumerate(lines, 1):
        row = None
        with contextlib.suppress(ValueError):
            row = json.loads(line)
        if number == 1 and row == {"made_from": json.loads(json.dumps(made_from))}:
            continue
        known = isinstance(row, dict) and row.keys() == {"index", "key", *RESPONSE_KEYS}
        wanted = known and row["index"] in range(len(prompts)) and row["index"] not in found
        if number == 1 or not wanted:
            part = "file" if number == 1 else "line"
            raise ValueError(
                f"{path}, line {number} is damaged or repeats a response: delete the {part} and "
                "run again."
            )
        found[row["index"]] = {key: row[key] for key in RESPONSE_KEYS}
    return found
