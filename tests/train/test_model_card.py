"""The model card: it holds what was recorded, and the hub's own library can read it."""

import re

import pytest
from huggingface_hub import ModelCard

from atlas_lib.config import load_config
from atlas_lib.train import model_card

SUMMARY = {
    "steps": 313, "first_loss": 1.4791, "last_loss": 1.3824, "validation_loss": 1.4012,
    "eos_rate": 0.875, "responses": 8, "rows_compared_with_audit": 4987,
    "trainable_parameters": 2_162_688, "total_parameters": 496_195_456, "precision": "float16",
    "skipped_steps": 7, "seconds": 660.0, "tokens_per_second": 6924.2, "share_of_matmul_rate": None,
    "activation_checkpointing": False,
}  # fmt: skip
AUDIT = {
    "rows": 5000, "rows_ok": 4987, "rows_excluded": 2, "rows_dropped": 11, "rows_truncated": 3100,
    "n_supervised": 3_456_789, "n_tokens": 4_567_890, "max_length": 1024,
}  # fmt: skip


def written(folder, overlay="", repo=None) -> ModelCard:
    config = load_config("sft_qwen05b", overlay)
    model_card.write_card(folder, config, SUMMARY, AUDIT, repo)
    return ModelCard.load(folder / "README.md")


def test_every_value_of_recipe_and_run_is_there(tmp_path):
    card, config = written(tmp_path, repo="alice/atlas"), load_config("sft_qwen05b")
    assert card.data.base_model == "Qwen/Qwen2.5-0.5B"
    assert card.data.datasets == "HuggingFaceH4/ultrachat_200k"
    assert card.data.library_name == "peft"
    rows = (
        "train.activation_checkpointing` | False",
        "train.learning_rate` | 0.0002",
        "lora.r` | 16",
        "seed` | 42",
    )
    for row in (*rows, "quantization.bnb_4bit_quant_type` | nf4"):
        assert f"| `{row} |" in card.text
    for value in (
        "313, 7",
        "1.479, 1.382",
        "1.401",
        "88 % of 8",
        "2,162,688",
        "3,456,789",
        "11 have",
        "11.0 min, 6,924 tokens/s without padding |",
        "GiB of the process |",
    ):
        assert value in card.text, value
    assert config.model.base_revision in card.text
    assert config.data.revision in card.text
    assert re.search(r"digest [0-9a-f]{12} ", card.text)
    assert 'from_pretrained("alice/atlas")' in card.text


def test_the_share_of_a_gpu_is_stated_where_it_is_known(tmp_path):
    config = load_config("sft_qwen05b")
    known = SUMMARY | {"share_of_matmul_rate": 0.584}
    model_card.write_card(tmp_path, config, known, AUDIT, None)
    text = (tmp_path / "README.md").read_text("utf-8")
    assert "6,924 tokens/s without padding, 58 % of the GPU's matrix multiplication rate |" in text


def test_without_a_push_it_names_no_folder_of_this_machine(tmp_path):
    card = written(tmp_path)
    assert 'from_pretrained("USER/atlas-sft-qwen05b-v2")' in card.text
    assert not re.search(r"\{\{|\}\}|\{%|None|undefined", card.content)


@pytest.mark.parametrize("overlay", ["offline", "smoke"])
def test_a_run_that_is_not_the_published_recipe_is_labelled_first(overlay, tmp_path):
    label = load_config("sft_qwen05b", overlay).label
    assert label[1:] in written(tmp_path, overlay).text.split("## Usage")[0]


def test_embedded_names_are_not_links(tmp_path):
    card = written(tmp_path, "offline")
    assert (card.data.base_model, card.data.datasets) == (None, None)
    assert 'from_pretrained("path/to/this/folder")' in card.text
