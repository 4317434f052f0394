"""GGUF files beside those of llama.cpp's own converter, and decoded by llama.cpp: random weights.

Covers the architectures and pre-tokenizers that no trained model of the tests has.
"""

import subprocess
import sys

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config, Qwen3Config

from atlas_lib import devices
from atlas_lib.export import gguf_file, proof
from tools import npm_tokenizers, pinned_file

pytestmark = pytest.mark.network
# llama.cpp's converter is in the sources of this package, and in no wheel.
DOWNLOAD = [part for part in pinned_file.PIP_DOWNLOAD if not part.startswith("--only-binary")]
DOWNLOAD += ["--no-binary=llama-cpp-python", "llama-cpp-python==0.3.36"]
CONVERTER = "llama_cpp_python-0.3.36/vendor/llama.cpp/convert_hf_to_gguf.py"
SHA256 = "e9a1da876330bbce9687541ab31736542a01b4ac43c6686126514a50f122fb7f"
SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 128320}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
WIDER = SHAPE | {"vocab_size": 151936, "head_dim": 32}
MODELS = {
    "qwen2": ("qwen2_5", Qwen2Config(**SHAPE | {"vocab_size": 151936}, tie_word_embeddings=True)),
    "qwen3": ("qwen3", Qwen3Config(**WIDER, rope_parameters={"rope_theta": 1e6})),
    "llama": ("llama3_2", LlamaConfig(**SHAPE, rms_norm_eps=1e-5)),
}


@pytest.fixture(scope="module", params=MODELS)
def folder(request, tmp_path_factory):
    """A model with a real tokenizer, whose weights float16 represents."""
    name, shape = MODELS[request.param]
    tokenizer = AutoTokenizer.from_pretrained(npm_tokenizers.tokenizer_folder(name))
    tokenizer.pad_token = tokenizer.pad_token or "<|reserved_special_token_0|>"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shape).half().float()
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ours(folder):
    gguf_file.write_gguf(folder, folder / "ours.gguf", "f16", "random")
    return folder / "ours.gguf"


@pytest.fixture(scope="module")
def converter(tmp_path_factory):
    return pinned_file.fetch_pinned(DOWNLOAD, CONVERTER, SHA256, tmp_path_factory.mktemp("sources"))


# Settings that need not be equal, and those that only one of the two files has.
FREE = {"GGUF.kv_count", "general.name", "general.size_label"}
FREE |= {"tokenizer.ggml.add_bos_token"}  # ours: no, as the chat template writes one
FREE |= {f"tokenizer.ggml.add_{name}_token" for name in ("eos", "sep")}  # false by default
DEFAULTS = ("vocab_size", "rope.dimension_count", "attention.key_length", "attention.value_length")


def test_a_file_is_that_of_llama_cpps_converter(ours, converter):
    target = ours.with_name("theirs.gguf")
    command = [sys.executable, converter, ours.parent, "--outtype", "f16", "--outfile", target]
    subprocess.run(command, check=True, capture_output=True)
    files = [gguf.GGUFReader(path) for path in (ours, target)]
    first, second = ({tensor.name: tensor for tensor in file.tensors} for file in files)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.tensor_type == second[name].tensor_type, name
        assert np.array_equal(tensor.data, second[name].data), name
    values, theirs = ({k: f.contents() for k, f in file.fields.items()} for file in files)
    free = FREE | {f"{values['general.architecture']}.{name}" for name in DEFAULTS}
    kinds = [each.pop("tokenizer.ggml.token_type") for each in (values, theirs)]
    differing = {pair for pair in zip(*kinds, strict=True) if pair[0] != pair[1]}
    # Tokens such as <|fim_pad|>, which the tokenizer does not call special, and llama.cpp does.
    assert differing <= {(gguf.TokenType.USER_DEFINED, gguf.TokenType.CONTROL)}
    keys = sorted((values.keys() | theirs.keys()) - free)
    assert [key for key in keys if values.get(key) != theirs.get(key)] == []


def test_llama_cpp_renders_and_decodes_as_transformers(folder, ours):
    """Llama's template trims texts, and llama.cpp's `trim` leaves non-breaking spaces."""
    pytest.importorskip("xllamacpp", reason="NOT TESTED: xllamacpp is not installed")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    asked = [{"prompt": chat[-1]["content"]} for chat in proof.random_chats(proof.PROMPTS)]
    device = devices.Device("cpu", "float32", "test")
    reference = proof.observe(model, tokenizer, tokenizer.chat_template, asked, device)
    found = proof.prove_gguf(ours, "f16", reference, None)
    first = found["prompts"]["first_difference"] or {}
    assert first.get("found", "\u00a0").startswith("\u00a0")
    assert found["token_ids"]["first_difference"] is None
    assert found["greedy"]["equal"] + found["greedy"]["ties"] == proof.PROMPTS
    assert found["log_p_difference"] < proof.TIE["float32"]
