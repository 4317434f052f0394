"""Keep secrets out of logs, and refuse text that holds one before it is sent or published."""

import os
import re
import sys
from typing import TextIO

VARIABLES = ("KAGGLE_KEY", "KAGGLE_API_TOKEN", "HF_TOKEN", "WANDB_API_KEY")
FROM_FILES: dict[str, str] = {}  # name -> secret that a client read from a file of its own
# A hexadecimal key looks like the hashes that notebooks are full of, unless a word precedes it.
LOOKS_LIKE = re.compile(
    r"hf_[A-Za-z0-9]{30,}|KGAT_[A-Za-z0-9]{20,}|wandb_v1_\w{60,}|AKIA[0-9A-Z]{16}"
    r"|gh[pousr]_[A-Za-z0-9]{36}|github_pat_\w{60,}|-----BEGIN [A-Z ]*PRIVATE KEY-----"
    r"|(?i:key|token|secret|password|login|wandb|kaggle)"
    r"""["'\s\\:=]{1,8}(?:[0-9a-f]{40}|[0-9a-f]{32})\b"""
)


def known_secrets() -> dict[str, str]:
    """Name -> value of the secrets in the environment and in the clients' files."""
    values = {name: os.environ.get(name, "") for name in VARIABLES} | FROM_FILES
    return {name: value for name, value in values.items() if len(value) > 7}


def finding(text: str, known_only: bool = False) -> str | None:
    """The name of the secret in `text`, or None; `known_only` skips the search for patterns."""
    for name, value in known_secrets().items():
        if value in text:
            return name
    if not known_only and LOOKS_LIKE.search(text):
        return "what looks like a key or token"
    return None


def refuse(place: str, text: str) -> None:
    """Raise ValueError if `text` holds a secret."""
    if found := finding(text):
        raise ValueError(f"{place} holds {found}; remove it and keep it in the environment.")


def log(text: str, file: TextIO | None = None) -> None:
    """Print a line with *** in place of known secrets, by default to stdout."""
    for value in known_secrets().values():
        text = text.replace(value, "***")
    print(text, file=file or sys.stdout, flush=True)
