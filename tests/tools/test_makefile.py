"""The Makefile's environment: installed once, and again if it is damaged."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from checks import ROOT

# A Python that installs nothing: it logs its arguments and fails where a test tells it to.
PYTHON = """#!/bin/sh
echo "$@" >> "$LOG"
case "$*" in
  *missing*) exit "$LACKS" ;;
  "-m venv --clear .venv") rm -rf .venv; mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
esac
"""
INSTALL = "-m pip install --quiet --disable-pip-version-check -r requirements.txt"


@pytest.fixture
def make(tmp_path):
    """A function that runs `make setup` in a folder with a finished environment of stubs."""
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "requirements.txt").touch()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(python, tmp_path / ".venv" / "bin" / "python")
    (tmp_path / ".venv" / "run.stamp").touch()

    def setup(lacks: int) -> list[str]:
        log = tmp_path / "log"
        environment = os.environ | {"LOG": str(log), "LACKS": str(lacks)}
        command = ["make", "-C", str(tmp_path), "setup", f"PYTHON={python}"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return log.read_text().splitlines()

    return setup


def test_an_intact_environment_is_left_alone(make):
    assert not [line for line in make(lacks=0) if "-m" in line]


def test_a_missing_package_is_installed(make):
    commands = make(lacks=1)
    assert INSTALL in commands
    assert "-m venv --clear .venv" not in commands


def gone(python: Path) -> None:
    """As after an upgrade of the Python that .venv was made with."""
    python.unlink()
    python.symlink_to("/nowhere/python3.11")


@pytest.mark.parametrize("damage", [gone, Path.unlink])
def test_an_environment_without_python_is_made_again(damage, make, tmp_path):
    damage(tmp_path / ".venv" / "bin" / "python")
    commands = make(lacks=0)
    assert commands.index("-m venv --clear .venv") < commands.index(INSTALL)
