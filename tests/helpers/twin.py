"""Machines like Kaggle's and Colab's, for the tests: the packages of the image, not the checkout.

The image is a virtual environment made once from requirements-kaggle.txt. A session is a copy of it
in which a page's bootstrap really upgrades, in place, as in a container.
"""

import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import filelock

ROOT = Path(__file__).resolve().parents[2]
IMAGE = ROOT / "requirements-kaggle.txt"
SITE = f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
FOREIGN = ("ATLAS", "COLAB", "CUDA", "GIT_", "HF_", "JUPYTER", "KAGGLE", "PYTHON", "VIRTUAL")
FOREIGN += ("WANDB",)

# Which exception of the platform's client an absent secret ends in, or a secret for every name.
KAGGLE_SECRETS = """
import os

class BackendError(Exception): ...
class CredentialError(Exception): ...

answer = os.environ["TWIN_SECRETS"]
if answer == "ImportError":
    raise ImportError("no module named kaggle_web_client")

class UserSecretsClient:
    def __init__(self):
        if answer == "CredentialError":
            raise CredentialError("no session token")

    def get_secret(self, name):
        if answer == "BackendError":
            raise BackendError("No user secrets exist for kernel id and label " + name)
        if answer == "ConnectionError":
            raise ConnectionError("HTTP 403")
        return answer
"""
COLAB_KERNEL = """
from ipykernel.ipkernel import IPythonKernel
from ipykernel.zmqshell import ZMQInteractiveShell

class Shell(ZMQInteractiveShell): ...

class Kernel(IPythonKernel):
    def _shell_class_default(self):
        return Shell
"""
COLAB_USERDATA = """
import os

class SecretNotFoundError(Exception): ...
class NotebookAccessError(Exception): ...
class TimeoutException(Exception): ...

def get(name):
    answer = os.environ["TWIN_SECRETS"]
    error = {**globals(), "ValueError": ValueError}.get(answer)
    if error:
        raise error(name)
    return answer
"""


def copy_tree(folder: Path) -> Path:
    """The files of this checkout that git tracks or would track, in a new folder."""
    command = ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in run(*command).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


@functools.cache
def image() -> Path:
    """The base environment, in build/venvs by the hash of its list."""
    text = IMAGE.read_bytes() + sys.version.encode()
    home = ROOT / "build" / "venvs" / hashlib.sha256(text).hexdigest()[:12]
    home.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(home.with_suffix(".lock")):  # two test processes may need it at once
        if not home.is_dir():
            part = home.with_name(f"{home.name}.part")  # a half-made one is not taken for a whole
            shutil.rmtree(part, ignore_errors=True)
            run(sys.executable, "-m", "venv", part)
            pip = ["nice", part / "bin/python", "-m", "pip", "install", "-q", "-r", IMAGE]
            run(*pip, env=os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1"})
            part.rename(home)
    return home


def run(*command, **options) -> subprocess.CompletedProcess:
    """A command that has to work. Raises AssertionError with what it said last."""
    command = [str(part) for part in command]
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def copied(source: Path, folder: Path) -> Path:
    """The python of a copy of an environment, of links to its files: pip replaces, never writes."""
    shutil.copytree(source, folder, symlinks=True, copy_function=link)
    return folder / "bin" / "python"


def link(source: str, target: str) -> None:
    """A second name for a file, or a copy on another device."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def kaggle_session(folder: Path) -> Path:
    """A session's python on Kaggle: the image with Kaggle's client of secrets."""
    python = copied(image(), folder)
    (folder / SITE / "kaggle_secrets.py").write_text(KAGGLE_SECRETS, "utf-8")
    return python


def colab_session(folder: Path) -> Path:
    """A session's python on Colab: no papermill, and a kernel with Colab's own shell."""
    python = copied(image(), folder)
    for found in (folder / SITE).glob("papermill*"):
        shutil.rmtree(found)
    colab = folder / SITE / "google" / "colab"  # a namespace package, as protobuf has it, too
    colab.mkdir(parents=True)
    for name, text in {"__init__": "", "_shell": COLAB_KERNEL, "userdata": COLAB_USERDATA}.items():
        (colab / f"{name}.py").write_text(text, "utf-8")
    settings = folder / "etc" / "ipython" / "ipython_kernel_config.py"
    settings.parent.mkdir(parents=True)
    settings.write_text('c.IPKernelApp.kernel_class = "google.colab._shell.Kernel"\n', "utf-8")
    return python


def environment(home: Path, **more: str) -> dict[str, str]:
    """The environment without what belongs to this checkout, this user or another platform."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(FOREIGN)}
    cache = run(sys.executable, "-m", "pip", "cache", "dir").stdout.strip()  # not in the new HOME
    quick = {"PIP_CACHE_DIR": cache, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
    home.mkdir(parents=True, exist_ok=True)
    service = {"WANDB_BASE_URL": "http://127.0.0.1:9", "TWIN_SECRETS": "BackendError"}
    return kept | quick | service | {"HOME": str(home), "MPLBACKEND": "agg"} | more


def kaggle(folder: Path, **more: str) -> dict[str, str]:
    """The environment of a Kaggle session with its folders below `folder`; Colab's names too."""
    (folder / "working").mkdir(parents=True, exist_ok=True)
    (folder / "input").mkdir(exist_ok=True)
    names = {"KAGGLE_KERNEL_RUN_TYPE": "Batch", "ATLAS_KAGGLE": str(folder), "GIT_COMMIT": "f00d"}
    names |= {"COLAB_GPU": "", "COLAB_RELEASE_TAG": "release-colab-external", "BUILD_DATE": "2026"}
    return environment(folder.parent / "home", **names | more)


def attach(folder: Path, stage: str, output: Path) -> None:
    """Mount the output of another kernel, where Kaggle usually mounts it."""
    target = folder / "input" / "notebooks" / "agaonker" / stage.replace("_", "-")
    shutil.copytree(output, target)


def batch(
    python: Path, page: Path, working: Path, env: dict, **parameters: str
) -> subprocess.CompletedProcess:
    """Run a notebook as Kaggle does: one file from elsewhere, by papermill in the output folder."""
    command = [python, "-m", "papermill", "--no-progress-bar", page, "__notebook__.ipynb"]
    command += [part for name, value in parameters.items() for part in ("-p", name, value)]
    return subprocess.run(command, cwd=working, env=env, capture_output=True, text=True)


INTERACTIVE = """
import sys, nbformat
from nbclient import NotebookClient

page = nbformat.read(sys.argv[1], as_version=4)
page.cells *= int(sys.argv[2])
try:
    NotebookClient(page, kernel_name="python3").execute()
finally:
    nbformat.write(page, "page.ipynb")
"""


def run_all(
    python: Path, page: Path, working: Path, env: dict, times: int = 1
) -> subprocess.CompletedProcess:
    """Run All in one kernel, without papermill; what it showed is in `working`/page.ipynb."""
    command = [python, "-c", INTERACTIVE, page, str(times)]
    return subprocess.run(command, cwd=working, env=env, capture_output=True, text=True)


def build(folder: Path, **values: object) -> None:
    """The four kernels of this tree in `folder`, offline, with `values` as SET."""
    settings = [part for k, v in values.items() for part in ("--set", f"{k}={v}")]
    options = ["--allow-dirty", "--overlay", "offline", "--out-folder", folder]
    run(sys.executable, "-m", "tools.kernels", "build", *options, *settings, cwd=ROOT)


def page_text(page: Path) -> str:
    """Everything that an executed notebook shows, errors included."""
    cells = json.loads(page.read_text("utf-8"))["cells"]
    parts = []
    for output in (output for cell in cells for output in cell.get("outputs", [])):
        parts += [output[key] for key in ("text", "evalue") if key in output]
        parts += output.get("data", {}).values()
    return "\n".join("".join(part) for part in parts)
