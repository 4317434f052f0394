"""Minutes and peak memory of an export, on random weights in the shape of Qwen2.5-0.5B.

    python -m benchmarks.export [--json results/bench_export.json]

Memory is given in units of the base model's file, which holds float32, as an export on a CPU
computes. Random weights produce no stop token, so that the export ends with exit code 1; what it
proves is tested elsewhere. Run it on an otherwise idle machine.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from atlas_lib import artifacts, devices, models, session
from atlas_lib.config import load_config
from atlas_lib.train import adapters
from benchmarks import train
from tools import npm_tokenizers


def make_adapter(folder: Path, base: Path) -> None:
    """An adapter of the recipe's shape with random weights, saved as notebook 03 saves its own."""
    import torch
    from peft import LoraConfig, get_peft_model

    tokenizer = str(npm_tokenizers.tokenizer_folder())
    local = {"model.base": str(base), "model.tokenizer": tokenizer, "run.require_gpu": False}
    local |= {"model.base_revision": None, "model.tokenizer_revision": None}
    local |= {"model.chat_template": "qwen2_5", "model.eos_token": "<|im_end|>"}
    local |= {"model.pad_token": "<|endoftext|>"}
    config = load_config("sft_qwen05b", "", local)
    tokenizer = models.load_tokenizer(config)
    weights = models.load_weights("base", config, devices.Device("cpu", "float32", ""), False)
    torch.manual_seed(1)
    lora = LoraConfig(task_type="CAUSAL_LM", **config.lora.model_dump())
    model = get_peft_model(weights, lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    adapters.save_adapter(model, folder, config, tokenizer, tokenizer.chat_template)


def measure(adapter: Path, base: Path, *options: str) -> dict:
    """One export in a process of its own."""
    command = [sys.executable, "-m", "tools.export", str(adapter), *options]
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as out:
        environment = os.environ | train.OFFLINE | train.QUIET
        done = subprocess.run([*command, "--out", out], env=environment, check=False)
        if not (Path(out) / "export.json").is_file():
            raise SystemExit(f"error: the export ended with exit code {done.returncode}")
    unit = 1 if sys.platform == "darwin" else 2**10
    peak = unit * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    size = (base / "model.safetensors").stat().st_size
    return {
        "options": " ".join(options),
        "exit_code": done.returncode,
        "minutes": (time.monotonic() - began) / 60,
        "peak_gib": peak / 2**30,
        "model_gib": size / 2**30,
        "peak_in_model_sizes": peak / size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        base, adapter = Path(scratch) / "base", Path(scratch) / "adapter"
        building = [
            sys.executable,
            "-c",
            "from benchmarks import export; from pathlib import Path; ",
        ]
        building[-1] += f"export.build_both(Path({str(base)!r}), Path({str(adapter)!r}))"
        subprocess.run(building, check=True)  # its memory is not the export's
        row = measure(adapter, base, "--to", "gguf")
    print(row)
    if args.json:
        artifacts.write_json(args.json, {"rows": [row], **session.provenance()})


def build_both(base: Path, adapter: Path) -> None:
    """Save base and adapter."""
    train.build(base, train.SHAPES["cuda"])
    make_adapter(adapter, base)


if __name__ == "__main__":
    main()
