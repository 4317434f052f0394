"""The model card says what was recorded, and the hub's own library can read it."""

import re

import pytest
from huggingface_hub import ModelCard

from atlas_lib.config import load_config
from atlas_lib.train import model_card

SUMMARY = {
    "steps": 313, "first_loss": 1.4791, "last_loss": 1.3824, "validation_loss": 1.4012,
    "stop_share": 0.875, "answers": 8, "rows_compared_with_audit": 4987,
    "trainable_parameters": 2_162_688, "total_parameters": 496_195_456, "precision": "float16",
}  # fmt: skip
AUDIT = {
    "rows": 5000, "rows_ok": 4987, "rows_excluded": 2, "rows_dropped": 11, "rows_truncated": 3100,
    "n_supervised": 3_456_789, "n_tokens": 4_567_890, "max_length": 1024,
}  # fmt: skip


def write(folder, *layers, repo=None) -> ModelCard:
    model_card.write(folder, load_config("sft_qwen05b", *layers), SUMMARY, AUDIT, repo)
    return ModelCard.load(folder / "README.md")


def test_the_header_is_what_the_hub_indexes(tmp_path):
    data = write(tmp_path, repo="alice/atlas").data
    assert data.base_model == "Qwen/Qwen2.5-0.5B"
    assert data.datasets == ["HuggingFaceH4/ultrachat_200k"]
    assert data.library_name == "peft"


def test_every_value_of_recipe_and_run_is_there(tmp_path):
    text = write(tmp_path, repo="alice/atlas").text
    config = load_config("sft_qwen05b")
    for key in ("train.learning_rate", "lora.r", "quantization.bnb_4bit_quant_type", "seed"):
        assert f"| `{key}` | {config.relevant('03_sft_train')[key]} |" in text
    for value in ("313", "1.479, 1.382", "1.401", "88 % of 8", "2,162,688", "3,456,789", "11 with"):
        assert value in text, value
    assert config.model.base_revision in text
    assert config.data.revision in text
    assert config.digest("03_sft_train") in text
    assert 'from_pretrained("alice/atlas")' in text


def test_without_a_push_it_names_no_folder_of_this_machine(tmp_path):
    assert 'from_pretrained("USER/atlas-sft-qwen05b-v2")' in write(tmp_path).text
    assert 'from_pretrained("path/to/this/folder")' in write(tmp_path, "offline").text


def test_no_placeholder_is_left(tmp_path):
    assert not re.search(r"\{\{|\}\}|\{%|None|undefined", write(tmp_path).content)


@pytest.mark.parametrize("overlay", ["offline", "smoke"])
def test_what_is_not_the_real_run_says_so_first(overlay, tmp_path):
    text = write(tmp_path, overlay).text
    label = load_config("sft_qwen05b", overlay).label
    assert label[1:] in text.split("## Use")[0]


def test_embedded_names_are_no_links(tmp_path):
    data = write(tmp_path, "offline").data
    assert data.base_model is None
    assert data.datasets is None
