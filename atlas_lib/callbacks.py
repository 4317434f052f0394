"""What watches the trainer: lines of progress, the first bad loss, checkpoints by wall clock."""

import contextlib
import json
import math
import shutil
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from atlas_lib import artifacts, progress, runtime

STAGE = "03_sft_train"
MADE_FROM = "made_from.json"  # written last into a checkpoint: without it, it is half a checkpoint
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
        searching = args.fp16 and state.global_step <= SCALER_STEPS
        if not math.isfinite(loss) and not searching:
            self._stop("loss", loss, state.global_step, args)
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
    newest such one, in OUT or below /kaggle/input, or None.
    """

    def __init__(self, config: Any, out: Path, device: Any, inputs: Sequence[Path]):
        self.folder = out / "checkpoints"
        self.seconds = config.run.checkpoint_minutes * 60
        self.deadline = runtime.session_deadline(config)
        self.reason: str | None = None  # why training has to stop early
        made_from = artifacts.relevant(STAGE, config) | {"precision": device.dtype}
        made_from |= {path.name: artifacts.fingerprint(path) for path in inputs}
        self.made_from = json.loads(json.dumps(made_from))
        self.resumed_after, self.resume_from = self._newest()

    def _newest(self) -> tuple[int, str | None]:
        """Step and folder of the checkpoint to go on from; in OUT, what does not fit is removed."""
        fitting: dict[int, Path] = {}
        for path in [self.folder, *sorted(artifacts.KAGGLE_INPUT.rglob("checkpoints"))]:
            for checkpoint in path.glob("checkpoint-*"):
                problem = self._problem(checkpoint)
                if not problem:
                    fitting[int(checkpoint.name.partition("-")[2])] = checkpoint
                    continue
                print(f"{checkpoint} is not used: {problem}.")
                if path == self.folder:
                    shutil.rmtree(checkpoint)
        if not fitting:
            return 0, None
        step = max(fitting)
        print(f"Going on after step {step}, from {fitting[step]}.")
        return step, str(fitting[step])

    def _problem(self, checkpoint: Path) -> str | None:
        try:
            there = json.loads((checkpoint / MADE_FROM).read_bytes())
        except (OSError, ValueError):
            return "it was not written to its end"
        for key in sorted(there.keys() | self.made_from.keys()):
            if there.get(key) != self.made_from.get(key):
                return f"{key} is {there.get(key)!r} there, {self.made_from.get(key)!r} here"
        return None

    def on_train_begin(self, args, state, control, **kwargs):
        self.saved = time.monotonic()
        with contextlib.suppress(ValueError):  # only a main thread may listen
            self.before = signal.signal(signal.SIGTERM, self._terminate)

    def _terminate(self, number, frame):
        self.reason = "SIGTERM"
        signal.signal(signal.SIGTERM, self.before)  # a second one is not held back

    def on_step_end(self, args, state, control, **kwargs):
        if self.deadline is not None and time.time() > self.deadline:
            self.reason = "the session's end is near"
        due = time.monotonic() - self.saved >= self.seconds
        if due or self.reason or state.global_step >= state.max_steps:
            # The log comes before the save: a loss that is not finite is never kept.
            control.should_save = control.should_log = True
        control.should_training_stop = control.should_training_stop or bool(self.reason)

    def on_save(self, args, state, control, **kwargs):
        newest = self.folder / f"checkpoint-{state.global_step}"
        artifacts.write_json(newest / MADE_FROM, self.made_from)
        for older in self.folder.glob("checkpoint-*"):
            if older != newest:
                shutil.rmtree(older)
        self.saved = time.monotonic()

    def on_train_end(self, args, state, control, **kwargs):
        if hasattr(self, "before"):
            signal.signal(signal.SIGTERM, self.before)

    def require_finished(self, step: int, steps: int) -> None:
        """Raises InterruptedError if training was told to stop before its last step."""
        if self.reason and step < steps:
            raise InterruptedError(
                f"Stopped after step {step} of {steps} ({self.reason}); a checkpoint is in "
                f"{self.folder}: run the same again and it goes on from there."
            )

    def remove(self) -> None:
        """Forget the checkpoints: the finished stage is the one save that stays."""
        shutil.rmtree(self.folder, ignore_errors=True)
