"""Notebooks 03 and 04 in emulated float16 and bfloat16: loss, resumption, skipped steps."""

import json
import math
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
TRAIN, EVAL = "03_sft_train", "04_ifeval_eval"
ADAPTER = f"{TRAIN}/adapter/adapter_model.safetensors"
# The first scale overflows, and the next one is the scaler's usual first one.
OVERFLOW = {"scale": 2.0**40, "backoff": 2.0**-24}
PRECISIONS = ("float32", "float16", "bfloat16")

pytestmark = pytest.mark.slow


def read(path) -> dict:
    return json.loads(path.read_text("utf-8"))


def execute(name, out, dtype, given=GIVEN, **scaler):
    done = half.execute(name, out, dtype, given, **scaler)
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """OUT by precision, trained without an interruption."""
    home = tmp_path_factory.mktemp("half")
    return {dtype: execute(TRAIN, home / dtype, dtype) for dtype in PRECISIONS}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_loss_is_that_of_float32(dtype, whole):
    exact, found = (read(whole[each] / TRAIN / "summary.json") for each in ("float32", dtype))
    assert (found["precision"], found["activation_checkpointing"]) == (dtype, True)
    assert found["skipped_steps"] == 0
    for key in ("last_loss", "validation_loss"):
        assert found[key] == pytest.approx(exact[key], rel=0.01)
        assert found[key] != exact[key]


@pytest.fixture
def audited(whole, tmp_path):
    """OUT with the subset and its audit."""
    for stage in ("01_data_prep", "02_template_audit"):
        shutil.copytree(whole["float16"] / stage, tmp_path / "out" / stage)
    return tmp_path / "out"


def test_steps_that_the_scaler_skips_are_counted(audited):
    folder = execute(TRAIN, audited, "float16", GIVEN | {"train.max_steps": 2}, **OVERFLOW) / TRAIN
    summary = read(folder / "summary.json")
    assert (summary["steps"], summary["skipped_steps"]) == (2, 1)
    card = (folder / "adapter" / "README.md").read_text("utf-8")
    assert "skipped by the float16 scaler | 2, 1 |" in card


def test_an_interrupted_float16_training_gives_the_same_adapter(whole, audited):
    out, exact = audited, whole["float16"]
    done = half.execute(TRAIN, out, "float16", GIVEN | {"run.session_hours": 0.001})
    assert "Training stopped after step 1 of" in done.stderr
    assert len(list(out.glob("checkpoints/*/checkpoint-1/scaler.pt"))) == 1
    # A scaler that is not restored overflows.
    summary = read(execute(TRAIN, out, "float16", **OVERFLOW) / TRAIN / "summary.json")
    assert (summary["resumed_after_step"], summary["skipped_steps"]) == (1, 0)
    assert (out / ADAPTER).read_bytes() == (exact / ADAPTER).read_bytes()
    resumed, once = (read(each / TRAIN / "manifest.json")["ledger"] for each in (out, exact))
    assert resumed["tokens"] == once["tokens"]  # of both sessions
    assert resumed["seconds"] == summary["seconds"]


def test_float16_responses_are_evaluated(whole):
    out = execute(EVAL, whole["float16"], "float16")
    metrics = read(out / "metrics.json")
    assert {row["model"] for row in metrics} == {"base", "SFT"}
    assert all(row["n"] == TINY["eval.limit"] for row in metrics)
    assert all(math.isfinite(row["mean_length"]) for row in metrics)
    origins = [
        path.read_text("utf-8").splitlines()[0] for path in (out / "responses").glob("*.jsonl")
    ]
    assert {json.loads(line)["made_from"]["precision"] for line in origins} == {"cpu float16"}
    noise = read(out / EVAL / "ifeval.json")["decoding_noise"]
    assert noise["repeated"] == TINY["eval.limit"]
    assert noise["verdicts_changed"] <= noise["responses_changed"] <= noise["repeated"]
    ledger = read(out / EVAL / "manifest.json")["ledger"]
    assert ledger["tokens"] == sum(row["n"] * row["mean_length"] for row in metrics)
    assert {*ledger} == {
        "minutes", "process_gib", "gpu_gib", "seconds", "tokens", "tokens_per_second",
        "share_of_bandwidth",
    }  # fmt: skip
