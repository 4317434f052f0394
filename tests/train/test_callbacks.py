"""Progress lines, a bad loss, checkpoints, and a training that is stopped in every way."""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from checks import ROOT
from peft import LoraConfig, get_peft_model
from peft.utils import save_and_load
from tiny import TINY
from transformers import (
    Qwen2Config,
    Qwen2ForCausalLM,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from atlas_lib import artifacts, devices, models
from atlas_lib.config import load_config
from atlas_lib.train import callbacks

CPU = devices.Device("cpu", "float32", "test")
NAN, INF = float("nan"), float("inf")


def test_progress_is_a_line_per_log_and_counts_from_the_resumed_step(capsys):
    callback = callbacks.ProgressLines()
    state = TrainerState(global_step=100, max_steps=300)
    callback.on_train_begin(None, state, None)
    callback.on_log(None, state, None, logs={"loss": 9.0})  # no step yet, so no rate
    state.global_step = 150
    for logs in ({"loss": 1.25}, {"eval_loss": 1.5}, None):
        callback.on_log(None, state, None, logs=logs)
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("training step: 50/200, ")
    assert line.endswith(", loss 1.250")


# --- a loss that is not finite --------------------------------------------------------------------


class Scaler(torch.amp.GradScaler):
    """Says what scale it has after each of the steps of a test."""

    def __init__(self, scales: list[float]):
        super().__init__("cpu")
        self.scales = [65536.0, *scales]

    def get_scale(self) -> float:
        return self.scales[0]


ARGS = SimpleNamespace(learning_rate=2e-4, max_grad_norm=1.0)


def guard(logs: list[tuple[float, float]], scales: list[float] | None, steps: int = 100):
    """The guard after steps with (loss, gradient norm), a log each, and a scale after each."""
    callback, scaler = callbacks.LossGuard(), Scaler(scales) if scales else None
    optimizer = SimpleNamespace(scaler=scaler)
    state = TrainerState(max_steps=steps)
    callback.on_train_begin(ARGS, state, None)
    callback.on_log(ARGS, state, None, logs={"eval_loss": NAN})  # not a training loss
    for step, (loss, gradient) in enumerate(logs, 1):
        callback.on_pre_optimizer_step(ARGS, state, None, optimizer=optimizer)
        if scaler:
            scaler.scales.pop(0)
        callback.on_optimizer_step(ARGS, state, None, optimizer=optimizer)
        state.global_step, entry = step, {"loss": loss, "grad_norm": gradient}
        state.log_history.append(entry | {"step": step})
        callback.on_log(ARGS, state, None, logs=entry)
    callback.on_train_end(ARGS, state, None)
    return callback, state


FINE, OVERFLOW = (1.0, 1.0), (1.0, INF)
HALVED = [2.0**power for power in range(15, -2, -1)]
DIVERGED = {
    "a loss, float32": ([(NAN, 1.0)], None, "Loss nan and gradient norm 1.0 at step 1:"),
    "a loss, float16": (
        [FINE, (INF, INF)],
        [65536.0, 32768.0],
        "Loss inf and gradient norm inf at step 2",
    ),
    "a gradient, float32": ([FINE, (1.0, NAN)], None, "Loss 1.0 and gradient norm nan at step 2"),
    "gradients that stay infinite": ([OVERFLOW] * 17, HALVED, "gradient norm inf at step 17"),
}


@pytest.mark.parametrize(("logs", "scales", "message"), DIVERGED.values(), ids=DIVERGED.keys())
def test_a_bad_loss_stops_the_training(logs, scales, message):
    with pytest.raises(FloatingPointError, match=message) as caught:
        guard(logs, scales, steps=1000)
    assert "train.learning_rate (0.0002)" in str(caught.value)


def test_a_scaler_may_halve_as_long_as_its_scale_is_at_least_one():
    callback, _ = guard([OVERFLOW] * 6 + [FINE], [*HALVED[:6], HALVED[5]], steps=313)
    assert callback.skipped == 6


@pytest.mark.parametrize(("skipped", "steps", "refused"), [(1, 4, False), (2, 4, True)])
def test_more_than_five_percent_of_skipped_steps_are_refused(skipped, steps, refused, capsys):
    if refused:
        with pytest.raises(FloatingPointError, match="2 of 4 steps skipped by the float16 scaler"):
            guard([OVERFLOW] * skipped, HALVED, steps)
        return
    callback, state = guard([OVERFLOW] * skipped + [FINE], [HALVED[0], HALVED[0]], steps)
    assert "float16 scaler: 1 of 2 steps skipped" in capsys.readouterr().out
    resumed = callbacks.LossGuard()
    resumed.on_train_begin(ARGS, state, None)  # the log is part of a checkpoint
    assert resumed.skipped == callback.skipped == 1


def test_checkpoints_never_ask_the_hub(checkpoints, tiny_config, tmp_path, monkeypatch):
    """peft's default asks it whether the base's vocabulary has grown, if the base is a hub id."""

    def fail(*_):
        raise OSError("the hub is gone")

    monkeypatch.setattr(save_and_load, "check_file_exists_on_hf_hub", fail)
    weights = models.load_weights("base", tiny_config, CPU, in_4bit=True)
    model = get_peft_model(weights, LoraConfig(**tiny_config.lora.model_dump()))
    model.peft_config["default"].base_model_name_or_path = "org/name"
    with pytest.raises(OSError, match="the hub is gone"):
        model.save_pretrained(tmp_path / "asking")
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    trainer = Trainer(model, arguments, callbacks=[checkpoints()])
    trainer.callback_handler.on_train_begin(arguments, trainer.state, trainer.control)
    trainer.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "adapter_model.safetensors").is_file()


# --- which checkpoint is resumed ------------------------------------------------------------------


@pytest.fixture
def checkpoints(tiny_config, tmp_path):
    """Makes a callback for OUT `tmp_path`; keys of `given` are dotted config keys."""

    def make(given=None, out=tmp_path, device=CPU, row="row") -> callbacks.Checkpoints:
        config = load_config("sft_qwen05b", "offline", TINY | (given or {}))
        with artifacts.stage("01_data_prep", tiny_config, tmp_path / "source") as source:
            artifacts.write_jsonl(source / "train.jsonl", [row])
        saver = callbacks.Checkpoints(config, out, device, [source])
        model = SimpleNamespace(save_pretrained=print)
        saver.on_train_begin(None, TrainerState(), None, model=model)
        return saver

    return make


def save(saver: callbacks.Checkpoints, step: int) -> Path:
    """What the trainer writes, in small, and then the callback's part."""
    folder = saver.folder / f"checkpoint-{step}"
    artifacts.write_json(folder / "trainer_state.json", {})
    saver.on_save(None, TrainerState(global_step=step), None)
    return folder


def test_the_newest_checkpoint_of_the_same_run_is_resumed(checkpoints):
    first = checkpoints()
    assert (first.resumed_after, first.resume_from) == (0, None)
    save(first, 9)
    newest = save(first, 10)  # by step: "9" sorts last by name
    assert list(first.folder.iterdir()) == [newest]  # older ones are deleted
    other = {"run.checkpoint_minutes": 1, "eval.limit": 3}  # keys without effect on the training
    for again in (checkpoints(), checkpoints(other)):
        assert (again.resumed_after, again.resume_from) == (10, str(newest))


def test_a_checkpoint_below_the_kaggle_input_is_resumed_and_kept(
    checkpoints, tmp_path, kaggle_input
):
    there = save(checkpoints(out=kaggle_input / "slug"), 7)
    here = checkpoints(out=tmp_path / "out")
    assert here.resume_from == str(there)
    older = save(here, 5)
    assert checkpoints(out=tmp_path / "out").resumed_after == 7
    assert older.is_dir()
    assert there.is_dir()


T4 = devices.Device("cuda", "float16", "test")
DIFFERENT = [
    ({"given": {"train.learning_rate": 1e-5}}, "train.learning_rate is 0.005 there"),
    ({"device": T4}, "precision is 'float32' there and 'float16' here"),
    ({"row": "another row"}, "01_data_prep is"),
]


@pytest.mark.parametrize(("changed", "message"), DIFFERENT)
def test_a_checkpoint_of_another_run_is_not_resumed(changed, message, checkpoints, capsys):
    old = save(checkpoints(), 3)
    other = checkpoints(**changed)
    assert other.resume_from is None
    assert message in capsys.readouterr().out
    save(other, 1)
    assert checkpoints().resume_from == str(old)  # a typing error does not lose it


def test_a_checkpoint_of_other_weights_in_the_same_folder_is_not_resumed(
    checkpoints, tmp_path, capsys
):
    given = {"model.base": str(tmp_path / "mine")}
    artifacts.write_lines(tmp_path / "mine" / "model.safetensors", ["first"])
    save(checkpoints(given), 3)
    assert checkpoints(given).resumed_after == 3
    artifacts.write_lines(tmp_path / "mine" / "model.safetensors", ["other"])
    assert checkpoints(given).resume_from is None
    assert f"content of {tmp_path / 'mine'} is " in capsys.readouterr().out


def test_an_incomplete_checkpoint_is_not_resumed(checkpoints):
    older, incomplete = save(checkpoints(), 3), checkpoints().folder / "checkpoint-4"
    artifacts.write_json(incomplete / "trainer_state.json", {})  # killed before the marker
    again = checkpoints()
    assert again.resume_from == str(older)
    save(again, 5)
    assert not incomplete.exists()


class FullDisk(TrainerCallback):
    """From step 3 on, no file may grow beyond a few pages, as on a disk that has filled up."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))


def test_a_disk_that_fills_during_a_checkpoint_keeps_the_one_before(checkpoints, tmp_path):
    """The trainer's own writers of weights and optimizer, on a model larger than the limit."""
    saver = checkpoints({"run.checkpoint_minutes": 0})
    shape = Qwen2Config(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = Qwen2ForCausalLM(shape)
    arguments = TrainingArguments(
        output_dir=str(saver.folder),
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        max_steps=4,
        per_device_train_batch_size=1,
        disable_tqdm=True,
    )
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 4
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[saver, FullDisk()])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(Exception, match=r"File too large|unexpected pos|write"):
            trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    again = checkpoints({"run.checkpoint_minutes": 0})
    assert again.resumed_after == 2
    rest = Trainer(Qwen2ForCausalLM(shape), arguments, train_dataset=rows, callbacks=[again])
    assert rest.train(resume_from_checkpoint=again.resume_from).global_step == 4
    assert [path.name for path in again.folder.iterdir()] == ["checkpoint-4"]


# --- when a checkpoint is due ---------------------------------------------------------------------


def step_end(saver: callbacks.Checkpoints, step=5) -> tuple[bool, bool]:
    """(saves, stops) after a step of ten."""
    control = TrainerControl()
    saver.on_step_end(None, TrainerState(global_step=step, max_steps=10), control)
    assert control.should_log == control.should_save  # a bad loss is seen before it is saved
    return control.should_save, control.should_training_stop


def train_end(saver: callbacks.Checkpoints, step=5) -> None:
    saver.on_train_end(None, TrainerState(global_step=step, max_steps=10), None)


def test_a_checkpoint_is_due_by_the_clock_and_at_the_last_step(checkpoints):
    saver = checkpoints({"run.checkpoint_minutes": 1})
    assert step_end(saver) == (False, False)
    saver.saved -= 61
    assert step_end(saver) == (True, False)
    save(saver, 5)
    assert step_end(saver) == (False, False)
    assert step_end(saver, 10) == (True, False)
    train_end(saver, 5)  # not stopped early: by max_steps, for example


def test_the_end_of_the_session_saves_and_stops(checkpoints, monkeypatch):
    saver = checkpoints({"run.session_hours": 0.001})
    assert step_end(saver) == (True, True)
    with pytest.raises(InterruptedError, match=r"step 5 of 10 \(the session's end is near"):
        train_end(saver)
    train_end(saver, 10)  # a stop in the last step interrupts nothing
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    with pytest.raises(InterruptedError, match="add this version's output to the notebook's input"):
        train_end(saver)


@pytest.fixture
def signals():
    """Signals that no checkpoint callback has caught."""
    received, before = [], signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    yield received
    signal.signal(signal.SIGTERM, before)


def test_sigterm_saves_and_stops_and_a_second_one_is_not_caught(checkpoints, signals):
    saver = checkpoints()
    with saver.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        assert not signals
        assert step_end(saver) == (True, True)
        os.kill(os.getpid(), signal.SIGTERM)
    assert signals == [signal.SIGTERM]
    with pytest.raises(InterruptedError, match="SIGTERM"):
        train_end(saver)


def test_after_a_failed_training_sigterm_is_as_before(checkpoints, signals):
    with pytest.raises(FloatingPointError), checkpoints().listening():
        raise FloatingPointError
    os.kill(os.getpid(), signal.SIGTERM)
    assert signals == [signal.SIGTERM]


def test_the_time_of_earlier_sessions_counts(checkpoints):
    first = checkpoints()
    first.started -= 100
    save(first, 3)
    again = checkpoints()
    save(again, 4)
    assert 100 <= first.seconds() < again.seconds() < 200


# --- the whole notebook, stopped in every way -----------------------------------------------------

# 16 steps with a checkpoint each, and with dropout, so that the random state matters too.
LONGER = TINY | {
    "train.per_device_train_batch_size": 4,
    "lora.lora_dropout": 0.1,
    "run.checkpoint_minutes": 0,
    "train.logging_steps": 1,
}
TWO_EPOCHS = {"train.num_train_epochs": 2, "train.gradient_accumulation_steps": 2}
BY_LENGTH = {"train.train_sampling_strategy": "group_by_length"}


def train(out: Path, given: dict, number: int = 0, step: int = 100) -> tuple[int, str]:
    """(exit code, output) of a run that receives signal `number` once step `step` is logged."""
    settings = [a for k, v in (LONGER | given).items() for a in ("--set", f"{k}={json.dumps(v)}")]
    stages = ["01_data_prep", "02_template_audit", "03_sft_train"]
    run = [sys.executable, "-m", "tools.run", *stages, "--overlay", "offline", "--out", str(out)]
    pipes, printed = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}, []
    with subprocess.Popen([*run, *settings], cwd=ROOT, **pipes) as run:
        for line in run.stdout:
            printed.append(line)
            found = re.match(r"training step: (\d+)/(\d+)", line)
            if found and 16 - int(found[2]) + int(found[1]) >= step:
                kernels = psutil.Process(run.pid).children() if number == signal.SIGKILL else []
                run.send_signal(number)
                [kernel.kill() for kernel in kernels]
                break
        printed += run.stdout.readlines()
    return run.returncode, "".join(printed)


@pytest.mark.slow
@pytest.mark.parametrize(
    "given",
    [
        pytest.param(TWO_EPOCHS, id="two epochs, random order"),
        pytest.param(BY_LENGTH, id="grouped by length", marks=pytest.mark.long),
    ],
)
def test_a_run_that_is_stopped_in_every_way_gives_the_uninterrupted_adapter(given, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "stopped"
    code, printed = train(whole, given)
    assert code == 0, printed
    drawn = random.randrange(2, 6)
    shutil.copytree(whole / "01_data_prep", out / "01_data_prep")
    code, _ = train(out, given, signal.SIGKILL, drawn)
    assert code == -signal.SIGKILL
    code, printed = train(out, given, signal.SIGTERM, drawn + 3)
    assert code == 1
    assert re.search(r"Resuming after step \d+ ", printed), printed
    assert re.search(r"stopped: Training stopped after step \d+ of 16 \(SIGTERM\)", printed)
    code, printed = train(out, given | {"run.session_hours": 0.001})
    assert code == 1
    assert "the session's end is near" in printed
    code, printed = train(out, given)
    assert code == 0, printed
    assert "Resuming after step" in printed
    name = "03_sft_train/adapter/adapter_model.safetensors"
    assert (out / name).read_bytes() == (whole / name).read_bytes(), f"killed after {drawn}"
    for folder in (out, whole):
        assert not (folder / "checkpoints").exists()
        assert not [p for p in folder.rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl")]
    log = artifacts.read_jsonl(out / "03_sft_train" / "train_log.jsonl")
    assert [entry["step"] for entry in log if "loss" in entry] == list(range(1, 17))
    assert json.loads((out / "03_sft_train" / "summary.json").read_bytes())["resumed_after_step"]
    assert (out / "03_sft_train" / "loss.png").stat().st_size > 1000


@pytest.mark.slow
def test_a_diverging_loss_stops_the_notebook(tmp_path):
    code, printed = train(tmp_path, {"train.learning_rate": 1e30})
    assert code == 1
    assert re.search(r"Loss \S+ and gradient norm \S+ at step \d+: training has", printed)
    assert "train.learning_rate (1e+30)" in printed
    assert not (tmp_path / "03_sft_train" / "manifest.json").exists()
