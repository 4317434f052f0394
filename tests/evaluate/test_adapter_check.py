"""An adapter that does not belong to the base is refused before any model responds."""

import json
import pickle
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
from checks import refusal
from ifeval_cases import random_adapter
from safetensors.torch import load_file, save_file
from tiny import TINY

from atlas_lib import devices, models, sources
from atlas_lib.config import load_config
from atlas_lib.evaluate import adapter_check, grid

CPU = devices.Device("cpu", "float32", "test")
PROMPTS = [{"key": "1", "prompt": "Name a tea."}]


def configured(**keys):
    given = {f"model.{key}": value for key, value in keys.items()}
    return load_config("sft_qwen05b", "offline", TINY | given)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return random_adapter(configured(), tmp_path_factory.mktemp("trained"))


@pytest.fixture
def adapter(trained, tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(trained, tmp_path / "adapter"))


def change_weights(change):
    def plant(folder):
        weights = load_file(folder / "adapter_model.safetensors")
        save_file(change(weights), folder / "adapter_model.safetensors")

    return plant


def change_settings(**values):
    def plant(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | values), "utf-8")

    return plant


def keep_first_half(weights):
    return dict(list(weights.items())[: len(weights) // 2])


def remove(name):
    return lambda folder: (folder / name).unlink()


def pickle_weights(folder):
    """A pickle that would run code where it is loaded without care."""
    remove("adapter_model.safetensors")(folder)
    with (folder / "adapter_model.bin").open("wb") as file:
        pickle.dump(Touch(folder / "ran"), file)


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def cut(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


FAULTS = {
    "keys renamed": (
        change_weights(lambda w: {key.replace("lora_", "LoRA_"): w[key] for key in w}),
        "32 weights are missing or have no place, such as base_model.model.model.layers.0.",
    ),
    "half of the keys": (change_weights(keep_first_half), "8 weights are missing"),
    "fewer target_modules": (change_settings(target_modules=["q_proj"]), "12 weights are missing"),
    "no such target_modules": (change_settings(target_modules=["c_attn"]), "c_attn"),
    "another rank": (change_settings(r=3), "instead of (3, 128)"),
    "not finite": (
        change_weights(lambda w: {k: t.log() if "lora_B" in k else t for k, t in w.items()}),
        "has 8 weights with values that are not finite",
    ),
    "another base": (
        change_settings(base_model_name_or_path="Qwen/Qwen2.5-7B"),
        "was trained on Qwen/Qwen2.5-7B, not on embedded:base: set model.base=Qwen/Qwen2.5-7B, or "
        "model.adapter_base=Qwen/Qwen2.5-7B",
    ),
    "no settings": (remove("adapter_config.json"), "has no adapter_config.json"),
    "no weights": (remove("adapter_model.safetensors"), "has no adapter_model.safetensors"),
    "pickled": (pickle_weights, "has no adapter_model.safetensors"),
    "damaged settings": (
        lambda folder: (folder / "adapter_config.json").write_text("{"),
        "cannot be used",
    ),
    "cut weights": (cut, "cannot be used"),
}


@pytest.mark.parametrize(("plant", "words"), FAULTS.values(), ids=FAULTS)
def test_an_adapter_that_does_not_fit_is_refused_before_anything_is_generated(
    plant, words, adapter, tmp_path, monkeypatch
):
    plant(adapter)
    monkeypatch.setattr(models, "load_weights", lambda *_: pytest.fail("a model was loaded"))
    sentence = refusal(grid.generate_all, configured(), CPU, adapter, PROMPTS, tmp_path / "out")
    assert sentence.startswith(f"The adapter {adapter} ")
    assert words in sentence
    assert not (tmp_path / "out").exists()
    assert not (adapter / "ran").exists()


def test_an_adapter_that_is_nowhere_is_named(tmp_path):
    sentence = refusal(adapter_check.check_adapter, tmp_path / "nowhere", configured())
    assert str(tmp_path / "nowhere") in sentence
    assert "neither a hub id nor an existing file or folder" in sentence


def test_another_base_has_to_be_stated(adapter):
    change_settings(base_model_name_or_path="my/base")(adapter)
    adapter_check.check_adapter(adapter, configured(adapter_base="my/base"))
    stated = configured(adapter_base="your/base")
    assert "my/base, not on your/base" in refusal(adapter_check.check_adapter, adapter, stated)


def test_the_base_may_be_a_local_folder_by_any_path(adapter, tmp_path, monkeypatch):
    base, _ = sources.fetch("embedded:base", None, configured())
    shutil.copytree(base, tmp_path / "models" / "mine")
    change_settings(base_model_name_or_path=str(tmp_path / "models" / "mine"))(adapter)
    monkeypatch.chdir(tmp_path)
    adapter_check.check_adapter("adapter", configured(base="models/mine"))


@pytest.mark.parametrize(
    "options",
    [{"bias": "all"}, {"target_modules": ["embed_tokens", "up_proj"]}, {"r": 4}],
)
def test_what_atlas_saves_fits(options, tmp_path):
    given = TINY | {f"lora.{key}": value for key, value in options.items()}
    config = load_config("sft_qwen05b", "offline", given)
    adapter_check.check_adapter(random_adapter(config, tmp_path), config)


def test_an_adapter_of_the_hub_is_checked_in_the_cache(adapter, tmp_path, monkeypatch):
    repository = tmp_path / "cache" / "models--my--adapter"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("f" * 40)
    shutil.copytree(adapter, repository / "snapshots" / ("f" * 40))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    adapter_check.check_adapter("my/adapter", configured())
    assert adapter_check.is_adapter("my/adapter", configured())
    assert "cannot be used" in refusal(adapter_check.check_adapter, "other/adapter", configured())
    cut(repository / "snapshots" / ("f" * 40))
    assert "cannot be used" in refusal(adapter_check.check_adapter, "my/adapter", configured())
