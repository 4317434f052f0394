"""Export a trained model for transformers, vLLM, llama.cpp or Ollama, and prove it the same.

python -m tools.export runs/sft_qwen05b --to merged
python -m tools.export runs/sft_qwen05b --to gguf --quantize q8_0

The first argument is the OUT of a run, or an adapter: a folder or a hub id. Exit codes: 0 proved,
1 written but not proved (the file is named .unproven), 2 it cannot be exported, nothing is written.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from atlas_lib import artifacts, sources, stages
from atlas_lib.config import load_config, parse_assignments
from atlas_lib.evaluate import adapter_check
from atlas_lib.export import gguf_file, package
from atlas_lib.schema import Config

TOKENIZER_CONFIG = "tokenizer_config.json"  # beside an adapter that brings its own


def main() -> None:
    args = parse_arguments()
    try:
        config, adapter, folder = resolve(args.source, parse_assignments(args.set))
        kind = package.MERGED if args.to == package.MERGED else args.quantize
        proved = package.export_model(config, adapter, Path(args.out or folder), [kind])
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(0 if proved else 1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("source", metavar="OUT_OR_ADAPTER")
    parser.add_argument("--to", choices=(package.MERGED, "gguf"), required=True)
    parser.add_argument("--quantize", choices=gguf_file.QUANTIZATIONS, default="f16")
    parser.add_argument("--out", default="", help="folder of the export, by default OUT/export")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    return parser.parse_args()


def resolve(source: str, overrides: dict[str, Any]) -> tuple[Config, str | Path, Path]:
    """(config, adapter, default folder of the export) of a run's OUT, or of an adapter."""
    place, overrides = sources.locate(source), {"run.require_gpu": False} | overrides
    for out in (place, place.parent.parent) if place else ():
        stage = out / stages.SFT_TRAIN
        if (stage / artifacts.MANIFEST).is_file():
            given = artifacts.read_manifest(stage)["parameters"]
            changed = given["SET"] | overrides
            config = load_config(given["CONFIG"], given["OVERLAY"], changed)
            artifacts.check(stage, config)
            return config, stage / "adapter", out / "export"
    return of_adapter(place or source, overrides), place or source, Path("export")


def of_adapter(adapter: str | Path, overrides: dict[str, Any]) -> Config:
    """The recipe's config, with the base and the tokenizer of an adapter that no run holds."""
    from peft import PeftConfig

    folder = adapter_check.local_folder(
        adapter, overrides.get("model.adapter_revision"), [adapter_check.SETTINGS, TOKENIZER_CONFIG]
    )
    settings = PeftConfig.from_pretrained(folder)
    base, revision = settings.base_model_name_or_path, settings.revision
    own = (folder / TOKENIZER_CONFIG).is_file()
    named = {"model.base": base, "model.base_revision": revision}
    named |= {"model.tokenizer": str(adapter) if own else base}
    named |= {"model.tokenizer_revision": None if own else revision}
    return load_config("sft_qwen05b", "", named | overrides)


if __name__ == "__main__":
    main()
