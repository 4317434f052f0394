"""What watches the trainer: lines of progress, the first bad loss, checkpoints by wall clock."""

import contextlib
import hashlib
import json
import math
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from atlas_lib import artifacts, bootstrap, progress, session

STAGE = "03_sft_train"
MARKER = "atlas.json"  # written last into a checkpoint: without it, it is half a checkpoint
SCALER_STEPS = 3  # in which a float16 gradient scaler may still be looking for its scale


class ProgressLines(TrainerCallback):
    """A line at each log: step, loss, time left."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.started, self.first_step = time.monotonic(), state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        done = state.global_step - self.first_step
        if "loss" in (logs or {}) and done:
            seconds, total = time.monotonic() - self.started, state.max_steps - self.first_step
            note = f", loss {float(logs['loss']):.3f}"
            progress.say("training step", done, total, seconds, note)


class LossGuard(TrainerCallback):
    """Stop at a loss or a gradient that is not finite. Raises FloatingPointError.

    A float16 scaler overflows on purpose while it looks for its scale, and now and then afterwards:
    such a step is skipped, so only gradients that stay infinite stop the run.
    """

    def __init__(self):
        self.overflows = 0

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" not in (logs or {}):
            return
        loss, gradient = float(logs["loss"]), float(logs.get("grad_norm", 0.0))
        if not math.isfinite(loss):  # the scaler never touches it
            self._stop("loss", loss, state.global_step, args)
        searching = args.fp16 and state.global_step <= SCALER_STEPS
        self.overflows = 0 if math.isfinite(gradient) or searching else self.overflows + 1
        if self.overflows > (2 if args.fp16 else 0):
            self._stop("gradient norm", gradient, state.global_step, args)

    def _stop(self, what: str, value: float, step: int, args: Any) -> None:
        raise FloatingPointError(
            f"The {what} is {value} at step {step}: nothing more would be learned. Look at "
            f"train.learning_rate ({args.learning_rate:g}), train.max_grad_norm "
            f"({args.max_grad_norm:g}), the precision printed above, and the rows of this step."
        )


class Checkpoints(TrainerCallback):
    """Checkpoints below OUT, by wall clock, at the last step, and before the session is taken away.

    A checkpoint counts only for the same configuration, inputs and precision; `resume_from` is the
    newest such one, in OUT or below /kaggle/input, or None. `folder` is the trainer's output_dir.
    """

    def __init__(self, config: Any, out: Path, device: Any, inputs: Sequence[Path]):
        made_from = artifacts.relevant(STAGE, config) | {"precision": device.dtype}
        made_from |= {path.name: artifacts.fingerprint(path) for path in inputs}
        text = json.dumps(made_from, sort_keys=True)
        self.made_from = json.loads(text)
        self.home = out / "checkpoints"
        self.folder = self.home / hashlib.sha256(text.encode()).hexdigest()[:12]
        self.interval = config.run.checkpoint_minutes * 60
        self.deadline = session.session_deadline(config)
        self.reason: str | None = None  # why training has to stop early
        self.resumed_after, self.seconds_before, self.resume_from = self._newest()

    def _newest(self) -> tuple[int, float, str | None]:
        """Step, seconds and folder of the checkpoint to go on from; half ones of ours go."""
        fitting: dict[int, tuple[float, Path]] = {}
        for home in [self.home, *sorted(artifacts.KAGGLE_INPUT.rglob("checkpoints"))]:
            for checkpoint in sorted(home.glob("*/checkpoint-*")):
                problem, seconds = self._examine(checkpoint)
                if not problem:
                    fitting[int(checkpoint.name.partition("-")[2])] = seconds, checkpoint
                    continue
                print(f"{checkpoint} is not used: {problem}.")
                if checkpoint.parent == self.folder:
                    shutil.rmtree(checkpoint)
        if not fitting:
            return 0, 0.0, None
        step, (seconds, newest) = max(fitting.items())
        print(f"Going on after step {step}, from {newest}.")
        return step, seconds, str(newest)

    def _examine(self, checkpoint: Path) -> tuple[str | None, float]:
        """(why it cannot be used or None, seconds that it took)."""
        try:
            marker = json.loads((checkpoint / MARKER).read_bytes())
            there, seconds = marker["made_from"], marker["seconds"]
        except (OSError, ValueError, KeyError, TypeError):
            return "it was not written to its end", 0.0
        for key in sorted(there.keys() | self.made_from.keys()):
            if there.get(key) != self.made_from.get(key):
                here = self.made_from.get(key)
                return f"{key} is {there.get(key)!r} there, {here!r} here", seconds
        return None, seconds

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Let a SIGTERM stop the training after the step; a second one is not held back."""

        def terminate(number, frame):
            self.reason = "SIGTERM"
            signal.signal(signal.SIGTERM, before)

        before = signal.getsignal(signal.SIGTERM)
        with contextlib.suppress(ValueError):  # only a main thread may listen
            signal.signal(signal.SIGTERM, terminate)
        try:
            yield
        finally:
            with contextlib.suppress(ValueError):
                signal.signal(signal.SIGTERM, before)

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = self.saved = time.monotonic()

    def on_step_end(self, args, state, control, **kwargs):
        if self.deadline is not None and time.time() > self.deadline:
            self.reason = "the session's end is near, see run.session_hours"
        due = time.monotonic() - self.saved >= self.interval
        if due or self.reason or state.global_step >= state.max_steps:
            # The log comes before the save: a loss that is not finite is never kept.
            control.should_save = control.should_log = True
        control.should_training_stop = control.should_training_stop or bool(self.reason)

    def on_save(self, args, state, control, **kwargs):
        newest = self.folder / f"checkpoint-{state.global_step}"
        self.saved = time.monotonic()
        marker = {"made_from": self.made_from, "seconds": self.seconds()}
        artifacts.write_json(newest / MARKER, marker)
        for older in self.folder.glob("checkpoint-*"):
            if older != newest:
                shutil.rmtree(older)

    def seconds(self) -> float:
        """Time spent in training up to the last checkpoint, earlier sessions included."""
        return self.seconds_before + self.saved - self.started

    def require_finished(self, step: int, steps: int) -> None:
        """Raises InterruptedError if training was told to stop before its last step."""
        if not self.reason or step >= steps:
            return
        again = "run the same again and it goes on from there"
        if (
            bootstrap.platform_name() == "kaggle"
        ):  # the next session starts with an empty /kaggle/working
            again = "add this version's output to the notebook's input, as a dataset, and run again"
        raise InterruptedError(
            f"Stopped after step {step} of {steps} ({self.reason}); a checkpoint is in "
            f"{self.folder}: {again}."
        )

    def remove(self) -> None:
        """Forget all checkpoints in OUT: the finished stage is the one save that stays."""
        shutil.rmtree(self.home, ignore_errors=True)


def recent_loss(log: list[dict], steps: int = 10) -> float:
    """Mean training loss of about the last `steps` steps of the trainer's log.

    An entry is the mean since the entry before it, and checkpoints add entries by the clock.
    """
    entries = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    begins = [0, *(step for step, _ in entries)]
    total, weight = 0.0, 0
    for (step, loss), begin in reversed(list(zip(entries, begins, strict=False))):
        total, weight = total + loss * (step - begin), weight + step - begin
        if weight >= steps:
            break
    return total / weight
