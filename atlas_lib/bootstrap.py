"""Install what Kaggle's and Colab's images lack: standard library only, before any heavy import."""

import functools
import importlib
import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

from atlas_lib import compat

ROOT = Path(__file__).resolve().parent.parent  # the checkout, if this is one
# A checkout has configs/ and notebooks/ beside the package; an installed wheel contains them.
FILES = ROOT if (ROOT / "configs").is_dir() else ROOT / "atlas_lib" / "share"
CONFIGS, NOTEBOOKS, PINS = FILES / "configs", FILES / "notebooks", FILES / "requirements.txt"
UNTOUCHABLE = ("torch", "numpy")  # upgrading them inside a hosted image breaks other packages
KERNEL = ("ipykernel", "ipython", "jupyter_client")
# Hugging Face's libraries read these when they are imported. Progress bars would stay in the
# notebook as dead widgets, and TRL sends telemetry unless told not to.
ENVIRONMENT = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def platform_name() -> str:
    """One of "kaggle", "colab" and "local". Kaggle first: its image sets Colab's variables too."""
    if "KAGGLE_KERNEL_RUN_TYPE" in os.environ:
        return "kaggle"
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if "google.colab" in str(shell) or "COLAB_RELEASE_TAG" in os.environ:
        return "colab"
    return "local"


def floors() -> dict[str, str]:
    """Package, with its extra -> lowest version, from pyproject.toml or installed metadata."""
    pyproject = ROOT / "pyproject.toml"
    if pyproject.is_file():
        lines = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["dependencies"]
    else:
        lines = required_by("atlas-sft")
    found = (re.match(r"([\w.-]+(?:\[\w+\])?)\s*>=\s*([\d.]+)", line) for line in lines)
    return {match[1]: match[2] for match in found if match}


def pins() -> dict[str, str]:
    """Package -> the exact requirement that the tests were run with, from requirements.txt."""
    lines = re.findall(r"^[\w.-]+(?:\[\w+\])?==\S+", PINS.read_text(encoding="utf-8"), re.MULTILINE)
    return {normal(line): line for line in lines}


def normal(requirement: str) -> str:
    """The canonical name of its package: "lm_eval[ifeval]>=0.4" -> "lm-eval"."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


def numbers(version: str) -> tuple[int, ...]:
    """The first three numbers of a version."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def installed(package: str) -> str | None:
    """The version on disk, or None."""
    try:
        return importlib.metadata.version(package.partition("[")[0])
    except importlib.metadata.PackageNotFoundError:
        return None


def required_by(*packages: str) -> list[str]:
    """The requirements of those packages that are installed, extras included."""
    lists = [importlib.metadata.requires(each) or [] for each in packages if installed(each)]
    return [line for lines in lists for line in lines]


def missing() -> list[str]:
    """Requirements that are absent or older than their floor, as pip spells them."""
    return [
        f"{package}>={floor}"
        for package, floor in floors().items()
        if numbers(installed(package) or "") < numbers(floor)
    ]


def ensure() -> None:
    """Install what is missing on Kaggle and Colab; RuntimeError elsewhere, with what to do."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    hosted, wanted = platform_name() != "local", missing()
    at_first()
    if hosted:
        compat.remove_old_torchao()
    blocked = [each for each in wanted if each.split(">=")[0] in UNTOUCHABLE]
    if wanted and (blocked or not hosted):
        raise RuntimeError(f"Missing or too old: {', '.join(blocked or wanted)}; run `make setup`.")
    if wanted:
        install(wanted)
    refuse_old_modules()


def install(wanted: list[str]) -> None:
    """pip install, with the versions of `held` unchanged. Raises RuntimeError with pip's error.

    At the versions of requirements.txt, which the tests have seen; where they do not fit the image,
    at the newest that do.
    """
    started, exact = time.monotonic(), [pins()[normal(each)] for each in wanted]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.write("\n".join(held()))
        constraints.flush()
        pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        for attempt in (exact, wanted):
            print(f"Installing {', '.join(attempt)} ...", flush=True)
            command = [*pip, "-c", constraints.name, *attempt]
            done = subprocess.run(command, capture_output=True, text=True)
            if not done.returncode:
                break
    if done.returncode:
        reason = (done.stderr.strip() or "no message").splitlines()[-1]
        raise RuntimeError(
            f"pip cannot install {', '.join(wanted)} ({reason}); is the internet switched on? "
            "Kaggle: Settings > Internet."
        )
    importlib.invalidate_caches()
    print(f"done in {time.monotonic() - started:.0f} s.")


def held() -> list[str]:
    """torch, numpy and what this torch pins (CUDA libraries, triton), at their versions."""
    lines = [line for line in required_by("torch") if "==" in line.partition(";")[0]]
    pinned = [normal(line) for line in lines]
    versions = {package: installed(package) for package in (*UNTOUCHABLE, *pinned)}
    return [f"{package}=={version}" for package, version in versions.items() if version]


def on_disk() -> dict[str, str]:
    """Version of every installed package, from the names of folders alone: in milliseconds."""
    places = reversed(sys.path)  # the first one wins
    names = [f.stem for place in places for f in Path(place or ".").glob("*.dist-info")]
    return {normal(name): version for name, _, version in (n.rpartition("-") for n in names)}


@functools.cache
def at_first() -> tuple[dict[str, str], frozenset[str]]:
    """Versions of packages, and the modules in memory, at the first call in this process.

    Where a package that Atlas requires is in memory, its version there counts: the one on disk may
    have been replaced since.
    """
    loaded = {normal(package): sys.modules.get(package.partition("[")[0]) for package in floors()}
    versions = {name: getattr(module, "__version__", None) for name, module in loaded.items()}
    return on_disk() | {k: v for k, v in versions.items() if v}, frozenset(sys.modules)


def refuse_old_modules() -> None:
    """Raise RuntimeError if a package in memory was replaced on disk: the two would mix.

    Without what a notebook's kernel requires: that is in memory before any cell, in each session.
    """
    before, loaded = at_first()
    kernels = {normal(line) for line in required_by(*KERNEL)}
    now, stale = on_disk(), []
    for package in now.keys() & before.keys() - kernels:
        if numbers(before[package]) != numbers(now[package]):
            files = importlib.metadata.files(package) or []
            paths = (path for file in files for path in (file.parent, file.with_suffix("")))
            if loaded & {".".join(path.parts) for path in paths}:
                stale.append(f"{package} {before[package]}")
    if stale:
        raise RuntimeError(
            f"{', '.join(sorted(stale))} had been imported before another version was installed: "
            "restart the session and run all cells (what was installed stays)."
        )
