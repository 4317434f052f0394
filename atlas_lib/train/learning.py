"""What the model has learned so far, by kind of token: first of a response, content, stop."""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from transformers import TrainerCallback

KINDS = ("first", "content", "stop")
ROWS, TIMES, MOMENTS = 4, 12, 5  # validation rows; measurements in a training; sets of responses
CONTENT = 64  # content tokens of a row, evenly spaced: the logits of all would fill a T4


def kinds_of(labels: Sequence[int], stop_id: int) -> dict[str, list[int]]:
    """{kind: positions of its tokens} in a row of labels; a response that is cut has no stop."""
    found: dict[str, list[int]] = {kind: [] for kind in KINDS}
    trained = [label != -100 for label in labels]
    edges = zip([False, *trained], [*trained, False], strict=True)
    changes = [place for place, (before, now) in enumerate(edges) if before != now]
    for start, end in zip(changes[::2], changes[1::2], strict=True):
        whole = labels[end - 1] == stop_id
        found["first"].append(start)
        found["content"] += range(start + 1, end - whole)
        found["stop"] += [end - 1] * (whole and end - 1 > start)
    found["content"] = found["content"][:: len(found["content"]) // CONTENT + 1]
    return found


class KindLosses(TrainerCallback):
    """Add the mean loss of each kind of token, and some responses, to the training log.

    Measured on the first ROWS rows of `input_ids` and `labels`, TIMES times from before the first
    step to after the last one; `respond(model)` returns responses at MOMENTS of these times. The
    log is part of a checkpoint, so a resumed training goes on with it.
    """

    def __init__(self, rows: Iterable[dict], stop_id: int, respond: Callable[[Any], list[dict]]):
        self.rows = [row for row, _ in zip(rows, range(ROWS), strict=False)]
        self.kinds = [kinds_of(row["labels"], stop_id) for row in self.rows]
        self.respond = respond
        self.seconds = {"losses": 0.0, "responses": 0.0}  # spent in this process

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            self.measure(state, model, True)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step in _spread(state.max_steps, TIMES):
            self.measure(state, model, state.global_step in _spread(state.max_steps, MOMENTS - 1))

    def measure(self, state: Any, model: Any, with_responses: bool) -> None:
        """Append one entry to `state.log_history`."""
        begun = time.monotonic()
        model.eval()  # the trainer switches back at its next step
        entry = {"step": state.global_step, **self.losses(model)}
        measured = time.monotonic()
        if with_responses:
            entry["sampled"] = [response["response"] for response in self.respond(model)]
        state.log_history.append(entry)
        self.seconds["losses"] += measured - begun
        self.seconds["responses"] += time.monotonic() - measured

    def losses(self, model: Any) -> dict[str, float]:
        """{"loss_<kind>": mean of -log p over the tokens of that kind}."""
        import torch

        found: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for row, kinds in zip(self.rows, self.kinds, strict=True):
            places = torch.tensor([p for kind in KINDS for p in kinds[kind]], device=model.device)
            ids = torch.tensor([row["input_ids"]], device=model.device)
            with torch.no_grad():
                output = model(input_ids=ids, logits_to_keep=places - 1, use_cache=False)
            log_p = output.logits[0].float().log_softmax(-1)
            losses = -log_p.gather(-1, ids[0, places][:, None])[:, 0]
            for kind, part in zip(KINDS, losses.split([len(kinds[k]) for k in KINDS]), strict=True):
                found[kind] += part.tolist()
        return {f"loss_{kind}": sum(each) / len(each) for kind, each in found.items() if each}


def _spread(steps: int, times: int) -> set[int]:
    """`times` step numbers, evenly spaced up to the last one."""
    return {max(1, round(steps * (n + 1) / times)) for n in range(times)}
