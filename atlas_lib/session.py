"""The session: OUT, secrets, and the provenance of what is made in it."""

import contextlib
import errno
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock

from atlas_lib import devices
from atlas_lib.bootstrap import ROOT, installed, platform_name

NESTED = "ATLAS_NESTED"  # set in a notebook that another process runs: Colab would not answer it
KAGGLE = Path(os.environ.get("ATLAS_KAGGLE", "/kaggle"))  # elsewhere only in tests
DRIVE = Path("/content/drive")  # where Colab mounts Google Drive
PAUSE_SECONDS = 2.0  # before a secrets service that did not answer is asked again
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "datasets", "accelerate")
PACKAGES += ("lm_eval",)  # their versions decide a result
# Variables that name the build of a hosted image.
IMAGES = {"kaggle": ("GIT_COMMIT", "BUILD_DATE"), "colab": ("COLAB_RELEASE_TAG",)}
LOCK = ".lock"  # in OUT, held by tools.run


def output_folder(out: str, config_name: str, overlay: str = "") -> Path:
    """OUT as an absolute path of a writable folder, made if absent. Raises ValueError."""
    home = ROOT if (ROOT / "Makefile").is_file() else Path.cwd()  # not in a checkout
    default = home / "runs" / "-".join(filter(None, (config_name, overlay)))
    folder = Path(out) if out else KAGGLE / "working" if platform_name() == "kaggle" else default
    try:
        if DRIVE in folder.parents and not DRIVE.is_mount():  # a folder there would be lost
            raise OSError(errno.ENODEV, "Drive is not mounted")
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # has no name that a kill could leave behind
    except OSError as error:
        raise ValueError(
            f"OUT {folder} cannot be written to ({error.strerror}); choose another."
        ) from None
    return folder.resolve()


class BusyError(ValueError):
    """Another process holds a lock."""


@contextlib.contextmanager
def hold(lock: Path, what: str) -> Iterator[None]:
    """Keep other processes out until the context or this process ends. Raises BusyError."""
    try:
        held = filelock.FileLock(lock).acquire(blocking=False)
    except filelock.Timeout:
        holder = lock.read_text("utf-8")
        raise BusyError(f"{what} is in use {holder}; wait, or choose another OUT.") from None
    with held:
        lock.write_text(f"by process {os.getpid()} on {platform.node()} since {time.asctime()}")
        yield


def commit() -> str:
    """12 digits of the checkout's commit, else of the packed or installed library's.

    With "-dirty" if there are uncommitted changes; "unknown", with git's reason, if there is none.
    """
    if (ROOT / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", str(ROOT), "status", "--porcelain=v2", "--branch"]
        status = subprocess.run(command, capture_output=True, text=True)
        if status.returncode:
            return f"unknown ({' '.join(status.stderr.split())})"
        head, *lines = status.stdout.splitlines()
        changed = any(not line.startswith("#") for line in lines)
        return head.split()[-1][:12] + ("-dirty" if changed else "")
    if "ATLAS_COMMIT" in os.environ:  # set by the cell that unpacks a kernel's payload
        return os.environ["ATLAS_COMMIT"]
    with contextlib.suppress(Exception):  # pip records where a package came from
        origin = importlib.metadata.distribution("atlas-sft").read_text("direct_url.json")
        return json.loads(origin)["vcs_info"]["commit_id"][:12]
    return "unknown"


def versions() -> dict[str, str]:
    """Installed versions of the packages that decide a result."""
    found = {package: installed(package) for package in PACKAGES}
    return {"python": platform.python_version()} | {p: v for p, v in found.items() if v}


def provenance() -> dict[str, Any]:
    """What a manifest records of the machine: commit, versions, platform, image, hardware, GPUs."""
    return {
        "commit": commit(),
        "versions": versions(),
        "platform": f"{platform_name()}, {platform.platform()}",
        "image": " ".join(os.environ.get(key, "") for key in IMAGES.get(platform_name(), ())),
        "hardware": devices.hardware(),
        "gpus": len(devices.visible_gpus()),
    }


def secret(name: str) -> tuple[str | None, str]:
    """A secret from the environment, Kaggle or Colab; or None, and why there is none.

    A service that does not answer is asked twice.
    """
    absent = f"no {name}"
    if os.environ.get(name) or NESTED in os.environ or platform_name() == "local":
        return os.environ.get(name) or None, absent
    for pause in (PAUSE_SECONDS, 0):
        try:
            return _ask_platform(name) or None, absent
        except Exception as error:  # each platform has its own for an absent secret
            if not isinstance(error, OSError) and type(error).__name__ != "TimeoutException":
                return None, absent
            reason = f"{name} cannot be read: {type(error).__name__}: {error}"
        time.sleep(pause)
    return None, reason


def _ask_platform(name: str) -> str | None:
    """A secret of Kaggle or Colab. Raises whatever its client raises."""
    if platform_name() == "kaggle":
        from kaggle_secrets import UserSecretsClient

        return UserSecretsClient().get_secret(name)
    from google.colab import userdata

    return userdata.get(name)


def export_secrets() -> None:
    """Put the tokens into the environment, for huggingface_hub and for child processes."""
    for name in ("HF_TOKEN", "WANDB_API_KEY"):
        if value := secret(name)[0]:
            os.environ[name] = value
