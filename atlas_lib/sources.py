"""Resolve a configured name to a local path or a hub id; all look-ups go through here.

`embedded:` names stand for the tiny model and its data, which `fetch` builds on first use.
"""

import contextlib
import functools
import hashlib
import re
from pathlib import Path
from typing import Any, Literal

from atlas_lib.bootstrap import ROOT
from atlas_lib.schema import Config

EMBEDDED = "embedded:"
REMEDIES = {  # class of an exception that ended a load -> what to do; httpx has the first
    "TransportError": "the hub stopped answering: run it again, complete files are kept",
    "OutOfMemoryError": "end the process that uses the GPU's memory (`nvidia-smi` lists them)",
}
NAMED = ("data.dataset", "model.base", "model.tokenizer", "model.instruct", "model.adapter")
NAMED += ("eval.prompts", "model.chat_template")  # the keys whose values name a source
# A name that ends with one is a file, never a hub id.
FILE_TYPES = {".jsonl", ".json", ".csv", ".gz", ".parquet"}


def locate(name: str) -> Path | None:
    """The local file or folder that `name` stands for, in the checkout or in the working folder."""
    found = (path.resolve() for path in (ROOT / name, Path(name)) if path.exists())
    return next(found, None)


def fetch(
    name: str,
    revision: str | None,
    config: Config,
    kind: Literal["model", "tokenizer", "dataset"] = "model",
) -> tuple[str, str | None]:
    """(local path, None), or (hub id, revision) after asking the hub whether it has it.

    Builds what an `embedded:` name stands for if it is absent; the weights of `embedded:base` take
    about half a minute of pretraining, its tokenizer alone does not. Raises ValueError,
    FileNotFoundError or ConnectionError.
    """
    if name.startswith(EMBEDDED):
        from atlas_lib.standin import tiny_model

        part = "tokenizer" if kind == "tokenizer" else name.removeprefix(EMBEDDED)
        return str(tiny_model.build(part, config)), None
    if path := locate(name):
        return str(path), None
    if Path(name).suffix.lower() in FILE_TYPES:
        raise FileNotFoundError(f"{name} does not exist; give an existing file or a hub id.")
    check_hub(name, revision, "dataset" if kind == "dataset" else "model")
    return name, revision


def remedy(error: BaseException | None, otherwise: str) -> str:
    """What to do about a load that failed: for the hub or the GPU, else `otherwise`."""
    kinds = []
    while error:
        kinds += [kind.__name__ for kind in type(error).__mro__]
        error = error.__cause__ or error.__context__
    return next((REMEDIES[kind] for kind in kinds if kind in REMEDIES), otherwise)


def content(name: str, config: Config) -> dict[str, Any]:
    """What determines the content of a local source, by key; {} for a hub id."""
    if name.startswith(EMBEDDED):
        from atlas_lib.standin import tiny_model

        return tiny_model.made_from(name.removeprefix(EMBEDDED), config)
    path = locate(name)
    return {f"content of {name}": content_digest(path)} if path else {}


def content_digest(path: Path) -> str:
    """12 hex digits of a file's bytes, or of the names and bytes of all files below a folder.

    Hidden files are left out, since no library loads them, and so is the card of a model.
    """
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    is_model = any(file.name in ("config.json", "adapter_config.json") for file in files)
    found = hashlib.sha256()
    for file in files:
        name = file.relative_to(path).as_posix()
        if not re.search(r"(^|/)\.[^/]", name) and not (is_model and file.suffix == ".md"):
            found.update(f"{name} {sha256(file)}\n".encode())
    return found.hexdigest()[:12]


def sha256(path: Path) -> str:
    """The file's SHA-256, computed once per process for an unchanged file: about 1 s per GB."""
    status = path.stat()  # tools that copy can keep size and mtime, but cannot set ctime
    return _sha256(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


@functools.cache
def _sha256(path: Path, *_: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@functools.cache  # a repository that was there once is cached: a later outage must not lose a run
def check_hub(repo: str, revision: str | None, kind: str = "model") -> None:
    """Ask the hub for `repo` before anything long starts, unless that revision is on disk already.

    Raises ConnectionError or ValueError.
    """
    from huggingface_hub import HfApi, constants, errors, snapshot_download

    if constants.HF_HUB_OFFLINE:  # everything is said to be cached; the loader reports what is not
        return
    try:
        if revision:
            options = {"local_files_only": True, "allow_patterns": []}  # [], since a part will do
            with contextlib.suppress(errors.LocalEntryNotFoundError):
                snapshot_download(repo, revision=revision, repo_type=kind, **options)
                return
        HfApi().repo_info(repo, revision=revision, repo_type=kind, timeout=5)
    except errors.HFValidationError:
        raise ValueError(f"{repo} is neither a hub id nor an existing file or folder.") from None
    except Exception as error:
        response = getattr(error, "response", None)
        status = 503 if response is None else response.status_code
        if status == 429 or status >= 500:
            raise ConnectionError(
                f"The Hugging Face hub, which has {kind} {repo}, cannot be reached "
                f"({type(error).__name__}, {status}); try again later, set HF_HUB_OFFLINE=1 if it "
                "is cached, or run without a hub: OVERLAY=offline (`make run`)."
            ) from None
        raise ValueError(
            f"The hub does not give {kind} {repo} at {revision or 'main'} "
            f"({type(error).__name__}); check the name, the revision and, for a private or gated "
            "repository, HF_TOKEN."
        ) from None
