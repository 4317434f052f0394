"""What watches the trainer: a bad loss, checkpoints, and a run that is stopped in every way."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from tiny import TINY
from transformers import TrainerControl, TrainerState

from atlas_lib import artifacts, devices
from atlas_lib.config import load_config
from atlas_lib.train import callbacks

ROOT = Path(__file__).resolve().parents[2]
CPU = devices.Device("cpu", "float32", "test")
NAN, INF = float("nan"), float("inf")

# --- lines ----------------------------------------------------------------------------------------


def test_a_training_step_is_a_line_and_a_resumed_run_counts_from_its_start(capsys):
    callback = callbacks.ProgressLines()
    state = TrainerState(global_step=100, max_steps=300)
    callback.on_train_begin(None, state, None)
    callback.on_log(None, state, None, logs={"loss": 9.0})  # no step yet: no rate to tell
    state.global_step = 150
    callback.on_log(None, state, None, logs={"loss": 1.25})
    callback.on_log(None, state, None, logs={"eval_loss": 1.5})
    callback.on_log(None, state, None, logs=None)
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("training step: 50/200, ")
    assert line.endswith(", loss 1.250")


# --- a loss that is not finite --------------------------------------------------------------------


def watch(logs: list[tuple[int, float, float]], fp16: bool) -> None:
    """Show the guard (step, loss, gradient norm), one after another."""
    guard = callbacks.LossGuard()
    args = SimpleNamespace(fp16=fp16, learning_rate=2e-4, max_grad_norm=1.0)
    for step, loss, gradient in logs:
        guard.on_log(
            args, TrainerState(global_step=step), None, logs={"loss": loss, "grad_norm": gradient}
        )


FINE = (5, 1.0, 1.0)
STOPPED = {
    "a loss, float32": ([(1, NAN, 1.0)], False, "loss is nan at step 1"),
    "an infinite loss": ([FINE, (10, INF, 1.0)], True, "loss is inf at step 10"),
    "a loss, float16": ([(1, NAN, INF)], True, "loss is nan at step 1"),
    "a gradient, float32": ([FINE, (10, 1.0, NAN)], False, "gradient norm is nan at step 10"),
    "gradients that stay": (
        [FINE, (10, 1.0, INF), (20, 1.0, INF), (30, 1.0, INF)],
        True,
        "gradient norm is inf at step 30",
    ),
}


@pytest.mark.parametrize(("logs", "fp16", "said"), STOPPED.values(), ids=STOPPED.keys())
def test_a_bad_loss_stops_the_run_and_says_where_to_look(logs, fp16, said):
    with pytest.raises(FloatingPointError, match=said) as caught:
        watch(logs, fp16)
    assert "train.learning_rate (0.0002)" in str(caught.value)


@pytest.mark.parametrize(
    "logs",
    [
        [(1, 1.0, NAN), (2, 1.0, INF), (3, 1.0, NAN), FINE],
        [(n, 1.0, INF if n % 30 else 1.0) for n in range(10, 100, 10)],  # two in a row, then fine
    ],
    ids=["the search for the scale", "now and then"],
)
def test_a_float16_scaler_may_overflow(logs):
    watch(logs, fp16=True)


def test_an_evaluation_is_not_a_loss():
    callbacks.LossGuard().on_log(None, TrainerState(), None, logs={"eval_loss": NAN})


# --- which checkpoint counts ----------------------------------------------------------------------


@pytest.fixture(autouse=True)
def kaggle_input(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(artifacts, "KAGGLE_INPUT", tmp_path / "kaggle-input")
    return tmp_path / "kaggle-input"


@pytest.fixture
def source(tiny_config, tmp_path) -> Path:
    """A finished stage 01."""
    with artifacts.stage("01_data_prep", tiny_config, tmp_path / "source") as folder:
        artifacts.write_jsonl(folder / "train.jsonl", [{}])
    return folder


def save(saver: callbacks.Checkpoints, step: int) -> Path:
    """What the trainer leaves, in small, and then the callback's part."""
    saver.on_train_begin(None, TrainerState(), None)
    folder = saver.folder / f"checkpoint-{step}"
    artifacts.write_json(folder / "trainer_state.json", {})
    saver.on_save(None, TrainerState(global_step=step), None)
    return folder


def test_the_newest_checkpoint_of_the_same_run_is_found(tiny_config, tmp_path, source):
    first = callbacks.Checkpoints(tiny_config, tmp_path, CPU, [source])
    assert (first.resumed_after, first.resume_from) == (0, None)
    save(first, 9)
    newest = save(first, 10)  # not by name: "9" would be the last
    assert list(first.folder.iterdir()) == [newest]  # one is enough
    again = callbacks.Checkpoints(tiny_config, tmp_path, CPU, [source])
    assert (again.resumed_after, again.resume_from) == (10, str(newest))


def test_a_checkpoint_below_the_kaggle_input_is_found_and_left_there(
    tiny_config, tmp_path, source, kaggle_input
):
    there = save(callbacks.Checkpoints(tiny_config, kaggle_input / "slug", CPU, [source]), 7)
    here = callbacks.Checkpoints(tiny_config, tmp_path / "out", CPU, [source])
    assert here.resume_from == str(there)
    older = save(callbacks.Checkpoints(tiny_config, tmp_path / "out", CPU, [source]), 5)
    assert callbacks.Checkpoints(tiny_config, tmp_path / "out", CPU, [source]).resumed_after == 7
    assert older.is_dir()


def other_source(folder: Path) -> Path:
    config = load_config("sft_qwen05b", "offline", TINY)
    with artifacts.stage("01_data_prep", config, folder.parent) as again:
        artifacts.write_jsonl(again / "train.jsonl", [{"another": "row"}])
    return again


DIFFERENT = {
    "configuration": {"train.learning_rate": 1e-5},
    "adapter": {"lora.r": 4},
    "a key that it lacked": {"train.weight_decay": 0.1},
}


@pytest.mark.parametrize("override", DIFFERENT.values(), ids=DIFFERENT.keys())
def test_another_configuration_starts_over(override, tiny_config, tmp_path, source, capsys):
    old = save(callbacks.Checkpoints(tiny_config, tmp_path, CPU, [source]), 3)
    mistyped = load_config("sft_qwen05b", "offline", TINY | override)
    other = callbacks.Checkpoints(mistyped, tmp_path, CPU, [source])
    assert other.resume_from is None
    assert f"{next(iter(override))} is " in capsys.readouterr().out
    save(other, 1)
    again = callbacks.Checkpoints(tiny_config, tmp_path, CPU, [source])
    assert again.resume_from == str(old)  # a slip does not cost it


def test_other_data_starts_over(tiny_config, tmp_path, source, capsys):
    save(callbacks.Checkpoints(tiny_config, tmp_path, CPU, [source]), 3)
    other_source(source)
    assert callbacks.Checkpoints(tiny_config, tmp_path, CPU, [source]).resume_from is None
    assert "01_data_prep is" in capsys.readouterr().out


def test_another_precision_starts_over(tiny_config, tmp_path, source, capsys):
    save(callbacks.Checkpoints(tiny_config, tmp_path, CPU, [source]), 3)
    half = devices.Device("cuda", "float16", "test")
    assert callbacks.Checkpoints(tiny_config, tmp_path, half, [source]).resume_from is None
    assert "precision is 'float32' there, 'float16' here" in capsys.readouterr().out


def test_what_does_not_change_the_result_does_not_matter(tiny_config, tmp_path, source):
    save(callbacks.Checkpoints(tiny_config, tmp_path, CPU, [source]), 3)
    other = load_config(
        "sft_qwen05b", "offline", TINY | {"run.checkpoint_minutes": 1, "eval.limit": 3}
    )
    assert callbacks.Checkpoints(other, tmp_path, CPU, [source]).resumed_after == 3


@pytest.mark.parametrize("content", [None, "", '{"seed":'])
def test_half_a_checkpoint_is_not_used(content, tiny_config, tmp_path, source, capsys):
    half = save(callbacks.Checkpoints(tiny_config, tmp_path, CPU, [source]), 3)
    (half / callbacks.MARKER).unlink()
    if content is not None:
        (half / callbacks.MARKER).write_text(content, "utf-8")
    assert callbacks.Checkpoints(tiny_config, tmp_path, CPU, [source]).resume_from is None
    assert "not written to its end" in capsys.readouterr().out
    assert not half.exists()


# --- when a checkpoint is due ---------------------------------------------------------------------


def step_end(saver: callbacks.Checkpoints, step=5, steps=10) -> tuple[bool, bool]:
    """(saves, stops) after a step."""
    control = TrainerControl()
    saver.on_step_end(None, TrainerState(global_step=step, max_steps=steps), control)
    assert control.should_log == control.should_save  # a bad loss is seen before it is kept
    return control.should_save, control.should_training_stop


def saver_with(tmp_path, source, **run) -> callbacks.Checkpoints:
    given = {f"run.{key}": value for key, value in run.items()}
    config = load_config("sft_qwen05b", "offline", TINY | given)
    saver = callbacks.Checkpoints(config, tmp_path, CPU, [source])
    saver.on_train_begin(None, TrainerState(), None)
    return saver


@pytest.fixture(autouse=True)
def own_signals():
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def test_nothing_is_due_at_once_by_default(tmp_path, source):
    assert step_end(saver_with(tmp_path, source)) == (False, False)


def test_a_checkpoint_is_due_by_the_clock(tmp_path, source):
    saver = saver_with(tmp_path, source, checkpoint_minutes=0.001)
    assert step_end(saver) == (False, False)
    time.sleep(0.07)
    assert step_end(saver) == (True, False)
    save(saver, 5)
    assert step_end(saver) == (False, False)


def test_the_last_step_is_kept_until_the_adapter_is_saved(tmp_path, source):
    assert step_end(saver_with(tmp_path, source), 10, 10) == (True, False)


def test_the_sessions_end_saves_and_stops(tmp_path, source):
    saver = saver_with(tmp_path, source, session_hours=0.001)
    assert step_end(saver) == (True, True)
    with pytest.raises(InterruptedError, match=r"after step 5 of 10 .the session's end is near"):
        saver.require_finished(5, 10)


def test_sigterm_saves_and_stops_and_a_second_one_is_not_held_back(tmp_path, source):
    came = []
    signal.signal(signal.SIGTERM, lambda *_: came.append("not held back"))
    saver = saver_with(tmp_path, source)
    with saver.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        assert came == []
        assert step_end(saver) == (True, True)
        os.kill(os.getpid(), signal.SIGTERM)
    assert came == ["not held back"]
    with pytest.raises(InterruptedError, match="SIGTERM"):
        saver.require_finished(5, 10)


def test_after_a_training_that_fails_sigterm_is_as_before(tmp_path, source):
    before = signal.getsignal(signal.SIGTERM)
    held = []

    def fail():
        with saver_with(tmp_path, source).listening():
            held.append(signal.getsignal(signal.SIGTERM))
            raise FloatingPointError

    with pytest.raises(FloatingPointError):
        fail()
    assert held != [before]
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_stop_in_the_last_step_is_no_interruption(tmp_path, source):
    saver = saver_with(tmp_path, source, session_hours=0.001)
    assert step_end(saver, 10, 10) == (True, True)
    saver.require_finished(10, 10)


def test_the_time_of_earlier_sessions_counts(tmp_path, source):
    first = saver_with(tmp_path, source)
    first.started -= 100
    save_at = first.folder / "checkpoint-3"
    artifacts.write_json(save_at / "trainer_state.json", {})
    first.on_save(None, TrainerState(global_step=3), None)
    again = saver_with(tmp_path, source)
    again.on_save(None, TrainerState(global_step=4), None)
    assert 100 <= first.seconds() < again.seconds() < 200


def test_on_kaggle_the_way_back_is_another_one(tmp_path, source, monkeypatch):
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    saver = saver_with(tmp_path, source, session_hours=0.001)
    saver.reason = "planted"
    with pytest.raises(InterruptedError, match="as a dataset"):
        saver.require_finished(5, 10)


# --- the last loss --------------------------------------------------------------------------------


def entries(*pairs) -> list[dict]:
    return [{"step": step, "loss": loss} for step, loss in pairs]


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        (entries((1, 9.0), (10, 4.0), (20, 2.0)), 2.0),
        (entries((10, 4.0), (20, 2.0), (21, 12.0)), (10 * 2.0 + 12.0) / 11),
        # a checkpoint at step 17 splits the window: the same mean as 2.0 over steps 11 to 20
        (entries((10, 4.0), (17, 1.1), (20, 4.1)), (7 * 1.1 + 3 * 4.1) / 10),
        (entries((1, 3.0)), 3.0),
    ],
)
def test_the_last_loss_does_not_depend_on_the_clock(log, expected):
    assert callbacks.recent_loss([*log, {"step": 30, "eval_loss": 7.0}]) == pytest.approx(expected)


# --- the whole page, stopped in every way ---------------------------------------------------------

# 16 steps, with dropout, so that the random state has to be right too; a checkpoint a step.
LONGER = TINY | {
    "train.per_device_train_batch_size": 4,
    "lora.lora_dropout": 0.1,
    "run.checkpoint_minutes": 0,
    "train.logging_steps": 1,
}


ORDERS = {
    "two epochs, random order": {
        "train__num_train_epochs": 2,
        "train__gradient_accumulation_steps": 2,
    },
    "grouped by length": {"train__train_sampling_strategy": "group_by_length"},
}


def command(out: Path, **more) -> list[str]:
    settings = LONGER | {key.replace("__", "."): value for key, value in more.items()}
    given = [a for k, v in settings.items() for a in ("--set", f"{k}={json.dumps(v)}")]
    stages = ["01_data_prep", "02_template_audit", "03_sft_train"]
    run = [sys.executable, "-m", "tools.run", *stages, "--overlay", "offline"]
    return [*run, "--out", str(out), *given]


def stopped(out: Path, number: int, step: int, **more) -> tuple[int, str]:
    """Send a signal once step `step` is logged; returns (exit code, what was printed)."""
    printed = []
    with subprocess.Popen(
        command(out, **more), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as run:
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


def finished(out: Path, **more) -> str:
    done = subprocess.run(command(out, **more), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("given", ORDERS.values(), ids=ORDERS.keys())
def test_a_run_that_is_stopped_in_every_way_gives_the_uninterrupted_adapter(given, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "stopped"
    finished(whole, **given)
    drawn = random.randrange(2, 6)
    shutil.copytree(whole / "01_data_prep", out / "01_data_prep")
    code, _ = stopped(out, signal.SIGKILL, drawn, **given)
    assert code == -signal.SIGKILL
    code, printed = stopped(out, signal.SIGTERM, drawn + 3, **given)
    assert code == 1
    assert re.search(r"Going on after step \d+,", printed), printed
    assert re.search(r"error: 03_sft_train stopped: Stopped after step \d+ of 16 .SIGTERM", printed)
    soon = subprocess.run(
        command(out, run__session_hours=0.001, **given), cwd=ROOT, capture_output=True, text=True
    )
    assert soon.returncode == 1
    assert "the session's end is near" in soon.stderr
    printed = finished(out, **given)
    assert "Going on after step" in printed
    name = "03_sft_train/adapter/adapter_model.safetensors"
    assert artifacts.sha256(out / name) == artifacts.sha256(whole / name), f"killed after {drawn}"
    for folder in (out, whole):
        assert not (folder / "checkpoints").exists()
        assert not [p for p in folder.rglob("*") if p.suffix in (".bin", ".pt", ".pth", ".pkl")]
    log = artifacts.read_jsonl(out / "03_sft_train" / "train_log.jsonl")
    assert [entry["step"] for entry in log if "loss" in entry] == list(range(1, 17))
    assert json.loads((out / "03_sft_train" / "summary.json").read_bytes())["resumed_after_step"]
    assert (out / "03_sft_train" / "loss.png").stat().st_size > 1000


@pytest.mark.slow
def test_a_loss_that_explodes_stops_the_page(tmp_path):
    done = subprocess.run(
        command(tmp_path, train__learning_rate=1e30), cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert re.search(r"The (loss|gradient norm) is (nan|inf) at step \d+", done.stderr)
    assert "train.learning_rate (1e+30)" in done.stderr
    assert not (tmp_path / "03_sft_train" / "manifest.json").exists()
