"""Answers that survive a killed process: on disk as soon as they are finished, never asked twice.

One file for what the answers are made from. Its name carries a hash of that and its first line
spells it out, so that answers of another model, template or length limit never mix.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

FIELDS = ("response", "n_tokens", "stop")
SYNC_SECONDS = 1.0  # a killed process loses nothing; a power cut at most what this much brought


def collect(
    folder: Path,
    name: str,
    made_from: dict[str, Any],
    prompts: list[dict],
    generate_missing: Callable[[list[dict], Callable[[int, dict], None]], Any],
) -> list[dict]:
    """One {response, n_tokens, stop} a prompt, in their order; only missing ones are generated.

    `prompts` are {key, prompt}. `made_from` is all that decides the answers and JSON can hold.
    `generate_missing(prompts, on_answer)` calls `on_answer(position in prompts, answer)` for each;
    it is not called if nothing is missing, so it is the place to load a model. Raises ValueError.
    """
    made_from = made_from | {"prompts_sha256": _sha256([p["prompt"] for p in prompts])}
    path = folder / f"{name}-{_sha256(made_from)[:12]}.jsonl"
    found = _read(path, made_from, prompts)
    if len(found) < len(prompts):
        with _held(path, made_from) as file:
            found = _read(path, made_from, prompts)
            missing = [i for i in range(len(prompts)) if i not in found]
            print(f"{path.name}: {len(found)} answers are there, {len(missing)} to generate")
            if missing:
                keep = _keeper(file, found, prompts, missing)
                generate_missing([prompts[i] for i in missing], keep)
    if lacking := len(prompts) - len(found):
        raise ValueError(f"{path}: {lacking} prompts got no answer; run it again.")
    return [found[i] for i in range(len(prompts))]


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def _held(path: Path, made_from: dict) -> Iterator[BinaryIO]:
    """The file for appending, for one process at a time, a torn last line cut away.

    Raises ValueError. The lock ends with the process, however that ends.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b", buffering=0) as file:  # a line is one write: killed after or before it
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{path} is being written by another process; wait for it, or stop it first."
            ) from None
        file.seek(0)
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)
        if not whole:
            _append(file, {"made_from": made_from})
        try:
            yield file
        finally:
            os.fsync(file.fileno())


def _append(file: BinaryIO, row: dict) -> None:
    line = memoryview(json.dumps(row, ensure_ascii=False).encode() + b"\n")
    while line:  # a raw file may take less than it is given
        line = line[file.write(line) :]


def _keeper(
    file: BinaryIO, found: dict[int, dict], prompts: list[dict], missing: list[int]
) -> Callable[[int, dict], None]:
    """`on_answer`: put the answer to missing[position] on disk and into `found`."""
    synced = time.monotonic()

    def keep(position: int, answer: dict) -> None:
        nonlocal synced
        index = missing[position]
        if index in found:
            raise ValueError(f"Prompt {index} was answered twice; each may be asked only once.")
        _append(file, {"index": index, "key": prompts[index]["key"], **answer})
        found[index] = answer
        if time.monotonic() - synced > SYNC_SECONDS:
            os.fsync(file.fileno())
            synced = time.monotonic()

    return keep


def _read(path: Path, made_from: dict, prompts: list[dict]) -> dict[int, dict]:
    """Index to answer, of what is whole in the file. Raises ValueError naming file and line."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.is_file() else []
    found: dict[int, dict] = {}
    for number, line in enumerate(lines, 1):
        row = {}
        with contextlib.suppress(ValueError):
            row = json.loads(line)
        if number == 1 and row == {"made_from": json.loads(json.dumps(made_from))}:
            continue
        known = isinstance(row, dict) and row.keys() == {"index", "key", *FIELDS}
        if number == 1 or not known or row["index"] not in range(len(prompts)):
            fix = "file" if number == 1 else "line"
            raise ValueError(f"{path}, line {number} is damaged: delete the {fix} and run again.")
        if row["index"] in found:
            raise ValueError(f"{path}, line {number} is a second answer to a prompt: delete it.")
        found[row["index"]] = {field: row[field] for field in FIELDS}
    return found
