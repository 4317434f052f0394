"""Resumable store of responses: a response is on disk once finished and never generated twice.

There is one file for each origin of responses. The file name carries a hash of the origin and the
first line spells it out, so that responses of another model, template or length cap never mix.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from atlas_lib import artifacts, session


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
    Raises BusyError if another process writes the file.
    """
    asked = json.dumps([prompt["prompt"] for prompt in prompts])
    made_from = made_from | {"prompts_sha256": hashlib.sha256(asked.encode()).hexdigest()}
    path = folder / f"{name}-{artifacts.digest(made_from)}.jsonl"
    if len(read_responses(path)) < len(prompts):
        folder.mkdir(parents=True, exist_ok=True)
        with session.hold(path.with_suffix(".lock"), str(path)):
            _generate(path, made_from, prompts, generate_missing)
    found = read_responses(path)
    return [found[i] for i in range(len(prompts))]


def _generate(path: Path, made_from: dict, prompts: list[dict], generate_missing: Callable) -> None:
    """Append the missing responses to the file, each as soon as it is finished."""
    found = read_responses(path)
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
        generate_missing([prompts[i] for i in missing], on_response)


def read_responses(path: Path) -> dict[int, dict]:
    """{index: response} of the whole lines of the file, below the one with the origin."""
    lines = path.read_bytes().split(b"\n")[1:-1] if path.is_file() else []
    rows = map(json.loads, lines)
    return {row["index"]: {k: row[k] for k in ("response", "n_tokens", "stop")} for row in rows}
