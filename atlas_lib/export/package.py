"""Export the evaluated model: checks, files, proof. What is not proved is named `.unproven`."""

import contextlib
import importlib.util
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atlas_lib import artifacts, devices, models, session, sources
from atlas_lib.devices import Device
from atlas_lib.evaluate import adapter_check, grid, ifeval_files, overlap
from atlas_lib.export import gguf_file, llama_cpp, modelfile, proof
from atlas_lib.export.proof import Reference
from atlas_lib.schema import Config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MERGED, RECORD, UNPROVEN, MODELFILE = "merged", "export.json", ".unproven", "Modelfile"
BYTES = {"f16": 2, "q8_0": 1.1, "q4_k_m": 0.8}  # of a weight in a file, at most
ITEM = {"float32": 4, "float16": 2, "bfloat16": 2}
CARD = """---
{data}
---

# {base}, with an adapter merged into it

The weights of {base}{revision} and of the LoRA adapter `{adapter}`, merged by Atlas in {precision},
the precision of its evaluation. The generation config lists the stop tokens {stops}; the chat
template is the one that the adapter was trained with, without its generation markers.
`{record}` beside this folder holds the proof that this is the evaluated model.
"""


def export_model(config: Config, adapter: str | Path, folder: Path, kinds: Sequence[str]) -> bool:
    """Write the adapter merged into its base to `folder`; whether every file is proved.

    `kinds`: "merged", or quantisations of GGUF. Raises ValueError or OSError, having written
    nothing, for what cannot be exported.
    """
    device = evaluated_on(config, adapter)
    tokenizer = check_export(config, adapter, folder, kinds, device)
    model = grid.load_model("SFT", config, device, adapter)
    text = marked_template(config, adapter, tokenizer)
    count = proof.SCORED if {"q8_0", "q4_k_m"} & set(kinds) else proof.PROMPTS
    reference = proof.observe(model, tokenizer, text, sample_prompts(config, count), device)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as scratch:
            merged = Path(scratch) / MERGED
            save_merged(model, tokenizer, merged, config, adapter)
            del model
            found = {}
            for kind in dict.fromkeys(kinds):
                path, record = export_kind(kind, merged, config, reference)
                found[path] = record | {"failures": list(proof.failures(record))}
            for path, record in found.items():
                place(path, folder, record)
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()  # only if nothing was exported
    return all(not record["failures"] for record in found.values())


def export_kind(
    kind: str, merged: Path, config: Config, reference: Reference
) -> tuple[Path, dict[str, Any]]:
    """Write one kind beside `merged`, unless it is that; its path and its proof."""
    if kind == MERGED:
        return merged, {"kind": kind} | proof.prove_merged(merged, reference)
    path, base = merged.with_name(f"model-{kind}.gguf"), config.model.base
    gguf_file.write_gguf(merged, path, kind, base)
    found = {"kind": kind} | proof.prove_gguf(path, kind, reference, config)
    if kind != "f16" and found["by"]:  # only unquantised weights can give the same tokens
        exact = merged.with_name("exact.gguf")
        gguf_file.write_gguf(merged, exact, "f16", base)
        found["before_quantising"] = proof.prove_gguf(exact, "f16", reference, config)["greedy"]
        exact.unlink()
    return path, found | _write_modelfile(path, reference)


def _write_modelfile(path: Path, reference: Reference) -> dict[str, Any]:
    """Write Ollama's Modelfile beside a GGUF file, if the chat template is one of its kind."""
    tokenizer = reference.tokenizer
    try:
        turns = modelfile.read_turns(
            lambda chat, response: tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=response
            )
        )
    except ValueError as error:
        print(f"No Modelfile: {error}.")
        return {"modelfile": None}
    found = proof.compare_texts(reference.texts, turns.render, reference.chats)
    if found["first_difference"]:
        print(f"No Modelfile: Go's template cannot express it ({found['first_difference']}).")
        return {"modelfile": None}
    stops = tokenizer.convert_ids_to_tokens(reference.stops)
    text = modelfile.modelfile(turns, path.name, stops)
    path.with_name(f"{MODELFILE}-{path.stem}").write_text(text, encoding="utf-8")
    return {"modelfile": found}


def place(path: Path, folder: Path, record: dict[str, Any]) -> None:
    """Move a finished file or folder to `folder`, print its proof and add it to export.json."""
    name = path.name + (UNPROVEN if record["failures"] else "")
    for old in (folder / path.name, folder / f"{path.name}{UNPROVEN}"):
        shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
    size = sum(file.stat().st_size for file in (path, *path.rglob("*")) if file.is_file())
    path.rename(folder / name)
    if record["kind"] != MERGED:
        (folder / MODELFILE).unlink(missing_ok=True)  # of an earlier export
    ollama = path.with_name(f"{MODELFILE}-{path.stem}")
    if ollama.exists() and not record["failures"]:
        ollama.replace(folder / MODELFILE)
    known = artifacts.read_json(folder / RECORD) if (folder / RECORD).is_file() else {}
    known[path.name] = {"file": name, "bytes": size} | record | session.provenance()
    artifacts.write_json(folder / RECORD, known)
    print(f"{folder / name} ({size:,} bytes)", *proof.summary_lines(record), sep="\n  ")


def evaluated_on(config: Config, adapter: str | Path) -> Device:
    """This machine's device, in the precision that the run of the adapter has recorded."""
    device = devices.choose_device(config)
    with contextlib.suppress(OSError, KeyError):
        precision = artifacts.read_json(Path(adapter).parent / "summary.json")["precision"]
        return Device(device.name, precision, "the precision of the run")
    return device


def check_export(
    config: Config, adapter: str | Path, folder: Path, kinds: Sequence[str], device: Device
) -> "PreTrainedTokenizerBase":
    """The tokenizer. Raises ValueError or OSError for what cannot be exported, before it starts."""
    check_packages(kinds)
    if config.eval.load_in_4bit:
        raise ValueError(
            "eval.load_in_4bit evaluates an adapter beside 4-bit weights, into which it cannot be "
            "merged; export with --set eval.load_in_4bit=false, which is another model."
        )
    adapter_check.check_adapter(adapter, config)
    tokenizer = models.load_tokenizer(config)
    if not tokenizer.chat_template:
        raise ValueError("The tokenizer has no chat template; set model.chat_template.")
    if isinstance(tokenizer.chat_template, dict):  # an adapter's own, beside the one with markers
        tokenizer.chat_template = tokenizer.get_chat_template()
    base = adapter_check.base_without_weights(config)
    if set(kinds) - {MERGED}:
        gguf_file.check_supported(base.config, tokenizer)
    sizes = [BYTES[kind] for kind in {"f16", *kinds} - {MERGED}] if set(kinds) - {MERGED} else []
    check_disk(folder, base.num_parameters() * (ITEM[device.dtype] + sum(sizes)))
    return tokenizer


def check_packages(kinds: Sequence[str]) -> None:
    """Raises ValueError if a package that writes one of `kinds` is not installed."""
    if set(kinds) - {MERGED} and importlib.util.find_spec("gguf") is None:
        raise ValueError("Exporting GGUF needs the package gguf: `pip install gguf==0.19.0`.")
    if "q4_k_m" in kinds and not llama_cpp.is_installed():
        raise ValueError(f"q4_k_m needs llama.cpp's own quantiser: `{llama_cpp.INSTALL}`.")


def check_disk(folder: Path, needed: float) -> None:
    """Raises OSError if the disk of `folder` has less than `needed` bytes left."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OSError(
            f"The export needs {needed / 1e9:,.1f} GB of disk and {existing} has {free / 1e9:,.1f} "
            "GB left; free some space, or choose another --out."
        )


def marked_template(
    config: Config, adapter: str | Path, tokenizer: "PreTrainedTokenizerBase"
) -> str:
    """The chat template from which the adapter was trained, if it was saved beside it."""
    own = {}
    with contextlib.suppress(ValueError):  # peft alone saves no tokenizer
        saved = models.tokenizer_of(str(adapter), config.model.adapter_revision, config)
        own = saved.chat_template
    named = own if isinstance(own, dict) else {}
    return named.get("training", tokenizer.chat_template)


def sample_prompts(config: Config, count: int) -> list[dict]:
    """`count` dev prompts at equal distances: the tiny model's own, else configs/'s."""
    embedded = config.eval.prompts.startswith(sources.EMBEDDED)
    name = f"{sources.EMBEDDED}dev" if embedded else overlap.DEV_PROMPTS
    prompts = ifeval_files.load_prompts(*sources.fetch(name, None, config, "dataset"))
    return [prompts[i * len(prompts) // count] for i in range(count)]


def save_merged(
    model: Any,
    tokenizer: "PreTrainedTokenizerBase",
    folder: Path,
    config: Config,
    adapter: str | Path,
) -> None:
    """Write safetensors, tokenizer, generation config with all stop ids, and a card."""
    from transformers import GenerationConfig

    stops = models.stop_ids(tokenizer, model)
    model.generation_config = GenerationConfig(
        eos_token_id=stops, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    revision, named = config.model.base_revision, sources.content(config.model.base, config)
    data = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    card = CARD.format(
        data=json.dumps(data | ({} if named else {"base_model": config.model.base})),
        base=config.model.base,
        revision=f" at revision {revision}" if revision else "",
        adapter=adapter if sources.locate(str(adapter)) is None else Path(adapter).name,
        precision=str(model.dtype).removeprefix("torch."),
        stops=", ".join(f"`{token}`" for token in tokenizer.convert_ids_to_tokens(stops)),
        record=RECORD,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
