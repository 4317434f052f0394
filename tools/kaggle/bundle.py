"""Build a notebook into a folder that Kaggle accepts, with its library inside, and check it.

The record of a build stands in the metadata of its notebook, under "atlas": an id, the commit, the
configuration digest of every stage, and the SHA-256 of the rest of the notebook.
"""

import base64
import hashlib
import io
import json
import os
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat

from atlas_lib import artifacts, session
from atlas_lib.bootstrap import ROOT
from atlas_lib.config import load_config
from atlas_lib.stages import STAGES
from tools import leaks

PACKED = ("atlas_lib", "configs", "notebooks/*.ipynb", "pyproject.toml", "requirements.txt")
T4 = "NvidiaTeslaT4"  # two of them; Kaggle silently replaces a shape that it does not know
LARGEST_SOURCE = 1_000_000  # bytes of a notebook, about, that Kaggle accepts
NOTEBOOK, METADATA = "notebook.ipynb", "kernel-metadata.json"
CELL = '''\
# The library of this kernel, packed by tools.kernels: nothing is downloaded. Build {build}.
import base64
import hashlib
import io
import os
import sys
import tarfile
import tempfile

PACKED = """
{packed}
"""
packed = "".join(PACKED.split()).encode()
if hashlib.sha256(packed).hexdigest() != "{digest}":
    raise RuntimeError("The payload of this notebook is damaged; build and push it again.")
library = tempfile.mkdtemp(prefix="atlas-")  # outside the output, which Kaggle would keep
with tarfile.open(fileobj=io.BytesIO(base64.b85decode(packed))) as archive:
    archive.extractall(library, filter="data")
sys.path.insert(0, library)
paths = [library, *filter(None, [os.environ.get("PYTHONPATH")])]
os.environ["PYTHONPATH"] = os.pathsep.join(paths)  # for processes that this notebook starts
os.environ["ATLAS_COMMIT"] = "{commit}"'''


def build_kernel(stage: str, choice: dict[str, Any], folder: Path, allow_dirty: bool) -> None:
    """Write notebook and metadata of a stage into `folder`. Raises ValueError.

    `choice` has the parameters config, overlay and set of the notebook.
    """
    config = load_config(choice["config"], choice["overlay"], choice["set"])
    commit = session.commit()
    if commit.startswith("unknown"):
        raise ValueError(f"{ROOT} is not a git checkout with a commit: {commit}; use a clone.")
    if commit.endswith("-dirty") and not allow_dirty:
        raise ValueError(
            "There are uncommitted changes; commit them or add --allow-dirty "
            "(make: ARGS=--allow-dirty)."
        )
    notebook = kernel_notebook(stage, choice, commit)
    build = notebook.metadata["atlas"]
    build |= {"digests": {name: artifacts.config_digest(config, name) for name in STAGES}}
    build |= {"sha256": _content_digest(notebook)}
    for fault in build_faults(notebook):
        raise ValueError(f"{stage} {fault}.")
    artifacts.write_json(folder / NOTEBOOK, notebook)
    artifacts.write_json(folder / METADATA, kernel_metadata(stage))


def kernel_metadata(stage: str, alone: bool = False) -> dict[str, Any]:
    """kernel-metadata.json of a stage: the checkout's file with the stage's values on top.

    `alone` attaches no results of other kernels.
    """
    shared = artifacts.read_json(ROOT / METADATA)
    owner = os.environ.get("KAGGLE_USERNAME") or shared["id"].partition("/")[0]
    needs = () if alone else STAGES[stage].needs
    return shared | {
        "id": kernel_id(owner, stage),
        "title": f"Atlas {stage.replace('_', ' ')}",  # Kaggle makes the name in the id of it
        "code_file": NOTEBOOK,
        "enable_gpu": STAGES[stage].gpu,
        "machine_shape": T4 if STAGES[stage].gpu else None,
        "kernel_sources": [kernel_id(owner, need) for need in needs],
    }


def kernel_id(owner: str, stage: str) -> str:
    """owner/name of the kernel of a stage."""
    return f"{owner}/atlas-{stage.replace('_', '-')}"


def kernel_notebook(stage: str, choice: dict[str, Any], commit: str) -> nbformat.NotebookNode:
    """The notebook in the checkout without outputs, with its parameters and the library in it."""
    from papermill.translators import translate_parameters

    notebook = nbformat.read(ROOT / "notebooks" / f"{stage}.ipynb", as_version=4)
    for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
        cell.outputs, cell.execution_count = [], None
    places = {
        tag: place
        for place, cell in enumerate(notebook.cells)
        for tag in cell.metadata.get("tags", [])
    }
    parameters = {key.upper(): value for key, value in choice.items()} | {"OUT": ""}
    text = translate_parameters("python3", "python", parameters, "Set by tools.kernels")
    # In the cell itself, since papermill injects its own parameters behind this cell.
    notebook.cells[places["parameters"]].source = text
    packed = base64.b85encode(pack()).decode()
    build = hashlib.sha256(f"{stage} {commit} {text} {packed}".encode()).hexdigest()[:16]
    lines = "\n".join(packed[n : n + 100] for n in range(0, len(packed), 100))
    digest = hashlib.sha256(packed.encode()).hexdigest()
    source = CELL.format(packed=lines, digest=digest, commit=commit, build=build)
    payload = nbformat.v4.new_code_cell(source, id="payload")
    payload.metadata |= {"tags": ["payload"], "jupyter": {"source_hidden": True}}
    notebook.cells.insert(places["bootstrap"], payload)
    notebook.metadata["atlas"] = {"id": build, "commit": commit}
    return notebook


def pack() -> bytes:
    """A tar.xz of what a kernel needs of this tree; the same tree gives the same bytes."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others"]
    command += ["--exclude-standard", "--", *PACKED]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz", preset=9) as archive:
        for path in sorted(set(listed.split("\0")) - {""}):
            content = (ROOT / path).read_bytes()
            leaks.refuse(path, content.decode(errors="replace"))
            entry = tarfile.TarInfo(path)  # time, owner and mode stay at their defaults
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def pushable(folder: Path, allow_dirty: bool) -> dict[str, Any]:
    """The record of a build that may be pushed from this checkout. Raises ValueError."""
    here = session.commit()
    try:
        notebook = artifacts.read_json(folder / NOTEBOOK)
        build = notebook["metadata"]["atlas"]
    except (OSError, ValueError, KeyError):
        faults = ["is not a finished build"]
    else:
        faults = [*build_faults(notebook)]
        if build["commit"].removesuffix("-dirty") != here.removesuffix("-dirty"):
            faults = [f"was built from commit {build['commit']} and this is {here}"]
        if build["commit"].endswith("-dirty") and not allow_dirty:
            faults = ["was built with uncommitted changes; commit them, or add --allow-dirty"]
    for fault in faults:
        raise ValueError(f"{folder} {fault}; run `python -m tools.kernels build {folder.name}`.")
    return build


def build_faults(notebook: dict[str, Any]) -> Iterator[str]:
    """Why a built notebook cannot be pushed."""
    if notebook["metadata"]["atlas"]["sha256"] != _content_digest(notebook):
        yield "was changed or damaged after the build"
    text = json.dumps(notebook)
    if len(text) > LARGEST_SOURCE:
        yield f"has {len(text):,} bytes, and Kaggle accepts {LARGEST_SOURCE:,}"
    if found := leaks.finding(text):
        yield f"holds {found}; keep secrets in the environment"


def _content_digest(notebook: dict[str, Any]) -> str:
    """SHA-256 of a notebook without the record of its build."""
    metadata = {key: value for key, value in notebook["metadata"].items() if key != "atlas"}
    text = json.dumps(notebook | {"metadata": metadata}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
