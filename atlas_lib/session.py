"""Where am I, on what hardware, with which secrets: decided once, printed with the reason."""

import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

from atlas_lib import devices
from atlas_lib.bootstrap import ROOT, platform_name

NESTED = "ATLAS_NESTED"  # in a page that another one runs: Colab would never answer its kernel
KAGGLE = Path(os.environ.get("ATLAS_KAGGLE", "/kaggle"))  # another place only in tests
PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "bitsandbytes",
    "datasets",
    "accelerate",
    "lm_eval",
)


def output_folder(out: str, config_name: str, overlay: str = "") -> Path:
    """OUT as a folder that exists and can be written to. Raises ValueError."""
    home = ROOT if (ROOT / "Makefile").is_file() else Path.cwd()  # not a checkout: where one works
    default = home / "runs" / "-".join(filter(None, (config_name, overlay)))
    folder = Path(out) if out else KAGGLE / "working" if platform_name() == "kaggle" else default
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"OUT {folder} cannot be written to ({error.strerror}); choose another."
        ) from None
    return folder


def commit() -> str:
    """12 digits, "-dirty" with uncommitted changes: the checkout's, else the packed or installed
    library's; "unknown" if none of them tells."""

    def git(*args: str) -> str:
        command = ["git", "-C", str(ROOT), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        if (ROOT / ".git").exists():
            changed = "-dirty" if git("status", "--porcelain") else ""
            return git("rev-parse", "--short=12", "HEAD") + changed
    if "ATLAS_COMMIT" in os.environ:  # set by the cell that unpacks a kernel's payload
        return os.environ["ATLAS_COMMIT"]
    with contextlib.suppress(Exception):  # pip's note on where a package came from, if it is there
        origin = importlib.metadata.distribution("atlas-sft").read_text("direct_url.json")
        return json.loads(origin)["vcs_info"]["commit_id"][:12]
    return "unknown"


def versions() -> dict[str, str]:
    """Installed versions of what decides a result; packages that are absent are left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def image() -> str:
    """The hosted image's own name of its build, as its variables have it; empty elsewhere."""
    names = {"kaggle": ("GIT_COMMIT", "BUILD_DATE"), "colab": ("COLAB_RELEASE_TAG",)}
    return " ".join(filter(None, map(os.environ.get, names.get(platform_name(), ()))))


def provenance() -> dict[str, Any]:
    """What a manifest says of the machine: commit, versions, platform, image, hardware, GPUs."""
    return {
        "commit": commit(),
        "versions": versions(),
        "platform": f"{platform_name()}, {platform.platform()}",
        "image": image(),
        "hardware": devices.hardware(),
        "gpus": devices.gpu_count(),
    }


def session_deadline(config: Any) -> float | None:
    """Unix time, ten minutes before the session ends, by which work has to be saved; None: never.

    A hosted session begins with its first process, any other with this one. Prints the deadline.
    """
    hours = config.run.session_hours or (12 if platform_name() == "kaggle" else None)
    if hours is None:
        return None
    import psutil

    begun = [psutil.Process().create_time()]
    with contextlib.suppress(psutil.Error):
        begun += [psutil.Process(1).create_time()] if platform_name() != "local" else []
    length = hours * 3600 - 600
    # A first process older than a session can be cannot be the session's own.
    deadline = next((t + length for t in reversed(begun) if t + length > time.time()), None)
    deadline = deadline or begun[0] + length
    print(f"This session: work is saved by {time.ctime(deadline)} (run.session_hours: {hours:g}).")
    return deadline


def secret(name: str) -> str | None:
    """A secret from the environment, Kaggle or Colab; None, the normal case, if there is none."""
    if os.environ.get(name) or NESTED in os.environ:
        return os.environ.get(name) or None
    # Each platform raises its own zoo of exceptions for "absent"; none of them is our failure.
    with contextlib.suppress(Exception):
        if platform_name() == "kaggle":
            from kaggle_secrets import UserSecretsClient

            return UserSecretsClient().get_secret(name) or None
        if platform_name() == "colab":
            from google.colab import userdata

            return userdata.get(name) or None
    return None


def start(config: Any, out: Path) -> None:
    """Print the stamp of a notebook: what runs, on which versions, where the results go."""
    for name in ("HF_TOKEN", "WANDB_API_KEY"):  # for huggingface_hub, and pages run by this one
        os.environ |= {name: value} if (value := secret(name)) else {}
    if config.label:
        print(config.label)
    where = platform_name()
    print(f"config digest {config.digest()} · commit {commit()} · {where} · results in {out}")
    print(" · ".join(f"{name} {version}" for name, version in versions().items()))
