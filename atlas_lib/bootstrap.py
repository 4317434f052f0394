"""Bring a notebook's packages: standard library only, before the first heavy import."""

import contextlib
import importlib
import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
import time
import tomllib
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # the checkout, if this is one
# A checkout has configs/ and notebooks/ beside the package; an installed wheel contains them.
FILES = ROOT if (ROOT / "configs").is_dir() else ROOT / "atlas_lib" / "share"
CONFIGS, NOTEBOOKS = FILES / "configs", FILES / "notebooks"
UNTOUCHABLE = ("torch", "numpy")  # an upgrade inside Kaggle's or Colab's image breaks the rest


# Read by Hugging Face's libraries when they are imported: progress bars would stay in the page as
# dead widgets, and TRL reports its use unless told not to.
ENVIRONMENT = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def platform_name() -> str:
    """Either "kaggle", "colab" or "local". Kaggle first: it sets Colab's variables too."""
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
        lines = importlib.metadata.requires("atlas-sft") or []
    found = (re.match(r"([\w.-]+(?:\[\w+\])?)\s*>=\s*([\d.]+)", line) for line in lines)
    return {match[1]: match[2] for match in found if match}


def numbers(version: str) -> tuple[int, ...]:
    """The first three numbers of a version."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:3])


def missing() -> list[str]:
    """Requirements that are absent or older than their floor, as pip spells them."""

    wanted = []
    for package, floor in floors().items():
        try:
            installed = importlib.metadata.version(package.split("[")[0])
            old = numbers(installed) < numbers(floor)
        except importlib.metadata.PackageNotFoundError:
            old = True
        if old:
            wanted.append(f"{package}>={floor}")
    return wanted


def remove_old_torchao() -> None:
    """Uninstall a torchao below 0.16, as hosted images bring it: peft refuses to work beside it."""
    try:
        version = importlib.metadata.version("torchao")
    except importlib.metadata.PackageNotFoundError:
        return
    if numbers(version) < (0, 16):
        pip = [sys.executable, "-m", "pip", "uninstall", "-q", "-y", "torchao"]
        subprocess.run(pip, check=True)
        print(f"Removed torchao {version}: peft needs 0.16 or none.")


def ensure() -> None:
    """Install what is missing on Kaggle and Colab; elsewhere say how. Raises RuntimeError."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", message="IProgress not found")  # from the imports to come
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    hosted = platform_name() != "local"
    if hosted:
        remove_old_torchao()
    started, wanted = time.monotonic(), missing()
    if wanted:
        bring(wanted, hosted)
    else:
        print(f"Packages: nothing is missing ({time.monotonic() - started:.1f} s).")
    refuse_old_modules()


def bring(wanted: list[str], hosted: bool) -> None:
    """Install what is wanted, unless this machine is its user's own. Raises RuntimeError."""
    blocked = [w for w in wanted if w.split(">=")[0] in UNTOUCHABLE]
    if not hosted or blocked:
        raise RuntimeError(f"Missing or too old: {', '.join(blocked or wanted)}; run `make setup`.")
    started = time.monotonic()
    print(f"Installing {', '.join(wanted)} ...", end=" ", flush=True)
    install(wanted)
    print(f"done in {time.monotonic() - started:.0f} s.")


def install(wanted: list[str]) -> None:
    """pip install; what `held` names stays as it is. Raises RuntimeError with pip's last line."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.write("\n".join(held()))
        constraints.flush()
        options = ["-q", "--disable-pip-version-check", "-c", constraints.name]
        pip = [sys.executable, "-m", "pip", "install", *options, *wanted]
        done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or "nothing").splitlines()[-1]
        raise RuntimeError(
            f"pip cannot install {', '.join(wanted)} (it says: {said}); is the internet switched "
            "on? Kaggle: Settings > Internet."
        )
    importlib.invalidate_caches()


def held() -> list[str]:
    """torch, numpy and what this torch pins (CUDA's libraries, triton), at their versions."""
    lines = importlib.metadata.requires("torch") or []
    pinned = [re.match(r"[\w.-]+", line)[0] for line in lines if "==" in line.partition(";")[0]]
    found = []
    for package in (*UNTOUCHABLE, *pinned):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{package}=={importlib.metadata.version(package)}")
    return found


def refuse_old_modules() -> None:
    """Raise RuntimeError if a package is another version in memory than on disk: they would mix."""
    stale = []
    for package in floors():
        name = package.partition("[")[0]
        loaded = getattr(sys.modules.get(name), "__version__", None)
        if loaded and numbers(loaded) != numbers(importlib.metadata.version(name)):
            stale.append(f"{name} {loaded}")
    if stale:
        raise RuntimeError(
            f"{', '.join(stale)} had been imported before a newer one was installed: restart the "
            "session and run all cells (what was installed stays)."
        )
