"""Local sources are identified by their content: other files, another result."""

import os
from pathlib import Path

import pytest
from huggingface_hub import constants

from atlas_lib import artifacts, sources, stages
from atlas_lib.config import load_config
from atlas_lib.loss_mask.turns import ChatTemplate

NAMES = list(stages.STAGES)
# The key that names a folder, a file in it ("" if the key names a file), the first stage that
# depends on it.
FILES = [
    ("data.dataset", "", 0),
    ("data.dataset", "README.md", 0),  # the card of a data set says which file is which split
    ("data.dataset", "data/train_sft.parquet", 0),
    *(("model.base", file, 1) for file in ("model.safetensors", "tokenizer.json", "config.json")),
    ("model.base", "weights/of/any.name", 1),
    ("model.tokenizer", "tokenizer.json", 1),
    ("model.instruct", "model.safetensors", 3),
    ("model.adapter", "adapter_config.json", 3),
    ("model.adapter", "adapter_model.safetensors", 3),
    ("model.adapter", "adapter_model.bin", 3),
    ("eval.prompts", "", 3),
    ("eval.prompts", "prompts.json", 3),
]


def finish(out: Path, config) -> None:
    """All stages, each with the one before as its input."""
    folder = None
    for name in NAMES:
        with artifacts.stage(name, config, out, [folder] if folder else []) as folder:
            artifacts.write_jsonl(folder / "rows.jsonl", [{"stage": name}])


def refused(out: Path, config) -> list[tuple[str, bool]]:
    """(stage, whether its refusal says "content of") for each finished stage that does not fit.

    A later stage, forced or not, stops at the first of them.
    """
    found = []
    for name in NAMES:
        try:
            artifacts.require(name, config, out, lambda *_: pytest.fail("the folder is absent"))
        except ValueError as error:
            found.append((name, "content of" in str(error)))
    return found


@pytest.mark.parametrize(("key", "file", "first"), FILES)
def test_other_bytes_in_the_same_place_end_the_use_of_what_depends_on_them(
    key, file, first, tmp_path
):
    place = tmp_path / "mine"
    artifacts.write_lines(place / file, ["first"])
    status = (place / file).stat()
    config = load_config("sft_qwen05b", "", {key: str(place)})
    finish(tmp_path / "out", config)
    assert refused(tmp_path / "out", config) == []
    (place / file).write_text("other\n", "utf-8")  # as long as before, and in the same inode
    os.utime(place / file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert refused(tmp_path / "out", config) == [(name, True) for name in NAMES[first:]]


@pytest.fixture
def model(tmp_path) -> Path:
    for name in ("config.json", "model.safetensors"):
        artifacts.write_lines(tmp_path / "model" / name, [name])
    return tmp_path / "model"


def test_another_file_and_another_name_count(model):
    found = {sources.content_digest(model)}
    artifacts.write_lines(model / "deep" / "model.bin", ["x"])
    found.add(sources.content_digest(model))
    (model / "deep" / "model.bin").rename(model / "deep" / "weights.bin")
    found.add(sources.content_digest(model))
    assert len(found) == 3


@pytest.mark.parametrize(
    "file", ["README.md", ".gitattributes", ".git/index", ".cache/huggingface/download/x.metadata"]
)
def test_a_model_card_and_hidden_files_do_not_count(file, model):
    before = sources.content_digest(model)
    artifacts.write_lines(model / file, ["x"])
    assert sources.content_digest(model) == before


def test_a_copy_elsewhere_has_the_same_digest(model):
    before = sources.content_digest(model)
    assert sources.content_digest(model.rename(model.with_name("copy"))) == before


def test_an_unchanged_file_is_hashed_once(model):
    sources.content_digest(model)
    misses = sources._sha256.cache_info().misses
    sources.content_digest(model)
    assert sources._sha256.cache_info().misses == misses


# --- the hub is asked only for what is not on disk ------------------------------------------------


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_a_pinned_revision_on_disk_needs_no_hub(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    repo, pinned = f"team/{kind}", "0123456789" * 4
    with pytest.raises(ConnectionError, match="cannot be reached"):
        sources.check_hub(repo, pinned, kind)
    artifacts.write_lines(tmp_path / f"{kind}s--team--{kind}/snapshots" / pinned / "part", ["x"])
    sources.check_hub(repo, pinned, kind)
    with pytest.raises(ConnectionError, match="cannot be reached"):
        sources.check_hub(repo, None, kind)


# --- a source runs no code (data: data_prep/test_subset.py) ---------------------------------------


@pytest.mark.parametrize("begin", ["cycler.__init__.__globals__.os", "''.__class__.__mro__[1]"])
def test_a_chat_template_cannot_leave_its_sandbox(begin, tokenizer, tmp_path):
    escape = f"{{{{ {begin}.system('touch {tmp_path}/canary') }}}}"
    with pytest.raises(ValueError, match="is unsafe"):
        ChatTemplate(tokenizer, escape)
    assert not list(tmp_path.glob("canary"))
