"""The evaluation grid: every model in every prompt format, in this process or in one per GPU."""

import contextlib
import functools
import hashlib
import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from atlas_lib import artifacts, bootstrap, devices, models, session, sources
from atlas_lib.bootstrap import CONFIGS
from atlas_lib.devices import Device
from atlas_lib.evaluate import adapter_check, benchmarks, checkers, decoding, responses
from atlas_lib.schema import Config

ROLES = {"base": "base", "SFT": "base", "Instruct": "instruct"}  # the key of model: with weights
STORE = "responses"  # the folder of OUT in which responses are kept as they finish
REPEATED, REPEATED_SLOTS = 40, 5  # responses, rows of a batch, to measure the noise of decoding


def model_names(config: Config) -> list[str]:
    """The models to evaluate, in order."""
    return [name for name, role in ROLES.items() if getattr(config.model, role)]


def load_model(name: str, config: Config, device: Device, adapter: str | Path) -> Any:
    """A model of the grid, all in one precision; the adapter is merged unless in 4 bits."""
    in_4bit = config.eval.load_in_4bit
    weights = models.load_weights(ROLES[name], config, device, in_4bit)
    if name != "SFT":
        return weights
    from peft import PeftModel

    place = sources.locate(str(adapter)) or adapter
    adapted = PeftModel.from_pretrained(weights, place, revision=config.model.adapter_revision)
    return adapted if in_4bit else adapted.merge_and_unload()


def response_origin(
    name: str, form: str, config: Config, device: Device, adapter: str | Path, tokenizer: Any
) -> dict[str, Any]:
    """All that determines a model's responses beside the prompts; another value, another file."""
    role, model = ROLES[name], config.model

    def content(source: str, revision: str | None) -> dict[str, Any]:
        return sources.content(source, config) or {"hub": [source, revision]}

    return {
        "weights": content(getattr(model, role), getattr(model, f"{role}_revision")),
        "adapter": content(str(adapter), model.adapter_revision) if name == "SFT" else None,
        "quantization": config.quantization.model_dump() if config.eval.load_in_4bit else None,
        "tokenizer": content(model.tokenizer, model.tokenizer_revision),
        "precision": f"{device.name} {device.dtype}",
        "format": form,
        "chat_template": hashlib.sha256(tokenizer.chat_template.encode()).hexdigest()[:12],
        "max_new_tokens": config.eval.max_new_tokens,
        "eos_token": tokenizer.eos_token,
    }


def generate_all(
    config: Config, device: Device, adapter: str | Path, prompts: dict[str, list[dict]], out: Path
) -> dict[str, dict[tuple[str, str], list[dict]]]:
    """{benchmark: {(model, format): responses}}; with several GPUs, one process per GPU.

    `prompts` are those of each benchmark, as `benchmarks.evaluation_prompts` returns them.

    Raises ValueError, before any model responds, for an adapter that does not fit the base.
    """
    adapter_check.check_adapter(adapter, config)
    if len(gpus := devices.visible_gpus()) > 1:
        _generate_in_processes(config, adapter, out, gpus)
    found: dict[str, dict] = {benchmark: {} for benchmark in prompts}
    for name in model_names(config):
        collect = collector(name, config, device, adapter, prompts, out)
        for benchmark, prompt_format in rows_of(config):
            found[benchmark][name, prompt_format] = collect(benchmark, prompt_format)
    return found


def rows_of(config: Config) -> Iterator[tuple[str, str]]:
    """(benchmark, format) in the order in which a model responds."""
    return itertools.product(config.eval.benchmarks, config.eval.formats)


def collector(
    name: str,
    config: Config,
    device: Device,
    adapter: str | Path,
    prompts: dict[str, list[dict]],
    out: Path,
) -> Callable[[str, str], list[dict]]:
    """A function that returns a model's responses to a benchmark in a format, or generates them."""
    tokenizer = models.load_tokenizer(config)
    loaded = functools.cache(lambda: load_model(name, config, device, adapter))

    def generate_missing(prompt_format: str, missing: list[dict], on_response: Any) -> None:
        check_context(loaded(), tokenizer, missing, prompt_format)
        texts = [prompt["prompt"] for prompt in missing]
        limits = (config.eval.max_new_tokens, config.run.eval_slots)
        decoding.generate(loaded(), tokenizer, texts, prompt_format, *limits, on_response)

    def collect(benchmark: str, prompt_format: str) -> list[dict]:
        return responses.collect_responses(
            out / STORE,
            file_name(benchmark, name, prompt_format),
            response_origin(name, prompt_format, config, device, adapter, tokenizer),
            prompts[benchmark],
            functools.partial(generate_missing, prompt_format),
        )

    return collect


def check_context(model: Any, tokenizer: Any, prompts: list[dict], prompt_format: str) -> None:
    """Raise ValueError that names the prompts for which the model's context has no room."""
    context = model.config.max_position_embeddings
    too_long = [
        prompt["key"]
        for prompt in prompts
        if len(decoding.encode_prompt(tokenizer, prompt["prompt"], prompt_format)) >= context
    ]
    if too_long:
        raise ValueError(
            f"The prompts with the keys {too_long} do not fit the model's context of {context:,} "
            f"tokens ({prompt_format}); remove them from eval.prompts, or use another model."
        )


def decoding_noise(
    config: Config,
    device: Device,
    adapter: str | Path,
    prompts: list[dict],
    given: list[dict],
) -> dict[str, int]:
    """Generate some of SFT's chat responses again, with REPEATED_SLOTS: how many changed.

    In half precision the shape of a batch rounds differently, and a near tie between two tokens may
    fall the other way; in float32 no response changes.
    """
    chosen = prompts[:REPEATED]
    texts, cap = [prompt["prompt"] for prompt in chosen], config.eval.max_new_tokens
    model, tokenizer = load_model("SFT", config, device, adapter), models.load_tokenizer(config)
    again = decoding.generate(model, tokenizer, texts, "chat", cap, REPEATED_SLOTS)
    pairs = [
        checkers.score(chosen, [each["response"] for each in some])
        for some in (given[:REPEATED], again)
    ]
    return {
        "repeated": len(chosen),
        "responses_changed": sum(a != b for a, b in zip(given, again, strict=False)),
        "verdicts_changed": sum(a != b for a, b in zip(*pairs, strict=True)),
    }


def file_name(benchmark: str, name: str, prompt_format: str) -> str:
    """What files of a model's responses and scores are named after; IFEval's are without prefix."""
    return f"{'' if benchmark == 'ifeval' else f'{benchmark}-'}{name}-{prompt_format}"


def command(config: Config, adapter: str | Path, out: Path, names: list[str]) -> list[str]:
    """The command of a process that stores the responses of the models `names` in `out`."""
    module = [sys.executable, "-m", "atlas_lib.evaluate.grid"]
    text = config.model_dump_json(exclude_unset=True)
    return [*module, text, str(adapter), str(out), *names]


def _generate_in_processes(config: Config, adapter: str | Path, out: Path, gpus: list[str]) -> None:
    """Store all responses with one process per GPU, whose output is echoed.

    Each process goes through the models and formats in order, the base first, whose responses are
    longest, and leaves out what another one is generating. They end with this function. What a
    failed one leaves is for the caller to generate, where its error, if it recurs, is raised.
    """
    path = filter(None, (str(bootstrap.ROOT), os.environ.get("PYTHONPATH")))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
    processes = {}

    def echo(gpu: str) -> int:
        for line in processes[gpu].stdout:
            print(f"GPU {gpu} | {line}", end="", flush=True)
        return processes[gpu].wait()

    with ThreadPoolExecutor(len(gpus)) as pool:
        try:
            for gpu in gpus[: len(model_names(config)) * len(list(rows_of(config)))]:
                processes[gpu] = subprocess.Popen(
                    command(config, adapter, out, model_names(config)),
                    env=environment | {devices.VISIBLE: gpu, devices.NARROWED: ""},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            statuses = dict(zip(processes, pool.map(echo, processes), strict=True))
        finally:
            for process in processes.values():
                process.terminate()
    for gpu in filter(statuses.get, statuses):
        print(f"The process on GPU {gpu} failed (exit code {statuses[gpu]}), see its last lines.")


def known_figures(config: Config) -> list[dict]:
    """Published figures with their sources, if they hold for this base and all prompts; else []."""
    known, values = artifacts.read_json(CONFIGS / "published.json"), config.flat()
    same = all(values[key] == value for key, value in known["holds_for"].items())
    return [dict(row) for row in known["rows"]] if same and not config.eval.limit else []


def taught_types(config: Config) -> set[str]:
    """Instruction types that the training data teaches, where that is known: the tiny model's."""
    embedded = config.data.dataset.startswith(sources.EMBEDDED)
    return set(config.offline.taught) if embedded else set()


def stored_tokens(out: Path) -> int:
    """The number of tokens in all responses that are stored in `out`, of any model."""
    files = (out / STORE).glob("*.jsonl")
    return sum(row["n_tokens"] for f in files for row in responses.read_responses(f).values())


def main() -> None:
    """Store the responses of some models, leaving out what another process is generating."""
    text, adapter, out, *names = sys.argv[1:]
    config = Config.model_validate_json(text)
    device, prompts = devices.choose_device(config), benchmarks.evaluation_prompts(config)
    for name in names:
        collect = collector(name, config, device, adapter, prompts, Path(out))
        for row in rows_of(config):
            with contextlib.suppress(session.BusyError):
                collect(*row)


if __name__ == "__main__":
    main()
