"""Results on disk: one folder per stage, its manifest written last, with the hash of every file.

A result is identified by what it was made from: `made_from` lists it, `digest` hashes it, and
`difference` names the first mismatch. Code and package versions are recorded, not compared.
"""

import codecs
import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from atlas_lib import devices, session, sources, stages
from atlas_lib.schema import Config

MANIFEST, MANIFEST_FORMAT = "manifest.json", 2
KAGGLE_INPUT = session.KAGGLE / "input"
# Arguments of SFTConfig that do not affect the result.
WITHOUT_EFFECT = {"train.report_to", "train.run_name", "train.output_dir", "train.disable_tqdm"}
WITHOUT_EFFECT |= {"train.dataloader_num_workers"}
JSON_OBJECT = TypeAdapter(dict[str, Any])


def write_json(path: Path, value: Any) -> None:
    """Write JSON to a temporary file and rename it."""
    write_lines(path, [json.dumps(value, indent=1, ensure_ascii=False)])


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Write one JSON object per line, streamed, to a temporary file and rename it."""
    write_lines(path, (json.dumps(row, ensure_ascii=False) for row in rows))


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write text lines to a temporary file and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def read_json(path: Path) -> Any:
    """The value in a JSON file."""
    return json.loads(path.read_bytes())


def read_jsonl(path: Path) -> list[dict]:
    """Objects of a file of JSON Lines. Raises ValueError that names file and line."""
    rows = []
    with path.open("rb") as file:  # bytes: only \n ends a line, whatever the text holds
        for number, line in enumerate(file, 1):
            try:
                if text := line.removeprefix(codecs.BOM_UTF8).strip():
                    rows.append(JSON_OBJECT.validate_json(text))
            except ValidationError as error:
                reason = error.errors()[0]["msg"].replace("line 1 column", "column")
                raise ValueError(
                    f"{path}, line {number}: not JSON Lines ({reason}); each line must hold one "
                    "object, in UTF-8 and not compressed."
                ) from None
    return rows


def made_from(stage: str, config: Config) -> dict[str, Any]:
    """What determines the result of a stage: config keys and the content of local sources."""
    begins = stages.decided_by(stage)
    begins += ("eval.prompts",) if config.data.exclude_overlap else ()
    values = {
        key: value
        for key, value in config.flat().items()
        if key.startswith(begins) and key not in WITHOUT_EFFECT
    }
    for name in filter(None, map(values.get, sources.NAMED)):
        values |= sources.content(name, config)
    return json.loads(json.dumps(values))


def digest(made_from: Any) -> str:
    """First 12 hex digits of the SHA-256 of a JSON value."""
    text = json.dumps(made_from, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def config_digest(config: Config, stage: str = stages.IFEVAL_EVAL) -> str:
    """The digest of what determines a stage's result; by default, the last stage's."""
    return digest(made_from(stage, config))


def difference(there: Mapping, here: Mapping) -> str | None:
    """The first key whose values differ, in words; None if the two are equal."""
    for key in sorted(there.keys() | here.keys(), key=lambda key: ("content of" in key, key)):
        if there.get(key) != here.get(key):
            return f"{key} is {there.get(key)!r} there and {here.get(key)!r} here"
    return None


@contextlib.contextmanager
def stage(
    name: str, config: Config, out: Path, inputs: Sequence[Path] = (), **work: float | None
) -> Iterator[Path]:
    """The empty folder of stage `name`; its manifest is written on leaving without an error.

    `inputs` are the folders of the stages it read. `work` are figures for its ledger, which also
    records memory and minutes: since this process began or the last input was made, if later.
    """
    import psutil

    made = [(path / MANIFEST).stat().st_mtime for path in inputs]
    begun = max([psutil.Process().create_time(), *made])
    folder = out / name
    if folder.is_dir():
        (folder / MANIFEST).unlink(missing_ok=True)  # first: from here on it is not finished
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    yield folder
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix != ".part")
    determined_by = made_from(name, config)
    manifest = {
        "format": MANIFEST_FORMAT,
        "stage": name,
        "made_from": determined_by,
        "digest": digest(determined_by),
        "inputs": {path.name: result_digest(path) for path in inputs},
        "outputs": {path.relative_to(folder).as_posix(): sources.sha256(path) for path in files},
        "parameters": config.parameters,
        "config": config.as_dict(),
        "ledger": {"minutes": (time.time() - begun) / 60, **devices.peak_memory(), **work},
        **session.provenance(),
    }
    write_json(folder / MANIFEST, manifest)


def read_ledgers(out: Path) -> dict[str, dict[str, float | None]]:
    """{stage: what it took} of the finished stages in `out`; {} for one without a ledger."""
    folders = [path.parent for path in sorted(out.glob(f"*/{MANIFEST}"))]
    return {folder.name: read_manifest(folder).get("ledger", {}) for folder in folders}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest in `folder`. Raises ValueError if it is damaged or of another version."""
    manifest = None
    with contextlib.suppress(ValueError):
        manifest = read_json(folder / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format") != MANIFEST_FORMAT:
        raise ValueError(
            f"{folder / MANIFEST} is damaged or was written by another version of Atlas; run "
            f"{folder.name} again, or choose another OUT."
        )
    return manifest


def result_digest(folder: Path) -> str:
    """The digest of what a stage wrote and of what it was made from."""
    manifest = read_manifest(folder)
    return digest({key: manifest[key] for key in ("made_from", "inputs", "outputs")})


def check(folder: Path, config: Config, inputs: Mapping[str, Path] | None = None) -> dict:
    """The manifest of a finished stage that fits `config`, its files intact. Raises ValueError.

    `inputs` maps a stage's name to the folder that should be recorded as its input.
    """
    manifest = read_manifest(folder)
    name = manifest["stage"]
    again = f"run {name} again"
    if differs := difference(manifest["made_from"], made_from(name, config)):
        fix = f"{again}, choose another OUT, or detach that input"
        raise ValueError(f"{folder} does not fit this run: {differs}; {fix}.")
    for file, recorded in manifest["outputs"].items():
        if not (folder / file).is_file() or sources.sha256(folder / file) != recorded:
            raise ValueError(f"{folder / file} is not the file that {name} wrote; {again}.")
    for other, path in (inputs or {}).items():
        if manifest["inputs"].get(other) != result_digest(path):
            raise ValueError(f"{folder} was made from another {other} than {path}; {again}.")
    return manifest


def find(name: str, out: Path) -> list[Path]:
    """Folders of finished stage `name`: in `out`, else all below /kaggle/input."""
    if (out / name / MANIFEST).is_file():
        return [out / name]
    return [path.parent for path in sorted(KAGGLE_INPUT.rglob(f"{name}/{MANIFEST}"))]


def require(name: str, config: Config, out: Path, build: Callable[[Config, Path], Path]) -> Path:
    """The folder of finished stage `name` that fits `config`; `build(config, out)` if absent."""
    refusal = None
    for folder in find(name, out):
        try:
            check(folder, config)
        except ValueError as error:
            refusal = refusal or error
        else:
            print(f"{name}: using {folder}")
            return folder
    if refusal:
        raise refusal
    print(f"{name} has not been run yet: building it.")
    return build(config, out)
