"""Write a merged model folder as a GGUF file, which llama.cpp and Ollama read.

llama.cpp's own converter is published in no package of its project. This is the part of it that
Qwen2, Qwen3 and Llama need: their settings, a byte-level BPE vocabulary, and the tensors, whose
names are those of the package `gguf`. Blocks of Q4_K_M are quantised by llama.cpp itself.
"""

import ctypes
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import gguf
    import numpy as np
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

QUANTIZATIONS = ("f16", "q8_0", "q4_k_m")
ARCHITECTURES = ("qwen2", "qwen3", "llama")  # in transformers and in llama.cpp
# llama.cpp's name of a way to split text before the merges, by a part that only it has.
PRE_TOKENIZERS = {
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*": "qwen2",
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*": "llama-bpe",
    "'individual_digits': True": "smollm",
}
# Rows whose length is no multiple of 256 get the type that llama.cpp falls back to.
FALLBACK = {"Q4_K": "Q5_0", "Q6_K": "Q8_0", "Q8_0": "F16"}


def check_supported(shape: "PreTrainedConfig", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raises ValueError for an architecture or a tokenizer that is not written here."""
    rope = (getattr(shape, "rope_parameters", None) or {}).get("rope_type", "default")
    if shape.model_type not in ARCHITECTURES or rope != "default":
        raise ValueError(
            f"The GGUF writer knows {', '.join(ARCHITECTURES)} with default rotary positions, not "
            f"{shape.model_type} with {rope} ones; export it as merged, and convert that folder "
            "with llama.cpp's convert_hf_to_gguf.py."
        )
    split_name(tokenizer)


def split_name(tokenizer: "PreTrainedTokenizerBase") -> str:
    """llama.cpp's name of the tokenizer's pre-tokenizer. Raises ValueError."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    regexes = str(parts["pre_tokenizer"]).replace("\\\\", "\\")
    found = [name for part, name in PRE_TOKENIZERS.items() if part in regexes]
    if parts["model"]["type"] != "BPE" or len(found) != 1:
        raise ValueError(
            "The GGUF writer knows byte-level BPE with the pre-tokenizers "
            f"{', '.join(PRE_TOKENIZERS.values())}, not this tokenizer; export the model as "
            "merged, and convert that folder with llama.cpp's convert_hf_to_gguf.py."
        )
    return found[0]


def write_gguf(folder: Path, target: Path, quantization: str, name: str) -> None:
    """Write the model in `folder` (safetensors, tokenizer) to `target`, one tensor at a time.

    Raises ValueError for a model that the writer does not know; Q4_K_M needs xllamacpp.
    """
    import gguf
    from transformers import AutoConfig, AutoTokenizer

    shape = AutoConfig.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    check_supported(shape, tokenizer)
    writer = gguf.GGUFWriter(target, shape.model_type)
    _add_settings(writer, shape, name, quantization)
    _add_vocabulary(writer, tokenizer, shape.vocab_size)
    choose, encode = _types(quantization, shape)
    plan = []
    for label, array in _tensors(folder, shape):
        kind = gguf.GGMLQuantizationType[choose(label, array.shape)]
        size = gguf.quants.quant_shape_to_byte_shape(array.shape, kind)
        writer.add_tensor_info(label, array.shape, array.dtype, math.prod(size), kind)
        plan.append(kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for kind, (_, array) in zip(plan, _tensors(folder, shape), strict=True):
        writer.write_tensor_data(encode(array, kind))
    writer.close()


def stop_in(file: Path) -> int:
    """The id of the stop token in a GGUF file."""
    import gguf

    return int(gguf.GGUFReader(file).fields[gguf.Keys.Tokenizer.EOS_ID].contents())


def _add_settings(
    writer: "gguf.GGUFWriter", shape: "PreTrainedConfig", name: str, quantization: str
) -> None:
    import gguf

    width = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    writer.add_type("model")
    writer.add_name(name)
    writer.add_block_count(shape.num_hidden_layers)
    writer.add_context_length(shape.max_position_embeddings)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(float(shape.rope_parameters["rope_theta"]))
    writer.add_layer_norm_rms_eps(shape.rms_norm_eps)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{quantization.upper()}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_vocabulary(
    writer: "gguf.GGUFWriter", tokenizer: "PreTrainedTokenizerBase", size: int
) -> None:
    """Tokens up to the number of the model's embeddings, merges, stop and chat template."""
    import gguf

    added, by_id = tokenizer.added_tokens_decoder, {i: t for t, i in tokenizer.get_vocab().items()}
    kinds = {
        i: gguf.TokenType.CONTROL if token.special else gguf.TokenType.USER_DEFINED
        for i, token in added.items()
    }
    kinds |= dict.fromkeys(set(range(size)) - by_id.keys(), gguf.TokenType.UNUSED)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split_name(tokenizer))
    writer.add_token_list([by_id.get(i, f"[PAD{i}]") for i in range(size)])
    writer.add_token_types([kinds.get(i, gguf.TokenType.NORMAL) for i in range(size)])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)  # what a template calls bos_token
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)  # the chat template writes one if the model wants it
    writer.add_chat_template(tokenizer.chat_template)


def _tensors(folder: Path, shape: "PreTrainedConfig") -> Iterator[tuple[str, "np.ndarray"]]:
    """(llama.cpp's name, values in float32) of the weights, one at a time."""
    import gguf
    from safetensors import safe_open

    kind = gguf.MODEL_ARCH[shape.model_type.upper()]
    names = gguf.get_tensor_name_map(kind, shape.num_hidden_layers)
    heads = {"q_proj": shape.num_attention_heads, "k_proj": shape.num_key_value_heads}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118, it is no dict
                array = file.get_tensor(key).float().numpy()
                part = key.split(".")[-2]
                if shape.model_type == "llama" and part in heads:
                    array = _interleave(array, heads[part])
                yield names.get_name(key, try_suffixes=(".weight", ".bias")), array


def _interleave(array: "np.ndarray", heads: int) -> "np.ndarray":
    """Rows in the order of llama.cpp's Llama, which rotates neighbours, not halves of a head."""
    halves = array.reshape(heads, 2, -1, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


def _types(
    quantization: str, model: "PreTrainedConfig"
) -> tuple[Callable[..., str], Callable[..., Any]]:
    """How a tensor's type follows from its name and shape, and how it is encoded."""
    encode = _quantiser() if quantization == "q4_k_m" else _encode

    def choose(name: str, shape: tuple[int, ...]) -> str:
        if len(shape) == 1:
            return "F32"
        kind = {"f16": "F16", "q8_0": "Q8_0", "q4_k_m": q4_k_m_type(name, model)}[quantization]
        while shape[-1] % {"Q4_K": 256, "Q6_K": 256, "Q8_0": 32, "Q5_0": 32}.get(kind, 1):
            kind = FALLBACK.get(kind, "F16")
        return kind

    return choose, encode


def q4_k_m_type(name: str, model: "PreTrainedConfig") -> str:
    """The type that llama.cpp's Q4_K_M gives a matrix: six bits where errors cost most."""
    output = "token_embd.weight" if model.tie_word_embeddings else "output.weight"
    if not name.startswith("blk."):
        return "Q6_K" if name == output else "Q4_K"
    layers, layer = model.num_hidden_layers, int(name.split(".")[1])
    eighth = layers // 8
    more = layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
    return "Q6_K" if more and ("attn_v" in name or "ffn_down" in name) else "Q4_K"


def _encode(array: "np.ndarray", kind: Any) -> "np.ndarray":
    import gguf

    return gguf.quants.quantize(array, kind)


def _quantiser() -> Callable[["np.ndarray", Any], "np.ndarray"]:
    """llama.cpp's `ggml_quantize_chunk`, from xllamacpp's library."""
    import gguf
    import numpy as np
    from xllamacpp import xllamacpp

    chunk = ctypes.CDLL(xllamacpp.__file__).ggml_quantize_chunk
    chunk.restype, long, pointer = ctypes.c_size_t, ctypes.c_int64, ctypes.c_void_p
    chunk.argtypes = [ctypes.c_int, pointer, pointer, long, long, long, pointer]

    def encode(array: "np.ndarray", kind: Any) -> "np.ndarray":
        if not kind.name.startswith("Q"):
            return _encode(array, kind)
        array = np.ascontiguousarray(array)
        size = gguf.quants.quant_shape_to_byte_shape(array.shape, kind)
        out = np.empty(size, np.uint8)
        chunk(kind, array.ctypes.data, out.ctypes.data, 0, *array.shape, None)
        return out

    return encode
