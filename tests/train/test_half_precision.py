"""Notebook 03 in emulated float16 and bfloat16: loss, resumption, skipped steps."""

import json
import shutil

import half
import pytest
from tiny import TINY

GIVEN = TINY | {
    "train.per_device_train_batch_size": 4,
    "train.gradient_accumulation_steps": 2,
    "train.activation_checkpointing": True,
    "train.logging_steps": 1,
    "lora.lora_dropout": 0.1,
    "run.checkpoint_minutes": 0,
}
ADAPTER = "03_sft_train/adapter/adapter_model.safetensors"

pytestmark = pytest.mark.slow


def summary(out) -> dict:
    return json.loads((out / "03_sft_train" / "summary.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """OUT by precision, trained without an interruption."""
    home, found = tmp_path_factory.mktemp("half"), {}
    for dtype in ("float32", "float16", "bfloat16"):
        done = half.train(home / dtype, dtype, GIVEN)
        assert done.returncode == 0, done.stderr[-3000:]
        found[dtype] = home / dtype
    return found


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_loss_is_that_of_float32(dtype, whole):
    exact, found = summary(whole["float32"]), summary(whole[dtype])
    assert (found["precision"], found["skipped_steps"]) == (dtype, 0)
    for key in ("last_loss", "validation_loss"):
        assert found[key] == pytest.approx(exact[key], rel=0.01)
        assert found[key] != exact[key]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_an_interrupted_training_gives_the_same_adapter(dtype, whole, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(whole[dtype] / "01_data_prep", out / "01_data_prep")
    done = half.train(out, dtype, GIVEN | {"run.session_hours": 0.001})
    assert "Training stopped after step 1 of" in done.stderr
    scaler = list(out.glob("checkpoints/*/checkpoint-1/scaler.pt"))
    assert len(scaler) == (dtype == "float16")
    done = half.train(out, dtype, GIVEN)
    assert done.returncode == 0, done.stderr[-3000:]
    assert summary(out)["resumed_after_step"] == 1
    assert (out / ADAPTER).read_bytes() == (whole[dtype] / ADAPTER).read_bytes()


def test_steps_that_the_scaler_skips_are_counted_and_too_many_are_refused(tmp_path):
    done = half.train(tmp_path / "out", "float16", GIVEN, scale=2.0**40)
    assert done.returncode != 0
    assert "steps skipped by the float16 scaler" in done.stderr
    assert not (tmp_path / "out" / "03_sft_train").exists()
