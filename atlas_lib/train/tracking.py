"""Weights & Biases: on only if the configuration asks for it and its key is accepted."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from atlas_lib import artifacts, session
from atlas_lib.schema import Config

KEY_CHECK_SECONDS = 60
# Run in a process of its own: wandb reads the environment once, and its background service can
# block the interpreter's exit.
KEY_CHECK = """
import os, wandb
try:
    wandb.Api(timeout=5)
except Exception:
    os._exit(1)
os._exit(0)
"""


def report_to(config: Config, out: Path) -> str | list[str]:
    """SFTConfig's `report_to`, with the environment that wandb reads.

    Without a key W&B would prompt, and with a wrong one it would fail after the model has been
    loaded; here both switch it off.
    """
    asked = config.train.report_to
    if os.environ.get("WANDB_MODE") == "disabled":  # by an earlier call, before there was a key
        del os.environ["WANDB_MODE"]
    key, reason = session.secret("WANDB_API_KEY")
    if asked == "wandb" and key and _accepted(key):
        os.environ |= {"WANDB_API_KEY": key, "WANDB_PROJECT": config.run.wandb_project}
        os.environ.setdefault("WANDB_DIR", str(out))
        os.environ.setdefault("WANDB_NAME", f"{out.name} {artifacts.config_digest(config)}")
        print("W&B: on (a key was found).")
        return "wandb"
    os.environ["WANDB_MODE"] = "disabled"
    reason = "the key is not accepted or W&B cannot be reached" if key else reason
    print(f"W&B: off ({reason if asked == 'wandb' else 'train.report_to does not ask for it'}).")
    return "none" if asked in (None, "wandb") else asked


def _accepted(key: str) -> bool:
    """Whether W&B accepts the key; takes seconds. WANDB_MODE=offline needs no acceptance."""
    if os.environ.get("WANDB_MODE") == "offline":
        return True
    quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    check = [sys.executable, "-c", KEY_CHECK]
    with tempfile.TemporaryDirectory() as scratch:  # wandb's own folders stay after os._exit
        environment = os.environ | {"WANDB_API_KEY": key, "TMPDIR": scratch}
        try:
            done = subprocess.run(check, env=environment, timeout=KEY_CHECK_SECONDS, **quiet)
        except subprocess.TimeoutExpired:
            return False
    return done.returncode == 0
