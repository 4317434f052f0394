"""Where am I, on what hardware, with which secrets: decided once, printed with the reason."""

import contextlib
import functools
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atlas_lib.bootstrap import where

ROOT = Path(__file__).resolve().parent.parent
NESTED = "ATLAS_NESTED"  # in a page that another one runs: Colab would never answer its kernel
KAGGLE = Path(os.environ.get("ATLAS_KAGGLE", "/kaggle"))  # another place only in tests
PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "bitsandbytes",
    "datasets",
    "accelerate",
    "lm_eval",
)


def output_folder(out: str, config_name: str, overlay: str = "") -> Path:
    """OUT as a folder that exists and can be written to. Raises ValueError."""
    home = ROOT if (ROOT / "Makefile").is_file() else Path.cwd()  # not a checkout: where one works
    default = home / "runs" / "-".join(filter(None, (config_name, overlay)))
    folder = Path(out) if out else KAGGLE / "working" if where() == "kaggle" else default
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(
            f"OUT {folder} cannot be written to ({error.strerror}); choose another."
        ) from None
    return folder


def commit() -> str:
    """12 digits, "-dirty" with uncommitted changes: the checkout's, else the packed or installed
    library's; "unknown" if none of them tells."""

    def git(*args: str) -> str:
        command = ["git", "-C", str(ROOT), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        if (ROOT / ".git").exists():
            changed = "-dirty" if git("status", "--porcelain") else ""
            return git("rev-parse", "--short=12", "HEAD") + changed
    if "ATLAS_COMMIT" in os.environ:  # set by the cell that unpacks a kernel's payload
        return os.environ["ATLAS_COMMIT"]
    with contextlib.suppress(Exception):  # pip's note on where a package came from, if it is there
        origin = importlib.metadata.distribution("atlas-sft").read_text("direct_url.json")
        return json.loads(origin)["vcs_info"]["commit_id"][:12]
    return "unknown"


def versions() -> dict[str, str]:
    """Installed versions of what decides a result; packages that are absent are left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def hardware() -> str:
    """The GPU's name if torch is loaded and sees one, else the processor's kind and cores."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    return f"{platform.machine()} CPU, {os.cpu_count()} cores"


def image() -> str:
    """The hosted image's own name of its build, as its variables have it; empty elsewhere."""
    names = {"kaggle": ("GIT_COMMIT", "BUILD_DATE"), "colab": ("COLAB_RELEASE_TAG",)}
    return " ".join(filter(None, map(os.environ.get, names.get(where(), ()))))


def provenance() -> dict[str, Any]:
    """What a manifest says of the machine: commit, versions, platform, image, hardware, GPUs."""
    return {
        "commit": commit(),
        "versions": versions(),
        "platform": f"{where()}, {platform.platform()}",
        "image": image(),
        "hardware": hardware(),
        "gpus": gpu_count(),
    }


@dataclass(frozen=True)
class Device:
    """The device to compute on and the floating-point type it is good at."""

    name: str  # "cuda" or "cpu"
    dtype: str  # "float16", "bfloat16" or "float32"
    reason: str


def gpu_is_there(config: Any) -> bool:
    """Whether CUDA can be used. Raises RuntimeError where `config` insists on it in vain."""
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # Kaggle's "T4" is two: one process, one GPU
    import torch

    found = torch.cuda.is_available()
    if config.run.require_gpu and not found:
        raise RuntimeError(
            "No CUDA GPU here, and this configuration would compute for hours on a CPU: run it on "
            "a T4 (Kaggle: Settings > Accelerator; Colab: Runtime > Change runtime type), take "
            "OVERLAY=offline (`make run`), or set run.require_gpu=false and wait."
        )
    return found


def gpu_count() -> int:
    """GPUs of this machine that the user has not hidden; this process itself uses one of them."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    if chosen != "0":  # by the user; nothing and -1 hide them all
        return int(chosen not in ("", "-1"))
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return 0
    return len(listed.stdout.splitlines())


def device(config: Any) -> Device:
    """Choose device and precision and say why. RuntimeError if a GPU is missing or too old."""
    if not gpu_is_there(config):
        return Device("cpu", "float32", "no GPU, and float32 is fast and exact on a CPU")
    import torch

    major, minor = torch.cuda.get_device_capability()
    if (major, minor) < (7, 5):
        raise RuntimeError(f"The GPU is sm_{major}{minor}; Atlas needs sm_75 (a T4) or newer.")
    if major >= 8:
        return Device("cuda", "bfloat16", f"sm_{major}{minor} computes bfloat16 in hardware")
    return Device("cuda", "float16", f"sm_{major}{minor} would only emulate bfloat16")


def session_deadline(config: Any) -> float | None:
    """Unix time, ten minutes before the session ends, by which work has to be saved; None: never.

    A hosted session begins with its first process, any other with this one. Prints the deadline.
    """
    hours = config.run.session_hours or (12 if where() == "kaggle" else None)
    if hours is None:
        return None
    import psutil

    begun = [psutil.Process().create_time()]
    with contextlib.suppress(psutil.Error):
        begun += [psutil.Process(1).create_time()] if where() != "local" else []
    length = hours * 3600 - 600
    # A first process older than a session can be cannot be the session's own.
    deadline = next((t + length for t in reversed(begun) if t + length > time.time()), None)
    deadline = deadline or begun[0] + length
    print(f"This session: work is saved by {time.ctime(deadline)} (run.session_hours: {hours:g}).")
    return deadline


def locate(name: str) -> str:
    """The absolute path of a file or folder below the repository, any other name unchanged."""
    return str(ROOT / name) if (ROOT / name).exists() else name


def secret(name: str) -> str | None:
    """A secret from the environment, Kaggle or Colab; None, the normal case, if there is none."""
    if os.environ.get(name) or NESTED in os.environ:
        return os.environ.get(name) or None
    # Each platform raises its own zoo of exceptions for "absent"; none of them is our failure.
    with contextlib.suppress(Exception):
        if where() == "kaggle":
            from kaggle_secrets import UserSecretsClient

            return UserSecretsClient().get_secret(name) or None
        if where() == "colab":
            from google.colab import userdata

            return userdata.get(name) or None
    return None


@functools.cache  # what it gave once is in the cache: a hiccup later must not lose a run
def check_hub(repo: str, revision: str | None, kind: str = "model") -> None:
    """Ask the hub for `repo` before anything long starts. Raises ConnectionError or ValueError."""
    from huggingface_hub import HfApi, constants, errors

    if constants.HF_HUB_OFFLINE:  # the user says that everything is cached; the loader will tell
        return
    try:
        HfApi().repo_info(repo, revision=revision, repo_type=kind, timeout=5)
    except errors.HFValidationError:
        raise ValueError(f"{repo} is neither a hub id nor an existing file or folder.") from None
    except errors.HfHubHTTPError as error:
        if error.response.status_code == 429 or error.response.status_code >= 500:
            raise ConnectionError(
                f"The Hugging Face hub answers {error.response.status_code}; try again in a while, "
                "or run without a hub: OVERLAY=offline (`make run`)."
            ) from None
        raise ValueError(
            f"The hub does not give {kind} {repo} at {revision or 'main'} "
            f"({type(error).__name__}); check the name, the revision and, for a private or gated "
            "repository, HF_TOKEN."
        ) from None
    except Exception as error:
        raise ConnectionError(
            f"The Hugging Face hub, which has {kind} {repo}, cannot be reached "
            f"({type(error).__name__}); connect, set HF_HUB_OFFLINE=1 if it is cached, or run "
            "without a hub: OVERLAY=offline (`make run`)."
        ) from None


def report_to(config: Any, out: Path) -> str:
    """SFTConfig.report_to: "wandb" only if the config asks for it and its key is accepted.

    W&B's own answer to a missing key is a prompt, and to a wrong one an exception after the model
    has been loaded; here both switch it off.
    """
    asked = config.train.report_to
    key = secret("WANDB_API_KEY") if asked == "wandb" else None
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


def start(config: Any, out: Path) -> None:
    """Print the stamp of a notebook: what runs, on which versions, where the results go."""
    for name in ("HF_TOKEN", "WANDB_API_KEY"):  # for huggingface_hub, and pages run by this one
        os.environ |= {name: value} if (value := secret(name)) else {}
    if config.label:
        print(config.label)
    print(f"config digest {config.digest()} · commit {commit()} · {where()} · results in {out}")
    print(" · ".join(f"{name} {version}" for name, version in versions().items()))
