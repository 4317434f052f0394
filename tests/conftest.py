"""Shared fixtures: the tiny model's tokenizer without pretraining, and a small offline config."""

import copy
import os
from pathlib import Path

import pytest
from tiny import TINY

from atlas_lib import artifacts
from atlas_lib.config import load_config
from atlas_lib.standin import corpus, tiny_model
from tools.npm_tokenizers import tokenizer_cache, tokenizer_folder


def pytest_runtest_setup(item):
    if os.environ.get("ATLAS_TEST_DOWNLOADS") == "1":
        return
    if item.get_closest_marker("network"):
        pytest.skip("NOT TESTED: it downloads from a package registry, as `make test-all` may")
    if item.get_closest_marker("long"):
        pytest.skip("NOT TESTED: a long test, which `make test-all` runs")


@pytest.fixture(autouse=True)
def kaggle_input(tmp_path, monkeypatch) -> Path:
    """A folder for /kaggle/input, absent until a test fills it."""
    monkeypatch.setattr(artifacts, "KAGGLE_INPUT", tmp_path / "kaggle-input")
    return tmp_path / "kaggle-input"


@pytest.fixture(scope="session")
def offline_config():
    return load_config("sft_qwen05b", "offline")


@pytest.fixture(scope="session")
def tiny_config():
    return load_config("sft_qwen05b", "offline", TINY)


@pytest.fixture(scope="session")
def trained_tokenizer(offline_config):
    """A BPE with ChatML's tokens and Qwen2.5's template, trained on the tiny model's corpus."""
    options = offline_config.offline
    texts = corpus.plain_text(options.corpus_seed, 300, options.taught)
    return tiny_model.train_tokenizer(texts, options.vocab_size)


@pytest.fixture
def tokenizer(trained_tokenizer):
    """A copy whose chat template a test may change."""
    return copy.deepcopy(trained_tokenizer)


@pytest.fixture(scope="session")
def qwen_folder():
    """Qwen2.5's real tokenizer files; fetched only where downloads are allowed."""
    if not tokenizer_cache().is_dir() and os.environ.get("ATLAS_TEST_DOWNLOADS") != "1":
        pytest.skip("NOT TESTED: Qwen's real tokenizer is fetched by `make test-all` only")
    return tokenizer_folder()
