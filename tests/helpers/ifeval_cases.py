"""Prompts, verdicts and files in IFEval's schema, for the tests of the scorer."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OFFICIAL = ROOT.parent / "shared" / "data" / "ifeval_input_data.jsonl"
official = pytest.mark.skipif(
    not OFFICIAL.is_file(), reason="NOT TESTED: IFEval's official prompts: not in ../shared/data"
)


def prompt(key=1, ids=("punctuation:no_comma",), kwargs=({},), text="Name a tea."):
    return {"key": key, "prompt": text, "instruction_id_list": list(ids), "kwargs": list(kwargs)}


def verdict(key, *passed, names=None):
    """A verdict on as many instructions; loose is as strict."""
    whole = all(passed)
    ids = list(names or ["startend:quotation"] * len(passed))
    return {"key": key, "instruction_id_list": ids, "strict": list(passed),
            "loose": list(passed), "prompt_strict": whole, "prompt_loose": whole}  # fmt: skip


def write(folder, *lines, name="prompts.jsonl"):
    """A file of lines: JSON of an object, or bytes as they are."""
    path = folder / name
    rows = [x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines]
    path.write_bytes(b"".join(row + b"\n" for row in rows))
    return str(path)


def python(code, **environment):
    return subprocess.run([sys.executable, *code], cwd=ROOT, env=os.environ | environment,
                          capture_output=True, text=True, timeout=300)  # fmt: skip


def random_adapter(config, folder, scale=0.2):
    """The folder of a saved adapter with random weights of this SD in place of trained ones."""
    import torch
    from peft import LoraConfig, get_peft_model

    from atlas_lib import devices, models
    from atlas_lib.train import adapters

    cpu = devices.Device("cpu", "float32", "test")
    base = models.load_weights("base", config, cpu, in_4bit=False)
    torch.manual_seed(0)
    adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **config.lora.model_dump()))
    for parameter in (p for p in adapted.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter, std=scale)
    tokenizer = models.load_tokenizer(config)
    adapters.save_adapter(adapted, folder, config, tokenizer, tokenizer.chat_template)
    return folder
