"""Callbacks of the trainer: progress lines, a check of the loss, and checkpoints by wall clock."""

import contextlib
import math
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
from transformers import TrainerCallback

from atlas_lib import artifacts, bootstrap, progress, stages
from atlas_lib.devices import Device
from atlas_lib.schema import Config
from atlas_lib.train import adapters

COMPLETE = "atlas.json"  # written last into a checkpoint, which is incomplete without it
SKIPPED = "skipped_steps"  # in the training log
MAX_SKIPPED = 0.05


class ProgressLines(TrainerCallback):
    """Print step, loss and remaining time at each log."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.started, self.first_step = time.monotonic(), state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        done = state.global_step - self.first_step
        if "loss" in (logs or {}) and done:
            seconds, total = time.monotonic() - self.started, state.max_steps - self.first_step
            note = f", loss {float(logs['loss']):.3f}"
            progress.log_progress("training step", done, total, seconds, note)


class LossGuard(TrainerCallback):
    """Stop the training at a loss or a gradient that is not finite. Raises FloatingPointError.

    A float16 scaler overflows while it searches for its scale, and occasionally afterwards: it
    skips the step and lowers its scale. PyTorch's fused optimizers do not report that, so `skipped`
    counts it here. A scale below 1 means gradients that stay infinite; more than one skipped step
    and more than MAX_SKIPPED of all steps mean a training that is not the configured one.
    """

    skipped, scale = 0, None

    def on_train_begin(self, args, state, control, **kwargs):
        self.skipped = max((entry.get(SKIPPED, 0) for entry in state.log_history), default=0)

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.scale = optimizer.scaler.get_scale() if optimizer.scaler else None

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        if self.scale is None:
            return
        before, self.scale = self.scale, optimizer.scaler.get_scale()
        self.skipped += self.scale < before
        if self.skipped > max(1, MAX_SKIPPED * state.max_steps):
            _stop(args, f"{self.skipped} of {state.max_steps} steps skipped by the float16 scaler")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in (logs or {}):
            return
        if self.scale is not None:
            state.log_history[-1][SKIPPED] = self.skipped  # restored from a checkpoint
        loss, gradient = float(logs["loss"]), float(logs.get("grad_norm", 0.0))
        searching = self.scale is not None and self.scale >= 1
        if not math.isfinite(loss) or not (math.isfinite(gradient) or searching):
            _stop(args, f"Loss {loss} and gradient norm {gradient} at step {state.global_step}")

    def on_train_end(self, args, state, control, **kwargs):
        if self.scale is not None:
            print(f"float16 scaler: {self.skipped} of {state.global_step} steps skipped")


def _stop(args, what: str) -> None:
    raise FloatingPointError(
        f"{what}: training has diverged. Lower train.learning_rate ({args.learning_rate:g}) or "
        f"train.max_grad_norm ({args.max_grad_norm:g}), or look for an unusual row in this step."
    )


class Checkpoints(TrainerCallback):
    """Save by wall clock, at the last step, on SIGTERM and shortly before the session ends.

    `folder` is the trainer's output_dir. `resume_from` is the newest checkpoint, in OUT or below
    /kaggle/input, of the same configuration, inputs and precision; None if there is none.

    transformers' enable_jit_checkpoint is not enough here: it saves between a forward pass and its
    optimizer step, after which resumed dropout differs, and it calls no `on_save`. Its
    get_last_checkpoint takes incomplete checkpoints and those of another configuration.
    """

    def __init__(self, config: Config, out: Path, device: Device, inputs: Sequence[Path]):
        self.made_from = artifacts.made_from(stages.SFT_TRAIN, config)
        self.made_from |= {path.name: artifacts.result_digest(path) for path in inputs}
        self.made_from |= {"precision": device.dtype}
        self.home = out / "checkpoints"
        self.folder = self.home / artifacts.digest(self.made_from)
        self.interval = config.run.checkpoint_minutes * 60
        self.deadline = session_deadline(config)
        self.reason: str | None = None  # why the training has to stop early
        self.resumed_after, self.seconds_before, self.resume_from = self._newest()

    def _newest(self) -> tuple[int, float, str | None]:
        """Step, seconds of training and folder of the checkpoint to resume from."""
        found: list[tuple[int, float, str | None]] = [(0, 0.0, None)]
        for home in (self.home, *artifacts.KAGGLE_INPUT.rglob("checkpoints")):
            for path in sorted(home.glob(f"*/checkpoint-*/{COMPLETE}")):
                marker = artifacts.read_json(path)
                if problem := artifacts.difference(marker["made_from"], self.made_from):
                    print(f"{path.parent} is not resumed: {problem}.")
                else:
                    found.append((marker["step"], marker["seconds"], str(path.parent)))
        step, seconds, newest = max(found, key=lambda checkpoint: checkpoint[0])
        if newest:
            print(f"Resuming after step {step} from {newest}.")
        return step, seconds, newest

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Save and stop after the current step on SIGTERM; a second SIGTERM acts at once."""

        def stop(number, frame):
            self.reason = "SIGTERM"
            signal.signal(number, before)

        before = signal.signal(signal.SIGTERM, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.started = self.saved = time.monotonic()
        adapters.save_without_hub(model)

    def on_step_end(self, args, state, control, **kwargs):
        if self.deadline is not None and time.time() > self.deadline:
            self.reason = "the session's end is near, see run.session_hours"
        due = time.monotonic() - self.saved >= self.interval
        if due or self.reason or state.global_step >= state.max_steps:
            # The log comes before the save, so that LossGuard sees a bad loss before it is saved.
            control.should_save = control.should_log = True
        control.should_training_stop = control.should_training_stop or bool(self.reason)

    def on_save(self, args, state, control, **kwargs):
        newest = self.folder / f"checkpoint-{state.global_step}"
        self.saved = time.monotonic()
        marker = {"made_from": self.made_from, "step": state.global_step}
        artifacts.write_json(newest / COMPLETE, marker | {"seconds": self.seconds()})
        for older in set(self.folder.glob("checkpoint-*")) - {newest}:
            shutil.rmtree(older)

    def on_train_end(self, args, state, control, **kwargs):
        """Raises InterruptedError if the training was stopped before its last step."""
        if not self.reason or state.global_step >= state.max_steps:
            return
        again = "run the same command again to resume"
        if bootstrap.platform_name() == "kaggle":  # whose next session has an empty /kaggle/working
            again = "add this version's output to the notebook's input and run it again"
        raise InterruptedError(
            f"Training stopped after step {state.global_step} of {state.max_steps} ({self.reason}) "
            f"and is saved in {self.folder}; {again}."
        )

    def seconds(self) -> float:
        """Time spent in training up to the last checkpoint, earlier sessions included."""
        return self.seconds_before + self.saved - self.started

    def remove(self) -> None:
        """Delete all checkpoints in OUT, once the finished stage has replaced them."""
        shutil.rmtree(self.home, ignore_errors=True)


def session_deadline(config: Config) -> float | None:
    """Unix time by which work has to be saved, ten minutes before the session ends; None: never.

    A hosted session starts with its first process, any other with this one. Prints the deadline.
    """
    hours = config.run.session_hours or (12 if bootstrap.platform_name() == "kaggle" else None)
    if hours is None:
        return None
    begun = [psutil.Process().create_time()]
    with contextlib.suppress(psutil.Error):
        begun += [psutil.Process(1).create_time()] if bootstrap.platform_name() != "local" else []
    length = hours * 3600 - 600
    # A first process older than a session can be cannot be the session's own.
    deadline = next((t + length for t in reversed(begun) if t + length > time.time()), None)
    deadline = deadline or begun[0] + length
    print(f"Work is saved by {time.ctime(deadline)} (run.session_hours: {hours:g}).")
    return deadline
