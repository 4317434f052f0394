"""One notebook -> one folder that Kaggle takes: the page with its library inside, and guards."""

import base64
import hashlib
import io
import json
import lzma
import os
import re
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat

from atlas_lib import artifacts
from atlas_lib.bootstrap import ROOT
from atlas_lib.config import load_config
from tools import leaks

PACKED = ("atlas_lib", "configs", "notebooks/*.ipynb", "pyproject.toml")
LIMIT = 1_000_000  # bytes of source that Kaggle takes, about
NOTEBOOK, METADATA, BUILD, PUSHED = (
    "notebook.ipynb",
    "kernel-metadata.json",
    "build.json",
    "pushed.json",
)
STAMP = re.compile(r'^(REPOSITORY, REF = "[^"]+", )"main"$', re.MULTILINE)
CELL = '''\
# The library of this very commit, packed into the page by tools/kernels.py: nothing is fetched.
import base64
import hashlib
import io
import os
import sys
import tarfile
import tempfile

PACKED = """
{text}
"""
packed = "".join(PACKED.split()).encode()
if hashlib.sha256(packed).hexdigest() != "{digest}":
    raise RuntimeError("The payload of this notebook is damaged; build and push it again.")
library = tempfile.mkdtemp(prefix="atlas-")  # not below the output, which Kaggle would keep
with tarfile.open(fileobj=io.BytesIO(base64.b85decode(packed))) as archive:
    archive.extractall(library, filter="data")
sys.path.insert(0, library)
paths = [library, *filter(None, [os.environ.get("PYTHONPATH")])]
os.environ["PYTHONPATH"] = os.pathsep.join(paths)  # for processes that this page starts
os.environ["ATLAS_COMMIT"] = "{commit}"'''
UNPACKED = re.compile(r'PACKED = """\n(.+?)\n"""', re.DOTALL)


@dataclass(frozen=True)
class Stage:
    """One kernel: `needs` are the stages whose results it reads."""

    title: str
    needs: tuple[str, ...]
    accelerator: str | None  # Kaggle's machine_shape; a wrong one is silently replaced there
    hours: float  # of GPU quota that have to be left before it is pushed
    reason: str


def head() -> tuple[str, bool]:
    """The commit's 40 digits and whether the tree differs from it. Raises ValueError."""
    try:
        return _git("rev-parse", "HEAD").strip(), bool(_git("status", "--porcelain"))
    except (OSError, subprocess.CalledProcessError):
        raise ValueError(
            f"{ROOT} is not a git checkout with a commit; build from a clone."
        ) from None


def _git(*args: str) -> str:
    command = ["git", "-C", str(ROOT), *args]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def slug(title: str) -> str:
    """Kaggle's own: another slug than this would be changed there."""
    from slugify import slugify

    return slugify(title)


def short(commit: str, dirty: bool) -> str:
    """The commit as manifests have it."""
    return commit[:12] + ("-dirty" if dirty else "")


def build(stages: dict[str, Stage], name: str, choice: dict[str, Any], out: Path) -> Path:
    """Write out/<name>/; `choice` has config, overlay and set. Raises ValueError.

    The folder is made beside and renamed; what was pushed before stays known.
    """
    config = load_config(choice["config"], choice["overlay"], choice["set"])
    commit, dirty = head()
    packed = pack()
    page = baked(name, choice, commit, payload_cell(packed, short(commit, dirty)))
    metadata = metadata_of(stages, name)
    part, target = out / f"{name}.part", out / name
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    nbformat.write(page, part / NOTEBOOK)
    artifacts.write_json(part / METADATA, metadata)
    needs = dict(zip(stages[name].needs, metadata["kernel_sources"], strict=True))
    digests = {stage: config.digest(stage) for stage in stages}
    origin = {"stage": name, "commit": commit, "dirty": dirty, **choice}
    hashes = {
        "payload_sha256": hashlib.sha256(packed).hexdigest(),
        "notebook_sha256": artifacts.sha256(part / NOTEBOOK),
    }
    artifacts.write_json(part / BUILD, origin | {"needs": needs, "digests": digests} | hashes)
    try:
        guard(part)
    except ValueError:
        shutil.rmtree(part)
        raise
    if (target / PUSHED).is_file():
        shutil.copy2(target / PUSHED, part)
    shutil.rmtree(target, ignore_errors=True)
    return part.rename(target)


def metadata_of(stages: dict[str, Stage], name: str) -> dict[str, Any]:
    """kernel-metadata.json of one stage; what all share stands in the one at the top."""
    shared = json.loads((ROOT / METADATA).read_bytes())
    owner = os.environ.get("KAGGLE_USERNAME") or shared["id"].partition("/")[0]
    stage = stages[name]
    return shared | {
        "id": f"{owner}/{slug(stage.title)}",
        "title": stage.title,
        "code_file": NOTEBOOK,
        "enable_gpu": stage.accelerator is not None,
        "machine_shape": stage.accelerator,
        "kernel_sources": [f"{owner}/{slug(stages[need].title)}" for need in stage.needs],
    }


def baked(name: str, choice: dict[str, Any], commit: str, payload: str) -> Any:
    """The committed page with parameters, payload and commit, without outputs."""
    from papermill.translators import translate_parameters

    page = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    for cell in (cell for cell in page.cells if cell.cell_type == "code"):
        cell.outputs, cell.execution_count = [], None
    kernel = page.metadata.get("kernelspec", {}).get("name", "")
    parameters = {key.upper(): value for key, value in choice.items()} | {"OUT": ""}
    # In the cell itself: one injected behind it would go where papermill injects another.
    page.cells[_place(page, "parameters")].source = translate_parameters(
        kernel, "python", parameters, "Baked in by tools/kernels.py"
    )
    place = _place(page, "bootstrap")
    bootstrap = page.cells[place]
    bootstrap.source, found = STAMP.subn(rf'\g<1>"{commit}"', bootstrap.source)
    if found != 1:
        raise ValueError(
            f'{name} has no line `REPOSITORY, REF = ..., "main"` to stamp the commit into; '
            "restore it in the bootstrap cell."
        )
    # Its id is fixed, since a random one would differ at every build.
    cell = nbformat.v4.new_code_cell(payload, id="payload")
    cell.metadata |= {"tags": ["payload"], "jupyter": {"source_hidden": True}}
    page.cells.insert(place, cell)
    return page


def _place(page: Any, tag: str) -> int:
    for place, cell in enumerate(page.cells):
        if tag in cell.metadata.get("tags", []):
            return place
    raise ValueError(f"A notebook has no cell with the tag {tag!r}; run `make notebooks`.")


def pack() -> bytes:
    """A tar.xz of what a kernel needs of this tree; the same tree gives the same bytes."""
    listed = _git("ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *PACKED)
    paths = [path for path in sorted(set(listed.split("\0"))) if path]
    buffer = io.BytesIO()
    with (
        lzma.open(buffer, "wb", preset=9 | lzma.PRESET_EXTREME) as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for path in paths:
            content = (ROOT / path).read_bytes()
            entry = tarfile.TarInfo(path)  # time, owner and mode as they are by default
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def payload_cell(packed: bytes, commit: str) -> str:
    """The cell that unpacks `packed` and makes it importable."""
    text = base64.b85encode(packed).decode()
    digest = hashlib.sha256(text.encode()).hexdigest()
    lines = "\n".join(text[n : n + 100] for n in range(0, len(text), 100))
    return CELL.format(text=lines, digest=digest, commit=commit)


def unpack(source: str) -> tuple[bytes, dict[str, bytes]]:
    """The payload in a cell's source: packed, and as path -> content. Raises ValueError."""
    try:
        packed = base64.b85decode("".join(UNPACKED.search(source)[1].split()))
        with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
            return packed, {e.name: archive.extractfile(e).read() for e in archive}
    except (TypeError, ValueError, tarfile.TarError, lzma.LZMAError, EOFError):
        raise ValueError("The payload of the notebook is damaged; build it again.") from None


def guard(folder: Path) -> dict[str, Any]:
    """build.json of a folder that may be sent. Raises ValueError with what to mend."""
    try:
        record, metadata, page = (
            json.loads((folder / file).read_bytes()) for file in (BUILD, METADATA, NOTEBOOK)
        )
    except (OSError, ValueError):
        name = folder.name
        raise ValueError(
            f"{folder} is not a finished build; type `python -m tools.kernels build {name}`."
        ) from None
    ref, title = str(metadata.get("id")), str(metadata.get("title"))
    if ref.partition("/")[2] != slug(title):
        raise ValueError(
            f"Kaggle would make {slug(title)!r} of the title {title!r}, but the id in {METADATA} "
            f"is {ref!r}; let them agree."
        )
    if not page["metadata"].get("kernelspec", {}).get("name"):
        raise ValueError("The notebook has no kernelspec, and Kaggle needs one; `make notebooks`.")
    if any(cell.get("outputs") for cell in page["cells"]):
        raise ValueError("The notebook holds outputs, and a push sends none; build it again.")
    size = len(json.dumps(page).encode())
    if size > LIMIT:
        raise ValueError(f"The notebook has {size:,} bytes; Kaggle takes {LIMIT:,}.")
    check_payload(page, record)
    if artifacts.sha256(folder / NOTEBOOK) != record["notebook_sha256"]:
        raise ValueError(f"{folder / NOTEBOOK} was changed after the build; build it again.")
    return record


def check_payload(page: dict, record: dict[str, Any]) -> None:
    """The payload is the one that was packed, and no cell or packed file holds a secret."""
    texts = {f"cell {n}": "".join(cell["source"]) for n, cell in enumerate(page["cells"], 1)}
    packed, files = unpack(next((text for text in texts.values() if UNPACKED.search(text)), ""))
    if hashlib.sha256(packed).hexdigest() != record["payload_sha256"]:
        raise ValueError("The payload of the notebook is not the one packed; build it again.")
    texts = {place: UNPACKED.sub("", text) for place, text in texts.items()}
    texts |= {name: content.decode(errors="replace") for name, content in files.items()}
    for place, text in texts.items():
        leaks.refuse(place, text)
    leaks.refuse("the notebook", json.dumps(page), known_only=True)
