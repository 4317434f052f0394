"""Device, precision and the reason for both; the GPUs that this process may use."""

import os
import platform
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from atlas_lib.schema import Config

VISIBLE, NARROWED = "CUDA_VISIBLE_DEVICES", "ATLAS_GPU"  # the second: what Atlas set the first to
HEADROOM = 0.75  # share of the free memory to use: the rest is for gradients and fragmentation


@dataclass(frozen=True)
class Device:
    """The device to compute on and the floating-point type it is good at."""

    name: str  # "cuda" or "cpu"
    dtype: str  # "float16", "bfloat16" or "float32"
    reason: str


def free_bytes(device: Device) -> int:
    """Free memory of the device in bytes."""
    if device.name == "cuda":
        import torch

        return torch.cuda.mem_get_info()[0]
    import psutil

    return psutil.virtual_memory().available


def peak_memory() -> dict[str, float | None]:
    """Most memory in GiB until now: of this process, and of its tensors on the GPU, if any."""
    torch, unit = sys.modules.get("torch"), 1 if sys.platform == "darwin" else 2**10  # bytes, KiB
    gpu = torch.cuda.max_memory_allocated() if torch and torch.cuda.is_available() else 0
    process = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"process_gib": process / 2**30, "gpu_gib": gpu / 2**30 or None}


def hardware() -> str:
    """The GPU's name if torch is loaded and sees one, else the processor and its instructions."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    listed = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    model = [line.partition(": ")[2] for line in listed if line.startswith("model name")][:1]
    vectors = [torch.backends.cpu.get_cpu_capability()] if torch else []
    return ", ".join([*model, f"{platform.machine()} CPU", f"{os.cpu_count()} cores", *vectors])


def gpu_available(config: Config) -> bool:
    """Whether CUDA can be used. Raises RuntimeError if it cannot and run.require_gpu is set."""
    if VISIBLE not in os.environ:  # Kaggle's "T4" is two: one process, one GPU
        os.environ |= {VISIBLE: "0", NARROWED: "0"}
    import torch

    found = torch.cuda.is_available()
    if config.run.require_gpu and not found:
        cause = "No CUDA GPU here, and this configuration would compute for hours on a CPU: run it "
        cause += "on a T4 (Kaggle: Settings > Accelerator; Colab: Runtime > Change runtime type)"
        if os.environ[VISIBLE] != os.environ.get(NARROWED):
            cause = f"{VISIBLE} is {os.environ[VISIBLE]!r} and hides all other GPUs. {cause}"
        if visible_gpus():
            cause = f"PyTorch cannot use the GPU ({_failure()}): update its driver"
        raise RuntimeError(
            f"{cause}, use OVERLAY=offline (`make run`), or set run.require_gpu=false."
        )
    return found


def _failure() -> str:
    """The first sentence of PyTorch's reason for not using CUDA, such as a driver too old."""
    import torch

    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).split(". ")[0]
    return "no reason given"


def visible_gpus() -> list[str]:
    """The GPUs that the user has not hidden, as in CUDA_VISIBLE_DEVICES; a process uses one."""
    try:
        smi = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    listed = [line for line in smi.stdout.splitlines() if line.startswith("GPU ")]  # not MIG parts
    indices, chosen = [str(number) for number in range(len(listed))], os.environ.get(VISIBLE)
    if chosen in (None, os.environ.get(NARROWED)):
        return indices
    return [gpu for gpu in chosen.split(",") if gpu in indices or gpu.startswith(("GPU-", "MIG-"))]


def choose_device(config: Config) -> Device:
    """Choose device and precision. Raises RuntimeError if a GPU is missing or too old."""
    if not gpu_available(config):
        return Device("cpu", "float32", "no GPU, and float32 is fast and exact on a CPU")
    import torch

    major, minor = torch.cuda.get_device_capability()
    if (major, minor) < (7, 5):
        raise RuntimeError(f"The GPU is sm_{major}{minor}; Atlas needs sm_75 (a T4) or newer.")
    if major >= 8:
        return Device("cuda", "bfloat16", f"sm_{major}{minor} computes bfloat16 in hardware")
    return Device("cuda", "float16", f"sm_{major}{minor} would only emulate bfloat16")
