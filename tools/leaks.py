"""Refuse text that holds a key or token: pages and payloads are scanned before they go anywhere."""

import os
import re

NAMES = ("KAGGLE_KEY", "KAGGLE_API_TOKEN", "HF_TOKEN", "WANDB_API_KEY")
# Hexadecimal keys look like the hashes that pages are full of: they need a word that tells.
LOOKS_LIKE = re.compile(
    r"hf_[A-Za-z0-9]{30,}|KGAT_[A-Za-z0-9]{20,}|wandb_v1_\w{60,}|AKIA[0-9A-Z]{16}"
    r"|gh[pousr]_[A-Za-z0-9]{36}|github_pat_\w{60,}|-----BEGIN [A-Z ]*PRIVATE KEY-----"
    r"|(?i:key|token|secret|password|login|wandb|kaggle)"
    r"""["'\s\\:=]{1,8}(?:[0-9a-f]{40}|[0-9a-f]{32})\b"""
)


def refuse(place: str, text: str, known_only: bool = False) -> None:
    """Raise ValueError where `text` holds a secret of the environment, or what looks like one."""
    values = {name: os.environ.get(name, "") for name in NAMES}
    found = next((name for name, value in values.items() if len(value) > 7 and value in text), None)
    if found is None and not known_only and LOOKS_LIKE.search(text):
        found = "what looks like a key or token"
    if found:
        raise ValueError(f"{place} holds {found}; take it out, secrets stay in the environment.")
