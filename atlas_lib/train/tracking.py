"""W&B: on only if the configuration asks for it and its key is accepted."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from atlas_lib import session


def report_to(config: Any, out: Path) -> str:
    """SFTConfig.report_to: "wandb" only if the config asks for it and its key is accepted.

    W&B's own answer to a missing key is a prompt, and to a wrong one an exception after the model
    has been loaded; here both switch it off.
    """
    asked = config.train.report_to
    key = session.secret("WANDB_API_KEY") if asked == "wandb" else None
    mode = os.environ.pop("WANDB_MODE", None)
    mode = None if mode == "disabled" else mode  # set below, before there was a key
    refused = _wandb_refuses(key, mode) if key else "no key, or not asked for"
    if refused:
        os.environ["WANDB_MODE"] = "disabled"
        print(f"W&B: off ({refused}).")
        return "none" if asked in (None, "wandb") else asked
    os.environ |= {"WANDB_API_KEY": key, "WANDB_PROJECT": config.run.wandb_project}
    os.environ |= {"WANDB_MODE": mode} if mode else {}
    os.environ.setdefault("WANDB_DIR", str(out))
    os.environ.setdefault("WANDB_NAME", f"{out.name} {config.digest()}")
    print("W&B: on (a key was found).")
    return "wandb"


WANDB_SECONDS = 60  # for the check of its key


# In a process of its own: wandb reads the environment when it starts, which is not yet what it will
# be, and waits without end for a service of its own that does not come to an end.
WANDB_PROBE = """
import os, sys, wandb
try:
    wandb.Api(timeout=5)
    print("accepted")
except Exception as error:
    print(" ".join(str(error).split()))
sys.stdout.flush()
os._exit(0)
"""


def _wandb_refuses(key: str, mode: str | None) -> str | None:
    """Why W&B will not work with this key, in a few words; None: it will. Takes seconds."""
    if mode == "offline":
        return None
    quiet = {"stdin": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "timeout": WANDB_SECONDS}
    environment = os.environ | {"WANDB_API_KEY": key}
    with tempfile.TemporaryFile("w+") as told:  # no pipe, which wandb's service would keep open
        try:
            command = [sys.executable, "-c", WANDB_PROBE]
            subprocess.run(command, stdout=told, env=environment, **quiet)
        except subprocess.TimeoutExpired:
            return f"it does not answer within {WANDB_SECONDS} s"
        told.seek(0)
        said = told.read().strip().replace(key, "***").rstrip(".")
    return None if said == "accepted" else said or "the check of the key said nothing"
