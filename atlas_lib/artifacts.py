"""Hand-over between stages: a folder a stage, its manifest written last, every file hashed."""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from atlas_lib import session, sources
from atlas_lib.standin import tiny_model

MANIFEST = "manifest.json"
KEYS = {"stage", "relevant", "inputs", "outputs"}  # what a later stage reads of it
KAGGLE_INPUT = session.KAGGLE / "input"


def write_json(path: Path, value: Any) -> None:
    """Write JSON to a temporary file and rename it."""
    write_lines(path, [json.dumps(value, indent=1, ensure_ascii=False)])


def write_jsonl(path: Path, rows: Any) -> None:
    """Write one JSON object a line, streamed, to a temporary file and rename it."""
    write_lines(path, (json.dumps(row, ensure_ascii=False) for row in rows))


def write_lines(path: Path, lines: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def read_jsonl(path: Path) -> list[dict]:
    """Rows of a .jsonl file. Raises ValueError that names file and line."""
    rows = []
    with path.open("rb") as file:  # bytes: only \n ends a line, whatever the text holds
        for number, line in enumerate(file, 1):
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error}).") from None
    return rows


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def stage(name: str, config: Any, out: Path, inputs: Sequence[Path] = ()) -> Iterator[Path]:
    """The folder of stage `name`; its manifest is written last, if nothing went wrong in between.

    `inputs` are the folders of the stages it read; their manifests are recorded by hash. What an
    earlier run left in the folder goes first, so that it cannot pass for an output of this one.
    """
    folder = out / name
    if folder.is_dir():
        (folder / MANIFEST).unlink(missing_ok=True)  # first: from here on it is not finished
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    yield folder
    write_json(
        folder / MANIFEST,
        {
            "stage": name,
            "config_digest": config.digest(name),
            "relevant": relevant(name, config),
            "inputs": {path.name: fingerprint(path) for path in inputs},
            "outputs": {
                path.relative_to(folder).as_posix(): sha256(path)
                for path in sorted(folder.rglob("*"))
                if path.is_file() and not path.name.endswith(".part")
            },
            **session.provenance(),
        },
    )


def relevant(name: str, config: Any) -> dict[str, Any]:
    """What decides the result of stage `name`: config keys, and what local names stand for."""
    keys = config.relevant(name)
    names = [value for value in keys.values() if isinstance(value, str)]
    paths = {n: Path(sources.locate(n)) for n in names if n.endswith(".jsonl")}
    if config.model.adapter and "model.adapter" in keys:
        weights = Path(sources.locate(config.model.adapter)) / "adapter_model.safetensors"
        paths[config.model.adapter] = weights  # trained anew in the same place, it is another one
    files = {f"content of {n}": sha256(path) for n, path in paths.items() if path.is_file()}
    if any(value.startswith(tiny_model.PREFIX) for value in names):
        files["offline stand-in"] = tiny_model.digest(config)
    return keys | files


def read_manifest(folder: Path) -> dict:
    """The manifest in `folder`. Raises ValueError if it is damaged."""
    path = folder / MANIFEST
    with contextlib.suppress(ValueError):
        manifest = json.loads(path.read_bytes())
        if isinstance(manifest, dict) and manifest.keys() >= KEYS:
            return manifest
    raise ValueError(f"{path} is damaged; run {folder.name} again.")


def fingerprint(folder: Path) -> str:
    """One hash of what a stage made and from what: the same wherever and whenever it ran."""
    manifest = read_manifest(folder)
    made = {key: manifest[key] for key in ("relevant", "inputs", "outputs")}
    return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()


def check(folder: Path, config: Any, upstream: dict[str, Path] | None = None) -> dict:
    """The manifest of a finished stage that fits `config`, its files intact. Raises ValueError.

    `upstream` maps a stage's name to the folder that should be recorded as its input.
    """
    manifest = read_manifest(folder)
    name, there = manifest["stage"], manifest["relevant"]
    here = json.loads(json.dumps(relevant(name, config)))
    for key in sorted(there.keys() | here.keys()):
        if there.get(key) != here.get(key):
            raise ValueError(
                f"{folder} does not fit this run: {key} is {there.get(key)!r} there and "
                f"{here.get(key)!r} here; run {name} again, choose another "
                "OUT, or detach that input."
            )
    for file, digest in manifest["outputs"].items():
        if not (folder / file).is_file() or sha256(folder / file) != digest:
            raise ValueError(f"{folder / file} is not the file {name} wrote; run {name} again.")
    check_inputs(folder, upstream or {})
    return manifest


def check_inputs(folder: Path, upstream: dict[str, Path]) -> None:
    """The stage in `folder` was made from the folders in `upstream`. Raises ValueError."""
    manifest = read_manifest(folder)
    for name, path in upstream.items():
        if manifest["inputs"].get(name) != fingerprint(path):
            raise ValueError(
                f"{folder} was made from another {name} than {path}; run {manifest['stage']} again."
            )


def find(name: str, out: Path) -> list[Path]:
    """Folders of finished stage `name`: in `out`, else all below /kaggle/input."""
    if (out / name / MANIFEST).is_file():
        return [out / name]
    return [path.parent for path in sorted(KAGGLE_INPUT.rglob(f"{name}/{MANIFEST}"))]


def require(name: str, config: Any, out: Path, build: Callable[[Any, Path], Path]) -> Path:
    """The folder of finished stage `name` that fits `config`; `build(config, out)` if absent."""
    candidates, refusal = find(name, out), None
    for folder in candidates:
        try:
            check(folder, config)
        except ValueError as error:
            refusal = refusal or error
        else:
            print(f"{name}: using {folder}")
            return folder
    if refusal:
        raise refusal
    print(f"{name} is not there yet: building it.")
    return build(config, out)
