"""Loading the tokenizer and the weights; the precision rules on a CPU are only dtypes."""

import contextlib
import json
import shutil
from pathlib import Path

import bitsandbytes
import pytest
import stub_hub
import torch
import transformers
from checks import refusal, run_python
from safetensors.torch import load_file, save_file
from tiny import TINY

from atlas_lib import devices, models, sources
from atlas_lib.config import load_config
from atlas_lib.evaluate import grid

CPU = devices.Device("cpu", "float32", "test")


def test_the_base_is_really_in_4_bit(tiny_config):
    packed = models.load_weights("base", tiny_config, CPU, in_4bit=True)
    layers = [m for m in packed.modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    assert len(layers) == 14  # seven linears in each of two layers
    assert {m.weight.quant_type for m in layers} == {"nf4"}
    assert all(m.weight.quant_state.nested for m in layers)


@pytest.mark.parametrize("in_child", [False, True])
def test_cudnn_attention_is_off_on_a_gpu(in_child, tiny_config):
    """Notebook 03 and the processes of 04 load weights in different ways."""
    gpu = devices.Device("cuda", "bfloat16", "test")
    torch.backends.cuda.enable_cudnn_sdp(True)
    with contextlib.suppress(ValueError):  # there is no GPU to put the weights on
        if in_child:
            grid.load_model("base", tiny_config, gpu, "")
        else:
            models.load_weights("base", tiny_config, gpu, in_4bit=True)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    models.load_weights("base", tiny_config, CPU, in_4bit=False)
    assert torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize("key", ["model.eos_token", "model.pad_token"])
@pytest.mark.parametrize("token", ["<|eot_id|>", None])
def test_eos_and_pad_must_be_two_known_tokens(folder, key, token):
    other = {"model.eos_token": "<|endoftext|>", "model.pad_token": "<|im_end|>"}[key]
    config = load_config("sft_qwen05b", "offline", TINY | {key: token or other})
    sentence = refusal(models.load_tokenizer, config)
    assert "eos and pad tokens are" in sentence
    assert "set model.eos_token and model.pad_token" in sentence


def test_variables_of_the_template_hold_for_every_reader(tiny_config, tmp_path):
    (tmp_path / "chat.jinja").write_text("{{ style }}{{ messages[0].content }}", "utf-8")
    given = {"model.chat_template": str(tmp_path / "chat.jinja")}
    config = load_config(
        "sft_qwen05b", "offline", given | {"model.chat_template_kwargs.style": "a"}
    )
    tokenizer = models.load_tokenizer(config)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "b"}], tokenize=False) == "ab"


def test_decoding_stops_at_the_ends_of_tokenizer_and_model(tiny_config):
    weights = models.load_weights("base", tiny_config, CPU, in_4bit=False)
    tokenizer = models.load_tokenizer(tiny_config)
    ends = tokenizer.convert_ids_to_tokens(models.stop_ids(tokenizer, weights))
    assert ends == ["<|im_end|>", "<|endoftext|>"]
    weights.generation_config.eos_token_id = None
    assert models.stop_ids(tokenizer, weights) == [tokenizer.eos_token_id]


@pytest.fixture
def folder(tiny_config, tmp_path) -> Path:
    """A local model folder that a test may damage."""
    base, _ = sources.fetch("embedded:base", None, tiny_config)
    return Path(shutil.copytree(base, tmp_path / "mine"))


def local(folder):
    given = {"model.base": str(folder), "model.tokenizer": str(folder)}
    return load_config("sft_qwen05b", "offline", TINY | given)


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def drop_a_weight(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def change_settings(**values):
    def plant(folder):
        settings = json.loads((folder / "config.json").read_text("utf-8")) | values
        (folder / "config.json").write_text(json.dumps(settings), "utf-8")

    return plant


FAULTS = {
    "empty": (empty, "config.json"),
    "another vocab_size": (change_settings(vocab_size=1200), "('model.embed_tokens.weight', "),
    "more layers": (
        change_settings(num_hidden_layers=3, layer_types=["full_attention"] * 3),
        "such as model.layers.2.",
    ),
    "a missing weight": (drop_a_weight, "such as model.layers.1.mlp.up_proj.weight"),
    "cut weights": (cut, "model.safetensors cannot be loaded (Error while deserializing header"),
}


@pytest.mark.parametrize("in_4bit", [False, True])
@pytest.mark.parametrize(("plant", "words"), FAULTS.values(), ids=FAULTS)
def test_a_damaged_folder_is_refused(plant, words, in_4bit, folder):
    plant(folder)
    sentence = refusal(models.load_weights, "base", local(folder), CPU, in_4bit)
    assert sentence.startswith(str(folder))
    assert words in sentence


def test_a_folder_without_a_tokenizer_is_refused(folder):
    empty(folder)
    sentence = refusal(models.load_tokenizer, local(folder))
    assert sentence.startswith(f"{folder} cannot be loaded ")
    assert "needs config.json, a tokenizer" in sentence


def test_code_in_a_models_folder_is_never_run_nor_offered(folder, monkeypatch):
    """Each class that transformers could load from code in the folder: config, model, tokenizer."""
    code = {name: f"evil.{name}" for name in ("AutoConfig", "AutoModelForCausalLM")}
    code |= {"AutoTokenizer": ["evil.AutoTokenizer", None]}
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')", "utf-8")
    change_settings(model_type="evil", auto_map=code)(folder)
    tokenizer = {"tokenizer_class": "Evil", "auto_map": code}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer), "utf-8")
    asked = []
    monkeypatch.setattr("builtins.input", lambda text: asked.append(text) or "y")
    for load in (
        lambda: models.load_tokenizer(local(folder)),
        lambda: models.load_weights("base", local(folder), CPU, False),
    ):
        sentence = refusal(load)
        assert "contains custom code" in sentence
        assert "runs no code" in sentence
    assert not asked
    assert not (folder / "ran").exists()


def test_a_hub_that_stalls_is_not_called_a_damaged_folder(folder, tmp_path):
    code = (
        "import sys; from atlas_lib import models, devices\n"
        "from atlas_lib.config import load_config\n"
        "given = {'model.base': 'team/m', 'model.base_revision': sys.argv[1]}\n"
        "config = load_config('sft_qwen05b', '', given)\n"
        "cpu = devices.Device('cpu', 'float32', 'test')\n"
        "models.load_weights('base', config, cpu, False)"
    )
    with stub_hub.serve() as hub:
        hub.hold("team/m", private=False)
        hub.files["team/m"] = {path.name: path.read_bytes() for path in folder.iterdir()}
        hub.plant("stall")
        environment = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": stub_hub.TOKEN}
        environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
        environment |= {"HF_HUB_DOWNLOAD_TIMEOUT": "1"}
        done = run_python("-c", code, stub_hub.COMMIT, **environment)
    sentence = done.stderr.splitlines()[-1]
    assert sentence.startswith("ValueError: team/m cannot be loaded")
    assert sentence.endswith("the hub stopped answering: run it again, complete files are kept.")


def test_a_gpu_whose_memory_is_taken_is_not_called_a_damaged_folder(folder, monkeypatch):
    full = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has 5.00 MiB free."

    def load(*_, **options):
        raise torch.OutOfMemoryError(full)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    sentence = refusal(models.load_weights, "base", local(folder), CPU, False)
    assert "CUDA out of memory" in sentence
    assert "end the process that uses the GPU's memory (`nvidia-smi` lists them)" in sentence
    assert "config.json" not in sentence
