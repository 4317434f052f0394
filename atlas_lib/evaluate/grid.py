"""Who answers what: every model in every format, in this process or in one process a GPU."""

import argparse
import functools
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

from atlas_lib import bootstrap, devices, models, sources
from atlas_lib.config import CONFIGS, flatten, load_config
from atlas_lib.evaluate import decoding, responses
from atlas_lib.standin import tiny_model

SFT_NF4 = "SFT (NF4)"  # the adapter on the 4-bit weights that it was trained on
FOLDER = "answers"


def model_names(config: Any) -> list[str]:
    """The rows of the grid, in their order."""
    names = ["base", "SFT"]
    names += [SFT_NF4] if config.eval.nf4_row else []
    return names + (["Instruct"] if config.model.instruct else [])


def load(name: str, config: Any, device: Any, adapter: str | Path) -> Any:
    """A row's model: all on one base in one precision; the adapter merged, unless in 4 bits."""
    in_4bit = config.eval.load_in_4bit or name == SFT_NF4
    role = "instruct" if name == "Instruct" else "base"
    weights = models.load_weights(role, config, device, in_4bit)
    if not name.startswith("SFT"):
        return weights
    revision = config.model.adapter_revision
    return models.attach_adapter(weights, adapter, revision, merge=not in_4bit)


def made_from(
    name: str, form: str, config: Any, device: Any, adapter: str | Path, tokenizer: Any
) -> dict[str, Any]:
    """Everything that decides a row's answers: another value is another file of answers."""
    role = "instruct" if name == "Instruct" else "base"
    weights = getattr(config.model, role)
    embedded = weights.startswith(tiny_model.PREFIX)
    return {
        "weights": [weights, getattr(config.model, f"{role}_revision")],
        "stand_in": tiny_model.digest(config) if embedded else None,
        "adapter": _identity(adapter, config) if name.startswith("SFT") else None,
        "in_4bit": config.eval.load_in_4bit or name == SFT_NF4,
        "precision": f"{device.name} {device.dtype}",
        "format": form,
        "chat_template": hashlib.sha256(tokenizer.chat_template.encode()).hexdigest()[:12],
        "max_new_tokens": config.eval.max_new_tokens,
        "stop_ids": models.stop_ids(tokenizer),
        "engine": config.eval.engine,
    }


def _identity(adapter: str | Path, config: Any) -> str:
    """An adapter by its content if it is a folder, else by its hub id and revision."""
    weights = Path(sources.locate(str(adapter))) / "adapter_model.safetensors"
    if weights.is_file():
        return hashlib.sha256(weights.read_bytes()).hexdigest()[:12]
    return f"{adapter}@{config.model.adapter_revision}"


def ask(
    name: str, config: Any, device: Any, adapter: str | Path, prompts: list[dict], out: Path
) -> dict[tuple[str, str], list[dict]]:
    """{(name, format): answers}; only what is not on disk yet is generated."""
    tokenizer = models.load_tokenizer(config)
    loaded = functools.cache(lambda: _answering(name, config, device, adapter, tokenizer))

    def generate_missing(form: str, missing: list[dict], keep: Any) -> None:
        texts, cap = [prompt["prompt"] for prompt in missing], config.eval.max_new_tokens
        slots, engine = config.run.eval_slots, config.eval.engine
        decoding.generate(loaded(), tokenizer, texts, form, cap, slots, keep, engine)

    return {
        (name, form): responses.collect(
            out / FOLDER,
            f"{name.split()[0]}-{form}",
            made_from(name, form, config, device, adapter, tokenizer),
            prompts,
            functools.partial(generate_missing, form),
        )
        for form in config.eval.formats
    }


def _answering(name, config, device, adapter, tokenizer) -> Any:
    """What the engine takes: the model, or for vLLM a folder that holds it."""
    weights = load(name, config, device, adapter)
    if config.eval.engine != "vllm":
        return weights
    folder = tempfile.mkdtemp(prefix="merged-")  # not in OUT, which Kaggle keeps
    weights.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def ask_all(
    parameters: dict[str, Any],
    device: Any,
    adapter: str | Path,
    prompts: list[dict],
    out: Path,
    gpus: int | None = None,
) -> dict[tuple[str, str], list[dict]]:
    """The whole grid. With several GPUs the models are spread over them, a process each.

    `parameters` are a notebook's CONFIG, OVERLAY and SET. Raises RuntimeError if a process fails.
    """
    config = load_config(*parameters.values())
    gpus = devices.gpu_count() if gpus is None else gpus
    if gpus > 1:
        _spread(model_names(config), parameters, adapter, out, gpus)
    found: dict = {}
    for name in model_names(config):
        found |= ask(name, config, device, adapter, prompts, out)
    return found


def _spread(names: list[str], parameters: dict, adapter: str | Path, out: Path, gpus: int) -> None:
    """Let one process a GPU write its models' answers; their lines are echoed."""
    command = [
        sys.executable,
        "-m",
        "atlas_lib.evaluate.grid",
        json.dumps(parameters),
        str(adapter),
    ]
    processes = [
        subprocess.Popen(
            [*command, str(out), *names[gpu::gpus]],
            env=os.environ | {"CUDA_VISIBLE_DEVICES": str(gpu)},
            cwd=bootstrap.ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for gpu in range(min(gpus, len(names)))
    ]
    echoes = [
        threading.Thread(target=_echo, args=(gpu, process)) for gpu, process in enumerate(processes)
    ]
    for echo in echoes:
        echo.start()
    for echo in echoes:
        echo.join()
    failed = [gpu for gpu, process in enumerate(processes) if process.wait()]
    if failed:
        raise RuntimeError(f"The process on GPU {failed[0]} failed; its last lines say why.")


def _echo(gpu: int, process: subprocess.Popen) -> None:
    for line in process.stdout:
        print(f"GPU {gpu} | {line}", end="", flush=True)


def main() -> None:
    """One process of `_spread`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parameters", type=json.loads)
    parser.add_argument("adapter")
    parser.add_argument("out", type=Path)
    parser.add_argument("models", nargs="+")
    args = parser.parse_args()
    config = load_config(*args.parameters.values())
    device, prompts = devices.choose_device(config), load_prompts(config)
    for name in args.models:
        ask(name, config, device, args.adapter, prompts, args.out)


def published(config: Any) -> list[dict]:
    """Figures of others, with their sources, for this base and these prompts; [] for others."""
    known = json.loads((CONFIGS / "published.json").read_text(encoding="utf-8"))
    values = flatten(config.as_dict())
    same = all(values[key] == value for key, value in known["holds_for"].items())
    return [dict(row) for row in known["rows"]] if same and not config.eval.limit else []


def load_prompts(config: Any) -> list[dict]:
    """The prompts that eval.prompts names, in IFEval's schema."""
    from atlas_lib.evaluate import ifeval

    wanted = config.eval
    name = sources.locate(tiny_model.resolve(wanted.prompts, config))
    return ifeval.load_prompts(name, wanted.prompts_revision, wanted.limit)


if __name__ == "__main__":
    main()
