"""What tests in several folders do: run Python as a user would, and read a refusal."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run_python(*arguments: Any, cwd: Path = ROOT, **environment: str):
    """The finished process of `python <arguments>`, with `environment` added to this one's."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


def refusal(call: Callable, *arguments: Any, kind: type[Exception] = ValueError) -> str:
    """The message with which a call is refused: one line, one or more whole sentences."""
    with pytest.raises(kind, match=r"\A[^\n]+\.\Z") as caught:
        call(*arguments)
    return str(caught.value)
