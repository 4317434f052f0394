"""The exported model is the evaluated one, by transformers and by llama.cpp; faults are found."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from checks import refusal, run_python
from ifeval_cases import random_adapter
from safetensors.torch import load_file, save_file
from tiny import TINY

from atlas_lib import artifacts, devices, models
from atlas_lib.config import load_config
from atlas_lib.evaluate import grid
from atlas_lib.export import gguf_file, llama_cpp, modelfile, package, proof
from atlas_lib.standin import tiny_model
from tools import smollm2

LLAMA = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None,
    reason="NOT TESTED: llama.cpp (xllamacpp of requirements-dev.txt) is not installed",
)
DATA = ("--set=eval.prompts=embedded:ifeval", "--set=eval.prompts_revision=null")
GO = Path(__file__).parents[1] / "helpers" / "render.go"


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Of a tiny base that ends turns where it would write a full stop: it has been taught none."""
    tiny, folder = load_config("sft_qwen05b", "offline", TINY), tmp_path_factory.mktemp("base")
    shutil.copytree(tiny_model.build("base", tiny), folder, dirs_exist_ok=True)
    weights = load_file(folder / "model.safetensors")
    tokenizer, row = models.load_tokenizer(tiny), weights["model.embed_tokens.weight"]
    row[tokenizer.eos_token_id] = 1.05 * row[tokenizer.convert_tokens_to_ids(".")]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return load_config("sft_qwen05b", "offline", TINY | {"model.base": str(folder)})


@pytest.fixture(scope="module")
def adapter(config, tmp_path_factory):
    return random_adapter(config, tmp_path_factory.mktemp("adapter"))


@pytest.fixture(scope="module")
def exported(config, adapter, tmp_path_factory):
    """(the merged folder, what the evaluated model gives)."""
    device, tokenizer = devices.choose_device(config), models.load_tokenizer(config)
    model = grid.load_model("SFT", config, device, adapter)
    template = package.marked_template(config, adapter, tokenizer)
    asked = package.sample_prompts(config, proof.PROMPTS)
    reference = proof.observe(model, tokenizer, template, asked, device)
    folder = tmp_path_factory.mktemp("export") / package.MERGED
    package.save_merged(model, tokenizer, folder, config, adapter)
    return folder, reference


@pytest.fixture
def merged(exported, tmp_path):
    """A copy of the merged folder that a test may damage."""
    return Path(shutil.copytree(exported[0], tmp_path / package.MERGED))


def judged(form: str, folder: Path, reference, config) -> list[str]:
    """The failures of the proof of a merged folder, or of the GGUF file made of it."""
    if form == "merged":
        return list(proof.failures(proof.prove_merged(folder, reference)))
    file = folder.parent / "model-f16.gguf"
    gguf_file.write_gguf(folder, file, "f16", "tiny")
    return list(proof.failures(proof.prove_gguf(file, "f16", reference, config)))


FORMS = ["merged", pytest.param("gguf", marks=LLAMA)]


@pytest.mark.parametrize("form", FORMS)
def test_the_exported_model_is_proved(form, merged, exported, config):
    assert judged(form, merged, exported[1], config) == []


def edit_json(name: str, **values):
    def plant(folder: Path, config) -> None:
        path = folder / name
        artifacts.write_json(path, artifacts.read_json(path) | values)

    return plant


def change_stop(folder: Path, config) -> None:
    """In both places from which programs read it: ends of turns are other tokens now."""
    edit_json("generation_config.json", eos_token_id=[5])(folder, config)
    edit_json("tokenizer_config.json", eos_token="<|im_start|>")(folder, config)


def add_newline(folder: Path, config) -> None:
    with (folder / "chat_template.jinja").open("a", encoding="utf-8") as file:
        file.write("{{ '\\n' }}")


def transpose(folder: Path, config) -> None:
    path = folder / "model.safetensors"
    weights, name = load_file(path), "model.layers.0.self_attn.o_proj.weight"
    save_file(weights | {name: weights[name].T.contiguous()}, path, {"format": "pt"})


def leave_adapter_out(folder: Path, config) -> None:
    base = models.load_weights("base", config, devices.Device("cpu", "float32", ""), False)
    kept = (folder / "generation_config.json").read_bytes()
    base.save_pretrained(folder)
    (folder / "generation_config.json").write_bytes(kept)


def change_rope(folder: Path, config) -> None:
    parameters = artifacts.read_json(folder / "config.json")["rope_parameters"]
    edit_json("config.json", rope_parameters=parameters | {"rope_theta": 1e6})(folder, config)


FAULTS = {
    "a stop id changed": (change_stop, "the file names the stop ids"),
    "a newline added to the template": (add_newline, "prompts differ"),
    "one tensor transposed": (transpose, "greedy tokens differ"),
    "the adapter not merged": (leave_adapter_out, "greedy tokens differ"),
    "the wrong rope base": (change_rope, "greedy tokens differ"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("plant", "sentence"), FAULTS.values(), ids=FAULTS.keys())
def test_a_planted_fault_fails_the_proof(form, plant, sentence, merged, exported, config):
    plant(merged, config)
    assert sentence in " ".join(judged(form, merged, exported[1], config))


def test_what_is_not_proved_is_named_so(merged, tmp_path, capsys):
    record = {"kind": "merged", "by": "transformers", "failures": ["prompts differ"]}
    for name in ("prompts", "token_ids"):
        record[name] = {"equal": 0, "of": 1}
    record["greedy"] = {"equal": 0, "of": 1, "ties": 0, "share_of_tokens": 0.0, "stops": 0}
    target = tmp_path / "export"
    target.mkdir()
    package.place(merged, target, record)
    assert sorted(path.name for path in target.iterdir()) == ["export.json", "merged.unproven"]
    assert "prompts differ" in capsys.readouterr().out
    assert artifacts.read_json(target / "export.json")["merged"]["file"] == "merged.unproven"


@LLAMA
def test_a_template_that_llama_cpp_cannot_render_is_refused_and_nothing_written(
    config, adapter, tmp_path
):
    """Python's Jinja knows the method; llama.cpp's does not."""
    template = tmp_path / "template.jinja"
    text = models.load_tokenizer(config).chat_template
    template.write_text("{%- set x = 'a'.casefold() -%}" + text, "utf-8")
    given = load_config(
        "sft_qwen05b",
        "offline",
        TINY | {"model.base": config.model.base, "model.chat_template": str(template)},
    )
    out = tmp_path / "out"
    message = refusal(package.export_model, given, adapter, out, ["f16"])
    assert message.startswith("llama.cpp")
    assert not out.exists()


def test_a_near_tie_is_named_with_its_gap_and_not_a_failure(exported):
    reference = exported[1]
    step = dict(sorted(reference.best[0][0].items(), key=lambda pair: -pair[1]))
    first, second = list(step)[:2]
    gap = step[first] - step[second]
    other = [[second, *reference.tokens[0][1:]], *reference.tokens[1:]]
    for tie, tied in ((gap * 1.01, True), (gap * 0.99, False)):
        found = proof.compare_tokens(reference, other, tie)
        assert found["first_difference"] == {
            "prompt": 0, "at": 0, "expected": first, "found": second, "gap": gap, "tie": tied,
        }  # fmt: skip
        assert found["equal"] == proof.PROMPTS - 1


def export(adapter, out, form: str) -> list[str]:
    """Export an adapter by the command, which proves it; the names of the files."""
    done = run_python("-m", "tools.export", adapter, "--to", form, "--out", out, *DATA)
    assert done.returncode == 0, done.stderr + done.stdout
    return sorted(path.name for path in out.iterdir())


def test_the_command_exports_and_proves_an_adapter(adapter, tmp_path):
    assert export(adapter, tmp_path / "out", "merged") == ["export.json", "merged"]
    settings = artifacts.read_json(tmp_path / "out" / "merged" / "generation_config.json")
    assert len(settings["eos_token_id"]) == 2
    texts = [path.read_text("utf-8") for path in (tmp_path / "out" / "merged").rglob("*.jinja")]
    assert len(texts) == 1 and "generation %}" not in texts[0]


@LLAMA
def test_the_command_exports_and_proves_an_adapter_as_gguf(adapter, tmp_path):
    assert models.tokenizer_of(str(adapter), None, None).chat_template.keys() >= {"training"}
    assert export(adapter, tmp_path / "out", "gguf") == [
        "Modelfile", "export.json", "model-f16.gguf",
    ]  # fmt: skip


def test_an_adapter_of_another_base_is_refused_and_nothing_written(adapter, tmp_path):
    other = tmp_path / "other"
    run = ("-m", "tools.export", adapter, "--to", "gguf", "--out", out := tmp_path / "out")
    done = run_python(*run, f"--set=model.base={other}", *DATA)
    assert done.returncode == 2
    assert f"not on {other}: set model.base=" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not out.exists()


def test_a_base_that_is_not_reachable_is_refused_and_nothing_written(adapter, tmp_path):
    moved = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    settings = json.loads((moved / "adapter_config.json").read_text("utf-8"))
    settings["base_model_name_or_path"] = "nobody/nothing"
    (moved / "adapter_config.json").write_text(json.dumps(settings), "utf-8")
    closed = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    out = tmp_path / "out"
    done = run_python("-m", "tools.export", moved, "--to", "merged", "--out", out, **closed)
    assert done.returncode == 2
    assert "cannot be reached" in done.stderr and len(done.stderr.splitlines()) == 1
    assert not out.exists()


def test_a_disk_too_small_is_refused_with_the_size_needed(tmp_path):
    message = refusal(package.check_disk, tmp_path / "not" / "yet", 1e18, kind=OSError)
    assert "needs 1,000,000,000.0 GB" in message


def test_an_unknown_architecture_or_tokenizer_is_refused(tokenizer):
    from tokenizers import pre_tokenizers
    from transformers import GPT2Config, Qwen2Config

    assert "not gpt2" in refusal(gguf_file.check_supported, GPT2Config(), tokenizer)
    yarn = Qwen2Config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0})
    assert "yarn" in refusal(gguf_file.check_supported, yarn, tokenizer)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    assert "this tokenizer" in refusal(gguf_file.check_supported, Qwen2Config(), tokenizer)


def test_four_bit_evaluation_is_refused(adapter, tmp_path):
    config = load_config("sft_qwen05b", "offline", {"eval.load_in_4bit": True})
    device = devices.Device("cpu", "float32", "")
    given = (config, adapter, tmp_path / "out", ["merged"], device)
    assert "4-bit" in refusal(package.check_export, *given)


def test_without_llama_cpp_the_file_is_written_and_named_unproven(
    config, adapter, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    assert not package.export_model(config, adapter, tmp_path, ["f16"])
    assert (tmp_path / "model-f16.gguf.unproven").is_file()
    assert llama_cpp.INSTALL in capsys.readouterr().out
    with pytest.raises(ValueError, match="xllamacpp"):
        package.check_packages(["q4_k_m"])


# --- the Modelfile --------------------------------------------------------------------------------


def turns_of(tokenizer) -> modelfile.Turns:
    return modelfile.read_turns(
        lambda chat, response: tokenizer.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=response
        )
    )


def test_a_template_that_is_no_sequence_of_turns_gets_no_modelfile(exported, tokenizer):
    text = tokenizer.chat_template.replace("message.content", "(message.content | trim)")
    tokenizer.chat_template = text
    reference = exported[1]
    chats = reference.chats
    texts = [
        tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats
    ]
    assert proof.compare_texts(texts, turns_of(tokenizer).render, chats)["first_difference"]


@pytest.mark.network
@pytest.mark.skipif(shutil.which("go") is None, reason="NOT TESTED: Go is not installed")
def test_go_renders_the_modelfile_as_the_training_template(tokenizer, tmp_path):
    turns, chats = turns_of(tokenizer), proof.random_chats()
    (tmp_path / "Modelfile").write_text(
        modelfile.modelfile(turns, "x.gguf", ["<|im_end|>"]), "utf-8"
    )
    artifacts.write_json(tmp_path / "chats.json", chats)
    command = ["go", "run", GO, tmp_path / "Modelfile", tmp_path / "chats.json"]
    found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    wanted = [
        tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        for chat in chats
    ]
    assert found == wanted


# --- llama.cpp ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "more"),
    [(2, {1}), (12, {0, 3, 6, 9, 10, 11}), (24, {0, 1, 2, 5, 8, 11, 14, 17, 20, 21, 22, 23})],
)
@pytest.mark.parametrize("tied", [True, False])
def test_matrices_get_the_types_that_llama_quantize_gives_them(layers, more, tied):
    """The layers are those of llama-quantize, of the sources of llama-cpp-python 0.3.36."""
    model = SimpleNamespace(num_hidden_layers=layers, tie_word_embeddings=tied)
    for part in ("attn_v", "ffn_down", "attn_q", "attn_k", "attn_output", "ffn_up", "ffn_gate"):
        kinds = [gguf_file.q4_k_m_type(f"blk.{n}.{part}.weight", model) for n in range(layers)]
        sixes = {n for n, kind in enumerate(kinds) if kind == "Q6_K"}
        assert sixes == (more if part in ("attn_v", "ffn_down") else set())
    output = {"token_embd.weight": "Q6_K"}  # which is the output as well
    output = output if tied else {"token_embd.weight": "Q4_K", "output.weight": "Q6_K"}
    assert {name: gguf_file.q4_k_m_type(name, model) for name in output} == output


@LLAMA
@pytest.mark.parametrize("kind", ["q8_0", "q4_k_m"])
def test_a_quantised_file_is_scored_beside_the_unquantised_model(kind, config, adapter, tmp_path):
    assert package.export_model(config, adapter, tmp_path, [kind])
    record = artifacts.read_json(tmp_path / "export.json")[f"model-{kind}.gguf"]
    exact = record["before_quantising"]
    assert exact["equal"] + exact["ties"] == exact["of"] == proof.SCORED
    assert record["greedy"]["share_of_tokens"] <= exact["share_of_tokens"]
    assert record["score"]["n"] == proof.SCORED and record["score"]["verdict"]
    assert (tmp_path / "Modelfile").read_text().startswith(f"FROM ./model-{kind}.gguf\n")


@LLAMA
@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_a_model_evaluated_in_half_precision_is_exported_in_it(
    precision, config, adapter, tmp_path
):
    run = Path(shutil.copytree(adapter, tmp_path / "03_sft_train" / "adapter")).parent
    artifacts.write_json(run / "summary.json", {"precision": precision})
    assert package.export_model(config, run / "adapter", tmp_path / "out", ["merged", "f16"])
    weights = load_file(tmp_path / "out" / "merged" / "model.safetensors")
    assert {str(tensor.dtype) for tensor in weights.values()} == {f"torch.{precision}"}
    record = artifacts.read_json(tmp_path / "out" / "export.json")["model-f16.gguf"]
    assert record["log_p_difference"] < record["greedy"]["tie_below"]


@LLAMA
@pytest.mark.network
@pytest.mark.parametrize("kind", ["merged", "f16"])
def test_smollm2_is_exported_and_proved(kind, tmp_path):
    base = tmp_path / "smollm2"
    smollm2.build_model(base)
    local = {"model.base": str(base), "model.tokenizer": str(base), "model.chat_template": None}
    config = load_config("sft_qwen05b", "smollm2", local)
    adapter = random_adapter(config, tmp_path / "adapter", scale=0.02)  # it still ends turns
    assert package.export_model(config, adapter, tmp_path / "out", [kind])
